"""The physics: Fourier transforms, sampling masks, coils.

This is the only place that knows the axis convention. Every complex tensor is complex64 with axes
(..., coil, readout, phase); undersampling is along phase, the last axis. Real (..., 2) layouts exist only at
the door of a fastMRI function, inside this file and the encoder.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from fastmri.data.subsample import MaskFunc, create_mask_for_mask_type, temp_seed
from torch import Tensor

MASK_TYPES = ("random", "equispaced", "equispaced_fraction", "magic", "magic_fraction")


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


def make_mask_func(mask_type: str, center_fractions: Sequence[float], accelerations: Sequence[int]) -> MaskFunc:
    """Build fastMRI's own mask class of that name; one of the paired values is drawn for each mask.

    Raises
    ------
    ValueError
        If fastMRI has no mask of that name; the known names are listed.
    """
    if mask_type not in MASK_TYPES:
        raise ValueError(f"mask_type '{mask_type}' is not one of fastMRI's: {', '.join(MASK_TYPES)}")
    return create_mask_for_mask_type(mask_type, list(center_fractions), list(accelerations))


def sample_mask(
    mask_func: MaskFunc, width: int, seed: int | tuple[int, ...], padding: tuple[int, int]
) -> tuple[Tensor, int]:
    """Sampled phase-encoding lines, bit for bit what fastMRI's `apply_mask` takes for the same seed.

    Parameters
    ----------
    mask_func : MaskFunc
        One of fastMRI's mask classes.
    width : int
        Number of phase-encoding lines W.
    seed : int or tuple of int
        Seed of the mask; fastMRI's validation seed is ``tuple(map(ord, file_name))``.
    padding : (left, right)
        Lines outside [left, right) were never acquired and are not sampled.

    Returns
    -------
    mask : Tensor, bool, shape (W,)
    acceleration : int
        The nominal one that was drawn.
    """
    mask, _ = mask_func((1, width, 2), None, seed)
    mask = mask.reshape(-1) > 0
    mask[: padding[0]] = False
    mask[padding[1] :] = False
    with temp_seed(mask_func.rng, seed):  # fastMRI draws the acceleration first, and does not tell which
        _, acceleration = mask_func.choose_acceleration()
    return mask, acceleration


def check_mask(mask_type: str, center_fraction: float, acceleration: int, width: int) -> None:
    """Refuse a mask that fastMRI's class cannot make at this width, which it finds by dividing by zero.

    Raises
    ------
    ValueError
        Names the pair and the width.
    """
    try:
        make_mask_func(mask_type, [center_fraction], [acceleration])((1, width, 2), None, 0)
    except (ArithmeticError, ValueError) as error:
        raise ValueError(
            f"center_fractions {center_fraction:g} with accelerations {acceleration}: fastMRI's {mask_type} mask "
            f"cannot be made for {width} phase-encoding lines ({error}); lower center_fractions or the acceleration"
        ) from None


def center_lines(mask: Tensor) -> tuple[int, int]:
    """The block of sampled lines around the centre of k-space, symmetric about the centre line.

    Parameters
    ----------
    mask : Tensor, bool, shape (W,)

    Returns
    -------
    (start, stop)
        Half-open range of line indices, W//2 in its middle; empty (start == stop) if the centre line is not sampled.
    """
    sampled = mask.tolist()
    center = len(sampled) // 2
    if not sampled[center]:
        return center, center
    half = 0
    while center - half - 1 >= 0 and center + half + 1 < len(sampled):
        if not (sampled[center - half - 1] and sampled[center + half + 1]):
            break
        half += 1
    return center - half, center + half + 1


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


def fitted_scale(image: Tensor, mask: Tensor, maps: Tensor, zero_filled: Tensor) -> Tensor:
    """The real factor with which an image explains the measured lines best: argmin_a ‖a M F S x − y‖².

    Parameters
    ----------
    image, zero_filled : Tensor, complex64, shape (batch, readout, phase)
        The measured lines' coil images, combined with `maps`, are `zero_filled`.
    mask : Tensor, bool, shape (batch, phase)
    maps : Tensor, complex64, shape (batch, coil, readout, phase)

    Returns
    -------
    Tensor, float32, shape (batch, 1, 1); 0 for an image of zeros
    """
    lines = torch.fft.ifftshift(mask, dim=-1)[:, None, None]
    # as in `_conjugate_gradients`; a phase that shifts would bring does not matter to the power
    spectrum = torch.view_as_real(torch.fft.fft(expand(image, maps), norm="ortho")).square().sum(-1)
    power = (spectrum * lines).sum((-3, -2, -1))
    fit = (torch.view_as_real(image) * torch.view_as_real(zero_filled)).sum((-3, -2, -1))
    return (fit / power.clamp_min(torch.finfo(torch.float32).tiny))[:, None, None]


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


def validation_seed(file: str) -> tuple[int, ...]:
    """fastMRI's seed of a validation or test mask: the characters of the file name, extension included."""
    return tuple(map(ord, file))


def training_seed(seed: int, file: str, slice_num: int, mask_index: int, look: int = 0) -> int:
    """Seed of a training mask: a function of (seed, file, slice, mask number), so that a resumed run sees the same.

    A slice that an epoch sees more than once has a mask for each `look`.

    Returns
    -------
    int
        In [0, 2³²), as NumPy's RandomState wants it.
    """
    words = [seed, slice_num, mask_index, *([look] if look else []), *file.encode()]
    return int(np.random.SeedSequence(words).generate_state(1)[0])


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
