"""Files like those of fastMRI's archive: a second real head, and the shapes of its brain scans."""

from pathlib import Path

import changed_files
import h5py
import numpy as np

from mrilib.comparison.shifts import nibabel_head, write_head
from mrilib.phantom.scanner import SEQUENCES, simulate_volume, write_h5
from mrilib.physics import masks

__all__ = ["as_test_file", "nibabel_head", "write_head", "write_shape"]


def as_test_file(path: Path, acceleration: int = 4) -> None:
    """Mask a file with an equispaced mask, as in fastMRI's test set."""
    with h5py.File(path, "r+") as h5:
        width = h5["kspace"].shape[-1]
        mask_func = masks.make_mask_func("equispaced", [0.1], [acceleration])
        mask = masks.sample_mask(mask_func, width, 7, (0, width))[0].numpy()
        changed_files.as_test_file(mask, acceleration)(h5)


def write_shape(
    path: Path,
    coils: int,
    matrix: tuple[int, int],
    image_shape: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    header_width: int = 0,
) -> Path:
    """Write a file of three slices: anatomy, zeros, noise.

    Parameters
    ----------
    matrix : (H, W) of the k-space
    image_shape : (h, w) of the target
    header_width : int
        y of reconSpace if it differs from the target, as in fastMRI's FLAIR 203.
    """
    rng = np.random.default_rng(coils)
    head = np.zeros((matrix[0] // 2, matrix[1]), np.float32)
    anatomy = nibabel_head()[3]
    anatomy = np.kron(anatomy, np.ones((2, 2), np.float32))
    top, left = (head.shape[0] - 192) // 2, (head.shape[1] - 192) // 2
    head[top : top + 192, left : left + 192] = 1e-6 * anatomy
    image = simulate_volume(head[None], coils, rng, padding=padding)[0]
    noise = rng.standard_normal((2, *image.shape)).astype(np.float32)
    lines = np.zeros(matrix[1], np.float32)
    lines[padding[0] : matrix[1] - padding[1]] = 1
    data = np.stack([image, 0 * image, 1e-6 * (noise[0] + 1j * noise[1]) * lines])
    sequence = SEQUENCES["AXFLAIR"]
    write_h5(path, data, image_shape, "AXFLAIR", f"patient of {path.stem}", sequence=sequence, padding=padding)
    if header_width:
        old, new = f"<y>{image_shape[1]}</y>", f"<y>{header_width}</y>"
        with h5py.File(path, "r+") as h5:
            changed_files.header(old, new, after="<reconSpace>")(h5)
    return path
