"""Files as the archive has them: a second real head, and the shapes of fastMRI's brains."""

from pathlib import Path

import h5py
import numpy as np

from mrilib.comparison.shifts import nibabel_head, write_head
from mrilib.phantom.scanner import SEQUENCES, simulate_volume, write_h5
from mrilib.physics import masks

__all__ = ["as_test_file", "nibabel_head", "write_head", "write_shape"]


def as_test_file(path: Path, acceleration: int = 4) -> None:
    """Turn a volume into what fastMRI's test set has: masked, with its mask, without a target, max and norm."""
    with h5py.File(path, "r+") as h5:
        width = h5["kspace"].shape[-1]
        func = masks.make_mask_func("equispaced", [0.1], [acceleration])
        mask = masks.sample_mask(func, width, 7, (0, width))[0].numpy()
        h5["kspace"][...] = np.where(mask, h5["kspace"][()], 0)
        h5["mask"] = mask
        for name in ("max", "norm"):
            del h5.attrs[name]
        del h5["reconstruction_rss"]
        h5.attrs["acceleration"] = acceleration
        h5.attrs["num_low_frequency"] = round(0.1 * width)


def write_shape(
    path: Path,
    coils: int,
    matrix: tuple[int, int],
    image_shape: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    header_width: int = 0,
) -> Path:
    """Three slices of one shape: anatomy, nothing at all, noise alone.

    Parameters
    ----------
    matrix : (H, W) of the k-space
    image_shape : (h, w) of the target
    header_width : int
        reconSpace's y where it is not the target's: fastMRI's FLAIR 203 asks for more columns than there are.
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
    write_h5(
        path, data, image_shape, "AXFLAIR", f"patient of {path.stem}", sequence=SEQUENCES["AXFLAIR"], padding=padding
    )
    if header_width:
        with h5py.File(path, "r+") as h5:
            xml = h5["ismrmrd_header"][()].decode()
            start = xml.index("<reconSpace>")
            del h5["ismrmrd_header"]
            h5["ismrmrd_header"] = (
                xml[:start] + xml[start:].replace(f"<y>{image_shape[1]}</y>", f"<y>{header_width}</y>", 1)
            ).encode()
    return path
