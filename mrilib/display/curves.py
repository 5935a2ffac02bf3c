"""Figures of training curves; each function returns a Figure and shows nothing."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from mrilib.display.style import (
    BLACK,
    COLORS,
    GREY,
    PURPLE,
    VERMILLION,
    WIDTH,
    RecordFigure,
    styled,
)
from mrilib.training.history import History

VALIDATION_LABELS = {  # metrics with a panel in the training curves
    "token_accuracy": "token accuracy",
    "ssim": "validation SSIM",
    "psnr": "validation PSNR [dB]",
}
STAGES = {
    "stage1": "stage 1",
    "constant_prefix": "constant prefix (baseline without k-space)",
    "stage2": "stage 2",
    "no_token_decoder": "decoder trained without tokens",
}
MARKERS = ("o", "s", "D", "^", "v", "P")
DASHES = ("-", "--", ":")


def _legend_below(figure: Figure, axes: Sequence[Axes], columns: int) -> None:
    """Draw one legend for all axes below them, without duplicates."""
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    # matplotlib fills a legend column by column; this order reads line by line.
    names = [name for first in range(columns) for name in list(handles)[first::columns]]
    figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=columns)


# ------------------------------------------------------------------------------------------------- training


@styled
def training_curves(histories: History | Mapping[str, History]) -> RecordFigure:
    """Draw loss, validation metrics, learning rate and gradient norms over the steps.

    Several histories, by name, share the axes. Gradient norms are those of the first.
    """
    named = dict(histories) if isinstance(histories, Mapping) else {"": histories}
    first = next(iter(named.values()))
    panels: list[Callable[[Axes], None]] = [functools.partial(_loss_panel, named=named)]
    for name in VALIDATION_LABELS:
        if f"val_{name}" in first.epochs[0]:
            panels.append(functools.partial(_validation_panel, named=named, metric=name))
    if not _is_text_training(first):
        panels.append(functools.partial(_image_panel, history=first))
    panels += [functools.partial(plot_rate, named=named), functools.partial(_gradient_panel, history=first)]
    columns = 3 if len(panels) > 4 else 2
    rows = -(-len(panels) // columns)
    figure = RecordFigure(WIDTH, 2.5 * rows + 0.2)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, panel in zip(axes, panels, strict=False):
        panel(axis)
    _legend_below(figure, [axes[0]], 4)  # the colours of all panels but the last
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure


def _running_mean(values: ArrayLike) -> NDArray:
    """Average the last fortieth of all steps, at least 5; fewer at the start.

    Values of skipped steps, which are not finite, are left out; NaN where no value remains.
    """
    array = np.asarray(values, dtype=float)
    width = min(len(array), max(5, len(array) // 40))
    finite = np.isfinite(array)
    total = np.cumsum(np.concatenate([[0.0], np.where(finite, array, 0.0)]))
    count = np.cumsum(np.concatenate([[0], finite]))
    ends = np.arange(1, len(array) + 1)
    starts = np.maximum(0, ends - width)
    counts = count[ends] - count[starts]
    return np.where(counts > 0, (total[ends] - total[starts]) / np.maximum(counts, 1), np.nan)


def _mark_skipped(axis: Axes, history: History) -> None:
    """Mark the steps that `on_nan: skip` skipped at the panel's upper edge."""
    steps = [
        step["step"] for step in history.steps if not np.isfinite([step["loss"], step.get("gradient_norm", 0.0)]).all()
    ]
    if steps:
        place: Any = {"transform": axis.get_xaxis_transform(), "linestyle": "", "clip_on": False, "zorder": 4}
        axis.plot(steps, np.ones(len(steps)), marker="v", color=VERMILLION, markersize=5, label="skipped step", **place)


def _step_axis(axis: Axes) -> None:
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))


def _epoch_ends(history: History) -> list[float]:
    last = {step["epoch"]: step["step"] for step in history.steps}
    return [last[epoch["epoch"]] for epoch in history.epochs]


def _is_text_training(history: History) -> bool:
    """Whether the history is of stage 1 or its baseline."""
    return "cross_entropy" in history.steps[0]


def _styles(named: Mapping[str, History]) -> list[tuple[str, History, str, str]]:
    """Give each history a colour, and a marker for print without colours: (name, history, colour, marker)."""
    styles = zip(named.items(), COLORS * 9, MARKERS * 9, strict=False)
    return [(name, history, color, marker) for (name, history), color, marker in styles]


def plot_loss(axis: Axes, history: History, name: str, color: str, marker: str = MARKERS[0], raw: bool = True) -> None:
    """Plot the smoothed training loss over the steps, and the validation loss after each epoch so far.

    `name` is for the legend; `raw` also plots the unsmoothed loss, pale.
    """
    # Validation has no label smoothing, so the training cross-entropy without it is plotted.
    key, label = ("loss", "1 − SSIM")
    if _is_text_training(history):
        key, label = "cross_entropy", "cross-entropy [nats per token]"
    steps = [step["step"] for step in history.steps if key in step]
    values = [step[key] for step in history.steps if key in step]
    if raw:
        axis.plot(steps, values, color=color, alpha=0.22, linewidth=0.6)
    axis.plot(steps, _running_mean(values), color=color, label=f"{name} training".strip())
    validation = [epoch["val_loss"] for epoch in history.epochs]
    style: Any = {"linestyle": "--", "marker": marker, "markersize": 3.5, "linewidth": 1.0}
    if validation:
        axis.plot(_epoch_ends(history), validation, color=color, label=f"{name} validation".strip(), **style)
    _mark_skipped(axis, history)
    axis.set(ylabel=label)
    _step_axis(axis)


def _loss_panel(axis: Axes, named: Mapping[str, History]) -> None:
    for name, history, color, marker in _styles(named):
        plot_loss(axis, history, name, color, marker)
    best = next(iter(named.values())).best_epoch
    axis.set_title(f"loss; best checkpoint: epoch {best}" if best else "loss; no best checkpoint yet")


def _validation_panel(axis: Axes, named: Mapping[str, History], metric: str) -> None:
    for name, history, color, marker in _styles(named):
        values = {step["step"]: step[metric] for step in history.steps if metric in step}
        if values:
            axis.plot(list(values), _running_mean(list(values.values())), color=color, linewidth=1.0)
        scores = [epoch[f"val_{metric}"] for epoch in history.epochs]
        axis.plot(_epoch_ends(history), scores, color=color, linestyle="--", marker=marker, markersize=3.5, label=name)
    axis.set_title(VALIDATION_LABELS[metric])
    _step_axis(axis)


def _image_panel(axis: Axes, history: History) -> None:
    steps = [step["step"] for step in history.steps]
    for name, color in (("target", GREY), ("reconstruction", PURPLE)):
        for statistic, style in (("max", "-"), ("mean", "--")):
            values = _running_mean([step[f"{name}_{statistic}"] for step in history.steps])
            axis.plot(steps, values, color=color, linestyle=style, label=f"{name} {statistic}")
    axis.set(title="images in a batch [volume maximum]", ylim=(0, None))
    _step_axis(axis)
    axis.legend(ncols=2, fontsize=7.0, handlelength=1.5, columnspacing=0.8, loc="center")


def plot_rate(axis: Axes, named: Mapping[str, History]) -> None:
    """Plot the learning rate over the steps; name → History."""
    # Equal schedules coincide; later ones are dashed, so that the first shows through.
    for (name, history), color, style in zip(named.items(), COLORS * 3, DASHES * 9, strict=False):
        rates = [step["learning_rate"] for step in history.steps]
        axis.plot([step["step"] for step in history.steps], rates, color=color, linestyle=style, label=name)
    axis.set(title="learning rate", ylim=(0, None))
    _step_axis(axis)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _gradient_panel(axis: Axes, history: History) -> None:
    steps = [step["step"] for step in history.steps]
    prefix = "gradient_norm_"
    parts = [name.removeprefix(prefix) for name in history.steps[0] if name.startswith(prefix)]
    total = _running_mean([step["gradient_norm"] for step in history.steps])
    axis.plot(steps, total, color=BLACK, label="all")
    # The scale ignores the first steps, where zero-initialised layers have no gradient, and negligible norms.
    settled = len(steps) // 20
    lowest = np.nanmin(total[settled:], initial=np.inf)
    floor = 1e-3 * lowest
    for number, part in enumerate(parts):
        values = _running_mean([step[prefix + part] for step in history.steps])
        if np.nanmax(values, initial=0.0) > 0:
            # Markers and dashes distinguish the parts without colours.
            marks: Any = {"marker": MARKERS[(number + number // 6) % 6], "markevery": (number / 60, 0.2)}
            style, color = DASHES[number // 6 % 3], COLORS[number % 6]
            axis.plot(steps, values, color=color, linestyle=style, linewidth=1.0, label=part, markersize=3.5, **marks)
            late = values[settled:]
            lowest = min(lowest, late[late > floor].min(initial=lowest))
    _mark_skipped(axis, history)
    axis.set(yscale="log", title="gradient norms before clipping")
    _step_axis(axis)
    legend = axis.legend(ncols=2, fontsize=7.0, handlelength=2.2, columnspacing=0.8, loc="lower center")
    legend.set(frame_on=True, zorder=3)
    legend.get_frame().set(edgecolor="none", alpha=0.9)
    share = min(0.6, 0.1 * np.ceil(len(legend.get_texts()) / 2) + 0.05)  # of the axis, for the legend
    top = axis.get_ylim()[1]
    if np.isfinite(lowest):  # infinite if every step was skipped
        axis.set_ylim(lowest / (top / lowest) ** (share / (1 - share)), top)


@styled
def compare_curves(runs: Mapping[str, Mapping[str, History]]) -> RecordFigure:
    """Draw the losses of several runs, one panel per stage.

    `runs` maps run → stage (key of `STAGES`) → History.

    Raises
    ------
    ValueError
        If no run has a history.
    """
    stages = [stage for stage in STAGES if any(stage in histories for histories in runs.values())]
    if not stages:
        raise ValueError("none of these runs has trained a stage: there are no curves to compare")
    columns = 2 if len(stages) == 4 else len(stages)
    rows = len(stages) // columns
    figure = RecordFigure(WIDTH, 2.6 * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, stage in zip(axes, stages, strict=True):
        for (name, histories), color, marker in zip(runs.items(), COLORS * 9, MARKERS * 9, strict=False):
            if stage in histories:
                plot_loss(axis, histories[stage], name, color, marker, raw=False)
        axis.set_title(STAGES[stage])
    _legend_below(figure, list(axes), 2)
    return figure
