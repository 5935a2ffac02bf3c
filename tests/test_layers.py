"""The packages have one direction, as pyproject.toml's import-linter contracts say."""

import subprocess
import sys
from pathlib import Path

from mrilib.config import ROOT


def test_a_package_imports_only_from_those_below_it():
    linter = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "2 kept, 0 broken" in result.stdout
