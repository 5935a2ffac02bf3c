"""The device of a training, and its seeds."""

import os

import torch
from accelerate.utils import set_seed

from mrilib.config import TrainingParameters


def pick_device(device: str) -> torch.device:
    """auto: cuda if there is one, of several processes each its own; config has refused cuda where it is absent."""
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def prepare(config: TrainingParameters) -> torch.device:
    """Seed every generator and choose the device. Deterministic kernels, so that a seed means the same numbers."""
    set_seed(config.seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    return pick_device(config.device)
