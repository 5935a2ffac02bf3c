"""Tables of metrics and runs, for the console and the notebooks."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from mrilib.config import EvaluateParameters, Stage1Parameters, Stage2Parameters, display_path, resolve
from mrilib.data import Volume
from mrilib.evaluation import VolumeScore, paired_difference
from mrilib.model import TwoStageModel, count_parameters
from mrilib.runs import all_runs, read_json, read_record
from mrilib.style import in_order, method_label

ICBM_NOTICE = (
    "© 1993–2004 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill University, "
    "free to use, copy, modify and distribute with this notice"
)
BOLD, PLAIN = "\x02", "\x03"  # stand in for <b> and </b> while a text is not yet escaped


def reconstruction_table(metrics: dict[str, Any]) -> pd.DataFrame:
    """Methods by acceleration: the "reconstruction" section of metrics.json; PSNR in [dB]."""
    rows = []
    for acceleration, methods in metrics["reconstruction"].items():
        for method in in_order(methods):
            scores = methods[method]
            low, high = scores["ssim_ci95"]
            rows.append(
                {
                    "acceleration": f"{acceleration}x",
                    "method": method_label(method),
                    "SSIM": f"{scores['ssim']:.3f}",
                    "95% interval": f"{low:.3f} to {high:.3f}",
                    "PSNR [dB]": f"{scores['psnr']:.2f}",
                    "NMSE": f"{scores['nmse']:.4f}",
                    "SSIM in head": f"{scores['ssim_head']:.3f}",
                    "PSNR in head [dB]": f"{scores['psnr_head']:.2f}",
                    "volumes": scores["volumes"],
                }
            )
    return pd.DataFrame(rows)


def analysis_table(metrics: dict[str, Any]) -> pd.DataFrame:
    """What the text knows of the scan, beside its controls: the "analysis" section of metrics.json."""
    scores = metrics["analysis"]

    def value(name: str, form: str = "{:.3f}") -> str:
        return form.format(scores[name]) if name in scores else "–"

    rows = [
        ("cross-entropy [nats per token]", "cross_entropy"),
        ("contrast named rightly", "contrast_accuracy"),
        ("level named rightly", "level_accuracy"),
        ("finding F1 (label, side, region)", "finding_f1"),
    ]
    table = pd.DataFrame(
        [
            {
                "": label,
                "two-stage model": value(name),
                "control without k-space": value(f"{name}_without_kspace"),
                "another patient's tokens": value(f"{name}_other_patient"),
            }
            for label, name in rows
        ]
    )
    table["best constant answer"] = ["–", value("contrast_commonest"), "–", value("finding_f1_best_constant")]
    return table


def metrics_text(path: Path) -> str:
    """metrics.json as text for the console."""
    metrics = read_json(path)
    parts = []
    if "reconstruction" in metrics:
        parts.append(reconstruction_table(metrics).to_string(index=False))
    if "analysis" in metrics:
        scores = metrics["analysis"]
        parts.append(analysis_table(metrics).to_string(index=False))
        parts.append(f"{scores['samples']} test slices of {scores['patients']} patients")
    return "\n\n".join(["", *parts, f"from {display_path(path)}"])


def runs_table(directory: str | Path = "outputs") -> pd.DataFrame:
    """One row a run record: name, status, start, and the headline metrics where there are any."""
    rows = []
    for path in all_runs(directory):
        record = read_record(path)
        row = {"run": path.name, "status": record["status"], "started": record["started"]}
        row["notebooks"] = ", ".join(record["notebooks"])
        if (path / "metrics.json").is_file():
            metrics = read_json(path / "metrics.json")
            for acceleration, methods in metrics.get("reconstruction", {}).items():
                row[f"SSIM {acceleration}x"] = f"{methods['model']['ssim']:.3f}"
            if "analysis" in metrics:
                row["contrast"] = f"{metrics['analysis']['contrast_accuracy']:.3f}"
                row["finding F1"] = f"{metrics['analysis']['finding_f1']:.3f}"
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def runs_text(directory: str | Path = "outputs") -> str:
    """The table of run records for the console."""
    table = runs_table(directory)
    return table.to_string(index=False) if len(table) else f"no run in {display_path(resolve(directory))}"


def split_table(volumes: Mapping[str, Sequence[Volume]]) -> pd.DataFrame:
    """Patients, volumes, slices, contrasts and coils of each part of the split."""
    return pd.DataFrame(
        {
            name: {
                "patients": len({volume.patient for volume in part}),
                "volumes": len(part),
                "slices": sum(volume.slices for volume in part),
                "contrasts": ", ".join(sorted({volume.acquisition for volume in part})),
                "coils": ", ".join(str(coils) for coils in sorted({volume.coils for volume in part})),
                "phase-encoding lines": ", ".join(str(w) for w in sorted({volume.matrix[1] for volume in part})),
            }
            for name, part in volumes.items()
        }
    ).T


def parameter_table(model: TwoStageModel) -> pd.DataFrame:
    """Parameters of each part: how many are trainable and frozen now, and in which stage it learns."""
    learns = {"encoder": "stage 1", "backbone": "never", "decoder": "stage 2"}
    rows = {}
    for name in ("encoder", "backbone", "decoder"):
        part = getattr(model, name)
        if part is None:
            continue
        parts = {name: list(part.parameters())}
        if name == "encoder" and hasattr(part, "varnet"):
            modules = {
                "VarNet": part.varnet,
                "restoration": part.restoration,
                "maps of findings": part.finding_maps,
                "ViT": part.vit,
            }
            named = {f"encoder: {label}": list(one.parameters()) for label, one in modules.items() if one is not None}
            known = {id(parameter) for some in named.values() for parameter in some}
            parts |= named | {"encoder: map to the backbone": [p for p in parts[name] if id(p) not in known]}
        for label, parameters in parts.items():
            count = sum(p.numel() for p in parameters)
            trainable = sum(p.numel() for p in parameters if p.requires_grad)
            counts = {"parameters": count, "trainable": trainable, "frozen": count - trainable}
            rows[label] = {key: f"{value:,}" for key, value in counts.items()} | {"learns in": learns[name]}
    return pd.DataFrame(rows).T


def texts_side_by_side(rows: Sequence[dict[str, Any]], count: int) -> str:
    """An HTML table of true and generated analyses; facts that differ from the truth are bold.

    They are a random choice, the same each time: an even step would meet the same slice of every volume.
    """
    picked = np.sort(np.random.default_rng(0).permutation(len(rows))[:count])
    return html_table(
        ("slice", "true", "generated"),
        [
            (
                f"{row['file']}, slice {row['slice']}, {row['acceleration']}x",
                html.escape(row["true"]),
                marked_text(row["true"], row["generated"]),
            )
            for row in (rows[i] for i in picked)
        ],
    )


def html_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, aligned left; cells are HTML."""
    left = ' style="text-align: left; vertical-align: top"'
    head = "".join(f'<th scope="col"{left}>{name}</th>' for name in names)
    body = "".join("<tr>" + "".join(f"<td{left}>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_SENTENCES = re.compile(
    r"Axial (?P<contrast>.+?) image, (?P<level>.+?) third of the brain\."
    r"(?: Findings: (?P<findings>.+?)\.)?(?: Whole study: (?P<study>.+?)\.)?"
)


def marked_text(true: str, generated: str) -> str:
    """A generated analysis as HTML: facts that differ from the true one are bold, what it missed follows in italics.

    The words are the generated ones. A text that is none, and differs, is bold as a whole.
    """
    truth, told = _SENTENCES.fullmatch(true), _SENTENCES.fullmatch(generated)
    if truth is None or told is None:
        return html.escape(generated) if generated == true else _html(f"{BOLD}{generated}{PLAIN}")

    def marked(words: str, right: bool) -> str:
        return words if right else f"{BOLD}{words}{PLAIN}"

    contrast, level = (marked(told[name], told[name] == truth[name]) for name in ("contrast", "level"))
    text = f"Axial {contrast} image, {level} third of the brain."
    missed: list[str] = []
    reviewed = truth["findings"] is not None  # where nobody has reviewed the slice nothing can be wrong
    for name, begins in (("findings", "Findings"), ("study", "Whole study")):
        known, said = (match[name].split("; ") if match[name] else [] for match in (truth, told))
        if said:
            text += f" {begins}: {'; '.join(marked(words, not reviewed or words in known) for words in said)}."
        missed += [words for words in known if words not in said and (words != "none" or not said)]
    return _html(text) + (f" <i>(missed: {html.escape('; '.join(missed))})</i>" if missed else "")


def _html(text: str) -> str:
    return html.escape(text).replace(BOLD, "<b>").replace(PLAIN, "</b>")


def token_line(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text in its tokens, as HTML: what the language model reads and is trained to say, one box a token."""
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))
    shown = [str(piece).replace("▁", "␣").replace("Ġ", "␣") for piece in [*pieces, tokenizer.eos_token]]
    boxes = " ".join(f"<code>{html.escape(piece)}</code>" for piece in shown)
    return f"<p>{len(shown)} tokens, the one that ends it included: {boxes}</p>"


SMALL_SSIM = 0.005  # a difference that nobody sees in the images


def token_sentence(scores: Mapping[str, Mapping[str, Sequence[VolumeScore]]]) -> str:
    """The answer to "do the tokens help the image?": paired SSIM differences with 95% intervals over patients."""
    lines = []
    for acceleration, methods in scores.items():
        parts = []
        for control, words in (
            ("other_patient_tokens", "another patient's tokens in their place"),
            ("no_tokens", "none in their place"),
            ("trained_without_tokens", "a decoder trained without tokens"),
        ):
            if control not in methods:
                continue
            mean, (low, high) = paired_difference(methods["model"], methods[control], "ssim")
            verdict = "better" if low > 0 else "worse" if high < 0 else "no different"
            if verdict != "no different" and abs(mean) < SMALL_SSIM:
                verdict = f"measurably but hardly {verdict}"
            parts.append(f"{verdict} than {words} ({mean:+.4f}, 95% interval {low:+.4f} to {high:+.4f})")
        lines.append(f"- **{acceleration}x**: by SSIM the model with its own tokens is {'; '.join(parts)}.")
    return "\n".join(lines)


def text_sentence(scores: Mapping[str, Any]) -> str:
    """The answer to "does the text know the scan?": differences in cross-entropy with standard errors over patients."""
    lines = []
    for control, words in (
        ("without_kspace", "the control without k-space"),
        ("other_patient", "the same model with another patient's scan"),
    ):
        if f"cross_entropy_gain_over_{control}" in scores:
            gain, error = (scores[f"cross_entropy_gain_over_{control}{end}"] for end in ("", "_se"))
            if error is None:
                lines.append(
                    f"- Cross-entropy with the own scan and that of {words} differ by {gain:.3f} nats per token; "
                    "of one patient there is no standard error."
                )
                continue
            verdict = "lower than" if gain > 2 * error else "higher than" if gain < -2 * error else "no different from"
            lines.append(
                f"- Cross-entropy with the own scan is {verdict} that of {words}: by {gain:.3f} ± {error:.3f} nats per "
                "token (standard error clustered by patient)."
            )
    share, error = scores["contrast_commonest"], scores["contrast_commonest_se"]
    lines.append(
        f"- The contrast is named rightly in {scores['contrast_accuracy']:.1%} of {scores['samples']} slices; always "
        f"naming the commonest would give {share:.1%} ± {error:.1%}."
    )
    error = scores.get("finding_f1_se")
    spread = "" if error is None else f" ± {error:.3f} (standard error clustered by patient)"
    lines.append(
        f"- Findings (exact label, side and region): F1 {scores['finding_f1']:.3f}{spread}; the best constant answer "
        f"has {scores['finding_f1_best_constant']:.3f}."
    )
    return "\n".join(lines)


def model_card(
    model: TwoStageModel,
    config: EvaluateParameters,
    stage1: Stage1Parameters,
    stage2: Stage2Parameters,
    volumes: Mapping[str, Sequence[Volume]],
) -> str:
    """What the model is, what it was trained on, and what it is not for; Markdown."""
    counts = {name: len({volume.patient for volume in part}) for name, part in volumes.items()}
    encoder, backbone, decoder = (count_parameters(part) for part in (model.encoder, model.backbone, model.decoder))
    cascades = f"{stage1.varnet_num_cascades} cascade{'s' * (stage1.varnet_num_cascades > 1)}"
    from mrilib.phantom import PARAMETERS_FILE  # it takes seconds to import, which the training notebooks need not

    phantom = ""
    if (resolve(config.data_dir) / PARAMETERS_FILE).is_file():
        phantom = ". The patients are a phantom, warps of one head: numbers on them say nothing of patients"
    crop: str = config.crop
    if crop == "image":
        crop += " (changes the acquisition: not comparable with published scores)"
    return f"""
| | |
|---|---|
| **Model** | k-space encoder {encoder:,} parameters (VarNet with {cascades}, ViT \
with {stage1.vit_num_layers} layers), frozen backbone {backbone:,}, image decoder {decoder:,} ({stage2.decoder_type}) |
| **Backbone** | `{config.backbone_path}`, tokenizer `{config.tokenizer_path or "the backbone's own"}` |
| **Trained** | stage 1: at most {stage1.epochs} epochs, cross-entropy on analysis tokens; stage 2: at most \
{stage2.epochs} epochs, SSIM loss; the checkpoints are those given above, the best by validation by default |
| **Data** | {config.data_dir}: {counts["train"]} training, {counts["val"]} validation, {counts["test"]} test \
patients, split by patient |
| **Masks** | fastMRI's {config.mask_type}, accelerations {", ".join(map(str, config.accelerations))}, centre \
fractions {", ".join(map(str, config.center_fractions))} |
| **Crop** | {crop} |
| **Licences** | code, and the demo's backbone trained on text that it writes, MIT; other backbones under their own; \
Mistral 7B's tokenizer Apache 2.0; phantom anatomy: ICBM 152 2009 templates, {ICBM_NOTICE}; fastMRI+ annotations MIT; \
fastMRI data under its own agreement |
| **Not for** | diagnosis or any clinical use; this is not a medical device{phantom} |
"""


def token_variants(
    scores: Mapping[str, Mapping[str, Sequence[VolumeScore]]],
) -> dict[str, dict[str, Sequence[VolumeScore]]]:
    """Scores of the token-swap question, acceleration → tokens → volumes, for `charts.token_swap`."""
    names = {
        "model": "own tokens",
        "other_patient_tokens": "another patient's",
        "no_tokens": "none",
        "trained_without_tokens": "trained without",
    }
    return {
        acceleration: {label: methods[name] for name, label in names.items() if name in methods}
        for acceleration, methods in scores.items()
    }
