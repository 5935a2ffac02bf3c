"""Tests for a machine with a GPU: `make test-gpu` runs them and writes outputs/gpu_report.json and .md."""

import gc
from collections.abc import Iterator

import gpu_report
import pytest
import torch

from mrilib.config import ROOT

report: gpu_report.GPUReport | None = None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda is not available")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if torch.cuda.is_available() and "gpu" in report.keywords:
        _report().add(report)


def _report() -> gpu_report.GPUReport:
    global report
    if report is None:
        report = gpu_report.GPUReport(ROOT / "outputs" / "gpu_report.json", gpu_report.machine())
    return report


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def free_memory() -> Iterator[None]:
    """Give the GPU's memory back after a test, because others run in processes of their own."""
    yield
    gc.collect()
    torch.cuda.empty_cache()
