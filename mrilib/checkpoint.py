"""Training checkpoints: written whole or not at all, read without running code.

A checkpoint is a dict of plain tensors, numbers, strings, lists and dicts, so that ``torch.load(weights_only=True)``
reads it: the trainable part's weights, optimizer, schedule, random number states, history and the run's parameters.
"""

import contextlib
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mrilib.config import display_path

FORMAT = 1
# What `Trainer.state` puts into a checkpoint.
ENTRIES = (
    "stage", "epoch", "step", "micro_batch", "weights", "optimizer", "schedule", "rng", "losses", "history", "config",
    "data", "backbone", "encoder", "cost",
)  # fmt: skip
# What torch.load raises for a damaged or foreign file, found by changing bytes at random.
_DAMAGED = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, struct.error, MemoryError,
)  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of another stage or of another architecture."""


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint under a temporary name, sync it to disk, then rename it into place.

    A crash at any moment leaves either the old file or the new one, whole.

    Raises
    ------
    OSError
        The disk is full, the folder read-only, …; the old file, if any, is as it was.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's zip writer makes a RuntimeError of a full disk
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        while isinstance(error, RuntimeError) and isinstance(error.__context__, OSError | RuntimeError):
            error = error.__context__
        before = f"the one before is whole: '{display_path(path)}'" if path.exists() else "there is none before it"
        raise OSError(f"a checkpoint could not be written: {error}; {before}") from error


def _sync_folder(folder: Path) -> None:
    """Have a rename on disk, not in the system's memory alone."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(path: Path, stage: str) -> dict[str, Any]:
    """Read a checkpoint of one stage ("stage1", "control", "stage2").

    Raises
    ------
    CheckpointError
        Not there, not a checkpoint of this project, a pickle that would run code, or of another stage.
    """
    name = display_path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint '{name}' does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        # torch's own text begins with advice to load the file unsafely; what is wrong stands at the end.
        told = str(error).rpartition("WeightsUnpickler error:")[2].strip() or "it ends too early"
        reason = told.splitlines()[0]
        raise CheckpointError(f"checkpoint '{name}' is damaged, or holds more than plain tensors: {reason}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or "stage" not in content:
        raise CheckpointError(f"'{name}' is not a checkpoint of this project")
    if content["stage"] != stage:
        raise CheckpointError(f"checkpoint '{name}' is of {content['stage']}; {stage} is wanted here")
    lacks = [entry for entry in ENTRIES if entry not in content]
    lacks += [entry for entry in ("weights", "config", "cost") if not isinstance(content.get(entry, {}), dict)]
    if lacks:
        raise CheckpointError(f"checkpoint '{name}' lacks {', '.join(lacks)}")
    return content


def load_weights(module: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Copy weights into a module; every name and shape must match.

    Raises
    ------
    CheckpointError
        Listing the names that are missing, too many or of another shape.
    """
    own = module.state_dict()
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unknown {name}" for name in state if name not in own]
    problems += [
        f"{name} is {_shape(state[name])}, {_shape(own[name])} is wanted"
        for name in own
        if name in state and _shape(state[name]) != _shape(own[name])
    ]
    if problems:
        more = f" and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(problems[:12])}{more}")
    module.load_state_dict(state)


def _shape(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def rng_state() -> dict[str, Any]:
    """States of the random number generators, as tensors and plain numbers."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 (what is saved is the global one)
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": {
            "kind": kind,
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_rng_state(states: dict[str, Any]) -> None:
    """Put back what `rng_state` gave."""
    torch.set_rng_state(states["torch"])
    numpy_state = states["numpy"]
    keys = numpy_state["keys"].numpy().astype(np.uint32)
    np.random.set_state(  # noqa: NPY002
        (numpy_state["kind"], keys, numpy_state["position"], numpy_state["has_gauss"], numpy_state["cached"])
    )
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
