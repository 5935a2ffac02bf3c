"""Run records: one folder per run, with its parameters, notebooks, logs, checkpoints, figures and metrics.

``run.json`` is written before step 0 and updated atomically.
"""

import contextlib
import errno
import json
import logging
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from transformers.utils.logging import disable_progress_bar

from mrilib import progress
from mrilib.config import NOTEBOOKS, OutputParameters, ParameterError, TrainingParameters, display_path, resolve
from mrilib.environment import git_state, hardware, versions
from mrilib.files import read_json, timestamp, write_json
from mrilib.processes import held_locks, lock_run, unlock_run
from mrilib.training.resume import check_folder

logger = logging.getLogger("mrilib")

REFUSALS = ("ParameterError: ", "CheckpointError: ", "DataError: ")  # beginnings of recorded errors of bad input
RESERVE = ".reserve"  # file in a run folder that is deleted on a full disk, so that run.json can be written once more
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def read_record(directory: Path) -> dict[str, Any]:
    """Read a run folder's run.json.

    Raises
    ------
    ParameterError
        If it is missing, damaged or not a run record.
    """
    path = directory / "run.json"
    record = read_json(path)
    types = {"status": str, "started": str, "planned": list, "notebooks": dict}
    wrong = [
        key for key, kind in types.items() if not isinstance(record, dict) or not isinstance(record.get(key), kind)
    ]
    if not wrong:
        wrong += ["planned"] * any(name not in NOTEBOOKS for name in map(str, record["planned"]))
        sections = record["notebooks"].items()
        wrong += [f"notebooks/{name}" for name, section in sections if not isinstance(section, dict)]
    if wrong:
        raise ParameterError(
            f"'{display_path(path)}' is not a run record: {', '.join(wrong)} missing or of a wrong type; "
            "restore a copy of it, or choose another run folder"
        )
    return record


class Picture(Protocol):
    """A figure that a run can save."""

    def png(self, dpi: int) -> bytes:
        """Return the figure as PNG at this resolution [dots per inch]."""
        ...


class Run:
    """A run's folder and its record.

    Parameters
    ----------
    directory : Path
        Run folder; created with the first `save`.
    planned : sequence of str
        Notebooks (keys of config.NOTEBOOKS) of the run; the run is done when all of them are.
    """

    def __init__(self, directory: Path, planned: list[str]) -> None:
        self.directory = directory
        self.record_path = directory / "run.json"
        self.before: dict[str, Any] = {}  # earlier record of the notebook that `start` begins
        if self.record_path.exists():
            self.record = read_record(directory)
            self.record["planned"] += [name for name in planned if name not in self.record["planned"]]
        else:
            self.record = {"name": directory.name, "status": "running", "planned": planned, "notebooks": {}}
            self.record |= {"started": timestamp(), "git": git_state(), "versions": versions(), "hardware": hardware()}

    def save(self) -> None:
        """Write run.json; the run's status follows from those of the notebooks."""
        states = [self.record["notebooks"].get(name, {}).get("status") for name in self.record["planned"]]
        self.record["status"] = (
            "failed" if "failed" in states else "done" if all(s == "done" for s in states) else "running"
        )
        self.record["updated"] = timestamp()
        reserve = self.directory / RESERVE
        try:
            write_json(self.record_path, self.record)
        except OSError as error:
            if error.errno not in DISK_FULL or not reserve.exists():
                raise
            reserve.unlink()
            write_json(self.record_path, self.record)
            return
        if self.record["status"] != "running":
            reserve.unlink(missing_ok=True)
        elif not reserve.exists():
            with contextlib.suppress(OSError):  # the disk may be full already
                # Random bytes, because some file systems compress zeros.
                reserve.write_bytes(os.urandom(max(1 << 16, 4 * self.record_path.stat().st_size)))

    def start(self, notebook: str, config: OutputParameters) -> None:
        """Record the start of a notebook with its resolved parameters."""
        self.before = self.record["notebooks"].get(notebook, {})
        self.record["notebooks"][notebook] = {
            "status": "running",
            "started": timestamp(),
            "git": git_state(),  # the code may be newer than the run's
            "config": config.to_dict(),
        }
        self.save()

    def resumed(self) -> None:
        """Record that the run is resumed, and the commit."""
        self.record.setdefault("resumed", []).append({"time": timestamp(), "git": git_state()})
        self.save()

    def note(self, notebook: str, **facts: Any) -> None:
        """Add facts (plain numbers, strings, lists, dicts) to a notebook's part of the record."""
        json.dumps(facts, allow_nan=False)  # raises before the record contains a value that JSON cannot hold
        self.record["notebooks"][notebook].update(facts)
        self.save()

    def finish(self, notebook: str, status: str = "done", **facts: Any) -> None:
        """Record the end of a notebook, done or failed, and release the run folder.

        If the notebook was done before and its new parameters are refused, the earlier record stays.
        """
        is_refused = str(facts.get("error", "")).startswith(REFUSALS)
        if status == "failed" and is_refused and self.before.get("status") == "done":
            self.record["notebooks"][notebook] = self.before
            status, facts = "done", {"finished": self.before.get("finished")}
        try:
            self.note(notebook, **{"status": status, "finished": timestamp(), **facts})
        finally:
            unlock_run(self.directory)

    def save_figure(self, figure: Picture, name: str) -> Path:
        """Save a figure as figures/NAME.png."""
        path = self.directory / "figures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(figure.png(dpi=200))
        return path

    def update_metrics(self, **sections: Any) -> None:
        """Merge sections into metrics.json."""
        path = self.directory / "metrics.json"
        metrics = read_json(path) if path.exists() else {}
        for name, section in sections.items():
            metrics[name] = {**metrics.get(name, {}), **section}
        write_json(path, metrics)


def start(notebook: str, config: OutputParameters) -> Run:
    """Open a notebook's run folder, record the start, and begin a log.

    An empty ``output_dir`` creates a folder under outputs/, named after the notebook and the time. In IPython, an error
    in a cell marks the notebook and the run as failed.
    """
    disable_progress_bar()  # transformers' bars for loading files would stay in the rendered notebook
    directory = resolve(config.output_dir or new_folder(notebook))
    locks_now = directory not in held_locks
    try:
        if directory.exists():
            lock_run(directory)
        if isinstance(config, TrainingParameters):
            check_folder(directory, config)  # before anything is written
        lock_run(directory)
        run = Run(directory, [notebook])
    except ValueError:
        if locks_now:
            unlock_run(directory)
        raise
    run.start(notebook, config)
    _log_to(run.directory / "logs" / f"{notebook}-{datetime.now():%Y%m%d-%H%M%S}.log")
    logger.info("%s starts in %s", NOTEBOOKS[notebook][0], display_path(run.directory))
    _mark_failures(run, notebook)
    return run


def new_folder(notebook: str) -> str:
    """Return the name of a run folder after the notebook and the time."""
    return f"outputs/{notebook}-{datetime.now():%Y%m%d-%H%M%S}"


class LogFile(logging.FileHandler):
    """Log file of a run; if it cannot be written, one line on stderr reports it, and the run continues."""

    has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Report the first failure."""
        if not self.has_failed:
            self.has_failed = True
            error = sys.exc_info()[1]
            print(f"the log '{display_path(self.baseFilename)}' could not be written: {error}", file=sys.stderr)


def _log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    handler = LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _mark_failures(run: Run, notebook: str) -> None:
    """In IPython, record the notebook as failed after an error in a cell."""
    shell = progress.ipython_shell()
    if shell is None:
        return

    def after_cell(result: Any) -> None:
        error = result.error_in_exec or result.error_before_exec
        if error is not None and run.record["notebooks"][notebook]["status"] == "running":
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            logger.error("%s failed: %s", notebook, ": ".join([type(error).__name__, *lines[:1]]))
            run.finish(notebook, "failed", error=f"{type(error).__name__}: {error}")

    shell.events.register("post_run_cell", after_cell)


def all_runs(directory: str | Path = "outputs") -> list[Path]:
    """Return the run folders in a directory, oldest first."""
    records = [path.parent for path in resolve(directory).glob("*/run.json")]
    return sorted(records, key=lambda path: read_record(path)["started"])
