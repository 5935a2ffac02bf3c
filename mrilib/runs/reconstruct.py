"""One file to images and analyses with a run's model, no notebook."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from PIL import Image
from transformers.utils.logging import disable_progress_bar

from mrilib.config import EvaluateParameters, ParameterError, display_path, require_utf8, resolve
from mrilib.data import findings
from mrilib.data.check import _listed, unlisted_contrast
from mrilib.data.dataset import FastMRIDataset
from mrilib.data.fastmri_file import Volume, read_volume
from mrilib.data.sampler import make_loader
from mrilib.environment import git_state
from mrilib.evaluation.reconstructions import write_reconstruction
from mrilib.metrics.image import score_volume
from mrilib.model.baselines import zero_filled, zero_filled_image
from mrilib.model.two_stage import TwoStageModel
from mrilib.runs.record import read_record
from mrilib.training.device import pick_device
from mrilib.training.setup import load_trained

SUFFIXES = (".h5", ".jsonl", ".png")  # of what is written; the h5 appears first and tells what the others are of


def run_config(directory: Path, device: str = "auto") -> EvaluateParameters:
    """The parameters that a run folder was evaluated with, its weights being those in the folder.

    Raises
    ------
    ParameterError
        If the folder is no run, or its run did not get as far as evaluation.
    """
    record = read_record(directory)
    if "evaluate" not in record["notebooks"]:
        raise ParameterError(f"'{display_path(directory)}' was not evaluated; run 04_evaluate on it first")
    values = {**record["notebooks"]["evaluate"]["config"], "device": device}
    # The run's data may be gone, or lie elsewhere; its weights and the backbone must be there.
    values |= dict.fromkeys(
        (
            "val_dir",
            "test_dir",
            "annotations_dir",
            "reports_path",
            "constant_prefix_checkpoint",
            "no_token_decoder_checkpoint",
        ),
        "",
    )
    # Its own weights are those in this folder, whatever it was called when they were written, or is called so now.
    former = resolve(values["output_dir"])
    for name in ("stage1_checkpoint", "stage2_checkpoint"):
        path = resolve(values[name])
        if values[name] and path.is_relative_to(former):
            values[name] = str(directory.resolve() / path.relative_to(former))
    return EvaluateParameters.create(values, written_later=("data_dir",))


def load_run(directory: Path, device: str = "auto") -> tuple[TwoStageModel, EvaluateParameters]:
    """The trained model of a run folder, and its `run_config`."""
    config = run_config(directory, device)
    disable_progress_bar()  # transformers' bars for loading a file say nothing here
    return load_trained(config, pick_device(device))[0], config


# What decides what an image is of and how it was made: where these are the same, it may be written again.
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


def provenance(run: Path, config: EvaluateParameters, volume: Volume, acceleration: int | None) -> dict[str, Any]:
    """What was reconstructed, with which mask, weights and code; texts and numbers.

    `acceleration` is None for a file's own mask. Masks of fully sampled files are seeded by the file's name, as
    fastMRI does; `seed` is the run's.
    """
    fraction = 0.0
    if acceleration is not None:
        fraction = config.center_fractions[config.accelerations.index(acceleration)]
    return {
        "file": volume.path.name,
        "file_sha256": _digest(volume.path),
        "acceleration": volume.acceleration if acceleration is None else acceleration,
        "mask_type": "the file's own" if acceleration is None else config.mask_type,
        "center_fraction": fraction,
        "seed": config.seed,
        "num_coils": config.num_coils,
        "run": run.resolve().name,
        "stage1_checkpoint_sha256": _digest(resolve(config.stage1_checkpoint)),
        "stage2_checkpoint_sha256": _digest(resolve(config.stage2_checkpoint)),
        "git_commit": git_state()["commit"] or "",
        "mrilib_version": version("mrilib"),
    }


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_overwriting(out: Path, name: str, made_with: dict[str, Any]) -> None:
    """Refuse a folder that holds files of these names which come from something else.

    Raises
    ------
    ParameterError
        Naming a file, what it is, and what to do.
    """
    if out.exists() and not out.is_dir():
        raise ParameterError(f"--out {display_path(out)} is no folder; give another one")
    there = [path for path in (out / f"{name}{suffix}" for suffix in SUFFIXES) if path.exists()]
    if not there:
        return
    before: dict[str, Any] = {}
    if there[0].suffix == ".h5":
        try:
            with h5py.File(there[0], "r") as h5:
                before = dict(h5.attrs)
        except OSError:
            pass  # no h5 file: not written here
    if all(before.get(key) == made_with[key] for key in IDENTITY):
        return
    what = "it does not say where it is from"
    if before.keys() >= {"run", "acceleration"}:
        what = f"it is of run '{before['run']}', acceleration {before['acceleration']}"
        if before["run"] == made_with["run"] and before["acceleration"] == made_with["acceleration"]:
            differ = [key for key in IDENTITY if before.get(key) != made_with[key]]
            what += f", but of another {', '.join(differ)}"
    raise ParameterError(f"{display_path(there[0])} is there already: {what}; remove it, or give another --out")


def write_together(out: Path, files: dict[str, Callable[[Path], None]]) -> None:
    """Write files, each by a call with its path, under temporary names first: all of them appear, or none."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".") as folder:
        for name, write in files.items():
            write(Path(folder) / name)
        appeared: list[Path] = []
        try:
            for name in files:
                if not (out / name).exists():
                    appeared.append(out / name)
                os.replace(Path(folder) / name, out / name)
        except OSError:
            for path in appeared:
                path.unlink(missing_ok=True)
            raise


@torch.no_grad()
def reconstruct(run: Path, file: Path, out: Path, acceleration: int | None = None) -> Iterator[str]:
    """Reconstruct one fastMRI brain file and tell what the model says of it.

    Writes ``<file>.h5`` in fastMRI's submission format [file units], ``<file>.jsonl`` with the analysis of each slice,
    and ``<file>.png``, all slices in a row. The h5's attributes and every row say where they are from (`provenance`).
    A file with its own mask is taken as it is; a fully sampled one is undersampled with fastMRI's mask for its name.

    Parameters
    ----------
    run : Path
        Evaluated run folder.
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
    if volume.has_mask and acceleration is not None:
        raise ParameterError(f"{file.name} brings its own mask; leave --acceleration out")
    if acceleration is not None and acceleration not in config.accelerations:
        known = ", ".join(map(str, config.accelerations))
        raise ParameterError(f"--acceleration {acceleration}: the run has the accelerations {known}; give one of them")
    chosen = None if volume.has_mask else config.accelerations[0] if acceleration is None else acceleration
    made_with = provenance(run, config, volume, chosen)
    refuse_overwriting(out, volume.file, made_with)
    if unlisted := unlisted_contrast(volume):
        yield f"warning: {unlisted}"
    model, config = load_run(run)
    dataset = FastMRIDataset([volume], config, acceleration=chosen)
    images, compressed, texts = [], [], []
    empty: list[int] = []
    for cpu_batch in make_loader(dataset, config.batch_size):
        batch = cpu_batch.to(model.device)
        empty += [one.slice_num for one, data in zip(batch.slices, cpu_batch.kspace, strict=True) if not data.any()]
        images.append(model(batch).cpu().numpy())
        compressed.append(zero_filled(cpu_batch.kspace, cpu_batch.scale, cpu_batch.image_shape).numpy())
        if model.encoder is not None:
            prefix = model.encoder(batch.kspace, batch.mask)
            texts += model.generate(prefix, [findings.prompt()] * len(batch.slices), config.max_new_tokens)
    stack = np.concatenate(images)
    if empty:
        yield f"warning: {file.name}: k-space is all zero in {_listed(empty)}; the image is zero there"
        stack[empty] = 0  # the model's magnitude is not below 1e-19, which the picture would show as white
    rows = [
        {"file": volume.file, "slice": number, "analysis": text, "provenance": made_with}
        for number, text in enumerate(texts)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    strip = np.concatenate(list(stack[:, ::-1]), axis=1)  # displayed flipped up/down, anterior on top
    top = float(stack.max())
    writers: tuple[Callable[[Path], Any], ...] = (
        lambda path: write_reconstruction(path, stack, made_with),
        lambda path: path.write_text(lines),
        lambda path: Image.fromarray((255 * strip / (top or 1)).round().astype(np.uint8)).save(path, "png"),
    )
    write_together(out, {f"{volume.file}{suffix}": write for suffix, write in zip(SUFFIXES, writers, strict=True)})
    yield f"{volume.file}: {len(stack)} slices" + (f", undersampled {chosen}x" if chosen else ", its own mask")
    for row in rows:
        yield f"  slice {row['slice']}: {row['analysis']}"
    target = None
    if volume.has_target:
        with h5py.File(file, "r") as h5:
            target = h5["reconstruction_rss"][()]
        scores = score_volume(target, stack)
        yield f"  SSIM {scores['ssim']:.3f}, PSNR {scores['psnr']:.2f} dB, NMSE {scores['nmse']:.4f}"
    if dataset.compresses:
        cost = _cost(dataset, target, np.concatenate(compressed))
        yield f"  {volume.coils} coils compressed to {config.num_coils}{cost}"
    yield f"  written to {out}: {volume.file}.h5, .jsonl, .png"


def _cost(dataset: FastMRIDataset, target: np.ndarray | None, compressed: np.ndarray) -> str:
    """What compression costs zero-filled images (slices, h, w), behind the numbers of coils."""
    if target is None:
        return "; without a target nothing tells what that costs"
    whole = dataset.uncompressed()
    every = np.stack([zero_filled_image(whole[number]).numpy() for number in range(len(whole))])
    more, fewer = (score_volume(target, images) for images in (every, compressed))
    return (
        f"; zero-filled of all coils SSIM {more['ssim']:.3f}, PSNR {more['psnr']:.2f} dB, "
        f"of the compressed SSIM {fewer['ssim']:.3f}, PSNR {fewer['psnr']:.2f} dB"
    )
