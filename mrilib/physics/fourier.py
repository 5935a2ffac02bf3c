"""The physics: Fourier transforms, sampling masks, coils.

This is the only place that knows the axis convention. Every complex tensor is complex64 with axes
(..., coil, readout, phase); undersampling is along phase, the last axis. Real (..., 2) layouts exist only at
the door of a fastMRI function, inside this file and the encoder.
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
        k-space, always computed in float32, also under autocast.
    """
    return _centred(image, torch.fft.fft2)


def ifft2c(kspace: Tensor) -> Tensor:
    """Centred orthonormal inverse 2-D Fourier transform, equal to fastMRI's; the adjoint and inverse of `fft2c`."""
    return _centred(kspace, torch.fft.ifft2)


def _centred(x: Tensor, transform: Callable[..., Tensor]) -> Tensor:
    """A transform whose zero lies in the middle, at n // 2, before and after.

    Shifting an even length by its half in one domain is an alternating sign in the other, which costs a fraction of
    the four rolls that fastMRI makes of every coil image.
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
    The gradient of the square root is infinite at zero, where an all-zero pixel would make NaN; the smallest
    normal number under the root keeps it finite and changes no value.
    """
    power = torch.view_as_real(coil_images).float().square().sum(-1).sum(dim)
    return power.clamp_min(torch.finfo(torch.float32).tiny).sqrt()


def center_crop_or_pad(image: Tensor, size: Sequence[int]) -> Tensor:
    """Crop or zero-pad the last two axes about their centre, as fastMRI's `center_crop` does.

    A crop from n to m starts at (n - m)//2, and padding is its inverse, so that cropping what was padded gives it back.

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
    """Crop the readout axis to its reconstructed length, in image space; phase encoding is untouched.

    Parameters
    ----------
    kspace : Tensor, complex64, shape (..., H, W)
    readout : int
        Reconstructed readout length [pixels], at most H.

    Returns
    -------
    Tensor, complex64, shape (..., readout, W)
        In memory the readout is the fastest axis; so it is best for `kspace` too.

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
    # Transforms that start counting at 0, not at the centre: what that shifts in k-space is a phase in the image, which
    # is smaller, and is 1 if both lengths are even. Every roll of the lines would copy them all once more.
    pixels = torch.fft.ifftshift(torch.arange(readout) - readout // 2)  # from the centre, in the transform's own order
    sources = pixels + readout // 2 + (length - readout) // 2 - length // 2
    image = torch.fft.ifft(kspace.mT, norm="ortho").index_select(-1, (sources % length).to(kspace.device))
    if length % 2 or readout % 2:
        turns = pixels.double() * (readout // 2) / readout - sources.double() * (length // 2) / length
        image = image * torch.polar(torch.ones_like(turns), 2 * torch.pi * turns).to(image)
    return torch.fft.fft(image, norm="ortho").mT
