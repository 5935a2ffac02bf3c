"""Batches of slices of equal shape, in a seeded order that a resumed run repeats."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from mrilib.data.dataset import Batch, FastMRIDataset, Slice
from mrilib.data.fastmri_file import DataError, first_line


class ShapeBatchSampler(Sampler[list[int | tuple[int, int]]]):
    """Batches of slices of equal shape and nearly equal number, in an order that depends on (seed, epoch) alone.

    Parameters
    ----------
    dataset : FastMRIDataset
    batch_size : int
    seed : int
    shuffle : bool
        If False, slices keep the order of the dataset.
    finding_fraction : float
        Fraction of a shuffled epoch that is replaced by random slices with a finding, of the same shape if there are
        any. A slice can then occur several times in an epoch.

    Attributes
    ----------
    skip : int
        Number of batches to omit at the start of the epoch.
    share : (int, int)
        Index of this process and number of processes; the processes take turns.

    Raises
    ------
    ValueError
        If finding_fraction is positive and no slice has a finding.
    """

    def __init__(
        self,
        dataset: FastMRIDataset,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = False,
        finding_fraction: float = 0.0,
    ) -> None:
        self.dataset, self.batch_size, self.seed, self.shuffle = dataset, batch_size, seed, shuffle
        self.finding_fraction = finding_fraction if shuffle else 0.0
        self.with_finding: dict[tuple[int, ...], list[int]] = defaultdict(list)  # slices with a finding, by shape
        for index in range(len(dataset)) if self.finding_fraction else ():
            if dataset.facts(index).findings:
                self.with_finding[dataset.shape_key(index)].append(index)
        if self.finding_fraction and not self.with_finding:
            raise ValueError(
                f"finding_fraction: {finding_fraction:g}, but no training slice is known to have a finding; "
                "set it to 0, or give annotations_dir"
            )
        self.skip, self.share = 0, (0, 1)

    @property
    def total(self) -> int:
        """Number of batches in the epoch, over all processes."""
        return len(self.plan())

    def plan(self) -> list[list[int]]:
        """Batches of the dataset's current epoch, over all processes."""
        rng = np.random.default_rng([self.seed, self.dataset.epoch])
        order: Iterable[int] = rng.permutation(len(self.dataset)) if self.shuffle else range(len(self.dataset))
        if self.finding_fraction:
            order = [self._draw(int(index), rng) for index in order]
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index in order:
            groups[self.dataset.shape_key(int(index))].append(int(index))
        # Equal sizes, since each batch has the same weight in the optimizer.
        batches = [
            batch.tolist()
            for group in groups.values()
            for batch in np.array_split(group, math.ceil(len(group) / self.batch_size))
        ]
        return [batches[i] for i in rng.permutation(len(batches))] if self.shuffle else batches

    def _draw(self, index: int, rng: np.random.Generator) -> int:
        """Replace the slice by one of its shape with a finding, with probability finding_fraction."""
        others = self.with_finding.get(self.dataset.shape_key(index), [])
        return int(rng.choice(others)) if others and rng.random() < self.finding_fraction else index

    def __iter__(self) -> Iterator[list[int | tuple[int, int]]]:
        """Batches of indices; a slice that the epoch has already used is (index, repeat)."""
        number, count = self.share
        uses: Counter[int] = Counter()
        batches: list[list[int | tuple[int, int]]] = []
        for indices in self.plan():
            batches.append([])
            for index in indices:
                batches[-1].append((index, uses[index]) if uses[index] else index)
                uses[index] += 1
        yield from batches[self.skip + number :: count]

    def __len__(self) -> int:
        number, count = self.share
        return len(range(self.skip + number, self.total, count))


def collate(slices: list[Slice]) -> Batch:
    """Stack slices of equal shape."""
    targets = [s.target for s in slices if s.target is not None]
    tokens = [s.tokens for s in slices if s.tokens is not None]
    return Batch(
        kspace=torch.stack([s.kspace for s in slices]),
        mask=torch.stack([s.mask for s in slices]),
        scale=torch.tensor([s.scale for s in slices], dtype=torch.float32),
        target=torch.stack(targets) if len(targets) == len(slices) else None,
        maximum=torch.tensor([s.maximum for s in slices], dtype=torch.float32),
        image_shape=slices[0].image_shape,
        # Without what is stacked here, so that a loading process does not send it twice.
        slices=[s._replace(kspace=s.kspace[:0], target=None, tokens=None) for s in slices],
        acquired=torch.stack([torch.ones_like(s.mask) if s.acquired is None else s.acquired for s in slices]),
        tokens=torch.stack(tokens) if len(tokens) == len(slices) else None,
    )


class _Loader(DataLoader[Any]):
    """DataLoader that raises the data error of a loading process without the traceback that PyTorch adds to it."""

    def __iter__(self) -> Any:
        return self._batches(super().__iter__())

    @staticmethod
    def _batches(batches: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from batches
        except DataError as error:
            raise DataError(str(error).rpartition(f"{DataError.__name__}: ")[2].strip()) from None


def make_loader(
    dataset: FastMRIDataset,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = False,
    finding_fraction: float = 0.0,
) -> DataLoader:
    """Create a loader of `ShapeBatchSampler`'s batches; set ``dataset.epoch`` before each pass."""
    return _Loader(
        dataset,
        batch_sampler=ShapeBatchSampler(dataset, batch_size, seed, shuffle, finding_fraction),
        collate_fn=collate,
        num_workers=dataset.config.num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),  # leaves the global random state to the model
    )


def loading_error(error: RuntimeError) -> DataError | None:
    """Convert PyTorch's error about a killed loading process; None for any other error."""
    if "DataLoader worker" not in str(error):
        return None
    return DataError(
        f"a process that loads data has ended ({first_line(error)}), most often because memory ran out; lower "
        "num_workers or batch_size, then resume"
    )
