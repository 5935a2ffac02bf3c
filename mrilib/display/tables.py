"""Tables of metrics, runs and texts for the console and the notebooks."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
from mrilib.data.fastmri_file import is_phantom
from mrilib.files import read_json
from mrilib.metrics.methods import in_order, method_label
from mrilib.model.decoders import find_decoder
from mrilib.model.encoder import KSpaceEncoder
from mrilib.model.two_stage import TwoStageModel, count_parameters
from mrilib.runs.record import all_runs, read_record

ICBM_NOTICE = (
    "© 1993–2004 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill University, "
    "free to use, copy, modify and distribute with this notice"
)

# ------------------------------------------------------------------------------------------------- HTML


class Markup(str):
    """Text that is already HTML, with its parts escaped."""

    __slots__ = ()


def html_table(names: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """Write a left-aligned HTML table; every table of a notebook is written here.

    Cells and names are escaped unless they are `Markup`, because file names are not trusted. The table's class
    keeps MathJax from reading formulas in them.
    """

    def cell(value: Any) -> str:
        if isinstance(value, Markup):
            return value
        return html.escape(printable(f"{value:.6g}" if isinstance(value, float) else str(value), keep="\n"))

    left = ' style="text-align: left; vertical-align: top"'
    head = "".join(f'<th scope="col"{left}>{cell(name)}</th>' for name in names)
    body = "".join("<tr>" + "".join(f"<td{left}>{cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    content = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<table class="tex2jax_ignore mathjax_ignore">{content}'


def as_html(table: pd.DataFrame, index: bool = False) -> HTML:
    """Convert a DataFrame to an HTML table for a notebook; `index` adds the row names."""
    rows = table.reset_index() if index else table
    names = [("" if index and place == 0 and table.index.name is None else name) for place, name in enumerate(rows)]
    return HTML(html_table(names, rows.to_numpy(dtype=object).tolist()))


# ------------------------------------------------------------------------------------------------- metrics


def reconstruction_table(section: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> pd.DataFrame:
    """Tabulate metrics.json's "reconstruction" section, a row per method and three columns per acceleration."""
    columns: dict[str, dict[str, str]] = {}
    for acceleration, methods in section.items():
        for method in in_order(methods):
            scores = methods[method]
            cells = columns.setdefault(method_label(method), {})
            interval = scores["ssim_ci95"]
            spread = f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
            cells[f"{acceleration}x SSIM (95% interval)"] = f"{scores['ssim']:.3f}{spread}"
            cells[f"{acceleration}x SSIM in head"] = f"{scores['ssim_head']:.3f}"
            cells[f"{acceleration}x PSNR [dB]"] = f"{scores['psnr']:.2f}"
    return pd.DataFrame(columns).T.fillna("–")


def coil_compression_note(section: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """State the cost of coil compression from the "reconstruction" section; empty if it was not measured."""
    zero_filled = {a: methods["zero_filled"] for a, methods in section.items() if "zero_filled" in methods}
    costs = [
        f"{scores['compression_cost_ssim']:.3f} in SSIM and {scores['compression_cost_psnr']:.2f} dB in PSNR at {a}x"
        for a, scores in zero_filled.items()
        if "zero_filled_compressed" in section[a]
    ]
    if costs:
        return f"Coil compression, which the model needs, costs zero-filled images {', '.join(costs)}."
    measured = any("compression_cost_ssim" in scores for scores in zero_filled.values())
    return "No test file has more than num_coils coils: nothing was compressed." if measured else ""


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def analysis_table(metrics: dict[str, Any]) -> pd.DataFrame:
    """Tabulate the "analysis" section of metrics.json: scores of the generated text and of its baselines."""
    scores = metrics["analysis"]
    labels = {
        "cross_entropy": "cross-entropy [nats per token]",
        "contrast_accuracy": "contrast accuracy",
        "level_accuracy": "level accuracy",
        "finding_f1": "finding F1 (label, side, region)",
    }
    constant_answers = {"contrast_accuracy": "contrast_commonest", "finding_f1": "finding_f1_best_constant"}
    return pd.DataFrame(
        [
            {
                "": label,
                "two-stage model": _score(scores.get(name)),
                "constant prefix": _score(scores.get(f"{name}_without_kspace")),
                "shuffled tokens": _score(scores.get(f"{name}_other_patient")),
                "best constant answer": _score(scores.get(constant_answers.get(name, ""))),
            }
            for name, label in labels.items()
        ]
    )


SMALL_SSIM = 0.005  # smaller differences are not visible in the images


# ------------------------------------------------------------------------------------------------- runs and data


def runs_table(directory: str | Path = "outputs") -> pd.DataFrame:
    """Tabulate the run records of a folder: name, status, start, and the main metrics if there are any."""
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
                row["contrast accuracy"] = _score(metrics["analysis"]["contrast_accuracy"])
                row["finding F1"] = _score(metrics["analysis"]["finding_f1"])
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def runs_text(directory: str | Path = "outputs") -> str:
    """Format the table of run records for the console."""
    table = runs_table(directory)
    if not len(table):
        return f"no run in {printable(display_path(resolve(directory)))}"
    return "\n".join(printable(line) for line in table.map(str).map(printable).to_string(index=False).split("\n"))


def split_table(volumes: Mapping[str, Sequence[Volume]]) -> pd.DataFrame:
    """Tabulate patients, volumes, slices, contrasts, coils and lines of each part of the split."""

    def listed(values: set[Any]) -> str:
        return ", ".join(str(value) for value in sorted(values))

    return pd.DataFrame(
        {
            name: {
                "patients": len({volume.patient for volume in part}),
                "volumes": len(part),
                "slices": sum(volume.slices for volume in part),
                "contrasts": listed({volume.acquisition for volume in part}),
                "coils": listed({volume.coils for volume in part}),
                "phase-encoding lines": listed({volume.matrix[1] for volume in part}),
            }
            for name, part in volumes.items()
        }
    ).T


def parameter_table(model: TwoStageModel) -> pd.DataFrame:
    """Tabulate the parameters of each part: total, trainable and frozen, and the stage that trains it."""
    rows = {}
    for name, stage in (("encoder", "stage 1"), ("backbone", "never"), ("decoder", "stage 2")):
        part = getattr(model, name)
        if part is None:
            continue
        groups = {name: list(part.parameters())}
        if isinstance(part, KSpaceEncoder):
            modules = {"VarNet": part.varnet, "maps of findings": part.finding_maps, "ViT": part.vit}
            named = {f"{name}: {key}": list(one.parameters()) for key, one in modules.items() if one is not None}
            known = {id(parameter) for parameters in named.values() for parameter in parameters}
            rest = [parameter for parameter in groups[name] if id(parameter) not in known]
            groups |= named | {f"{name}: map to the backbone": rest}
        for label, parameters in groups.items():
            count = sum(p.numel() for p in parameters)
            trainable = sum(p.numel() for p in parameters if p.requires_grad)
            counts = {"parameters": count, "trainable": trainable, "frozen": count - trainable}
            rows[label] = {key: f"{value:,}" for key, value in counts.items()} | {"trained in": stage}
    return pd.DataFrame(rows).T


# ------------------------------------------------------------------------------------------------- texts


_SENTENCES = re.compile(
    r"Axial (?:(?P<contrast>.+?) )?image, (?P<level>.+?) third of the brain\."
    r"(?: Findings: (?P<findings>.+?)\.)?(?: Whole study: (?P<study>.+?)\.)?"
)
_BOLD, _PLAIN = "\x02", "\x03"  # placeholders for <b> and </b> until the text is escaped


def marked_text(true: str, generated: str) -> Markup:
    """Convert a generated analysis to HTML: wrong facts are bold, missed facts follow in italics.

    The wording stays as generated. A differing text that is no analysis is bold as a whole.
    """
    true, generated = (printable(text, keep="\n") for text in (true, generated))
    truth, answer = _SENTENCES.fullmatch(true), _SENTENCES.fullmatch(generated)

    def marked(words: str, right: bool) -> str:
        return words if right else f"{_BOLD}{words}{_PLAIN}"

    if truth is None or answer is None:
        return _escape_marked(marked(generated, generated == true))
    text, missed = "Axial ", []
    if answer["contrast"]:  # right if the true contrast is unknown
        text += marked(answer["contrast"], truth["contrast"] in (None, answer["contrast"])) + " "
    elif truth["contrast"]:
        missed.append(truth["contrast"])
    text += f"image, {marked(answer['level'], answer['level'] == truth['level'])} third of the brain."
    reviewed = truth["findings"] is not None  # findings are right if nobody reviewed the slice
    for name, heading in (("findings", "Findings"), ("study", "Whole study")):
        known, generated_facts = (match[name].split("; ") if match[name] else [] for match in (truth, answer))
        if generated_facts:
            facts = [marked(words, not reviewed or words in known) for words in generated_facts]
            text += f" {heading}: {'; '.join(facts)}."
        missed += [
            words for words in known if words not in generated_facts and (words != "none" or not generated_facts)
        ]
    note = f" <i>(missed: {html.escape('; '.join(missed))})</i>" if missed else ""
    return Markup(_escape_marked(text) + note)


def _escape_marked(text: str) -> Markup:
    return Markup(html.escape(text).replace(_BOLD, "<b>").replace(_PLAIN, "</b>"))


def token_line(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Show an analysis as HTML, one box per token, with the end token that closes it."""
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))
    tokens = [str(piece).replace("▁", "␣").replace("Ġ", "␣") for piece in [*pieces, tokenizer.eos_token]]
    boxes = " ".join(f"<code>{html.escape(token)}</code>" for token in tokens)
    return f"<p>{len(tokens)} tokens, end token included: {boxes}</p>"


# ------------------------------------------------------------------------------------------------- model card

PART_NAMES = {"train": "training", "val": "validation", "test": "test"}
SPLIT_PARAMETERS = ("data_dir", "val_dir", "test_dir", "val_fraction", "test_fraction", "split_seed")
_MARKDOWN = "\\`*_{}[]<>()#+!|$&~\"'"


def model_card(
    model: TwoStageModel,
    config: EvaluateParameters,
    stage1: Stage1Parameters | None,
    stage2: Stage2Parameters,
    volumes: Mapping[str, Sequence[Volume]],
) -> str:
    """Write the model card in Markdown: the model, its training data and the uses that it is not for."""
    encoder, backbone, decoder = (count_parameters(part) for part in (model.encoder, model.backbone, model.decoder))
    label = find_decoder(stage2.decoder).label
    parts = f"image decoder {decoder:,} parameters ({label})"
    stage1_training = ""
    if stage1 is not None:
        cascades = f"{stage1.varnet_num_cascades} cascade{'s' * (stage1.varnet_num_cascades > 1)}"
        parts = (
            f"k-space encoder {encoder:,} parameters (VarNet with {cascades}, ViT with {stage1.vit_num_layers} "
            f"layers), frozen backbone {backbone:,}, image decoder {decoder:,} ({label})"
        )
        stage1_training = f"stage 1: at most {stage1.epochs} epochs, cross-entropy on analysis tokens; "
    crop: str = config.crop
    if crop == "image":
        crop += " (changes the acquisition: not comparable with published scores)"
    return f"""
| | |
|---|---|
| **Model** | {parts} |
| **Backbone** | {_code(config.backbone_path)}, tokenizer {_code(config.tokenizer_path) or "of the backbone"} |
| **Training** | {stage1_training}stage 2: at most {stage2.epochs} epochs, SSIM loss; \
checkpoints as given in the parameters, by default the best by validation |
| **Data** | {_split_text(config, stage1, stage2, volumes)} |
| **Masks** | fastMRI's {config.mask_type}, accelerations {", ".join(map(str, config.accelerations))}, centre \
fractions {", ".join(map(str, config.center_fractions))} |
| **Crop** | {crop} |
| **Licences** | code, and the demo's backbone trained on generated text, MIT; other backbones under their own; \
Mistral 7B's tokenizer Apache 2.0; phantom anatomy: ICBM 152 2009 templates, {ICBM_NOTICE}; fastMRI+ annotations MIT; \
fastMRI data under its own agreement |
| **Not for** | diagnosis or any clinical use; this is not a medical device{_phantom_text(volumes)} |
"""


def markdown_text(text: str) -> str:
    """Escape a text for Markdown, so that it holds no HTML, Markdown or formula."""
    return "".join(f"&#{ord(c)};" if c in _MARKDOWN else c for c in printable(text))


def _code(path: str) -> str:
    """Escape a path for a Markdown table; an empty path stays empty."""
    return f"<code>{markdown_text(path)}</code>" if path else ""


def _split_text(
    config: EvaluateParameters,
    stage1: Stage1Parameters | None,
    stage2: Stage2Parameters,
    volumes: Mapping[str, Sequence[Volume]],
) -> str:
    """List each part's patients and folder, and the stages that were trained with another split."""
    entries = []
    for part, name in PART_NAMES.items():
        count = len({volume.patient for volume in volumes[part]})
        folder = getattr(config, f"{part}_dir", "")
        if part == "train":
            source = f"of {_code(config.data_dir)}"
        elif folder:
            source = f"of {_code(folder)} ({part}_dir, a separate folder)"
        else:
            source = f"of the same folder, split by patient (split_seed {config.split_seed})"
        entries.append(f"{name}: {count} patient{'s'[: count != 1]} {source}")
    for number, stage in enumerate((stage1, stage2), start=1):
        if stage is None:
            continue
        differing = [name for name in SPLIT_PARAMETERS if _split_value(stage, name) != _split_value(config, name)]
        if differing:
            values = ", ".join(f"{name} {_code(str(getattr(stage, name)))}" for name in differing)
            entries.append(f"stage {number} was trained with another split: {values}")
    return "; ".join(entries)


def _split_value(config: DataParameters, name: str) -> Any:
    value = getattr(config, name)
    return resolve(value) if name.endswith("_dir") and value else value


def _phantom_text(volumes: Mapping[str, Sequence[Volume]]) -> str:
    """Name the parts with phantom patients; empty if there are none."""
    phantom = {part: [is_phantom(volume.path) for volume in volumes[part]] for part in PART_NAMES}
    names = [
        PART_NAMES[part] if all(flags) else f"some {PART_NAMES[part]}" for part, flags in phantom.items() if any(flags)
    ]
    if not names:
        return ""
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    text = f". The {listed} patients are a phantom, warps of one head"
    return text + (": numbers on them say nothing of patients" if any(phantom["test"]) else "")
