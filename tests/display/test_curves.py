"""Training curves: the drawn values are the given ones."""

import numpy as np
import pytest
from made_results import history

from mrilib.display import curves


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
