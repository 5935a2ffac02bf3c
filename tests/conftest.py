"""A small phantom data set and backbone, made once for all tests, and what every test leaves behind."""

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
    """What `mrilib.data.check` remembers of the tests' files stays out of the user's cache."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["XDG_CACHE_HOME"]
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def phantom_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 patients × 3 contrasts × 3 slices of 64 rows, 6 to 8 coils.

    This seed has odd widths, widths below and above 64, lines that were not acquired, and a patient nobody reviewed.
    Tests must not write into it.
    """
    directory = tmp_path_factory.mktemp("phantom")
    return make_dataset(directory, volumes=12, slices=3, img_size=IMG_SIZE, coils=6, seed=52, progress=False)


@pytest.fixture(scope="session")
def volumes(phantom_dir: Path) -> list[Volume]:
    """The data set's volumes, sorted by name."""
    return index_volumes(phantom_dir)


@pytest.fixture(scope="session")
def backbone_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny Nirvana with its tokenizer, as a Hugging Face folder. Tests must not write into it."""
    return systems.write_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(autouse=True)
def free_folders() -> Iterator[None]:
    """A run folder that a test holds is given up with its end, as by the end of its process."""
    yield
    for directory in list(processes.held_locks):
        processes.unlock_run(directory)
