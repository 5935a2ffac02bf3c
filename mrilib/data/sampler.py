"""Batches of slices of equal shape, in a seeded order that a resumed run repeats."""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from mrilib.data.dataset import Batch, FastMRIDataset, Slice, _Loader

logger = logging.getLogger("mrilib")


class ShapeBatchSampler(Sampler[list[int | tuple[int, int]]]):
    """Batches of slices of equal shape and about equal number, in an order that depends on (seed, epoch) alone.

    Parameters
    ----------
    dataset : FastMRIDataset
    batch_size : int
    seed : int
    shuffle : bool
        Without it the order is the dataset's.
    finding_fraction : float
        So much of a shuffled epoch, drawn anew each time, gives its place to random slices of its shape that have a
        finding, where there are any; some may come twice.
    Attributes
    ----------
    skip : int
        Leave out so many batches at the start, unread.
    share : (int, int)
        This process's number and how many processes take turns.
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
        self.found: dict[tuple[int, ...], list[int]] = defaultdict(list)  # slices with a finding, by shape
        for index in range(len(dataset)) if self.finding_fraction else ():
            if dataset.facts(index).findings:
                self.found[dataset.shape_key(index)].append(index)
        if self.finding_fraction and not self.found:
            raise ValueError(
                f"finding_fraction: {finding_fraction:g}, but no training slice is known to have a finding; "
                "set it to 0, or give annotations_dir"
            )
        self.skip, self.share = 0, (0, 1)

    @property
    def total(self) -> int:
        """Batches of the dataset's epoch, of all processes."""
        return len(self.plan())

    def plan(self) -> list[list[int]]:
        """The batches of the dataset's epoch, of all processes."""
        rng = np.random.default_rng([self.seed, self.dataset.epoch])
        order: Iterable[int] = rng.permutation(len(self.dataset)) if self.shuffle else range(len(self.dataset))
        if self.finding_fraction:
            order = [self._with_finding(int(index), rng) for index in order]
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index in order:
            groups[self.dataset.shape_key(int(index))].append(int(index))
        # As few batches as it takes, about equally large: the last one's few slices would else weigh as much as many.
        batches = [
            batch.tolist()
            for group in groups.values()
            for batch in np.array_split(group, math.ceil(len(group) / self.batch_size))
        ]
        return [batches[i] for i in rng.permutation(len(batches))] if self.shuffle else batches

    def _with_finding(self, index: int, rng: np.random.Generator) -> int:
        """The slice, or a random one of its shape that has a finding: every epoch has as many batches."""
        others = self.found.get(self.dataset.shape_key(index), [])
        return int(rng.choice(others)) if others and rng.random() < self.finding_fraction else index

    def __iter__(self) -> Iterator[list[int | tuple[int, int]]]:
        """Batches of indices, and of (index, look) where the epoch has seen the slice before."""
        number, count = self.share
        seen: Counter[int] = Counter()
        batches: list[list[int | tuple[int, int]]] = []
        for plain in self.plan():
            batches.append([])
            for index in plain:
                batches[-1].append((index, seen[index]) if seen[index] else index)
                seen[index] += 1
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
        # stacked here; not sent twice
        slices=[s._replace(kspace=s.kspace[:0], target=None, tokens=None) for s in slices],
        acquired=torch.stack([torch.ones_like(s.mask) if s.acquired is None else s.acquired for s in slices]),
        tokens=torch.stack(tokens) if len(tokens) == len(slices) else None,
    )


def make_loader(
    dataset: FastMRIDataset,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = False,
    finding_fraction: float = 0.0,
) -> DataLoader:
    """A loader of equal-shape batches; set ``dataset.epoch`` before each pass. See `ShapeBatchSampler`."""
    return _Loader(
        dataset,
        batch_sampler=ShapeBatchSampler(dataset, batch_size, seed, shuffle, finding_fraction),
        collate_fn=collate,
        num_workers=dataset.config.num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),  # its own: the model's random numbers must not depend on it
    )
