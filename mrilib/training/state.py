"""The state of a training: everything that the next step depends on, and its checkpoints in the run folder."""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from mrilib import environment, files
from mrilib.config import TrainingParameters, display_path
from mrilib.model.two_stage import count_parameters
from mrilib.training.checkpoint import CheckpointError, checkpoint_path, load_checkpoint, save_checkpoint
from mrilib.training.device import rng_state, set_rng_state
from mrilib.training.distributed import TrainingStopped, gather_from_processes
from mrilib.training.history import History, epochs_path, steps_path, write_epochs
from mrilib.training.load_state import load_optimizer, load_scaler, load_schedule, load_weights
from mrilib.training.resume import check_progress, check_same_training, require_resume
from mrilib.training.stages import Stage

logger = logging.getLogger("mrilib")


class TrainingState:
    """Weights, optimizer, schedule, random numbers, steps and epochs of a training, and its step and epoch logs.

    Parameters
    ----------
    stage : Stage
    config : TrainingParameters
    directory : Path
        The run folder.
    accelerator : Accelerator
    optimizer : Optimizer
    schedule : LRScheduler
    scaler : GradScaler
    identity : dict
        Stored in checkpoints; a resumed training must have the same, see `resume.training_identity`.

    Attributes
    ----------
    step, epoch : int
        Optimizer steps taken; epochs finished, validation included.
    history : History
    losses : list of float
        Of the current epoch's steps.
    epoch_seconds : float
        Time spent on the current epoch [s].
    micro_batch : int
        Slices per forward pass.
    rng : dict
        Random number states before the current step.
    """

    def __init__(
        self,
        stage: Stage,
        config: TrainingParameters,
        directory: Path,
        accelerator: Accelerator,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        scaler: torch.amp.GradScaler,
        identity: dict[str, Any],
    ) -> None:
        self.stage, self.config, self.directory, self.accelerator = stage, config, directory, accelerator
        self.optimizer, self.schedule, self.scaler, self.identity = optimizer, schedule, scaler, identity
        self.steps_path, self.epochs_path = steps_path(directory, stage.name), epochs_path(directory, stage.name)
        self.log: files.JsonLines | None = None
        self.history = History()
        self.step = self.epoch = 0
        self.losses: list[float] = []
        self.epoch_seconds = 0.0
        self.micro_batch = config.batch_size
        self.rng = rng_state()
        self.begin = self.last_save = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time of the training up to now, without the time between processes [s]."""
        return self.history.seconds + time.perf_counter() - self.begin

    def content(self) -> dict[str, Any]:
        """Content of a checkpoint. Every process must call it, because each has its own random numbers."""
        history = self.history
        return {
            "stage": self.stage.name,
            "epoch": self.epoch,
            "step": self.step,
            "micro_batch": self.micro_batch,
            "weights": self.stage.part.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": gather_from_processes(self.rng),
            "losses": self.losses,
            "history": {
                "epochs": history.epochs,
                "best_epoch": history.best_epoch,
                "best_loss": history.best_loss,
                "skipped": history.skipped,
            },
            **self.identity,
            "cost": {
                "seconds": self.seconds,
                "epoch_seconds": self.epoch_seconds,
                "peak_memory_bytes": environment.peak_memory_bytes(),
                "trainable_parameters": count_parameters(self.stage.part),
            },
        }

    # ---------------------------------------------------------------------------------------------------- saving

    def path(self, kind: str) -> Path:
        """Path of a checkpoint: best_model, final_model, resume or epoch_N."""
        return checkpoint_path(self.directory, self.stage.number, self.stage.name, kind)

    def save(self, kind: str) -> None:
        """Write a checkpoint, after the step log is on disk."""
        content = self.content()
        if self.accelerator.is_main_process:
            if self.log is not None:
                self.log.sync()
            save_checkpoint(self.path(kind), content)
        self.accelerator.wait_for_everyone()

    def save_to_resume(self) -> None:
        """Write the checkpoint that training resumes from."""
        self.save("resume")
        self.last_save = time.perf_counter()

    def save_and_stop(self) -> None:
        """Save the state and raise TrainingStopped."""
        name = self.stage.name
        self.save_to_resume()
        logger.info("%s stops on request after epoch %d, step %d", name, self.epoch, self.step)
        raise TrainingStopped(f"{name} was stopped after step {self.step} and saved; resume: true continues it")

    def save_final(self) -> None:
        """Write the final checkpoint, which replaces the one to resume from."""
        self.save("final_model")
        if self.accelerator.is_main_process:
            self.path("resume").unlink(missing_ok=True)

    @contextlib.contextmanager
    def saved_on_error(self) -> Iterator[None]:
        """Save the state if the block raises. The block must leave weights, optimizer and schedule as they are."""
        try:
            yield
        except TrainingStopped:
            raise
        except (Exception, KeyboardInterrupt):  # a notebook's interrupt is a KeyboardInterrupt
            if self.accelerator.num_processes == 1:  # the others cannot contribute their random numbers now
                try:
                    self.save_to_resume()
                except (OSError, RuntimeError) as error:  # e.g. a full disk; the previous checkpoint is intact
                    logger.error("%s: the state could not be saved: %s", self.stage.name, error)
            raise

    def end_epoch(self, row: dict[str, float]) -> None:
        """Count an epoch as finished, append its row to history and table, and save its checkpoints."""
        history = self.history
        history.epochs.append(row)
        self.epoch, self.losses, self.epoch_seconds = self.epoch + 1, [], 0.0
        if row["val_loss"] < history.best_loss:
            history.best_loss, history.best_epoch = row["val_loss"], self.epoch
            self.save("best_model")
        if self.epoch % self.config.save_interval == 0:
            self.save(f"epoch_{self.epoch}")
            self._delete_old_epochs()
        if self.accelerator.is_main_process:  # before the checkpoint: a resumed training does not add this row again
            write_epochs(self.epochs_path, history.epochs)
        self.save_to_resume()

    def _delete_old_epochs(self) -> None:
        """Delete all but the last `max_checkpoints` checkpoints epoch_N."""
        if self.accelerator.is_main_process and self.config.max_checkpoints:
            prefix = f"{self.stage.name}_epoch_"
            numbers = [path.stem.removeprefix(prefix) for path in self.path("").parent.glob(f"{prefix}*.pt")]
            epochs = sorted(int(number) for number in numbers if number.isdecimal())  # not a user's own copies
            for epoch in epochs[: -self.config.max_checkpoints]:
                self.path(f"epoch_{epoch}").unlink()

    # ------------------------------------------------------------------------------------------------- restoring

    def restore(self) -> bool:
        """Load the training that the run folder holds, if any; return whether it is finished.

        Raises
        ------
        ParameterError
            There is a training, but `config.resume` is false, or it has other parameters.
        """
        final, unfinished = self.path("final_model"), self.path("resume")
        path = final if final.exists() else unfinished
        if path.exists():
            require_resume(path, self.directory, self.stage.name, self.config)
            self.load(path)
            if path == final and self.accelerator.is_main_process:
                unfinished.unlink(missing_ok=True)  # left over if training was killed right after its end
            logger.info("%s resumes after epoch %d, step %d", self.stage.name, self.epoch, self.step)
        return path == final

    def load(self, path: Path) -> None:
        """Load a checkpoint.

        Raises
        ------
        ParameterError, CheckpointError
            It is damaged, or has other parameters, another backbone, encoder or model.
        """
        name, content = display_path(path), load_checkpoint(path, self.stage.name)
        check_same_training(content, self.identity, name)
        check_progress(content, self.identity["steps_per_epoch"], self.config, name)
        load_weights(self.stage.part, content["weights"], name)
        try:
            load_optimizer(self.optimizer, content["optimizer"])
            load_schedule(self.schedule, content["schedule"])
            load_scaler(self.scaler, content.get("scaler", {}))  # older checkpoints have none
        except ValueError as error:
            raise CheckpointError(f"checkpoint '{name}' does not fit this training: {error}") from None
        self.step, self.epoch, self.micro_batch = content["step"], content["epoch"], content["micro_batch"]
        self.losses, self.epoch_seconds = content["losses"], content["cost"]["epoch_seconds"]
        steps = [entry for entry in files.read_json_lines(self.steps_path) if entry["step"] <= self.step]
        self.history = History(steps=steps, seconds=content["cost"]["seconds"], **content["history"])
        self._load_rng(content["rng"], name)

    def _load_rng(self, states: list[dict[str, Any]], name: str) -> None:
        if len(states) != self.accelerator.num_processes:
            logger.warning("%s: the number of processes has changed; random numbers differ", self.stage.name)
            return
        self.rng = states[self.accelerator.process_index]
        try:
            set_rng_state(self.rng)
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"checkpoint '{name}': rng: not a random number state ({reason})") from None

    # ------------------------------------------------------------------------------------------------------ logs

    def open_log(self) -> None:
        """Open the step log, without steps after the present one."""
        if self.accelerator.is_main_process:
            self.log = files.JsonLines(self.steps_path, keep=lambda entry: entry["step"] <= self.step)

    def close_log(self) -> None:
        """Close the step log."""
        if self.log is not None:
            self.log.close()

    def log_step(self, entry: dict[str, float]) -> None:
        """Append a step to history and step log; only the main process has a log."""
        if self.log is not None:
            self.history.steps.append(entry)
            self.log.write(**entry)
