"""Copies to a device, and the joint read of several numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mrilib.transfer import read_together, to_device


def test_numbers_are_read_without_rounding() -> None:
    single, double = torch.tensor(0.1), torch.tensor([[1 / 3]], dtype=torch.float64)
    values = [single, 2.5, double, torch.tensor(7), torch.tensor(float("nan"))]
    read = read_together(values)
    assert read[:4] == [float(single), 2.5, 1 / 3, 7.0] and read[4] != read[4]
    assert read_together([]) == [] and read_together([1.0]) == [1.0]


@pytest.mark.parametrize(("device", "calls"), [("cuda:0", ["pin", ("cuda:0", True)]), ("cpu", [("cpu", True)])])
def test_a_copy_to_a_gpu_comes_from_pinned_memory(
    monkeypatch: pytest.MonkeyPatch, device: str, calls: list[Any]
) -> None:
    """No GPU is needed: the calls are recorded."""
    made: list[Any] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: made.append("pin") or x)
    monkeypatch.setattr(Tensor, "to", lambda x, device, non_blocking: made.append((device, non_blocking)) or x)
    to_device(torch.ones(2), device)
    assert made == calls


def test_a_copy_to_the_cpu_is_complete_when_it_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(Tensor, "to", lambda x, device, non_blocking: made.append(non_blocking))
    to_device(torch.empty(2, device="meta"), "cpu")
    assert made == [False]
