"""Sampling masks: fastMRI's own classes, their seeds, and the block of lines at the centre of k-space."""

from collections.abc import Sequence

import numpy as np
from fastmri.data.subsample import MaskFunc, create_mask_for_mask_type, temp_seed
from torch import Tensor

from mrilib.config import MASK_TYPES


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
