"""What the commands print after a run: tables in 100 columns and three sentences."""

import json
from typing import Any

import pytest
from made_results import volume_scores

from mrilib.display import console
from mrilib.evaluation.reconstructions import summarize_methods
from mrilib.metrics import image as image_module
from mrilib.metrics.methods import METHOD_LABELS

ANALYSIS = {
    "samples": 216, "patients": 12, "cross_entropy": 0.2, "contrast_accuracy": 0.96, "contrast_commonest": 0.33,
    "contrast_accuracy_without_kspace": 0.33, "level_accuracy": 1.0, "finding_f1": 0.14, "finding_f1_ci95": [0.1, 0.2],
    "finding_f1_best_constant": 0.13, "findings_true": 50, "findings_found": 8, "findings_invented": 20,
}  # fmt: skip
METHODS = (  # of one evaluation
    "model", "trained_without_tokens", "no_tokens", "other_patient_tokens", "bart", "nearest_training_slice",
    "zero_filled", "zero_filled_compressed",
)  # fmt: skip


def measured(control: float | None, patients: int = 4) -> dict[str, Any]:
    """Return metrics of a model with SSIM 0.8 and more, and of a decoder trained without tokens."""
    scores = {"model": volume_scores(0.8, patients), "zero_filled": volume_scores(0.5, patients)}
    if control is not None:
        scores["trained_without_tokens"] = volume_scores(control, patients)
    return {"reconstruction": summarize_methods({"4": scores, "8": scores}), "analysis": ANALYSIS}


@pytest.mark.parametrize("cost", [0.021, 0.0])
def test_the_metrics_table_states_the_cost_of_compression(cost, tmp_path):
    scores = dict.fromkeys((*image_module.METRICS, "volumes"), 0.5) | {"ssim_ci95": [0.4, 0.6]}
    methods = {"zero_filled": scores | {"compression_cost_ssim": cost, "compression_cost_psnr": 6 * cost}}
    methods |= {"zero_filled_compressed": scores} if cost else {}
    (tmp_path / "metrics.json").write_text(json.dumps({"reconstruction": {"4": methods}}))
    text = console.metrics_text(tmp_path / "metrics.json")
    expected = "costs zero-filled images 0.021 in SSIM and 0.13 dB in PSNR at 4x" if cost else "nothing was compressed"
    assert expected in text.replace("\n", " ") and ("zero-filled, compressed coils" in text) == bool(cost)


def test_what_a_run_prints_fits_in_100_columns(tmp_path):
    scores = {name: volume_scores(0.8) for name in METHODS}
    metrics = {"reconstruction": summarize_methods({"4": scores, "8": scores}), "analysis": ANALYSIS}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    text = console.metrics_text(tmp_path / "metrics.json")
    assert max(map(len, text.split("\n"))) <= 100
    assert all(METHOD_LABELS[name] in text for name in METHODS) and "The generated text names" in text


def test_the_deciding_difference_is_printed(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(measured(0.7)))
    text = console.metrics_text(tmp_path / "metrics.json")
    assert "+0.100 (+0.100 to +0.100)" in text
    assert "1. By SSIM the image tokens make the image better at 4x and 8x" in text
    (tmp_path / "metrics.json").write_text(json.dumps(measured(None)))
    text = console.metrics_text(tmp_path / "metrics.json")
    assert "Whether the image tokens help was not measured" in text.replace("\n   ", " ")
