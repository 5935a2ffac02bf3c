"""Image metrics as fastMRI defines them, SSIM and PSNR inside the head, and intervals over patients."""

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from fastmri import evaluate as official
from fastmri.data.transforms import center_crop
from scipy import ndimage
from skimage.metrics import structural_similarity

logger = logging.getLogger("mrilib")


METRICS = ("ssim", "psnr", "nmse", "ssim_head", "psnr_head")


EXACT_PSNR = 200.0  # [dB]: of a reconstruction without any error, for which fastMRI's is infinite


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


def paired_difference(
    own: Sequence[VolumeScore], other: Sequence[VolumeScore], metric: str, samples: int = 1000, seed: int = 0
) -> tuple[float, list[float] | None]:
    """Mean of own − other over the same volumes and its 95% bootstrap interval over patients, None of a single one."""
    change = [getattr(a, metric) - getattr(b, metric) for a, b in zip(own, other, strict=True)]
    return float(np.mean(change)), bootstrap_interval(change, [score.patient for score in own], samples, seed)
