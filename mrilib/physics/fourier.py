"""Centred Fourier transforms, root sum of squares, and crops.

Complex tensors are complex64 with axes (..., coil, readout, phase). Undersampling is along phase, the last axis.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def fft2c(image: Tensor) -> Tensor:
    """Centred orthonormal 2-D Fourier transform, equal to fastMRI's.

    Parameters
    ----------
    image : Tensor, complex64, shape (..., readout, phase)

    Returns
    -------
    Tensor, complex64, same shape
        k-space, computed in float32 also under autocast.
    """
    return _centred(image, torch.fft.fft2)


def ifft2c(kspace: Tensor) -> Tensor:
    """Centred orthonormal inverse 2-D Fourier transform: adjoint and inverse of `fft2c`."""
    return _centred(kspace, torch.fft.ifft2)


def _centred(x: Tensor, transform: Callable[..., Tensor]) -> Tensor:
    """Transform with the zero index at n // 2 in both domains.

    For even lengths, alternating signs replace the shifts: a shift by n / 2 in one domain is a factor (-1)^k in the
    other. This saves most of the time of fastMRI's four rolls.
    """
    height, width = x.shape[-2:]
    if height % 2 or width % 2:
        shifted = transform(torch.fft.ifftshift(x, dim=(-2, -1)), norm="ortho")
        return torch.fft.fftshift(shifted, dim=(-2, -1))
    rows, columns = (torch.arange(length, device=x.device) for length in (height, width))
    signs = (1 - 2 * ((rows[:, None] + columns) % 2)).to(x.real.dtype)
    return transform(x * signs, norm="ortho") * (signs if (height + width) % 4 == 0 else -signs)


def rss(coil_images: Tensor, dim: int = -3) -> Tensor:
    """Root sum of squares over the coils.

    Parameters
    ----------
    coil_images : Tensor, complex64, shape (..., coil, readout, phase)

    Returns
    -------
    Tensor, float32, shape (..., readout, phase)

    Notes
    -----
    The gradient of the square root is infinite at 0. The smallest normal number under the root keeps it finite.
    """
    power = torch.view_as_real(coil_images).float().square().sum(-1).sum(dim)
    return power.clamp_min(torch.finfo(torch.float32).tiny).sqrt()


def center_crop_or_pad(image: Tensor, size: Sequence[int]) -> Tensor:
    """Crop or zero-pad the last two axes about their centre. Crops equal fastMRI's `center_crop`.

    A crop from n to m starts at (n - m) // 2. Cropping a padded image restores the image.

    Parameters
    ----------
    image : Tensor, shape (..., H, W)
    size : (h, w) [pixels]

    Returns
    -------
    Tensor, shape (..., h, w)
    """
    for axis, new in zip((-2, -1), size, strict=True):
        old = image.shape[axis]
        if new < old:
            image = image.narrow(axis, (old - new) // 2, new)
        elif new > old:
            before = (new - old) // 2
            pads = (before, new - old - before)
            image = torch.nn.functional.pad(image, (0, 0, *pads) if axis == -2 else pads)
    return image


def remove_readout_oversampling(kspace: Tensor, readout: int) -> Tensor:
    """Crop the readout axis to `readout` pixels in image space; phase encoding is unchanged.

    Parameters
    ----------
    kspace : Tensor, complex64, shape (..., H, W)
        Fastest with the readout as the contiguous axis in memory.
    readout : int
        Readout length of the image [pixels], at most H.

    Returns
    -------
    Tensor, complex64, shape (..., readout, W)
        The input itself if its length is `readout` already; otherwise with the readout contiguous.

    Raises
    ------
    ValueError
        If readout is larger than H.
    """
    length = kspace.shape[-2]
    if readout > length:
        raise ValueError(f"readout must be at most the {length} points of k-space, got {readout}")
    if readout == length:
        return kspace
    # Uncentred FFTs save one copy of all lines per shift. The omitted shifts of k-space equal a linear phase in the
    # cropped image. The phase is 1 if both lengths are even.
    pixels = torch.fft.ifftshift(torch.arange(readout) - readout // 2)
    sources = pixels + readout // 2 + (length - readout) // 2 - length // 2
    image = torch.fft.ifft(kspace.mT, norm="ortho").index_select(-1, (sources % length).to(kspace.device))
    if length % 2 or readout % 2:
        turns = pixels.double() * (readout // 2) / readout - sources.double() * (length // 2) / length
        image = image * torch.polar(torch.ones_like(turns), 2 * torch.pi * turns).to(image)
    return torch.fft.fft(image, norm="ortho").mT
