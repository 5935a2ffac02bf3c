"""Files that are written whole or not at all: JSON, and logs of one JSON object a line."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mrilib.config import ParameterError, display_path

logger = logging.getLogger("mrilib")


def write_json(path: Path, content: Any) -> None:
    """Write JSON under a temporary name, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it into place; an OSError names the file."""
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text(text, encoding="utf-8", newline="")
        os.replace(temporary, path)
    except OSError as error:  # a full disk does not name the file
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"could not be written ({error.strerror})", display_path(path)) from error


def read_json(path: Path) -> Any:
    """Read a JSON file; a ParameterError names it if it is missing, no regular file or damaged."""
    if not path.is_file():
        raise ParameterError(f"'{display_path(path)}' {'is no regular file' if path.exists() else 'does not exist'}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ParameterError(f"'{display_path(path)}' is not JSON: {error}") from None


class JsonLines:
    """A log of one JSON object a line, flushed line by line.

    Parameters
    ----------
    path : Path
    keep : callable, optional
        Which of the objects that the file already holds stay; all by default.
    """

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool] | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if keep is not None and path.exists():
            kept = [entry for entry in read_json_lines(path) if keep(entry)]
            write_whole(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self.path = path
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open for the run's whole length)

    def write(self, **values: Any) -> None:
        """Append one line."""
        try:
            self.file.write(json.dumps(values, allow_nan=True) + "\n")
            self.file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # closing writes what is left, too
                self.file.close()
            raise OSError(f"the log '{display_path(self.path)}' could not be written: {error}") from error

    def sync(self) -> None:
        """Have all lines on disk, not in the system's memory alone."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of such a log; none if it is not there. A last line that was cut off is left out."""
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
                    f"the log '{display_path(path)}' is damaged in line {number}; delete the line, or put back a copy"
                )
            entries.append(entry)
    return entries


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
