"""Trained models on test data: reconstructions, generated texts, their scores and their controls."""

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mrilib.config import EvaluateParameters, ParameterError, Stage1Parameters, Stage2Parameters, resolve
from mrilib.data import findings as findings_module
from mrilib.data.dataset import Batch, FastMRIDataset, Slice, Volume
from mrilib.data.findings import Facts
from mrilib.data.sampler import collate, make_loader
from mrilib.evaluation.reconstructions import Comparison, NearestTrainingSlice, write_reconstruction
from mrilib.metrics import text_scores
from mrilib.metrics.image import bootstrap_interval, clustered_mean
from mrilib.model.baselines import zero_filled, zero_filled_image
from mrilib.model.two_stage import TwoStageModel, answer_of, prompt_of
from mrilib.progress import progress_bar
from mrilib.training import setup
from mrilib.training.checkpoint import load_checkpoint


class Models(NamedTuple):
    """The trained models of an evaluation."""

    system: TwoStageModel
    constant_prefix: TwoStageModel | None  # stage 1's baseline without k-space
    no_token_decoder: TwoStageModel | None  # with the decoder trained without tokens
    stage1: Stage1Parameters | None  # of the training; None if the decoder uses no tokens
    stage2: Stage2Parameters  # of the training


def load_models(config: EvaluateParameters, device: torch.device) -> Models:
    """Load the checkpoints of an evaluation.

    Raises
    ------
    ParameterError
        If stage 1 was trained with other inputs, or with patients that are now test patients.
    """
    system, stage1, stage2 = setup.load_trained(config, device)
    if stage1 is not None:
        setup.check_same_input(config, stage1)
    constant_prefix = no_token_decoder = None
    if config.constant_prefix_checkpoint:
        path = resolve(config.constant_prefix_checkpoint)
        constant_prefix = setup.load_constant_prefix(path, system.backbone, system.tokenizer)
    if config.no_token_decoder_checkpoint:
        no_token_decoder = TwoStageModel()
        setup.load_stage2(resolve(config.no_token_decoder_checkpoint), no_token_decoder, control=True)
        no_token_decoder.to(device)
    return Models(system, constant_prefix, no_token_decoder, stage1, stage2)


class VolumeWriter:
    """Writer that collects slices, and writes a volume in fastMRI's submission format when all its slices are there.

    Parameters
    ----------
    directory : Path
        Receives ``<method>/<acceleration>/<file>.h5``.
    volumes : sequence of Volume
    """

    def __init__(self, directory: Path, volumes: Sequence[Volume]) -> None:
        self.directory = directory
        self.sizes = {volume.file: volume.slices for volume in volumes}
        self.incomplete: dict[tuple[str, int, str], dict[int, np.ndarray]] = defaultdict(dict)

    def add(self, method: str, slices: Sequence[Slice], images: Tensor | np.ndarray) -> None:
        """Add a method's images (B, h, w) [file units] of some slices."""
        array = images.detach().cpu().numpy() if isinstance(images, Tensor) else images
        for one, image in zip(slices, array, strict=True):
            key = (method, one.acceleration, one.file)
            self.incomplete[key][one.slice_num] = image
            if len(self.incomplete[key]) == self.sizes[one.file]:
                volume = self.incomplete.pop(key)
                path = self.directory / method / str(one.acceleration) / f"{one.file}.h5"
                write_reconstruction(path, np.stack([volume[number] for number in sorted(volume)]))


class Evaluator:
    """One pass over the test slices at one acceleration: images of every method, and texts with their losses.

    Parameters
    ----------
    model : TwoStageModel
        With encoder and decoder, or with a decoder that uses no tokens.
    constant_prefix : TwoStageModel, optional
        Stage 1's baseline without k-space.
    no_token_decoder : TwoStageModel, optional
        With the decoder trained without tokens.
    nearest : NearestTrainingSlice, optional
    max_new_tokens : int
        Maximum length of a generated analysis.
    others : mapping, optional
        Further methods without training: name → function from a batch with all coils to images (B, h, w) [file units].
    """

    def __init__(
        self,
        model: TwoStageModel,
        constant_prefix: TwoStageModel | None = None,
        no_token_decoder: TwoStageModel | None = None,
        nearest: NearestTrainingSlice | None = None,
        max_new_tokens: int = 128,
        others: Mapping[str, Callable[[Batch], Tensor]] | None = None,
    ) -> None:
        self.model, self.constant_prefix, self.no_token_decoder = model, constant_prefix, no_token_decoder
        self.nearest, self.max_new_tokens = nearest, max_new_tokens
        self.others = others or {}
        self._constant_prefix_texts: dict[str, str] = {}  # prompt → text

    @torch.no_grad()
    def run(
        self, dataset: FastMRIDataset, batch_size: int, writer: VolumeWriter, seed: int = 0, interactive: bool = False
    ) -> list[dict[str, Any]]:
        """Reconstruct into `writer`, and return one row of text losses for each slice.

        Parameters
        ----------
        dataset : FastMRIDataset
            Test slices at one acceleration.
        batch_size : int
        writer : VolumeWriter
        seed : int
            Seed for drawing the slices of other patients.
        interactive : bool
            Show a notebook's progress widget.

        Raises
        ------
        ParameterError
            If ``crop: image`` cuts targets.
        """
        check_covers(dataset)
        rows: list[dict[str, Any]] = []
        partners = draw_other_patients(dataset, seed)
        loader = make_loader(dataset, batch_size)
        bar = progress_bar(len(loader), "test", interactive)
        for cpu_batch in loader:
            batch = cpu_batch.to(self.model.device)
            if dataset.compresses:
                image = zero_filled(batch.kspace, batch.scale, batch.image_shape)
                writer.add("zero_filled_compressed", batch.slices, image)
            else:
                self._write_untrained(batch, writer)
            for method, images in self._images_without_tokens(batch):
                writer.add(method, batch.slices, images)
            if self.model.encoder is not None:
                others = [dataset[partners[one.file, one.slice_num]] for one in batch.slices] if partners else []
                rows += self._run_tokens(batch, others, writer)
            bar.update()
        if dataset.compresses:  # methods without training use all coils
            for batch in make_loader(dataset.uncompressed(), batch_size):
                self._write_untrained(batch, writer)
        bar.close()
        return rows

    def _write_untrained(self, batch: Batch, writer: VolumeWriter) -> None:
        writer.add("zero_filled", batch.slices, zero_filled(batch.kspace, batch.scale, batch.image_shape))
        for name, reconstruct in self.others.items():
            writer.add(name, batch.slices, reconstruct(batch))

    def _images_without_tokens(self, batch: Batch) -> Iterator[tuple[str, Tensor | np.ndarray]]:
        if not self.model.uses_tokens:
            yield "model", self.model.reconstruct(batch, None)
        if self.no_token_decoder is not None:
            yield "trained_without_tokens", self.no_token_decoder.reconstruct(batch, None)
        if self.nearest is not None and batch.target is not None:
            yield "nearest_training_slice", np.stack([self.nearest.answer(t.cpu().numpy()) for t in batch.target])

    def _run_tokens(self, batch: Batch, others: Sequence[Slice], writer: VolumeWriter) -> list[dict[str, Any]]:
        """Reconstruct with own, shuffled and zero tokens, and return the rows of text losses."""
        model = self.model
        prefix = model.encoder(batch.kspace, batch.mask)
        shuffled = torch.cat([self._prefix(one) for one in others]) if others else None
        writer.add("model", batch.slices, model.reconstruct(batch, model.image_tokens_from_prefix(prefix)))
        if shuffled is not None:
            image = model.reconstruct(batch, model.image_tokens_from_prefix(shuffled))
            writer.add("other_patient_tokens", batch.slices, image)
        writer.add("no_tokens", batch.slices, model.reconstruct(batch, None))
        return self._text_rows(batch, prefix, shuffled, others)

    def _prefix(self, one: Slice) -> Tensor:
        batch = collate([one]).to(self.model.device)
        return self.model.encoder(batch.kspace, batch.mask)

    def _text_rows(
        self, batch: Batch, prefix: Tensor, shuffled: Tensor | None, others: Sequence[Slice]
    ) -> list[dict[str, Any]]:
        slices = batch.slices
        prompts = [prompt_of(one) for one in slices]
        generated = self.model.generate(prefix, prompts, self.max_new_tokens)
        losses = {"own": self.model.analysis_loss_from_prefix(prefix, slices)}
        if shuffled is not None:
            losses["other_patient"] = self.model.analysis_loss_from_prefix(shuffled, slices)
        constant_texts: list[str | None] = [None] * len(slices)
        if self.constant_prefix is not None:
            constant = self.constant_prefix.encoder(batch.kspace, batch.mask)
            losses["without_kspace"] = self.constant_prefix.analysis_loss_from_prefix(constant, slices)
            constant_texts = [self._constant_prefix_text(prompt, constant) for prompt in prompts]
        rows = []
        for i, one in enumerate(slices):
            row: dict[str, Any] = {
                "file": one.file,
                "slice": one.slice_num,
                "patient": one.patient,
                "acceleration": one.acceleration,
                "true": answer_of(one),
                "generated": generated[i],
                "generated_without_kspace": constant_texts[i],
                "other_patient": others[i].patient if others else None,
                "tokens": int(losses["own"].tokens[i]),
                "facts": one.facts,
            }
            for name, loss in losses.items():
                row[f"nats_{name}"] = float(loss.cross_entropy[i])
                row[f"correct_{name}"] = int(loss.correct[i])
            rows.append(row)
        return rows

    def _constant_prefix_text(self, prompt: str, prefix: Tensor) -> str:
        """Generate the text of the constant prefix, once for each prompt: it is the same for every slice."""
        assert self.constant_prefix is not None
        if prompt not in self._constant_prefix_texts:
            text = self.constant_prefix.generate(prefix[:1], [prompt], self.max_new_tokens)[0]
            self._constant_prefix_texts[prompt] = text
        return self._constant_prefix_texts[prompt]


def draw_other_patients(dataset: FastMRIDataset, seed: int) -> dict[tuple[str, int], int]:
    """Draw a random slice of another patient for each slice.

    Returns
    -------
    dict
        File and slice number → index of the drawn slice; empty if the dataset has only one patient.
    """
    patients = np.array([dataset.volumes[volume].patient for volume, _ in dataset.samples])
    if len(set(patients)) < 2:
        return {}
    rng = np.random.default_rng(seed)
    return {
        (dataset.volumes[volume].file, slice_num): int(rng.choice(np.flatnonzero(patients != patient)))
        for (volume, slice_num), patient in zip(dataset.samples, patients, strict=True)
    }


def check_covers(dataset: FastMRIDataset) -> None:
    """Raise ParameterError if ``crop: image`` cuts a target, because metrics need all of it."""
    config = dataset.config
    if config.crop != "image":
        return
    for volume in dataset.volumes:
        if volume.has_target and config.img_size < min(volume.image_shape[1], max(volume.image_shape)):
            raise ParameterError(
                f"img_size: crop: image to {config.img_size} pixels does not cover the target of {volume.path.name}, "
                f"{volume.image_shape[0]}×{volume.image_shape[1]}; "
                f"set img_size to {max(volume.image_shape)} or more, or crop: readout"
            )


# ---------------------------------------------------------------------------------------------- text scores


def score_texts(rows: Sequence[dict[str, Any]], training_facts: Sequence[Facts]) -> dict[str, Any]:
    """Compute the "analysis" section of metrics.json from the rows of `Evaluator.run`.

    Cross-entropies are in nats per token. Standard errors are clustered by patient, and None for a single patient.
    Scores with another patient's tokens cover the ``other_patient_samples`` rows for which one was drawn.
    """
    patients = [row["patient"] for row in rows]
    tokens = [row["tokens"] for row in rows]
    truth = [row["facts"] for row in rows]
    predicted = [parse_or_none(row["generated"]) for row in rows]
    contrasts = Counter(facts.contrast for facts in truth if facts.contrast is not None)
    commonest, commonest_error = text_scores.contrast_floor(contrasts)
    findings = text_scores.finding_scores(truth, predicted)
    constant = text_scores.best_constant_answer(training_facts)
    constant_answers = [Facts(facts.contrast, facts.level, constant) for facts in truth]
    scores: dict[str, Any] = {
        "cross_entropy": clustered_mean([row["nats_own"] for row in rows], tokens, patients)[0],
        "token_accuracy": sum(row["correct_own"] for row in rows) / sum(tokens),
        "contrast_accuracy": text_scores.attribute_accuracy(truth, predicted, "contrast"),
        "contrast_accuracy_se": _contrast_error(truth, predicted, patients),
        "contrast_commonest": commonest,
        "contrast_commonest_se": commonest_error if len(set(patients)) > 1 else None,
        "level_accuracy": text_scores.attribute_accuracy(truth, predicted, "level"),
        "finding_f1": findings["f1"],
        "finding_f1_se": _f1_error(truth, predicted, patients),
        "finding_f1_ci95": _f1_interval(truth, predicted, patients),
        "finding_precision": findings["precision"],
        "finding_recall": findings["recall"],
        "any_finding_accuracy": findings["any_finding_accuracy"],
        "finding_f1_best_constant": text_scores.finding_scores(truth, constant_answers)["f1"],
        "parsed": sum(facts is not None for facts in predicted) / len(predicted),
        "samples": len(rows),
        "contrast_samples": contrasts.total(),
        "reviewed_samples": findings["samples"],
        "patients": len(set(patients)),
        "contrast_confusion": text_scores.contrast_confusion(truth, predicted),
        **text_scores.count_errors(truth, predicted),
    }
    if any("nats_without_kspace" in row for row in rows):
        scores |= _control_scores(rows, "without_kspace")
    with_partner = [row for row in rows if "nats_other_patient" in row]
    scores |= _control_scores(with_partner, "other_patient") | {"other_patient_samples": len(with_partner)}
    if rows[0]["generated_without_kspace"] is not None:
        predicted = [parse_or_none(row["generated_without_kspace"]) for row in rows]
        scores["contrast_accuracy_without_kspace_se"] = _contrast_error(truth, predicted, patients)
        scores["contrast_accuracy_without_kspace"] = text_scores.attribute_accuracy(truth, predicted, "contrast")
        scores["level_accuracy_without_kspace"] = text_scores.attribute_accuracy(truth, predicted, "level")
        scores["finding_f1_without_kspace"] = text_scores.finding_scores(truth, predicted)["f1"]
        scores["finding_f1_without_kspace_se"] = _f1_error(truth, predicted, patients)
    return scores


def parse_or_none(text: str | None) -> Facts | None:
    """Parse a generated text; None if it cannot be parsed."""
    try:
        return findings_module.parse(text) if text else None
    except ValueError:
        return None


def _control_scores(rows: Sequence[dict[str, Any]], control: str) -> dict[str, float | None]:
    """Cross-entropy of a control, and its difference to the model's own on the same rows; None without rows."""
    names = (f"cross_entropy_{control}", f"cross_entropy_gain_over_{control}", f"cross_entropy_gain_over_{control}_se")
    if not rows:
        return dict.fromkeys(names)
    patients, tokens = ([row[name] for row in rows] for name in ("patient", "tokens"))
    nats = [row[f"nats_{control}"] for row in rows]
    gain, error = clustered_mean([row[f"nats_{control}"] - row["nats_own"] for row in rows], tokens, patients)
    values = clustered_mean(nats, tokens, patients)[0], gain, _finite_or_none(error)
    return dict(zip(names, values, strict=True))


def _contrast_error(truth: Sequence[Facts], predicted: Sequence[Facts | None], patients: Sequence[str]) -> float | None:
    """Compute the clustered standard error of the contrast accuracy; None for one patient or no known contrast."""
    correct, known = [], []
    for facts, guess, patient in zip(truth, predicted, patients, strict=True):
        if facts.contrast is not None:
            correct.append(float(guess is not None and guess.contrast == facts.contrast))
            known.append(patient)
    return _finite_or_none(clustered_mean(correct, [1.0] * len(correct), known)[1]) if known else None


def _f1_error(truth: Sequence[Facts], predicted: Sequence[Facts | None], patients: Sequence[str]) -> float | None:
    """Compute the clustered standard error of the F1 of findings; None for one patient or without any finding."""
    parts, totals, reviewed = _f1_terms(truth, predicted, patients)
    return _finite_or_none(clustered_mean(parts, totals, reviewed)[1]) if any(totals) else None


def _f1_interval(
    truth: Sequence[Facts], predicted: Sequence[Facts | None], patients: Sequence[str]
) -> list[float] | None:
    """Compute the 95% bootstrap interval of the F1 of findings over patients; None as for `_f1_error`."""
    parts, totals, reviewed = _f1_terms(truth, predicted, patients)
    return bootstrap_interval(parts, reviewed, totals)


def _f1_terms(
    truth: Sequence[Facts], predicted: Sequence[Facts | None], patients: Sequence[str]
) -> tuple[list[float], list[float], list[str]]:
    """Return numerator 2 TP and denominator 2 TP + FP + FN of F1 for each reviewed slice, and its patient."""
    parts, totals, reviewed = [], [], []
    for facts, guess, patient in zip(truth, predicted, patients, strict=True):
        counts = text_scores.finding_counts(facts, guess)
        if counts is not None:
            parts.append(2.0 * counts[0])
            totals.append(2.0 * counts[0] + counts[1] + counts[2])
            reviewed.append(patient)
    return parts, totals, reviewed


def _finite_or_none(value: float) -> float | None:
    return value if np.isfinite(value) else None


def write_texts(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows of `Evaluator.run`, one JSON object for each slice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writable = [{name: value for name, value in row.items() if name != "facts"} for row in rows]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in writable))


# ---------------------------------------------------------------------------------------------- for notebooks


@torch.no_grad()
def example_texts(model: TwoStageModel, dataset: FastMRIDataset, count: int, max_new_tokens: int = 128) -> pd.DataFrame:
    """Tabulate true and generated analyses of a few slices, of different patients as far as there are enough.

    The slices alternate between the contrasts. Columns: file, slice, true, generated.
    """
    by_contrast: dict[str | None, list[int]] = defaultdict(list)
    for index in range(len(dataset)):
        by_contrast[dataset.facts(index).contrast].append(index)
    turns = [index for group in itertools.zip_longest(*by_contrast.values()) for index in group if index is not None]
    patients: Counter[str] = Counter()
    ranks = []
    for index in turns:
        patient = dataset.volumes[dataset.samples[index][0]].patient
        ranks.append(patients[patient])
        patients[patient] += 1
    rows = []
    for index in [turns[place] for place in np.argsort(ranks, kind="stable")[:count]]:
        one = dataset[index]
        batch = collate([one]).to(model.device)
        text = model.generate(model.encoder(batch.kspace, batch.mask), [prompt_of(one)], max_new_tokens)[0]
        rows.append({"file": one.file, "slice": one.slice_num, "true": answer_of(one), "generated": text})
    return pd.DataFrame(rows)


def example_images(dataset: FastMRIDataset, table: pd.DataFrame) -> list[np.ndarray]:
    """Return the images (h, w) [file units] of the slices of `example_texts`: the target, or the zero-filled image."""
    places = {(dataset.volumes[v].file, slice_num): index for index, (v, slice_num) in enumerate(dataset.samples)}
    slices = [dataset[places[file, int(number)]] for file, number in zip(table["file"], table["slice"], strict=True)]
    return [np.asarray(zero_filled_image(one) if one.target is None else one.target) for one in slices]


@torch.no_grad()
def recall_by_label(
    model: TwoStageModel, dataset: FastMRIDataset, batch_size: int = 16, max_new_tokens: int = 128
) -> pd.DataFrame:
    """Count the true findings of each label, and those that the generated text states with side and region.

    Only slices with a finding are read; without any the table is empty. Columns: label, findings, found.
    """
    with_findings = [index for index in range(len(dataset)) if dataset.facts(index).findings]
    true, found = Counter[str](), Counter[str]()
    groups: dict[Any, list[int]] = defaultdict(list)
    for index in with_findings:
        groups[dataset.shape_key(index)].append(index)
    for indices in groups.values():
        for start in range(0, len(indices), batch_size):
            batch = collate([dataset[index] for index in indices[start : start + batch_size]]).to(model.device)
            prompts = [prompt_of(one) for one in batch.slices]
            texts = model.generate(model.encoder(batch.kspace, batch.mask), prompts, max_new_tokens)
            for one, text in zip(batch.slices, texts, strict=True):
                guess = parse_or_none(text)
                claimed = set(guess.findings or ()) if guess is not None else set()
                for finding in one.facts.findings or ():
                    true[finding.label] += 1
                    found[finding.label] += finding in claimed
    labels = sorted(true, key=lambda label: (-true[label], label))
    return pd.DataFrame([{"label": label, "findings": true[label], "found": found[label]} for label in labels])


@torch.no_grad()
def preview(
    model: TwoStageModel, dataset: FastMRIDataset, count: int, reconstruct: Callable[[Batch], Tensor] | None = None
) -> list[Comparison]:
    """Reconstruct a few evenly spaced slices, for comparison with target and zero-filled image.

    `reconstruct` replaces the model's forward pass, for instance by that of a stage with a token cache.
    """
    comparisons = []
    uncompressed = dataset.uncompressed()
    for index in np.linspace(0, len(dataset) - 1, count + 2).round().astype(int)[1:-1]:
        one = dataset[int(index)]
        batch = collate([one]).to(model.device)
        image = (reconstruct or model)(batch)[0]
        images = {"zero_filled": zero_filled_image(uncompressed[int(index)]), "model": image}
        assert one.target is not None
        title = f"{one.facts.contrast or 'contrast unknown'}, slice {one.slice_num}\n{one.acceleration}x"
        comparisons.append(Comparison(one.target, images, one.maximum, title=title, pixel=one.pixel))
    return comparisons


def training_cost(config: EvaluateParameters) -> dict[str, Any]:
    """Read the "cost" section of metrics.json from the checkpoints: seconds, peak memory, trainable parameters.

    The best checkpoint may be of an early epoch, so the final checkpoint in its folder is read if there is one.
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
