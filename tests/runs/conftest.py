"""A small trained run, made once."""

from pathlib import Path

import pytest
import small_run


@pytest.fixture(scope="session")
def run(phantom_dir, backbone_dir, tmp_path_factory) -> Path:
    return small_run.write_run(tmp_path_factory.mktemp("runs") / "small", phantom_dir, backbone_dir)
