"""Errors in one line of plain text, safe for a terminal; tracebacks go to a log file."""

import logging
import os
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).parent
STOPPED = 130  # exit status after a signal, as shells have it for Ctrl-C
MAX_LINE_LENGTH = 2000  # characters of an error line
MAX_VALUE_LENGTH = 120  # characters of a value in an error line


class ParameterError(ValueError):
    """Unknown parameter, invalid value, or missing file.

    Parameters
    ----------
    message : str
    names : sequence of str
        Names of the wrong parameters, if known.
    """

    def __init__(self, message: str, names: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.names = list(names)


def printable(text: str, keep: str = "") -> str:
    r"""Escape control characters, direction marks and half surrogate pairs (``\x1b``), except those in `keep`.

    A terminal would execute control characters.
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, longest: int = MAX_VALUE_LENGTH) -> str:
    """Make a text printable; cut a long one and append its length."""
    if len(text) <= longest:
        return printable(text)
    return f"{printable(text[:longest])}… ({len(text)} characters)"


def is_foreseen(error: BaseException) -> bool:
    """Return whether an exception's message was written for the user.

    True for exceptions raised by this package, and for operating-system errors that name a file.
    """
    if isinstance(error, OSError) and error.filename:
        return True
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    return last is not None and Path(last.filename).is_relative_to(PACKAGE) and (last.line or "").startswith("raise ")


def one_line(error: BaseException) -> str:
    """Return an exception's message in one printable line.

    Operating-system errors begin with their file. Exceptions that were not foreseen begin with their class, because
    some messages mean nothing without it (KeyError).
    """
    if isinstance(error, OSError) and isinstance(error.filename, str | bytes) and error.strerror:
        text = f"'{os.fsdecode(error.filename)}': {error.strerror}"
    elif isinstance(error, UnicodeEncodeError):
        text = f"'{error.object}' is not valid text: it cannot be written as {error.encoding}"
    elif isinstance(error, MemoryError):
        text = f"out of memory. {error}"
    else:
        text = str(error)
        if not text.strip() or not is_foreseen(error):
            text = f"{type(error).__name__}: {text}"
    joined = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        joined += (" " if joined.endswith((":", ".")) else "; " if joined else "") + line
    return shortened(joined, MAX_LINE_LENGTH)


def log_traceback(error: BaseException) -> str:
    """Write an exception's traceback to a log file and return a clause that names the file.

    The file is the log of the open run, or else a new file in the user's cache folder.
    """
    for handler in logging.getLogger("mrilib").handlers:
        if isinstance(handler, logging.FileHandler):
            path = Path(handler.baseFilename)
            break
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        path = cache / "mrilib" / "errors" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write("".join(traceback.format_exception(error)))
    except OSError as problem:
        return f"the traceback could not be written to {printable(str(path))}: {problem.strerror}"
    return f"the traceback is in {printable(str(path))}"
