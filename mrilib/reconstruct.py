"""One file to images and analyses with a run's model, no notebook."""

import json
from collections.abc import Iterator
from pathlib import Path

import h5py
import matplotlib.image
import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from mrilib import analysis
from mrilib.config import EvaluateParameters, ParameterError, display_path, resolve
from mrilib.data import FastMRIDataset, make_loader, read_volume
from mrilib.evaluation import score_volume, write_reconstruction
from mrilib.inference import load_stage1, load_stage2
from mrilib.model import TwoStageModel, build_backbone
from mrilib.runs import read_record
from mrilib.training import pick_device


def load_run(directory: Path, device: str = "auto") -> tuple[TwoStageModel, EvaluateParameters]:
    """The trained model of a run folder, and the parameters that it was evaluated with.

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
        ("val_dir", "test_dir", "annotations_dir", "reports_path", "control_checkpoint", "plain_checkpoint"), ""
    )
    # Its own weights are those in this folder, whatever it was called when they were written, or is called so now.
    former = resolve(values["output_dir"])
    for name in ("stage1_checkpoint", "stage2_checkpoint"):
        path = resolve(values[name])
        if path.is_relative_to(former):
            values[name] = str(directory.resolve() / path.relative_to(former))
    config = EvaluateParameters.create(values, written_later=("data_dir",))
    disable_progress_bar()  # transformers' bars for loading a file say nothing here
    backbone, tokenizer = build_backbone(config, pick_device(device))
    model, _ = load_stage1(resolve(config.stage1_checkpoint), backbone, tokenizer)
    load_stage2(resolve(config.stage2_checkpoint), model)
    return model, config


@torch.no_grad()
def reconstruct(run: Path, file: Path, out: Path, acceleration: int | None = None) -> Iterator[str]:
    """Reconstruct one fastMRI brain file and tell what the model says of it.

    Writes ``<file>.h5`` in fastMRI's submission format [file units], ``<file>.jsonl`` with the analysis of each slice,
    and ``<file>.png``, all slices in a row. A file with its own mask is taken as it is; a fully sampled one is
    undersampled with fastMRI's mask for its name.

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
    model, config = load_run(run)
    volume = read_volume(file)
    if volume.has_mask and acceleration is not None:
        raise ParameterError(f"{file.name} brings its own mask; leave --acceleration out")
    chosen = None if volume.has_mask else acceleration or config.accelerations[0]
    dataset = FastMRIDataset([volume], config, acceleration=chosen)
    images, texts = [], []
    for cpu_batch in make_loader(dataset, config.batch_size):
        batch = cpu_batch.to(model.device)
        prefix = model.encoder(batch.kspace, batch.mask)
        images.append(model.reconstruct(batch, model.image_tokens_from_prefix(prefix)).cpu().numpy())
        texts += model.generate(prefix, [analysis.prompt()] * len(batch.slices), config.max_new_tokens)
    stack = np.concatenate(images)
    write_reconstruction(out / f"{volume.file}.h5", stack)
    rows = [{"file": volume.file, "slice": number, "analysis": text} for number, text in enumerate(texts)]
    (out / f"{volume.file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    strip = np.concatenate(list(stack[:, ::-1]), axis=1)  # displayed flipped up/down, anterior on top
    matplotlib.image.imsave(out / f"{volume.file}.png", strip, cmap="gray", vmin=0, vmax=float(stack.max()))
    yield f"{volume.file}: {len(stack)} slices" + (f", undersampled {chosen}x" if chosen else ", its own mask")
    for row in rows:
        yield f"  slice {row['slice']}: {row['analysis']}"
    if volume.has_target:
        with h5py.File(file, "r") as h5:
            scores = score_volume(h5["reconstruction_rss"][()], stack)
        yield f"  SSIM {scores['ssim']:.3f}, PSNR {scores['psnr']:.2f} dB, NMSE {scores['nmse']:.4f}"
    yield f"  written to {out}: {volume.file}.h5, .jsonl, .png"
