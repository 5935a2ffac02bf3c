"""The gradients of one step: summed over its batches and over all processes, in halves when memory runs out."""

import logging
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from mrilib.config import TrainingParameters
from mrilib.data.dataset import Batch
from mrilib.training.checkpoint import rng_state, set_rng_state
from mrilib.training.distributed import gather_from_processes

if TYPE_CHECKING:
    from mrilib.training.stages import Stage

logger = logging.getLogger("mrilib")
MEMORY_REMEDIES = (
    "batch_size (gradient_accumulation_steps up in its place), activation_checkpointing: true, "
    "mixed_precision: bf16, img_size, num_coils"
)


class Part(NamedTuple):
    """What one forward and backward pass says of its slices."""

    loss: float  # summed over its units
    weight: float  # its units: analysis tokens, slices
    statistics: dict[str, float]
    slices: list[str]  # file and number, for errors


class StepGradients:
    """Computes a step's gradients into the parameters' ``grad``.

    They are sums over the batches of all processes, divided by their units (tokens, slices): several processes take the
    same steps as one that accumulates more.

    Parameters
    ----------
    stage : Stage
    parameters : list of Parameter
        The trained ones.
    accelerator : Accelerator
    config : TrainingParameters
        batch_size, max_grad_norm.

    Attributes
    ----------
    micro_batch : int
        Slices that go through the model at once; halved when memory runs out.
    """

    def __init__(
        self, stage: "Stage", parameters: list[nn.Parameter], accelerator: Accelerator, config: TrainingParameters
    ) -> None:
        self.stage, self.parameters, self.accelerator, self.config = stage, parameters, accelerator, config
        self.micro_batch = config.batch_size
        self.checked = False  # that exactly the trained part gets gradients

    def compute(self, batches: list[Batch], where: str) -> tuple[list[Part], dict[str, float], float]:
        """Gradients of a step, clipped.

        Parameters
        ----------
        batches : list of Batch
            This process's share of the step; may be empty.
        where : str
            Stage, epoch and step, for errors.

        Returns
        -------
        parts : list of Part
            Of all processes.
        norms : dict
            Norm of the gradient of each part of the model, before clipping.
        norm : float
            Norm of the whole gradient, before clipping.

        Raises
        ------
        MemoryError
            Naming the parameters to turn.
        """
        moved = [batch.to(self.stage.model.device) for batch in batches]
        weight = sum(gather_from_processes(sum(self.stage.weight(batch) for batch in moved)))
        rng = rng_state()
        try:
            own = self._accumulate(self.micro_batch, moved, weight)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            own = self._with_smaller_batches(error, moved, weight, rng, where)
        parts = [part for one in gather_from_processes(own) for part in one]
        if self.accelerator.num_processes > 1:
            for parameter in self.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)
        if not self.checked:
            self.stage.model.check_gradients()
            self.checked = True
        norms = gradient_norms(self.stage.part)
        norm = float(self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm))
        return parts, norms, norm

    def _accumulate(self, micro_batch: int, batches: list[Batch], weight: float) -> list[Part]:
        for parameter in self.parameters:
            parameter.grad = None
        parts = []
        for batch in batches:
            for chunk in batch.chunks(micro_batch):
                with self.accelerator.autocast():
                    result = self.stage.loss(chunk)
                names = [f"{one.file} slice {one.slice_num}" for one in chunk.slices]
                loss = float(result.total.detach())
                parts.append(Part(loss, self.stage.weight(chunk), result.statistics, names))
                self.accelerator.backward(result.total / weight)
        self.micro_batch = micro_batch
        return parts

    def _with_smaller_batches(
        self, error: RuntimeError, batches: list[Batch], weight: float, rng: dict, where: str
    ) -> list[Part]:
        size = self.micro_batch

        def halve() -> int:
            nonlocal size
            size //= 2
            set_rng_state(rng)
            if size:
                logger.warning("%s: memory ran out; the step is taken again with %d slices at once", where, size)
            return size

        # accelerate's: it empties the device's cache at each call, so it is left to the second attempt.
        retry = find_executable_batch_size(self._accumulate, starting_batch_size=halve(), reduce_batch_size_fn=halve)
        try:
            return retry(batches, weight)
        except RuntimeError:
            if size:
                raise
            told = f"{where}: memory ran out on a single slice. What to turn: {MEMORY_REMEDIES} ({error})"
            raise MemoryError(told) from None


def out_of_memory(where: str, slices: int, batch: Batch, error: Exception) -> MemoryError:
    """What to say when memory ran out on some slices at once: how large they are, and which parameters to turn."""
    shape = f"{slices} slices of (coil, readout, phase) {tuple(batch.kspace.shape[1:])} at once"
    return MemoryError(f"{where}: memory ran out on {shape}. What to turn: {MEMORY_REMEDIES} ({error})")


def gradient_norms(part: nn.Module) -> dict[str, float]:
    """Norm of the gradient of each of a module's children (varnet, vit, …), before clipping."""
    squares: dict[str, Tensor] = {}
    for name, parameter in part.named_parameters():
        if parameter.grad is not None:
            child = name.split(".")[0]
            squares[child] = squares.get(child, torch.zeros(())) + parameter.grad.float().square().sum().cpu()
    return {name: float(value.sqrt()) for name, value in squares.items()}


def combine_statistics(parts: list[Part]) -> dict[str, float]:
    """A step's statistics from its parts': the largest of a ``…_max``, the least of a ``…_min``, else the mean."""
    combined: dict[str, float] = {}
    for name in parts[0].statistics:
        values = [part.statistics[name] for part in parts]
        if name.endswith("_max"):
            combined[name] = max(values)
        elif name.endswith("_min"):
            combined[name] = min(values)
        else:
            weighted = sum(part.weight * value for part, value in zip(parts, values, strict=True))
            combined[name] = weighted / sum(part.weight for part in parts)
    return combined
