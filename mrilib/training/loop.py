"""The training loop of both stages. A killed training resumes at the next step; on a CPU bit for bit.

The order of slices depends on (seed, epoch) alone, a training mask on (seed, file, slice, mask number, repeat) alone. A
resumed training can therefore skip finished batches without reading them.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch.utils.data import DataLoader

from mrilib import processes
from mrilib.config import TrainingParameters, display_path
from mrilib.data.dataset import Batch, FastMRIDataset
from mrilib.data.sampler import ShapeBatchSampler, loading_error
from mrilib.model.two_stage import count_parameters, tensor_hash
from mrilib.training.device import autocast, rng_state
from mrilib.training.distributed import build_accelerator, gather_from_processes, is_launched, train_in_processes
from mrilib.training.gradients import StepGradient, StepGradients, out_of_memory
from mrilib.training.history import History
from mrilib.training.optimizer import build_optimizer, build_schedule, total_steps
from mrilib.training.progress import TrainingProgress
from mrilib.training.resume import training_identity
from mrilib.training.stages import Stage
from mrilib.training.state import TrainingState

logger = logging.getLogger("mrilib")


class Trainer:
    """One training of one stage in one run folder; see `fit` for the parameters.

    Attributes
    ----------
    state : TrainingState
        What a checkpoint holds.
    step_batches : int
        Batches of one optimizer step, over all processes.
    steps_per_epoch, total_steps, epochs : int
        `epochs` is smaller than ``config.epochs`` if `max_steps` ends the training earlier.
    """

    def __init__(
        self,
        stage: Stage,
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
        if not isinstance(train_loader.batch_sampler, ShapeBatchSampler):
            raise TypeError("the training loader must come from data.make_loader: another order cannot be resumed")
        self.sampler = train_loader.batch_sampler
        self.accelerator = build_accelerator(stage.model.device, directory)
        self.is_main = self.accelerator.is_main_process
        parameters = stage.model.freeze(stage.trainable)
        for parameter in parameters if self.accelerator.num_processes > 1 else ():
            torch.distributed.broadcast(parameter.data, 0)
        process_count = self.accelerator.num_processes if is_launched() else config.num_processes
        self.step_batches = config.gradient_accumulation_steps * process_count
        self.steps_per_epoch = -(-self.sampler.total // self.step_batches)
        self.total_steps = total_steps(config, self.steps_per_epoch)
        self.epochs = -(-self.total_steps // self.steps_per_epoch)
        self.optimizer = build_optimizer(parameters, config)
        self.schedule = build_schedule(self.optimizer, config, self.total_steps)
        self.gradients = StepGradients(stage, parameters, self.optimizer, self.accelerator, config)
        identity = training_identity(stage, config, (train_loader, val_loader), self.steps_per_epoch)
        updates = (self.optimizer, self.schedule, self.gradients.scaler)
        self.state = TrainingState(stage, config, directory, self.accelerator, *updates, identity)
        self.progress = TrainingProgress(self.state, self.total_steps, self.epochs, interactive, on_step, on_epoch)

    def run(self) -> History:
        """Train to the end, or load a finished training."""
        state = self.state
        if self.is_main:
            processes.lock_run(self.directory)
        if not state.restore():
            state.open_log()
            try:
                with self.progress:
                    self._train()
            except RuntimeError as error:
                if (data_error := loading_error(error)) is None:
                    raise
                raise data_error from error
            finally:
                state.close_log()
            state.history.seconds = state.seconds
        self._check_frozen()
        return state.history

    def run_in_processes(self) -> History:
        """Train in ``config.num_processes`` child processes, then load what they have trained."""
        state = self.state
        processes.lock_run(self.directory)
        if not state.restore():
            state.save_to_resume()  # the children start from this model's weights
            with self.progress:
                for _ in train_in_processes(self.stage, self.config, self.directory):
                    self.progress.follow()
                self.progress.follow()
            state.load(state.path("final_model"))
        self._check_frozen()
        return state.history

    def _train(self) -> None:
        state, trained = self.state, count_parameters(self.stage.part)
        logger.info(
            "%s: %d epochs of %d steps, %d trainable parameters, %d frozen",
            *(self.stage.name, self.epochs, self.steps_per_epoch),
            *(trained, count_parameters(self.stage.model) - trained),
        )
        while state.epoch < self.epochs and not self._out_of_patience():
            begin = time.perf_counter() - state.epoch_seconds
            for batches in self._steps_of_epoch():
                self._take_step(batches)
                state.epoch_seconds = time.perf_counter() - begin
                self._save_or_stop()
            with state.saved_on_error():
                scores = self._validate()
            state.rng = rng_state()
            self._end_epoch(scores, time.perf_counter() - begin)
        if not state.history.best_epoch:
            raise FloatingPointError(f"{self.stage.name}: no epoch had a finite validation loss, so there is no model")
        state.save_final()

    # --------------------------------------------------------------------------------------------------- training

    def _steps_of_epoch(self) -> Iterator[list[Batch]]:
        """Yield this process's batches for each remaining step of the epoch; the list can be empty in the last step."""
        dataset = self.train_loader.dataset
        assert isinstance(dataset, FastMRIDataset)
        dataset.epoch = self.state.epoch
        self.stage.model.train()
        process, count = self.accelerator.process_index, self.accelerator.num_processes
        epoch_start = self.state.epoch * self.steps_per_epoch
        done = self.state.step - epoch_start
        self.sampler.skip, self.sampler.share = done * self.step_batches, (process, count)
        batches_of_epoch = self.sampler.total
        batches = iter(self.train_loader)
        for step in range(done, min(self.steps_per_epoch, self.total_steps - epoch_start)):
            first, last = step * self.step_batches, min((step + 1) * self.step_batches, batches_of_epoch)
            with self.state.saved_on_error():
                own = list(islice(batches, len(range(first + process, last, count))))
            yield own

    def _take_step(self, batches: list[Batch]) -> None:
        start, state = time.perf_counter(), self.state
        with state.saved_on_error():
            gradient = self.gradients.compute(batches, state.micro_batch, self._where())
        state.micro_batch = gradient.micro_batch
        learning_rate = float(self.schedule.get_last_lr()[0])
        if gradient.is_finite:
            self.optimizer.step()
            state.losses.append(gradient.loss)
        else:
            self._skip_or_raise(gradient)
        if self.gradients.scaler.is_enabled():
            self.gradients.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.rng = rng_state()
        entry = {
            "epoch": state.epoch + 1,
            "step": state.step,
            "loss": gradient.loss,
            "learning_rate": learning_rate,
            "gradient_norm": gradient.norm,
            **{f"gradient_norm_{name}": value for name, value in gradient.norms.items()},
            **gradient.statistics,
            "seconds": time.perf_counter() - start,
        }
        state.log_step(entry)
        self.progress.show_step(entry)

    def _skip_or_raise(self, gradient: StepGradient) -> None:
        """Skip the step, or save the state before it and stop, as `on_nan` says; an overflow of fp16 is skipped."""
        if self.gradients.has_overflow(gradient):
            logger.info("%s: the gradient overflows in fp16; the step is skipped, the loss scale halved", self._where())
            self.state.history.skipped += 1
            return
        parts = [part for part in gradient.losses if not math.isfinite(part.total)] or gradient.losses
        slices = ", ".join(name for part in parts for name in part.slices)
        problem = f"{self._where()}: loss {gradient.loss}, gradient norm {gradient.norm}; slices: {slices}"
        if self.config.on_nan == "skip":
            logger.warning("%s; the step is skipped", problem)
            self.state.history.skipped += 1
            return
        self.optimizer.zero_grad(set_to_none=True)
        self.state.save_to_resume()
        raise FloatingPointError(
            f"{problem}. The state before this step is in '{display_path(self.state.path('resume'))}'. Change "
            "learning_rate, max_grad_norm, warmup_ratio or mixed_precision; on_nan: skip leaves out such steps"
        )

    def _where(self) -> str:
        return f"{self.stage.name}, epoch {self.state.epoch + 1}, step {self.state.step + 1}"

    def _save_or_stop(self) -> None:
        """Save the state at intervals; save and stop if the run is asked to stop. All processes decide alike."""
        is_due = time.perf_counter() - self.state.last_save >= 60 * self.config.checkpoint_minutes
        stop, save = zip(*gather_from_processes((processes.stop_requested(self.directory), is_due)), strict=True)
        if any(stop):
            self.state.save_and_stop()
        if any(save):
            self.state.save_to_resume()

    # ------------------------------------------------------------------------------------------------- validation

    @torch.no_grad()
    def _validate(self) -> list[dict[str, Any]]:
        """Scores of all validation slices."""
        self.stage.model.train(False)
        sampler = self.val_loader.batch_sampler
        if isinstance(sampler, ShapeBatchSampler):
            sampler.share = (self.accelerator.process_index, self.accelerator.num_processes)
        scores: list[dict[str, Any]] = []
        is_stopped = False
        for batch in self.val_loader:
            is_stopped = processes.stop_requested(self.directory)
            if is_stopped:
                break
            for chunk in batch.to(self.stage.model.device).chunks(self.state.micro_batch):
                scores += self._score(chunk)
        if any(gather_from_processes(is_stopped)):
            self.state.save_and_stop()
        return [score for process in gather_from_processes(scores) for score in process]

    def _score(self, batch: Batch) -> list[dict[str, Any]]:
        try:
            with autocast(self.config, self.stage.model.device):
                return self.stage.score(batch)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            where = f"{self.stage.name}, validation of epoch {self.state.epoch + 1}"
            raise out_of_memory(where, batch, error) from None

    def _end_epoch(self, scores: list[dict[str, Any]], seconds: float) -> None:
        state = self.state
        metrics = self.stage.metrics(scores)
        self._check_epoch(metrics["loss"], scores)
        row = {
            "epoch": state.epoch + 1,
            "train_loss": math.fsum(state.losses) / len(state.losses),
            **{f"val_{name}": value for name, value in metrics.items()},
            "skipped_steps": state.step - state.epoch * self.steps_per_epoch - len(state.losses),
            "seconds": seconds,
        }
        self.progress.log_epoch(row)
        state.end_epoch(row)
        self.progress.show_epoch()

    def _check_epoch(self, loss: float, scores: list[dict[str, Any]]) -> None:
        """Refuse an epoch without a finite validation loss or without a training step."""
        where = f"{self.stage.name}, epoch {self.state.epoch + 1}"
        if not math.isfinite(loss):
            slices = [f"{score['file']} slice {score['slice']}" for score in scores if not math.isfinite(score["loss"])]
            problem = f"{where}: validation loss {loss}; slices: {', '.join(slices)}"
            if self.config.on_nan == "stop":
                self.state.save_to_resume()
                raise FloatingPointError(problem)
            logger.warning("%s; this epoch cannot be the best", problem)
        if not self.state.losses:
            raise FloatingPointError(f"{where}: every step was skipped, so nothing is trained")

    def _out_of_patience(self) -> bool:
        patience, waited = self.config.early_stopping_patience, self.state.epoch - self.state.history.best_epoch
        if not patience or waited < patience:
            return False
        logger.info("%s: no better validation loss for %d epochs", self.stage.name, waited)
        return True

    def _check_frozen(self) -> None:
        self.stage.model.freeze(None)
        for name, module in self.stage.frozen_modules().items():
            if tensor_hash(module) != self.state.identity[name]:
                raise RuntimeError(f"the frozen {name} has changed during training")


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
    """Train one stage, from the start or from where an earlier process stopped.

    With ``config.num_processes`` above 1, training runs in child processes started with `accelerate launch`. This
    process shows their progress and loads the trained weights.

    Parameters
    ----------
    stage : Stage
    config : TrainingParameters
    train_loader, val_loader : DataLoader of Batch
        From `data.make_loader`; the training dataset's `epoch` is set before each pass.
    directory : Path
        Run folder: checkpoints go to ``stage1_checkpoints/`` or ``stage2_checkpoints/``, logs to ``logs/``.
    interactive : bool
        Show a notebook's progress widget.
    on_step : callable, optional
        Called after each step with its entry in the step log.
    on_epoch : callable, optional
        Called with the history after each epoch.

    Returns
    -------
    History
        The model has the weights of the last epoch; those of the best are in ``<stage>_best_model.pt``.

    Raises
    ------
    ParameterError
        The folder holds a training of this stage, and `config.resume` is false or the parameters differ; or another
        process uses the folder.
    FloatingPointError
        A loss or gradient is not finite; the message names epoch, step, files and slices.
    MemoryError
        A batch does not fit in memory; the message names the parameters to change.
    TrainingStopped
        The run was asked to stop (see `processes.request_stop`); the state is saved.
    """
    trainer = Trainer(stage, config, train_loader, val_loader, directory, interactive, on_step, on_epoch)
    return trainer.run_in_processes() if config.num_processes > 1 and not is_launched() else trainer.run()
