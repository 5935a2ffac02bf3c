"""Speed of this loader, of fastMRI's, and of reading whole volumes, on the same files, masks and crop."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import torch
from fastmri.data.mri_data import SliceDataset
from fastmri.data.transforms import VarNetDataTransform
from torch.utils.data import DataLoader

from mrilib.config import DataParameters
from mrilib.data.dataset import FastMRIDataset
from mrilib.data.fastmri_file import Volume, read_volume
from mrilib.data.sampler import make_loader
from mrilib.phantom.dataset import draw_exam, image_exam
from mrilib.phantom.scanner import SEQUENCES, simulate_volume, write_h5
from mrilib.physics import fourier, masks

OURS, FASTMRI, FASTMRI_CROPPED, WHOLE = "this loader", "fastMRI", "fastMRI + crop", "whole volumes"
RATE, SPEED_UP = "slices a second", "this loader is faster by"  # columns, also keys in run.json


def make_volumes(
    directory: Path, count: int = 2, slices: int = 16, coils: int = 16, img_size: int = 320, seed: int = 0
) -> list[Volume]:
    """Make phantom volumes of 2·img_size × img_size, as most of fastMRI's brains, unless they exist.

    `directory` must hold nothing else, as fastMRI's SliceDataset opens every file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        contrast = tuple(SEQUENCES)[number % len(SEQUENCES)]
        path = directory / f"file_brain_{contrast}_{seed}_{number}_{slices}_{coils}_{img_size}.h5"
        if not path.exists():
            exam = draw_exam(number, 1, slices, img_size, coils, seed)._replace(width=img_size, padding=(0, 0))
            image, _ = image_exam(exam, contrast, img_size, seed)
            size = (exam.voxel, exam.voxel)
            rng = np.random.default_rng([seed, number])
            positions = exam.slice_positions.tolist()
            data = simulate_volume(image, coils, rng, voxel_size=size, slice_positions=positions, snr=exam.snr)
            sequence = SEQUENCES[contrast]
            write_h5(path, data, (img_size, img_size), contrast, exam.patient_id, sequence=sequence, voxel_size=size)
        paths.append(path)
    return [read_volume(path) for path in paths]


def readers(volumes: Sequence[Volume], config: DataParameters) -> dict[str, Callable[[int], Any]]:
    """Make the compared readers, each a function from a slice's number to the slice.

    All apply fastMRI's validation mask of the file. "fastMRI" is its SliceDataset with VarNetDataTransform. "fastMRI +
    crop" also removes the readout oversampling, as this loader does. "whole volumes" is this loader reading the whole
    file for each slice.

    Parameters
    ----------
    volumes : sequence of Volume
        All files of one folder.
    config : DataParameters
        mask_type, accelerations, center_fractions, and num_coils of at least the files' coils, as fastMRI does not
        compress.
    """
    ours = FastMRIDataset(volumes, config)
    mask_func = masks.make_mask_func(config.mask_type, config.center_fractions, config.accelerations)
    theirs = SliceDataset(volumes[0].path.parent, "multicoil", VarNetDataTransform(mask_func, use_seed=True))

    def cropped(index: int) -> Any:
        sample = theirs[index]
        masked = torch.view_as_complex(sample.masked_kspace)
        return fourier.remove_readout_oversampling(masked, volumes[ours.samples[index][0]].readout)

    def whole(index: int) -> Any:
        with h5py.File(volumes[ours.samples[index][0]].path, "r") as h5:
            h5["kspace"][()]
        return ours[index]

    return {OURS: ours.__getitem__, FASTMRI: theirs.__getitem__, FASTMRI_CROPPED: cropped, WHOLE: whole}


def compare(loaders: Mapping[str, Callable[[int], Any]], count: int, repeats: int = 5) -> pd.DataFrame:
    """Measure the speed of `readers` in turns in one process; the best of several passes counts.

    Parameters
    ----------
    loaders : mapping of str to function of a slice's number
    count : int
        Slices per pass; 2 for the slow "whole volumes".
    repeats : int

    Returns
    -------
    DataFrame
        A row per reader, with its slices per second and the speed-up of the first one over it.
    """
    seconds: dict[str, float] = dict.fromkeys(loaders, float("inf"))
    for _ in range(repeats):
        for name, read in loaders.items():
            indices = range(2) if name == WHOLE else range(count)
            begin = time.perf_counter()
            for index in indices:
                read(index)
            seconds[name] = min(seconds[name], (time.perf_counter() - begin) / len(indices))
    table = pd.DataFrame({RATE: {name: 1 / value for name, value in seconds.items()}})
    table[SPEED_UP] = table[RATE].iloc[0] / table[RATE]
    return table


def compare_workers(
    volumes: Sequence[Volume], config: DataParameters, workers: Sequence[int] = (0, 1, 2), batch_size: int = 4
) -> pd.DataFrame:
    """Measure slices per second of batched passes through a DataLoader, by number of loading processes."""
    ours, theirs = {}, {}
    mask_func = masks.make_mask_func(config.mask_type, config.center_fractions, config.accelerations)
    for number in workers:
        dataset = FastMRIDataset(volumes, config.model_copy(update={"num_workers": number}))
        ours[number] = _rate(make_loader(dataset, batch_size), lambda batch: len(batch.slices))
        official = SliceDataset(volumes[0].path.parent, "multicoil", VarNetDataTransform(mask_func, use_seed=True))
        loader: DataLoader[Any] = DataLoader(official, batch_size=batch_size, num_workers=number)
        theirs[number] = _rate(loader, lambda batch: len(batch.fname))
    return pd.DataFrame({f"{OURS} [{RATE}]": ours, f"{FASTMRI} [{RATE}]": theirs})


def _rate(loader: DataLoader[Any], size: Callable[[Any], int]) -> float:
    batches = iter(loader)
    next(batches)  # not counted: it starts the processes
    begin, count = time.perf_counter(), 0
    for batch in batches:
        count += size(batch)
    return count / (time.perf_counter() - begin)
