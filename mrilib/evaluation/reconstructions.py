"""Metrics, baselines and controls.

Image metrics are fastMRI's official ones (fastmri.evaluate): per volume, with the volume's maximum, on the target's
square crop, then the mean over volumes. Intervals and standard errors are over patients, since slices and contrasts of
one patient are not independent.
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
from mrilib.metrics.image import VolumeScore, has_range, paired_difference, score_volume, summarize
from mrilib.physics.fourier import center_crop_or_pad

logger = logging.getLogger("mrilib")


def write_reconstruction(path: Path, volume: np.ndarray, attributes: Mapping[str, Any] | None = None) -> None:
    """Write a volume (slices, h, w) [file units] in fastMRI's submission format, dataset ``reconstruction``.

    `attributes` are the file's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with h5py.File(temporary, "w") as h5:
        h5.create_dataset("reconstruction", data=volume.astype(np.float32))
        h5.attrs.update(attributes or {})
    temporary.replace(path)


def evaluate_volumes(volumes: Sequence[Volume], directory: str | Path) -> list[VolumeScore]:
    """Score the reconstructions of a folder against their volumes' targets.

    Parameters
    ----------
    volumes : sequence of Volume
        With targets; those without are left out, and so, with a warning in the log, are those that are zero everywhere.
    directory : path
        Holds ``<file>.h5`` in fastMRI's submission format for each.

    Raises
    ------
    FileNotFoundError
        If a reconstruction is missing; it is named.
    ValueError
        If one has another number of slices than its target, or is smaller.
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
        height, width = min(truth.shape[1:]), truth.shape[2]  # what is evaluated of a volume narrower than high
        if image.ndim != 3 or len(image) != len(truth) or image.shape[1] < height or image.shape[2] < width:
            raise ValueError(f"{path}: reconstruction {image.shape} does not cover the target {truth.shape}")
        if not has_range(truth):
            logger.warning("%s: its target is zero everywhere; it is in no metric", volume.path.name)
            continue
        scores.append(VolumeScore(volume.file, volume.patient, volume.acquisition, **score_volume(truth, image)))
    return scores


def summarize_methods(
    scores: Mapping[str, Mapping[str, Sequence[VolumeScore]]], bootstrap_samples: int = 1000, seed: int = 0
) -> dict[str, dict[str, dict[str, Any]]]:
    """The "reconstruction" section of metrics.json: acceleration → method → `summarize`.

    What coil compression costs stands with the zero-filled images, which are of all coils: ``compression_cost_ssim``
    and ``compression_cost_psnr`` [dB] are their means minus those of the compressed coils, 0 where nothing was
    compressed.
    """
    section: dict[str, dict[str, dict[str, Any]]] = {}
    for acceleration, methods in scores.items():
        section[acceleration] = {name: summarize(of, bootstrap_samples, seed) for name, of in methods.items()}
        if "zero_filled" in methods:
            fewer = methods.get("zero_filled_compressed", methods["zero_filled"])
            for metric in ("ssim", "psnr"):
                cost = paired_difference(methods["zero_filled"], fewer, metric)[0]
                section[acceleration]["zero_filled"][f"compression_cost_{metric}"] = cost
    return section


class NearestTrainingSlice:
    """The control for memorising: a training slice's target given as the answer.

    It is an oracle: the neighbour is chosen by the *test target* (largest correlation at 32×32) and scaled to it by
    least squares, so that no method that could only recall training slices does better at this resolution. Images of
    other sizes are cropped or padded about their centre, never stretched.

    Parameters
    ----------
    volumes : sequence of Volume
        Training volumes; those without a target have nothing to answer with. Targets are read again when they are
        asked for, so that memory holds 4 KiB a slice.

    Raises
    ------
    ValueError
        If none has a target.
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
        zoom = 32 / self.side
        small = ndimage.zoom(_crop_or_pad(image, (self.side, self.side)), zoom, order=1, grid_mode=True, mode="nearest")
        centered = small.ravel() - small.mean()
        return centered / max(float(np.linalg.norm(centered)), np.finfo(np.float32).tiny)

    def answer(self, target: np.ndarray) -> np.ndarray:
        """The nearest training slice, on the target's grid and scaled to it; (h, w) [file units]."""
        volume, number = self.places[int(np.argmax(self.features @ self._feature(target)))]
        image = _crop_or_pad(read_target(volume, number), target.shape).astype(np.float64)  # squares of 1e-24 are none
        power = float(np.sum(image**2))
        return (image * (float(np.sum(image * target)) / power if power else 0.0)).astype(np.float32)


def _crop_or_pad(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    return center_crop_or_pad(torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32)), size).numpy()


def contrast_floor(counts: Mapping[str, int]) -> tuple[float | None, float | None]:
    """Share of the commonest contrast among the test slices and its binomial standard error: what guessing gives.

    Both are None where no contrast is known.
    """
    total = sum(counts.values())
    if not total:
        return None, None
    share = max(counts.values()) / total
    return share, float(np.sqrt(share * (1 - share) / total))


def by_acceleration(volumes: Sequence[Volume], accelerations: Sequence[int]) -> dict[int, list[Volume]]:
    """The volumes that are reconstructed at each acceleration.

    Fully sampled ones at each of `accelerations`; those that bring their own mask once, at its acceleration, which need
    not be one of them.
    """
    own = {volume.acceleration for volume in volumes if volume.has_mask}
    sampled = [volume for volume in volumes if not volume.has_mask]
    wanted = sorted(own | set(accelerations)) if sampled else sorted(own)
    return {
        a: [v for v in volumes if (v.acceleration == a if v.has_mask else a in accelerations)]
        for a in wanted
    }  # fmt: skip


def score_reconstructions(
    directory: Path, volumes: Sequence[Volume], accelerations: Sequence[int] | None = None
) -> dict[str, dict[str, list[VolumeScore]]]:
    """Score every method at every acceleration below ``reconstructions/``: acceleration → method → scores.

    `accelerations` are those of fully sampled volumes; by default every folder's. What cannot be scored, as test files
    without a target, is left out, and so are methods that have nothing else.
    """
    scores: dict[str, dict[str, list[VolumeScore]]] = defaultdict(dict)
    for folder in sorted(directory.glob("*/*")):
        own = int(folder.name)
        parts = by_acceleration(volumes, [own] if accelerations is None else accelerations)
        found = evaluate_volumes(parts.get(own, []), folder)
        if found:
            scores[folder.name][folder.parent.name] = found
    return dict(scores)


class PickedSlice(NamedTuple):
    """A slice chosen for a figure."""

    volume: Volume
    slice_num: int
    role: str  # best, median, worst


def pick_slices(scores: Sequence[VolumeScore], volumes: Sequence[Volume], count: int = 3) -> list[PickedSlice]:
    """The middle slices of the best, the median and the worst volume by SSIM inside the head; more are spread between.

    `scores` are those of the method that is to be shown, for `volumes`.
    """
    ranked = sorted(scores, key=lambda score: -score.ssim_head)
    places = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
    by_file = {volume.file: volume for volume in volumes}
    names = {len(ranked) - 1: "worst", 0: "best"}  # a single one is the best
    middle = (len(ranked) - 1) / 2
    picked = []
    for place in places:
        role = names.get(int(place), "median" if abs(place - middle) <= 0.5 else f"rank {place + 1} of {len(ranked)}")
        volume = by_file[ranked[place].file]
        picked.append(PickedSlice(volume, volume.slices // 2, role))
    return picked


def read_slice(directory: Path, method: str, acceleration: int | str, volume: Volume, slice_num: int) -> np.ndarray:
    """One slice (h, w) [file units] of a written reconstruction."""
    with h5py.File(directory / method / str(acceleration) / volume.path.name, "r") as h5:
        return h5["reconstruction"][slice_num]


def read_target(volume: Volume, slice_num: int) -> np.ndarray:
    """One slice (h, w) of a volume's target [file units]."""
    with h5py.File(volume.path, "r") as h5:
        return h5["reconstruction_rss"][slice_num]


class Comparison(NamedTuple):
    """One slice for `reconstruction_comparison`; arrays as in the h5, not flipped."""

    target: ArrayLike | Tensor  # (h, w) [file units]
    images: Mapping[str, ArrayLike | Tensor]  # method → (h, w) [file units]
    maximum: float  # of the target volume [file units]
    scores: Mapping[str, Mapping[str, float]] | None = None  # method → {"ssim": …, "psnr": …}; None: of this slice
    title: str = ""  # beside the slice, lines separated by \n
    boxes: Sequence[Box] = ()
    pixel: tuple[float, float] | None = None  # readout, phase [mm]: for the target's scale bar
