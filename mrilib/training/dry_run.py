"""What a training run will take, measured on its largest batch: memory, time per epoch, disk.

`fit` itself runs: the same step, validation batch and checkpoint as in earnest, in a folder that is removed again.
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
from typing import Any

from tqdm import tqdm

from mrilib.config import Stage1Parameters, Stage2Parameters, resolve
from mrilib.data.dataset import FastMRIDataset
from mrilib.data.sampler import collate, make_loader
from mrilib.environment import peak_memory_bytes
from mrilib.training import loop, setup
from mrilib.training.setup import Loaders
from mrilib.training.token_cache import TokenCache

GB = 1e9


@dataclass
class Report:
    """What one stage takes; times in seconds, sizes in bytes."""

    stage: str
    device: str
    batch: tuple[int, ...]  # slices, coils, readout, phase of the batch that was measured
    peak_memory_bytes: int  # of the process, from its start; on CUDA what PyTorch allocated
    step_seconds: float  # one step of the optimizer
    load_seconds: float  # one batch from the h5 files, in one process
    validation_seconds: float  # one validation batch
    steps_per_epoch: int
    epoch_seconds: float  # all steps and the validation
    epochs: int
    checkpoint_bytes: int  # one checkpoint
    checkpoints: int  # at most at a time: best, last, one being written, and those kept every save_interval epochs
    token_cache_bytes: int  # 0: no token cache
    token_cache_seconds: float  # to fill it, once
    free_bytes: int  # on the disk of the run folder

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        return asdict(self)

    def text(self) -> str:
        """The report in words, one fact a line."""
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
        short = total + self.token_cache_bytes > self.free_bytes
        lines.append(f"  free on disk  {self.free_bytes / GB:.1f} GB{': TOO LITTLE for these' if short else ''}")
        return "\n".join(lines)


def report(config: Stage1Parameters | Stage2Parameters, keep: Path | None = None) -> Report:
    """Train one stage for one step (three on CUDA, the first of which compile), validate one batch, save.

    Parameters
    ----------
    config : Stage1Parameters or Stage2Parameters
        The run's own. Stage 2 needs its stage-1 checkpoint.
    keep : Path, optional
        Receives the checkpoints and logs of the dry run; else they are removed.

    Notes
    -----
    On a CPU the peak is that of the whole process: call `report_in_subprocess` where it has done other things before.
    """
    device = setup.prepare(config)
    stage = setup.build_stage(config, device)
    loaders = setup.make_loaders(config)
    train, val = loaders.train_data, loaders.val_data
    train_batches, val_batches = len(loaders.train), len(loaders.val)
    cache_bytes, entries, fill_seconds = 0, 0, 0.0
    if isinstance(config, Stage2Parameters) and config.token_cache_dir:
        cache_bytes = TokenCache(stage.model, config).total_bytes(train, val)
        entries = len(train) * min(config.epochs, config.masks_per_slice) + len(val)
    steps = 3 if device.type == "cuda" else 1
    only_largest(train, config.batch_size, steps * config.gradient_accumulation_steps)
    only_largest(val, config.batch_size, 1)

    validation_seconds: list[float] = []
    _time_calls(stage, "score", validation_seconds)
    parent = resolve(config.output_dir or "outputs")
    parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="dry-run-", dir=parent)) if keep is None else keep
    try:
        short = config.model_copy(
            update={"epochs": 1, "early_stopping_patience": 0, "num_processes": 1, "resume": False}
        )
        loaders = Loaders(loaders.split, make_loader(train, config.batch_size), make_loader(val, config.batch_size))
        if isinstance(short, Stage2Parameters) and short.token_cache_dir:
            short = short.model_copy(update={"token_cache_dir": str(directory / "token_cache")})
            begin = time.perf_counter()
            loaders = setup.stage_loaders(short, stage, loaders)
            fill_seconds = (time.perf_counter() - begin) / (len(train) + len(val)) * entries
        load_seconds, shape = _time_loading(loaders.train_data, config.batch_size)
        history = loop.fit(stage, short, loaders.train, loaders.val, directory)
        (checkpoint,) = directory.glob(f"*_checkpoints/{stage.name}_final_model.pt")
        checkpoint_bytes = checkpoint.stat().st_size
    finally:
        if keep is None:
            shutil.rmtree(directory)
    step_seconds = min(step["seconds"] for step in history.steps)
    accumulate = config.gradient_accumulation_steps
    loading = accumulate * load_seconds / max(1, config.num_workers)
    # Without workers the steps wait for the data; with them the slower of the two sets the pace.
    pace = max(step_seconds, loading) if config.num_workers else step_seconds + loading
    steps_per_epoch = math.ceil(train_batches / accumulate)
    kept = config.epochs // config.save_interval
    return Report(
        stage=stage.name,
        device=str(device),
        batch=shape,
        peak_memory_bytes=peak_memory_bytes(),
        step_seconds=step_seconds,
        load_seconds=load_seconds,
        validation_seconds=sum(validation_seconds),
        steps_per_epoch=steps_per_epoch,
        epoch_seconds=steps_per_epoch * pace + val_batches * sum(validation_seconds),
        epochs=config.epochs,
        checkpoint_bytes=checkpoint_bytes,
        checkpoints=3 + min(kept, config.max_checkpoints or kept),
        token_cache_bytes=cache_bytes,
        token_cache_seconds=fill_seconds,
        free_bytes=shutil.disk_usage(parent).free,
    )


def report_in_subprocess(
    config: Stage1Parameters | Stage2Parameters, keep: Path | None = None, progress: bool = True
) -> Report:
    """`report` in a fresh process, so that the peak is the stage's own; without `progress` it shows no bars."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=None if progress else _quietly) as executor:
        return executor.submit(report, config, keep).result()


def _quietly() -> None:
    """Neither bars nor the advice on loading processes: a notebook's record would keep both."""
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)  # type: ignore[assignment,method-assign]


def only_largest(dataset: FastMRIDataset, batch_size: int, batches: int) -> None:
    """Leave a dataset the slices of its largest shape, as many as `batches` take (over again if there are fewer)."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index in range(len(dataset)):
        groups[dataset.shape_key(index)].append(index)
    largest = max(groups.values(), key=lambda group: (min(len(group), batch_size), _pixels(dataset, group[0])))
    size = min(len(largest), batch_size) * batches
    dataset.samples = [dataset.samples[largest[i % len(largest)]] for i in range(size)]


def _pixels(dataset: FastMRIDataset, index: int) -> int:
    volume = dataset.volumes[dataset.samples[index][0]]
    return min(volume.coils, dataset.config.num_coils) * volume.readout * volume.matrix[1]


def _time_loading(dataset: Any, batch_size: int) -> tuple[float, tuple[int, ...]]:
    begin = time.perf_counter()
    batch = collate([dataset[index] for index in range(min(batch_size, len(dataset)))])
    return time.perf_counter() - begin, tuple(batch.kspace.shape)


def _time_calls(owner: Any, name: str, seconds: list[float]) -> None:
    function = getattr(owner, name)

    def timed(*arguments: Any) -> Any:
        begin = time.perf_counter()
        result = function(*arguments)
        seconds.append(time.perf_counter() - begin)
        return result

    setattr(owner, name, timed)
