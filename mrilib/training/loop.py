"""The training loop, the same for all stages: it can be killed at any moment and goes on where it was.

A `Trainer`'s state is everything that the next step depends on: weights, optimizer, schedule, random numbers, steps and
epochs done. The order of the slices is a function of (seed, epoch), a training mask one of (seed, file, slice, epoch)
and of how often the epoch has seen the slice: going on means leaving out batches, unread.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils.memory import should_reduce_batch_size
from torch.utils.data import DataLoader
from transformers import get_scheduler

from mrilib import environment, files, processes, progress
from mrilib.config import TrainingParameters, display_path
from mrilib.data.dataset import Batch, FastMRIDataset
from mrilib.data.sampler import ShapeBatchSampler, loading_error
from mrilib.model.two_stage import count_parameters, tensor_hash
from mrilib.training import distributed
from mrilib.training.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_optimizer,
    load_schedule,
    load_weights,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from mrilib.training.distributed import TrainingStopped, gather_from_processes, is_launched
from mrilib.training.gradients import Part, StepGradients, combine_statistics, out_of_memory
from mrilib.training.history import History, epochs_path, read_history, steps_path, write_epochs
from mrilib.training.optimizer import build_optimizer
from mrilib.training.resume import (
    check_progress,
    check_same_training,
    data_content,
    data_hash,
    refuse_unasked,
)
from mrilib.training.stages import Stage

if TYPE_CHECKING:
    from mrilib.training.stages import Stage

logger = logging.getLogger("mrilib")
T = TypeVar("T")
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def total_steps(config: TrainingParameters, steps_per_epoch: int) -> int:
    """Optimizer steps of a training: those of its epochs, or `max_steps` if that ends it before."""
    steps = config.epochs * steps_per_epoch
    return min(steps, config.max_steps) if config.max_steps else steps


class Trainer:
    """One training of one stage in one run folder; see `training.fit` for the parameters.

    Attributes
    ----------
    history : History
    step, epoch : int
        Steps taken; epochs finished, validation included.
    """

    def __init__(
        self,
        stage: "Stage",
        config: TrainingParameters,
        train_loader: DataLoader[Batch],
        val_loader: DataLoader[Batch],
        directory: Path,
        interactive: bool = False,
        on_step: Callable[[dict[str, float]], None] | None = None,
        on_epoch: Callable[[History], None] | None = None,
    ) -> None:
        self.stage, self.config, self.directory = stage, config, directory
        self.train_loader, self.val_loader = train_loader, val_loader
        self.steps_path, self.epochs_path = steps_path(directory, stage.name), epochs_path(directory, stage.name)
        self.interactive, self.on_step, self.on_epoch = interactive, on_step, on_epoch
        AcceleratorState._reset_state()  # else a notebook that is run again with another precision is refused
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            cpu=stage.model.device.type == "cpu",
            project_dir=directory / "logs",
        )
        self.parameters = stage.model.freeze(stage.trainable)
        for parameter in self.parameters if self.accelerator.num_processes > 1 else ():
            torch.distributed.broadcast(parameter.data, 0)
        self.optimizer = build_optimizer(self.parameters, config)
        # Batches of one step, over all processes; what this process takes of them is up to the sampler.
        launched = self.accelerator.num_processes if distributed.is_launched() else config.num_processes
        self.step_batches = config.gradient_accumulation_steps * launched
        self.steps_per_epoch = -(-self.sampler.total // self.step_batches)
        self.total_steps = total_steps(config, self.steps_per_epoch)
        self.epochs = -(-self.total_steps // self.steps_per_epoch)
        self.schedule = get_scheduler(
            SCHEDULES[config.lr_schedule],
            self.optimizer,
            num_warmup_steps=round(config.warmup_ratio * self.total_steps),
            num_training_steps=self.total_steps,
        )
        self.data_hash = data_hash(train_loader, val_loader)
        self.data_content = data_content(train_loader, val_loader)
        # what the trained part depends on; a decoder without tokens depends on neither
        model = stage.model
        self.backbone_hash = tensor_hash(model.backbone) if model.uses_tokens else ""
        self.encoder_hash = tensor_hash(model.encoder) if model.uses_tokens and stage.trainable == "decoder" else ""
        self.history = History()
        self.step = self.epoch = 0
        self.gradients = StepGradients(stage, self.parameters, self.accelerator, config)
        self.losses: list[float] = []  # of this epoch's steps
        self.epoch_seconds = 0.0  # spent on this epoch by earlier processes
        self.begin = time.perf_counter()
        self.last_save = time.perf_counter()
        self.rng = rng_state()  # before the step that is under way
        self.log: files.JsonLines | None = None

    # ------------------------------------------------------------------------------------------ where things are

    @property
    def sampler(self) -> ShapeBatchSampler:
        """The training loader's own, which can leave out batches and share them out among processes."""
        sampler = self.train_loader.batch_sampler
        if not isinstance(sampler, ShapeBatchSampler):
            raise TypeError("the training loader must come from data.make_loader: another order cannot be resumed")
        return sampler

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.accelerator.is_main_process

    def checkpoint_path(self, name: str) -> Path:
        """``stage1_checkpoints/stage1_best_model.pt`` and its like."""
        number = 1 if self.stage.trainable == "encoder" else 2
        return self.directory / f"stage{number}_checkpoints" / f"{self.stage.name}_{name}.pt"

    # ------------------------------------------------------------------------------------------ state

    def identity(self) -> dict[str, Any]:
        """What must be the same in a process that goes on with this training: see `resume.check_same_training`."""
        return {
            "config": self.config.to_dict(),
            "data": self.data_hash,
            "data_content": self.data_content,
            "backbone": self.backbone_hash,
            "encoder": self.encoder_hash,
            "steps_per_epoch": self.steps_per_epoch,
        }

    def state(self) -> dict[str, Any]:
        """A checkpoint's content. Every process must call it: each has random numbers of its own."""
        history = self.history
        return {
            "stage": self.stage.name,
            "epoch": self.epoch,
            "step": self.step,
            "micro_batch": self.gradients.micro_batch,
            "weights": self.stage.part.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rng": gather_from_processes(self.rng),
            "losses": self.losses,
            "history": {
                "epochs": history.epochs,
                "best_epoch": history.best_epoch,
                "best_loss": history.best_loss,
                "skipped": history.skipped,
            },
            **self.identity(),
            "cost": {
                "seconds": self.history.seconds + time.perf_counter() - self.begin,
                "epoch_seconds": self.epoch_seconds,
                "peak_memory_bytes": environment.peak_memory_bytes(),
                "trainable_parameters": count_parameters(self.stage.part),
            },
        }

    def save(self, name: str) -> None:
        """Write a checkpoint; the log is on disk before it."""
        state = self.state()
        if self.main:
            if self.log is not None:
                self.log.sync()
            save_checkpoint(self.checkpoint_path(name), state)
        self.accelerator.wait_for_everyone()

    def save_to_resume(self) -> None:
        """Write the checkpoint that a later process goes on from."""
        self.save("resume")
        self.last_save = time.perf_counter()

    def restore(self) -> bool:
        """Take up what the run folder holds of this training; whether it is finished.

        Raises
        ------
        ParameterError
            There is something, but `config.resume` is false, or it was begun with other parameters.
        """
        final, unfinished = self.checkpoint_path("final_model"), self.checkpoint_path("resume")
        path = final if final.exists() else unfinished
        if path.exists():
            refuse_unasked(path, self.directory, self.stage.name, self.config)
            self.load(load_checkpoint(path, self.stage.name), path)
            if path == final and self.main:  # the process that wrote it may not have come to this any more
                unfinished.unlink(missing_ok=True)
            logger.info("%s goes on after epoch %d, step %d", self.stage.name, self.epoch, self.step)
        return path == final

    def load(self, state: dict[str, Any], path: Path) -> None:
        """Put back what `state` gave.

        Raises
        ------
        ParameterError, CheckpointError
            It was begun with other parameters, with another backbone or encoder, or for another model.
        """
        name = display_path(path)
        check_same_training(state, self.identity(), name)
        check_progress(state, self.steps_per_epoch, self.config, name)
        load_weights(self.stage.part, state["weights"], name)
        try:
            load_optimizer(self.optimizer, state["optimizer"])
            load_schedule(self.schedule, state["schedule"])
        except ValueError as error:
            raise CheckpointError(f"checkpoint '{name}' does not fit this training: {error}") from None
        self.step, self.epoch, self.gradients.micro_batch = state["step"], state["epoch"], state["micro_batch"]
        self.losses, self.epoch_seconds = state["losses"], state["cost"]["epoch_seconds"]
        steps = [entry for entry in files.read_json_lines(self.steps_path) if entry["step"] <= self.step]
        self.history = History(steps=steps, seconds=state["cost"]["seconds"], **state["history"])
        if len(state["rng"]) == self.accelerator.num_processes:
            self.rng = state["rng"][self.accelerator.process_index]
            try:
                set_rng_state(self.rng)
            except (RuntimeError, TypeError, ValueError) as error:
                told = str(error).splitlines()[0]
                raise CheckpointError(f"checkpoint '{name}': rng: not a random number state ({told})") from None
        else:
            logger.warning("%s: another number of processes: random numbers of the model begin anew", self.stage.name)

    # ------------------------------------------------------------------------------------------ the loop

    def run(self) -> History:
        """Train to the end, or take over a finished training."""
        if self.main:
            processes.lock_run(self.directory)
        if not self.restore():
            if self.main:
                self.log = files.JsonLines(self.steps_path, keep=lambda entry: entry["step"] <= self.step)
            self.bar = progress.progress_bar(self.total_steps, self.stage.name, self.interactive, self.main)
            self.bar.update(self.step)
            try:
                self._train()
            except RuntimeError as error:
                if (told := loading_error(error)) is None:
                    raise
                raise told from error
            finally:
                self.bar.close()
                if self.log is not None:
                    self.log.close()
            self.history.seconds += time.perf_counter() - self.begin
        self._check_frozen()
        return self.history

    def _train(self) -> None:
        trained = count_parameters(self.stage.part)
        logger.info(
            "%s: %d epochs of %d steps, %d trainable parameters, %d frozen",
            *(self.stage.name, self.epochs, self.steps_per_epoch),
            *(trained, count_parameters(self.stage.model) - trained),
        )
        while self.epoch < self.epochs and not self._out_of_patience():
            begin = time.perf_counter() - self.epoch_seconds
            for batches in self._steps_of_epoch():
                self._take_step(batches)
                self.epoch_seconds = time.perf_counter() - begin
                self._save_or_stop()
            scores = self._guarded(self._validate)
            self.rng = rng_state()
            self._end_epoch(scores, time.perf_counter() - begin)
        if not self.history.best_epoch:
            raise FloatingPointError(
                f"{self.stage.name}: no epoch had a finite validation loss; there is no best model"
            )
        self.save("final_model")
        if self.main:
            self.checkpoint_path("resume").unlink(missing_ok=True)

    def _steps_of_epoch(self) -> Iterator[list[Batch]]:
        """This process's batches of each step that the epoch still has; none where there is none left for it."""
        dataset = self.train_loader.dataset
        assert isinstance(dataset, FastMRIDataset)
        dataset.epoch = self.epoch
        self.stage.model.train()
        done = self.step - self.epoch * self.steps_per_epoch
        self.sampler.skip = done * self.step_batches
        self.sampler.share = (self.accelerator.process_index, self.accelerator.num_processes)
        count = self.sampler.total
        batches = iter(self.train_loader)
        left = self.total_steps - self.epoch * self.steps_per_epoch  # fewer than an epoch's if max_steps ends it
        for step in range(done, min(self.steps_per_epoch, left)):
            first, last = step * self.step_batches, min((step + 1) * self.step_batches, count)
            own = len(range(first + self.accelerator.process_index, last, self.accelerator.num_processes))
            yield self._guarded(lambda own=own: list(islice(batches, own)))

    def _guarded(self, action: Callable[[], T]) -> T:
        """What an error interrupts is saved first, as it was before the step: nothing of it has been applied."""
        try:
            return action()
        except TrainingStopped:
            raise
        except (Exception, KeyboardInterrupt):  # a notebook's interrupt is one of the latter
            if self.accelerator.num_processes == 1:  # of several, the others cannot be asked for their state now
                try:
                    self.save_to_resume()
                except (OSError, RuntimeError) as error:  # the disk is full, say; the last checkpoint is still there
                    logger.error("%s: the state could not be saved: %s", self.stage.name, error)
            raise

    def _take_step(self, batches: list[Batch]) -> None:
        start = time.perf_counter()
        number = self.step + 1
        parts, norms, norm = self._guarded(lambda: self.gradients.compute(batches, self._where()))
        weight = sum(part.weight for part in parts)
        loss = sum(part.loss for part in parts) / weight
        finite = math.isfinite(loss) and math.isfinite(norm)
        if not finite:
            self._not_finite(parts, loss, norm)
        learning_rate = float(self.schedule.get_last_lr()[0])
        if finite:
            self.optimizer.step()
            self.losses.append(loss)
        else:
            self.history.skipped += 1
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step = number
        self.rng = rng_state()
        entry = {
            "epoch": self.epoch + 1,
            "step": number,
            "loss": loss,
            "learning_rate": learning_rate,
            "gradient_norm": norm,
            **{f"gradient_norm_{name}": value for name, value in norms.items()},
            **combine_statistics(parts),
            "seconds": time.perf_counter() - start,
        }
        self._tell(entry)

    def _where(self) -> str:
        return f"{self.stage.name}, epoch {self.epoch + 1}, step {self.step + 1}"

    def _not_finite(self, parts: list[Part], loss: float, norm: float) -> None:
        sick = [part for part in parts if not math.isfinite(part.loss)] or parts
        where = ", ".join(one for part in sick for one in part.slices)
        told = f"{self._where()}: loss {loss}, gradient norm {norm}; slices: {where}"
        if self.config.on_nan == "skip":
            logger.warning("%s; the step is skipped", told)
            return
        self.optimizer.zero_grad(set_to_none=True)
        self.save_to_resume()
        raise FloatingPointError(
            f"{told}. The state before is in '{display_path(self.checkpoint_path('resume'))}'. What "
            "to turn: learning_rate, max_grad_norm, warmup_ratio, mixed_precision; on_nan: skip leaves such steps out"
        )

    def _save_or_stop(self) -> None:
        """Save when it is time to; end here if the run is to stop. All processes decide alike."""
        due = time.perf_counter() - self.last_save >= 60 * self.config.checkpoint_minutes
        stop, save = (
            any(said)
            for said in zip(*gather_from_processes((processes.stop_requested(self.directory), due)), strict=True)
        )
        if stop or save:
            self.save_to_resume()
        if stop:
            raise self._stopped()

    def _stopped(self) -> TrainingStopped:
        logger.info("%s stops on request after epoch %d, step %d", self.stage.name, self.epoch, self.step)
        return TrainingStopped(f"{self.stage.name} was stopped after step {self.step}, saved; resume: true goes on")

    # ------------------------------------------------------------------------------------------ validation

    @torch.no_grad()
    def _validate(self) -> list[dict[str, Any]]:
        """Scores of all validation slices, everything in eval mode."""
        self.stage.model.train(False)
        sampler = self.val_loader.batch_sampler
        if isinstance(sampler, ShapeBatchSampler):
            sampler.share = (self.accelerator.process_index, self.accelerator.num_processes)
        scores: list[dict[str, Any]] = []
        stop = False
        for batch in self.val_loader:
            stop = processes.stop_requested(self.directory)
            if stop:
                break
            for chunk in batch.to(self.stage.model.device).chunks(self.gradients.micro_batch):
                try:
                    with self.accelerator.autocast():
                        scores += self.stage.score(chunk)
                except RuntimeError as error:
                    if not should_reduce_batch_size(error):
                        raise
                    where = f"{self.stage.name}, validation of epoch {self.epoch + 1}"
                    raise out_of_memory(where, len(chunk.slices), chunk, error) from None
        if any(gather_from_processes(stop)):
            self.save_to_resume()
            raise self._stopped()
        return [score for one in gather_from_processes(scores) for score in one]

    def _end_epoch(self, scores: list[dict[str, Any]], seconds: float) -> None:
        config, history = self.config, self.history
        metrics = self.stage.metrics(scores)
        number = self.epoch + 1
        if not math.isfinite(metrics["loss"]):
            sick = [f"{one['file']} slice {one['slice']}" for one in scores if not math.isfinite(one["loss"])]
            told = f"{self.stage.name}, epoch {number}: validation loss {metrics['loss']}; slices: {', '.join(sick)}"
            if config.on_nan == "stop":
                self.save_to_resume()
                raise FloatingPointError(told)
            logger.warning("%s; this epoch cannot be the best", told)
        if not self.losses:
            raise FloatingPointError(f"{self.stage.name}, epoch {number}: every step was skipped; nothing is learned")
        history.epochs.append(
            {
                "epoch": number,
                "train_loss": math.fsum(self.losses) / len(self.losses),
                **{f"val_{name}": value for name, value in metrics.items()},
                "skipped_steps": self.step - self.epoch * self.steps_per_epoch - len(self.losses),
                "seconds": seconds,
            }
        )
        self.epoch, self.losses, self.epoch_seconds = number, [], 0.0
        logger.info("%s epoch %d/%d %s", self.stage.name, number, self.epochs, _told(history.epochs[-1]))
        if metrics["loss"] < history.best_loss:
            history.best_loss, history.best_epoch = metrics["loss"], number
            self.save("best_model")
        if number % config.save_interval == 0:
            self.save(f"epoch_{number}")
            self._delete_old()
        if self.main:  # before the state: a process that goes on from it does not write this epoch's row again
            write_epochs(self.epochs_path, history.epochs)
        self.save_to_resume()
        if self.main and self.on_epoch is not None:
            self.on_epoch(history)

    def _delete_old(self) -> None:
        if self.main and self.config.max_checkpoints:
            folder, start = self.checkpoint_path("x").parent, f"{self.stage.name}_epoch_"
            numbers = [path.stem.removeprefix(start) for path in folder.glob(f"{start}*.pt")]
            kept = sorted(int(number) for number in numbers if number.isdecimal())  # a user's own copies stay
            for number in kept[: -self.config.max_checkpoints]:
                (folder / f"{start}{number}.pt").unlink()

    def _out_of_patience(self) -> bool:
        patience, waited = self.config.early_stopping_patience, self.epoch - self.history.best_epoch
        if patience and waited >= patience:
            logger.info("%s: no better validation loss for %d epochs", self.stage.name, waited)
            return True
        return False

    # ------------------------------------------------------------------------------------------ what is told

    def _tell(self, entry: dict[str, float]) -> None:
        if not self.main:
            return
        self.history.steps.append(entry)
        assert self.log is not None
        self.log.write(**entry)
        self.bar.set_postfix(loss=f"{entry['loss']:.4f}", lr=f"{entry['learning_rate']:.1e}", refresh=False)
        self.bar.update()
        if self.on_step is not None:
            self.on_step(entry)
        if entry["step"] % self.config.log_interval == 0 or entry["step"] == self.total_steps:
            logger.info(
                "%s epoch %d/%d step %d/%d loss %.4f lr %.2e gradient norm %.3f, %.2f s/step",
                *(self.stage.name, entry["epoch"], self.epochs, entry["step"], self.total_steps, entry["loss"]),
                *(entry["learning_rate"], entry["gradient_norm"], entry["seconds"]),
            )

    def _check_frozen(self) -> None:
        model = self.stage.model
        model.freeze(None)
        if self.backbone_hash and tensor_hash(model.backbone) != self.backbone_hash:
            raise RuntimeError("the frozen backbone has changed during training")
        if self.encoder_hash and tensor_hash(model.encoder) != self.encoder_hash:
            raise RuntimeError("the frozen k-space encoder has changed during training")

    # ------------------------------------------------------------------------------------------ several processes

    def run_in_processes(self) -> History:
        """Train in ``config.num_processes`` processes of their own, and take over what they have learned."""
        processes.lock_run(self.directory)
        if not self.restore():
            self.save_to_resume()  # the others begin with this model's weights
            with progress.progress_bar(self.total_steps, self.stage.name, self.interactive) as bar:
                bar.update(self.step)
                for _ in distributed.train_in_processes(self.stage, self.config, self.directory):
                    self._follow(bar)
                self._follow(bar)
            path = self.checkpoint_path("final_model")
            self.load(load_checkpoint(path, self.stage.name), path)
        self._check_frozen()
        return self.history

    def _follow(self, bar: Any) -> None:
        """Show what the training processes have logged since the last look."""
        for entry in files.read_json_lines(self.steps_path):
            if entry["step"] > self.step:
                self.step = int(entry["step"])
                self.history.steps.append(entry)
                bar.set_postfix(loss=f"{entry['loss']:.4f}", lr=f"{entry['learning_rate']:.1e}", refresh=False)
                bar.update()
                if self.on_step is not None:
                    self.on_step(entry)
        known = read_history(self.directory, self.stage.name)
        if known is not None and len(known.epochs) > len(self.history.epochs):
            self.history.epochs = known.epochs
            self.history.best_epoch, self.history.best_loss = known.best_epoch, known.best_loss
            if self.on_epoch is not None:
                self.on_epoch(self.history)


def _told(entry: dict[str, Any]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in entry.items() if name != "epoch")


def fit(
    stage: Stage,
    config: TrainingParameters,
    train_loader: DataLoader[Batch],
    val_loader: DataLoader[Batch],
    directory: Path,
    *,
    interactive: bool = False,
    on_step: Callable[[dict[str, float]], None] | None = None,
    on_epoch: Callable[[History], None] | None = None,
) -> History:
    """Train one part of the model, from its start or from where an earlier process left off.

    With ``config.num_processes`` above 1 the training itself happens in as many processes of its own, started with
    `accelerate launch`; this one shows how far they are and takes over what they have learned.

    Parameters
    ----------
    stage : Stage
    config : TrainingParameters
    train_loader, val_loader : DataLoader of Batch
        From `data.make_loader`; the training dataset's `epoch` is set before each pass.
    directory : Path
        Run folder: checkpoints go to ``<stage>_checkpoints/``, logs to ``logs/``.
    interactive : bool
        Show a notebook's progress widget.
    on_step : callable, optional
        Called after each step with the step's entry in the log.
    on_epoch : callable, optional
        Called with the history after each epoch.

    Returns
    -------
    History
        The model holds the last epoch's weights; the best epoch's are in ``<stage>_best_model.pt``.

    Raises
    ------
    ParameterError
        The folder holds a training of this stage already and `config.resume` is false, or was begun with other
        parameters, or another process is at work in it.
    FloatingPointError
        A loss or gradient that is not finite; epoch, step, files and slices are named.
    MemoryError
        Naming the parameters to turn.
    TrainingStopped
        On the run's stop file (see `runs.request_stop`), after the step, with the state saved.
    """
    trainer = Trainer(stage, config, train_loader, val_loader, directory, interactive, on_step, on_epoch)
    return trainer.run_in_processes() if config.num_processes > 1 and not is_launched() else trainer.run()
