"""Memory, time per epoch and disk space of a training, measured on its largest batch.

`loop.fit` runs with the parameters of the real training, in a temporary folder.
"""

import functools
import math
import multiprocessing
import shutil
import tempfile
import time
import warnings
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from mrilib.config import Stage2Parameters, resolve
from mrilib.data.dataset import Batch, FastMRIDataset
from mrilib.data.sampler import collate, make_loader
from mrilib.environment import peak_memory_bytes
from mrilib.training import loop, setup
from mrilib.training.setup import Loaders, StageParameters
from mrilib.training.stages import Stage
from mrilib.training.token_cache import TokenCache

GB = 1e9


@dataclass
class Report:
    """Measured and extrapolated cost of one stage; times in seconds, sizes in bytes."""

    stage: str
    device: str
    batch: tuple[int, ...]  # slices, coils, readout, phase of the measured batch
    peak_memory_bytes: int  # of the process, from its start; on CUDA what PyTorch allocated
    step_seconds: float  # of one optimizer step
    load_seconds: float  # of one batch from h5 files, in one process
    validation_seconds: float  # of one batch
    steps_per_epoch: int
    epoch_seconds: float  # of all steps and the validation
    epochs: int
    checkpoint_bytes: int  # of one checkpoint
    checkpoints: int  # at most at a time: best, last, one being written, and every save_interval epochs
    token_cache_bytes: int  # 0 without token cache
    token_cache_seconds: float  # to fill it, once
    free_bytes: int  # on the disk of the run folder

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain numbers, strings and lists."""
        return asdict(self)

    def text(self) -> str:
        """Format as text, one fact a line."""
        slices, coils, readout, phase = self.batch
        total = self.checkpoint_bytes * self.checkpoints
        hours = self.epoch_seconds * self.epochs / 3600
        lines = [
            f"{self.stage} on {self.device}, measured on its largest batch: "
            f"{slices} slices, {coils} coils, {readout}×{phase}",
            f"  peak memory   {self.peak_memory_bytes / GB:.1f} GB",
            f"  one step      {self.step_seconds:.2f} s, loading its slices {self.load_seconds:.2f} s in one process",
            f"  one epoch     {self.epoch_seconds / 60:.1f} min: {self.steps_per_epoch} steps and the validation; "
            f"{hours:.1f} h for {self.epochs} epochs, without the control",
            f"  checkpoints   {total / GB:.2f} GB: {self.checkpoints} of {self.checkpoint_bytes / GB:.2f} GB",
        ]
        if self.token_cache_bytes:
            minutes = self.token_cache_seconds / 60
            lines.append(f"  token cache   {self.token_cache_bytes / GB:.2f} GB, filled once in {minutes:.1f} min")
        is_short = total + self.token_cache_bytes > self.free_bytes
        lines.append(f"  free on disk  {self.free_bytes / GB:.1f} GB{': TOO LITTLE for these' if is_short else ''}")
        return "\n".join(lines)


class Measurement(NamedTuple):
    """What a training of one epoch on the largest batch takes."""

    batch: tuple[int, ...]
    step_seconds: float
    load_seconds: float
    validation_seconds: float
    fill_seconds: float  # for one entry of the token cache
    checkpoint_bytes: int


def report(config: StageParameters, keep: Path | None = None) -> Report:
    """Train a stage for one step (three on CUDA, because the first ones compile), validate one batch, and save.

    Parameters
    ----------
    config : Stage1Parameters or Stage2Parameters
        Of the run. Stage 2 needs its stage-1 checkpoint.
    keep : Path, optional
        Folder for checkpoints and logs, which are otherwise removed.

    Notes
    -----
    On a CPU, the peak memory is that of the whole process: use `report_in_subprocess` if it has done other work.
    """
    device = setup.prepare(config)
    stage = setup.build_stage(config, device)
    loaders = setup.make_loaders(config)
    train, val = loaders.train_data, loaders.val_data
    train_batches, val_batches = len(loaders.train), len(loaders.val)
    cache_bytes, entries = 0, 0
    if isinstance(config, Stage2Parameters) and config.token_cache_dir:
        cache_bytes = TokenCache(stage.model, config).total_bytes(train, val)
        entries = len(train) * min(config.epochs, config.masks_per_slice) + len(val)
    steps = 3 if device.type == "cuda" else 1
    only_largest(train, config.batch_size, steps * config.gradient_accumulation_steps)
    only_largest(val, config.batch_size, 1)
    loaders = Loaders(loaders.split, make_loader(train, config.batch_size), make_loader(val, config.batch_size))
    parent = resolve(config.output_dir or "outputs")
    parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="dry-run-", dir=parent)) if keep is None else keep
    try:
        measured = _measure(config, stage, loaders, directory)
    finally:
        if keep is None:
            shutil.rmtree(directory)
    loading = config.gradient_accumulation_steps * measured.load_seconds / max(1, config.num_workers)
    # Without workers, steps wait for the data; with workers, the slower of the two sets the pace.
    step = measured.step_seconds
    pace = max(step, loading) if config.num_workers else step + loading
    steps_per_epoch = math.ceil(train_batches / config.gradient_accumulation_steps)
    saved_epochs = config.epochs // config.save_interval
    return Report(
        stage=stage.name,
        device=str(device),
        batch=measured.batch,
        peak_memory_bytes=peak_memory_bytes(),
        step_seconds=step,
        load_seconds=measured.load_seconds,
        validation_seconds=measured.validation_seconds,
        steps_per_epoch=steps_per_epoch,
        epoch_seconds=steps_per_epoch * pace + val_batches * measured.validation_seconds,
        epochs=config.epochs,
        checkpoint_bytes=measured.checkpoint_bytes,
        checkpoints=3 + min(saved_epochs, config.max_checkpoints or saved_epochs),
        token_cache_bytes=cache_bytes,
        token_cache_seconds=measured.fill_seconds * entries,
        free_bytes=shutil.disk_usage(parent).free,
    )


def _measure(config: StageParameters, stage: Stage, loaders: Loaders, directory: Path) -> Measurement:
    """Train a stage for one epoch on a few slices."""
    short = config.model_copy(update={"epochs": 1, "early_stopping_patience": 0, "num_processes": 1, "resume": False})
    fill_seconds = 0.0
    if isinstance(short, Stage2Parameters) and short.token_cache_dir:
        short = short.model_copy(update={"token_cache_dir": str(directory / "token_cache")})
        begin = time.perf_counter()
        loaders = setup.stage_loaders(short, stage, loaders)
        fill_seconds = (time.perf_counter() - begin) / (len(loaders.train_data) + len(loaders.val_data))
    begin = time.perf_counter()
    dataset = loaders.train_data
    batch = collate([dataset[index] for index in range(min(config.batch_size, len(dataset)))])
    load_seconds = time.perf_counter() - begin
    score, validation_seconds = stage.score, 0.0

    def timed_score(batch: Batch) -> list[dict[str, Any]]:
        nonlocal validation_seconds
        begin = time.perf_counter()
        scores = score(batch)
        validation_seconds += time.perf_counter() - begin
        return scores

    stage.score = timed_score  # type: ignore[method-assign]
    history = loop.fit(stage, short, loaders.train, loaders.val, directory)
    (checkpoint,) = directory.glob(f"*_checkpoints/{stage.name}_final_model.pt")
    step_seconds = min(entry["seconds"] for entry in history.steps)
    return Measurement(
        tuple(batch.kspace.shape),
        step_seconds,
        load_seconds,
        validation_seconds,
        fill_seconds,
        checkpoint.stat().st_size,
    )


def report_in_subprocess(config: StageParameters, keep: Path | None = None, progress: bool = True) -> Report:
    """Call `report` in a fresh process, so that the peak memory is the stage's alone; optionally without bars."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=None if progress else _silence) as executor:
        return executor.submit(report, config, keep).result()


def _silence() -> None:
    """Disable progress bars and the warning on loading processes, which a notebook's record would show."""
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)  # type: ignore[assignment,method-assign]


def only_largest(dataset: FastMRIDataset, batch_size: int, batches: int) -> None:
    """Reduce a dataset to `batches` batches of slices of its largest shape; slices repeat if there are too few."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index in range(len(dataset)):
        groups[dataset.shape_key(index)].append(index)
    largest = max(groups.values(), key=lambda group: (min(len(group), batch_size), _pixels(dataset, group[0])))
    size = min(len(largest), batch_size) * batches
    dataset.samples = [dataset.samples[largest[i % len(largest)]] for i in range(size)]


def _pixels(dataset: FastMRIDataset, index: int) -> int:
    volume = dataset.volumes[dataset.samples[index][0]]
    return min(volume.coils, dataset.config.num_coils) * volume.readout * volume.matrix[1]
