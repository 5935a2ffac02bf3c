"""Receive coils: sensitivity maps from the centre lines, combination, expansion, SVD compression, background phase."""

import torch
from torch import Tensor

from mrilib.physics.fourier import fft2c, ifft2c, rss
from mrilib.physics.masks import center_lines


def center_coil_maps(kspace: Tensor, mask: Tensor) -> Tensor:
    """Coil sensitivity maps from the centre lines: low-pass coil images divided by their RSS.

    The low-pass filter is a Hann window over the centre lines and, scaled to the matrix, as many readout points.

    Parameters
    ----------
    kspace : Tensor, complex64, shape (batch, coil, readout, phase)
        Masked k-space.
    mask : Tensor, bool, shape (batch, phase)

    Returns
    -------
    Tensor, complex64, shape (batch, coil, readout, phase)
        The RSS of the maps is 1, or 0 where there is no signal.
    """
    readout, phase = kspace.shape[-2:]
    start, stop = center_lines(mask)
    half = ((stop - start).double() / 2 * readout / phase).round().clamp_min(1).long()
    rows = _hann_blocks(readout, readout // 2 - half, readout // 2 + half)
    window = rows[:, :, None] * _hann_blocks(phase, start, stop)[:, None]
    low_pass = ifft2c(kspace * window[:, None])
    return low_pass / rss(low_pass).unsqueeze(-3)


def _hann_blocks(length: int, start: Tensor, stop: Tensor) -> Tensor:
    """Hann window of each slice over [start, stop), non-zero there and zero elsewhere; shape (batch, length)."""
    start, stop = start.clamp_min(0)[:, None], stop.clamp_max(length)[:, None]
    points = torch.arange(length, device=start.device)
    window = torch.sin(torch.pi * (points - start + 1) / (stop - start + 1)).square()
    return torch.where((points >= start) & (points < stop), window, 0)


def _hann_block(length: int, start: int, stop: int, device: torch.device | None = None) -> Tensor:
    """Hann window over [start, stop), non-zero there and zero elsewhere; shape (length,)."""
    window = torch.zeros(length, device=device)
    start, stop = max(0, start), min(length, stop)
    window[start:stop] = torch.hann_window(stop - start + 2, periodic=False, device=device)[1:-1]
    return window


def combine(coil_images: Tensor, maps: Tensor) -> Tensor:
    """Coil-combined image sum_c conj(S_c) x_c: adjoint of `expand`; (..., coil, H, W) -> (..., H, W)."""
    return (maps.conj() * coil_images).sum(-3)


def expand(image: Tensor, maps: Tensor) -> Tensor:
    """Coil images S_c x of a combined image; (..., H, W) -> (..., coil, H, W)."""
    return maps * image.unsqueeze(-3)


def compress_coils(kspace: Tensor, num_coils: int) -> Tensor:
    """SVD coil compression, computed from the masked data.

    Parameters
    ----------
    kspace : Tensor, complex64, shape (coil, readout, phase)
        Masked k-space of one slice.
    num_coils : int
        Number of virtual coils. Data with at most this many coils is returned unchanged.

    Returns
    -------
    Tensor, complex64, shape (min(coil, num_coils), readout, phase)
        Projections onto the leading left singular vectors of the (coil, samples) matrix.

    Notes
    -----
    Buehrer et al., Magn Reson Med 57:1131 (2007). The vectors are eigenvectors of the coil covariance. Their largest
    entry is made real and positive, so that the result does not depend on LAPACK.
    """
    coils = kspace.shape[0]
    if coils <= num_coils:
        return kspace
    samples = kspace.reshape(coils, -1).to(torch.complex128)
    _, vectors = torch.linalg.eigh(samples @ samples.mH)
    vectors = vectors.flip(-1)[:, :num_coils]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * (largest.abs() / largest)
    return (vectors.mH @ samples).to(torch.complex64).reshape(num_coils, *kspace.shape[1:])


def remove_background_phase(image: Tensor, like: Tensor | None = None, width: int = 16) -> Tensor:
    """Phase-corrected image: the low-pass phase is removed, which leaves anatomy nearly real and positive.

    The low-pass phase comes mostly from coils, field and timing. It is the reference phase of homodyne detection (Noll
    et al., IEEE TMI 10:154, 1991).

    Parameters
    ----------
    image : Tensor, complex64, shape (..., H, W)
    like : Tensor, complex64, shape (..., H, W), optional
        Image that gives the phase, by default `image`. The phase passes no gradient, since it is unstable where there
        is no signal.
    width : int
        Width of the Hann window at the centre of k-space [lines].

    Returns
    -------
    Tensor, complex64, same shape and magnitude as `image`; 0 where there is no reference signal
    """
    halves = [min(width, length) // 2 for length in image.shape[-2:]]
    rows, columns = (
        _hann_block(length, length // 2 - half, length // 2 + half + 1, image.device)
        for length, half in zip(image.shape[-2:], halves, strict=True)
    )
    window = rows[:, None] * columns
    reference = ifft2c(fft2c((image if like is None else like).detach()) * window)
    magnitude = torch.view_as_real(reference).square().sum(-1)
    phase = reference * magnitude.clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
    return image * phase.conj()
