"""Paths, files that are written completely or not at all, and logs of one JSON object per line."""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mrilib.errors import ParameterError, shortened

ROOT = Path(__file__).resolve().parent.parent


def resolve(path: str | Path) -> Path:
    """Return the absolute path of a parameter; relative paths start at the repository's root.

    The working directory is the root under papermill and notebooks/ in JupyterLab; the root is the same in both.

    Raises
    ------
    ParameterError
        For a loop of links, or the home folder of a user who does not exist.
    """
    try:
        # Unlike Path.resolve, realpath accepts a loop of links; opening the file then reports it.
        return Path(os.path.realpath(ROOT / Path(path).expanduser()))
    except (RuntimeError, OSError, ValueError) as error:
        raise ParameterError(f"the path '{shortened(str(path))}' cannot be resolved: {error}") from None


def display_path(path: str | Path) -> str:
    """Return a path for messages and records: relative to the repository's root if it is inside."""
    absolute = resolve(path)
    return absolute.relative_to(ROOT).as_posix() if absolute.is_relative_to(ROOT) else str(absolute)


def require_utf8(path: str | Path) -> None:
    """Refuse a path that is not valid UTF-8: no record, table or params file can hold it.

    Raises
    ------
    ParameterError
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ParameterError(f"the name of '{path}' is no UTF-8; choose another name") from None


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it to `path` at the end, or delete it on an error.

    Raises
    ------
    OSError
        With the name of the file, which the system's error about a full disk lacks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise OSError(error.errno, f"could not be written ({error.strerror})", display_path(path)) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; see `atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically; see `atomic_write`."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_together(folder: Path, writers: Mapping[str, Callable[[Path], Any]]) -> None:
    """Write several files of a folder: all of them, or none.

    Parameters
    ----------
    folder : Path
    writers : mapping of str to callable
        File name → function that writes the file at the path it is given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
        for name, write in writers.items():
            write(Path(temporary) / name)
        new: list[Path] = []
        try:
            for name in writers:
                if not (folder / name).exists():
                    new.append(folder / name)
                os.replace(Path(temporary) / name, folder / name)
        except OSError:
            for path in new:
                path.unlink(missing_ok=True)
            raise


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises
    ------
    ParameterError
        If it is missing or damaged.
    """
    if not path.is_file():
        reason = "is no regular file" if path.exists() else "does not exist"
        raise ParameterError(f"'{display_path(path)}' {reason}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ParameterError(f"'{display_path(path)}' is not JSON: {error}") from None


class JsonLines:
    """Log of one JSON object per line, flushed after every line.

    Parameters
    ----------
    path : Path
    keep : callable, optional
        Returns whether an object that is already in the file stays; all stay by default.
    """

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool] | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if keep is not None and path.exists():
            write_text(path, "".join(json.dumps(entry) + "\n" for entry in read_json_lines(path) if keep(entry)))
        self.path = path
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)

    def write(self, **values: Any) -> None:
        """Append one line."""
        try:
            self.file.write(json.dumps(values, allow_nan=True) + "\n")
            self.file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # closing writes the rest of the buffer
                self.file.close()
            raise OSError(f"the log '{display_path(self.path)}' could not be written: {error}") from error

    def sync(self) -> None:
        """Force all lines to the disk."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a `JsonLines` log; return an empty list if there is none.

    An incomplete last line is ignored: the process that wrote it was killed.

    Raises
    ------
    ParameterError
        If another line is damaged.
    """
    if not path.exists():
        return []
    entries = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                continue
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                entry = None
            if not isinstance(entry, dict):
                raise ParameterError(
                    f"the log '{display_path(path)}' is damaged in line {number}; delete the line or restore a copy"
                )
            entries.append(entry)
    return entries


def timestamp() -> str:
    """Return the local time for records, such as 2026-01-31T12:00:00+0100."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
