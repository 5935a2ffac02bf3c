"""Run folders and processes: the lock of a run folder, its stop file, signals, and child processes."""

import contextlib
import ctypes
import fcntl
import functools
import logging
import os
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import psutil

from mrilib.config import ParameterError, display_path
from mrilib.files import _now

logger = logging.getLogger("mrilib")


# ---------------------------------------------------------------------------------------------- one process a folder

RUN_VARIABLE = "MRILIB_RUN"  # tells the processes that a run starts which folder it holds for them


_held: dict[Path, TextIO] = {}


_claimed: set[Path] = set()  # those of them that this process was the first to hold


def lock_run(directory: Path, wait: float = 3.0) -> None:
    """Claim a run folder for this process and those that it starts, until `unlock_run` or their end.

    An exclusive lock finds out whether anyone is there; a shared one is then kept, which the processes that this one
    starts take too. So the folder is claimed until the last of them has ended, even if the first was killed.

    Parameters
    ----------
    directory : Path
    wait : float
        How long to wait for the remains of a killed run to end [s].

    Raises
    ------
    ParameterError
        Another process holds the folder.
    """
    if directory in _held:
        return
    directory.mkdir(parents=True, exist_ok=True)
    family = os.environ.get(RUN_VARIABLE) == str(directory)
    file = open(directory / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (the lock lasts as long as it is open)
    deadline = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if family else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise ParameterError(
                    f"'{display_path(directory)}' is in use by {holder}; wait for its end, or choose another output_dir"
                ) from None
            time.sleep(0.1)
    if not family:
        cancel_stop(directory)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {_now()}\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_SH)
        os.environ[RUN_VARIABLE] = str(directory)
        _claimed.add(directory)
    _held[directory] = file


def unlock_run(directory: Path) -> None:
    """Give a run folder up."""
    file = _held.pop(directory, None)
    if file is not None:
        file.close()
    if directory in _claimed:  # what this process starts from now on is no longer at work for that run
        _claimed.remove(directory)
        if os.environ.get(RUN_VARIABLE) == str(directory):
            del os.environ[RUN_VARIABLE]


STOP_FILE = "stop"


def request_stop(directory: Path, reason: str) -> None:
    """Ask the training in a run folder to save and stop after the step that is under way."""
    (directory / STOP_FILE).write_text(reason + "\n")


def cancel_stop(directory: Path) -> None:
    """Take `request_stop` back."""
    (directory / STOP_FILE).unlink(missing_ok=True)


def stop_requested(directory: Path | None = None) -> bool:
    """Whether `request_stop` was called since the run's first process started; of any folder held here by default."""
    return any((folder / STOP_FILE).exists() for folder in ([directory] if directory else list(_held)))


# ------------------------------------------------------------------------------------------ processes and signals


def child_process_options() -> dict[str, Any]:
    """Options of subprocess.Popen for a child that a terminal's Ctrl-C does not reach and that does not outlive us."""
    libc = ctypes.CDLL(None)
    die = functools.partial(libc.prctl, 1, int(signal.SIGTERM)) if hasattr(libc, "prctl") else None  # PR_SET_PDEATHSIG
    return {"start_new_session": True, "preexec_fn": die}


def end_process(process: "subprocess.Popen[Any]", wait: float = 60.0) -> None:
    """End a process, if it has not ended, and all that it has started: asked first, killed after `wait` seconds."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for child in psutil.wait_procs(family, timeout=5)[1]:
        child.kill()


@contextlib.contextmanager
def stop_on_signals(directory: Path, also: Callable[[int], None] | None = None) -> Iterator[list[int]]:
    """Turn SIGTERM, SIGINT and SIGHUP into the run's stop file; yields the list of those that came.

    Parameters
    ----------
    directory : Path
    also : callable, optional
        Called with how many have come.
    """
    came: list[int] = []

    def handler(number: int, frame: Any) -> None:
        came.append(number)
        request_stop(directory, signal.Signals(number).name)
        if also is not None:
            also(len(came))

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's
            before[number] = signal.signal(number, handler)
    try:
        yield came
    finally:
        for number, old in before.items():
            signal.signal(number, old)
