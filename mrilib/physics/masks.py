"""Sampling masks: fastMRI's mask classes, their seeds, and the centre lines of a mask.

For a mask of your own, write a subclass of fastMRI's `MaskFunc` and add it to `MASK_CLASSES`; the parameter `mask_type`
names it. The class

- overrides `calculate_acceleration_mask`, which returns the sampled lines outside the centre as W numbers, 0 or 1;
- draws all random numbers from `self.rng`, which is seeded for each slice;
- does not override `choose_acceleration`, which must draw the first random number;
- raises ValueError for a mask that cannot be made; each width of the data is tried before training.

fastMRI's class adds the centre lines. They must include line W // 2, as coil maps are computed from them.
"""

from collections.abc import Sequence

import numpy as np
import torch
from fastmri.data.subsample import (
    EquispacedMaskFractionFunc,
    EquiSpacedMaskFunc,
    MagicMaskFractionFunc,
    MagicMaskFunc,
    MaskFunc,
    RandomMaskFunc,
    temp_seed,
)
from torch import Tensor

from mrilib.config import ParameterError

MASK_CLASSES: dict[str, type[MaskFunc]] = {  # fastMRI's names; register your own mask here
    "random": RandomMaskFunc,
    "equispaced": EquiSpacedMaskFunc,
    "equispaced_fraction": EquispacedMaskFractionFunc,
    "magic": MagicMaskFunc,
    "magic_fraction": MagicMaskFractionFunc,
}


def find_mask(mask_type: str) -> type[MaskFunc]:
    """Look a mask class up by its name.

    Raises
    ------
    ParameterError
        If the name is unknown; the message lists the known names.
    """
    if mask_type not in MASK_CLASSES:
        raise ParameterError(f"mask_type: '{mask_type}' is not known; there are {', '.join(MASK_CLASSES)}")
    return MASK_CLASSES[mask_type]


def make_mask_func(mask_type: str, center_fractions: Sequence[float], accelerations: Sequence[int]) -> MaskFunc:
    """Create the mask class of this name; each mask draws one pair of centre fraction and acceleration.

    Raises
    ------
    ParameterError
        If there is no mask of this name.
    """
    return find_mask(mask_type)(list(center_fractions), list(accelerations))


def sample_mask(
    mask_func: MaskFunc, width: int, seed: int | tuple[int, ...], padding: tuple[int, int]
) -> tuple[Tensor, int]:
    """Draw the sampled phase-encoding lines, identical to fastMRI's `apply_mask` for the same seed.

    Parameters
    ----------
    mask_func : MaskFunc
        One of `MASK_CLASSES`.
    width : int
        Number of phase-encoding lines W.
    seed : int or tuple of int
    padding : (left, right)
        Lines outside [left, right) were never acquired and are not sampled.

    Returns
    -------
    mask : Tensor, bool, shape (W,)
    acceleration : int
        The nominal acceleration that was drawn.
    """
    mask, _ = mask_func((1, width, 2), None, seed)
    mask = mask.reshape(-1) > 0
    mask[: padding[0]] = False
    mask[padding[1] :] = False
    with temp_seed(mask_func.rng, seed):  # fastMRI draws the acceleration first but does not return it
        _, acceleration = mask_func.choose_acceleration()
    return mask, acceleration


def check_mask(mask_type: str, center_fraction: float, acceleration: int, width: int) -> None:
    """Refuse a mask that cannot be created at this width; fastMRI's classes divide by zero at some.

    Raises
    ------
    ValueError
        Names the pair and the width.
    """
    mask_class = find_mask(mask_type)
    try:
        mask_class([center_fraction], [acceleration])((1, width, 2), None, 0)
    except (ArithmeticError, ValueError) as error:
        raise ValueError(
            f"center_fractions {center_fraction:g} with accelerations {acceleration}: no {mask_type} mask of {width} "
            f"phase-encoding lines can be made ({error}); lower center_fractions or the acceleration"
        ) from None


def center_lines(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Largest block of sampled lines that is symmetric about the centre line W // 2.

    Parameters
    ----------
    mask : Tensor, bool, shape (..., W)

    Returns
    -------
    start, stop : Tensor, int64, shape (...)
        Half-open range of line indices; empty (start == stop) if the centre line is not sampled.
    """
    center = mask.shape[-1] // 2
    right = mask[..., center:]  # from the centre line on
    left = mask[..., : center + 1].flip(-1)
    both = right & left[..., : right.shape[-1]]
    half = both.long().cumprod(-1).sum(-1)  # sampled pairs of lines, the centre line included
    return torch.where(half > 0, center - half + 1, center), center + half


def validation_seed(file: str) -> tuple[int, ...]:
    """Seed of a validation or test mask, as in fastMRI: the characters of the file name with its extension."""
    return tuple(map(ord, file))


def training_seed(seed: int, file: str, slice_num: int, mask_index: int, repeat: int = 0) -> int:
    """Seed of a training mask, in [0, 2³²).

    It depends on the arguments alone, so a resumed run draws the same masks. `repeat` counts earlier uses of the slice
    in the same epoch.
    """
    words = [seed, slice_num, mask_index, *([repeat] if repeat else []), *file.encode()]
    return int(np.random.SeedSequence(words).generate_state(1)[0])
