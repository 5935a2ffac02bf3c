"""One stage without a notebook: what `python -m mrilib train` does, in each process that `accelerate launch` starts."""

import logging
import sys
from datetime import datetime
from pathlib import Path

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


def require_run_folder(directory: Path) -> None:
    """Refuse an output folder that exists and was not made by a run, such as a data folder.

    Raises
    ------
    ParameterError
    """
    if not directory.exists() or (directory / "run.json").exists():
        return
    if not directory.is_dir():
        raise ParameterError(f"output_dir: '{display_path(directory)}' is no folder; give another one")
    others = sorted({path.name for path in directory.iterdir()} - RUN_ENTRIES)
    if others:
        raise ParameterError(
            f"output_dir: '{display_path(directory)}' is no run folder: it has no run.json, but '{others[0]}'; "
            "give a new folder or a run's"
        )


def train(config: StageParameters, only: str = "") -> Path:
    """Train a stage and its control, or `only` one of the two; the run folder.

    Raises
    ------
    ParameterError
        If `only` is not trained by this stage, or `output_dir` is a folder of something else; see also `training.fit`.
    """
    number = 1 if isinstance(config, Stage1Parameters) else 2
    notebook = f"stage{number}"
    names = ("stage1", "constant_prefix") if number == 1 else ("stage2", "no_token_decoder")
    if only and only not in names:
        raise ParameterError(f"--only {only}: stage {number} trains {' and '.join(names)}; give one of them")
    if only == names[1] and not config.train_control:
        raise ParameterError(f"--only {only}: train_control is false; set it to true, or leave --only out")
    if config.output_dir:
        require_run_folder(resolve(config.output_dir))
    disable_progress_bar()
    state = PartialState(cpu=device_module.pick_device(config.device).type == "cpu") if is_launched() else None
    name = [config.output_dir or f"outputs/{notebook}-{datetime.now():%Y%m%d-%H%M%S}"]
    if state is not None:
        broadcast_object_list(name)
        config = config.model_copy(update={"num_processes": state.num_processes})
    config = config.model_copy(update={"output_dir": name[0]})
    directory = resolve(name[0])
    main = state is None or state.is_main_process
    # Inputs are read first: what is refused leaves no folder, and a run that is there as it is.
    training_log = logging.getLogger("mrilib")
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    if main:
        training_log.addHandler(console)
        training_log.setLevel(logging.INFO)
    try:
        device = setup.prepare(config)
        loaders = setup.make_loaders(config)
        # A notebook that starts these processes keeps the record itself.
        run = record.start(notebook, config) if main and not only else None
    except BaseException:
        training_log.removeHandler(console)
        raise
    if main:
        training_log.addHandler(console)  # again: a run's log takes the place of all others
    try:
        with processes.stop_on_signals(directory):
            _train_stages(config, directory, run, only, device, loaders)
    except BaseException as error:
        if run is not None:
            try:
                run.finish(notebook, "failed", error=f"{type(error).__name__}: {error}")
            except OSError as full:  # the training's own error is the one to tell
                logging.getLogger("mrilib").error("%s", full)
        raise
    finally:
        if state is not None and sys.exc_info()[0] is None:
            state.destroy_process_group()
    return directory


def _train_stages(
    config: StageParameters,
    directory: Path,
    run: record.Run | None,
    only: str,
    device: torch.device,
    loaders: setup.Loaders,
) -> None:
    notebook = "stage1" if isinstance(config, Stage1Parameters) else "stage2"
    if run is not None:
        split = {name: [volume.file for volume in part] for name, part in loaders.split.items()}
        run.note(notebook, split=split, skipped_files=loaders.split.skipped)
    stage = setup.build_stage(config, device)
    before = two_stage.fingerprint(stage.model)
    for control in (False, True) if config.train_control else (False,):
        stage = setup.build_control_stage(config, stage) if control else stage
        if only not in ("", stage.name):
            continue
        loaders = setup.stage_loaders(config, stage, loaders)
        history = loop.fit(stage, config, loaders.train, loaders.val, directory)
        if run is not None and not control:
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


def read_config(path: Path, stage: int, overrides: dict[str, object]) -> StageParameters:
    """A stage's parameters from a params file, with `overrides` on top."""
    cls = Stage1Parameters if stage == 1 else Stage2Parameters
    if "interactive" not in overrides:
        given = read_yaml(path)
        try:
            cls.check_replaced(given, ("interactive",))
        except ParameterError as error:
            raise ParameterError(f"{display_path(path)}: {error}") from None
    return cls.from_yaml(path, {"interactive": False, **overrides})
