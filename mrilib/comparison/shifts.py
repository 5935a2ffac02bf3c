"""Distribution shifts of the test files: more noise, fewer coils, another head, other phantom patients.

Each function writes volumes in fastMRI format, so that every method can read them. The parameter `shift` of notebook 04
selects one; acceleration, mask type and folder have their own parameters.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import torch
from numpy.typing import NDArray

from mrilib.config import EvaluateParameters, ParameterError, resolve
from mrilib.data.fastmri_file import Volume, read_volume
from mrilib.data.splits import index_volumes
from mrilib.files import atomic_write, read_json
from mrilib.phantom import dataset
from mrilib.phantom.scanner import SEQUENCES, simulate_volume, write_h5
from mrilib.physics.fourier import center_crop_or_pad, ifft2c, rss

EDGE = 0.08  # share of the readout's field of view, at each end, that contains only noise


def noise_level(kspace: NDArray[np.complexfloating], padding: tuple[int, int]) -> float:
    """Estimate the standard deviation of white noise in fully sampled k-space, per real and imaginary part.

    The estimate uses the ends of the oversampled readout, where there is no head, and only the outer fifth of the
    phase-encoding lines, where a head that reaches so far has little signal.

    Parameters
    ----------
    kspace : array, complex, shape (slices, coils, readout, phase)
        With readout oversampling.
    padding : (left, right)
        Lines outside [left, right) were not acquired.

    Returns
    -------
    float [unit of the k-space]
        σ, from the median of the magnitude, which is σ·√(2 ln 2) for a Rayleigh distribution.
    """
    left, right = padding
    lines = max(1, (right - left) // 10)
    outer = np.concatenate([kspace[..., left : left + lines], kspace[..., right - lines : right]], axis=-1)
    along = np.fft.fftshift(np.fft.ifft(np.fft.ifftshift(outer, axes=-2), axis=-2, norm="ortho"), axes=-2)
    edge = max(1, round(EDGE * kspace.shape[-2]))
    noise = np.concatenate([along[..., :edge, :], along[..., -edge:, :]], axis=-2)
    return float(np.median(np.abs(noise)) / np.sqrt(2 * np.log(2)))


def more_noise(volume: Volume, directory: Path, factor: float, seed: int = 0) -> Volume:
    """Write a copy of a file with `factor` times its noise and the original target.

    White noise of variance (factor² − 1)σ² is added to every acquired sample, with σ from `noise_level`.

    Raises
    ------
    ValueError
        If `factor` is below 1.
    """
    if factor < 1:
        raise ValueError(f"noise factor {factor}: noise cannot be removed; give at least 1")
    with h5py.File(volume.path, "r") as source:
        kspace, target = source["kspace"][()], source["reconstruction_rss"][()]
    left, right = volume.padding
    sigma = noise_level(kspace, volume.padding) * np.sqrt(factor**2 - 1)
    rng = np.random.default_rng([seed, *volume.file.encode()])
    noise = rng.standard_normal((2, *kspace.shape), dtype=np.float32)
    noise[..., :left], noise[..., right:] = 0, 0
    return _copy(volume, directory, kspace + np.float32(sigma) * (noise[0] + 1j * noise[1]), target)


def fewer_coils(volume: Volume, directory: Path, coils: int) -> Volume:
    """Write a copy of a file with only `coils` of its coils, evenly spread over the array, and their target.

    A file with no more coils than that keeps all.
    """
    with h5py.File(volume.path, "r") as source:
        kspace = source["kspace"][()]
    indices = np.linspace(0, kspace.shape[1], min(coils, kspace.shape[1]), endpoint=False).astype(int)
    kspace = kspace[:, indices]
    images = torch.stack([rss(ifft2c(torch.from_numpy(coil_data))) for coil_data in kspace])
    return _copy(volume, directory, kspace, center_crop_or_pad(images, volume.image_shape).numpy())


def _copy(volume: Volume, directory: Path, kspace: NDArray[np.complexfloating], target: NDArray[np.floating]) -> Volume:
    path = directory / volume.path.name
    with h5py.File(volume.path, "r") as source, atomic_write(path) as temporary, h5py.File(temporary, "w") as copy:
        copy["kspace"] = kspace.astype(np.complex64)
        copy["reconstruction_rss"] = target.astype(np.float32)
        copy["ismrmrd_header"] = source["ismrmrd_header"][()]
        for name, value in source.attrs.items():
            copy.attrs[name] = value
        copy.attrs["max"] = float(target.max())
        copy.attrs["norm"] = float(np.linalg.norm(target.astype(np.float64)))
    return read_volume(path)


def nibabel_head() -> NDArray[np.float32]:
    """Load the real EPI head of nibabel's tests, (8, 96, 96); rows from posterior to anterior, as in fastMRI."""
    image = nibabel.load(Path(nibabel.__file__).parent / "tests" / "data" / "example4d.nii.gz")
    assert isinstance(image, nibabel.Nifti1Image) and nibabel.aff2axcodes(image.affine) == ("L", "A", "S")
    volume = np.asarray(image.dataobj)[16:-16, :, 6:22:2, 0].astype(np.float32)
    return volume.transpose(2, 1, 0)


def write_head(path: Path, coils: int = 6) -> Path:
    """Write `nibabel_head` as a fully sampled fastMRI volume, 192×96, with target and unacquired lines at the edges."""
    geometry: Any = {"voxel_size": (2, 2), "padding": (5, 3)}
    data = simulate_volume(1e-6 * nibabel_head(), coils, np.random.default_rng(0), **geometry)
    write_h5(path, data, (96, 96), "AXT2", "a second head", sequence=SEQUENCES["AXT2"], **geometry)
    return path


def shifted(config: EvaluateParameters, volumes: Sequence[Volume], directory: Path) -> list[Volume]:
    """Apply the shift of the parameters to the test volumes; existing files are not written again.

    Parameters
    ----------
    config : EvaluateParameters
        `shift`: "noise 2" doubles the noise, "coils 4" keeps four coils, "head nibabel" is another real head,
        "patients 2" is the same number of phantom volumes with seed 2, and "" is no shift.
    volumes : sequence of Volume
        The test volumes.
    directory : Path
        Receives a folder of files.

    Raises
    ------
    ParameterError
        If the shift is unknown, or "patients" needs a phantom of another seed in `data_dir`.
    """
    if not config.shift:
        return list(volumes)
    kind, _, value = config.shift.partition(" ")
    folder = directory / config.shift.replace(" ", "_")
    if kind == "patients" and value.isdigit():
        return _other_patients(config, len(volumes), int(value), folder)
    if config.shift == "head nibabel":
        path = folder / "head.h5"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_head(path, config.num_coils)
        return [read_volume(path)]
    if kind == "noise" and _is_number(value) and float(value) >= 1:
        copy: Callable[..., Volume] = functools.partial(more_noise, factor=float(value), seed=config.seed)
    elif kind == "coils" and value.isdigit() and int(value):
        copy = functools.partial(fewer_coils, coils=int(value))
    else:
        raise ParameterError(
            f"shift: '{config.shift}' is not known; there are 'noise FACTOR' (at least 1), 'coils NUMBER', "
            "'head nibabel' and 'patients SEED'"
        )
    paths = [folder / volume.path.name for volume in volumes]
    pairs = zip(paths, volumes, strict=True)
    return [read_volume(path) if path.exists() else copy(volume, folder) for path, volume in pairs]


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _other_patients(config: EvaluateParameters, count: int, seed: int, folder: Path) -> list[Volume]:
    """Make `count` volumes like the phantom in `data_dir`, from another seed."""
    path = resolve(config.data_dir) / dataset.PARAMETERS_FILE
    if not path.exists():
        raise ParameterError(f"shift: patients {seed}: '{config.data_dir}' is no phantom; this shift needs one")
    phantom = read_json(path)
    if phantom["seed"] == seed:
        raise ParameterError(f"shift: patients {seed}: '{config.data_dir}' holds these patients; choose another seed")
    if not (folder / "brain_file_list.csv").exists():  # written last
        size = {name: phantom[name] for name in ("slices", "img_size", "coils")}
        dataset.make_dataset(folder, volumes=count, seed=seed, **size, progress=False)
    return index_volumes(folder)
