"""Training in several processes, which `accelerate launch -m mrilib train` starts.

A notebook cannot fork once CUDA is initialised. It writes a checkpoint, starts the training processes in the same run
folder, and loads their final checkpoint.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object

from mrilib import processes
from mrilib.config import ROOT, ParameterError, TrainingParameters, display_path
from mrilib.training.stages import Stage

T = TypeVar("T")
ERROR_LINE = re.compile(r"[A-Za-z_.]*(Error|Exception|Interrupt|Exit)(: |$)")  # last line of a traceback


class TrainingStopped(Exception):
    """Training stopped on request between two steps, with its state saved."""


def is_launched() -> bool:
    """Whether this is one of several processes that `accelerate launch` (or torchrun) has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def build_accelerator(device: torch.device, directory: Path) -> Accelerator:
    """Build the accelerator of a training in a run folder."""
    AcceleratorState._reset_state()  # otherwise a notebook cannot run again on another device
    is_cpu = device.type == "cpu"
    # Not accelerate's mixed precision: its loss scaler needs accelerate's optimizer, and a GPU.
    return Accelerator(mixed_precision="no", cpu=is_cpu, project_dir=directory / "logs")


def gather_from_processes(value: T) -> list[T]:
    """Gather a value from each process, in their order."""
    return gather_object([value])


def launch_command(config: TrainingParameters, *arguments: str) -> list[str]:
    """``accelerate launch`` of ``python -m mrilib`` in ``config.num_processes`` processes."""
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--multi_gpu", "--num_machines", "1", "--num_processes", str(config.num_processes)),  # gloo without GPUs
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
        *("--module", "mrilib", *arguments),
    ]


def train_in_processes(stage: Stage, config: TrainingParameters, directory: Path) -> Iterator[None]:
    """Start the training processes of a stage, and yield every second until they exit.

    Raises
    ------
    ParameterError
        The stage is a custom class, which the processes cannot build.
    RuntimeError
        A process failed; the message holds its error and the path of the log.
    TrainingStopped
        The run was asked to stop.
    """
    if type(stage).__module__ != "mrilib.training.stages":
        raise ParameterError(
            f"num_processes: {config.num_processes} processes cannot build the custom stage {type(stage).__name__}; "
            "put it into mrilib/training/stages.py, or use num_processes: 1"
        )
    parameters = directory / "logs" / f"{stage.name}_processes.yaml"
    parameters.parent.mkdir(parents=True, exist_ok=True)
    values = {**config.to_dict(), "output_dir": str(directory), "resume": True, "interactive": False}
    parameters.write_text(yaml.safe_dump(values, sort_keys=False))
    log = parameters.with_suffix(".log")
    command = launch_command(config, "train", str(parameters), "--stage", str(stage.number), "--only", stage.name)
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, **processes.child_process_options()
        )
        try:
            while True:
                try:
                    process.wait(1.0)
                    break
                except subprocess.TimeoutExpired:
                    yield
        finally:
            processes.end_process(process)
    if process.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        if any(line.startswith("stopped: ") for line in lines):
            raise TrainingStopped(f"{stage.name} was stopped and saved; resume: true continues it")
        # If one process fails, the launcher ends the others by a signal, which they take for a request to stop.
        processes.cancel_stop(directory)
        raise RuntimeError(
            f"{config.num_processes} training processes failed, {first_error(lines)}; see '{display_path(log)}'"
        )


def first_error(lines: list[str]) -> str:
    """Find the first error in a log: a line of this package, or the last line of a traceback."""
    errors = [line for line in lines if line.startswith("error: ")]
    plain = [re.sub(r"^\[rank\d+\]: ", "", line) for line in lines]
    errors += ["error: " + line for line in plain if ERROR_LINE.match(line)]
    return errors[0] if errors else "error: they exited without an error message"
