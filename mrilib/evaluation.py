"""Metrics, baselines and controls.

Image metrics are fastMRI's official ones (fastmri.evaluate): per volume, with the volume's maximum, on the target's
square crop, then the mean over volumes. Intervals and standard errors are over patients, since slices and contrasts of
one patient are not independent.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from fastmri import evaluate as official
from fastmri.data.transforms import center_crop
from scipy import ndimage
from skimage.metrics import structural_similarity

from mrilib.kspace import center_crop_or_pad
from mrilib.volume import Volume

METRICS = ("ssim", "psnr", "nmse", "ssim_head", "psnr_head")
EXACT_PSNR = 200.0  # [dB]: of a reconstruction without any error, for which fastMRI's is infinite
logger = logging.getLogger("mrilib")


class VolumeScore(NamedTuple):
    """Metrics of one volume; PSNR in [dB]."""

    file: str
    patient: str
    acquisition: str
    ssim: float
    psnr: float
    nmse: float
    ssim_head: float
    psnr_head: float


def head_mask(target: np.ndarray) -> np.ndarray:
    """Pixels inside the head, from the fully sampled target.

    Parameters
    ----------
    target : array, float, shape (slices, h, w)

    Returns
    -------
    array, bool, same shape
        Above a tenth of the volume's 99th percentile, closed over 5 pixels, holes filled, largest part of each slice.
    """
    bright = target > 0.1 * np.percentile(target, 99)
    mask = np.zeros_like(bright)
    for number, image in enumerate(bright):
        padded = np.pad(image, 5)  # closing must not eat at the border
        closed = ndimage.binary_fill_holes(ndimage.binary_closing(padded, iterations=5))[5:-5, 5:-5]
        labels, count = ndimage.label(closed)
        if count:
            sizes = ndimage.sum_labels(closed, labels, range(1, count + 1))
            mask[number] = labels == 1 + int(np.argmax(sizes))
    return mask


def score_volume(target: np.ndarray, reconstruction: np.ndarray) -> dict[str, float]:
    """Official SSIM, PSNR [dB] and NMSE of a volume, and SSIM and PSNR inside the head.

    Parameters
    ----------
    target, reconstruction : array, float, shape (slices, h, w) [file units]

    Returns
    -------
    dict
        Keys of `METRICS`. Inside the head: the SSIM map's mean and the PSNR over its pixels, with the same maximum.
        A PSNR without any error is `EXACT_PSNR`, where fastMRI's is infinite; everything finite is fastMRI's.

    Raises
    ------
    ValueError
        If the target is zero everywhere: it has no range, and fastMRI's metrics of it are not numbers.
    """
    if not has_range(target):
        raise ValueError("a target that is zero everywhere has no range to score against")
    width = target.shape[-1]
    target = center_crop(target, (min(width, target.shape[-2]), width))
    reconstruction = center_crop(reconstruction, target.shape[-2:])
    head = head_mask(target)
    maximum = target.max()
    maps = [
        structural_similarity(t, r, data_range=maximum, full=True)[1]
        for t, r in zip(target, reconstruction, strict=True)
    ]
    exact = bool(np.all(target == reconstruction))
    error = float(np.mean((target[head] - reconstruction[head]) ** 2))
    return {
        "ssim": float(official.ssim(target, reconstruction)[0]),
        "psnr": EXACT_PSNR if exact else float(official.psnr(target, reconstruction)),
        "nmse": float(official.nmse(target, reconstruction)),
        "ssim_head": float(np.mean(np.stack(maps)[head])),
        "psnr_head": float(10 * np.log10(maximum**2 / error)) if error else EXACT_PSNR,
    }


def has_range(target: np.ndarray) -> bool:
    """Whether a volume's evaluated crop holds anything: one that is zero everywhere cannot be scored."""
    width = target.shape[-1]
    return bool(center_crop(target, (min(width, target.shape[-2]), width)).max() > 0)


def score_slice(target: np.ndarray, reconstruction: np.ndarray, maximum: float) -> dict[str, float]:
    """A slice's part of its volume's official metrics, for `volume_metrics`.

    Parameters
    ----------
    target, reconstruction : array, float, shape (h, w) [file units]
    maximum : float
        Of the target volume [file units].
    """
    width = target.shape[-1]
    target = center_crop(target, (min(width, target.shape[-2]), width))[None]
    reconstruction = center_crop(reconstruction, target.shape[-2:])[None]
    maximum = maximum or 1.0  # a volume of zeros: its energy of zero says that it cannot be scored
    unit = target.astype(np.float64) / maximum
    return {
        "ssim": float(official.ssim(target, reconstruction, maximum)[0]),
        "error": float(np.sum((unit - reconstruction / maximum) ** 2)),
        "energy": float(np.sum(unit**2)),
        "pixels": target.size,
    }


def volume_metrics(slices: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Official SSIM, PSNR [dB] and NMSE of a volume from the `score_slice` of its slices."""
    total = {name: math.fsum(one[name] for one in slices) for name in ("ssim", "error", "energy", "pixels")}
    psnr = 10 * math.log10(total["pixels"] / total["error"]) if total["error"] else EXACT_PSNR
    return {"ssim": total["ssim"] / len(slices), "psnr": psnr, "nmse": total["error"] / total["energy"]}


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


def summarize(scores: Sequence[VolumeScore], bootstrap_samples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Means over volumes with 95% bootstrap intervals over patients: an entry of metrics.json.

    The intervals of a single patient are None.
    """
    summary: dict[str, Any] = {"volumes": len(scores), "patients": len({score.patient for score in scores})}
    patients = [score.patient for score in scores]
    for metric in METRICS:
        values = [getattr(score, metric) for score in scores]
        summary[metric] = float(np.mean(values))
        summary[f"{metric}_ci95"] = bootstrap_interval(values, patients, bootstrap_samples, seed)
    return summary


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


def bootstrap_interval(
    values: Sequence[float], patients: Sequence[str], samples: int = 1000, seed: int = 0
) -> list[float] | None:
    """95% percentile interval of the mean, resampling whole patients; None of a single patient."""
    sums, counts = _by_patient(values, patients)
    if len(sums) < 2:
        return None
    picks = np.random.default_rng(seed).integers(len(sums), size=(samples, len(sums)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return [float(low), float(high)]


def clustered_mean(values: Sequence[float], weights: Sequence[float], patients: Sequence[str]) -> tuple[float, float]:
    """Weighted mean Σv/Σw and its standard error, clustered by patient.

    Parameters
    ----------
    values : sequence of float
        Sums, for instance a slice's cross-entropy over its tokens.
    weights : sequence of float
        What they are sums over, for instance its number of tokens.
    patients : sequence of str

    Returns
    -------
    (mean, standard_error)
        The ratio estimator's linearised variance with the G/(G−1) correction (Cameron and Miller, J Human Resources
        50:317, 2015); the standard error is infinite for a single patient.
    """
    sums, _ = _by_patient(values, patients)
    totals, _ = _by_patient(weights, patients)
    mean = sums.sum() / totals.sum()
    groups = len(sums)
    if groups < 2:
        return float(mean), float("inf")
    residuals = (sums - mean * totals) / totals.sum()
    return float(mean), float(np.sqrt(groups / (groups - 1) * np.sum(residuals**2)))


def _by_patient(values: Sequence[float], patients: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for value, patient in zip(values, patients, strict=True):
        sums[patient] += float(value)
        counts[patient] += 1
    names = sorted(sums)
    return np.array([sums[name] for name in names]), np.array([counts[name] for name in names], dtype=float)


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
        self.side = max(max(volume.recon) for volume in with_target)  # of the common grid [pixels]
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


def paired_difference(
    own: Sequence[VolumeScore], other: Sequence[VolumeScore], metric: str, samples: int = 1000, seed: int = 0
) -> tuple[float, list[float] | None]:
    """Mean of own − other over the same volumes and its 95% bootstrap interval over patients, None of a single one."""
    change = [getattr(a, metric) - getattr(b, metric) for a, b in zip(own, other, strict=True)]
    return float(np.mean(change)), bootstrap_interval(change, [score.patient for score in own], samples, seed)
