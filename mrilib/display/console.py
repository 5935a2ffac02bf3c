"""What the commands print after a run: its metrics in at most 100 columns, and their meaning in three sentences."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from mrilib.display import conclusions
from mrilib.display.tables import analysis_table, coil_compression_note
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
    meaning = conclusions.sentences(metrics, decoder_uses_tokens="analysis" in metrics)
    lines = [_wrapped(f"{number}. {sentence}", indent="   ") for number, sentence in enumerate(meaning, 1)]
    return "\n\n".join([*parts, "\n".join(lines), f"from {display_path(path)}"])


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent)


def _image_table(methods: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    rows = []
    for method in in_order(methods):
        scores = methods[method]
        difference, interval = scores.get("ssim_difference"), scores.get("ssim_difference_ci95")
        rows.append(
            {
                "method": method_label(method),
                "SSIM": f"{scores['ssim']:.3f}",
                "PSNR [dB]": f"{scores['psnr']:.2f}",
                "SSIM in head": f"{scores['ssim_head']:.3f}",
                "PSNR in head": f"{scores['psnr_head']:.2f}",
                "SSIM of model minus this": conclusions.with_interval(difference, interval, "+.3f"),
            }
        )
    return pd.DataFrame(rows)
