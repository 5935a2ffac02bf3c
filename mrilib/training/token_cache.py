"""The token cache: what stage 2's decoder is given, computed once per (slice, mask) and read from disk.

Encoder and backbone are frozen in stage 2, so the image tokens of a (slice, mask) never change. A file, called a shard
here, holds a few slices of one volume under one mask: the backbone's raw hidden states in their own type, the sampled
lines of the masked, normalised k-space, mask, scale and target, so that neither the h5 file nor the model is needed.

A shard is named after a hash of all that it was computed from: weights, settings, code, mask parameters, the h5 file's
bytes. What has changed is therefore not found and computed anew; nothing stale can be read. It is computed in a batch
of its own slices, so that it does not depend on a run's batch size or order, and a shard made again is the same.
"""

import ast
import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
import zlib
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader

from mrilib.backbone import cache, delta_rule, kernels, nirvana, trigger
from mrilib.config import ParameterError, Stage2Parameters, display_path, resolve
from mrilib.data import dataset as data
from mrilib.data import fastmri_file
from mrilib.data.dataset import Batch, FastMRIDataset, Slice
from mrilib.data.sampler import collate
from mrilib.environment import versions
from mrilib.model import encoder, finding_maps, two_stage, unet
from mrilib.model.two_stage import TwoStageModel, delta_rule_path, hidden_size, tensor_hash
from mrilib.physics import coils, fourier, sense
from mrilib.physics import masks as masks_module
from mrilib.processes import stop_requested
from mrilib.progress import progress_bar
from mrilib.training.distributed import TrainingStopped

FORMAT = 1  # of a shard; raised when one holds other things than before
SLICES = 4  # in a shard at most
SPARE_BYTES = 1 << 30  # left free on the disk for checkpoints and logs
COMPUTING_CODE = (
    fourier, masks_module, coils, sense, fastmri_file, data, encoder, finding_maps, two_stage, nirvana, cache,
    delta_rule, kernels, trigger, unet,
)  # fmt: skip
logger = logging.getLogger("mrilib")


class Shard(NamedTuple):
    """A file of the cache: consecutive slices of one volume under one mask."""

    path: Path
    key: str  # hash of what it was computed from
    indices: tuple[int, ...]  # of the dataset
    number: int  # of the mask


class CachedSlices(FastMRIDataset):
    """A dataset whose slices come from the token cache, with their image tokens.

    A slice whose entry is damaged or gone comes from its h5 file without tokens; `TokenCache.image_tokens` mends it.

    Parameters
    ----------
    dataset : FastMRIDataset
        The slices and masks.
    places : dict
        (mask number, index) → shard and row.
    """

    def __init__(self, dataset: FastMRIDataset, places: dict[tuple[int, int], tuple[Shard, int]]) -> None:
        vars(self).update(vars(dataset))
        self.places = places

    def place(self, index: int) -> tuple[Shard, int]:
        """Shard and row of a slice under the present epoch's mask."""
        return self.places[self.epoch % self.masks_per_slice if self.training else 0, index]

    def __getitem__(self, index: int | tuple[int, int]) -> Slice:
        index, repeat = index if isinstance(index, tuple) else (index, 0)
        if repeat:
            raise ValueError("the token cache has one mask a slice and epoch; its slices are seen once an epoch")
        entry = read_entry(*self.place(index))
        if entry is None:
            return super().__getitem__(index)
        tensors, facts = entry
        mask = tensors["mask"]
        lines = torch.view_as_complex(tensors["lines"])
        masked = torch.zeros(*lines.shape[:-1], mask.shape[0], dtype=lines.dtype)
        masked[..., mask] = lines
        image_shape = (facts["recon"][0], facts["recon"][1])
        scale = float(tensors["scale"])
        one = self._slice(index, masked, mask, scale, tensors.get("target"), image_shape, facts["acceleration"])
        return one._replace(tokens=tensors["tokens"])


class TokenCache:
    """Image tokens of a frozen encoder and backbone, on disk.

    Parameters
    ----------
    model : TwoStageModel
    config : Stage2Parameters
        token_cache_dir, masks_per_slice, epochs, mixed_precision, num_workers and the data parameters.
    """

    def __init__(self, model: TwoStageModel, config: Stage2Parameters) -> None:
        self.model, self.config = model, config
        self.directory = resolve(config.token_cache_dir)
        self.settings = describe(model, config)
        self.key = _hash(self.settings)
        self.folder = self.directory / self.key[:16]
        self.held: list[CachedSlices] = []
        self.facts: dict[str, Any] = {}

    def hold(self, *datasets: FastMRIDataset) -> list[CachedSlices]:
        """The same slices from the cache, which is filled first: what is already there is taken, the rest computed.

        Several processes may fill the same cache: they share the shards. One that is killed leaves whole shards alone.

        Raises
        ------
        ParameterError
            If the disk has no room for what is missing.
        TrainingStopped
            On the run's stop file (see `runs.request_stop`); what is computed stays.
        """
        begin = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in self.directory.rglob("*.part"):  # of processes that were killed, unless one is just being written
            with contextlib.suppress(FileNotFoundError):
                if time.time() - part.stat().st_mtime > 3600:
                    part.unlink()
        _write(self.folder / "key.json", json.dumps(self.settings, indent=2).encode())
        paths = sorted({dataset.volumes[v].path for dataset in datasets for v, _ in dataset.samples})
        digests = file_digests(paths, self.directory / "files.json")
        plans = [(dataset, self._shards(dataset, digests)) for dataset in datasets]
        missing = [(dataset, [s for s in shards if not s.path.exists()]) for dataset, shards in plans]
        self._check_room(plans, missing)
        # How much of the cache is there must not show in the training's random numbers: loaders draw from them.
        with torch.random.fork_rng(devices=[self.model.device] if self.model.device.type == "cuda" else []):
            for dataset, shards in missing:
                self._fill(dataset, shards)
        self.held = [
            CachedSlices(dataset, {(s.number, i): (s, row) for s in shards for row, i in enumerate(s.indices)})
            for dataset, shards in plans
        ]
        self.facts |= {"key": self.key, "seconds": time.perf_counter() - begin}
        return self.held

    def image_tokens(self, batch: Batch) -> Tensor:
        """A batch's image tokens (B, N, hidden) as `TwoStageModel.image_tokens` gives them; the source for stage 2."""
        if batch.tokens is None:
            rows = [self._mended(one) for one in batch.slices]
            batch = batch._replace(tokens=torch.stack(rows).to(batch.kspace.device))
        assert batch.tokens is not None
        return batch.tokens.float()

    def _mended(self, one: Slice) -> Tensor:
        """The tokens of a slice, its shard computed again if it is damaged."""
        for dataset in self.held:
            for index, (volume, slice_num) in enumerate(dataset.samples):
                if (dataset.volumes[volume].file, slice_num) == (one.file, one.slice_num):
                    shard, row = dataset.place(index)
                    entry = read_entry(shard, row)
                    if entry is None:
                        logger.warning("token cache: %s is damaged or gone; computed again", shard.path.name)
                        plain = _uncached(dataset, shard.number)
                        self._compute(collate([plain[i] for i in shard.indices]), shard)
                        entry = read_entry(shard, row)
                    if entry is None:
                        raise OSError(
                            f"token cache: {display_path(shard.path)} cannot be read back; is the disk sound?"
                        )
                    return entry[0]["tokens"]
        raise ValueError(f"{one.file} slice {one.slice_num} is not in this token cache")

    # --------------------------------------------------------------------------------------- planning

    def _shards(self, dataset: FastMRIDataset, digests: dict[Path, str]) -> list[Shard]:
        by_volume: dict[int, list[int]] = defaultdict(list)
        for index, (v, _) in enumerate(dataset.samples):
            by_volume[v].append(index)
        numbers = min(self.config.epochs, dataset.masks_per_slice) if dataset.training else 1
        shards = []
        for number in range(numbers):
            # masks_per_slice is left out: mask number 0 is the same, however many follow it.
            seed = [self.config.seed, number] if dataset.training else "validation"
            masks = [seed, list(dataset.mask_func.accelerations), list(dataset.mask_func.center_fractions)]
            for v, own in by_volume.items():
                volume = dataset.volumes[v]
                for start in range(0, len(own), SLICES):
                    indices = tuple(own[start : start + SLICES])
                    slices = [dataset.samples[i][1] for i in indices]
                    key = _hash([self.key, volume.path.name, digests[volume.path], slices, masks])
                    name = f"{volume.file}-{slices[0]:03d}-{key[:24]}.safetensors"
                    shards.append(Shard(self.folder / name, key, indices, number))
        return shards

    def _check_room(
        self, plans: list[tuple[FastMRIDataset, list[Shard]]], missing: list[tuple[FastMRIDataset, list[Shard]]]
    ) -> None:
        """Say what the cache takes on the disk, and refuse what does not fit."""
        needed = sum(self.needed_bytes(dataset, shards) for dataset, shards in missing)
        there = sum(s.path.stat().st_size for _, shards in plans for s in shards if s.path.exists())
        slices = sum(len(s.indices) for _, shards in plans for s in shards)
        free = shutil.disk_usage(self.folder).free
        where = display_path(self.folder)
        told = f"{needed / 1e9:.2f} GB to be written to {where}, {there / 1e9:.2f} GB there, {free / 1e9:.1f} GB free"
        logger.info("token cache: %d entries (slice, mask), %s", slices, told)
        self.facts |= {"entries": slices, "bytes": needed + there, "bytes_to_write": needed}
        if needed and needed + SPARE_BYTES > free:
            raise ParameterError(
                f"token_cache_dir: {told}, of which 1.1 GB are kept for the run. Choose another token_cache_dir, "
                "fewer masks_per_slice, max_train_slices, or none; or delete old caches there"
            )

    def total_bytes(self, *datasets: FastMRIDataset) -> int:
        """What the whole cache of these slices takes on the disk; nothing is read or written [bytes]."""
        unknown = {volume.path: "" for dataset in datasets for volume in dataset.volumes}
        return sum(self.needed_bytes(dataset, self._shards(dataset, unknown)) for dataset in datasets)

    def needed_bytes(self, dataset: FastMRIDataset, shards: Sequence[Shard]) -> int:
        """Size of shards on the disk, counted from their masks [bytes]."""
        tokens = (self.config.img_size // encoder.PATCH) ** 2 * token_bytes(self.model, self.config)
        total = 0
        for number in sorted({shard.number for shard in shards}):
            plain = _uncached(dataset, number)
            for index in (i for shard in shards if shard.number == number for i in shard.indices):
                total += tokens + _input_bytes(plain, index) + 800  # and the header's share
        return total

    # --------------------------------------------------------------------------------------- computing

    def _fill(self, dataset: FastMRIDataset, shards: Sequence[Shard]) -> None:
        """Compute the shards that are not there, each process in an order of its own.

        So several processes share the work without knowing of each other, none waits for one that is gone, and two that
        compute the same shard at the same time write the same.
        """
        if not shards:
            return
        bar = progress_bar(len(shards), "token cache")
        for number in sorted({shard.number for shard in shards}):
            todo = [shard for shard in shards if shard.number == number]
            order = [todo[i] for i in np.random.default_rng().permutation(len(todo))]
            loading: deque[Shard] = deque()
            loader: DataLoader = DataLoader(
                _uncached(dataset, number),
                batch_sampler=_still_missing(order, loading),
                collate_fn=collate,
                num_workers=dataset.config.num_workers,
            )
            for batch in loader:
                self._compute(batch, loading.popleft())
                bar.update()
                if stop_requested():
                    raise TrainingStopped("stopped while filling the token cache; what is in it stays")
        bar.close()

    @torch.no_grad()
    def _compute(self, cpu_batch: Batch, shard: Shard) -> None:
        batch = cpu_batch.to(self.model.device)
        with _autocast(self.model, self.config):
            hidden = self.model.hidden_states(self.model.encoder(batch.kspace, batch.mask)).cpu()
        tensors: dict[str, Tensor] = {}
        rows = []
        for row, one in enumerate(cpu_batch.slices):
            mask = cpu_batch.mask[row]
            entry = {
                "tokens": hidden[row].contiguous(),
                "lines": torch.view_as_real(cpu_batch.kspace[row][..., mask]).contiguous(),
                "mask": mask,
                "scale": torch.tensor([one.scale], dtype=torch.float64),
            }
            if cpu_batch.target is not None:
                entry["target"] = cpu_batch.target[row]
            facts = {"recon": list(one.image_shape), "acceleration": one.acceleration}
            rows.append({**facts, "checksum": _checksum(entry, facts)})
            tensors |= {f"{row}.{name}": tensor for name, tensor in entry.items()}
        try:
            # Not synced to the disk: what a power cut damages is noticed on reading.
            _write(shard.path, save(tensors, {"shard": json.dumps({"key": shard.key, "rows": rows})}))
        except OSError as error:
            raise OSError(f"token_cache_dir: {display_path(shard.path)} cannot be written ({error})") from None


def _uncached(dataset: FastMRIDataset, number: int) -> FastMRIDataset:
    """The dataset as its h5 files give it, under one mask."""
    plain = FastMRIDataset.__new__(FastMRIDataset)
    vars(plain).update(vars(dataset))
    plain.epoch = number
    return plain


def _input_bytes(dataset: FastMRIDataset, index: int) -> int:
    """Bytes of a slice's sampled lines, mask, scale and target."""
    number, slice_num = dataset.samples[index]
    volume, config = dataset.volumes[number], dataset.config
    readout, width, padding, image_shape = volume.readout, volume.matrix[1], volume.padding, volume.image_shape
    if config.crop == "image":
        readout = width = config.img_size
        padding, image_shape = (0, width), (width, width)
    if volume.has_mask:
        lines = width  # at most; such files are for testing
    else:
        seed = dataset._mask_seed(volume, slice_num)
        lines = int(masks_module.sample_mask(dataset.mask_func, width, seed, padding)[0].sum())
    target = 4 * image_shape[0] * image_shape[1] if volume.has_target else 0
    return 8 * min(volume.coils, config.num_coils) * readout * lines + width + 8 + target


def _still_missing(shards: Sequence[Shard], loading: deque[Shard]) -> Iterator[list[int]]:
    for shard in shards:
        if not shard.path.exists():
            loading.append(shard)
            yield list(shard.indices)


def _write(path: Path, content: bytes) -> None:
    """Write a file whole under a name of this process, then rename it: readers and other writers never see a part."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _autocast(model: TwoStageModel, config: Stage2Parameters) -> torch.autocast:
    """The precision that stage 2 trains in."""
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=config.mixed_precision == "bf16")


@torch.no_grad()
def token_bytes(model: TwoStageModel, config: Stage2Parameters) -> int:
    """Bytes of one image token in the type that the backbone gives it."""
    width = hidden_size(model.backbone)
    with _autocast(model, config):
        token = model.hidden_states(torch.zeros(1, 3, width, device=model.device))
    return width * token.element_size()


def read_entry(shard: Shard, row: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and facts of one slice; None if the shard is missing, damaged, or another one under this name."""
    try:
        with safe_open(shard.path, framework="pt") as file:
            # One entry: the library writes several in an order that differs from time to time.
            content = json.loads(file.metadata()["shard"])
            if content["key"] != shard.key:
                return None
            facts = content["rows"][row]
            prefix = f"{row}."
            tensors = {
                name.removeprefix(prefix): file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118  (it is no dict)
                if name.startswith(prefix)
            }
        checksum = facts.pop("checksum")
    except (FileNotFoundError, SafetensorError, LookupError, ValueError, TypeError, AttributeError):
        return None
    return (tensors, facts) if checksum == _checksum(tensors, facts) else None


def _checksum(tensors: dict[str, Tensor], facts: dict[str, Any]) -> int:
    """CRC-32 over names, types, shapes, bytes and facts."""
    value = zlib.crc32(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return value


# ------------------------------------------------------------------------------------------------ keys


def describe(model: TwoStageModel, config: Stage2Parameters) -> dict[str, Any]:
    """All that image tokens and decoder inputs depend on, but for the data and the mask's number."""
    packages = versions()
    vit: Any = model.encoder.vit
    path = delta_rule_path(model.backbone, config)
    return {
        "format": FORMAT,
        "encoder": tensor_hash(model.encoder),
        "encoder_config": _plain(vit.config.to_dict()),
        "backbone": tensor_hash(model.backbone),
        "backbone_config": _plain(model.backbone.config.to_dict()),
        "code": hashlib.sha256("".join(_code(Path(str(m.__file__))) for m in COMPUTING_CODE).encode()).hexdigest(),
        "versions": {name: packages[name] for name in ("torch", "transformers", "fastmri", "numpy")},
        "device": model.device.type,
        "delta_rule": [path["path"], path.get("package")],
        **{name: getattr(config, name) for name in ("mixed_precision", "num_coils", "img_size", "crop", "mask_type")},
    }


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """A configuration without where it came from, as JSON."""
    kept = {k: v for k, v in settings.items() if not k.startswith("_") and k != "transformers_version"}
    return json.loads(json.dumps(kept, default=str))


def _code(path: Path) -> str:
    """A module's code without comments and docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_digests(paths: Sequence[Path], manifest: Path) -> dict[Path, str]:
    """SHA-256 of files' bytes.

    A file is read once: its digest is kept in `manifest` beside size, inode and times, and believed as long as these
    are the same. The change time is the kernel's own, so that no write goes unseen; a file that changed within two
    seconds of being read is read again, as the clock of a file system may be that coarse.
    """
    known = _read_manifest(manifest)
    states = {path: _state(path) for path in paths}
    unknown = [path for path in paths if known.get(str(path), {}).get("state") != states[path]]
    if unknown:
        gigabytes = sum(states[path][0] for path in unknown) / 1e9
        logger.info("token cache: reading %d data files to hash them, %.1f GB", len(unknown), gigabytes)
    with ThreadPoolExecutor(4) as executor:  # hashing leaves the interpreter to others
        hashed = dict(zip(unknown, executor.map(_digest, unknown), strict=True))
    digests = {path: hashed.get(path) or known[str(path)]["sha256"] for path in paths}
    now = time.time()
    settled = {path: digest for path, digest in hashed.items() if now - states[path][-1] / 1e9 > 2}
    if settled:
        entries = {str(path): {"state": states[path], "sha256": digest} for path, digest in settled.items()}
        _write(manifest, json.dumps({**known, **entries}, indent=0).encode())
    return digests


def _read_manifest(path: Path) -> dict[str, Any]:
    """What is known of files; nothing if a power cut, say, has damaged it: they are read again then."""
    try:
        known = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return {name: entry for name, entry in known.items() if isinstance(entry, dict)} if isinstance(known, dict) else {}


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
