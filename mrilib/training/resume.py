"""Checks that a checkpoint belongs to the training that resumes from it."""

import hashlib
import json
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from mrilib.config import ParameterError, Stage1Parameters, TrainingParameters, display_path
from mrilib.data.dataset import Batch, FastMRIDataset
from mrilib.model.two_stage import tensor_hash
from mrilib.training.checkpoint import CheckpointError, checkpoint_path, load_checkpoint
from mrilib.training.stages import Stage

# Parameters that may change on resuming: the result depends on them by rounding at most.
FREE_ON_RESUME = frozenset(
    ("output_dir", "interactive", "resume", "num_workers", "device", "save_interval", "log_interval", "max_checkpoints",
     "checkpoint_minutes", "on_nan", "activation_checkpointing", "compile", "train_control",
     # Paths: the content of the files is compared instead.
     "data_dir", "val_dir", "test_dir", "backbone_path", "config_path", "stage1_checkpoint", "token_cache_dir")
)  # fmt: skip
BLOCKS, BLOCK = 32, 4096  # blocks of a data file that `data_content` reads; their length [bytes]


def training_identity(
    stage: Stage, config: TrainingParameters, loaders: Iterable[DataLoader[Batch]], steps_per_epoch: int
) -> dict[str, Any]:
    """Parameters, and hashes of data and frozen modules, as a checkpoint stores them for `check_same_training`."""
    loaders = tuple(loaders)
    hashes = {name: tensor_hash(module) for name, module in stage.frozen_modules().items()}
    return {
        "config": config.to_dict(),
        "data": data_hash(*loaders),
        "data_content": data_content(*loaders),
        "backbone": hashes.get("backbone", ""),
        "encoder": hashes.get("encoder", ""),
        "steps_per_epoch": steps_per_epoch,
    }


def data_hash(*loaders: DataLoader[Batch]) -> str:
    """SHA-256 over the files, numbers and shapes of the loaders' slices, in order."""
    digest = hashlib.sha256()
    for dataset in _datasets(loaders):
        for index, (volume, number) in enumerate(dataset.samples):
            digest.update(f"{dataset.volumes[volume].file} {number} {dataset.shape_key(index)}\n".encode())
    return digest.hexdigest()


def data_content(*loaders: DataLoader[Batch]) -> str:
    """SHA-256 over a sample of the content of the loaders' slices.

    It covers each file's size and 32 blocks of 4 KiB, evenly spread from first to last byte, and each slice's findings
    and report. Dates are left out, because data may be copied between two processes.
    """
    digest = hashlib.sha256()
    for dataset in _datasets(loaders):
        used = sorted({volume for volume, _ in dataset.samples})
        with ThreadPoolExecutor(8) as executor:
            samples = executor.map(_file_sample, [dataset.volumes[volume].path for volume in used])
            for volume, sample in zip(used, samples, strict=True):
                digest.update(f"{dataset.volumes[volume].file} {sample}\n".encode())
        for index, (number, slice_num) in enumerate(dataset.samples):
            report = dataset.reports.get((dataset.volumes[number].file, slice_num))
            digest.update(json.dumps([*_annotation(dataset, index), report]).encode() + b"\n")
    return digest.hexdigest()


def _datasets(loaders: Iterable[DataLoader[Batch]]) -> list[FastMRIDataset]:
    datasets = [loader.dataset for loader in loaders]
    assert all(isinstance(dataset, FastMRIDataset) for dataset in datasets)
    return datasets  # type: ignore[return-value]


def _annotation(dataset: FastMRIDataset, index: int) -> list[Any]:
    """List the findings of a slice as plain values, so that new fields of their classes do not refuse older runs."""
    facts = dataset.facts(index)
    findings = [[item.label, item.side, item.region] for item in facts.findings] if facts.findings is not None else None
    boxes = [[box.x, box.y, box.width, box.height, box.label] for box in dataset.boxes(index) or ()]
    return [facts.contrast, facts.level, findings, list(facts.study_labels), boxes]


def _file_sample(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for number in range(BLOCKS):
            file.seek(max(0, size - BLOCK) * number // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def check_same_training(content: dict[str, Any], identity: dict[str, Any], name: str) -> None:
    """Compare a checkpoint with the training that resumes from it.

    Parameters
    ----------
    content : dict
        Of the checkpoint. Older ones lack ``steps_per_epoch`` and ``data_content``.
    identity : dict
        From `training_identity`.
    name : str
        Of the checkpoint, for error messages.

    Raises
    ------
    ParameterError
        The checkpoint has other parameters or data.
    CheckpointError
        The checkpoint has another backbone or encoder.
    """
    check_same_parameters(content["config"], identity["config"], name)
    before = {key: content.get(key, identity[key]) for key in ("data", "data_content", "steps_per_epoch")}
    if any(before[key] != identity[key] for key in ("data", "data_content")):
        raise ParameterError(f"'{name}' has other files, slices or texts than the data folders have now")
    if before["steps_per_epoch"] != identity["steps_per_epoch"]:
        raise ParameterError(
            f"'{name}' has {before['steps_per_epoch']} steps an epoch (now {identity['steps_per_epoch']}); "
            "resume with the same number"
        )
    if content["backbone"] != identity["backbone"]:
        raise CheckpointError(f"{name} was trained with another backbone; give its backbone_path")
    if content["encoder"] != identity["encoder"]:
        raise CheckpointError(f"{name} was trained on the tokens of another stage-1 checkpoint")


def check_same_parameters(before: dict[str, Any], now: dict[str, Any], name: str) -> None:
    """Compare a checkpoint's parameters with the present ones, except those in `FREE_ON_RESUME`.

    Raises
    ------
    ParameterError
        The message names each parameter that differs.
    """
    differ = [key for key in now | before if key not in FREE_ON_RESUME and now.get(key) != before.get(key)]
    # Steps are the same if accumulation times processes is.
    counts = [(c.get("gradient_accumulation_steps", 1), c.get("num_processes", 1)) for c in (now, before)]
    if all(type(count) is int for pair in counts for count in pair) and math.prod(counts[0]) == math.prod(counts[1]):
        differ = [key for key in differ if key not in ("gradient_accumulation_steps", "num_processes")]
    if differ:
        changes = ", ".join(f"{key}: {str(before.get(key))[:200]} (now {now.get(key)})" for key in differ)
        raise ParameterError(f"'{name}' was begun with {changes}; resume with the same parameters")


def check_folder(directory: Path, config: TrainingParameters) -> None:
    """Check that a run folder holds no training, or one that may be resumed with these parameters; writes nothing.

    Raises
    ------
    ParameterError
        There is a training, but `config.resume` is false or its parameters differ.
    CheckpointError
        Its checkpoint is damaged.
    """
    is_stage1 = isinstance(config, Stage1Parameters)
    for name in ("stage1", "constant_prefix") if is_stage1 else ("stage2", "no_token_decoder"):
        paths = (checkpoint_path(directory, 1 if is_stage1 else 2, name, kind) for kind in ("final_model", "resume"))
        path = next((path for path in paths if path.exists()), None)
        if path is not None:
            require_resume(path, directory, name, config)
            check_same_parameters(load_checkpoint(path, name)["config"], config.to_dict(), display_path(path))


def require_resume(path: Path, directory: Path, stage: str, config: TrainingParameters) -> None:
    """Raise ParameterError if a training exists, with checkpoint `path`, and `config.resume` is false."""
    if not config.resume:
        kind = "a finished" if "final" in path.name else "an unfinished"
        raise ParameterError(
            f"'{display_path(directory)}' holds {kind} training of {stage}; set resume: true to continue it, "
            "or choose another output_dir"
        )


def check_progress(content: dict[str, Any], steps_per_epoch: int, config: TrainingParameters, name: str) -> None:
    """Refuse a checkpoint with impossible numbers of steps, epochs or losses.

    Raises
    ------
    CheckpointError
    """
    epoch, step, losses, micro_batch = (content[key] for key in ("epoch", "step", "losses", "micro_batch"))
    rows, best = content["history"].get("epochs", []), content["history"].get("best_epoch", 0)
    first = epoch * steps_per_epoch
    last = min(epoch + 1, config.epochs) * steps_per_epoch
    is_possible = {
        f"epoch {epoch} of {config.epochs}": epoch <= config.epochs,
        f"step {step} in epoch {epoch + 1}": first <= step <= last,
        f"{len(losses)} losses": len(losses) <= step - first,
        f"micro_batch {micro_batch}": micro_batch <= config.batch_size,
        f"{len(rows)} epochs in its history": len(rows) == epoch,
        f"best epoch {best}": best <= epoch,
        "an epoch of its history without its losses": all({"epoch", "train_loss", "val_loss"} <= set(r) for r in rows),
    }
    wrong = [fact for fact, possible in is_possible.items() if not possible]
    if wrong:
        raise CheckpointError(f"checkpoint '{name}' contradicts itself: {'; '.join(wrong)}")
