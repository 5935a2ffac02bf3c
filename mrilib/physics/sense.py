"""Data consistency and regularised SENSE, solved by conjugate gradients."""

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
    """Coil images whose measured lines are the measured ones and whose others come from `image`.

    ifft(where(mask, measured k-space, F(S x))); lines that the fully sampled scan has not acquired either stay zero, as
    they are in the target.

    Parameters
    ----------
    image : Tensor, complex64, shape (batch, readout, phase)
    maps, kspace : Tensor, complex64, shape (batch, coil, readout, phase)
    mask : Tensor, bool, shape (batch, phase)
    acquired : Tensor, bool, shape (batch, phase), optional
        False on the header's padding; by default every line was acquired.
    measured : Tensor, complex64, shape (batch, coil, readout, phase), optional
        Coil images of the measured lines and of nothing else, where they are known already.

    Returns
    -------
    Tensor, complex64, shape (batch, coil, readout, phase)
    """
    missing = ~mask if acquired is None else ~mask & acquired
    if measured is None:
        measured = ifft2c(torch.where(mask[:, None, None], kspace, 0))
    # Lines are measured whole, so along the readout nothing happens; taking lines out is a convolution, without shifts.
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
    """Regularised SENSE: the image whose coil images explain the measured lines, nothing learned.

    argmin_x ‖M F S x − y‖² + weight ‖x − prior‖², by conjugate gradients from `prior` on (Pruessmann et al., Magn Reson
    Med 46:638, 2001). Few iterations regularise too.

    Parameters
    ----------
    kspace, maps : Tensor, complex64, shape (batch, coil, readout, phase)
        Masked k-space; maps whose RSS is at most 1, as `center_coil_maps` gives them.
    mask : Tensor, bool, shape (batch, phase)
    weight : float
        In units of a fully sampled problem's eigenvalues, which are 1.
    iterations : int
    prior : Tensor, complex64, shape (batch, readout, phase), optional
        Zero if left out. The gradient goes to it alone, as the minimiser's, found by as many steps (Aggarwal et al.,
        IEEE TMI 38:394, 2019).
    zero_filled : Tensor, complex64, shape (batch, readout, phase), optional
        The measured lines' coil images, combined with the same maps, where they are known already.

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
    """Steps towards (Sᴴ Fᴴ M F S + weight) x = right, from `image` on; all in place, memory is what costs."""
    conjugate = maps.conj().resolve_conj()
    coils, spectrum = torch.empty_like(maps), torch.empty_like(maps)
    tiny = torch.finfo(torch.float32).tiny

    def normal(image: Tensor) -> Tensor:
        # Lines are measured whole, so along the readout nothing happens; convolving needs no shifts.
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
    direction, left = residual.clone(), energy(residual, residual)
    for _ in range(iterations):
        moved = normal(direction)
        step = (left / energy(direction, moved).clamp_min(tiny)).to(image.dtype)  # an all-zero slice stays zero
        image.addcmul_(step, direction)
        residual.addcmul_(step, moved, value=-1)
        before, left = left, energy(residual, residual)
        direction = torch.addcmul(residual, (left / before.clamp_min(tiny)).to(image.dtype), direction)
    return image


class _SenseFromPrior(torch.autograd.Function):
    """The minimiser moves with the prior by weight (A + weight)⁻¹, which is its own adjoint: back by the same steps.

    As in MoDL, nothing but the operator is kept for that, where the graph of the steps would hold every coil image.
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
        moved = _conjugate_gradients(right, gradient, lines, maps, ctx.weight, ctx.iterations)
        return moved, None, None, None, None, None
