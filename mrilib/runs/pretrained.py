"""Trained models as folders: two safetensors files, their parameters and a model card.

`export` writes such a folder from a run, `from_pretrained` loads it. ``models/phantom`` is one.
"""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mrilib.config import (
    EvaluateParameters,
    ParameterError,
    Stage1Parameters,
    Stage2Parameters,
    display_path,
    resolve,
)
from mrilib.files import read_json, write_json, write_text, write_together
from mrilib.model.decoders import build_decoder, find_decoder
from mrilib.model.two_stage import TwoStageModel, build_backbone, build_encoder, hidden_size, tensor_hash
from mrilib.runs.record import read_record
from mrilib.training.checkpoint import CheckpointError
from mrilib.training.device import pick_device
from mrilib.training.load_state import load_weights
from mrilib.training.setup import load_trained

FORMAT = 1  # of the folder; raise it when its content changes
ENCODER, DECODER, CONFIG = "encoder.safetensors", "decoder.safetensors", "config.json"
# Parameters of the evaluation that belong to the model; the others say where the run's data and weights were.
OF_THE_MODEL = (
    "num_coils",
    "img_size",
    "crop",
    "mask_type",
    "accelerations",
    "center_fractions",
    "config_path",
    "backbone_path",
    "tokenizer_path",
    "backbone_dtype",
    "max_new_tokens",
)


# Paths of the evaluation that a reconstruction does not need; they may no longer exist.
UNUSED_PATHS = (
    "val_dir",
    "test_dir",
    "annotations_dir",
    "reports_path",
    "constant_prefix_checkpoint",
    "no_token_decoder_checkpoint",
)


def is_pretrained(folder: Path) -> bool:
    """Whether a folder holds an exported model rather than a run."""
    return (folder / CONFIG).is_file() and (folder / DECODER).is_file()


def read_pretrained(folder: Path) -> dict[str, Any]:
    """Read an exported model's config.json.

    Raises
    ------
    CheckpointError
        If it is missing, or of another version.
    """
    content = read_json(folder / CONFIG)
    if not isinstance(content, dict) or content.get("format") != FORMAT or "evaluate" not in content:
        raise CheckpointError(f"'{display_path(folder / CONFIG)}' is not of an exported model, format {FORMAT}")
    return content


def pretrained_config(folder: Path, device: str = "auto") -> EvaluateParameters:
    """Return the parameters to reconstruct with an exported model; its files stand for the checkpoints."""
    values = read_pretrained(folder)["evaluate"]
    checkpoints = dict.fromkeys(("constant_prefix_checkpoint", "no_token_decoder_checkpoint"), "")
    has_encoder = (folder / ENCODER).is_file()
    checkpoints["stage1_checkpoint"] = str(folder.resolve() / ENCODER) if has_encoder else ""
    checkpoints["stage2_checkpoint"] = str(folder.resolve() / DECODER)
    return EvaluateParameters.create({**values, **checkpoints, "device": device}, written_later=("data_dir",))


def run_config(directory: Path, device: str = "auto") -> EvaluateParameters:
    """Return the parameters of a run's evaluation, with the weights in this folder, or those of an exported model.

    Raises
    ------
    ParameterError
        If the folder is not a run, or has no evaluation.
    """
    if is_pretrained(directory):
        return pretrained_config(directory, device)
    record = read_record(directory)
    if "evaluate" not in record["notebooks"]:
        raise ParameterError(f"'{display_path(directory)}' was not evaluated; run 04_evaluate on it first")
    values = {**record["notebooks"]["evaluate"]["config"], "device": device, **dict.fromkeys(UNUSED_PATHS, "")}
    # The folder may have been moved or copied since: its own weights are those inside it.
    former = resolve(values["output_dir"])
    for name in ("stage1_checkpoint", "stage2_checkpoint"):
        path = resolve(values[name])
        if values[name] and path.is_relative_to(former):
            values[name] = str(directory.resolve() / path.relative_to(former))
    return EvaluateParameters.create(values, written_later=("data_dir",))


def from_pretrained(folder: str | Path = "models/phantom", device: str = "auto") -> tuple[TwoStageModel, Any]:
    """Load an exported model.

    Parameters
    ----------
    folder : path
        Written by ``python -m mrilib export``; relative paths start at the repository's root.
    device : {"auto", "cuda", "cpu"}

    Returns
    -------
    model : TwoStageModel
        Frozen, in eval mode.
    config : EvaluateParameters
        Parameters of masks, coils and image size for `FastMRIDataset`.

    Raises
    ------
    CheckpointError
        A file is missing or damaged, or the backbone is another one than in training.
    """
    directory = resolve(folder)
    if not is_pretrained(directory):
        raise CheckpointError(f"'{display_path(directory)}' is not an exported model: it has no {CONFIG} or {DECODER}")
    content, config = read_pretrained(directory), pretrained_config(directory, device)
    stage2 = Stage2Parameters.model_construct(**content["stage2"])
    chosen, token_dim = pick_device(device), 0
    model = TwoStageModel()
    if find_decoder(stage2.decoder).uses_tokens:
        stage1 = Stage1Parameters.model_construct(**{**content["stage1"], "varnet_weights": ""})
        backbone, tokenizer = build_backbone(config, chosen)
        if tensor_hash(backbone) != content["backbone"]:
            raise CheckpointError(
                f"'{display_path(directory)}' was trained with another backbone than '{config.backbone_path}'"
            )
        encoder = build_encoder(stage1, backbone)
        _load(encoder, directory / ENCODER)
        model, token_dim = TwoStageModel(encoder.to(chosen), backbone, tokenizer), hidden_size(backbone)
    decoder = build_decoder(stage2, token_dim)
    _load(decoder, directory / DECODER)
    model.decoder = decoder.to(chosen)
    model.freeze(None)
    return model, config


def _load(module: nn.Module, path: Path) -> None:
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"'{display_path(path)}' cannot be read: {error}") from None
    load_weights(module, state, display_path(path))


def export(run: Path, folder: Path) -> int:
    """Write the trained model of an evaluated run into a folder, its weights in bfloat16; return the bytes written.

    Raises
    ------
    ParameterError
        The run was not evaluated, or the folder holds something else than an exported model.
    """
    record = read_record(run)
    if record["notebooks"].get("evaluate", {}).get("status") != "done":
        raise ParameterError(f"'{display_path(run)}' was not evaluated; run 04_evaluate on it first")
    if folder.exists() and not is_pretrained(folder) and any(folder.iterdir()):
        raise ParameterError(f"'{display_path(folder)}' exists and is not an exported model; give another folder")
    config = run_config(run, "cpu")
    model, stage1, stage2 = load_trained(config, "cpu")
    assert model.decoder is not None
    content = {
        "format": FORMAT,
        "run": run.resolve().name,
        "commits": {name: section.get("git", {}).get("commit") for name, section in record["notebooks"].items()},
        "evaluate": {name: config.to_dict()[name] for name in OF_THE_MODEL},
        "stage1": stage1.to_dict() if stage1 is not None else None,
        "stage2": stage2.to_dict(),
        "backbone": tensor_hash(model.backbone) if model.backbone is not None else None,
        "metrics": read_json(run / "metrics.json"),
    }
    writers = {
        CONFIG: lambda path: write_json(path, content),
        DECODER: lambda path: save_file(_rounded(model.decoder), path),
        "README.md": lambda path: write_text(path, card(content)),
    }
    if model.encoder is not None:
        writers[ENCODER] = lambda path: save_file(_rounded(model.encoder), path)
    write_together(folder, writers)
    return sum((folder / name).stat().st_size for name in writers)


def _rounded(module: nn.Module | None) -> dict[str, Tensor]:
    """Weights in bfloat16, each tensor with its own memory."""
    assert module is not None
    state = module.state_dict().items()
    return {name: (value.bfloat16() if value.is_floating_point() else value).contiguous() for name, value in state}


def _training(content: dict[str, Any]) -> list[str]:
    """State data, steps and commits of the stages."""
    lines = []
    for name in ("stage1", "stage2"):
        if (config := content[name]) is not None:
            limit = f", at most {config['max_steps']} steps" if config["max_steps"] else ""
            lines.append(
                f"{name}: {config['epochs']} epochs{limit}, {config['batch_size']} slices per batch, data "
                f"`{config['data_dir']}`, code of commit {content['commits'].get(name) or 'unknown'}. "
                f"All parameters are in `{CONFIG}`."
            )
    return lines


def card(content: dict[str, Any]) -> str:
    """Write an exported model's card in Markdown, with the scores of its run."""
    evaluated, metrics = content["evaluate"], content["metrics"]
    lines = [
        f"# Model of run `{content['run']}`",
        "",
        "A k-space encoder and an image decoder for the frozen language model in "
        f"`{evaluated['backbone_path']}`, with weights in bfloat16. `mrilib.from_pretrained` loads this folder.",
        "",
        "**Research software. Not a medical device, not for diagnosis.** The generated texts omit findings and add "
        "false ones.",
        "",
        *(f"- {line}" for line in _training(content)),
        f"- Input: {evaluated['mask_type']} masks, {evaluated['accelerations']}-fold, at most {evaluated['num_coils']} "
        f"coils after compression, {evaluated['img_size']} pixels.",
        "- Scores before rounding to bfloat16, on the run's test patients:",
        "",
        "| acceleration | SSIM | PSNR [dB] | zero-filled SSIM | zero-filled PSNR [dB] |",
        "|---|---|---|---|---|",
    ]
    for acceleration, methods in metrics.get("reconstruction", {}).items():
        own, zero_filled = methods["model"], methods["zero_filled"]
        lines.append(
            f"| {acceleration}x | {own['ssim']:.3f} | {own['psnr']:.1f} | {zero_filled['ssim']:.3f} | "
            f"{zero_filled['psnr']:.1f} |"
        )
    if "analysis" in metrics:
        scores = metrics["analysis"]
        f1 = "–" if scores.get("finding_f1") is None else f"{scores['finding_f1']:.2f}"
        lines += ["", f"Contrast accuracy of the texts {scores['contrast_accuracy']:.2f}, F1 of their findings {f1}."]
    return "\n".join(lines) + "\n"
