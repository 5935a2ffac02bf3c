"""Run records: one folder a run, with its parameters, notebooks, logs, checkpoints, figures and metrics.

``run.json`` is written before step 0 and kept current, each time as a whole: under a temporary name, then renamed.
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
from mrilib.files import _now, read_json, write_json
from mrilib.processes import _held, lock_run, unlock_run

logger = logging.getLogger("mrilib")


def read_record(directory: Path) -> dict[str, Any]:
    """A run folder's run.json; a ParameterError names it if it is missing, damaged or no run record."""
    path = directory / "run.json"
    record = read_json(path)
    kinds = {"status": str, "started": str, "planned": list, "notebooks": dict}
    wrong = [
        key for key, kind in kinds.items() if not isinstance(record, dict) or not isinstance(record.get(key), kind)
    ]
    if not wrong:
        wrong += ["planned"] * any(name not in NOTEBOOKS for name in map(str, record["planned"]))
        wrong += [f"notebooks/{name}" for name, one in record["notebooks"].items() if not isinstance(one, dict)]
    if wrong:
        raise ParameterError(
            f"'{display_path(path)}' is no run record: {', '.join(wrong)} missing or of another kind; "
            "put back a copy of it, or choose another run folder"
        )
    return record


REFUSALS = ("ParameterError: ", "CheckpointError: ", "DataError: ")  # how an error of bad input begins in a record


RESERVE = ".reserve"  # a file in a run folder; deleted on a full disk, so that run.json can be written once more


_FULL = (errno.ENOSPC, errno.EDQUOT)


class Picture(Protocol):
    """What a run stores as a figure."""

    def png(self, dpi: int) -> bytes:
        """The picture as PNG at this resolution [dots per inch]."""
        ...


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
        self.before: dict[str, Any] = {}  # what was recorded of the notebook that `start` begins
        if self.record_path.exists():
            self.record = read_record(directory)
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
        reserve = self.directory / RESERVE
        try:
            write_json(self.record_path, self.record)
        except OSError as error:
            if error.errno not in _FULL or not reserve.exists():
                raise
            reserve.unlink()
            write_json(self.record_path, self.record)
            return
        if self.record["status"] != "running":
            reserve.unlink(missing_ok=True)
        elif not reserve.exists():
            with contextlib.suppress(OSError):  # there is none on a disk that is full already
                # random bytes: some file systems store zeros without room
                reserve.write_bytes(os.urandom(max(1 << 16, 4 * self.record_path.stat().st_size)))

    def start(self, notebook: str, config: OutputParameters) -> None:
        """Record that a notebook has begun, with its resolved parameters."""
        self.before = self.record["notebooks"].get(notebook, {})
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
        """Record that a notebook has ended: done, or failed. The run folder is free again.

        A notebook that was done before and is now refused stays done, with all that was recorded of it.
        """
        refused = str(facts.get("error", "")).startswith(REFUSALS)
        if status == "failed" and refused and self.before.get("status") == "done":
            self.record["notebooks"][notebook] = self.before
            status, facts = "done", {"finished": self.before.get("finished")}
        try:
            self.note(notebook, **{"status": status, "finished": _now(), **facts})
        finally:
            unlock_run(self.directory)

    def save_figure(self, figure: Picture, name: str) -> Path:
        """Save a figure as figures/NAME.png."""
        path = self.directory / "figures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(figure.png(dpi=110))
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
    directory = resolve(name)
    ours = directory not in _held
    try:
        if directory.exists():
            lock_run(directory)
        if isinstance(config, TrainingParameters):
            from mrilib.training.resume import check_folder

            check_folder(directory, config)  # before anything is written
        lock_run(directory)
        run = Run(directory, [notebook])
    except ValueError:
        if ours:
            unlock_run(directory)
        raise
    run.start(notebook, config)
    _log_to(run.directory / "logs" / f"{notebook}-{datetime.now():%Y%m%d-%H%M%S}.log")
    logger.info("%s starts in %s", NOTEBOOKS[notebook][0], display_path(run.directory))
    _mark_failures(run, notebook)
    return run


class LogFile(logging.FileHandler):
    """A log file. If it cannot be written, one line on stderr says so, and the run goes on."""

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
    """Run folders below a directory, oldest first."""
    records = [path.parent for path in resolve(directory).glob("*/run.json")]
    return sorted(records, key=lambda path: read_record(path)["started"])
