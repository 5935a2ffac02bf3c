"""Several training processes: `accelerate launch -m mrilib train`, started from a notebook or by hand.

A notebook cannot fork once CUDA is up, so its training happens in processes of their own, in the same run folder: they
begin with the checkpoint that the notebook has written and leave the final one for it.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import yaml
from accelerate.utils import gather_object

from mrilib import processes
from mrilib.config import ROOT, ParameterError, TrainingParameters, display_path
from mrilib.training.stages import Stage

T = TypeVar("T")
RAISED = re.compile(r"[A-Za-z_.]*(Error|Exception|Interrupt|Exit)(: |$)")


class TrainingStopped(Exception):
    """Training was asked to stop and did so, between two steps, with its state saved."""


def is_launched() -> bool:
    """Whether this process is one of several that `accelerate launch` (or torchrun) has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def gather_from_processes(value: T) -> list[T]:
    """What each process has to say, in their order."""
    return gather_object([value])


def launch_command(config: TrainingParameters, *arguments: str) -> list[str]:
    """``accelerate launch`` of ``python -m mrilib`` with as many processes as the parameters say."""
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--multi_gpu", "--num_machines", "1", "--num_processes", str(config.num_processes)),  # gloo without GPUs
        *("--mixed_precision", config.mixed_precision, "--dynamo_backend", "no", "--main_process_port", "0"),
        *("--module", "mrilib", *arguments),
    ]


def train_in_processes(stage: Stage, config: TrainingParameters, directory: Path) -> Iterator[None]:
    """Start the training processes of a stage and yield every second until they have ended.

    Raises
    ------
    ParameterError
        For a stage class or name that is not this package's: the processes could not build it.
    RuntimeError
        If they fail, with the error's own words and the name of their log.
    TrainingStopped
        If they were asked to stop.
    """
    if type(stage).__module__ != "mrilib.training.stages":
        raise ParameterError(
            f"num_processes: {config.num_processes} processes cannot build {type(stage).__name__}, which is not the "
            "package's own; put it into mrilib/training/stages.py, or use num_processes: 1"
        )
    parameters = directory / "logs" / f"{stage.name}_processes.yaml"
    parameters.parent.mkdir(parents=True, exist_ok=True)
    values = {**config.to_dict(), "output_dir": str(directory), "resume": True, "interactive": False}
    parameters.write_text(yaml.safe_dump(values, sort_keys=False))
    command = launch_command(config, "train", str(parameters), "--stage", str(stage.number), "--only", stage.name)
    log = parameters.with_suffix(".log")
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
            raise TrainingStopped(f"{stage.name} was stopped with its state saved; resume: true continues it")
        # Of processes that fail the launcher ends the others by a signal, which they take for a request to stop.
        processes.cancel_stop(directory)
        raise RuntimeError(
            f"{config.num_processes} training processes failed, {reason(lines)}; see '{display_path(log)}'"
        )


def reason(lines: list[str]) -> str:
    """The first error that a log tells: in this package's words, or a traceback's last line."""
    told = [line for line in lines if line.startswith("error: ")]
    told += ["error: " + line for line in (re.sub(r"^\[rank\d+\]: ", "", one) for one in lines) if RAISED.match(line)]
    return told[0] if told else "error: they ended without a word"
