"""Run folders and processes: the lock of a run folder, its stop file, signals, and child processes."""

import contextlib
import ctypes
import fcntl
import functools
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

from mrilib.errors import ParameterError
from mrilib.files import display_path, timestamp

RUN_VARIABLE = "MRILIB_RUN"  # environment variable: the run folder that the parent process has locked
STOP_FILE = "stop"

held_locks: dict[Path, TextIO] = {}  # run folder → its open lock file
_exclusive: set[Path] = set()  # folders that this process locked first


def lock_run(directory: Path, wait: float = 3.0) -> None:
    """Lock a run folder for this process and its children, until `unlock_run` or the end of all of them.

    The exclusive lock shows that nobody else uses the folder. It then becomes a shared lock, which child processes
    take as well. So the folder stays locked until the last child has ended, even if this process is killed.

    Parameters
    ----------
    directory : Path
    wait : float
        Time to wait for the children of a killed run to end [s].

    Raises
    ------
    ParameterError
        If another process holds the folder.
    """
    if directory in held_locks:
        return
    directory.mkdir(parents=True, exist_ok=True)
    is_child = os.environ.get(RUN_VARIABLE) == str(directory)
    file = open(directory / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (the lock lasts while the file is open)
    deadline = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if is_child else fcntl.LOCK_EX) | fcntl.LOCK_NB)
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
    if not is_child:
        cancel_stop(directory)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {timestamp()}\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_SH)
        os.environ[RUN_VARIABLE] = str(directory)
        _exclusive.add(directory)
    held_locks[directory] = file


def unlock_run(directory: Path) -> None:
    """Release a run folder."""
    file = held_locks.pop(directory, None)
    if file is not None:
        file.close()
    if directory in _exclusive:  # processes started from now on are not children of that run
        _exclusive.remove(directory)
        if os.environ.get(RUN_VARIABLE) == str(directory):
            del os.environ[RUN_VARIABLE]


def request_stop(directory: Path, reason: str) -> None:
    """Ask the training in a run folder to save and stop after its current step."""
    (directory / STOP_FILE).write_text(reason + "\n")


def cancel_stop(directory: Path) -> None:
    """Undo `request_stop`."""
    (directory / STOP_FILE).unlink(missing_ok=True)


def stop_requested(directory: Path | None = None) -> bool:
    """Return whether `request_stop` was called for a folder; by default, for any folder locked by this process."""
    return any((folder / STOP_FILE).exists() for folder in ([directory] if directory else list(held_locks)))


def child_process_options() -> dict[str, Any]:
    """Return subprocess.Popen options for a child that ignores the terminal's Ctrl-C and ends with this process."""
    libc = ctypes.CDLL(None)
    die = functools.partial(libc.prctl, 1, int(signal.SIGTERM)) if hasattr(libc, "prctl") else None  # PR_SET_PDEATHSIG
    return {"start_new_session": True, "preexec_fn": die}


def end_process(process: "subprocess.Popen[Any]", wait: float = 60.0) -> None:
    """Terminate a process and its children; kill those that have not ended after `wait` [s]."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for child in psutil.wait_procs(children, timeout=5)[1]:
        child.kill()


@contextlib.contextmanager
def stop_on_signals(directory: Path, also: Callable[[int], None] | None = None) -> Iterator[list[int]]:
    """Write the run's stop file on SIGTERM, SIGINT and SIGHUP; yield the list of received signals.

    Parameters
    ----------
    directory : Path
    also : callable, optional
        Called with the number of signals received so far.
    """
    received: list[int] = []

    def handler(number: int, frame: Any) -> None:
        received.append(number)
        request_stop(directory, signal.Signals(number).name)
        if also is not None:
            also(len(received))

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield received
        return
    before = {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            before[number] = signal.signal(number, handler)
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old)
