"""Compressed sensing with the BART toolbox: ESPIRiT coil maps, then l1-wavelet reconstruction.

BART (Uecker et al., Proc. ISMRM 23:2486, 2015; ``apt-get install bart``) is called as a program. Arrays go through cfl
files in a temporary folder, with axes readout, phase, slice (length 1) and coil in column-major order.
"""

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mrilib.config import DataParameters
from mrilib.data.dataset import Batch, FastMRIDataset, Volume
from mrilib.data.sampler import make_loader
from mrilib.metrics.image import score_volume
from mrilib.physics import coils, fourier

MISSING = "BART is not installed (Debian: apt-get install bart)"
KERNELS = (3, 4, 5)
CALIBRATIONS = (12, 24)
STRENGTHS = (0.0005, 0.002, 0.005, 0.02)
ITERATIONS = 100
OUTPUTS = ("combined", "rss")


class BartError(RuntimeError):
    """BART is missing or refused its input; the message quotes BART."""


class Settings(NamedTuple):
    """Settings that `choose` selects on validation slices."""

    kernel: int = 5  # side of ESPIRiT's kernel [k-space samples]; at most a slice's number of centre lines
    calibration: int = 24  # largest side of the calibration region [k-space samples]
    strength: float = 0.005  # weight of the l1-wavelet penalty, on data that BART scales
    # combined: magnitude of BART's image. rss: RSS of its coil images after replacing the measured lines.
    output: Literal["combined", "rss"] = "rss"


def version() -> str:
    """Return BART's version, such as "v0.8.00"; empty if it is not installed."""
    if shutil.which("bart") is None:
        return ""
    return subprocess.run(["bart", "version"], capture_output=True, text=True, check=True).stdout.strip()


def write_cfl(path: Path, array: NDArray[np.complexfloating]) -> None:
    """Write ``<path>.cfl`` and ``<path>.hdr``; axis 0 varies fastest."""
    dims = [*array.shape, *[1] * (16 - array.ndim)]
    path.with_suffix(".hdr").write_text("# Dimensions\n" + " ".join(map(str, dims)) + "\n")
    array.astype(np.complex64).ravel(order="F").tofile(path.with_suffix(".cfl"))


def read_cfl(path: Path) -> NDArray[np.complex64]:
    """Read ``<path>.cfl``, without trailing axes of length 1."""
    lines = path.with_suffix(".hdr").read_text().splitlines()
    dims = [int(number) for number in lines[lines.index("# Dimensions") + 1].split()]
    while len(dims) > 1 and dims[-1] == 1:
        dims.pop()
    return np.fromfile(path.with_suffix(".cfl"), np.complex64).reshape(dims, order="F")


def _bart(*arguments: str) -> None:
    if shutil.which("bart") is None:
        raise BartError(MISSING)
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # slices run in parallel instead
    process = subprocess.run(["bart", *arguments], capture_output=True, text=True, env=one_thread)
    if process.returncode:
        raise BartError(f"bart {arguments[0]}: {(process.stderr or process.stdout).strip().splitlines()[-1:]}")


def _coil_maps(folder: Path, settings: Settings) -> None:
    """Compute ESPIRiT maps; reduce the kernel where a slice has too few centre lines for it."""
    kernel = settings.kernel
    while True:
        limits = ["-k", str(kernel), "-r", str(settings.calibration)]
        try:
            _bart("ecalib", "-d0", "-m1", *limits, str(folder / "kspace"), str(folder / "maps"))
            return
        except BartError:
            if kernel <= 2:
                raise
            kernel -= 1


def reconstruct_slice(
    kspace: Tensor, mask: Tensor, acquired: Tensor, settings: Settings, folder: Path
) -> tuple[Tensor, Tensor]:
    """Reconstruct one slice with an l1-wavelet penalty.

    Parameters
    ----------
    kspace : Tensor, complex64, shape (coil, readout, phase)
        Masked.
    mask, acquired : Tensor, bool, shape (phase,)
        Measured lines, and lines of the fully sampled scan.
    settings : Settings
    folder : Path
        Empty folder for BART's files.

    Returns
    -------
    combined, rss : Tensor, float32, shape (readout, phase)
        Both `Settings.output`, in the unit of an image of `kspace`.
    """
    # BART 0.8 misplaces images of odd width. An unsampled line before the first makes the width even; it is removed
    # in k-space afterwards.
    odd = kspace.shape[-1] % 2
    padded = torch.nn.functional.pad(kspace, (odd, 0))
    write_cfl(folder / "kspace", padded.numpy().transpose(1, 2, 0)[:, :, None])
    _coil_maps(folder, settings)
    # W:3:0 is a wavelet penalty over axes 0 and 1; -S undoes the scaling that makes the strength independent of units.
    penalty = ["-S", "-i", str(ITERATIONS), "-R", f"W:3:0:{settings.strength}"]
    _bart("pics", "-d0", *penalty, *(str(folder / name) for name in ("kspace", "maps", "image")))
    shape = padded.shape[-2:]
    image = torch.from_numpy(read_cfl(folder / "image").reshape(shape).copy())
    maps = torch.from_numpy(read_cfl(folder / "maps").reshape(*shape, -1).transpose(2, 0, 1).copy())
    # For lengths that 8 does not divide, pics leaves a constant phase on its image. It must be removed before measured
    # lines replace predicted ones.
    predicted = fourier.fft2c(coils.expand(image, maps))[..., odd:]
    product = torch.vdot(predicted[..., mask].flatten(), kspace[..., mask].flatten())
    predicted = predicted * (product / product.abs().clamp_min(torch.finfo(torch.float32).tiny))
    combined = fourier.ifft2c(fourier.fft2c(image)[..., odd:]).abs()
    return combined, fourier.rss(fourier.ifft2c(torch.where(mask, kspace, predicted * acquired)))


def reconstruct(batch: Batch, settings: Settings) -> Tensor:
    """Reconstruct a batch.

    Returns
    -------
    Tensor, float32, shape (B, h, w) [file units]
        Zero for a slice without signal.

    Raises
    ------
    BartError
        If BART is missing or refuses a slice, for instance one without centre lines.
    """
    return torch.stack([images[settings.output] for images in _both_outputs(batch, settings)])


def _both_outputs(batch: Batch, settings: Settings) -> list[dict[str, Tensor]]:
    """Reconstruct slices in parallel, as BART hardly gains from several threads per slice."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda number: _reconstruct_one(batch, number, settings), range(len(batch.slices))))


def _reconstruct_one(batch: Batch, number: int, settings: Settings) -> dict[str, Tensor]:
    kspace, mask = batch.kspace[number].cpu(), batch.mask[number].cpu()
    if not kspace.abs().any():
        return dict.fromkeys(OUTPUTS, torch.zeros(batch.image_shape))
    acquired = torch.ones_like(mask) if batch.acquired is None else batch.acquired[number].cpu()
    with tempfile.TemporaryDirectory(prefix="bart-") as temporary:
        images = zip(OUTPUTS, reconstruct_slice(kspace, mask, acquired, settings, Path(temporary)), strict=True)
    scale = float(batch.scale[number])
    return {name: fourier.center_crop_or_pad(image, batch.image_shape) * scale for name, image in images}


def choose(batches: Iterable[Batch]) -> tuple[Settings, list[dict[str, Any]]]:
    """Choose the settings with the best mean SSIM inside the head, on validation slices of one acceleration.

    First every kernel is tried with every calibration region, then every strength with the best of them; both outputs
    are scored each time.

    Returns
    -------
    settings : Settings
    trials : list of dict
        Every setting with its "ssim_head" and "psnr_head" [dB], or "refused" with BART's reason.

    Raises
    ------
    BartError
        If BART is missing or refuses every setting.
    """
    if not version():
        raise BartError(MISSING)
    slices = list(batches)
    trials: list[dict[str, Any]] = []
    best = Settings()
    grid = [best._replace(kernel=kernel, calibration=region) for kernel in KERNELS for region in CALIBRATIONS]
    for _ in range(2):
        for settings in grid:
            if not any(_is_same(trial, settings) for trial in trials):
                trials += _try_settings(slices, settings)
        scored = [trial for trial in trials if "refused" not in trial]
        if not scored:
            raise BartError(f"BART refuses every setting: {trials[-1]['refused']}")
        winner = max(scored, key=lambda trial: trial["ssim_head"])
        best = Settings(*(winner[name] for name in Settings._fields))
        grid = [best._replace(strength=strength) for strength in STRENGTHS]
    return best, trials


def _is_same(trial: dict[str, Any], settings: Settings) -> bool:
    return all(trial[name] == getattr(settings, name) for name in ("kernel", "calibration", "strength"))


def _try_settings(batches: Sequence[Batch], settings: Settings) -> list[dict[str, Any]]:
    """Score both outputs."""
    scores: dict[str, list[dict[str, float]]] = {output: [] for output in OUTPUTS}
    try:
        for batch in batches:
            assert batch.target is not None
            for target, images in zip(batch.target.cpu().numpy(), _both_outputs(batch, settings), strict=True):
                for output, image in images.items():
                    scores[output].append(score_volume(target[None], image.numpy()[None]))
    except BartError as error:
        return [settings._asdict() | {"output": output, "refused": str(error)} for output in OUTPUTS]
    means = {
        output: {name: float(np.mean([score[name] for score in slices])) for name in ("ssim_head", "psnr_head")}
        for output, slices in scores.items()
    }
    return [settings._asdict() | {"output": output} | means[output] for output in OUTPUTS]


def tuned(
    volumes: Sequence[Volume], config: DataParameters, acceleration: int, slices: int
) -> tuple[Callable[[Batch], Tensor], dict[str, Any]]:
    """Tune BART on validation slices of one acceleration; return its reconstruction and a record of the settings.

    BART gets all coils: the slices are not compressed.
    """
    data = FastMRIDataset(volumes, config, acceleration=acceleration, max_slices=slices)
    settings, trials = choose(make_loader(data.uncompressed(), 4))
    facts = {"version": version(), "coils": "all", "chosen": settings._asdict(), "tried": trials}
    return functools.partial(reconstruct, settings=settings), facts
