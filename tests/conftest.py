"""Fixtures for all tests: a small phantom data set, a tiny backbone, and the release of run folders."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import systems

from mrilib import processes
from mrilib.data.dataset import Volume
from mrilib.data.splits import index_volumes
from mrilib.phantom.dataset import make_dataset

IMG_SIZE = 64


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the cache of `mrilib.data.check` out of the user's cache folder."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["XDG_CACHE_HOME"]
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def phantom_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantom data: 4 patients × 3 contrasts × 3 slices of 64 rows, 6 to 8 coils. Read-only.

    This seed gives odd widths, widths below and above 64, lines without data, and a patient without annotations.
    """
    directory = tmp_path_factory.mktemp("phantom")
    return make_dataset(directory, volumes=12, slices=3, img_size=IMG_SIZE, coils=6, seed=52, progress=False)


@pytest.fixture(scope="session")
def volumes(phantom_dir: Path) -> list[Volume]:
    """Volumes of the phantom data, sorted by name."""
    return index_volumes(phantom_dir)


@pytest.fixture(scope="session")
def backbone_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random tiny Nirvana and its tokenizer as a Hugging Face folder. Read-only."""
    return systems.write_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(autouse=True)
def free_folders() -> Iterator[None]:
    """Release the run folders that a test has locked."""
    yield
    for directory in list(processes.held_locks):
        processes.unlock_run(directory)
