"""Errors in one line of plain text, safe for a terminal; a traceback goes to a log file."""

import logging
import os
import time
import traceback
from pathlib import Path

PACKAGE = Path(__file__).parent
MAX_LINE_LENGTH = 2000  # characters of an error line
MAX_VALUE_LENGTH = 120  # characters of a value in an error line


def printable(text: str) -> str:
    r"""The text with control characters, direction marks and half surrogate pairs escaped, such as ``\x1b``."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def shortened(text: str, longest: int = MAX_VALUE_LENGTH) -> str:
    """The printable text; of a long one the beginning, and how long it is."""
    cut = text if len(text) <= longest else text[:longest]
    return printable(cut) + ("" if cut is text else f"… ({len(text)} characters)")


def is_foreseen(error: BaseException) -> bool:
    """Whether an exception's message was written for the user: raised in this package, or about a named file."""
    if isinstance(error, OSError) and error.filename:
        return True
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    return last is not None and Path(last.filename).is_relative_to(PACKAGE) and (last.line or "").startswith("raise ")


def one_line(error: BaseException) -> str:
    """What an exception says, in one printable line.

    Lines are joined. An operating-system error names its file first. An exception that was not foreseen is preceded by
    its class, as the messages of some say nothing without it (KeyError).
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
    told = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        told += (" " if told.endswith((":", ".")) else "; " if told else "") + line
    return shortened(told, MAX_LINE_LENGTH)


def log_traceback(error: BaseException) -> str:
    """Write an exception's traceback to a log file and return a clause that names the file.

    The log is that of the run which is open; without one, a new file in the user's cache folder.
    """
    lines = "".join(traceback.format_exception(error))
    for handler in logging.getLogger("mrilib").handlers:
        if isinstance(handler, logging.FileHandler):
            path = Path(handler.baseFilename)
            break
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        path = base / "mrilib" / "errors" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(lines)
    except OSError as problem:
        return f"the traceback could not be written to {printable(str(path))}: {problem.strerror}"
    return f"the traceback is in {printable(str(path))}"
