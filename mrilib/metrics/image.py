"""Image metrics as fastMRI defines them, SSIM and PSNR inside the head, and intervals over patients."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from fastmri import evaluate as official
from fastmri.data.transforms import center_crop
from scipy import ndimage
from skimage.metrics import structural_similarity

METRICS = ("ssim", "psnr", "nmse", "ssim_head", "psnr_head")
EXACT_PSNR = 200.0  # of a reconstruction without error [dB]; fastMRI's is infinite
BOOTSTRAP_SAMPLES = 1000


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
    """Segment the head in the fully sampled target.

    Parameters
    ----------
    target : array, float, shape (slices, h, w)

    Returns
    -------
    array, bool, same shape
        Pixels above a tenth of the volume's 99th percentile, closed over 5 pixels, with holes filled; the largest
        component of each slice.
    """
    bright = target > 0.1 * np.percentile(target, 99)
    mask = np.zeros_like(bright)
    for number, image in enumerate(bright):
        padded = np.pad(image, 5)  # without padding, the closing erodes the border
        closed = ndimage.binary_fill_holes(ndimage.binary_closing(padded, iterations=5))[5:-5, 5:-5]
        labels, count = ndimage.label(closed)
        if count:
            sizes = ndimage.sum_labels(closed, labels, range(1, count + 1))
            mask[number] = labels == 1 + int(np.argmax(sizes))
    return mask


def score_volume(target: np.ndarray, reconstruction: np.ndarray) -> dict[str, float]:
    """Compute the official SSIM, PSNR [dB] and NMSE of a volume, and SSIM and PSNR inside the head.

    Parameters
    ----------
    target, reconstruction : array, float, shape (slices, h, w) [file units]

    Returns
    -------
    dict
        The keys are `METRICS`. The head metrics use the same maximum: the mean of the SSIM map and the PSNR over the
        head's pixels. An infinite PSNR becomes `EXACT_PSNR`.

    Raises
    ------
    ValueError
        If the target is zero everywhere: fastMRI's metrics are then not numbers.
    """
    if not has_range(target):
        raise ValueError("a target that is zero everywhere cannot be scored")
    target = _evaluated_crop(target)
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
    """Whether the evaluated crop of a target has a positive maximum; otherwise it cannot be scored."""
    return bool(_evaluated_crop(target).max() > 0)


def _evaluated_crop(target: np.ndarray) -> np.ndarray:
    """Crop (..., h, w) to the part that fastMRI evaluates: a square where the target is higher than wide."""
    height, width = target.shape[-2:]
    return center_crop(target, (min(width, height), width))


def score_slice(target: np.ndarray, reconstruction: np.ndarray, maximum: float) -> dict[str, float]:
    """Compute a slice's contribution to the official metrics of its volume, for `volume_metrics`.

    Parameters
    ----------
    target, reconstruction : array, float, shape (h, w) [file units]
    maximum : float
        Maximum of the target volume [file units].
    """
    target = _evaluated_crop(target)[None]
    reconstruction = center_crop(reconstruction, target.shape[-2:])[None]
    maximum = maximum or 1.0  # an all-zero volume is recognised by its energy of zero
    unit = target.astype(np.float64) / maximum
    return {
        "ssim": float(official.ssim(target, reconstruction, maximum)[0]),
        "error": float(np.sum((unit - reconstruction / maximum) ** 2)),
        "energy": float(np.sum(unit**2)),
        "pixels": target.size,
    }


def volume_metrics(slices: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Compute the official SSIM, PSNR [dB] and NMSE of a volume from the `score_slice` of its slices."""
    total = {name: math.fsum(one[name] for one in slices) for name in ("ssim", "error", "energy", "pixels")}
    psnr = 10 * math.log10(total["pixels"] / total["error"]) if total["error"] else EXACT_PSNR
    return {"ssim": total["ssim"] / len(slices), "psnr": psnr, "nmse": total["error"] / total["energy"]}


def summarize(scores: Sequence[VolumeScore], seed: int = 0) -> dict[str, Any]:
    """Average over volumes, with 95% bootstrap intervals over patients: one method's entry in metrics.json.

    The intervals of a single patient are None.
    """
    patients = [score.patient for score in scores]
    summary: dict[str, Any] = {"volumes": len(scores), "patients": len(set(patients))}
    for metric in METRICS:
        values = [getattr(score, metric) for score in scores]
        summary[metric] = float(np.mean(values))
        summary[f"{metric}_ci95"] = bootstrap_interval(values, patients, seed=seed)
    return summary


def bootstrap_interval(
    values: Sequence[float], patients: Sequence[str], weights: Sequence[float] | None = None, seed: int = 0
) -> list[float] | None:
    """Compute the 95% percentile interval of a mean by resampling whole patients.

    Parameters
    ----------
    values : sequence of float
    patients : sequence of str
    weights : sequence of float, optional
        The interval is then that of the ratio Σ values / Σ weights. Resamples without weight are left out.
    seed : int

    Returns
    -------
    [low, high], or None for a single patient or without any weight.
    """
    sums = _patient_sums(values, patients)
    totals = _patient_sums(np.ones(len(values)) if weights is None else weights, patients)
    if len(sums) < 2 or not totals.any():
        return None
    picks = np.random.default_rng(seed).integers(len(sums), size=(BOOTSTRAP_SAMPLES, len(sums)))
    numerators, denominators = sums[picks].sum(1), totals[picks].sum(1)
    means = numerators[denominators > 0] / denominators[denominators > 0]
    low, high = np.percentile(means, [2.5, 97.5])
    return [float(low), float(high)]


def clustered_mean(values: Sequence[float], weights: Sequence[float], patients: Sequence[str]) -> tuple[float, float]:
    """Compute a weighted mean Σv/Σw and its standard error, clustered by patient.

    Parameters
    ----------
    values : sequence of float
        For instance a slice's cross-entropy, summed over its tokens.
    weights : sequence of float
        For instance a slice's number of tokens.
    patients : sequence of str

    Returns
    -------
    mean, standard_error : float
        The error is the ratio estimator's linearised one with the G/(G−1) correction (Cameron and Miller, J Human
        Resources 50:317, 2015), and infinite for a single patient.
    """
    sums, totals = _patient_sums(values, patients), _patient_sums(weights, patients)
    mean = sums.sum() / totals.sum()
    groups = len(sums)
    if groups < 2:
        return float(mean), float("inf")
    residuals = (sums - mean * totals) / totals.sum()
    return float(mean), float(np.sqrt(groups / (groups - 1) * np.sum(residuals**2)))


def _patient_sums(values: Sequence[float] | np.ndarray, patients: Sequence[str]) -> np.ndarray:
    """Sum of each patient's values, in the order of the patients' names."""
    sums: dict[str, float] = defaultdict(float)
    for value, patient in zip(values, patients, strict=True):
        sums[patient] += float(value)
    return np.array([sums[name] for name in sorted(sums)])


def paired_difference(
    own: Sequence[VolumeScore], other: Sequence[VolumeScore], metric: str
) -> tuple[float, list[float] | None]:
    """Compute the mean of own − other over the same volumes, and its 95% bootstrap interval over patients."""
    change = [getattr(a, metric) - getattr(b, metric) for a, b in zip(own, other, strict=True)]
    return float(np.mean(change)), bootstrap_interval(change, [score.patient for score in own])
