"""Copies between the CPU and a GPU that do not make the CPU wait."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to a device. A copy from the CPU to a GPU does not wait for the GPU's queued work."""
    is_upload = tensor.device.type == "cpu"
    if is_upload and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()  # a copy from other memory waits even if it is non-blocking
    return tensor.to(device, non_blocking=is_upload)


def read_together(values: Sequence[Tensor | float]) -> list[float]:
    """Read the values of one-element tensors by one copy, so that the CPU waits once; numbers are returned as such."""
    tensors = [value.double().reshape(()) for value in values if isinstance(value, Tensor)]
    read = iter(torch.stack(tensors).tolist() if tensors else [])
    return [next(read) if isinstance(value, Tensor) else value for value in values]
