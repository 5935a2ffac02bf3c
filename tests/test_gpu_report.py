"""The tests for a GPU are skipped without one, and their report holds outcomes, measurements and failures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_report import GPUReport

from mrilib.config import ROOT

MACHINE = {"gpus": [{"name": "Test GPU"}], "driver": "1.2", "versions": {"torch": "2"}, "git": {"commit": "abc"}}
TESTS = """
import pytest

def test_right(record_property):
    record_property("table", [{"stage": "stage1", "one step [s]": 0.5}])
    record_property("values", {"tokens": 7})

def test_wrong():
    raise ValueError("HOME/here and /tmp/pytest-of-somebody/x")

def test_left_out():
    pytest.skip("needs two GPUs")
"""


def test_report(tmp_path: Path) -> None:
    path = tmp_path / "outputs" / "gpu_report.json"

    class Collect:
        report = GPUReport(path, MACHINE)

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            self.report.add(report)

    tests = tmp_path / "test_three.py"
    tests.write_text(TESTS.replace("HOME", str(Path.home() / "nowhere")))
    # A run within the run, in its own root, so that this repository's options do not apply.
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-c", str(tmp_path / "pytest.ini"),
                 str(tests)], plugins=[Collect()])  # fmt: skip
    content = json.loads(path.read_text())
    assert content["machine"] == MACHINE
    found = {name.partition("::")[2]: test for name, test in content["tests"].items()}
    assert {name: test["outcome"] for name, test in found.items()} == {
        "test_right": "passed", "test_wrong": "failed", "test_left_out": "skipped",
    }  # fmt: skip
    assert found["test_right"]["results"]["values"] == {"tokens": 7} and found["test_right"]["seconds"] > 0
    assert "ValueError" in found["test_wrong"]["message"]
    assert found["test_left_out"]["message"] == "needs two GPUs"
    page = path.with_suffix(".md").read_text()
    assert page.startswith("# GPU report: Test GPU")
    for text in ("| torch | 2 |", "| stage | one step [s] |", "| stage1 | 0.5 |", "| tokens | 7 |", "needs two GPUs"):
        assert text in page
    assert str(Path.home()) not in page and "~/nowhere/here" in page and "somebody" not in page


def test_without_a_gpu_every_test_is_skipped(tmp_path: Path) -> None:
    before = (ROOT / "outputs" / "gpu_report.json").exists()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-q", "-rs", "--basetemp", str(tmp_path / "t")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " skipped in" in result.stdout.splitlines()[-1] and "passed" not in result.stdout
    reasons = [line for line in result.stdout.splitlines() if line.startswith("SKIPPED")]
    assert reasons and all(line.endswith("needs a GPU: torch.cuda is not available") for line in reasons)
    assert (ROOT / "outputs" / "gpu_report.json").exists() == before


def test_make_help_shows_the_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "test-gpu: $(BIN)/installed  ## " in makefile and "-m gpu tests/gpu" in makefile
