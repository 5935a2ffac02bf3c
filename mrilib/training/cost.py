"""Time and FLOPs of an optimizer step of several trainings, and their steps at equal compute.

The speed of a machine drifts, so the trainings are measured in turn, in several rounds of one process. A step is
forward pass, backward pass and update on batches in memory, without loading.
"""

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from mrilib.config import ParameterError, Stage1Parameters, Stage2Parameters, display_path, read_yaml
from mrilib.data.dataset import Batch
from mrilib.model.encoder import KSpaceEncoder
from mrilib.model.two_stage import count_parameters
from mrilib.training import device, setup
from mrilib.training.optimizer import build_optimizer, total_steps
from mrilib.training.setup import StageParameters


@dataclass
class Cost:
    """The compute of one training."""

    name: str  # of the params file
    steps: int  # optimizer steps of the whole training
    parameters: int  # trainable
    flops: float = 0.0  # of an optimizer step, as torch counts them: without Fourier transforms
    rounds: list[float] = field(default_factory=list)  # median time of a step in each round [s]

    @property
    def seconds(self) -> float:
        """Time of an optimizer step: the median over rounds [s]."""
        return statistics.median(self.rounds)


class StepTimer:
    """Measures optimizer steps of an untrained stage on a few batches.

    Parameters
    ----------
    config : Stage1Parameters or Stage2Parameters
    encoder : KSpaceEncoder, optional
        For stage 2, instead of the one in its checkpoint. An untrained encoder has the same cost.
    """

    def __init__(self, config: StageParameters, encoder: KSpaceEncoder | None = None) -> None:
        self.config = config
        self.device = device.prepare(config)
        self.stage = setup.build_stage(config, self.device, encoder)
        self.loaders = setup.make_loaders(config)
        self.batches: list[list[Batch]] = []
        parameters = self.stage.model.freeze(self.stage.trainable)
        self.optimizer = build_optimizer(parameters, config.model_copy(update={"learning_rate": 1e-6}))
        self.stage.model.freeze(None)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        each = -(-len(self.loaders.train) // self.config.gradient_accumulation_steps)
        return total_steps(self.config, each)

    def load(self, steps: int) -> None:
        """Load the batches of some steps."""
        each = self.config.gradient_accumulation_steps
        batches = list(itertools.islice(self.loaders.train, steps * each))
        self.batches = [batches[start : start + each] for start in range(0, len(batches), each)]

    def step(self, batches: Sequence[Batch]) -> None:
        """Take one optimizer step."""
        weight = sum(self.stage.weight(batch) for batch in batches)
        for batch in batches:
            with device.autocast(self.config, self.device):
                loss = self.stage.loss(batch.to(self.device)).total / weight
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def measure(self) -> float:
        """Measure the median time of a step over the loaded batches, after a warm-up step [s]."""
        self.stage.model.freeze(self.stage.trainable)
        self.stage.model.train()
        self.step(self.batches[0])
        seconds = []
        for batches in self.batches:
            begin = time.perf_counter()
            self.step(batches)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        self.stage.model.freeze(None)
        return statistics.median(seconds)

    def flops(self) -> float:
        """Count the FLOPs of a step, forward and backward."""
        self.stage.model.freeze(self.stage.trainable)
        self.stage.model.train()
        with FlopCounterMode(display=False) as counter:
            self.step(self.batches[0])
        self.stage.model.freeze(None)
        return float(counter.get_total_flops())


def read_params(path: Path) -> StageParameters:
    """Read the parameters of stage 1 or 2; a file in ``methods/`` overrides the stage2.yaml in the folder above it.

    Raises
    ------
    ParameterError
        The file fits neither stage.
    """
    values: dict[str, Any] = {"interactive": False, **read_yaml(path)}
    if path.parent.name == "methods":
        values = {**read_yaml(path.parent.parent / "stage2.yaml"), **values}
    is_stage1 = set(values) <= set(Stage1Parameters.model_fields)
    try:
        return Stage1Parameters.create(values) if is_stage1 else Stage2Parameters.create(values)
    except ParameterError as error:
        raise ParameterError(f"{display_path(path)}: {error}") from None


def measure(paths: Sequence[Path], rounds: int = 3, steps: int = 5) -> list[Cost]:
    """Measure the costs of some params files in turn.

    Parameters
    ----------
    paths : sequence of Path
        Stage-2 files use the encoder of the stage-1 file before them, and then need no checkpoint.
    rounds : int
    steps : int
        Optimizer steps in a round; the median counts.
    """
    timers: list[StepTimer] = []
    encoder: KSpaceEncoder | None = None
    for path in paths:
        timer = StepTimer(read_params(path), encoder)
        timer.load(steps)
        if isinstance(timer.config, Stage1Parameters):
            encoder = timer.stage.model.encoder
        timers.append(timer)
    costs = [
        Cost(_name(path), timer.total_steps, count_parameters(timer.stage.part), timer.flops())
        for path, timer in zip(paths, timers, strict=True)
    ]
    for _ in range(rounds):
        for cost, timer in zip(costs, timers, strict=True):
            cost.rounds.append(timer.measure())
    return costs


def _name(path: Path) -> str:
    return path.stem if path.parent.name == "methods" else f"{path.parent.name}/{path.stem}"


def table(costs: Sequence[Cost], reference: int = 1) -> pd.DataFrame:
    """Tabulate costs, and the steps at equal compute: that of the first `reference` trainings together.

    Raises
    ------
    ParameterError
        `reference` is out of range.
    """
    if not 1 <= reference <= len(costs):
        raise ParameterError(f"--reference {reference}: there are {len(costs)} params files")
    budget_seconds = sum(cost.steps * cost.seconds for cost in costs[:reference])
    budget_flops = sum(cost.steps * cost.flops for cost in costs[:reference])
    return pd.DataFrame(
        {
            "training": cost.name,
            "parameters": f"{cost.parameters:,}",
            "a step [s]": f"{cost.seconds:.3g}",
            "from, to [s]": f"{min(cost.rounds):.3g}, {max(cost.rounds):.3g}",
            "a step [GFLOP]": f"{cost.flops / 1e9:.3g}",
            "steps": cost.steps,
            "all steps [s]": f"{cost.steps * cost.seconds:.0f}",
            "steps of equal time": round(budget_seconds / cost.seconds),
            "steps of equal FLOPs": round(budget_flops / cost.flops),
        }
        for cost in costs
    )
