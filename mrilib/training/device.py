"""Device and random numbers of a training."""

import os
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed

from mrilib.config import TrainingParameters


def pick_device(device: str) -> torch.device:
    """Device for "auto", "cuda" or "cpu"; of several processes each has its own GPU."""
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def prepare(config: TrainingParameters) -> torch.device:
    """Seed all random number generators, select deterministic kernels and TF32, and return the device.

    TF32 serves products of matrices and convolutions on a GPU. `precision.full_float32` leaves out those that need
    float32; compiled functions cannot be left out.
    """
    set_seed(config.seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    device = pick_device(config.device)
    torch.backends.cuda.matmul.allow_tf32 = device.type == "cuda" and not config.compile
    return device


def autocast(config: TrainingParameters, device: torch.device) -> torch.autocast:
    """Return the autocast of ``config.mixed_precision``."""
    dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.mixed_precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def build_scaler(config: TrainingParameters, device: torch.device) -> torch.amp.GradScaler:
    """Build the loss scaler of fp16: small gradients would be zero in half precision. It is disabled otherwise."""
    return torch.amp.GradScaler(device.type, enabled=config.mixed_precision == "fp16")


def rng_state() -> dict[str, Any]:
    """States of torch's and numpy's global generators, as tensors and plain numbers."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 (the global generator)
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
    """Restore the states that `rng_state` returned."""
    torch.set_rng_state(states["torch"])
    numpy_state = states["numpy"]
    keys = numpy_state["keys"].numpy().astype(np.uint32)
    np.random.set_state(  # noqa: NPY002
        (numpy_state["kind"], keys, numpy_state["position"], numpy_state["has_gauss"], numpy_state["cached"])
    )
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
