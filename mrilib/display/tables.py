"""Tables of metrics and runs, for the console and the notebooks."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import HTML
from transformers import PreTrainedTokenizerBase

from mrilib.config import (
    DataParameters,
    EvaluateParameters,
    Stage1Parameters,
    Stage2Parameters,
    display_path,
    printable,
    resolve,
)
from mrilib.data.dataset import Volume
from mrilib.files import read_json
from mrilib.metrics.image import VolumeScore, paired_difference
from mrilib.metrics.methods import in_order, method_label
from mrilib.model.two_stage import TwoStageModel, count_parameters
from mrilib.runs.record import all_runs, read_record

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
            interval = scores["ssim_ci95"]
            rows.append(
                {
                    "acceleration": f"{acceleration}x",
                    "method": method_label(method),
                    "SSIM": f"{scores['ssim']:.3f}",
                    "95% interval": f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "–",
                    "PSNR [dB]": f"{scores['psnr']:.2f}",
                    "NMSE": f"{scores['nmse']:.4f}",
                    "SSIM in head": f"{scores['ssim_head']:.3f}",
                    "PSNR in head [dB]": f"{scores['psnr_head']:.2f}",
                    "volumes": scores["volumes"],
                }
            )
    return pd.DataFrame(rows)


def coil_compression_note(section: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """What coil compression costs, from the "reconstruction" section; empty where it was not measured."""
    costs = {a: methods["zero_filled"] for a, methods in section.items() if "zero_filled" in methods}
    told = [
        f"{cost['compression_cost_ssim']:.3f} in SSIM and {cost['compression_cost_psnr']:.2f} dB in PSNR at {a}x"
        for a, cost in costs.items()
        if "zero_filled_compressed" in section[a]
    ]
    if told:
        return f"Coil compression, which the model needs, costs zero-filled images {', '.join(told)}."
    measured = any("compression_cost_ssim" in cost for cost in costs.values())
    return "No test file has more than num_coils coils: nothing was compressed." if measured else ""


def dash_or(value: float | None, form: str = "{:.3f}") -> str:
    """A score in its form; a dash for one that there is not, or that is not known."""
    return "–" if value is None else form.format(value)


def analysis_table(metrics: dict[str, Any]) -> pd.DataFrame:
    """What the text knows of the scan, beside its controls: the "analysis" section of metrics.json."""
    scores = metrics["analysis"]

    def value(name: str, form: str = "{:.3f}") -> str:
        return dash_or(scores.get(name), form)

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
        parts += [sentence] if (sentence := coil_compression_note(metrics["reconstruction"])) else []
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
                row["contrast"] = dash_or(metrics["analysis"]["contrast_accuracy"])
                row["finding F1"] = dash_or(metrics["analysis"]["finding_f1"])
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def runs_text(directory: str | Path = "outputs") -> str:
    """The table of run records for the console."""
    table = runs_table(directory)
    if not len(table):
        return f"no run in {printable(display_path(resolve(directory)))}"
    return "\n".join(printable(line) for line in table.map(str).map(printable).to_string(index=False).split("\n"))


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
                row["true"],
                marked_text(row["true"], row["generated"]),
            )
            for row in (rows[i] for i in picked)
        ],
    )


class Markup(str):
    """A text that is HTML already, its own parts escaped."""

    __slots__ = ()


def html_table(names: Sequence[Any], rows: Sequence[Sequence[Any]], caption: str = "") -> str:
    """An HTML table, aligned left. Every table that a notebook shows is made here.

    Cells, names and caption are escaped unless they are `Markup`: file names come from elsewhere. MathJax is kept out,
    which would read formulas in them.
    """

    def cell(value: Any) -> str:
        if isinstance(value, Markup):
            return value
        return html.escape(printable(f"{value:.6g}" if isinstance(value, float) else str(value), keep="\n"))

    left = ' style="text-align: left; vertical-align: top"'
    head = "".join(f'<th scope="col"{left}>{cell(name)}</th>' for name in names)
    body = "".join("<tr>" + "".join(f"<td{left}>{cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    told = f"<caption>{cell(caption)}</caption>" if caption else ""
    rest = f"{told}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<table class="tex2jax_ignore mathjax_ignore">{rest}'


def shown(table: pd.DataFrame, index: bool = False, caption: str = "") -> HTML:
    """A DataFrame as a notebook displays it; `index`: with the rows' names."""
    rows = table.reset_index() if index else table
    names = [("" if index and place == 0 and table.index.name is None else name) for place, name in enumerate(rows)]
    return HTML(html_table(names, rows.to_numpy(dtype=object).tolist(), caption))


_SENTENCES = re.compile(
    r"Axial (?:(?P<contrast>.+?) )?image, (?P<level>.+?) third of the brain\."
    r"(?: Findings: (?P<findings>.+?)\.)?(?: Whole study: (?P<study>.+?)\.)?"
)


def marked_text(true: str, generated: str) -> Markup:
    """A generated analysis as HTML: facts that differ from the true one are bold, what it missed follows in italics.

    The words are the generated ones. A text that is none, and differs, is bold as a whole.
    """
    true, generated = (printable(text, keep="\n") for text in (true, generated))
    truth, told = _SENTENCES.fullmatch(true), _SENTENCES.fullmatch(generated)
    if truth is None or told is None:
        return _html(generated if generated == true else f"{BOLD}{generated}{PLAIN}")

    def marked(words: str, right: bool) -> str:
        return words if right else f"{BOLD}{words}{PLAIN}"

    contrast, known_contrast = told["contrast"], truth["contrast"]
    text = "Axial "
    if contrast:  # of an unknown contrast nothing can be wrong
        text += marked(contrast, known_contrast in (None, contrast)) + " "
    text += f"image, {marked(told['level'], told['level'] == truth['level'])} third of the brain."
    missed: list[str] = [known_contrast] if known_contrast and not contrast else []
    reviewed = truth["findings"] is not None  # where nobody has reviewed the slice nothing can be wrong
    for name, begins in (("findings", "Findings"), ("study", "Whole study")):
        known, said = (match[name].split("; ") if match[name] else [] for match in (truth, told))
        if said:
            text += f" {begins}: {'; '.join(marked(words, not reviewed or words in known) for words in said)}."
        missed += [words for words in known if words not in said and (words != "none" or not said)]
    return Markup(_html(text) + (f" <i>(missed: {html.escape('; '.join(missed))})</i>" if missed else ""))


def _html(text: str) -> Markup:
    return Markup(html.escape(text).replace(BOLD, "<b>").replace(PLAIN, "</b>"))


def token_line(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text in its tokens, as HTML: what the language model reads and is trained to say, one box a token."""
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))
    shown = [str(piece).replace("▁", "␣").replace("Ġ", "␣") for piece in [*pieces, tokenizer.eos_token]]
    boxes = " ".join(f"<code>{html.escape(piece)}</code>" for piece in shown)
    return f"<p>{len(shown)} tokens, the one that ends it included: {boxes}</p>"


SMALL_SSIM = 0.005  # a difference that nobody sees in the images


def token_conclusion(scores: Mapping[str, Mapping[str, Sequence[VolumeScore]]]) -> str:
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
            mean, interval = paired_difference(methods["model"], methods[control], "ssim")
            if interval is None:
                parts.append(f"{mean:+.4f} from {words}")
                continue
            low, high = interval
            verdict = "better" if low > 0 else "worse" if high < 0 else "no different"
            if verdict != "no different" and abs(mean) < SMALL_SSIM:
                verdict = f"measurably but hardly {verdict}"
            parts.append(f"{verdict} than {words} ({mean:+.4f}, 95% interval {low:+.4f} to {high:+.4f})")
        if len({score.patient for score in methods["model"]}) < 2:
            lines.append(
                f"- **{acceleration}x**: the SSIM of the model with its own tokens differs by {'; '.join(parts)} "
                "(one test patient: no interval, so no verdict)."
            )
        else:
            lines.append(f"- **{acceleration}x**: by SSIM the model with its own tokens is {'; '.join(parts)}.")
    return "\n".join(lines)


def text_conclusion(scores: Mapping[str, Any]) -> str:
    """The answer to "does the text know the scan?": differences in cross-entropy with standard errors over patients."""
    lines = []
    for control, words in (
        ("without_kspace", "the control without k-space"),
        ("other_patient", "the same model with another patient's scan"),
    ):
        if scores.get(f"cross_entropy_gain_over_{control}") is not None:
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
    left_out = scores["samples"] - scores["other_patient_samples"]
    if left_out:
        both = " Both sides of the difference are without them." if scores["other_patient_samples"] else ""
        lines.append(
            f"- {left_out} of {scores['samples']} samples have no score with another patient's scan: there is no other "
            f"patient at their acceleration.{both}"
        )
    share, error = scores["contrast_commonest"], scores["contrast_commonest_se"]
    if not scores["contrast_samples"]:
        lines.append("- Contrast: no test sample has a contrast that is in the list, so that there is no score.")
    else:
        lines.append(
            f"- The contrast is named rightly in {scores['contrast_accuracy']:.1%} of {scores['contrast_samples']} "
            f"slices; always naming the commonest would give {share:.1%}{'' if error is None else f' ± {error:.1%}'}."
        )
    lines.append(f"- Findings (exact label, side and region): {_findings_sentence(scores)}")
    return "\n".join(lines)


def _findings_sentence(scores: Mapping[str, Any]) -> str:
    if not scores["reviewed_samples"]:
        return "no test sample was reviewed for findings, so that there is no score."
    best = scores["finding_f1_best_constant"]
    constant = f"the best constant answer has {'none' if best is None else f'{best:.3f}'}."
    if scores["finding_f1"] is None:
        return f"no F1, as there was nothing to find and nothing was claimed; {constant}"
    error = scores["finding_f1_se"]
    spread = "" if error is None else f" ± {error:.3f} (standard error clustered by patient)"
    return f"F1 {scores['finding_f1']:.3f}{spread}; {constant}"


def _code(path: str) -> str:
    """A path in a Markdown table; nothing in it is HTML, Markdown or a formula. Empty if the path is."""
    return f"<code>{''.join(f'&#{ord(c)};' if c in _MARKDOWN else c for c in printable(path))}</code>" if path else ""


_MARKDOWN = "\\`*_{}[]<>()#+!|$&~\"'"


def model_card(
    model: TwoStageModel,
    config: EvaluateParameters,
    stage1: Stage1Parameters | None,
    stage2: Stage2Parameters,
    volumes: Mapping[str, Sequence[Volume]],
) -> str:
    """What the model is, what it was trained on, and what it is not for; Markdown."""
    encoder, backbone, decoder = (count_parameters(part) for part in (model.encoder, model.backbone, model.decoder))
    made_of = f"image decoder {decoder:,} parameters ({stage2.decoder}, without image tokens)"
    trained = ""
    if stage1 is not None:
        cascades = f"{stage1.varnet_num_cascades} cascade{'s' * (stage1.varnet_num_cascades > 1)}"
        made_of = (
            f"k-space encoder {encoder:,} parameters (VarNet with {cascades}, ViT with {stage1.vit_num_layers} "
            f"layers), frozen backbone {backbone:,}, image decoder {decoder:,} ({stage2.decoder_type})"
        )
        trained = f"stage 1: at most {stage1.epochs} epochs, cross-entropy on analysis tokens; "
    backbone_path, tokenizer_path = _code(config.backbone_path), _code(config.tokenizer_path)
    crop: str = config.crop
    if crop == "image":
        crop += " (changes the acquisition: not comparable with published scores)"
    return f"""
| | |
|---|---|
| **Model** | {made_of} |
| **Backbone** | {backbone_path}, tokenizer {tokenizer_path or "the backbone's own"} |
| **Trained** | {trained}stage 2: at most {stage2.epochs} epochs, SSIM loss; \
the checkpoints are those given above, the best by validation by default |
| **Data** | {_split_told(config, stage1, stage2, volumes)} |
| **Masks** | fastMRI's {config.mask_type}, accelerations {", ".join(map(str, config.accelerations))}, centre \
fractions {", ".join(map(str, config.center_fractions))} |
| **Crop** | {crop} |
| **Licences** | code, and the demo's backbone trained on text that it writes, MIT; other backbones under their own; \
Mistral 7B's tokenizer Apache 2.0; phantom anatomy: ICBM 152 2009 templates, {ICBM_NOTICE}; fastMRI+ annotations MIT; \
fastMRI data under its own agreement |
| **Not for** | diagnosis or any clinical use; this is not a medical device{_phantom_told(volumes)} |
"""


PART_NAMES = {"train": "training", "val": "validation", "test": "test"}
SPLIT_BY = ("data_dir", "val_dir", "test_dir", "val_fraction", "test_fraction", "split_seed")


def _split_told(
    config: EvaluateParameters,
    stage1: Stage1Parameters | None,
    stage2: Stage2Parameters,
    volumes: Mapping[str, Sequence[Volume]],
) -> str:
    """Patients of each part, their folder and how they were set apart; stages that were trained with another split."""
    told = []
    for part, name in PART_NAMES.items():
        count = len({volume.patient for volume in volumes[part]})
        where = f"of {_code(config.data_dir)}"
        if part != "train":
            given = getattr(config, f"{part}_dir")
            where = f"of the same folder, set apart by patient (split_seed {config.split_seed})"
            if given:
                where = f"of {_code(given)} ({part}_dir, a folder of its own)"
        told.append(f"{name}: {count} patient{'s'[: count != 1]} {where}")
    for number, stage in enumerate((stage1, stage2), start=1):
        if stage is None:
            continue
        differing = [name for name in SPLIT_BY if _split_value(stage, name) != _split_value(config, name)]
        if differing:
            values = ", ".join(f"{name} {_code(str(getattr(stage, name)))}" for name in differing)
            told.append(f"stage {number} was trained with another split: {values}")
    return "; ".join(told)


def _split_value(config: DataParameters, name: str) -> Any:
    value = getattr(config, name)
    return resolve(value) if name.endswith("_dir") and value else value


def _phantom_told(volumes: Mapping[str, Sequence[Volume]]) -> str:
    """Which patients are the phantom's; empty if none is."""
    from mrilib.data.fastmri_file import is_phantom  # it takes seconds to import, which the training notebooks need not

    made = {name: [is_phantom(volume.path) for volume in volumes[part]] for part, name in PART_NAMES.items()}
    names = [name if all(of) else f"some {name}" for name, of in made.items() if any(of)]
    if not names:
        return ""
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    told = f". The {listed} patients are a phantom, warps of one head"
    return told + (": numbers on them say nothing of patients" if any(made["test"]) else "")


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
