"""Away from home: test files as another scanner, or the same on a bad day, would have written them.

Each function writes fastMRI-format copies of volumes, so that every method reads them as it reads any file. Another
acceleration or mask type needs no copy: it is a parameter.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import h5py
import nibabel
import numpy as np
import torch
from numpy.typing import NDArray

from mrilib.data import Volume, read_volume
from mrilib.kspace import center_crop_or_pad, ifft2c, rss
from mrilib.scanner import SEQUENCES, simulate_volume, write_h5

EDGE = 0.08  # share of the readout's field of view, at each end, that holds nothing but noise


def noise_level(kspace: NDArray[np.complexfloating], padding: tuple[int, int]) -> float:
    """Standard deviation of the complex white noise in fully sampled k-space, in its real as in its imaginary part.

    Parameters
    ----------
    kspace : array, complex, shape (slices, coils, readout, phase)
        With readout oversampling: at the ends of a twofold field of view there is no head, only noise. A fifth of the
        lines, at the edges of k-space, is looked at: there even a head that reaches so far has little signal.
    padding : (left, right)
        Lines outside [left, right) were not acquired.

    Returns
    -------
    float [unit of the k-space]
        From the median of the magnitude, which is σ·√(2 ln 2) for a Rayleigh distribution.
    """
    left, right = padding
    lines = max(1, (right - left) // 10)
    outer = np.concatenate([kspace[..., left : left + lines], kspace[..., right - lines : right]], axis=-1)
    along = np.fft.fftshift(np.fft.ifft(np.fft.ifftshift(outer, axes=-2), axis=-2, norm="ortho"), axes=-2)
    edge = max(1, round(EDGE * kspace.shape[-2]))
    noise = np.concatenate([along[..., :edge, :], along[..., -edge:, :]], axis=-2)
    return float(np.median(np.abs(noise)) / np.sqrt(2 * np.log(2)))


def more_noise(volume: Volume, directory: Path, factor: float, seed: int = 0) -> Volume:
    """A copy of a file with `factor` times its own noise; its target stays that of the original.

    White noise of variance (factor² − 1)σ² is added to every acquired sample, with σ estimated by `noise_level`.

    Raises
    ------
    ValueError
        If `factor` is below 1.
    """
    if factor < 1:
        raise ValueError(f"noise factor {factor}: noise cannot be taken off; at least 1 is wanted")
    with h5py.File(volume.path, "r") as source:
        kspace, target = source["kspace"][()], source["reconstruction_rss"][()]
    left, right = volume.padding
    sigma = noise_level(kspace, volume.padding) * np.sqrt(factor**2 - 1)
    rng = np.random.default_rng([seed, *volume.file.encode()])
    noise = rng.standard_normal((2, *kspace.shape), dtype=np.float32)
    noise[..., :left], noise[..., right:] = 0, 0
    return _copy(volume, directory, kspace + np.float32(sigma) * (noise[0] + 1j * noise[1]), target)


def fewer_coils(volume: Volume, directory: Path, coils: int) -> Volume:
    """A copy of a file as a scanner with `coils` of its coils would have written it, target included.

    The coils are spread evenly over the array; a file that has no more than so many is copied as it is.
    """
    with h5py.File(volume.path, "r") as source:
        kspace = source["kspace"][()]
    kept = np.linspace(0, kspace.shape[1], min(coils, kspace.shape[1]), endpoint=False).astype(int)
    kspace = kspace[:, kept]
    images = torch.stack([rss(ifft2c(torch.from_numpy(one))) for one in kspace])
    return _copy(volume, directory, kspace, center_crop_or_pad(images, volume.recon).numpy())


def _copy(volume: Volume, directory: Path, kspace: NDArray[np.complexfloating], target: NDArray[np.floating]) -> Volume:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / volume.path.name
    temporary = path.with_name(path.name + ".part")
    with h5py.File(volume.path, "r") as source, h5py.File(temporary, "w") as copy:
        copy["kspace"] = kspace.astype(np.complex64)
        copy["reconstruction_rss"] = target.astype(np.float32)
        copy["ismrmrd_header"] = source["ismrmrd_header"][()]
        for name, value in source.attrs.items():
            copy.attrs[name] = value
        copy.attrs["max"] = float(target.max())
        copy.attrs["norm"] = float(np.linalg.norm(target.astype(np.float64)))
    os.replace(temporary, path)
    return read_volume(path)


def nibabel_head() -> NDArray[np.float32]:
    """The EPI head of nibabel's own tests, (8, 96, 96): a real one, rows from posterior to anterior, as fastMRI's."""
    image = nibabel.load(Path(nibabel.__file__).parent / "tests" / "data" / "example4d.nii.gz")
    assert isinstance(image, nibabel.Nifti1Image) and nibabel.aff2axcodes(image.affine) == ("L", "A", "S")
    volume = np.asarray(image.dataobj)[16:-16, :, 6:22:2, 0].astype(np.float32)
    return volume.transpose(2, 1, 0)


def write_head(path: Path, coils: int = 6) -> Path:
    """Write that head as a fully sampled fastMRI volume with target, 192×96, lines at the edges not acquired."""
    data = simulate_volume(1e-6 * nibabel_head(), coils, np.random.default_rng(0), voxel_size=(2, 2), padding=(5, 3))
    write_h5(
        path, data, (96, 96), "AXT2", "a second head", sequence=SEQUENCES["AXT2"], voxel_size=(2, 2), padding=(5, 3)
    )
    return path


def copies(volumes: Sequence[Volume], directory: Path, shift: str, seed: int = 0) -> list[Volume]:
    """Shifted copies of volumes below a folder; those that are there are not written again.

    Parameters
    ----------
    volumes : sequence of Volume
    directory : Path
    shift : str
        "noise 2" doubles the noise, "coils 4" keeps four coils.
    seed : int
        Of the noise.

    Raises
    ------
    ValueError
        An unknown shift.
    """
    kind, _, number = shift.partition(" ")
    if kind not in ("noise", "coils") or not number.replace(".", "", 1).isdigit():
        raise ValueError(f"shift '{shift}' is not known; 'noise FACTOR' and 'coils NUMBER' are")
    folder = directory / shift.replace(" ", "_")
    made = []
    for volume in volumes:
        path = folder / volume.path.name
        if path.exists():
            made.append(read_volume(path))
        elif kind == "noise":
            made.append(more_noise(volume, folder, float(number), seed))
        else:
            made.append(fewer_coils(volume, folder, int(number)))
    return made
