"""Gradients of one optimizer step, summed over its batches and over all processes."""

import itertools
import logging
import math
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from mrilib.config import TrainingParameters
from mrilib.data.dataset import Batch
from mrilib.training.device import autocast, build_scaler, rng_state, set_rng_state
from mrilib.training.distributed import gather_from_processes
from mrilib.training.stages import BatchLoss, Stage
from mrilib.transfer import read_together

logger = logging.getLogger("mrilib")
MEMORY_REMEDIES = (
    "Change batch_size (and raise gradient_accumulation_steps), activation_checkpointing: true, "
    "mixed_precision: bf16, img_size or num_coils"
)


class MicroBatch(NamedTuple):
    """A forward pass; its loss is still on the device."""

    loss: BatchLoss
    weight: float  # its units: analysis tokens or slices
    slices: list[str]  # file and slice number, for error messages


class MicroBatchLoss(NamedTuple):
    """The loss of one forward pass."""

    total: float  # summed over its units
    weight: float  # its units: analysis tokens or slices
    statistics: dict[str, float]
    slices: list[str]  # file and slice number, for error messages


class StepGradient(NamedTuple):
    """The loss of one optimizer step and its gradient norms before clipping; the gradients are in ``grad``."""

    losses: list[MicroBatchLoss]  # of all processes
    norms: dict[str, float]  # of each child of the trained module
    norm: float  # of the whole gradient
    micro_batch: int  # slices per forward pass that fitted in memory

    @property
    def loss(self) -> float:
        """Mean loss over units."""
        return sum(part.total for part in self.losses) / sum(part.weight for part in self.losses)

    @property
    def is_finite(self) -> bool:
        """Whether the step can be taken."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)

    @property
    def statistics(self) -> dict[str, float]:
        """Statistics over all micro-batches: maximum of ``…_max``, minimum of ``…_min``, weighted mean of others."""
        combined: dict[str, float] = {}
        for name in self.losses[0].statistics:
            values = [part.statistics[name] for part in self.losses]
            if name.endswith("_max"):
                combined[name] = max(values)
            elif name.endswith("_min"):
                combined[name] = min(values)
            else:
                weighted = sum(part.weight * value for part, value in zip(self.losses, values, strict=True))
                combined[name] = weighted / sum(part.weight for part in self.losses)
        return combined


class StepGradients:
    """Computes the gradients of optimizer steps.

    Losses are summed over the batches of all processes and divided by their units (tokens, slices). So several
    processes take the same steps as one process with more accumulation.

    Parameters
    ----------
    stage : Stage
    parameters : list of Parameter
        The trained ones.
    optimizer : Optimizer
        Of these parameters.
    accelerator : Accelerator
    config : TrainingParameters
        max_grad_norm and mixed_precision are used.

    Attributes
    ----------
    scaler : GradScaler
        Loss scale of ``mixed_precision: fp16``; call its `update` after each step.
    """

    def __init__(
        self,
        stage: Stage,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        config: TrainingParameters,
    ) -> None:
        self.stage, self.parameters, self.accelerator, self.config = stage, parameters, accelerator, config
        self.optimizer, self.scaler = optimizer, build_scaler(config, stage.model.device)
        self.is_checked = False  # whether exactly the trained parameters received gradients

    def compute(self, batches: list[Batch], micro_batch: int, where: str) -> StepGradient:
        """Compute and clip the gradients of a step.

        Parameters
        ----------
        batches : list of Batch
            This process's share of the step; may be empty.
        micro_batch : int
            Slices per forward pass; halved until they fit in memory.
        where : str
            Stage, epoch and step, for error messages.

        Raises
        ------
        MemoryError
            A single slice does not fit in memory; the message names the parameters to change.
        """
        moved = [batch.to(self.stage.model.device) for batch in batches]
        weight = sum(gather_from_processes(sum(self.stage.weight(batch) for batch in moved)))
        rng = rng_state()
        try:
            own = self._accumulate(micro_batch, moved, weight)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            own, micro_batch = self._with_smaller_batches(error, micro_batch, moved, weight, rng, where)
        self._sum_over_processes()
        self.scaler.unscale_(self.optimizer)
        if not self.is_checked:
            self.stage.model.check_gradients()
            self.is_checked = True
        norms = gradient_norms(self.stage.part)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        return self._read(own, norms, norm, micro_batch)

    def has_overflow(self, step: StepGradient) -> bool:
        """Whether only the loss scale of fp16 is too large: the loss is finite, the gradient is not."""
        is_overflow = math.isfinite(step.loss) and not math.isfinite(step.norm)
        return is_overflow and self.scaler.is_enabled() and self.scaler.get_scale() > 1

    def _read(self, own: list[MicroBatch], norms: dict[str, Tensor], norm: Tensor, micro_batch: int) -> StepGradient:
        """Read all numbers of the step. Until here the CPU queues work for the device without waiting for it."""
        columns = [(part.loss.total, *part.loss.statistics.values()) for part in own]
        values = iter(read_together([norm, *norms.values(), *itertools.chain(*columns)]))
        norm_value, norm_values = next(values), dict(zip(norms, values, strict=False))
        losses = []
        for part in own:
            total, statistics = next(values), dict(zip(part.loss.statistics, values, strict=False))
            losses.append(MicroBatchLoss(total, part.weight, statistics, part.slices))
        losses = [part for process in gather_from_processes(losses) for part in process]
        return StepGradient(losses, norm_values, norm_value, micro_batch)

    def _accumulate(self, micro_batch: int, batches: list[Batch], weight: float) -> list[MicroBatch]:
        for parameter in self.parameters:
            parameter.grad = None
        parts = []
        for batch in batches:
            for chunk in batch.chunks(micro_batch):
                with autocast(self.config, self.stage.model.device):
                    result = self.stage.loss(chunk)
                names = [f"{item.file} slice {item.slice_num}" for item in chunk.slices]
                self.scaler.scale(result.total / weight).backward()
                loss = result._replace(total=result.total.detach())
                parts.append(MicroBatch(loss, self.stage.weight(chunk), names))
        return parts

    def _with_smaller_batches(
        self, error: RuntimeError, size: int, batches: list[Batch], weight: float, rng: dict[str, Any], where: str
    ) -> tuple[list[MicroBatch], int]:
        """Repeat the step with half as many slices at once, until they fit; returns the losses and that number."""

        def halve() -> int:
            nonlocal size
            size //= 2
            set_rng_state(rng)
            if size:
                logger.warning("%s: out of memory; the step is repeated with %d slices at once", where, size)
            return size

        # accelerate's retry empties the device's memory at each call, so the first attempt runs without it.
        retry = find_executable_batch_size(self._accumulate, starting_batch_size=halve(), reduce_batch_size_fn=halve)
        try:
            return retry(batches, weight), size
        except RuntimeError:
            if size:
                raise
            raise MemoryError(f"{where}: out of memory on a single slice. {MEMORY_REMEDIES} ({error})") from None

    def _sum_over_processes(self) -> None:
        if self.accelerator.num_processes > 1:
            for parameter in self.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)


def out_of_memory(where: str, batch: Batch, error: Exception) -> MemoryError:
    """Build the error for a batch that did not fit: its size, and the parameters to change."""
    shape = f"{len(batch.slices)} slices of (coil, readout, phase) {tuple(batch.kspace.shape[1:])} at once"
    return MemoryError(f"{where}: out of memory on {shape}. {MEMORY_REMEDIES} ({error})")


def gradient_norms(part: nn.Module) -> dict[str, Tensor]:
    """Gradient norm of each child of a module (varnet, vit, …), on its device."""
    squares: dict[str, Tensor] = {}
    for name, parameter in part.named_parameters():
        if parameter.grad is not None:
            child = name.split(".")[0]
            square = parameter.grad.float().square().sum()
            squares[child] = squares[child] + square if child in squares else square
    return {name: value.sqrt() for name, value in squares.items()}
