"""Run records: one folder a run, with its parameters, notebooks, logs, checkpoints, figures and metrics.

``run.json`` is written before step 0 and kept current, each time as a whole: under a temporary name, then renamed.
"""

import json
import logging
import os
import platform
import subprocess
import sys
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.figure
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
        self.record["notebooks"][notebook] = {"status": "running", "started": _now(), "config": config.to_dict()}
        self.save()

    def note(self, notebook: str, **facts: Any) -> None:
        """Add facts (plain numbers, strings, lists, dicts) to a notebook's part of the record."""
        json.dumps(facts, allow_nan=False)  # refused before the record holds what can never be written
        self.record["notebooks"][notebook].update(facts)
        self.save()

    def finish(self, notebook: str, status: str = "done", **facts: Any) -> None:
        """Record that a notebook has ended: done, or failed."""
        self.note(notebook, status=status, finished=_now(), **facts)

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
            logger.error("%s failed: %s", notebook, str(error).splitlines()[0])
            run.finish(notebook, "failed", error=f"{type(error).__name__}: {error}")

    shell.events.register("post_run_cell", after_cell)


def _ipython() -> Any:
    module = sys.modules.get("IPython")
    return module.get_ipython() if module else None


class JsonLines:
    """A log of one JSON object a line, flushed line by line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open for the run's whole length)

    def write(self, **values: Any) -> None:
        """Append one line."""
        self.file.write(json.dumps(values, allow_nan=True) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


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


def progress_bar(total: int, description: str, interactive: bool = False) -> Any:
    """A tqdm bar: a widget in an interactive notebook, one line in a headless record, the terminal elsewhere."""
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
