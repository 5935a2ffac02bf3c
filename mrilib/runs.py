"""Run records: one folder a run, with its parameters, notebooks, logs, checkpoints, figures and metrics.

``run.json`` is written before step 0 and kept current, each time as a whole: under a temporary name, then renamed.
"""

import contextlib
import ctypes
import fcntl
import functools
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import matplotlib.figure
import psutil
import torch
from transformers.utils.logging import disable_progress_bar

from mrilib.config import NOTEBOOKS, ROOT, OutputParameters, ParameterError, display_path, resolve
from mrilib.style import png_bytes

PACKAGES = ("torch", "transformers", "accelerate", "fastmri", "safetensors", "h5py", "numpy", "papermill")
logger = logging.getLogger("mrilib")


def write_json(path: Path, content: Any) -> None:
    """Write JSON under a temporary name, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """Read a JSON file; a ParameterError names it if it is missing or damaged."""
    if not path.is_file():
        raise ParameterError(f"'{display_path(path)}' does not exist")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ParameterError(f"'{display_path(path)}' is not JSON: {error}") from None


class Run:
    """A run's folder and its record.

    Parameters
    ----------
    directory : Path
        The run folder, made if it is not there.
    planned : sequence of str
        Notebooks (keys of config.NOTEBOOKS) that the run consists of; it is done when all of them are.
    """

    def __init__(self, directory: Path, planned: list[str]) -> None:
        self.directory = directory
        self.record_path = directory / "run.json"
        if self.record_path.exists():
            self.record = read_json(self.record_path)
            self.record["planned"] += [name for name in planned if name not in self.record["planned"]]
        else:
            self.record = {"name": directory.name, "status": "running", "planned": planned, "notebooks": {}}
            self.record |= {"started": _now(), "git": git_state(), "versions": versions(), "hardware": hardware()}

    def save(self) -> None:
        """Write run.json; the status follows from those of the notebooks."""
        states = [self.record["notebooks"].get(name, {}).get("status") for name in self.record["planned"]]
        self.record["status"] = (
            "failed" if "failed" in states else "done" if all(s == "done" for s in states) else "running"
        )
        self.record["updated"] = _now()
        write_json(self.record_path, self.record)

    def start(self, notebook: str, config: OutputParameters) -> None:
        """Record that a notebook has begun, with its resolved parameters."""
        self.record["notebooks"][notebook] = {
            "status": "running",
            "started": _now(),
            "git": git_state(),  # a folder may be used again with later code
            "config": config.to_dict(),
        }
        self.save()

    def resumed(self) -> None:
        """Record that the run goes on, and with which code."""
        self.record.setdefault("resumed", []).append({"time": _now(), "git": git_state()})
        self.save()

    def note(self, notebook: str, **facts: Any) -> None:
        """Add facts (plain numbers, strings, lists, dicts) to a notebook's part of the record."""
        json.dumps(facts, allow_nan=False)  # refused before the record holds what can never be written
        self.record["notebooks"][notebook].update(facts)
        self.save()

    def finish(self, notebook: str, status: str = "done", **facts: Any) -> None:
        """Record that a notebook has ended: done, or failed. The run folder is free again."""
        self.note(notebook, status=status, finished=_now(), **facts)
        release(self.directory)

    def save_figure(self, figure: matplotlib.figure.Figure, name: str) -> Path:
        """Save a figure as figures/NAME.png."""
        path = self.directory / "figures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png_bytes(figure, dpi=110))
        return path

    def update_metrics(self, **sections: Any) -> None:
        """Merge sections into metrics.json."""
        path = self.directory / "metrics.json"
        metrics = read_json(path) if path.exists() else {}
        for name, section in sections.items():
            metrics[name] = {**metrics.get(name, {}), **section}
        write_json(path, metrics)


def start(notebook: str, config: OutputParameters) -> Run:
    """Open the run folder of a notebook, record its start, and begin its log.

    An empty ``output_dir`` makes a new folder under outputs/, named after the notebook and the time. In IPython a cell
    that fails marks the notebook, and with it the run, as failed.
    """
    disable_progress_bar()  # transformers' bars for loading a file would stay in the record
    name = config.output_dir or f"outputs/{notebook}-{datetime.now():%Y%m%d-%H%M%S}"
    hold(resolve(name))
    run = Run(resolve(name), [notebook])
    run.start(notebook, config)
    _log_to(run.directory / "logs" / f"{notebook}-{datetime.now():%Y%m%d-%H%M%S}.log")
    logger.info("%s starts in %s", NOTEBOOKS[notebook][0], display_path(run.directory))
    _mark_failures(run, notebook)
    return run


def _log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _mark_failures(run: Run, notebook: str) -> None:
    shell = _ipython()
    if shell is None:
        return

    def after_cell(result: Any) -> None:
        error = result.error_in_exec or result.error_before_exec
        if error is not None and run.record["notebooks"][notebook]["status"] == "running":
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            logger.error("%s failed: %s", notebook, ": ".join([type(error).__name__, *lines[:1]]))
            run.finish(notebook, "failed", error=f"{type(error).__name__}: {error}")

    shell.events.register("post_run_cell", after_cell)


def _ipython() -> Any:
    module = sys.modules.get("IPython")
    return module.get_ipython() if module else None


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
            temporary = path.with_name(path.name + ".part")
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
            os.replace(temporary, path)
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
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


# ---------------------------------------------------------------------------------------------- one process a folder

RUN_VARIABLE = "MRILIB_RUN"  # tells the processes that a run starts which folder it holds for them
_held: dict[Path, TextIO] = {}
_claimed: set[Path] = set()  # those of them that this process was the first to hold


def hold(directory: Path, wait: float = 3.0) -> None:
    """Claim a run folder for this process and those that it starts, until `release` or their end.

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
        withdraw_stop(directory)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {_now()}\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_SH)
        os.environ[RUN_VARIABLE] = str(directory)
        _claimed.add(directory)
    _held[directory] = file


def release(directory: Path) -> None:
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


def withdraw_stop(directory: Path) -> None:
    """Take `request_stop` back."""
    (directory / STOP_FILE).unlink(missing_ok=True)


def stop_requested(directory: Path | None = None) -> bool:
    """Whether `request_stop` was called since the run's first process started; of any folder held here by default."""
    return any((folder / STOP_FILE).exists() for folder in ([directory] if directory else list(_held)))


# ------------------------------------------------------------------------------------------ processes and signals


def ends_with_this_process() -> dict[str, Any]:
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


class _InPlace:
    """A text stream for tqdm that shows its last line in one notebook output, so that records hold no progress spam."""

    def __init__(self) -> None:
        from IPython.display import Code, display

        self.show = lambda text: Code(text, language="text")
        self.handle = display(self.show("…"), display_id=True)

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            self.handle.update(self.show(line))

    def flush(self) -> None:
        """Nothing is kept back."""


def progress_bar(total: int, description: str, interactive: bool = False, show: bool = True) -> Any:
    """A tqdm bar: a widget in an interactive notebook, one line in a headless record, the terminal elsewhere."""
    if not show:
        from tqdm import tqdm

        return tqdm(disable=True)
    if _ipython() is None:
        from tqdm import tqdm

        return tqdm(total=total, desc=description, dynamic_ncols=True)
    if interactive:
        from tqdm.notebook import tqdm as notebook_tqdm

        return notebook_tqdm(total=total, desc=description)
    from tqdm import tqdm

    return tqdm(total=total, desc=description, file=_InPlace(), mininterval=1.0, ncols=110, ascii=" ━")


def git_state() -> dict[str, Any]:
    """Commit of the repository and whether the work tree differs from it; commit None outside of git."""
    command = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run([*command, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and CUDA devices."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory,
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def peak_memory_bytes() -> int:
    """Peak resident memory of this process, or of its CUDA device if it has one [bytes]."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def all_runs(directory: str | Path = "outputs") -> list[Path]:
    """Run folders below a directory, oldest first."""
    records = [path.parent for path in resolve(directory).glob("*/run.json")]
    return sorted(records, key=lambda path: read_json(path / "run.json")["started"])


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
