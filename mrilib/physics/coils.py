"""Receive coils: sensitivity maps from the centre lines, combination, expansion and SVD compression."""

import torch
from torch import Tensor

from mrilib.physics.fourier import fft2c, ifft2c, rss
from mrilib.physics.masks import center_lines


def center_coil_maps(kspace: Tensor, mask: Tensor) -> Tensor:
    """Coil sensitivity maps straight from the centre lines: low-passed coil images over their RSS.

    The centre block is a square of k-space (as many readout points as centre lines, scaled to the matrix), tapered
    by a Hann window against ringing. No learned part, nothing but measured lines.

    Parameters
    ----------
    kspace : Tensor, complex64, shape (batch, coil, readout, phase)
        Masked k-space.
    mask : Tensor, bool, shape (batch, phase)

    Returns
    -------
    Tensor, complex64, shape (batch, coil, readout, phase)
        Maps whose RSS is 1 wherever there is any signal, 0 where there is none at all.
    """
    readout, phase = kspace.shape[-2:]
    blocks = [center_lines(row) for row in mask]
    halves = [max(1, round((stop - start) / 2 * readout / phase)) for start, stop in blocks]
    # A few lines and as few readout points: two small matrices transform them faster than a fast Fourier transform.
    rows = torch.arange(readout // 2 - max(halves), readout // 2 + max(halves))
    columns = torch.arange(min(start for start, _ in blocks), max(stop for _, stop in blocks))
    inside = (rows >= 0) & (rows < readout)
    rows = rows[inside]
    window = torch.stack(
        [
            _hann_block(readout, readout // 2 - half, readout // 2 + half)[rows, None]
            * _hann_block(phase, *block)[None, columns]
            for half, block in zip(halves, blocks, strict=True)
        ]
    )
    rows, columns, window = (one.to(kspace.device) for one in (rows, columns, window))
    block = kspace.index_select(-2, rows).index_select(-1, columns) * window[:, None]
    low_pass = _inverse_dft(readout, rows) @ block @ _inverse_dft(phase, columns).mT
    return low_pass / rss(low_pass).unsqueeze(-3)


def _inverse_dft(length: int, points: Tensor) -> Tensor:
    """Columns of the centred orthonormal inverse Fourier matrix that belong to some points of k-space."""
    places = torch.arange(length, device=points.device) - length // 2
    # whole turns are taken off before anything is rounded
    turns = (places[:, None] * (points - length // 2)).remainder(length).double() / length
    return torch.polar(torch.full_like(turns, length**-0.5), 2 * torch.pi * turns).to(torch.complex64)


def _hann_block(length: int, start: int, stop: int) -> Tensor:
    """Hann window over [start, stop), zero elsewhere; shape (length,), never zero inside the block."""
    window = torch.zeros(length)
    start, stop = max(0, start), min(length, stop)
    window[start:stop] = torch.hann_window(stop - start + 2, periodic=False)[1:-1]
    return window


def combine(coil_images: Tensor, maps: Tensor) -> Tensor:
    """Coil-combined image sum_c conj(S_c) x_c, the adjoint of `expand`; (..., coil, H, W) -> (..., H, W)."""
    return (maps.conj() * coil_images).sum(-3)


def expand(image: Tensor, maps: Tensor) -> Tensor:
    """Coil images S_c x of a combined image; (..., H, W) -> (..., coil, H, W)."""
    return maps * image.unsqueeze(-3)


def compress_coils(kspace: Tensor, num_coils: int) -> Tensor:
    """SVD coil compression, computed from the given (masked) data alone; coils are never dropped.

    Parameters
    ----------
    kspace : Tensor, complex64, shape (coil, readout, phase)
        Masked k-space of one slice.
    num_coils : int
        Number of virtual coils; with fewer coils than that the data is returned as it is.

    Returns
    -------
    Tensor, complex64, shape (min(coil, num_coils), readout, phase)
        The projections onto the strongest left singular vectors of the (coil, samples) matrix: a unitary map, so
        that the RSS loses only what lies in the discarded directions.

    Notes
    -----
    Buehrer et al., Magn Reson Med 57:1131 (2007). The vectors come from the coil covariance, a small Hermitian
    matrix; their phase is fixed (largest entry real and positive) so that the result does not depend on LAPACK.
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
    """Take a low-pass phase off an image, its own or that of another, so that anatomy is (nearly) real and positive.

    The phase of an MR image is mostly coils, field and timing; its value at a pixel says nothing of the tissue. This is
    homodyne detection's reference phase (Noll et al., IEEE TMI 10:154, 1991).

    Parameters
    ----------
    image : Tensor, complex64, shape (..., H, W)
    like : Tensor, complex64, shape (..., H, W), optional
        Image whose low-pass phase is taken; `image` itself if left out. No gradient goes through the phase: where there
        is no signal, a small change turns it by any angle.
    width : int
        Width of the Hann-tapered centre block of k-space that holds the reference phase [lines].

    Returns
    -------
    Tensor, complex64, same shape; its magnitude is the image's
    """
    return image * background_phase(image if like is None else like, width).conj()


def background_phase(image: Tensor, width: int = 16) -> Tensor:
    """An image's low-pass phase, as `remove_background_phase` takes it off: complex64, magnitude 1, or 0 for no signal.

    Parameters
    ----------
    image : Tensor, complex64, shape (..., H, W)
        No gradient goes to it.
    width : int
        Width of the Hann-tapered centre block of k-space that holds the phase [lines].
    """
    windows = [_hann_block(n, n // 2 - min(width, n) // 2, n // 2 + min(width, n) // 2 + 1) for n in image.shape[-2:]]
    window = (windows[0][:, None] * windows[1][None, :]).to(image.device)
    reference = ifft2c(fft2c(image.detach()) * window)
    magnitude = torch.view_as_real(reference).square().sum(-1)
    return reference * magnitude.clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
