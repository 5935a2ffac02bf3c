"""One stage without a notebook: what `python -m mrilib train` does, in each process that `accelerate launch` starts."""

import logging
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader
from transformers.utils.logging import disable_progress_bar

from mrilib import inference, model, runs, token_cache, training
from mrilib.config import ParameterError, Stage1Parameters, Stage2Parameters, display_path, read_yaml, resolve
from mrilib.data import (
    Batch,
    FastMRIDataset,
    Split,
    load_annotations,
    make_loader,
    require_boxes,
    require_lesions,
    require_targets,
    split_volumes,
)
from mrilib.distributed import launched

StageParameters = Stage1Parameters | Stage2Parameters


def make_loaders(
    config: StageParameters,
) -> tuple[Split, DataLoader[Batch], DataLoader[Batch]]:
    """Split, training loader and validation loader of a stage's parameters."""
    volumes = split_volumes(config)
    if isinstance(config, Stage2Parameters):
        require_targets(volumes["train"] + volumes["val"])
    annotations = load_annotations(config)
    train_data = FastMRIDataset(
        volumes["train"],
        config,
        annotations,
        training=True,
        masks_per_slice=config.masks_per_slice,
        max_slices=config.max_train_slices,
    )
    val_data = FastMRIDataset(volumes["val"], config, annotations, max_slices=config.max_val_slices)
    order: dict[str, Any] = {}
    if isinstance(config, Stage1Parameters):
        train_data.mirror_share, train_data.teacher_forcing = config.mirror_share, config.teacher_forcing
        require_boxes(train_data, config.finding_labels)
        for name in ("recon_weight", "varnet_image_weight"):
            if getattr(config, name):
                require_targets(volumes["train"], name)
        order = {"group_by_length": config.group_by_length, "finding_share": config.finding_share}
    else:
        if config.lesion_weight:
            require_lesions(train_data)
    train_loader = make_loader(train_data, config.batch_size, config.seed, shuffle=True, echo=config.data_echo, **order)
    return volumes, train_loader, make_loader(val_data, config.batch_size)


def make_stages(config: StageParameters, device: torch.device) -> Iterator[training.Stage]:
    """The trainings of a stage's parameters, built one after the other: the stage itself, then its control."""
    backbone, tokenizer = model.build_backbone(config, device)
    if isinstance(config, Stage1Parameters):
        encoder = model.build_encoder(config, backbone, tokenizer).to(device)
        system = model.TwoStageModel(encoder, backbone, tokenizer)
        yield training.AnalysisStage.of(system, config)
        if config.train_control:
            training.prepare(config)  # the same seed again: the same order of slices
            control = model.build_control(config, backbone).to(device)
            yield training.AnalysisStage(
                model.TwoStageModel(control, backbone, tokenizer), "control", config.label_smoothing
            )
        return
    system, stage1_config = inference.load_stage1(resolve(config.stage1_checkpoint), backbone, tokenizer)
    inference.check_same_input(config, stage1_config)
    system.decoder = model.decoder_to_train(config, system)
    yield training.ReconstructionStage.of(system, config)
    if config.train_control:
        training.prepare(config)  # the same seed again: the same order of slices and masks
        decoder = model.decoder_to_train(config, system, use_tokens=False)
        plain = model.TwoStageModel(system.encoder, backbone, tokenizer, decoder)
        yield training.ReconstructionStage.of(plain, config, "plain")


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
    names = ("stage1", "control") if number == 1 else ("stage2", "plain")
    if only and only not in names:
        raise ParameterError(f"--only {only}: stage {number} trains {' and '.join(names)}; give one of them")
    if only == names[1] and not config.train_control:
        raise ParameterError(f"--only {only}: train_control is false; set it to true, or leave --only out")
    if config.output_dir:
        require_run_folder(resolve(config.output_dir))
    disable_progress_bar()
    state = PartialState(cpu=training.pick_device(config.device).type == "cpu") if launched() else None
    name = [config.output_dir or f"outputs/{notebook}-{datetime.now():%Y%m%d-%H%M%S}"]
    if state is not None:
        broadcast_object_list(name)
        config = config.model_copy(update={"num_processes": state.num_processes})
    config = config.model_copy(update={"output_dir": name[0]})
    directory = resolve(name[0])
    main = state is None or state.is_main_process
    # A notebook that starts these processes keeps the record itself.
    run = runs.start(notebook, config) if main and not only else None
    if main:
        console = logging.StreamHandler(sys.stdout)
        console.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        training_log = logging.getLogger("mrilib")
        training_log.addHandler(console)
        training_log.setLevel(logging.INFO)
    try:
        with runs.stop_on_signals(directory):
            _train_stages(config, directory, run, only)
    except BaseException as error:
        if run is not None:
            run.finish(notebook, "failed", error=f"{type(error).__name__}: {error}")
        raise
    finally:
        if state is not None and sys.exc_info()[0] is None:
            state.destroy_process_group()
    return directory


def _train_stages(config: StageParameters, directory: Path, run: runs.Run | None, only: str) -> None:
    device = training.prepare(config)
    volumes, train_loader, val_loader = make_loaders(config)
    notebook = "stage1" if isinstance(config, Stage1Parameters) else "stage2"
    if run is not None:
        split = {name: [volume.file for volume in part] for name, part in volumes.items()}
        run.note(notebook, split=split, skipped_files=volumes.skipped)
    for stage in make_stages(config, device):
        if only not in ("", stage.name):
            continue
        if (
            isinstance(config, Stage2Parameters)
            and isinstance(stage, training.ReconstructionStage)
            and config.token_cache
        ):
            train_loader, val_loader = token_cache.cached_loaders(stage, config, train_loader, val_loader)
        before = model.fingerprint(stage.model.backbone, stage.model.tokenizer)
        history = training.fit(stage, config, train_loader, val_loader, directory)
        after = model.fingerprint(stage.model.backbone, stage.model.tokenizer)
        if run is not None and stage.name == notebook:
            facts = {
                "frozen_before": before,
                "frozen_after": after,
                "best_epoch": history.best_epoch,
                "best_val_loss": history.best_loss,
                "seconds": history.seconds,
                "peak_memory_bytes": runs.peak_memory_bytes(),
                "trainable_parameters": model.count_trained(stage.part),
            }
            run.note(notebook, **facts)
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
