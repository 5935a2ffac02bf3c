"""The example of 00_quickstart: one slice of a new phantom patient, reconstructed and described by a trained model."""

import shutil
from typing import NamedTuple

import numpy as np
import torch

from mrilib.comparison import bart
from mrilib.config import EvaluateParameters, ParameterError, QuickstartParameters, display_path, resolve
from mrilib.data import findings
from mrilib.data.annotations import Annotations
from mrilib.data.dataset import FastMRIDataset
from mrilib.data.fastmri_file import Volume
from mrilib.data.sampler import make_loader
from mrilib.data.splits import index_volumes, load_annotations
from mrilib.evaluation.examples import zoom_on
from mrilib.evaluation.inference import parse_or_none
from mrilib.evaluation.reconstructions import Comparison, read_target
from mrilib.metrics import lesions, text_scores
from mrilib.metrics.image import head_mask
from mrilib.model.baselines import zero_filled
from mrilib.model.two_stage import TwoStageModel
from mrilib.phantom.dataset import make_dataset

VOLUMES, SLICES = 3, 4  # of the phantom patient: one volume for each contrast


class Example(NamedTuple):
    """A reconstructed slice with its texts."""

    comparison: Comparison  # the whole slice
    zoom: Comparison | None  # its largest lesion; the scores are contrast retentions
    name: str  # contrast, slice and acceleration
    true: str
    generated: str
    errors: list[str]  # of the generated text, `text_scores.list_errors`


def make_patient(config: QuickstartParameters, model: EvaluateParameters) -> tuple[list[Volume], Annotations]:
    """Read the files of `data_dir`, or of a phantom patient, which is written first if it does not exist.

    Raises
    ------
    ParameterError
        The folder has no annotated file with a target.
    """
    directory = resolve(config.data_dir or f"data/quickstart_{config.phantom_seed}")
    if not config.data_dir:  # a finished data set is not written again
        make_dataset(directory, VOLUMES, SLICES, model.img_size, seed=config.phantom_seed, progress=False)
    settings = model.model_copy(update={"data_dir": str(directory), "annotations_dir": ""})
    annotations = load_annotations(settings)
    volumes = [volume for volume in index_volumes(directory) if volume.has_target and not volume.has_mask]
    if annotations is None or not volumes:
        raise ParameterError(
            f"data_dir: '{display_path(directory)}' needs fully sampled files and fastMRI+'s brain.csv; "
            "give another folder, or leave it empty for a phantom patient"
        )
    return volumes, annotations


def largest_lesion(volumes: list[Volume], annotations: Annotations) -> tuple[Volume, int]:
    """Return volume and slice of the largest lesion that the target shows; the first middle slice without any."""
    best, chosen = 0.0, (volumes[0], volumes[0].slices // 2)
    for volume in volumes:
        for number in range(volume.slices):
            target = read_target(volume, number)
            boxes = annotations.boxes(volume.file, number, target.shape[0])
            for box, *_ in lesions.measure(target, target, boxes, head_mask(target[None])[0]):
                if box.width * box.height > best:
                    best, chosen = box.width * box.height, (volume, number)
    return chosen


@torch.no_grad()
def reconstruct_example(model: TwoStageModel, settings: EvaluateParameters, config: QuickstartParameters) -> Example:
    """Reconstruct and describe the slice with the largest lesion.

    Parameters
    ----------
    model : TwoStageModel
    settings : EvaluateParameters
        From `pretrained.from_pretrained`.
    config : QuickstartParameters
    """
    if config.acceleration not in settings.accelerations:
        known = ", ".join(map(str, settings.accelerations))
        raise ParameterError(f"acceleration: {config.acceleration} is not one of the model's: {known}")
    volumes, annotations = make_patient(config, settings)
    volume, number = largest_lesion(volumes, annotations)
    data = FastMRIDataset([volume], settings, annotations, acceleration=config.acceleration)
    batch = list(make_loader(data, 1))[number].to(model.device)
    whole = list(make_loader(data.uncompressed(), 1))[number]
    images = {
        "model": model(batch)[0].cpu().numpy(),
        "zero_filled": zero_filled(whole.kspace, whole.scale, whole.image_shape)[0].numpy(),
    }
    if shutil.which("bart"):
        images["bart"] = bart.reconstruct(whole, bart.Settings())[0].numpy()
    target = read_target(volume, number)
    boxes = annotations.boxes(volume.file, number, target.shape[0])
    name = f"{volume.acquisition}, slice {number}, {config.acceleration}x"
    comparison = Comparison(target, images, volume.maximum, title=name, boxes=boxes, pixel=volume.pixel)
    facts, generated = data.facts(number), ""
    if model.encoder is not None:
        prefix = model.encoder(batch.kspace, batch.mask)
        (generated,) = model.generate(prefix, [findings.prompt()], settings.max_new_tokens)
    errors = text_scores.list_errors(facts, parse_or_none(generated))
    return Example(comparison, _zoom(comparison), name, findings.answer(facts), generated, errors)


def _zoom(comparison: Comparison) -> Comparison | None:
    """Zoom on the largest lesion that the target shows, with each method's contrast retention."""
    target = np.asarray(comparison.target)
    head = head_mask(target[None])[0]
    retention: dict[str, dict[str, float]] = {}
    chosen = None
    for name, image in comparison.images.items():
        measured = lesions.measure(target, np.asarray(image), comparison.boxes, head)
        if not measured:
            return None
        chosen, true, own = max(measured, key=lambda one: one[0].width * one[0].height)
        retention[name] = {"retention": own / true}
    assert chosen is not None
    return comparison._replace(
        title=chosen.label, scores=retention, zoom=zoom_on(chosen, (target.shape[0], target.shape[1]))
    )


def summary(example: Example) -> list[str]:
    """State in sentences what the reconstruction and the text of the example get right and wrong."""
    sentences = []
    if example.zoom is not None and example.zoom.scores is not None:
        kept = example.zoom.scores["model"]["retention"]
        verdict = "lost" if kept < lesions.LOST else "kept"
        sentences.append(
            f"The model keeps {kept:.0%} of the contrast of the largest lesion ({example.zoom.title.lower()}): "
            f"it counts as {verdict} (lost: less than half)."
        )
    if example.generated:
        wrong = "; ".join(example.errors)
        verdict = f"wrong here: {wrong}" if wrong else "right here"
        sentences.append(f"The generated text is {verdict}.")
    return sentences
