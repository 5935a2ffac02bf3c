"""The report of the tests for a GPU: machine, versions, outcomes and measurements, as JSON and as a readable page.

It is written after every test, so that it exists if a later one ends the process.
"""

import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

from mrilib import environment
from mrilib.config import ROOT
from mrilib.files import write_json, write_text

OPTIONAL = ("flash-linear-attention", "fla-core", "triton")


def machine() -> dict[str, Any]:
    """Return GPUs, driver, versions and commit; no name of a host or user."""
    count = torch.cuda.device_count()
    gpus = [torch.cuda.get_device_properties(index) for index in range(count)]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "gpus": [
            {"name": gpu.name, "memory_bytes": gpu.total_memory, "compute_capability": f"{gpu.major}.{gpu.minor}"}
            for gpu in gpus
        ],
        "driver": driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "hardware": environment.hardware(),
        "versions": environment.versions() | {name: optional_version(name) for name in OPTIONAL},
        "git": environment.git_state(),
    }


def driver() -> str | None:
    """Return the version of NVIDIA's driver; None if nvidia-smi does not tell it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def optional_version(name: str) -> str | None:
    """Return a package's version; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def without_names(text: str) -> str:
    """Shorten paths that hold the user's name: of the repository, the home folder and pytest's folder."""
    return re.sub(r"pytest-of-[^/\s]+", "pytest", text.replace(f"{ROOT}/", "").replace(str(Path.home()), "~"))


class GPUReport:
    """Collects the outcomes of the tests and writes them.

    Parameters
    ----------
    path : Path
        Of the JSON file; the page has the suffix .md.
    machine : dict
        From `machine`.
    """

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        self.path, self.machine = path, machine
        self.tests: dict[str, dict[str, Any]] = {}

    def add(self, outcome: pytest.TestReport) -> None:
        """Add a phase of a test and write the files after its last one."""
        name = outcome.nodeid.rpartition("/")[2]
        test = self.tests.setdefault(name, {"outcome": "passed", "seconds": 0.0, "results": {}})
        test["seconds"] += outcome.duration
        test["results"] |= dict(outcome.user_properties)
        if outcome.failed:
            test |= {"outcome": "failed", "message": without_names(outcome.longreprtext)}
        elif outcome.skipped and isinstance(outcome.longrepr, tuple):
            test |= {"outcome": "skipped", "message": outcome.longrepr[2].removeprefix("Skipped: ")}
        if outcome.when == "teardown":
            self.write()

    def write(self) -> None:
        """Write both files."""
        write_json(self.path, {"machine": self.machine, "tests": self.tests})
        write_text(self.path.with_suffix(".md"), self.page())

    def page(self) -> str:
        """Format the report in Markdown."""
        names = ", ".join(gpu["name"] for gpu in self.machine["gpus"])
        facts = {name: value for name, value in self.machine.items() if not isinstance(value, (dict, list))}
        sections = [
            f"# GPU report: {names}",
            markdown_table(self.machine["gpus"]),
            markdown_table([facts | self.machine["versions"] | self.machine["git"]], transposed=True),
            markdown_table(
                [
                    {"test": name, "outcome": test["outcome"], "seconds": f"{test['seconds']:.1f}"}
                    for name, test in self.tests.items()
                ]
            ),
        ]
        for name, test in self.tests.items():
            for title, value in test["results"].items():
                # Other results, such as the time of each token, are in the JSON file only.
                if title in ("table", "values"):
                    sections += [
                        f"## {name}",
                        markdown_table(value) if title == "table" else markdown_table([value], True),
                    ]
            if "message" in test:
                sections += [f"## {name}: {test['outcome']}", f"```\n{test['message'].strip()}\n```"]
        return "\n\n".join(sections) + "\n"


def markdown_table(rows: list[dict[str, Any]], transposed: bool = False) -> str:
    """Format rows with the same keys; transposed, a line per key of the first row."""
    if transposed:
        rows = [{"": name, "value": value} for name, value in rows[0].items()]
    lines = [list(rows[0]), ["---"] * len(rows[0])] if rows else []
    lines += [[markdown_cell(row[name]) for name in rows[0]] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown_cell(value: Any) -> str:
    """Format a value; numbers with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
