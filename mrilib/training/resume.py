"""What must be the same for a training to go on with what an earlier process has left of it."""

import hashlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from mrilib.config import ParameterError, Stage1Parameters, TrainingParameters, display_path
from mrilib.data.dataset import Batch, FastMRIDataset
from mrilib.training.checkpoint import CheckpointError, load_checkpoint

# What may differ when a training goes on: nothing that it learns depends on these, but by rounding.
FREE_ON_RESUME = frozenset(
    ("output_dir", "interactive", "resume", "num_workers", "device", "save_interval", "log_interval", "max_checkpoints",
     "checkpoint_minutes", "on_nan", "activation_checkpointing", "train_control",
     # Where things lie; that they are the same things is checked by their content.
     "data_dir", "val_dir", "test_dir", "backbone_path", "config_path", "stage1_checkpoint", "token_cache_dir")
)  # fmt: skip


def data_hash(*loaders: DataLoader[Batch]) -> str:
    """SHA-256 over the names and shapes of the slices that some loaders draw from, in order."""
    digest = hashlib.sha256()
    for loader in loaders:
        dataset = loader.dataset
        assert isinstance(dataset, FastMRIDataset)
        for index, (volume, number) in enumerate(dataset.samples):
            digest.update(f"{dataset.volumes[volume].file} {number} {dataset.shape_key(index)}\n".encode())
    return digest.hexdigest()


BLOCKS, BLOCK = 32, 4096  # of a data file that `data_content` reads; the blocks' length [bytes]


def data_content(*loaders: DataLoader[Batch]) -> str:
    """SHA-256 over a sample of what the slices of some loaders hold.

    Of each file its size and 32 blocks of 4 KiB, evenly spread from its first byte to its last; of each slice the
    findings and the user's own report. No dates: data may be copied to another place between two processes.
    """
    digest = hashlib.sha256()
    for loader in loaders:
        dataset = loader.dataset
        assert isinstance(dataset, FastMRIDataset)
        used = sorted({volume for volume, _ in dataset.samples})
        with ThreadPoolExecutor(8) as executor:
            samples = executor.map(_file_sample, [dataset.volumes[volume].path for volume in used])
            for volume, sample in zip(used, samples, strict=True):
                digest.update(f"{dataset.volumes[volume].file} {sample}\n".encode())
        for index, (number, slice_num) in enumerate(dataset.samples):
            own = dataset.reports.get((dataset.volumes[number].file, slice_num))
            digest.update(json.dumps([*_annotation(dataset, index), own]).encode() + b"\n")
    return digest.hexdigest()


def _annotation(dataset: FastMRIDataset, index: int) -> list[Any]:
    """What is known about a slice, as values: their classes may get further fields without refusing older runs."""
    facts = dataset.facts(index)
    findings = [[one.label, one.side, one.region] for one in facts.findings] if facts.findings is not None else None
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


def check_same_training(state: dict[str, Any], now: dict[str, Any], name: str) -> None:
    """Refuse to go on with another training.

    Parameters
    ----------
    state : dict
        A checkpoint's content.
    now : dict
        ``config``, ``data``, ``backbone`` and ``encoder`` as this process has them, parameters and hashes of content;
        and ``steps_per_epoch`` and ``data_content``, which older checkpoints do not hold.
    name : str
        The checkpoint's, for errors.

    Raises
    ------
    ParameterError
        It was begun with other parameters or data.
    CheckpointError
        It was trained with another backbone or encoder.
    """
    check_same_parameters(state["config"], now["config"], name)
    if state["data"] != now["data"] or state.get("data_content", now.get("data_content")) != now.get("data_content"):
        raise ParameterError(f"'{name}' was begun with other files, slices or texts than the data folders hold now")
    if (then_steps := state.get("steps_per_epoch", now["steps_per_epoch"])) != now["steps_per_epoch"]:
        raise ParameterError(
            f"'{name}' was begun with {then_steps} steps an epoch (now {now['steps_per_epoch']}); a training goes on "
            "with as many as it began with"
        )
    if state["backbone"] != now["backbone"]:
        raise CheckpointError(f"{name} was trained with another backbone; give its backbone_path")
    if state["encoder"] != now["encoder"]:
        raise CheckpointError(f"{name} was trained on the tokens of another stage-1 checkpoint")


def check_same_parameters(before: dict[str, Any], config: dict[str, Any], name: str) -> None:
    """Refuse to go on with other parameters than a checkpoint's, but for those in `FREE_ON_RESUME`.

    Raises
    ------
    ParameterError
        Naming each of them.
    """
    differ = [key for key in config | before if key not in FREE_ON_RESUME and config.get(key) != before.get(key)]
    # As many batches a step in another number of processes are the same steps.
    counts = [(c.get("gradient_accumulation_steps", 1), c.get("num_processes", 1)) for c in (config, before)]
    if all(type(count) is int for pair in counts for count in pair) and math.prod(counts[0]) == math.prod(counts[1]):
        differ = [key for key in differ if key not in ("gradient_accumulation_steps", "num_processes")]
    if differ:
        told = ", ".join(f"{key}: {str(before.get(key))[:200]} (now {config.get(key)})" for key in differ)
        raise ParameterError(f"'{name}' was begun with {told}; a training goes on with the parameters it began with")


def check_folder(directory: Path, config: TrainingParameters) -> None:
    """Refuse parameters that do not fit a training which a run folder holds; nothing is written.

    Raises
    ------
    ParameterError
        There is a training, but `config.resume` is false, or it was begun with other parameters.
    CheckpointError
        Its checkpoint is damaged.
    """
    number, names = (
        (1, ("stage1", "constant_prefix"))
        if isinstance(config, Stage1Parameters)
        else (2, ("stage2", "no_token_decoder"))
    )
    for name in names:
        final, unfinished = (
            directory / f"stage{number}_checkpoints" / f"{name}_{kind}.pt" for kind in ("final_model", "resume")
        )
        path = final if final.exists() else unfinished
        if path.exists():
            refuse_unasked(path, directory, name, config)
            check_same_parameters(load_checkpoint(path, name)["config"], config.to_dict(), display_path(path))


def refuse_unasked(path: Path, directory: Path, stage: str, config: TrainingParameters) -> None:
    """Refuse to go on with the training of a checkpoint unless `config.resume` asks for it."""
    if not config.resume:
        finished = "a finished" if "final" in path.name else "an unfinished"
        raise ParameterError(
            f"'{display_path(directory)}' holds {finished} training of {stage}; resume: true goes "
            "on with it, another output_dir leaves it alone"
        )


def check_progress(state: dict[str, Any], steps_per_epoch: int, config: TrainingParameters, name: str) -> None:
    """Refuse a checkpoint that counts steps, epochs or losses as no training of these parameters can.

    Raises
    ------
    CheckpointError
    """
    epoch, step, history = state["epoch"], state["step"], state["history"]
    first = epoch * steps_per_epoch
    best = history.get("best_epoch", 0)
    fits = {
        f"epoch {epoch} of {config.epochs}": epoch <= config.epochs,
        f"step {step} in epoch {epoch + 1}": first <= step <= min(epoch + 1, config.epochs) * steps_per_epoch,
        f"{len(state['losses'])} losses": len(state["losses"]) <= step - first,
        f"micro_batch {state['micro_batch']}": state["micro_batch"] <= config.batch_size,
        f"{len(history.get('epochs', []))} epochs in its history": len(history.get("epochs", [])) == epoch,
        f"best epoch {best}": best <= epoch,
        "an epoch of its history without its losses": all(
            {"epoch", "train_loss", "val_loss"} <= set(row) for row in history.get("epochs", [])
        ),
    }
    wrong = [told for told, right in fits.items() if not right]
    if wrong:
        raise CheckpointError(f"checkpoint '{name}' contradicts itself: {'; '.join(wrong)}")
