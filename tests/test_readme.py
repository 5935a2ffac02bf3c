"""The README is short, its links exist, and the numbers of its results table are those of the record."""

import json
import re
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from mrilib.config import ROOT

README = ROOT / "README.md"
RECORD = ROOT / "outputs" / "reference_bench"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "api").glob("*.md"))]
METHODS = {
    "two-stage model": "model",
    "decoder trained without tokens¹": "trained_without_tokens",
    "decoder without stage 1": "decoder_alone",
    "fastMRI's VarNet, steps of both stages": "varnet_both_stages",
    "fastMRI's VarNet": "varnet",
    "fastMRI's U-Net": "unet",
    "BART, l1-wavelet": "bart",
    "zero-filled": "zero_filled",
}


def test_size() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.encode()) <= 12_000 and len(text.splitlines()) <= 220
    assert max(len(line) for line in text.splitlines()) <= 160


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_and_images_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if not link.startswith(("http", "#")):
            assert (page.parent / link.partition("#")[0]).exists(), link


def results() -> dict[str, list[str]]:
    text = README.read_text(encoding="utf-8").partition("## Results")[2].partition("## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows[2:]}


@cache
def scores() -> Any:
    return json.loads((RECORD / "metrics.json").read_text())["comparison"]


def lost_lesions(method: str, acceleration: str) -> float:
    """Lesions with less than half of their contrast, mean of the seeds."""
    counts = []
    for path in RECORD.glob(f"seed*/reconstructions/{method}/{acceleration}/lesions.json"):
        lesions = json.loads(path.read_text())["lesions"]
        assert len(lesions) == 70
        counts.append(sum(lesion["reconstruction"] / lesion["target"] < 0.5 for lesion in lesions))
    return mean(counts)


def minutes(method: str) -> float:
    """Steps times the seconds of a step; stage 1 is part of the methods that start from it."""
    seconds = json.loads((RECORD / "costs" / "done.json").read_text())["seconds"]

    def cost(part: str) -> float:
        done = json.loads((RECORD / "seed0" / part / "done.json").read_text())
        return done["steps"] * sorted(seconds[part])[1] / 60

    return cost(method) + (cost("stage1") if method in ("model", "trained_without_tokens") else 0)


def test_the_results_are_those_of_the_record() -> None:
    table = results()
    assert list(table) == list(METHODS)
    for name, (ssim_4x, ssim_8x, lost_4x, lost_8x, _) in table.items():
        method = METHODS[name]
        for acceleration, ssim, lost in (("4", ssim_4x, lost_4x), ("8", ssim_8x, lost_8x)):
            assert float(ssim) == pytest.approx(mean(scores()[acceleration][method]["ssim_head"]), abs=0.0006), name
            assert float(lost) == lost_lesions(method, acceleration), name


def test_the_minutes_are_those_of_the_record() -> None:
    for name, row in results().items():
        if row[-1] != "–":
            assert float(row[-1]) == pytest.approx(minutes(METHODS[name]), abs=0.6), name


def test_the_numbers_of_the_demo_are_those_of_its_record() -> None:
    text = " ".join(README.read_text(encoding="utf-8").split())
    metrics = json.loads((ROOT / "outputs" / "reference" / "metrics.json").read_text())
    images, analysis = (metrics["reconstruction"], metrics["analysis"])
    for method, words in (
        ("model", "SSIM is about {} at 4x and {} at 8x"),
        ("trained_without_tokens", "SSIM is about {} at 4x and {} at 8x"),
        ("zero_filled", "zero-filled: {} and {}"),
    ):
        assert words.format(*(f"{images[a][method]['ssim']:.2f}" for a in ("4", "8"))) in text, method
    lost = {name: images["8"][name]["lesions_lost"] for name in ("model", "trained_without_tokens")}
    total = images["8"]["model"]["lesions"]
    assert f"{lost['trained_without_tokens']} of {total}, the two-stage model {lost['model']}" in text
    assert f"{analysis['contrast_accuracy']:.0%} of the demo's" in text
    f1, constant = analysis["finding_f1"], analysis["finding_f1_best_constant"]
    assert f"training it is {f1:.2f}, below the constant answer's {constant:.2f}" in text
