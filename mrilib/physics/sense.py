"""Data consistency, and regularised SENSE by conjugate gradients."""

from typing import Any

import torch
from torch import Tensor

from mrilib.physics.coils import combine, expand
from mrilib.physics.fourier import ifft2c


def data_consistency(
    image: Tensor,
    maps: Tensor,
    kspace: Tensor,
    mask: Tensor,
    acquired: Tensor | None = None,
    measured: Tensor | None = None,
) -> Tensor:
    """Coil images with the measured lines, and with the lines of `image` where nothing was measured.

    ifft(where(mask, measured k-space, F(S x))). Lines that were never acquired stay zero, as in the target.

    Parameters
    ----------
    image : Tensor, complex64, shape (batch, readout, phase)
    maps, kspace : Tensor, complex64, shape (batch, coil, readout, phase)
    mask : Tensor, bool, shape (batch, phase)
    acquired : Tensor, bool, shape (batch, phase), optional
        False on the padding of the header; by default all True.
    measured : Tensor, complex64, shape (batch, coil, readout, phase), optional
        Coil images of the measured lines alone, if already computed.

    Returns
    -------
    Tensor, complex64, shape (batch, coil, readout, phase)
    """
    missing = ~mask if acquired is None else ~mask & acquired
    if measured is None:
        measured = ifft2c(torch.where(mask[:, None, None], kspace, 0))
    # A line is measured completely or not at all, so a 1-D transform along phase suffices; the mask is shifted instead.
    lines = torch.fft.ifftshift(missing, dim=-1)[:, None, None]
    return measured + torch.fft.ifft(torch.fft.fft(expand(image, maps)) * lines)


def sense(
    kspace: Tensor,
    mask: Tensor,
    maps: Tensor,
    weight: float = 0.01,
    iterations: int = 8,
    prior: Tensor | None = None,
    zero_filled: Tensor | None = None,
) -> Tensor:
    """Regularised SENSE reconstruction, argmin_x ‖M F S x − y‖² + weight ‖x − prior‖².

    Conjugate gradients start from `prior` (Pruessmann et al., Magn Reson Med 46:638, 2001). Few iterations also
    regularise.

    Parameters
    ----------
    kspace, maps : Tensor, complex64, shape (batch, coil, readout, phase)
        Masked k-space, and maps with an RSS of at most 1.
    mask : Tensor, bool, shape (batch, phase)
    weight : float
        Relative to the eigenvalues of a fully sampled problem, which are 1.
    iterations : int
    prior : Tensor, complex64, shape (batch, readout, phase), optional
        By default zero. Only the prior receives a gradient: that of the exact minimiser, approximated by as many
        iterations (Aggarwal et al., IEEE TMI 38:394, 2019).
    zero_filled : Tensor, complex64, shape (batch, readout, phase), optional
        Coil-combined zero-filled image, if already computed.

    Returns
    -------
    Tensor, complex64, shape (batch, readout, phase)
    """
    right = combine(ifft2c(kspace), maps) if zero_filled is None else zero_filled
    lines = torch.fft.ifftshift(mask, dim=-1)[:, None, None].to(maps.dtype)
    if prior is None:
        return _conjugate_gradients(right, torch.zeros_like(right), lines, maps, weight, iterations)
    return _SenseFromPrior.apply(prior, right, lines, maps, weight, iterations)


@torch.no_grad()
def _conjugate_gradients(
    right: Tensor, image: Tensor, lines: Tensor, maps: Tensor, weight: float, iterations: int
) -> Tensor:
    """Iterate towards (Sᴴ Fᴴ M F S + weight) x = right from `image`; in place, since memory traffic dominates."""
    conjugate = maps.conj().resolve_conj()
    coils, spectrum = torch.empty_like(maps), torch.empty_like(maps)
    tiny = torch.finfo(torch.float32).tiny

    def normal(image: Tensor) -> Tensor:
        torch.mul(maps, image[:, None], out=coils)
        torch.fft.fft(coils, out=spectrum)
        torch.fft.ifft(spectrum.mul_(lines), out=coils)
        sums = weight * image
        for coil in range(maps.shape[1]):
            sums.addcmul_(conjugate[:, coil], coils[:, coil])
        return sums

    def energy(left: Tensor, right: Tensor) -> Tensor:
        return (torch.view_as_real(left) * torch.view_as_real(right)).sum((-3, -2, -1))[:, None, None]

    image = image.clone()
    residual = right - normal(image)
    direction, remaining = residual.clone(), energy(residual, residual)
    for _ in range(iterations):
        change = normal(direction)
        step = (remaining / energy(direction, change).clamp_min(tiny)).to(image.dtype)  # an all-zero slice stays zero
        image.addcmul_(step, direction)
        residual.addcmul_(step, change, value=-1)
        previous, remaining = remaining, energy(residual, residual)
        direction = torch.addcmul(residual, (remaining / previous.clamp_min(tiny)).to(image.dtype), direction)
    return image


class _SenseFromPrior(torch.autograd.Function):
    """SENSE as a function of the prior, with the derivative weight (A + weight)⁻¹ of the minimiser.

    The derivative is self-adjoint, so the backward pass solves the same system. As in MoDL, only the operator is saved;
    the autograd graph of the iterations would hold all coil images.
    """

    @staticmethod
    def forward(
        ctx: Any, prior: Tensor, right: Tensor, lines: Tensor, maps: Tensor, weight: float, iterations: int
    ) -> Tensor:
        ctx.save_for_backward(lines, maps)
        ctx.weight, ctx.iterations = weight, iterations
        return _conjugate_gradients(right + weight * prior, prior, lines, maps, weight, iterations)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        lines, maps = ctx.saved_tensors
        gradient = gradient.contiguous()
        right = ctx.weight * gradient
        to_prior = _conjugate_gradients(right, gradient, lines, maps, ctx.weight, ctx.iterations)
        return to_prior, None, None, None, None, None
