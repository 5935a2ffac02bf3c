"""The loader and fastMRI's: same lines and masks, constant memory, batches read ahead."""

import gc
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mrilib.comparison import loader_speed
from mrilib.config import DataParameters
from mrilib.data.dataset import FastMRIDataset, Slice
from mrilib.data.fastmri_file import Volume
from mrilib.data.sampler import ShapeBatchSampler, collate, make_loader
from mrilib.display import speeds


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[Volume]:
    return loader_speed.make_volumes(tmp_path_factory.mktemp("speed"), count=2, slices=3, coils=6, img_size=48)


def config_of(volumes: list[Volume], **others: int) -> DataParameters:
    return DataParameters.create({"data_dir": str(volumes[0].path.parent), "img_size": 48, "num_coils": 16, **others})


def test_all_readers_deliver_the_same_lines(small: list[Volume]) -> None:
    assert [v.matrix for v in small] == [(96, 48)] * 2 and [v.coils for v in small] == [6, 6]
    readers = loader_speed.readers(small, config_of(small))
    for index in range(6):
        ours, theirs = readers[loader_speed.OURS](index), readers[loader_speed.FASTMRI](index)
        assert torch.equal(ours.mask, theirs.mask.reshape(-1))
        cropped = readers[loader_speed.FASTMRI_CROPPED](index)
        torch.testing.assert_close(ours.kspace * ours.scale, cropped, rtol=1e-4, atol=1e-5 * cropped.abs().max().item())
        assert torch.equal(readers[loader_speed.WHOLE](index).kspace, ours.kspace)


def test_the_comparison_and_its_figure(small: list[Volume]) -> None:
    table = loader_speed.compare(loader_speed.readers(small, config_of(small)), 6, repeats=2)
    assert list(table.index) == ["this loader", "fastMRI", "fastMRI + crop", "whole volumes"]
    rates = table[loader_speed.RATE]
    assert (rates > 0).all()
    assert table[loader_speed.SPEED_UP].tolist() == pytest.approx((rates.iloc[0] / rates).tolist())
    figure = speeds.loader_chart(table)
    assert len(figure.axes) == 1
    assert figure.png().startswith(b"\x89PNG")
    workers = loader_speed.compare_workers(small, config_of(small), workers=(0, 1), batch_size=2)
    assert list(workers.index) == [0, 1] and (workers > 0).all().all()
    times = [volume.path.stat().st_mtime_ns for volume in small]
    again = loader_speed.make_volumes(small[0].path.parent, count=2, slices=3, coils=6, img_size=48)
    assert [volume.path.stat().st_mtime_ns for volume in again] == times


@pytest.mark.fullsize
def test_the_loader_is_fast_at_full_size(tmp_path: Path) -> None:
    """16 coils, 640×320, 16 slices."""
    volumes = loader_speed.make_volumes(tmp_path)
    table = loader_speed.compare(loader_speed.readers(volumes, DataParameters.create({"data_dir": str(tmp_path)})), 32)
    print(table)
    speed_up = table[loader_speed.SPEED_UP]
    assert speed_up[loader_speed.FASTMRI] >= 1.5 and speed_up[loader_speed.WHOLE] >= 10


def resident(process: int | str = "self") -> int:
    """Return the resident memory of a process [bytes]."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def children() -> list[int]:
    return [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("workers", [0, 1])
def test_memory_is_constant_over_3000_slices(volumes: list[Volume], phantom_dir: Path, workers: int) -> None:
    dataset = FastMRIDataset(volumes, config_of(volumes), training=True)

    class Repeated(ShapeBatchSampler):  # the same slices again and again in one pass, for one worker
        def __iter__(self):
            for _ in range(84):
                yield from super().__iter__()

    loader: DataLoader = DataLoader(
        dataset, batch_sampler=Repeated(dataset, 4, 0, True), collate_fn=collate, num_workers=workers
    )
    used, count = [], 0
    for batch in loader:
        count += len(batch.slices)
        if count // 500 >= len(used):
            gc.collect()
            used.append(resident() + sum(resident(pid) for pid in children()))
    assert count == 84 * 36 > 3000
    # The first two are warm-up of HDF5's cache and of the allocator.
    assert max(used[2:]) - used[1] < 24e6, used


class TracedDataset(Dataset[Slice]):
    """A data set that writes a file for each slice that is read."""

    def __init__(self, dataset: FastMRIDataset, folder: Path) -> None:
        self.dataset, self.folder = dataset, folder

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Slice:
        (self.folder / str(index)).touch()
        return self.dataset[index]


def test_batches_are_read_ahead(volumes: list[Volume], tmp_path: Path) -> None:
    dataset = FastMRIDataset([volume for volume in volumes if volume.matrix == volumes[0].matrix], config_of(volumes))
    loader = make_loader(FastMRIDataset(dataset.volumes, config_of(volumes, num_workers=1)), 1)
    traced: DataLoader = DataLoader(
        TracedDataset(dataset, tmp_path),  # type: ignore[arg-type]
        batch_sampler=loader.batch_sampler,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        prefetch_factor=loader.prefetch_factor,
    )
    batches = iter(traced)
    next(batches)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)  # no batch is requested meanwhile
    assert len(list(tmp_path.iterdir())) >= 3
    del batches
