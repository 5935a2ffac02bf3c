"""Reconstruction files: writing, scoring, the nearest-training-slice control, and slices for figures.

Image metrics are fastMRI's official ones (fastmri.evaluate): computed per volume with the volume's maximum, then
averaged over volumes. Intervals are over patients, because slices and contrasts of one patient are not independent.
"""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import ndimage
from torch import Tensor

from mrilib.data.annotations import Box
from mrilib.data.fastmri_file import Volume
from mrilib.files import atomic_write
from mrilib.metrics.image import VolumeScore, has_range, paired_difference, score_volume, summarize
from mrilib.physics.fourier import center_crop_or_pad

logger = logging.getLogger("mrilib")


def write_reconstruction(path: Path, volume: np.ndarray, attributes: Mapping[str, Any] | None = None) -> None:
    """Write a volume (slices, h, w) [file units] in fastMRI's submission format, with the file's attributes."""
    with atomic_write(path) as temporary, h5py.File(temporary, "w") as h5:
        h5.create_dataset("reconstruction", data=volume.astype(np.float32))
        h5.attrs.update(attributes or {})


def read_slice(directory: Path, method: str, acceleration: int | str, volume: Volume, slice_num: int) -> np.ndarray:
    """Read one slice (h, w) [file units] of a written reconstruction."""
    with h5py.File(directory / method / str(acceleration) / volume.path.name, "r") as h5:
        return h5["reconstruction"][slice_num]


def read_target(volume: Volume, slice_num: int) -> np.ndarray:
    """Read one slice (h, w) [file units] of a volume's target."""
    with h5py.File(volume.path, "r") as h5:
        return h5["reconstruction_rss"][slice_num]


# ---------------------------------------------------------------------------------------------- scores


def evaluate_volumes(volumes: Sequence[Volume], directory: str | Path) -> list[VolumeScore]:
    """Score the reconstructions of a folder.

    Parameters
    ----------
    volumes : sequence of Volume
        Volumes without a target are ignored. All-zero targets are left out with a warning in the log.
    directory : path
        Holds ``<file>.h5`` in fastMRI's submission format for each volume.

    Raises
    ------
    FileNotFoundError
        If a reconstruction is missing.
    ValueError
        If a reconstruction has another number of slices than its target, or is smaller.
    """
    scores = []
    for volume in volumes:
        if not volume.has_target:
            continue
        path = Path(directory) / volume.path.name
        if not path.is_file():
            raise FileNotFoundError(f"no reconstruction {path.name} in {directory}")
        with h5py.File(volume.path, "r") as target, h5py.File(path, "r") as reconstruction:
            truth, image = target["reconstruction_rss"][()], reconstruction["reconstruction"][()]
        height, width = min(truth.shape[1:]), truth.shape[2]  # fastMRI evaluates a square of a volume higher than wide
        if image.ndim != 3 or len(image) != len(truth) or image.shape[1] < height or image.shape[2] < width:
            raise ValueError(f"{path}: reconstruction {image.shape} does not cover the target {truth.shape}")
        if not has_range(truth):
            logger.warning("%s: its target is zero everywhere; it is in no metric", volume.path.name)
            continue
        scores.append(VolumeScore(volume.file, volume.patient, volume.acquisition, **score_volume(truth, image)))
    return scores


def by_acceleration(volumes: Sequence[Volume], accelerations: Sequence[int]) -> dict[int, list[Volume]]:
    """Group volumes by the accelerations of their reconstructions.

    A fully sampled volume is in the group of each of `accelerations`. A volume with its own mask is only in the group
    of that mask's acceleration, which may be another one.
    """
    own = {volume.acceleration for volume in volumes if volume.has_mask}
    has_full = any(not volume.has_mask for volume in volumes)
    return {
        acceleration: [
            volume
            for volume in volumes
            if (volume.acceleration == acceleration if volume.has_mask else acceleration in accelerations)
        ]
        for acceleration in sorted(own | set(accelerations) if has_full else own)
    }


def score_reconstructions(
    directory: Path, volumes: Sequence[Volume], accelerations: Sequence[int] | None = None
) -> dict[str, dict[str, list[VolumeScore]]]:
    """Score every ``<directory>/<method>/<acceleration>``.

    Parameters
    ----------
    directory : Path
    volumes : sequence of Volume
    accelerations : sequence of int, optional
        Those of fully sampled volumes; by default every folder's.

    Returns
    -------
    dict
        Acceleration → method → scores, without methods that have no scores.
    """
    scores: dict[str, dict[str, list[VolumeScore]]] = defaultdict(dict)
    for folder in sorted(directory.glob("*/*")):
        acceleration = int(folder.name)
        groups = by_acceleration(volumes, [acceleration] if accelerations is None else accelerations)
        volume_scores = evaluate_volumes(groups.get(acceleration, []), folder)
        if volume_scores:
            scores[folder.name][folder.parent.name] = volume_scores
    return dict(scores)


def summarize_methods(
    scores: Mapping[str, Mapping[str, Sequence[VolumeScore]]], seed: int = 0
) -> dict[str, dict[str, dict[str, Any]]]:
    """Compute the "reconstruction" section of metrics.json: acceleration → method → `summarize`.

    The zero-filled entry also has ``compression_cost_ssim`` and ``compression_cost_psnr`` [dB]: the mean of all coils
    minus that of the compressed coils, 0 without compression. Other methods than the model have ``ssim_difference``,
    the model's SSIM minus theirs over the same volumes, and ``ssim_difference_ci95``, its interval over patients.
    """
    section: dict[str, dict[str, dict[str, Any]]] = {}
    for acceleration, methods in scores.items():
        section[acceleration] = {name: summarize(of, seed) for name, of in methods.items()}
        for name, of in methods.items():
            if name != "model" and "model" in methods:
                mean, interval = paired_difference(methods["model"], of, "ssim")
                section[acceleration][name] |= {"ssim_difference": mean, "ssim_difference_ci95": interval}
        if "zero_filled" in methods:
            compressed = methods.get("zero_filled_compressed", methods["zero_filled"])
            for metric in ("ssim", "psnr"):
                cost = paired_difference(methods["zero_filled"], compressed, metric)[0]
                section[acceleration]["zero_filled"][f"compression_cost_{metric}"] = cost
    return section


# ---------------------------------------------------------------------------------------------- memorising control


class NearestTrainingSlice:
    """Control for memorising: the target of a training slice as the answer.

    It is an oracle. The training slice is chosen by its correlation with the *test target* at 32×32 pixels, and scaled
    to it by least squares. No method that only recalls training slices can be better at this resolution. Images of
    other sizes are cropped or padded about their centre.

    Parameters
    ----------
    volumes : sequence of Volume
        Training volumes; those without a target are ignored. Targets are read again when needed, so that a slice takes
        4 KiB of memory.

    Raises
    ------
    ValueError
        If no volume has a target.
    """

    def __init__(self, volumes: Sequence[Volume]) -> None:
        with_target = [volume for volume in volumes if volume.has_target]
        if not with_target:
            raise ValueError("the nearest training slice needs training volumes with reconstruction_rss")
        self.side = max(max(volume.image_shape) for volume in with_target)  # of the common grid [pixels]
        self.places: list[tuple[Volume, int]] = []
        features = []
        for volume in with_target:
            with h5py.File(volume.path, "r") as h5:
                for number in range(volume.slices):
                    features.append(self._feature(h5["reconstruction_rss"][number]))
                    self.places.append((volume, number))
        self.features = np.stack(features)

    def _feature(self, image: np.ndarray) -> np.ndarray:
        """Downsample to 32×32 pixels, with zero mean and unit norm, so that products are correlations."""
        zoom = 32 / self.side
        small = ndimage.zoom(_crop_or_pad(image, (self.side, self.side)), zoom, order=1, grid_mode=True, mode="nearest")
        centered = small.ravel() - small.mean()
        return centered / max(float(np.linalg.norm(centered)), np.finfo(np.float32).tiny)

    def answer(self, target: np.ndarray) -> np.ndarray:
        """Return the nearest training slice on the target's grid, scaled to it: (h, w) [file units]."""
        volume, number = self.places[int(np.argmax(self.features @ self._feature(target)))]
        # In float64, because float32 cannot hold the squares of small file units.
        image = _crop_or_pad(read_target(volume, number), target.shape).astype(np.float64)
        power = float(np.sum(image**2))
        return (image * (float(np.sum(image * target)) / power if power else 0.0)).astype(np.float32)


def _crop_or_pad(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    return center_crop_or_pad(torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32)), size).numpy()


# ---------------------------------------------------------------------------------------------- slices for figures


class PickedSlice(NamedTuple):
    """A slice for a figure."""

    volume: Volume
    slice_num: int
    role: str  # best, median, worst, or rank


def pick_slices(scores: Sequence[VolumeScore], volumes: Sequence[Volume], count: int = 3) -> list[PickedSlice]:
    """Pick the middle slices of the best, the median and the worst volume by SSIM inside the head.

    With a larger `count`, further volumes are evenly spaced between these. `scores` are those of the shown method.
    """
    ranked = sorted(scores, key=lambda score: -score.ssim_head)
    ranks = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
    by_file = {volume.file: volume for volume in volumes}
    roles = {len(ranked) - 1: "worst", 0: "best"}  # a single volume is the best
    middle = (len(ranked) - 1) / 2
    picked = []
    for rank in ranks:
        role = roles.get(int(rank), "median" if abs(rank - middle) <= 0.5 else f"rank {rank + 1} of {len(ranked)}")
        volume = by_file[ranked[rank].file]
        picked.append(PickedSlice(volume, volume.slices // 2, role))
    return picked


class Comparison(NamedTuple):
    """One slice, or a part of it, for the figures of `display.images`; arrays as in the h5, not flipped."""

    target: ArrayLike | Tensor  # (h, w) [file units]
    images: Mapping[str, ArrayLike | Tensor]  # method → (h, w) [file units]
    maximum: float  # of the target volume [file units]
    scores: Mapping[str, Mapping[str, float]] | None = None  # method → {"ssim": …, "psnr": …}; None: of this slice
    title: str = ""  # lines separated by \n
    boxes: Sequence[Box] = ()
    pixel: tuple[float, float] | None = None  # readout, phase [mm]: for the target's scale bar
    zoom: tuple[slice, slice] | None = None  # rows and columns to show; None: all
