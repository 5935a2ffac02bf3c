"""Fused kernels of flash-linear-attention without a GPU: `interpreted_kernels.py` in Triton's interpreter.

The interpreter must be chosen before the first import of Triton, which other tests import too, so the cases run in a
process of their own: about a minute of them here, all of them with `pytest -m fullsize`.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("interpreted_kernels.py")
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton has no package for this system")


def run_cases(marks):
    """Run the cases with these marks, and return the number that passed."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rP", "-m", marks, str(CASES)]
    done = subprocess.run(command, env=environment, cwd=CASES.parents[2], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    passed = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert passed and "skipped" not in passed.string[passed.start() :]
    return int(passed[1])


def test_short_cases():
    assert run_cases("not fullsize") >= 14


@pytest.mark.fullsize
def test_all_other_cases():
    assert run_cases("fullsize") >= 40
