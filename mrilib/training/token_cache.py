"""The token cache: inputs of stage 2's decoder, computed once per (slice, mask) and read from disk.

Encoder and backbone are frozen in stage 2, so the image tokens of a (slice, mask) never change. A shard is a file with
a few slices of one volume under one mask. It holds the backbone's hidden states in their own type, the sampled lines of
the masked, normalised k-space, mask, scale and target. Training then needs neither the h5 file nor the backbone.

A shard's name contains a hash of everything that it depends on (see `token_key`), so a stale shard is never read. A
shard is computed as one batch, so its content does not depend on the batch size or order of a training.
"""

import contextlib
import json
import logging
import shutil
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mrilib.config import ParameterError, Stage2Parameters, display_path, resolve
from mrilib.data.dataset import Batch, FastMRIDataset, Slice
from mrilib.data.sampler import collate
from mrilib.model.encoder import PATCH
from mrilib.model.two_stage import TwoStageModel, hidden_size
from mrilib.physics import masks
from mrilib.processes import stop_requested
from mrilib.progress import progress_bar
from mrilib.training.device import autocast
from mrilib.training.distributed import TrainingStopped
from mrilib.training.token_key import describe, file_digests, hash_of
from mrilib.training.token_shards import HEADER_BYTES, SLICES, Shard, read_entry, write_shard, write_whole

SPARE_BYTES = 1 << 30  # left free on the disk for checkpoints and logs
logger = logging.getLogger("mrilib")


class CachedSlices(FastMRIDataset):
    """A dataset that reads its slices, with image tokens, from the token cache.

    A slice with a damaged or missing shard comes from its h5 file, without tokens; see `TokenCache.image_tokens`.

    Parameters
    ----------
    dataset : FastMRIDataset
        Defines slices and masks.
    shards : sequence of Shard
    """

    def __init__(self, dataset: FastMRIDataset, shards: Sequence[Shard]) -> None:
        vars(self).update(vars(dataset))
        self.places = {(s.mask_number, index): (s, row) for s in shards for row, index in enumerate(s.indices)}

    def place(self, index: int) -> tuple[Shard, int]:
        """Shard and row of a slice under the mask of the current epoch."""
        return self.places[self.epoch % self.masks_per_slice if self.training else 0, index]

    def __getitem__(self, index: int | tuple[int, int]) -> Slice:
        index, repeat = index if isinstance(index, tuple) else (index, 0)
        if repeat:
            raise ValueError("the token cache has one mask for a slice and epoch, so slices cannot be repeated")
        entry = read_entry(*self.place(index))
        if entry is None:
            return super().__getitem__(index)
        tensors, facts = entry
        mask, lines = tensors["mask"], torch.view_as_complex(tensors["lines"])
        masked = torch.zeros(*lines.shape[:-1], mask.shape[0], dtype=lines.dtype)
        masked[..., mask] = lines
        image_shape = (facts["image_shape"][0], facts["image_shape"][1])
        scale, target = float(tensors["scale"]), tensors.get("target")
        item = self._slice(index, masked, mask, scale, target, image_shape, facts["acceleration"])
        return item._replace(tokens=tensors["tokens"])


class TokenCache:
    """Image tokens of a frozen encoder and backbone, on disk.

    Parameters
    ----------
    model : TwoStageModel
    config : Stage2Parameters
        token_cache_dir, masks_per_slice, epochs, mixed_precision, num_workers and the data parameters are used.

    Attributes
    ----------
    facts : dict
        Key, entries, bytes and seconds, for the run record.
    """

    def __init__(self, model: TwoStageModel, config: Stage2Parameters) -> None:
        self.model, self.config = model, config
        self.directory = resolve(config.token_cache_dir)
        self.settings = describe(model, config)
        self.key = hash_of(self.settings)
        self.folder = self.directory / self.key[:16]
        self.datasets: list[CachedSlices] = []
        self.facts: dict[str, Any] = {}

    def hold(self, *datasets: FastMRIDataset) -> list[CachedSlices]:
        """Compute the missing shards of some datasets, and return the datasets that read from the cache.

        Several processes may fill the same cache: they share the shards. A killed process leaves complete shards only.

        Raises
        ------
        ParameterError
            The disk has no room for the missing shards.
        TrainingStopped
            The run was asked to stop (see `processes.request_stop`); computed shards stay.
        """
        begin = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in self.directory.rglob("*.part"):  # of killed processes; recent ones may be in use
            with contextlib.suppress(FileNotFoundError):
                if time.time() - part.stat().st_mtime > 3600:
                    part.unlink()
        write_whole(self.folder / "key.json", json.dumps(self.settings, indent=2).encode())
        paths = sorted({dataset.volumes[v].path for dataset in datasets for v, _ in dataset.samples})
        digests = file_digests(paths, self.directory / "files.json")
        plans = [(dataset, self.shards(dataset, digests)) for dataset in datasets]
        missing = [(dataset, [s for s in shards if not s.path.exists()]) for dataset, shards in plans]
        self._check_room([s for _, shards in plans for s in shards], sum(self._bytes(*plan) for plan in missing))
        # Loaders draw random numbers: the training's must not depend on how much of the cache exists.
        with torch.random.fork_rng(devices=[self.model.device] if self.model.device.type == "cuda" else []):
            for dataset, shards in missing:
                self._fill(dataset, shards)
        self.datasets = [CachedSlices(*plan) for plan in plans]
        self.facts |= {"key": self.key, "seconds": time.perf_counter() - begin}
        return self.datasets

    def image_tokens(self, batch: Batch) -> Tensor:
        """Return the image tokens (B, N, hidden) of a batch, as `TwoStageModel.image_tokens` does."""
        if batch.tokens is None:
            rows = [self._repaired_tokens(item) for item in batch.slices]
            batch = batch._replace(tokens=torch.stack(rows).to(batch.kspace.device))
        assert batch.tokens is not None
        return batch.tokens.float()

    def _repaired_tokens(self, item: Slice) -> Tensor:
        """Return a slice's tokens; compute its shard again if it is damaged or missing."""
        for dataset in self.datasets:
            for index, (volume, slice_num) in enumerate(dataset.samples):
                if (dataset.volumes[volume].file, slice_num) != (item.file, item.slice_num):
                    continue
                shard, row = dataset.place(index)
                entry = read_entry(shard, row)
                if entry is None:
                    logger.warning("token cache: %s is damaged or missing; computed again", shard.path.name)
                    source = uncached(dataset, shard.mask_number)
                    self._compute(collate([source[i] for i in shard.indices]), shard)
                    entry = read_entry(shard, row)
                if entry is None:
                    raise OSError(f"token cache: {display_path(shard.path)} cannot be read back; check the disk")
                return entry[0]["tokens"]
        raise ValueError(f"{item.file} slice {item.slice_num} is not in this token cache")

    # -------------------------------------------------------------------------------------------------- planning

    def shards(self, dataset: FastMRIDataset, digests: dict[Path, str]) -> list[Shard]:
        """List the shards of a dataset; `digests` are the SHA-256 of its files."""
        by_volume: dict[int, list[int]] = defaultdict(list)
        for index, (v, _) in enumerate(dataset.samples):
            by_volume[v].append(index)
        shards = []
        for mask_number in range(min(self.config.epochs, dataset.masks_per_slice) if dataset.training else 1):
            # Without masks_per_slice: mask number 0 is the same, however many there are.
            seed = [self.config.seed, mask_number] if dataset.training else "validation"
            mask_settings = [seed, list(dataset.mask_func.accelerations), list(dataset.mask_func.center_fractions)]
            for v, own in by_volume.items():
                volume = dataset.volumes[v]
                for start in range(0, len(own), SLICES):
                    indices = tuple(own[start : start + SLICES])
                    slices = [dataset.samples[i][1] for i in indices]
                    key = hash_of([self.key, volume.path.name, digests[volume.path], slices, mask_settings])
                    name = f"{volume.file}-{slices[0]:03d}-{key[:24]}.safetensors"
                    shards.append(Shard(self.folder / name, key, indices, mask_number))
        return shards

    def _check_room(self, shards: Sequence[Shard], missing: int) -> None:
        """Log the cache's size, and refuse it if the missing bytes do not fit on the disk."""
        existing = sum(shard.path.stat().st_size for shard in shards if shard.path.exists())
        entries, free = sum(len(shard.indices) for shard in shards), shutil.disk_usage(self.folder).free
        sizes = f"{missing / 1e9:.2f} GB to be written to {display_path(self.folder)}, {existing / 1e9:.2f} GB there"
        sizes += f", {free / 1e9:.1f} GB free"
        logger.info("token cache: %d entries (slice, mask), %s", entries, sizes)
        self.facts |= {"entries": entries, "bytes": missing + existing, "bytes_to_write": missing}
        if missing and missing + SPARE_BYTES > free:
            raise ParameterError(
                f"token_cache_dir: {sizes}, and 1.1 GB must stay free. Choose another token_cache_dir or none, "
                "lower masks_per_slice or max_train_slices, or delete old caches there"
            )

    def total_bytes(self, *datasets: FastMRIDataset) -> int:
        """Compute the size of the cache of some datasets, without reading or writing it [bytes]."""
        digests = {volume.path: "" for dataset in datasets for volume in dataset.volumes}
        return sum(self._bytes(dataset, self.shards(dataset, digests)) for dataset in datasets)

    def _bytes(self, dataset: FastMRIDataset, shards: Sequence[Shard]) -> int:
        """Compute the size of shards from their masks [bytes]."""
        tokens = (self.config.img_size // PATCH) ** 2 * self._token_bytes()
        total = 0
        for mask_number, group in _by_mask(shards):
            source = uncached(dataset, mask_number)
            for index in (index for shard in group for index in shard.indices):
                total += tokens + _input_bytes(source, index) + HEADER_BYTES
        return total

    @torch.no_grad()
    def _token_bytes(self) -> int:
        """Compute the size of one image token in the backbone's type [bytes]."""
        width = hidden_size(self.model.backbone)
        with autocast(self.config, self.model.device):
            token = self.model.hidden_states(torch.zeros(1, 3, width, device=self.model.device))
        return width * token.element_size()

    # ------------------------------------------------------------------------------------------------- computing

    def _fill(self, dataset: FastMRIDataset, shards: Sequence[Shard]) -> None:
        """Compute missing shards in a random order.

        Several processes share the work this way without communication. Two that compute the same shard write the same
        content.
        """
        if not shards:
            return
        bar = progress_bar(len(shards), "token cache")
        for mask_number, group in _by_mask(shards):
            order = [group[i] for i in np.random.default_rng().permutation(len(group))]
            loading: deque[Shard] = deque()
            loader: DataLoader = DataLoader(
                uncached(dataset, mask_number),
                batch_sampler=_missing_indices(order, loading),
                collate_fn=collate,
                num_workers=dataset.config.num_workers,
            )
            for batch in loader:
                self._compute(batch, loading.popleft())
                bar.update()
                if stop_requested():
                    raise TrainingStopped("stopped while filling the token cache; computed shards stay")
        bar.close()

    @torch.no_grad()
    def _compute(self, cpu_batch: Batch, shard: Shard) -> None:
        batch = cpu_batch.to(self.model.device)
        with autocast(self.config, self.model.device):
            hidden = self.model.hidden_states(self.model.encoder(batch.kspace, batch.mask)).cpu()
        rows = []
        for row, item in enumerate(cpu_batch.slices):
            mask = cpu_batch.mask[row]
            entry = {
                "tokens": hidden[row].contiguous(),
                "lines": torch.view_as_real(cpu_batch.kspace[row][..., mask]).contiguous(),
                "mask": mask,
                "scale": torch.tensor([item.scale], dtype=torch.float64),
            }
            if cpu_batch.target is not None:
                entry["target"] = cpu_batch.target[row]
            rows.append((entry, {"image_shape": list(item.image_shape), "acceleration": item.acceleration}))
        write_shard(shard, rows)


def uncached(dataset: FastMRIDataset, mask_number: int) -> FastMRIDataset:
    """Copy a dataset, without its cache, to read slices from h5 files under one mask."""
    source = FastMRIDataset.__new__(FastMRIDataset)
    vars(source).update(vars(dataset))
    source.epoch = mask_number
    return source


def _by_mask(shards: Sequence[Shard]) -> Iterator[tuple[int, list[Shard]]]:
    """Group shards by mask number, in order."""
    for mask_number in sorted({shard.mask_number for shard in shards}):
        yield mask_number, [shard for shard in shards if shard.mask_number == mask_number]


def _input_bytes(dataset: FastMRIDataset, index: int) -> int:
    """Compute the size of a slice's sampled lines, mask, scale and target [bytes]."""
    number, slice_num = dataset.samples[index]
    volume, config = dataset.volumes[number], dataset.config
    readout, width, padding, image_shape = volume.readout, volume.matrix[1], volume.padding, volume.image_shape
    if config.crop == "image":
        readout = width = config.img_size
        padding, image_shape = (0, width), (width, width)
    if volume.has_mask:
        lines = width  # an upper bound; such files are for testing
    else:
        seed = dataset._mask_seed(volume, slice_num)
        lines = int(masks.sample_mask(dataset.mask_func, width, seed, padding)[0].sum())
    target = 4 * image_shape[0] * image_shape[1] if volume.has_target else 0
    return 8 * min(volume.coils, config.num_coils) * readout * lines + width + 8 + target


def _missing_indices(shards: Sequence[Shard], loading: deque[Shard]) -> Iterator[list[int]]:
    """Yield the indices of each shard that no other process has written yet, and append the shard to `loading`."""
    for shard in shards:
        if not shard.path.exists():
            loading.append(shard)
            yield list(shard.indices)
