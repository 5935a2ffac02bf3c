"""What must be the same for a training to go on with what an earlier process has left of it."""

import hashlib
from typing import Any

from torch.utils.data import DataLoader

from mrilib.checkpoint import CheckpointError
from mrilib.config import ParameterError, with_defaults
from mrilib.data import Batch, FastMRIDataset

# What may differ when a training goes on: nothing that it learns depends on these, but by rounding.
FREE_ON_RESUME = frozenset(
    ("output_dir", "interactive", "resume", "num_workers", "device", "save_interval", "log_interval", "max_checkpoints",
     "checkpoint_minutes", "log_with", "on_nan", "auto_batch_size", "activation_checkpointing", "train_control",
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


def check_same_training(state: dict[str, Any], now: dict[str, Any], name: str) -> None:
    """Refuse to go on with another training.

    Parameters
    ----------
    state : dict
        A checkpoint's content.
    now : dict
        ``config``, ``data``, ``backbone`` and ``encoder`` as this process has them, parameters and hashes of content;
        and ``steps_per_epoch``, which older checkpoints do not hold.
    name : str
        The checkpoint's, for errors.

    Raises
    ------
    ParameterError
        It was begun with other parameters or data.
    CheckpointError
        It was trained with another backbone or encoder.
    """
    config, then = now["config"], with_defaults(state["config"], now["config"])
    differ = [key for key in config | then if key not in FREE_ON_RESUME and config.get(key) != then.get(key)]
    # As many batches a step in another number of processes are the same steps.
    batches = [c.get("gradient_accumulation_steps", 1) * c.get("num_processes", 1) for c in (config, then)]
    if batches[0] == batches[1]:
        differ = [key for key in differ if key not in ("gradient_accumulation_steps", "num_processes")]
    if differ:
        told = ", ".join(f"{key}: {then.get(key)} (now {config.get(key)})" for key in differ)
        raise ParameterError(f"'{name}' was begun with {told}; a training goes on with the parameters it began with")
    if state["data"] != now["data"]:
        raise ParameterError(f"'{name}' was begun with other files or slices than data_dir and val_dir hold now")
    if (then_steps := state.get("steps_per_epoch", now["steps_per_epoch"])) != now["steps_per_epoch"]:
        raise ParameterError(
            f"'{name}' was begun with {then_steps} steps an epoch (now {now['steps_per_epoch']}); a training goes on "
            "with as many as it began with"
        )
    if state["backbone"] != now["backbone"]:
        raise CheckpointError(f"{name} was trained with another backbone; give its backbone_path")
    if state["encoder"] != now["encoder"]:
        raise CheckpointError(f"{name} was trained on the tokens of another stage-1 checkpoint")
