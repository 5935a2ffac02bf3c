"""Curves and score figures: the drawn values are the given ones."""

import numpy as np
import pytest
from made_results import history, volume_scores

from mrilib.display import curves
from mrilib.metrics import image


def titles(figure):
    return [axis.get_title() for axis in figure.axes]


def test_training_curves_of_text():
    figure = curves.training_curves({"stage 1": history(), "baseline": history(7, 1)})
    loss = figure.axes[0]
    labels = loss.get_legend_handles_labels()[1]
    assert labels == ["stage 1 training", "stage 1 validation", "baseline training", "baseline validation"]
    validation = dict(zip(labels, loss.get_legend_handles_labels()[0], strict=True))["stage 1 validation"]
    assert list(validation.get_xdata()) == [4, 8, 12]
    assert list(validation.get_ydata()) == pytest.approx([0.5, 0.25, 1 / 6])
    raw = loss.lines[0]  # without label smoothing, like the validation loss
    assert list(raw.get_ydata()) == pytest.approx([1 / step for step in range(1, 13)])
    assert loss.get_ylabel() == "cross-entropy [nats per token]"
    assert loss.get_legend() is None
    assert [text.get_text() for text in figure.legends[0].get_texts()] == labels
    gradients = figure.axes[3].get_legend_handles_labels()[1]
    assert gradients == ["all", "vit"]  # a logarithmic axis cannot show the part without a gradient


def test_training_curves_of_images_have_image_statistics():
    figure = curves.training_curves(history(text=False))
    assert figure.axes[0].get_ylabel() == "1 − SSIM"
    assert {"validation SSIM", "validation PSNR [dB]", "images in a batch [volume maximum]"} <= set(titles(figure))


def test_training_curves_of_a_single_step():
    curves.training_curves(history(1, 1)).png()


def test_running_mean_averages_the_last_steps():
    values = np.arange(400.0)
    mean = curves._running_mean(values)
    assert mean.shape == values.shape
    assert mean[0] == 0 and mean[3] == pytest.approx(1.5)
    assert mean[-1] == pytest.approx(values[-10:].mean())
    assert curves._running_mean([2.0]) == pytest.approx([2.0])


def test_compare_curves_by_stage():
    runs = {"a": {"stage1": history(), "stage2": history(text=False)}, "b": {"stage2": history(5, 1, text=False)}}
    figure = curves.compare_curves(runs)
    assert titles(figure) == ["stage 1", "stage 2"]
    assert len(figure.axes[0].lines) == 2 and len(figure.axes[1].lines) == 4
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["a training", "b training", "a validation", "b validation"]  # filled by columns: a line is a run
    colors = {line.get_label(): line.get_color() for axis in figure.axes for line in axis.lines}
    assert colors["a training"] != colors["b training"]
    markers = {line.get_label(): line.get_marker() for line in figure.axes[1].lines}
    assert markers["a validation"] != markers["b validation"]
    with pytest.raises(ValueError, match="none of these runs"):
        curves.compare_curves({"a": {}})


def test_metrics_bars_numbers_and_intervals():
    section = {
        "8": {"model": {"ssim": 0.7, "psnr": 24.06, "ssim_ci95": [0.65, 0.75], "psnr_ci95": [23.0, 25.0]}},
        "4": {
            "model": {"ssim": 0.8, "psnr": 28.0, "ssim_ci95": [0.75, 0.85], "psnr_ci95": [27.0, 29.0]},
            "zero_filled": {"ssim": 0.5, "psnr": 18.0},
            "no_tokens": {"ssim": 0.1, "psnr": 1.0},
        },
    }
    figure = curves.metrics_bars(section)
    ssim, psnr = figure.axes
    assert [label.get_text() for label in ssim.get_xticklabels()] == ["4x", "8x"]
    assert [text.get_text() for text in ssim.texts] == ["0.800", "0.700", "0.500"]
    assert [text.get_text() for text in psnr.texts] == ["28.0", "24.1", "18.0"]
    assert [list(line.get_ydata()) for line in ssim.lines] == [[0.75, 0.85], [0.65, 0.75]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["two-stage model", "zero-filled"]


def test_methods_have_the_same_order_in_all_figures():
    scores = {"ssim": 0.5, "psnr": 20.0}
    names = ["zero_filled", "mine", "nearest_training_slice", "model"]
    expected = ["two-stage model", "nearest training slice (oracle)", "zero-filled", "mine"]
    section = {"4": dict.fromkeys(names, scores)}
    assert [text.get_text() for text in curves.metrics_bars(section).legends[0].get_texts()] == expected
    volumes = {"4": {name: volume_scores(0.5) for name in names}}
    assert [text.get_text() for text in curves.metrics_by_contrast(volumes).legends[0].get_texts()] == expected


def test_metrics_by_contrast_shows_every_volume():
    scores = {"4": {"model": volume_scores(0.8), "zero_filled": volume_scores(0.5)}}
    axis = curves.metrics_by_contrast(scores).axes[0]
    dots = [line for line in axis.lines if line.get_marker() != "None"]
    assert len({line.get_marker() for line in dots}) == 2, "methods need different markers for print without colours"
    assert sum(len(line.get_ydata()) for line in dots) == 16
    means = [line.get_ydata()[0] for line in axis.lines if line.get_marker() == "None"]
    assert means[0] == pytest.approx(np.mean([0.8, 0.82, 0.84, 0.86]))


def test_analysis_comparison_leaves_out_missing_baselines():
    section = {
        "cross_entropy": 0.3,
        "cross_entropy_without_kspace": 0.9,
        "cross_entropy_gain_over_without_kspace_se": 0.05,
        "contrast_accuracy": 1.0,
        "finding_f1": 0.4,
        "finding_f1_best_constant": 0.1,
        "contrast_commonest": 0.34,
        "contrast_commonest_se": 0.03,
    }
    figure = curves.analysis_comparison(section)
    entropy, contrast, findings = figure.axes
    assert [text.get_text() for text in entropy.texts] == ["0.300", "0.900"]
    assert [text.get_text() for text in contrast.texts] == ["1.000"]
    assert [text.get_text() for text in findings.texts] == ["0.400", "0.100"]
    error_bar = entropy.collections[0].get_segments()[0]
    assert error_bar[:, 1] == pytest.approx([0.8, 1.0])  # two standard errors
    assert any(line.get_ydata()[0] == 0.34 for line in contrast.lines)


def test_analysis_comparison_survives_a_single_patient():
    section = {"cross_entropy": 0.3, "cross_entropy_se": float("inf"), "contrast_accuracy": 1.0, "finding_f1": 0.0}
    curves.analysis_comparison(section).png()


def test_token_swap_is_paired():
    own, other = volume_scores(0.8), volume_scores(0.79)
    figure = curves.token_swap({"4": {"own tokens": own, "shuffled tokens": other, "zero tokens": own}})
    means, differences = figure.axes
    assert [text.get_text() for text in differences.texts] == ["−0.0100", "+0.0000"]
    interval = differences.lines[0].get_ydata()
    assert interval == pytest.approx([-0.01, -0.01])
    assert len(means.patches) == 3
    assert means.patches[0].get_height() == pytest.approx(image.summarize(own)["ssim"])


@pytest.mark.parametrize("skipped", [[5], [1, 2, 3], range(1, 12), range(1, 13)], ids=["one", "first", "most", "all"])
@pytest.mark.parametrize("text", [True, False])
def test_skipped_steps_leave_gaps_and_marks(text, skipped):
    """Steps skipped by `on_nan: skip` are in the history with values that are not finite."""
    training = history(text=text)
    for number in skipped:
        values = [name for name in training.steps[0] if name not in ("epoch", "step", "learning_rate", "seconds")]
        training.steps[number - 1] |= dict.fromkeys(values, np.nan)
        training.steps[number - 1]["gradient_norm"] = np.inf if number % 2 else np.nan
    figure = curves.training_curves(training)
    figure.png()
    for title, line in (("loss", 1), ("gradient", 0)):
        axis = next(axis for axis in figure.axes if axis.get_title().startswith(title))
        marks = {line.get_label(): line for line in axis.lines}["skipped step"]
        assert list(marks.get_xdata()) == list(skipped)
        mean = np.asarray(axis.lines[line].get_ydata(), dtype=float)
        assert np.isfinite(mean).sum() >= 12 - len(skipped), "the running mean of the other steps must stay"
        assert all(np.isfinite(axis.get_ylim()))


def test_curves_without_skipped_steps_mark_none():
    for axis in curves.training_curves(history()).axes:
        assert "skipped step" not in [line.get_label() for line in axis.lines]
