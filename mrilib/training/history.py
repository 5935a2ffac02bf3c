"""The history of a training, and its logs: one JSON line a step, one CSV row an epoch."""

import csv
import io
import math
from dataclasses import dataclass, field
from pathlib import Path

from mrilib.files import read_json_lines, write_text


@dataclass
class History:
    """Steps and epochs of a training as plain numbers."""

    steps: list[dict[str, float]] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0  # of the whole training, without the time between processes
    best_epoch: int = 0
    best_loss: float = math.inf
    skipped: int = 0  # steps skipped because loss or gradient was not finite


def steps_path(run: Path, name: str) -> Path:
    """Path of the step log of a stage."""
    return run / "logs" / f"{name}.jsonl"


def epochs_path(run: Path, name: str) -> Path:
    """Path of the epoch table of a stage."""
    return run / "logs" / f"{name}_history.csv"


def write_epochs(path: Path, rows: list[dict[str, float]]) -> None:
    """Write the epoch table."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_epochs(path: Path) -> list[dict[str, float]]:
    """Read the epoch table; empty if it does not exist."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def read_history(run: Path, name: str) -> History | None:
    """Read the history of a stage ("stage1", "constant_prefix", "stage2", "no_token_decoder"); None without epochs."""
    epochs = read_epochs(epochs_path(run, name))
    if not epochs:
        return None
    steps = read_json_lines(steps_path(run, name))
    first = max(number for number, step in enumerate(steps) if step["step"] == 1)  # only the last attempt counts
    history = History(steps=steps[first:], epochs=epochs)
    for epoch in epochs:
        if epoch["val_loss"] < history.best_loss:
            history.best_epoch, history.best_loss = int(epoch["epoch"]), epoch["val_loss"]
    return history
