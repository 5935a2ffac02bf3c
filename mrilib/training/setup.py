"""Loaders, stages and trained models, built from parameters.

Notebooks and commands build them here only, so that the same parameters give the same batches and models everywhere.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mrilib.config import (
    DataParameters,
    EvaluateParameters,
    ParameterError,
    Parameters,
    Stage1Parameters,
    Stage2Parameters,
    display_path,
    resolve,
)
from mrilib.data.dataset import Batch, FastMRIDataset
from mrilib.data.sampler import make_loader
from mrilib.data.splits import (
    Split,
    load_annotations,
    require_boxes,
    require_targets,
    split_volumes,
)
from mrilib.model.compilation import compile_blocks
from mrilib.model.decoders import build_decoder, find_decoder
from mrilib.model.encoder import KSpaceEncoder
from mrilib.model.two_stage import (
    TwoStageModel,
    build_backbone,
    build_constant_prefix,
    build_encoder,
    hidden_size,
    tensor_hash,
)
from mrilib.training import device as device_module
from mrilib.training import stages
from mrilib.training.checkpoint import CheckpointError, load_checkpoint
from mrilib.training.load_state import load_weights
from mrilib.training.token_cache import TokenCache

StageParameters = Stage1Parameters | Stage2Parameters
STAGES = {1: stages.AnalysisStage, 2: stages.ReconstructionStage}  # for a loss of your own, put a subclass here


class Loaders(NamedTuple):
    """The data of a stage."""

    split: Split
    train: DataLoader[Batch]
    val: DataLoader[Batch]
    cache: TokenCache | None = None  # that the loaders read from

    @property
    def train_data(self) -> FastMRIDataset:
        """The training slices."""
        assert isinstance(self.train.dataset, FastMRIDataset)
        return self.train.dataset

    @property
    def val_data(self) -> FastMRIDataset:
        """The validation slices."""
        assert isinstance(self.val.dataset, FastMRIDataset)
        return self.val.dataset


def prepare(config: StageParameters) -> torch.device:
    """Check parameters before data are read, seed all random number generators and return the device.

    Raises
    ------
    ParameterError
        The decoder is unknown, or it uses image tokens and there is no stage-1 checkpoint.
    """
    if isinstance(config, Stage2Parameters) and find_decoder(config.decoder).uses_tokens:
        config.require_path("stage1_checkpoint")
    return device_module.prepare(config)


# ----------------------------------------------------------------------------------------------------- data


def make_loaders(config: StageParameters) -> Loaders:
    """Build split, training loader and validation loader of a stage."""
    split = split_volumes(config)
    annotations = load_annotations(config)
    stage1 = config if isinstance(config, Stage1Parameters) else None
    if stage1 is None:
        require_targets(split["train"] + split["val"])
    train_data = FastMRIDataset(
        split["train"],
        config,
        annotations,
        training=True,
        masks_per_slice=0 if isinstance(config, Stage1Parameters) else config.masks_per_slice,
        max_slices=config.max_train_slices,
        mirror_fraction=stage1.mirror_fraction if stage1 else 0.0,
    )
    if stage1:
        require_boxes(train_data, stage1.finding_labels)
    val_data = FastMRIDataset(split["val"], config, annotations, max_slices=config.max_val_slices)
    return Loaders(split, *_loaders(config, train_data, val_data))


def _loaders(
    config: StageParameters, train_data: FastMRIDataset, val_data: FastMRIDataset
) -> tuple[DataLoader[Batch], DataLoader[Batch]]:
    share = config.finding_fraction if isinstance(config, Stage1Parameters) else 0.0
    train = make_loader(train_data, config.batch_size, config.seed, shuffle=True, finding_fraction=share)
    return train, make_loader(val_data, config.batch_size)


def stage_loaders(config: StageParameters, stage: stages.Stage, loaders: Loaders) -> Loaders:
    """Return the loaders that a stage trains with: the same batches, from the source that the stage needs.

    The constant prefix reads no k-space. With `token_cache_dir`, stage 2 reads image tokens and decoder inputs from the
    token cache, which is filled first.
    """
    train_data, val_data, cache = loaders.train_data, loaders.val_data, None
    if stage.name == "constant_prefix":
        train_data, val_data = train_data.without_kspace(), val_data.without_kspace()
    elif isinstance(config, Stage2Parameters) and config.token_cache_dir and stage.model.uses_tokens:
        assert isinstance(stage, stages.ReconstructionStage)
        cache = TokenCache(stage.model, config)
        train_data, val_data = cache.hold(train_data, val_data)
        stage.image_tokens = cache.image_tokens
    else:
        return loaders
    return Loaders(loaders.split, *_loaders(config, train_data, val_data), cache)


# ---------------------------------------------------------------------------------------------------- stages


def build_stage(
    config: StageParameters, device: torch.device | str, encoder: KSpaceEncoder | None = None
) -> stages.Stage:
    """Build an untrained stage.

    Parameters
    ----------
    config : Stage1Parameters or Stage2Parameters
    device : torch.device or str
    encoder : KSpaceEncoder, optional
        For stage 2, instead of the one in `stage1_checkpoint`; for measurements.
    """
    stage = _build_stage(config, device, encoder)
    if config.compile:
        compile_blocks(stage.model, stage.model.backbone)
    return stage


def _build_stage(config: StageParameters, device: torch.device | str, encoder: KSpaceEncoder | None) -> stages.Stage:
    if isinstance(config, Stage1Parameters):
        backbone, tokenizer = build_backbone(config, device)
        model = TwoStageModel(build_encoder(config, backbone, tokenizer).to(device), backbone, tokenizer)
        return STAGES[1](model, "stage1", config.label_smoothing, stages.MAP_WEIGHT)
    if not find_decoder(config.decoder).uses_tokens:
        return STAGES[2](TwoStageModel(decoder=build_decoder(config, 0).to(device)))
    backbone, tokenizer = build_backbone(config, device)
    if encoder is None:
        model, stage1_config = load_stage1(resolve(config.stage1_checkpoint), backbone, tokenizer)
        check_same_input(config, stage1_config)
    else:
        model = TwoStageModel(encoder, backbone, tokenizer)
    model.decoder = build_decoder(config, hidden_size(backbone)).to(device)
    return STAGES[2](model)


def trains_control(config: StageParameters) -> bool:
    """Whether a training has a control: `train_control` is set, and there are k-space or image tokens to leave out."""
    return config.train_control and (isinstance(config, Stage1Parameters) or find_decoder(config.decoder).uses_tokens)


def build_control_stage(config: StageParameters, stage: stages.Stage) -> stages.Stage:
    """Build the untrained control of a stage, with seeds reset so that slices and masks come in the same order."""
    device_module.prepare(config)
    model = stage.model
    if isinstance(config, Stage1Parameters):
        prefix = build_constant_prefix(config, model.backbone).to(model.device)
        control = TwoStageModel(prefix, model.backbone, model.tokenizer)
        return STAGES[1](control, "constant_prefix", config.label_smoothing)
    decoder = build_decoder(config, 0).to(model.device)
    if config.compile:
        compile_blocks(decoder)
    return STAGES[2](TwoStageModel(decoder=decoder), "no_token_decoder")


# -------------------------------------------------------------------------------------------- trained models


def _read_config(cls: type[Parameters], content: dict[str, Any], path: Path) -> Any:
    """Read and check a checkpoint's parameters. Its data may have moved and its device be absent."""
    name, values = display_path(path), content["config"]
    unknown = set(values) - set(cls.model_fields)
    if unknown:
        raise CheckpointError(f"{name}: its parameters are of another version: {', '.join(unknown)}")
    device = {"device": "auto"} if "device" in values else {}
    try:
        cls.create({**values, **device}, written_later=cls.existing_paths)
    except ParameterError as error:
        raise CheckpointError(f"checkpoint '{name}': its config: {error}") from None
    return cls.model_construct(**values)


def _check_backbone(content: dict[str, Any], backbone: PreTrainedModel, path: Path) -> None:
    if content["backbone"] != tensor_hash(backbone):
        raise CheckpointError(
            f"{display_path(path)} was trained with another backbone; give its backbone_path and backbone_dtype"
        )


def load_stage1(
    path: Path, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[TwoStageModel, Stage1Parameters]:
    """Load the k-space encoder of a stage-1 checkpoint into a frozen model.

    Raises
    ------
    CheckpointError
        The checkpoint is missing, damaged, of another stage or architecture, or trained with another backbone.
    """
    content = load_checkpoint(path, "stage1")
    config = _read_config(Stage1Parameters, content, path)
    _check_backbone(content, backbone, path)
    encoder = build_encoder(config.model_copy(update={"varnet_weights": ""}), backbone)
    load_weights(encoder, content["weights"], display_path(path))
    return TwoStageModel(encoder.to(backbone.device), backbone, tokenizer), config


def load_constant_prefix(path: Path, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TwoStageModel:
    """Load the constant prefix, stage 1's control without k-space, into a frozen model."""
    content = load_checkpoint(path, "constant_prefix")
    _check_backbone(content, backbone, path)
    prefix = build_constant_prefix(_read_config(Stage1Parameters, content, path), backbone)
    load_weights(prefix, content["weights"], display_path(path))
    return TwoStageModel(prefix.to(backbone.device), backbone, tokenizer)


def load_stage2(path: Path, model: TwoStageModel, control: bool = False) -> Stage2Parameters:
    """Load the image decoder of a stage-2 checkpoint into a model.

    Parameters
    ----------
    path : Path
    model : TwoStageModel
        Receives the decoder. A decoder that uses image tokens needs its encoder and backbone.
    control : bool
        The checkpoint is of stage 2's control, the same decoder without tokens.

    Raises
    ------
    CheckpointError
        As for `load_stage1`, or the decoder was trained on the tokens of another encoder.
    """
    content, name = load_checkpoint(path, "no_token_decoder" if control else "stage2"), display_path(path)
    config = _read_config(Stage2Parameters, content, path)
    token_dim = 0
    if find_decoder(config.decoder).uses_tokens and not control:
        if model.backbone is None:
            raise CheckpointError(f"{name}: decoder {config.decoder} uses tokens; give stage1_checkpoint")
        _check_backbone(content, model.backbone, path)
        if content["encoder"] != tensor_hash(model.encoder):
            raise CheckpointError(f"{name} was trained on the tokens of another stage-1 checkpoint")
        token_dim = hidden_size(model.backbone)
    decoder = build_decoder(config, token_dim)
    load_weights(decoder, content["weights"], name)
    model.decoder = decoder if model.backbone is None else decoder.to(model.device)
    model.freeze(None)
    return config


def load_trained(
    config: EvaluateParameters, device: torch.device | str
) -> tuple[TwoStageModel, Stage1Parameters | None, Stage2Parameters]:
    """Load the checkpoints of an evaluation; return the model and the parameters that its stages were trained with.

    Without `stage1_checkpoint`, the model is a decoder without image tokens and generates no texts.
    """
    stage2_path = resolve(config.stage2_checkpoint)
    if not config.stage1_checkpoint:
        model = TwoStageModel()
        stage2_config = load_stage2(stage2_path, model)
        model.to(device)
        return model, None, stage2_config
    backbone, tokenizer = build_backbone(config, device)
    model, stage1_config = load_stage1(resolve(config.stage1_checkpoint), backbone, tokenizer)
    return model, stage1_config, load_stage2(stage2_path, model)


def check_same_input(config: DataParameters, stage1: Stage1Parameters) -> None:
    """Check that the encoder gets the images that it was trained on, and is not tested on its training patients.

    Each notebook draws the split by patient again, so the parameters of the split must be the same. They may differ if
    the data come from another folder, or the test files from their own.

    Raises
    ------
    ParameterError
    """
    names = {"img_size": "", "num_coils": "", "crop": ""}
    if not config.test_dir and resolve(config.data_dir) == resolve(stage1.data_dir):
        consequence = "; with another split it is tested on patients that it has learned from"
        names |= dict.fromkeys(("split_seed", "val_fraction", "test_fraction", "val_dir", "test_dir"), consequence)
    for name, consequence in names.items():
        value, trained = getattr(config, name), getattr(stage1, name)
        if value != trained:
            raise ParameterError(
                f"{name}: {value!r}, but the k-space encoder was trained with {trained!r}{consequence}; use the same"
            )
