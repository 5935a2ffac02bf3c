"""What happened in a training, step by step and epoch by epoch, as the run folder's logs keep it."""

import csv
import io
import math
from dataclasses import dataclass, field
from pathlib import Path

from mrilib.files import read_json_lines, write_text


@dataclass
class History:
    """What happened, step by step and epoch by epoch, as plain numbers."""

    steps: list[dict[str, float]] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0  # of the whole training, without the time between processes
    best_epoch: int = 0
    best_loss: float = math.inf
    skipped: int = 0  # steps left out for a loss or gradient that was not finite


def steps_path(run: Path, name: str) -> Path:
    """One JSON line a step; `name` is the stage's."""
    return run / "logs" / f"{name}.jsonl"


def epochs_path(run: Path, name: str) -> Path:
    """One CSV row an epoch."""
    return run / "logs" / f"{name}_history.csv"


def write_epochs(path: Path, rows: list[dict[str, float]]) -> None:
    """Write the epochs as CSV, whole."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_epochs(path: Path) -> list[dict[str, float]]:
    """The epochs of a CSV file; none if it is not there."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def read_history(run: Path, name: str) -> History | None:
    """The history of a stage ("stage1", "constant_prefix", "stage2", "no_token_decoder"); None if there is none."""
    epochs = read_epochs(epochs_path(run, name))
    if not epochs:
        return None
    steps = read_json_lines(steps_path(run, name))
    first = max(number for number, step in enumerate(steps) if step["step"] == 1)  # the last attempt counts
    history = History(steps=steps[first:], epochs=epochs)
    for epoch in epochs:
        if epoch["val_loss"] < history.best_loss:
            history.best_epoch, history.best_loss = int(epoch["epoch"]), epoch["val_loss"]
    return history
