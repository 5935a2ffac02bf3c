"""The packages have one direction, as pyproject.toml's import-linter contracts say."""

import re
import subprocess
import sys
from pathlib import Path

import mrilib
from mrilib.config import ROOT


def test_a_package_imports_only_from_those_below_it():
    linter = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "2 kept, 0 broken" in result.stdout


def test_reading_path_is_short_and_the_same_everywhere():
    """The package's docstring and the docs name the same ten files, in one order."""
    named = re.findall(r"^\d+\. ``([\w/]+)``", mrilib.__doc__ or "", re.M)
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Packages")[0]
    assert named == re.findall(r"^\| `mrilib/([\w/]+)\.py`", page, re.M) and len(named) == 10
    lines = [len((ROOT / "mrilib" / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in named]
    assert sum(lines) <= 3600, dict(zip(named, lines, strict=True))
