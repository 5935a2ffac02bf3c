"""What the commands print after a run: its metrics in at most 100 columns, and their meaning in three sentences."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from mrilib.display.tables import SMALL_SSIM, analysis_table, coil_compression_note
from mrilib.files import display_path, read_json
from mrilib.metrics.methods import in_order, method_label

WIDTH = 100  # columns of the console
SHORT_NAMES = {"cross-entropy [nats per token]": "nats per token", "finding F1 (label, side, region)": "finding F1"}


def metrics_text(path: Path) -> str:
    """Format metrics.json for the console: tables, then three sentences."""
    metrics = read_json(path)
    parts = [""]
    for acceleration, methods in metrics.get("reconstruction", {}).items():
        volumes = next(iter(methods.values()))["volumes"]
        table = _image_table(methods).to_string(index=False)
        parts.append(f"Images at {acceleration}x, {volumes} test volumes\n{table}")
    if note := coil_compression_note(metrics.get("reconstruction", {})):
        parts.append(_wrapped(note))
    if "analysis" in metrics:
        scores = metrics["analysis"]
        table = analysis_table(metrics).set_index("").T.rename(columns=SHORT_NAMES).to_string()
        parts.append(f"Texts, {scores['samples']} test slices of {scores['patients']} patients\n{table}")
    sentences = [_wrapped(sentence, indent="   ") for sentence in run_conclusion(metrics)]
    return "\n\n".join([*parts, "\n".join(sentences), f"from {display_path(path)}"])


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent)


def _image_table(methods: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    rows = []
    for method in in_order(methods):
        scores = methods[method]
        interval = scores["ssim_ci95"]
        rows.append(
            {
                "method": method_label(method),
                "SSIM": f"{scores['ssim']:.3f}",
                "95% interval": f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "–",
                "PSNR [dB]": f"{scores['psnr']:.2f}",
                "SSIM in head": f"{scores['ssim_head']:.3f}",
                "PSNR in head": f"{scores['psnr_head']:.2f}",
            }
        )
    return pd.DataFrame(rows)


def run_conclusion(metrics: Mapping[str, Any]) -> list[str]:
    """State in three sentences what a run's metrics mean: image quality, value of the tokens, quality of the text."""
    section = {a: methods for a, methods in metrics.get("reconstruction", {}).items() if "model" in methods}
    sentences = []
    if section:
        sentences = [_image_sentence(section), _token_sentence(section, has_tokens="analysis" in metrics)]
    if "analysis" in metrics:
        sentences.append(_text_sentence(metrics["analysis"]))
    return [f"{number}. {sentence}" for number, sentence in enumerate(sentences, 1)]


def _image_sentence(section: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    parts = [
        f"{methods['model']['ssim']:.3f} at {acceleration}x (zero-filled {methods['zero_filled']['ssim']:.3f})"
        for acceleration, methods in section.items()
    ]
    return f"SSIM of the reconstruction: {', '.join(parts)}."


def _token_sentence(section: Mapping[str, Mapping[str, Mapping[str, Any]]], has_tokens: bool) -> str:
    """State whether the model is better than the same decoder trained without tokens."""
    if not has_tokens:
        return "The decoder uses no image tokens; the language model has no part in the image."
    differences = {
        acceleration: (control["ssim_difference"], control["ssim_difference_ci95"])
        for acceleration, methods in section.items()
        if "ssim_difference" in (control := methods.get("trained_without_tokens", {}))
    }
    if not differences:
        return (
            "Whether the image needs the language model was not measured: "
            "there is no decoder trained without tokens (stage2.train_control)."
        )
    parts = [
        f"{mean:+.4f}" + (f" ({interval[0]:+.4f} to {interval[1]:+.4f})" if interval else "") + f" at {acceleration}x"
        for acceleration, (mean, interval) in differences.items()
    ]
    measured = f"Against the same decoder trained without tokens, SSIM changes by {', '.join(parts)}"
    intervals = [interval for _, interval in differences.values()]
    if None in intervals:
        return f"{measured}; with one test patient there is no interval, so no verdict."
    if all(low > 0 for low, _ in intervals):
        small = all(abs(mean) < SMALL_SSIM for mean, _ in differences.values())
        verdict = "slightly better" if small else "better"
        return f"{measured}: with the tokens it is {verdict} in this one training; repeat it with other seeds."
    if all(high < 0 for _, high in intervals):
        return f"{measured}: with the language model's tokens the image is worse in this one training."
    return f"{measured}: the language model's tokens do not improve the image measurably."


def _text_sentence(scores: Mapping[str, Any]) -> str:
    """State contrast accuracy and F1 of the findings, each with its baseline."""
    contrast = f"The text names the right contrast in {scores['contrast_accuracy']:.0%} of the slices"
    if (baseline := scores.get("contrast_accuracy_without_kspace")) is not None:
        contrast += f" (without k-space {baseline:.0%})"
    if scores.get("finding_f1") is None:
        return f"{contrast}; its findings could not be scored. It is not a report."
    findings = f"its findings have F1 {scores['finding_f1']:.2f}"
    if (constant := scores.get("finding_f1_best_constant")) is not None:
        findings += f", the best constant answer {constant:.2f}"
    return f"{contrast}; {findings}. It is not a report."
