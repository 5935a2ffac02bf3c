"""Compressed sensing with BART, the toolbox that people use for it: ESPIRiT maps, then l1-wavelet reconstruction.

BART (Uecker et al., Proc. ISMRM 23:2486, 2015; ``apt-get install bart``) is called as a program; arrays go through cfl
files in a temporary folder. Its first axes are readout, phase, slice (1 here) and coil, in column-major order.
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

MISSING = "BART is not installed here (Debian: apt-get install bart)"


class BartError(RuntimeError):
    """BART is not installed, or refused its input; the message holds its own words."""


class Settings(NamedTuple):
    """What is chosen on validation slices."""

    kernel: int = 5  # ESPIRiT's kernel, square [k-space samples]; no wider than a slice's centre lines
    calibration: int = 24  # largest side of the calibration region [k-space samples]
    strength: float = 0.005  # weight of the l1-wavelet penalty, on data that BART scales
    # combined: magnitude of BART's image; rss: expanded by the maps, measured lines put back, root sum of squares
    output: Literal["combined", "rss"] = "rss"


KERNELS = (3, 4, 5)
CALIBRATIONS = (12, 24)
STRENGTHS = (0.0005, 0.002, 0.005, 0.02)
ITERATIONS = 100


def version() -> str:
    """BART's version, such as "v0.8.00"; empty if it is not installed."""
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
    # a thread each, as slices are reconstructed side by side
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bart", *arguments], capture_output=True, text=True, env=one_thread)
    if done.returncode:
        raise BartError(f"bart {arguments[0]}: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")


def reconstruct_slice(
    kspace: Tensor, mask: Tensor, acquired: Tensor, settings: Settings, folder: Path
) -> tuple[Tensor, Tensor]:
    """l1-wavelet reconstruction of one slice.

    Parameters
    ----------
    kspace : Tensor, complex64, shape (coil, readout, phase)
        Masked.
    mask, acquired : Tensor, bool, shape (phase,)
        Lines that were measured, and lines that a fully sampled scan has.
    settings : Settings
    folder : Path
        Empty; for BART's files.

    Returns
    -------
    combined, rss : Tensor, float32, shape (readout, phase)
        Magnitude of BART's image; and root sum of squares of its coil images with the measured lines put back. Both in
        the unit of an image of `kspace`.
    """
    # BART 0.8 places an image of odd length wrongly: an unsampled line before the first makes it even, the centre where
    # it belongs, and goes again in k-space.
    odd = kspace.shape[-1] % 2
    padded = torch.nn.functional.pad(kspace, (odd, 0))
    write_cfl(folder / "kspace", padded.numpy().transpose(1, 2, 0)[:, :, None])
    kernel = settings.kernel
    while True:
        limits = ["-k", str(kernel), "-r", str(settings.calibration)]
        try:
            _bart("ecalib", "-d0", "-m1", *limits, str(folder / "kspace"), str(folder / "maps"))
            break
        except BartError:  # the kernel is wider than this slice's centre lines; a narrow file has fewer of them
            if kernel <= 2:
                raise
            kernel -= 1
    # W:3:0 is a wavelet penalty over axes 0 and 1; -S undoes the scaling by which the strength does not depend on units
    penalty = ["-S", "-i", str(ITERATIONS), "-R", f"W:3:0:{settings.strength}"]
    _bart("pics", "-d0", *penalty, *(str(folder / name) for name in ("kspace", "maps", "image")))
    shape = padded.shape[-2:]
    image = torch.from_numpy(read_cfl(folder / "image").reshape(shape).copy())
    maps = torch.from_numpy(read_cfl(folder / "maps").reshape(*shape, -1).transpose(2, 0, 1).copy())
    # pics leaves a constant phase on its image for lengths that 8 does not divide. No magnitude shows it, but it must
    # go before measured lines can stand beside predicted ones.
    predicted = fourier.fft2c(coils.expand(image, maps))[..., odd:]
    product = torch.vdot(predicted[..., mask].flatten(), kspace[..., mask].flatten())
    predicted = predicted * (product / product.abs().clamp_min(torch.finfo(torch.float32).tiny))
    combined = fourier.ifft2c(fourier.fft2c(image)[..., odd:]).abs()
    return combined, fourier.rss(fourier.ifft2c(torch.where(mask, kspace, predicted * acquired)))


def reconstruct(batch: Batch, settings: Settings) -> Tensor:
    """BART's images of a batch.

    Returns
    -------
    Tensor, float32, shape (B, h, w) [file units]
        A slice without any signal stays zero.

    Raises
    ------
    BartError
        BART is missing, or refuses a slice, for instance one without centre lines.
    """
    return torch.stack([images[settings.output] for images in _each(batch, settings)])


def _each(batch: Batch, settings: Settings) -> list[dict[str, Tensor]]:
    """Both outputs of each slice, several at a time: more threads for one slice are hardly of use to BART."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda number: _both(batch, number, settings), range(len(batch.slices))))


def _both(batch: Batch, number: int, settings: Settings) -> dict[str, Tensor]:
    kspace, mask = batch.kspace[number].cpu(), batch.mask[number].cpu()
    if not kspace.abs().any():
        return dict.fromkeys(("combined", "rss"), torch.zeros(batch.image_shape))
    acquired = torch.ones_like(mask) if batch.acquired is None else batch.acquired[number].cpu()
    with tempfile.TemporaryDirectory(prefix="bart-") as temporary:
        combined, rss = reconstruct_slice(kspace, mask, acquired, settings, Path(temporary))
    scale = float(batch.scale[number])
    images = {"combined": combined, "rss": rss}
    return {name: fourier.center_crop_or_pad(image, batch.image_shape) * scale for name, image in images.items()}


def choose(batches: Iterable[Batch]) -> tuple[Settings, list[dict[str, Any]]]:
    """The settings of the best mean SSIM inside the head on validation slices of one acceleration.

    First every kernel with every calibration region at the default strength, then every strength with the best of
    them; each time both outputs are scored.

    Returns
    -------
    settings : Settings
    tried : list of dict
        Every setting with its "ssim_head" and "psnr_head" [dB], or "refused" with BART's reason.

    Raises
    ------
    BartError
        If BART is missing or refuses every setting.
    """
    if not version():
        raise BartError(MISSING)
    slices = list(batches)
    tried: list[dict[str, Any]] = []
    best = Settings()
    grid = [best._replace(kernel=kernel, calibration=region) for kernel in KERNELS for region in CALIBRATIONS]
    for _ in range(2):
        for settings in grid:
            if not any(_same(row, settings) for row in tried):
                tried += _tried(slices, settings)
        scored = [row for row in tried if "refused" not in row]
        if not scored:
            raise BartError(f"BART refuses every setting: {tried[-1]['refused']}")
        winner = max(scored, key=lambda row: row["ssim_head"])
        best = Settings(*(winner[name] for name in Settings._fields))
        grid = [best._replace(strength=strength) for strength in STRENGTHS]
    return best, tried


def tuned(
    volumes: Sequence[Volume], config: DataParameters, acceleration: int, slices: int
) -> tuple[Callable[[Batch], Tensor], dict[str, Any]]:
    """BART's reconstruction at one acceleration, with settings chosen on some validation slices; and the settings.

    BART gets all coils, so the slices are not compressed.
    """
    data = FastMRIDataset(volumes, config, acceleration=acceleration, max_slices=slices)
    settings, tried = choose(make_loader(data.uncompressed(), 4))
    facts = {"version": version(), "coils": "all", "chosen": settings._asdict(), "tried": tried}
    return functools.partial(reconstruct, settings=settings), facts


def _same(row: dict[str, Any], settings: Settings) -> bool:
    return all(row[name] == getattr(settings, name) for name in ("kernel", "calibration", "strength"))


def _tried(batches: Sequence[Batch], settings: Settings) -> list[dict[str, Any]]:
    scores: dict[str, list[dict[str, float]]] = {"combined": [], "rss": []}
    try:
        for batch in batches:
            assert batch.target is not None
            for target, images in zip(batch.target.cpu().numpy(), _each(batch, settings), strict=True):
                for output, image in images.items():
                    scores[output].append(score_volume(target[None], image.numpy()[None]))
    except BartError as error:
        return [{**settings._replace(output=output)._asdict(), "refused": str(error)} for output in ("combined", "rss")]
    return [
        {
            **settings._asdict(),
            "output": output,
            **{name: float(np.mean([score[name] for score in of])) for name in ("ssim_head", "psnr_head")},
        }
        for output, of in scores.items()
    ]
