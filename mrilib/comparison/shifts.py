"""Shifts: test files as another scanner, or the same scanner with more noise, would have written them (`shift` of 04).

Each function writes fastMRI-format copies of volumes, so that every method reads them as it reads any file. Another
acceleration, mask type or folder is a parameter of 04 and needs no copy.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import nibabel
import numpy as np
import torch
from numpy.typing import NDArray

from mrilib.config import EvaluateParameters, ParameterError, resolve
from mrilib.data.fastmri_file import Volume, read_volume
from mrilib.data.splits import index_volumes
from mrilib.files import read_json
from mrilib.phantom import dataset
from mrilib.phantom.scanner import SEQUENCES, simulate_volume, write_h5
from mrilib.physics.fourier import center_crop_or_pad, ifft2c, rss

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
    return _copy(volume, directory, kspace, center_crop_or_pad(images, volume.image_shape).numpy())


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


def shifted(config: EvaluateParameters, volumes: Sequence[Volume], directory: Path) -> list[Volume]:
    """The test volumes under the shift that the parameters name; files that are there are not written again.

    Parameters
    ----------
    config : EvaluateParameters
        `shift`: "noise 2" doubles the noise, "coils 4" keeps four coils, "head nibabel" is another real head, and
        "patients 2" are as many phantom patients made with seed 2.
    volumes : sequence of Volume
        The test volumes; they are returned as they are without a shift.
    directory : Path
        Receives a folder of files.

    Raises
    ------
    ParameterError
        An unknown shift; "patients" where `data_dir` is not a phantom, or is one of that seed.
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
        copy: Callable[[Volume], Volume] = lambda one: more_noise(one, folder, float(value), config.seed)  # noqa: E731
    elif kind == "coils" and value.isdigit() and int(value):
        copy = lambda one: fewer_coils(one, folder, int(value))  # noqa: E731
    else:
        raise ParameterError(
            f"shift: '{config.shift}' is not known; there are 'noise FACTOR' (at least 1), 'coils NUMBER', "
            "'head nibabel' and 'patients SEED'"
        )
    paths = [folder / volume.path.name for volume in volumes]
    return [read_volume(path) if path.exists() else copy(volume) for path, volume in zip(paths, volumes, strict=True)]


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _other_patients(config: EvaluateParameters, count: int, seed: int, folder: Path) -> list[Volume]:
    """As many volumes made as the phantom in `data_dir`, from another seed."""
    known = resolve(config.data_dir) / dataset.PARAMETERS_FILE
    if not known.exists():
        raise ParameterError(f"shift: patients {seed}: '{config.data_dir}' is no phantom to make others like")
    made = read_json(known)
    if made["seed"] == seed:
        raise ParameterError(f"shift: patients {seed}: '{config.data_dir}' holds these patients; choose another seed")
    if not (folder / "brain_file_list.csv").exists():  # written last
        size = {name: made[name] for name in ("slices", "img_size", "coils")}
        dataset.make_dataset(folder, volumes=count, seed=seed, **size, progress=False)
    return index_volumes(folder)
