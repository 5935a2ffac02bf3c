"""Bad input at the command line: a row for each kind, and the one way in which it must be refused."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mrilib.__main__ import main

USAGE = 2  # argparse's exit status for a command line that it cannot read


@dataclass(frozen=True)
class Refusal:
    """One kind of bad input.

    Attributes
    ----------
    kind : str
        What is wrong; the test's name.
    prepare : callable
        Writes the bad input into an empty folder and returns the command's arguments.
    words : tuple of str
        What the error line must contain: the file, key or parameter, and what to do.
    """

    kind: str
    prepare: Callable[[Path], list[str]]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return self.kind.replace(" ", "-")


def assert_refused(arguments: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """The command fails with exactly one line on stderr, which holds all the words and no control character."""
    capsys.readouterr()
    try:
        status = main(arguments)
    except SystemExit as end:  # argparse
        status = int(end.code or 0)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.strip()]
    assert status in (1, USAGE), (status, error)
    errors = [line for line in lines if "error: " in line]
    assert len(errors) == 1, error
    assert status == USAGE or len(lines) == 1, error
    assert "Traceback" not in error and errors[0].isprintable(), error
    assert all(word in errors[0] for word in words), (words, errors[0])
