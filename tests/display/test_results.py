"""Figures and conclusions of 04_evaluate: the drawn values are the given ones."""

import numpy as np
import pandas as pd
import pytest
from made_results import image_scores

from mrilib.data.annotations import Box
from mrilib.display import conclusions, results, tables
from mrilib.display.images import display_window
from mrilib.evaluation.examples import DescribedSlice, zoom_on
from mrilib.evaluation.reconstructions import Comparison
from mrilib.metrics.lesions import Lesion

METHODS = ("trained_without_tokens", "other_patient_tokens", "no_tokens", "zero_filled")


def section(differences, **others):
    """Return metrics.json's "reconstruction" at 4x, 8x, … with one difference to the decoder without tokens each."""
    return {
        str(4 * number): {"model": image_scores(0.8, lost=number, **others)}
        | {name: image_scores(0.7, difference, lost=2, **others) for name in METHODS}
        for number, difference in enumerate(differences, 1)
    }


ANALYSIS = {
    "cross_entropy": 0.3,
    "contrast_accuracy": 0.9,
    "contrast_commonest": 0.34,
    "finding_f1": 0.5,
    "finding_f1_ci95": [0.4, 0.6],
    "finding_f1_best_constant": 0.1,
    "findings_true": 12,
    "findings_found": 5,
    "findings_invented": 3,
}


def texts(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts]


# ------------------------------------------------------------------------------------------------- the answer


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ([0.02, 0.03], "make the image better at 4x and 8x,"),
        ([0.0, -0.001], "do not measurably change the image at 4x and 8x,"),
        (
            [-0.02, 0.0, 0.02],
            "make the image worse at 4x, do not measurably change the image at 8x and make the image better",
        ),
    ],
)
def test_the_answer_follows_the_interval(differences, words):
    text = conclusions.answer({"reconstruction": section(differences), "analysis": ANALYSIS}, "here", True)
    first = text.splitlines()[0]
    assert first.startswith("**By SSIM the image tokens") and words in first
    assert "loses 1 of 20 lesions at 4x" in first and "2 of 20 lesions at 8x" in first
    assert "90% of the cases" in first and "5 of 12 findings and invents 3: F1 0.50, 95% interval 0.40 to 0.60" in first
    assert text.splitlines()[-1].startswith("*6 test volumes of 3 patients, here.")


def test_a_small_difference_is_called_slight():
    metrics = {"reconstruction": section([0.002], spread=0.001)}
    assert "make the image slightly better" in conclusions.answer(metrics, "", True)
    assert "slightly better than the decoder trained without tokens" in conclusions.token_conclusion(
        metrics["reconstruction"]
    )


def test_the_answer_names_what_was_not_measured():
    model = {"4": {"model": image_scores(0.8)}}
    assert "was not measured" in conclusions.answer({"reconstruction": model}, "", True)
    assert "no part in the image" in conclusions.answer({"reconstruction": model}, "", False)
    without = conclusions.answer({"reconstruction": {}, "analysis": ANALYSIS}, "", True)
    assert "no test volume has a target" in without and "90% of the cases" in without and "|" not in without
    unknown = {**ANALYSIS, "contrast_accuracy": None, "finding_f1": None}
    assert "could not be scored" in conclusions.answer({"reconstruction": {}, "analysis": unknown}, "", True)
    assert "lesions lost" not in conclusions.answer({"reconstruction": model}, "", True)


def test_an_acceleration_without_the_other_methods_has_gaps():
    """At the acceleration of a file's own mask one patient has no other patient, and no baseline."""
    scores = section([0.01]) | {"6": {"model": image_scores(0.6)}}
    text = conclusions.answer({"reconstruction": scores}, "", True)
    assert "at 4x, compared" in text and any(line.startswith("| 6x ") and "–" in line for line in text.splitlines())
    assert tables.reconstruction_table(scores).loc["zero-filled", "6x PSNR [dB]"] == "–"
    for figure in (results.method_scores(scores), results.token_differences(scores)):
        figure.png()
        assert len(figure.axes[0].texts) > len(figure.axes[1].texts)


# ------------------------------------------------------------------------------------------------- figures


def comparison(**others):
    rng = np.random.default_rng(0)
    target = rng.random((40, 32))
    images = {"zero_filled": target * 0.5, "model": target * 0.9, "trained_without_tokens": target * 0.8}
    return Comparison(target, images, 1.0, title="slice 3", **others)


def test_the_headline_has_one_header_and_a_zoom():
    box = Box(20, 4, 6, 5, "Mass")
    zoom = zoom_on(box, (40, 32))
    whole = comparison(boxes=[box, Box(0, 36, 3, 3, "Mass")], pixel=(1.0, 1.0))
    scores = {name: {"retention": 0.25} for name in whole.images}
    figure = results.headline([whole, whole._replace(zoom=zoom, scores=scores)], "Test slices at 4x")
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:5] == [
        "target",
        "zero-filled",
        "two-stage model",
        "decoder trained\nwithout tokens",
        "|error| of the model\n×5",
    ]
    assert not any(titles[5:])
    assert texts(figure).count("contrast kept: 25%") == 3
    first, zoomed = (np.asarray(figure.axes[place].get_images()[0].get_array()) for place in (0, 5))
    assert np.array_equal(first, whole.target[::-1]) and np.array_equal(zoomed, whole.target[zoom][::-1])
    assert {figure.axes[place].get_images()[0].get_clim()[1] for place in (0, 3, 5, 8)} == {
        display_window(whole.target)
    }
    outline, _ = figure.axes[5].patches
    assert figure.axes[5].get_xlim() == (-0.5, 27.5) and figure.axes[5].get_ylim() == (27.5, -0.5)
    left, top = round(outline.get_x() + 0.5), round(outline.get_y() + 0.5)
    inside = zoomed[top : top + 5, left : left + 6]
    assert np.array_equal(inside, whole.target[4:9, 20:26][::-1])
    assert (
        figure.alt_text().startswith("Test slices at 4x. Columns: target; zero-filled")
        and "kept: 25%" in figure.alt_text()
    )


@pytest.mark.parametrize("box", [Box(0, 0, 3, 3, "Mass"), Box(60, 50, 4, 14, "Mass"), Box(5, 5, 40, 40, "Mass")])
def test_a_zoom_is_a_square_inside_the_image_about_the_box(box):
    rows, columns = zoom_on(box, (64, 64))
    assert rows.start >= 0 and rows.stop <= 64 and columns.start >= 0 and columns.stop <= 64
    assert rows.stop - rows.start == columns.stop - columns.start >= 28
    assert rows.start <= box.y and box.y + box.height <= rows.stop
    assert columns.start <= box.x and box.x + box.width <= columns.stop


def test_method_scores_have_a_row_per_method_in_order():
    figure = results.method_scores(section([0.01, 0.02]))
    four, eight = figure.axes
    labels = [label.get_text() for label in four.get_yticklabels()]
    assert labels[:2] == ["two-stage model", "decoder trained without tokens"] and labels[-1] == "zero-filled"
    assert [text.get_text() for text in eight.texts] == ["0.800", *["0.700"] * 4]
    assert sorted(four.lines[0].get_xdata()) == pytest.approx([0.79, 0.81])


def test_token_differences_are_the_given_ones():
    figure = results.token_differences(section([0.01, -0.02]))
    assert [text.get_text() for text in figure.axes[1].texts] == ["−0.0200"] * 3
    assert sorted(figure.axes[0].lines[0].get_xdata()) == pytest.approx([0.0, 0.02])


def test_every_lesion_is_a_dot_and_lost_ones_are_counted():
    measured = [
        Lesion("f", "p", 0, Box(0, 0, size, size, "Mass"), 2.0, 2.0 * retention)
        for size, retention in ((4, 1.0), (5, 0.4), (6, 9.0), (7, -3.0))
    ]
    figure = results.lesion_dots(
        {"4": {"model": measured, "zero_filled": measured[:2]}}, ("zero_filled", "model", "none")
    )
    assert [axis.get_title() for axis in figure.axes] == [
        "zero-filled\n4x: 1 of 2 lost",
        "two-stage model\n4x: 2 of 4 lost",
    ]
    dots = [line for line in figure.axes[1].lines if line.get_marker() != "None"]
    assert sum(len(line.get_xdata()) for line in dots) == 4
    assert [len(line.get_xdata()) for line in dots if line.get_marker() in "v^"] == [0, 1, 1, 0]  # outside of the axis
    figure.png()


def test_analysis_comparison_leaves_out_missing_baselines():
    values = ANALYSIS | {"cross_entropy_without_kspace": 0.9, "cross_entropy_gain_over_without_kspace_se": 0.05}
    figure = results.analysis_comparison(values)
    entropy, contrast, findings = figure.axes
    assert [text.get_text() for text in entropy.texts] == ["0.300", "0.900"]
    assert [text.get_text() for text in contrast.texts] == ["0.900"]
    assert [text.get_text() for text in findings.texts] == ["0.500", "0.100"]
    assert list(entropy.lines[0].get_ydata()) == pytest.approx([0.8, 1.0])  # two standard errors
    assert list(findings.lines[0].get_ydata()) == [0.4, 0.6]
    assert any(line.get_ydata()[0] == 0.34 for line in contrast.lines)


def test_analysis_comparison_survives_a_single_patient():
    values = {"cross_entropy": 0.3, "cross_entropy_se": float("inf"), "contrast_accuracy": 1.0, "finding_f1": 0.0}
    results.analysis_comparison(values).png()


def test_texts_stand_under_their_image():
    image = np.random.default_rng(0).random((20, 20))
    slices = [
        DescribedSlice(image, "AXT1, slice 0, 4x", "the truth", "the text", [], ()),
        DescribedSlice(image, "AXT2, slice 1, 4x", "the truth", "a wrong text", ["missed: mass, left central"], None),
    ]
    figure = results.described_slices(slices)
    below = [text.replace("\n", " ") for text in texts(figure)]
    assert below == [
        *("Generated: the text", "True: the truth", "No error"),
        *("Generated: a wrong text", "True: the truth", "Errors: missed: mass, left central; findings unknown"),
    ]
    assert "AXT2, slice 1, 4x. Generated: a wrong text" in figure.alt_text()
    figure.png()


def test_training_texts_show_first_and_last_epoch():
    true = ["Axial T1 image of the brain.", "Axial T2 image of the brain."]
    tables_by_epoch = {
        1: pd.DataFrame({"true": true, "generated": ["Axial T2 image of the brain.", "Axial T2 image of the brain."]}),
        3: pd.DataFrame({"true": true, "generated": ["middle", "middle"]}),
        6: pd.DataFrame({"true": true, "generated": true}),
    }
    figure = results.training_texts(tables_by_epoch, [np.eye(8), np.ones((8, 8))])
    shown = " ".join(" ".join(text.split()) for text in texts(figure))
    assert "Epoch 1: Axial T2" in shown and "Epoch 6: Axial T1" in shown and "Epoch 3" not in shown
    colors = {text.get_text()[:7]: text.get_color() for axis in figure.axes for text in axis.texts}
    assert colors["Epoch 6"] == results.GREEN
    assert "Epoch 1: Axial T2 image" in figure.description
