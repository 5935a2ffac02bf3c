"""Reconstruction of one file by a run's model, without a notebook: images and analyses."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from mrilib.config import EvaluateParameters, ParameterError, display_path, require_utf8, resolve
from mrilib.data import findings
from mrilib.data.check import list_slices, unlisted_contrast
from mrilib.data.dataset import FastMRIDataset
from mrilib.data.fastmri_file import Volume, read_volume
from mrilib.data.sampler import make_loader
from mrilib.data.splits import load_annotations
from mrilib.environment import git_state
from mrilib.evaluation.pictures import draw_volume
from mrilib.evaluation.reconstructions import write_reconstruction
from mrilib.files import read_json, write_together
from mrilib.metrics.image import score_volume
from mrilib.metrics.text_scores import text_warning
from mrilib.model.baselines import zero_filled, zero_filled_image
from mrilib.model.two_stage import TwoStageModel
from mrilib.runs.pretrained import from_pretrained, is_pretrained, read_pretrained, run_config
from mrilib.training.device import pick_device
from mrilib.training.setup import load_trained

SUFFIXES = (".h5", ".jsonl", ".png")  # of the output; the h5 file comes first and describes the others
# Attributes that identify a reconstruction: if all are equal, it may be replaced.
IDENTITY = (
    "file_sha256",
    "acceleration",
    "mask_type",
    "center_fraction",
    "seed",
    "num_coils",
    "stage1_checkpoint_sha256",
    "stage2_checkpoint_sha256",
)


def load_run(directory: Path, device: str = "auto") -> tuple[TwoStageModel, EvaluateParameters]:
    """Load the trained model of a run folder, or an exported model; return it with its `run_config`."""
    disable_progress_bar()  # transformers' bars for loading files
    if is_pretrained(directory):
        return from_pretrained(directory, device)
    config = run_config(directory, device)
    return load_trained(config, pick_device(device))[0], config


def provenance(run: Path, config: EvaluateParameters, volume: Volume, acceleration: int | None) -> dict[str, Any]:
    """Return file, mask, weights and code of a reconstruction, as texts and numbers.

    `acceleration` is None for a file with its own mask. The mask of a fully sampled file is seeded by the file's name,
    as in fastMRI; `seed` is the run's.
    """
    fraction = 0.0
    if acceleration is not None:
        fraction = config.center_fractions[config.accelerations.index(acceleration)]
    return {
        "file": volume.path.name,
        "file_sha256": _sha256(volume.path),
        "acceleration": volume.acceleration if acceleration is None else acceleration,
        "mask_type": "the file's own" if acceleration is None else config.mask_type,
        "center_fraction": fraction,
        "seed": config.seed,
        "num_coils": config.num_coils,
        "run": run.resolve().name,
        "stage1_checkpoint_sha256": _sha256(resolve(config.stage1_checkpoint)),
        "stage2_checkpoint_sha256": _sha256(resolve(config.stage2_checkpoint)),
        "git_commit": git_state()["commit"] or "",
        "mrilib_version": version("mrilib"),
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_overwriting(out: Path, name: str, new: dict[str, Any]) -> None:
    """Refuse to replace output files unless they are the same reconstruction.

    Parameters
    ----------
    out : Path
        Output folder.
    name : str
        Name of the volume.
    new : dict
        `provenance` of the new reconstruction.

    Raises
    ------
    ParameterError
        Naming a file and its provenance.
    """
    if out.exists() and not out.is_dir():
        raise ParameterError(f"--out {display_path(out)} is not a folder; give another one")
    existing = [path for path in (out / f"{name}{suffix}" for suffix in SUFFIXES) if path.exists()]
    if not existing:
        return
    old: dict[str, Any] = {}
    if existing[0].suffix == ".h5":
        try:
            with h5py.File(existing[0], "r") as h5:
                old = dict(h5.attrs)
        except OSError:
            pass  # not an h5 file, so not a reconstruction
    if all(old.get(key) == new[key] for key in IDENTITY):
        return
    origin = "its origin is unknown"
    if old.keys() >= {"run", "acceleration"}:
        origin = f"it is from run '{old['run']}', acceleration {old['acceleration']}"
        if old["run"] == new["run"] and old["acceleration"] == new["acceleration"]:
            differing = [key for key in IDENTITY if old.get(key) != new[key]]
            origin += f", with another {', '.join(differing)}"
    raise ParameterError(f"{display_path(existing[0])} exists, and {origin}; remove it, or give another --out")


class Output(NamedTuple):
    """Images and analyses of a volume."""

    images: np.ndarray  # (slices, h, w) [file units]
    zero_filled: np.ndarray  # (slices, h, w) from the compressed coils [file units]
    analyses: list[str]  # generated, one per slice; empty if the decoder uses no tokens
    known: list[str]  # true facts as far as they are known, one per analysis
    empty: list[int]  # slices with all-zero k-space


def reconstruct(run: Path, file: Path, out: Path, acceleration: int | None = None) -> Iterator[str]:
    """Reconstruct one fastMRI brain file and generate the analyses of its slices.

    Write ``<file>.h5`` in fastMRI's submission format [file units], ``<file>.jsonl`` with one analysis per slice, and
    ``<file>.png``, all slices with labels. The h5 file's attributes and every line of the jsonl file hold the
    `provenance`. A file with its own mask is used as it is; a fully sampled one is undersampled by fastMRI's mask.
    The true facts come from the file's attributes, and from fastMRI+ tables in the file's folder, if there are any.

    Parameters
    ----------
    run : Path
        Evaluated run folder, or the folder of an exported model.
    file : Path
        fastMRI brain multicoil h5 file.
    out : Path
        Output folder.
    acceleration : int, optional
        One of the run's accelerations; its first by default.

    Yields
    ------
    str
        A line for the console.
    """
    if run.is_file():
        raise ParameterError(
            f"'{run}' is a file, not a run folder; the first argument is the run folder, the second the file"
        )
    require_utf8(run.resolve())
    config, volume = run_config(run), read_volume(file)
    require_utf8(file.name)
    acceleration = _choose_acceleration(config, volume, acceleration)
    origin = provenance(run, config, volume, acceleration)
    refuse_overwriting(out, volume.file, origin)
    if warning := unlisted_contrast(volume):
        yield f"warning: {warning}"
    model, config = load_run(run)
    annotations = load_annotations(config.model_copy(update={"data_dir": str(file.resolve().parent)}))
    dataset = FastMRIDataset([volume], config, annotations, acceleration=acceleration)
    output = _run_model(model, dataset, config)
    if output.empty:
        slices = list_slices(output.empty)
        yield f"warning: {file.name}: k-space is all zero in {slices}; the image is zero there"
    mask = f"undersampled {acceleration}x" if acceleration else "its own mask"
    if is_pretrained(run):
        metrics = read_pretrained(run)["metrics"]
    else:
        metrics = read_json(run / "metrics.json") if (run / "metrics.json").is_file() else {}
    warning = text_warning(metrics.get("analysis"))
    method = "image decoder without tokens" if model.encoder is None else "two-stage model"
    title = f"{volume.file}: {method} of run {origin['run']}, {mask}"
    _write(out, volume, output, origin, title, warning)
    yield f"{volume.file}: {len(output.images)} slices, {mask}"
    if output.analyses:
        yield f"  {warning}"
    for number, (analysis, known) in enumerate(zip(output.analyses, output.known, strict=True)):
        yield f"  slice {number}, generated: {analysis}"
        yield f"  slice {number}, known:     {known}"
    target = None
    if volume.has_target:
        with h5py.File(file, "r") as h5:
            target = h5["reconstruction_rss"][()]
        scores = score_volume(target, output.images)
        yield f"  SSIM {scores['ssim']:.3f}, PSNR {scores['psnr']:.2f} dB, NMSE {scores['nmse']:.4f}"
    if dataset.compresses:
        cost = _compression_cost(dataset, target, output.zero_filled)
        yield f"  {volume.coils} coils compressed to {config.num_coils}{cost}"
    yield f"  written to {out}: {', '.join(volume.file + suffix for suffix in SUFFIXES)}"


def _choose_acceleration(config: EvaluateParameters, volume: Volume, acceleration: int | None) -> int | None:
    """Return the acceleration of the mask; None for a file with its own mask."""
    if volume.has_mask and acceleration is not None:
        raise ParameterError(f"{volume.path.name} has its own mask; leave --acceleration out")
    if acceleration is not None and acceleration not in config.accelerations:
        known = ", ".join(map(str, config.accelerations))
        raise ParameterError(f"--acceleration {acceleration}: the run has the accelerations {known}; give one of them")
    return None if volume.has_mask else acceleration or config.accelerations[0]


@torch.no_grad()
def _run_model(model: TwoStageModel, dataset: FastMRIDataset, config: EvaluateParameters) -> Output:
    images, compressed = [], []
    analyses: list[str] = []
    empty: list[int] = []
    for cpu_batch in make_loader(dataset, config.batch_size):
        batch = cpu_batch.to(model.device)
        empty += [one.slice_num for one, data in zip(batch.slices, cpu_batch.kspace, strict=True) if not data.any()]
        images.append(model(batch).cpu().numpy())
        compressed.append(zero_filled(cpu_batch.kspace, cpu_batch.scale, cpu_batch.image_shape).numpy())
        if model.encoder is not None:
            prefix = model.encoder(batch.kspace, batch.mask)
            analyses += model.generate(prefix, [findings.prompt()] * len(batch.slices), config.max_new_tokens)
    stack = np.concatenate(images)
    stack[empty] = 0  # the model's magnitude is at least 1e-19 there, which the picture would show as white
    known = [_known_text(dataset.facts(number)) for number in range(len(analyses))]
    return Output(stack, np.concatenate(compressed), analyses, known, empty)


def _known_text(facts: findings.Facts) -> str:
    unknown = [name for name in ("contrast", "findings") if getattr(facts, name) is None]
    return findings.answer(facts) + (f" Unknown: {', '.join(unknown)}." if unknown else "")


def _write(out: Path, volume: Volume, output: Output, origin: dict[str, Any], title: str, warning: str) -> None:
    name = volume.file
    rows: Sequence[dict[str, Any]] = [
        {"file": name, "slice": number, "analysis": analysis, "known": known, "warning": warning, "provenance": origin}
        for number, (analysis, known) in enumerate(zip(output.analyses, output.known, strict=True))
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    picture = draw_volume(output.images, (title, "Research model's output, not for diagnosis."), volume.pixel)
    writers = (
        lambda path: write_reconstruction(path, output.images, origin),
        lambda path: path.write_text(lines),
        lambda path: picture.save(path, "png"),
    )
    write_together(out, {f"{name}{suffix}": write for suffix, write in zip(SUFFIXES, writers, strict=True)})


def _compression_cost(dataset: FastMRIDataset, target: np.ndarray | None, compressed: np.ndarray) -> str:
    """Return a clause with the scores of zero-filled images (slices, h, w) from all and from the compressed coils."""
    if target is None:
        return "; without a target the cost of compression is unknown"
    uncompressed = dataset.uncompressed()
    all_coils = np.stack([zero_filled_image(uncompressed[number]).numpy() for number in range(len(uncompressed))])
    full, reduced = (score_volume(target, images) for images in (all_coils, compressed))
    return (
        f"; zero-filled image from all coils SSIM {full['ssim']:.3f}, PSNR {full['psnr']:.2f} dB, "
        f"from the compressed ones SSIM {reduced['ssim']:.3f}, PSNR {reduced['psnr']:.2f} dB"
    )
