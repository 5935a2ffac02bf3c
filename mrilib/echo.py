"""What frozen parts make of a slice, kept until the slice has come for the last time.

A loader may give each batch several times (`ShapeBatchSampler`'s `echo`): where most of a step is spent in parts that
do not learn, the same batch again is nearly as good as a new one and costs a fraction.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mrilib.data import Batch

Made = tuple[Tensor | None, ...]  # each with slices in its first dimension


class Echoes:
    """What is made of each slice under its mask, on the host, from the first to the last of the times that it comes."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int, int], Made] = {}  # an epoch may look at a slice more than once

    def __len__(self) -> int:
        """Slices that are waited for."""
        return len(self._kept)

    def clear(self) -> None:
        """Forget what is kept: of batches that do not come back it is of no use."""
        self._kept.clear()

    def get(
        self, batch: Batch, times: int, make: Callable[[Batch], Made], fits: Callable[[Made], bool] = lambda made: True
    ) -> Made:
        """What `make` makes of a batch, or has made of it before.

        By slice, as a batch may be split where memory is short. Made anew where nothing is kept, as in a training that
        has just been resumed, or where what is kept is not what is wanted by now. Which of its times it is, a slice
        says (`Slice.echo`): a step that is taken again is no further time.

        Parameters
        ----------
        batch : Batch
        times : int
            That it comes. With 1 nothing is kept.
        make : callable
            From a batch to tensors with slices in their first dimension, or None.
        fits : callable
            Whether what is kept of a slice is all that is wanted.
        """
        if times == 1:
            return make(batch)
        device = batch.mask.device
        keys = [(one.file, one.slice_num, one.look) for one in batch.slices]
        kept = [self._kept.get(key) for key in keys]
        rows = [made for made in kept if made is not None and fits(made)]
        if len(rows) < len(keys):
            whole = tuple(None if part is None else part.cpu() for part in make(batch))
            rows = [tuple(None if part is None else part[i] for part in whole) for i in range(len(keys))]
        for key, one, made in zip(keys, batch.slices, rows, strict=True):
            if one.echo < times - 1:
                self._kept[key] = made
            else:
                self._kept.pop(key, None)
        return tuple(_stacked(column, device) for column in zip(*rows, strict=True))


def _stacked(rows: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
    present = [row for row in rows if row is not None]
    return torch.stack(present).to(device) if present else None
