"""Trained models at work: loading them, reconstructing volumes, telling analyses, scoring texts against controls."""

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mrilib.config import (
    EvaluateParameters,
    ParameterError,
    resolve,
)
from mrilib.data import findings as findings_module
from mrilib.data.dataset import Batch, FastMRIDataset, Slice, Volume
from mrilib.data.findings import Facts
from mrilib.data.sampler import collate, make_loader
from mrilib.evaluation.reconstructions import (
    Comparison,
    NearestTrainingSlice,
    PickedSlice,
    contrast_floor,
    read_slice,
    read_target,
    write_reconstruction,
)
from mrilib.metrics import text_scores
from mrilib.metrics.image import clustered_mean
from mrilib.model.baselines import zero_filled, zero_filled_image
from mrilib.model.two_stage import TwoStageModel
from mrilib.progress import progress_bar
from mrilib.training.checkpoint import load_checkpoint


def other_patient(dataset: FastMRIDataset, seed: int) -> list[int]:
    """For each slice of a dataset, one of another patient, drawn at random; for the swaps.

    Returns
    -------
    list of int
        Empty if the dataset holds one patient only: that question cannot be asked then.
    """
    patients = np.array([dataset.volumes[volume].patient for volume, _ in dataset.samples])
    if len(set(patients)) < 2:
        return []
    rng = np.random.default_rng(seed)
    return [int(rng.choice(np.flatnonzero(patients != patient))) for patient in patients]


class VolumeWriter:
    """Collects slices, and writes each volume in fastMRI's submission format when its last slice has come.

    Parameters
    ----------
    directory : Path
        Receives ``<method>/<acceleration>/<file>.h5``.
    volumes : sequence of Volume
    """

    def __init__(self, directory: Path, volumes: Sequence[Volume]) -> None:
        self.directory = directory
        self.sizes = {volume.file: volume.slices for volume in volumes}
        self.waiting: dict[tuple[str, int, str], dict[int, np.ndarray]] = defaultdict(dict)

    def add(self, method: str, acceleration: int, slices: Sequence[Slice], images: Tensor | np.ndarray) -> None:
        """Take images (B, h, w) [file units] of slices."""
        array = images.detach().cpu().numpy() if isinstance(images, Tensor) else images
        for one, image in zip(slices, array, strict=True):
            key = (method, acceleration, one.file)
            self.waiting[key][one.slice_num] = image
            if len(self.waiting[key]) == self.sizes[one.file]:
                done = self.waiting.pop(key)
                path = self.directory / method / str(acceleration) / f"{one.file}.h5"
                write_reconstruction(path, np.stack([done[number] for number in sorted(done)]))


class Evaluator:
    """One pass over the test slices at one acceleration: images of every method, texts and their scores.

    Parameters
    ----------
    model : TwoStageModel
        With encoder and decoder.
    control : TwoStageModel, optional
        Stage 1's control without k-space.
    plain : TwoStageModel, optional
        With the decoder trained without tokens.
    nearest : NearestTrainingSlice, optional
    max_new_tokens : int
        Longest generated analysis.
    others : mapping, optional
        Further methods without training: name → function from a batch with all coils to images (B, h, w) [file units].
    """

    def __init__(
        self,
        model: TwoStageModel,
        control: TwoStageModel | None = None,
        plain: TwoStageModel | None = None,
        nearest: NearestTrainingSlice | None = None,
        max_new_tokens: int = 128,
        others: Mapping[str, Callable[[Batch], Tensor]] | None = None,
    ) -> None:
        self.others = others or {}
        self.model, self.control, self.plain, self.nearest = model, control, plain, nearest
        self.max_new_tokens = max_new_tokens
        self._control_texts: dict[str, str] = {}

    @torch.no_grad()
    def run(
        self, dataset: FastMRIDataset, batch_size: int, writer: VolumeWriter, seed: int = 0, interactive: bool = False
    ) -> list[dict[str, Any]]:
        """Reconstruct into `writer`, and return one row of text scores a slice.

        Parameters
        ----------
        dataset : FastMRIDataset
            Test slices at one acceleration.
        batch_size : int
            Slices a batch.
        writer : VolumeWriter
        seed : int
            Seed of the draw of other patients.
        interactive : bool
            Show a notebook's progress widget.
        """
        check_covers(dataset)
        rows: list[dict[str, Any]] = []
        drawn = other_patient(dataset, seed)
        partners = dict(zip(dataset.samples, drawn, strict=True)) if drawn else {}
        number = {volume.file: index for index, volume in enumerate(dataset.volumes)}
        loader = make_loader(dataset, batch_size)
        bar = progress_bar(len(loader), "test", interactive)
        for cpu_batch in loader:
            batch = cpu_batch.to(self.model.device)
            if dataset.compresses:
                compressed = zero_filled(batch.kspace, batch.scale, batch.image_shape)
                writer.add("zero_filled_compressed", batch.slices[0].acceleration, batch.slices, compressed)
            else:
                self._write_unlearned(batch, writer)
            for method, images in self._images_without_tokens(batch):
                writer.add(method, batch.slices[0].acceleration, batch.slices, images)
            if self.model.encoder is None:
                bar.update()
                continue
            prefix = self.model.encoder(batch.kspace, batch.mask)
            others = [dataset[partners[number[one.file], one.slice_num]] for one in batch.slices] if partners else []
            other_prefix = torch.cat([self._prefix(one) for one in others]) if others else None
            for method, images in self._images_by_tokens(batch, prefix, other_prefix):
                writer.add(method, batch.slices[0].acceleration, batch.slices, images)
            rows += self._texts(batch, prefix, other_prefix, others)
            bar.update()
        if dataset.compresses:  # these need no compression; zero_filled_compressed shows what compression costs
            for batch in make_loader(dataset.uncompressed(), batch_size):
                self._write_unlearned(batch, writer)
        bar.close()
        return rows

    def _write_unlearned(self, batch: Batch, writer: VolumeWriter) -> None:
        acceleration, slices = batch.slices[0].acceleration, batch.slices
        writer.add("zero_filled", acceleration, slices, zero_filled(batch.kspace, batch.scale, batch.image_shape))
        for name, reconstruct in self.others.items():
            writer.add(name, acceleration, slices, reconstruct(batch))

    def _prefix(self, one: Slice) -> Tensor:
        batch = collate([one]).to(self.model.device)
        return self.model.encoder(batch.kspace, batch.mask)

    def _images_without_tokens(self, batch: Batch) -> Iterator[tuple[str, Tensor | np.ndarray]]:
        if not self.model.uses_tokens:
            yield "model", self.model.reconstruct(batch, None)
        if self.plain is not None:
            yield "trained_without_tokens", self.plain.reconstruct(batch, None)
        if self.nearest is not None and batch.target is not None:
            yield "nearest_training_slice", np.stack([self.nearest.answer(t.cpu().numpy()) for t in batch.target])

    def _images_by_tokens(
        self, batch: Batch, prefix: Tensor, other_prefix: Tensor | None
    ) -> Iterator[tuple[str, Tensor | np.ndarray]]:
        model = self.model
        yield "model", model.reconstruct(batch, model.image_tokens_from_prefix(prefix))
        if other_prefix is not None:
            yield "other_patient_tokens", model.reconstruct(batch, model.image_tokens_from_prefix(other_prefix))
        yield "no_tokens", model.reconstruct(batch, None)

    def _texts(
        self, batch: Batch, prefix: Tensor, other_prefix: Tensor | None, others: Sequence[Slice]
    ) -> list[dict[str, Any]]:
        model, slices = self.model, batch.slices
        prompts = [one.report.prompt if one.report else findings_module.prompt() for one in slices]
        generated = model.generate(prefix, prompts, self.max_new_tokens)
        losses = {"own": model.analysis_loss_from_prefix(prefix, slices)}
        if other_prefix is not None:
            losses["other_patient"] = model.analysis_loss_from_prefix(other_prefix, slices)
        control_texts: list[str | None] = [None] * len(slices)
        if self.control is not None:
            control_prefix = self.control.encoder(batch.kspace, batch.mask)
            losses["without_kspace"] = self.control.analysis_loss_from_prefix(control_prefix, slices)
            control_texts = [self._control_text(prompt, control_prefix) for prompt in prompts]
        rows = []
        for i, one in enumerate(slices):
            row: dict[str, Any] = {
                "file": one.file,
                "slice": one.slice_num,
                "patient": one.patient,
                "acceleration": one.acceleration,
                "true": one.report.response if one.report else findings_module.answer(one.facts),
                "generated": generated[i],
                "generated_without_kspace": control_texts[i],
                "other_patient": others[i].patient if others else None,
                "tokens": int(losses["own"].tokens[i]),
                "facts": one.facts,
            }
            for name, loss in losses.items():
                row[f"nats_{name}"] = float(loss.cross_entropy[i])
                row[f"correct_{name}"] = int(loss.correct[i])
            rows.append(row)
        return rows

    def _control_text(self, prompt: str, control_prefix: Tensor) -> str:
        # The control sees nothing, so its greedy answer to a prompt is one and the same for every slice.
        assert self.control is not None
        if prompt not in self._control_texts:
            self._control_texts[prompt] = self.control.generate(control_prefix[:1], [prompt], self.max_new_tokens)[0]
        return self._control_texts[prompt]


def parse_or_none(text: str | None) -> Facts | None:
    """Facts of a generated text; None where it does not parse, which counts as a miss."""
    try:
        return findings_module.parse(text) if text else None
    except ValueError:
        return None


def score_texts(rows: Sequence[dict[str, Any]], training_facts: Sequence[Facts]) -> dict[str, Any]:
    """The "analysis" section of metrics.json from the rows of `Evaluator.run`.

    Cross-entropies are in nats a token; differences come with standard errors clustered by patient, which are None of
    a single one. That of another patient's scan is over the ``other_patient_samples`` rows that could be swapped.
    """
    patients = [row["patient"] for row in rows]
    tokens = [row["tokens"] for row in rows]
    truth = [row["facts"] for row in rows]
    told = [parse_or_none(row["generated"]) for row in rows]
    own = [row["nats_own"] for row in rows]
    names = Counter(facts.contrast for facts in truth if facts.contrast is not None)
    guess, guess_error = contrast_floor(names)
    findings = text_scores.finding_scores(truth, told)
    constant = text_scores.best_constant_answer(training_facts)
    constants = [Facts(facts.contrast, facts.level, constant) for facts in truth]
    scores: dict[str, Any] = {
        "cross_entropy": clustered_mean(own, tokens, patients)[0],
        "token_accuracy": sum(row["correct_own"] for row in rows) / sum(tokens),
        "contrast_accuracy": text_scores.attribute_accuracy(truth, told, "contrast"),
        "contrast_accuracy_se": _clustered_share(truth, told, patients),
        "contrast_commonest": guess,
        "contrast_commonest_se": guess_error if len(set(patients)) > 1 else None,
        "level_accuracy": text_scores.attribute_accuracy(truth, told, "level"),
        "finding_f1": findings["f1"],
        "finding_f1_se": _clustered_f1(truth, told, patients),
        "finding_precision": findings["precision"],
        "finding_recall": findings["recall"],
        "any_finding_accuracy": findings["any_finding_accuracy"],
        "finding_f1_best_constant": text_scores.finding_scores(truth, constants)["f1"],
        "parsed": sum(one is not None for one in told) / len(told),
        "samples": len(rows),
        "contrast_samples": names.total(),
        "reviewed_samples": findings["samples"],
        "patients": len(set(patients)),
    }
    if any("nats_without_kspace" in row for row in rows):
        scores |= _control_scores(rows, "without_kspace")
    swapped = [row for row in rows if "nats_other_patient" in row]
    scores |= _control_scores(swapped, "other_patient") | {"other_patient_samples": len(swapped)}
    if rows[0]["generated_without_kspace"] is not None:
        blind = [parse_or_none(row["generated_without_kspace"]) for row in rows]
        scores["contrast_accuracy_without_kspace_se"] = _clustered_share(truth, blind, patients)
        scores["contrast_accuracy_without_kspace"] = text_scores.attribute_accuracy(truth, blind, "contrast")
        scores["level_accuracy_without_kspace"] = text_scores.attribute_accuracy(truth, blind, "level")
        scores["finding_f1_without_kspace"] = text_scores.finding_scores(truth, blind)["f1"]
        scores["finding_f1_without_kspace_se"] = _clustered_f1(truth, blind, patients)
    return scores


def _control_scores(rows: Sequence[dict[str, Any]], control: str) -> dict[str, float | None]:
    """A control's cross-entropy on some rows, and its difference to the model's own on the same; None without rows."""
    names = (f"cross_entropy_{control}", f"cross_entropy_gain_over_{control}", f"cross_entropy_gain_over_{control}_se")
    if not rows:
        return dict.fromkeys(names)
    patients, tokens = ([row[name] for row in rows] for name in ("patient", "tokens"))
    nats = [row[f"nats_{control}"] for row in rows]
    gain, error = clustered_mean([row[f"nats_{control}"] - row["nats_own"] for row in rows], tokens, patients)
    values = clustered_mean(nats, tokens, patients)[0], gain, error if np.isfinite(error) else None
    return dict(zip(names, values, strict=True))


def _clustered_share(truth: Sequence[Facts], told: Sequence[Facts | None], patients: Sequence[str]) -> float | None:
    """Standard error of the contrast accuracy, clustered by patient; None of one patient, or where none is known."""
    known = [number for number, one in enumerate(truth) if one.contrast is not None]
    if not known:
        return None
    right = [float((guess := told[i]) is not None and guess.contrast == truth[i].contrast) for i in known]
    error = clustered_mean(right, [1.0] * len(right), [patients[i] for i in known])[1]
    return error if np.isfinite(error) else None


def _clustered_f1(truth: Sequence[Facts], told: Sequence[Facts | None], patients: Sequence[str]) -> float | None:
    """Standard error of the findings' F1, a ratio of sums over slices, clustered by patient.

    None of one patient, and where there is nothing to find and nothing claimed.
    """
    parts, wholes, known = [], [], []
    for one, guess, patient in zip(truth, told, patients, strict=True):
        counts = text_scores.finding_counts(one, guess)
        if counts is not None:
            right, wrong, missed = counts
            parts.append(2.0 * right)
            wholes.append(2.0 * right + wrong + missed)
            known.append(patient)
    if not any(wholes):  # nothing to find and nothing claimed
        return None
    error = clustered_mean(parts, wholes, known)[1]
    return error if np.isfinite(error) else None


def write_texts(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write true and generated analyses, one JSON object a slice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [{name: value for name, value in row.items() if name != "facts"} for row in rows]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


def check_covers(dataset: FastMRIDataset) -> None:
    """Refuse ``crop: image`` to less than the targets that are to be scored, before anything is reconstructed."""
    config = dataset.config
    if config.crop == "image":
        for volume in dataset.volumes:
            if volume.has_target and config.img_size < min(volume.image_shape[1], max(volume.image_shape)):
                raise ParameterError(
                    f"img_size: crop: image to {config.img_size} pixels does not cover {volume.path.name}'s target, "
                    f"{volume.image_shape[0]}×{volume.image_shape[1]}, and metrics need all of it: take img_size "
                    f"{max(volume.image_shape)} or more, or crop: readout"
                )


@torch.no_grad()
def example_texts(model: TwoStageModel, dataset: FastMRIDataset, count: int, max_new_tokens: int = 128) -> pd.DataFrame:
    """True and generated analyses of a few slices, the contrasts taking turns."""
    by_contrast: dict[str | None, list[int]] = defaultdict(list)
    for index in range(len(dataset)):
        by_contrast[dataset.facts(index).contrast].append(index)
    turns = [index for group in itertools.zip_longest(*by_contrast.values()) for index in group if index is not None]
    rows = []
    for index in turns[:count]:
        one = dataset[index]
        batch = collate([one]).to(model.device)
        prompt = one.report.prompt if one.report else findings_module.prompt()
        text = model.generate(model.encoder(batch.kspace, batch.mask), [prompt], max_new_tokens)[0]
        truth = one.report.response if one.report else findings_module.answer(one.facts)
        rows.append({"file": one.file, "slice": one.slice_num, "true": truth, "generated": text})
    return pd.DataFrame(rows)


@torch.no_grad()
def preview(
    model: TwoStageModel, dataset: FastMRIDataset, count: int, reconstruct: Callable[[Batch], Tensor] | None = None
) -> list[Comparison]:
    """A few slices of a data set, spread evenly: target, zero-filled and the model's image.

    During a training `reconstruct` is the stage's own, which may read image tokens from the token cache.
    """
    shown = []
    whole = dataset.uncompressed()
    for index in np.linspace(0, len(dataset) - 1, count + 2).round().astype(int)[1:-1]:
        one = dataset[int(index)]
        batch = collate([one]).to(model.device)
        own = (reconstruct or model)(batch)
        images = {"zero_filled": zero_filled_image(whole[int(index)]), "model": own[0]}
        assert one.target is not None
        title = f"{one.facts.contrast or 'contrast unknown'}, slice {one.slice_num}\n{one.acceleration}x"
        shown.append(Comparison(one.target, images, one.maximum, title=title, pixel=one.pixel))
    return shown


def training_cost(config: EvaluateParameters) -> dict[str, Any]:
    """The "cost" section of metrics.json, from the checkpoints themselves: seconds, peak memory, trained parameters.

    The final checkpoint beside a given one tells what the whole training took; the best may be of an early epoch.
    """
    cost: dict[str, Any] = {"peak_memory_bytes": 0, "trainable_parameters": {}}
    for stage in ("stage1", "stage2") if config.stage1_checkpoint else ("stage2",):
        path = resolve(getattr(config, f"{stage}_checkpoint"))
        final = path.with_name(f"{stage}_final_model.pt")
        content = load_checkpoint(final if final.exists() else path, stage)["cost"]
        cost[f"{stage}_seconds"] = content["seconds"]
        cost["peak_memory_bytes"] = max(cost["peak_memory_bytes"], content["peak_memory_bytes"])
        cost["trainable_parameters"][stage] = content["trainable_parameters"]
    return cost


def comparisons(
    directory: Path, acceleration: int | str, picked: Sequence[PickedSlice], methods: Sequence[str]
) -> list[Comparison]:
    """Written reconstructions of picked slices beside their targets, for `figures.reconstruction_comparison`."""
    shown = []
    for volume, slice_num, role in picked:
        images = {method: read_slice(directory, method, acceleration, volume, slice_num) for method in methods}
        title = f"{role} volume\n{volume.acquisition}, slice {slice_num}\n{acceleration}x"
        target = read_target(volume, slice_num)
        shown.append(Comparison(target, images, volume.maximum, title=title, pixel=volume.pixel))
    return shown
