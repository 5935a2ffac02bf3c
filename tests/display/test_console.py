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
    "samples": 216, "patients": 12, "cross_entropy": 0.2, "contrast_accuracy": 0.96,
    "contrast_accuracy_without_kspace": 0.33, "level_accuracy": 1.0, "finding_f1": 0.14,
    "finding_f1_best_constant": 0.13,
}  # fmt: skip


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
    scores = {name: volume_scores(0.8) for name in METHOD_LABELS}
    metrics = {"reconstruction": summarize_methods({"4": scores, "8": scores}), "analysis": ANALYSIS}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    text = console.metrics_text(tmp_path / "metrics.json")
    assert max(map(len, text.split("\n"))) <= 100
    assert all(label in text for label in METHOD_LABELS.values()) and "3. The text" in text


@pytest.mark.parametrize(
    ("control", "words"),
    [
        (0.8, "do not improve the image measurably"),
        (0.799, "slightly better in this one training"),
        (0.7, "is better in this one training"),
        (0.9, "is worse in this one training"),
        (None, "was not measured: there is no decoder trained without tokens"),
    ],
)
def test_the_conclusion_about_the_tokens_follows_from_the_control(control, words):
    images, tokens, texts = console.run_conclusion(measured(control))
    assert images.startswith("1. SSIM of the reconstruction: 0.8") and "zero-filled 0.5" in images
    assert words in tokens
    assert "right contrast in 96% of the slices (without k-space 33%)" in texts and "It is not a report." in texts
    if control == 0.7:
        assert "+0.1000" in tokens


def test_the_conclusion_without_an_interval_or_without_tokens():
    assert "no interval, so no verdict" in console.run_conclusion(measured(0.7, patients=1))[1]
    without_texts = {"reconstruction": measured(None)["reconstruction"]}
    assert console.run_conclusion(without_texts)[1:] == [
        "2. The decoder uses no image tokens; the language model has no part in the image."
    ]


def test_findings_that_cannot_be_scored_are_said_to_be_so():
    metrics = {"analysis": {**ANALYSIS, "finding_f1": None}}
    assert console.run_conclusion(metrics)[0].endswith("its findings could not be scored. It is not a report.")
