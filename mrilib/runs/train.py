"""Training of one stage without a notebook: ``python -m mrilib train``, also in each process of `accelerate launch`."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.utils.logging import disable_progress_bar

from mrilib import environment, processes
from mrilib.config import ParameterError, Stage1Parameters, Stage2Parameters, display_path, read_yaml, resolve
from mrilib.model import two_stage
from mrilib.runs import record
from mrilib.training import device as device_module
from mrilib.training import loop, setup
from mrilib.training.distributed import is_launched
from mrilib.training.setup import StageParameters

RUN_ENTRIES = {".lock", "stop", "params", "logs", "figures", "stage1_checkpoints", "stage2_checkpoints"}
logger = logging.getLogger("mrilib")


def read_config(path: Path, stage: int, overrides: dict[str, Any]) -> StageParameters:
    """Read a stage's parameters from a params file and replace the values of `overrides`."""
    cls = Stage1Parameters if stage == 1 else Stage2Parameters
    if "interactive" not in overrides:
        try:
            cls.check_replaced(read_yaml(path), ("interactive",))
        except ParameterError as error:
            raise ParameterError(f"{display_path(path)}: {error}") from None
    return cls.from_yaml(path, {"interactive": False, **overrides})


def train(config: StageParameters, only: str = "") -> Path:
    """Train a stage and, with `train_control`, its baseline; or `only` one of them. Return the run folder.

    Raises
    ------
    ParameterError
        If this stage does not train `only`, or `output_dir` is not a run folder; see also `loop.fit`.
    """
    notebook = _check_request(config, only)
    disable_progress_bar()
    state = PartialState(cpu=device_module.pick_device(config.device).type == "cpu") if is_launched() else None
    name = [config.output_dir or record.new_folder(notebook)]
    if state is not None:
        broadcast_object_list(name)
        config = config.model_copy(update={"num_processes": state.num_processes})
    config = config.model_copy(update={"output_dir": name[0]})
    directory = resolve(name[0])
    is_main = state is None or state.is_main_process
    with _console_log(is_main) as console:
        # The data is read first: if it is refused, no folder is created and an existing run is unchanged.
        device = setup.prepare(config)
        loaders = setup.make_loaders(config)
        # With `only`, the notebook that started these processes writes the record.
        run = record.start(notebook, config) if is_main and not only else None
    if is_main:
        logger.addHandler(console)  # again, because the run's log has replaced it
    try:
        with _record_failure(run, notebook), processes.stop_on_signals(directory):
            _train_networks(config, directory, run, only, device, loaders)
    finally:
        if state is not None and sys.exc_info()[0] is None:
            state.destroy_process_group()
    return directory


def _check_request(config: StageParameters, only: str) -> str:
    """Check `only` and the output folder; return the notebook that the training stands for."""
    number = 1 if isinstance(config, Stage1Parameters) else 2
    names = ("stage1", "constant_prefix") if number == 1 else ("stage2", "no_token_decoder")
    if only and only not in names:
        raise ParameterError(f"--only {only}: stage {number} trains {' and '.join(names)}; give one of them")
    if only == names[1] and not setup.trains_control(config):
        reason = "the decoder uses no tokens" if config.train_control else "train_control is false"
        raise ParameterError(f"--only {only}: {reason}; leave --only out")
    if config.output_dir:
        _require_run_folder(resolve(config.output_dir))
    return f"stage{number}"


def _require_run_folder(directory: Path) -> None:
    """Refuse an output folder that was not created by a run, such as a data folder."""
    if not directory.exists() or (directory / "run.json").exists():
        return
    if not directory.is_dir():
        raise ParameterError(f"output_dir: '{display_path(directory)}' is not a folder; give another one")
    others = sorted({path.name for path in directory.iterdir()} - RUN_ENTRIES)
    if others:
        raise ParameterError(
            f"output_dir: '{display_path(directory)}' is not a run folder: it has no run.json, but '{others[0]}'; "
            "give a new folder or a run's"
        )


@contextlib.contextmanager
def _console_log(is_main: bool) -> Iterator[logging.Handler]:
    """Print the log, in the main process; stop that if the block fails."""
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    if is_main:
        logger.addHandler(console)
        logger.setLevel(logging.INFO)
    try:
        yield console
    except BaseException:
        logger.removeHandler(console)
        raise


@contextlib.contextmanager
def _record_failure(run: record.Run | None, notebook: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if run is not None:
            try:
                run.finish(notebook, "failed", error=f"{type(error).__name__}: {error}")
            except OSError as disk_error:  # the training's error matters more
                logger.error("%s", disk_error)
        raise


def _train_networks(
    config: StageParameters,
    directory: Path,
    run: record.Run | None,
    only: str,
    device: torch.device,
    loaders: setup.Loaders,
) -> None:
    """Train the stage and its baseline, and record the stage's results."""
    notebook = "stage1" if isinstance(config, Stage1Parameters) else "stage2"
    if run is not None:
        split = {name: [volume.file for volume in part] for name, part in loaders.split.items()}
        run.note(notebook, split=split, skipped_files=loaders.split.skipped)
    stage = setup.build_stage(config, device)
    before = two_stage.fingerprint(stage.model)
    for is_baseline in (False, True) if setup.trains_control(config) else (False,):
        stage = setup.build_control_stage(config, stage) if is_baseline else stage
        if only not in ("", stage.name):
            continue
        loaders = setup.stage_loaders(config, stage, loaders)
        history = loop.fit(stage, config, loaders.train, loaders.val, directory)
        if run is not None and not is_baseline:
            run.note(
                notebook,
                frozen_before=before,
                frozen_after=two_stage.fingerprint(stage.model),
                best_epoch=history.best_epoch,
                best_val_loss=history.best_loss,
                seconds=history.seconds,
                peak_memory_bytes=environment.peak_memory_bytes(),
                trainable_parameters=two_stage.count_parameters(stage.part),
            )
    if run is not None:
        run.finish(notebook)
