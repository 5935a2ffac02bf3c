"""Tables, figures and conclusions of the comparison of methods."""

import itertools

import pandas as pd
import pytest
from made_runs import make_method_run
from matplotlib.text import Text

from mrilib.comparison import methods
from mrilib.config import ComparisonParameters
from mrilib.display import comparison


def compare(*runs):
    return methods.read_comparison(ComparisonParameters.create({"runs": [str(run) for run in runs]}))


@pytest.fixture(scope="module")
def compared(tmp_path_factory, volumes):
    parent = tmp_path_factory.mktemp("runs")
    made = [make_method_run(parent, "two_stage", volumes[:6], 0.05, seed) for seed in (0, 1)]
    made.append(make_method_run(parent, "no_token_decoder_equal_time", volumes[:6], 0.3))
    return compare(*made)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, volumes):
    """One method, one seed, one volume, without lesions and without shifts."""
    run = make_method_run(tmp_path_factory.mktemp("alone"), "fastmri_unet", volumes[:1], 0.1, crop="image")
    return compare(run)


def test_the_answer_names_the_best_method_and_its_cost(compared, alone):
    text = comparison.answer(compared)
    assert text.count("x the best method is the two-stage model") == 2
    assert "after 20 min of training" in text and "measurably above all others" in text
    assert "compares trainings rather than methods" in text, "one of the methods has one seed"
    assert "without a verdict" not in text and "without a verdict" in comparison.answer(alone)


def test_the_table_has_every_method_with_its_interval(compared):
    table = comparison.method_table(compared)
    assert list(table.index) == [methods.label(name) for name in compared.names]
    row = table.loc["two-stage model"]
    assert " to " in row["4x SSIM in head"] and " of " in row["8x lesions lost"]
    assert (row["training [min]"], row["steps (stages)"], row["trainable parameters"]) == ("20", "3 + 3", "2,000")
    assert table.loc["zero-filled", "training [min]"] == "–"


def test_the_note_says_what_the_intervals_hold(compared, alone):
    note = comparison.spread_note(compared)
    assert "decoder trained without tokens (time of both stages): only one seed" in note
    assert "All methods have one seed, so the interval is over patients only" in comparison.spread_note(alone)
    assert "left out: x" in comparison.spread_note(alone._replace(left_out=["x"]))


def test_labels_do_not_overlap(compared):
    same = compared._replace(scores=compared.scores.assign(ssim_head=0.9))
    for one in (compared, same):
        figure = comparison.score_by_cost(one)
        figure.draw_without_rendering()
        for axis in figure.axes:
            # Of the text alone, without the line to its point.
            boxes = sorted((Text.get_window_extent(text) for text in axis.texts), key=lambda box: box.y0)
            assert len(boxes) == len(one.names)
            assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(boxes))


def test_cheaper_and_better_methods_are_listed(compared):
    first, second = comparison.cost_conclusion(compared).splitlines()
    assert (
        "two-stage model, " in first
        and "after 20 min" in first
        and first.startswith("- **4x**")
        and second.startswith("- **8x**")
    )


def test_lost_lesions(compared):
    assert comparison.lost_lesions(compared).axes[0].get_title().startswith("lesions lost at 4x, of ")
    lost = compared.lesions["method"] == "no_token_decoder_equal_time"
    text = comparison.lesion_conclusion(compared._replace(lesions=compared.lesions.assign(is_lost=lost)))
    assert text.count("fewest are lost by two-stage model and zero-filled, 0 of ") == 2
    assert text.count("measurably more by decoder trained without tokens (time of both stages).") == 2


def test_shifts(compared):
    shifted = compared._replace(shifts=pd.DataFrame({"noise 2": {"two_stage": 0.02, "bart": -0.01}}))
    assert "BART l1-wavelet (−0.010) loses least SSIM, two-stage model (0.020) most" in comparison.shift_conclusion(
        shifted
    )
    assert len(comparison.shift_map(shifted).axes[0].texts) == 2


def test_images_of_all_methods(compared, alone):
    rows = methods.example_slices(compared, "8")
    figure = comparison.method_images(rows, columns=3)
    assert len(figure.axes) == 12  # two bands of a slice and a zoom
    texts = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert sum("contrast kept" in text for text in texts) == 3
    comparison.method_images(methods.example_slices(alone, "4"))


def test_the_value_of_the_tokens_at_equal_time(compared, alone):
    assert comparison.can_compare_at_equal_time(compared) and not comparison.can_compare_at_equal_time(alone)
    text = comparison.equal_time_conclusion(compared)
    assert text.count("the two-stage model is better than the decoder without tokens") == 2 and "20 min" in text
    assert len(comparison.equal_time_difference(compared).axes) == 3
    without_lesions = compared._replace(lesions=pd.DataFrame())
    assert len(comparison.equal_time_difference(without_lesions).axes) == 2
    assert "lesions" not in " ".join(comparison.method_table(without_lesions))
