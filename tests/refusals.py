"""Refusals of bad input by the command line."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mrilib.__main__ import main

USAGE = 2  # argparse's exit status for a wrong command line


@dataclass(frozen=True)
class Refusal:
    """One kind of bad input."""

    kind: str  # name of the test
    prepare: Callable[[Path], list[str]]  # writes the input into an empty folder and returns the arguments
    words: tuple[str, ...]  # of the error line: file, key or parameter, and advice

    def __str__(self) -> str:
        return self.kind.replace(" ", "-")


def assert_refused(arguments: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Check that a command fails with one printable line on stderr that contains all the words."""
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
