"""Figures of training curves and scores; each function returns a Figure and shows nothing."""

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
    BLUE,
    COLORS,
    GREEN,
    GREY,
    METHOD_COLORS,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    WIDTH,
    RecordFigure,
    styled,
)
from mrilib.metrics import image
from mrilib.metrics.methods import in_order, method_label
from mrilib.training.history import History

METRIC_LABELS = {
    "ssim": "SSIM",
    "psnr": "PSNR [dB]",
}
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
VolumeScores = Mapping[str, Mapping[str, Sequence[image.VolumeScore]]]  # acceleration → method → volumes
Series = Mapping[str, Sequence[tuple[float, Sequence[float] | None]]]  # name → (value, [low, high] or None) per group


def _method_colors(names: Sequence[str]) -> dict[str, str]:
    spare = iter((VERMILLION, BLACK, "#F0E442", "#555555"))
    return {name: METHOD_COLORS[name] if name in METHOD_COLORS else next(spare) for name in names}


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


# ------------------------------------------------------------------------------------------------- scores


def _bars(axis: Axes, groups: Sequence[str], series: Series, colors: Mapping[str, str], form: str = "{:.3f}") -> None:
    """Draw grouped bars with intervals and numbers; NaN leaves a gap."""
    width = 0.8 / len(series)
    crowded = len(groups) * len(series) > 10
    for number, (name, entries) in enumerate(series.items()):
        places = np.arange(len(groups)) + (number - (len(series) - 1) / 2) * width
        axis.bar(places, [value for value, _ in entries], width * 0.9, color=colors[name], label=method_label(name))
        for place, (value, interval) in zip(places, entries, strict=True):
            if np.isfinite(value):
                if interval is not None:
                    axis.plot([place, place], interval, color=BLACK, linewidth=1.2)
                top = value if interval is None else max(value, interval[1])
                _number(axis, form.format(value), place, top, upright=crowded)
    _group_axis(axis, groups)
    axis.margins(y=0.22 if crowded else 0.12)


def _number(axis: Axes, text: str, x: float, y: float, upright: bool = False) -> None:
    style: Any = {"textcoords": "offset points", "ha": "center", "fontsize": 7.5}
    style |= {"rotation": 90, "va": "bottom"} if upright else {}
    axis.annotate(text.replace("-", "−"), (x, y), (0, 2), **style)


def _group_axis(axis: Axes, groups: Sequence[str]) -> None:
    axis.set_xticks(range(len(groups)), groups)
    axis.grid(False, axis="x")


@styled
def metrics_bars(section: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> RecordFigure:
    """Draw SSIM and PSNR of the methods at each acceleration, with 95% intervals over patients.

    `section` is metrics.json's "reconstruction": acceleration → method → {"ssim", "ssim_ci95", …}. The token ablations,
    which `token_swap` shows, and the zero-filled images of compressed coils are left out.
    """
    accelerations = sorted(section, key=float)
    left_out = ("other_patient_tokens", "no_tokens", "zero_filled_compressed")
    methods = [name for name in in_order(m for scores in section.values() for m in scores) if name not in left_out]
    figure = RecordFigure(WIDTH, 3.3)
    axes = figure.subplots(1, 2)
    for axis, metric in zip(axes, METRIC_LABELS, strict=True):
        series: dict[str, list[tuple[float, Sequence[float] | None]]] = {}
        for method in methods:
            entries = [section[a].get(method, {}) for a in accelerations]
            series[method] = [(entry.get(metric, np.nan), entry.get(f"{metric}_ci95")) for entry in entries]
        form = "{:.1f}" if metric == "psnr" else "{:.3f}"
        _bars(axis, [f"{a}x" for a in accelerations], series, _method_colors(methods), form)
        axis.set_title(METRIC_LABELS[metric])
    _legend_below(figure, axes, min(4, len(methods)))
    return figure


@styled
def metrics_by_contrast(scores: VolumeScores) -> RecordFigure:
    """Draw each test volume's SSIM as a dot by contrast, with the contrast's mean as a line."""
    accelerations = sorted(scores, key=float)
    figure = RecordFigure(WIDTH, 3.2)
    axes = figure.subplots(1, len(accelerations), squeeze=False, sharey=True)[0]
    for axis, acceleration in zip(axes, accelerations, strict=True):
        methods = {name: scores[acceleration][name] for name in in_order(scores[acceleration])}
        colors = _method_colors(list(methods))
        contrasts = sorted({score.acquisition for volumes in methods.values() for score in volumes})
        width = 0.8 / len(methods)  # of a method within a contrast
        for number, (method, volumes) in enumerate(methods.items()):
            for place, contrast in enumerate(contrasts):
                values = [score.ssim for score in volumes if score.acquisition == contrast]
                center = place + (number - (len(methods) - 1) / 2) * width
                spread = np.linspace(-0.3, 0.3, len(values)) * width if len(values) > 1 else np.zeros(len(values))
                label, marker = method_label(method) if place == 0 else "_", MARKERS[number % 6]
                axis.plot(center + spread, values, marker, color=colors[method], markersize=3.5, alpha=0.6, label=label)
                if values:
                    ends, mean = [center - 0.4 * width, center + 0.4 * width], float(np.mean(values))
                    axis.plot(ends, [mean, mean], color=colors[method], linewidth=2.2)
        _group_axis(axis, contrasts)
        axis.set_title(f"{acceleration}x")
    axes[0].set_ylabel("SSIM")
    _legend_below(figure, axes, min(4, len(scores[accelerations[0]])))
    return figure


ANALYSIS_BARS = {  # end of a key in metrics.json's "analysis" → label, colour
    "": ("own\nk-space", BLUE),
    "_other_patient": ("shuffled\ntokens", PURPLE),
    "_without_kspace": ("constant\nprefix", GREY),
    "_best_constant": ("best constant\nanswer", ORANGE),
}
ANALYSIS_PANELS = {
    "cross_entropy": "cross-entropy [nats per token], lower is better\nbars: ± 2 s.e. of the difference to the first",
    "contrast_accuracy": "contrast accuracy\n[share of slices, ± 2 s.e.]",
    "finding_f1": "findings: F1 over exact label,\nside and region [± 2 s.e.]",
}


@styled
def analysis_comparison(section: Mapping[str, Any]) -> RecordFigure:
    """Draw cross-entropy, contrast accuracy and finding F1 of the generated text and of its baselines.

    `section` is metrics.json's "analysis"; missing baselines are left out. Error bars are ±2 standard errors
    ``<name>_se``. For a baseline's cross-entropy they are of the difference to the model's.
    """
    figure = RecordFigure(WIDTH, 3.2)
    for axis, (name, title) in zip(figure.subplots(1, len(ANALYSIS_PANELS)), ANALYSIS_PANELS.items(), strict=True):
        _analysis_panel(axis, name, section)
        axis.set_title(title)
        share, error = section.get("contrast_commonest"), section.get("contrast_commonest_se")
        if name == "contrast_accuracy" and share is not None:
            label = "commonest contrast"
            if error is not None:
                label += " ± 2 s.e."
                axis.axhspan(share - 2 * error, share + 2 * error, color=BLACK, alpha=0.12, linewidth=0)
            axis.axhline(share, color=BLACK, linestyle=":", linewidth=1.2, label=label)
            axis.legend(loc="upper right", fontsize=7.5)
            axis.set(ylim=(0, 1.22), yticks=np.linspace(0, 1, 6))  # above 1: room for the legend
    return figure


def _analysis_panel(axis: Axes, name: str, section: Mapping[str, Any]) -> None:
    present = [kind for kind in ANALYSIS_BARS if section.get(name + kind) is not None]
    for place, kind in enumerate(present):
        gain_error = section.get(f"{name}_gain_over{kind}_se", section.get(f"{name}{kind}_se"))
        value, error = float(section[name + kind]), 2 * float(gain_error or 0.0)
        error = error if np.isfinite(error) else 0.0  # infinite for a single patient
        axis.bar(place, value, 0.7, color=ANALYSIS_BARS[kind][1])
        if error:
            axis.errorbar(place, value, error, color=BLACK, linewidth=1.2, capsize=3)
        _number(axis, f"{value:.3f}", place, value + error)
    if not present:
        reason = "nothing to find,\nnothing claimed"
        if name == "contrast_accuracy":
            reason = "no test sample has\na listed contrast"
        elif not section.get("reviewed_samples"):
            reason = "no test sample\nwas reviewed\nfor findings"
        axis.text(0.5, 0.5, reason, transform=axis.transAxes, ha="center", va="center")
        axis.set_yticks([])
    axis.set_xticks(range(len(present)), [ANALYSIS_BARS[kind][0] for kind in present], fontsize=8)
    axis.grid(False, axis="x")
    axis.margins(y=0.12)


@styled
def token_swap(scores: VolumeScores) -> RecordFigure:
    """Draw the SSIM of the decoder with its own tokens, with other tokens, and trained without tokens.

    Parameters
    ----------
    scores : mapping
        Acceleration → tokens ("own tokens", "shuffled tokens", …; own ones first) → scores of the same volumes in the
        same order.

    Returns
    -------
    RecordFigure
        Left the means, right the paired differences to the first, with 95% intervals bootstrapped over two or more
        patients. Tokens without scores at an acceleration leave a gap.
    """
    accelerations = sorted(scores, key=float)
    variants = list(dict.fromkeys(name for acceleration in accelerations for name in scores[acceleration]))
    # The colours that these methods have elsewhere.
    colors = dict(zip(variants, (BLUE, PURPLE, SKY, GREEN, ORANGE, VERMILLION), strict=False))
    figure = RecordFigure(WIDTH, 3.3)
    means, differences = figure.subplots(1, 2)
    groups = [f"{a}x" for a in accelerations]
    series: dict[str, list[tuple[float, Sequence[float] | None]]] = {name: [] for name in variants}
    for place, acceleration in enumerate(accelerations):
        volumes = scores[acceleration]
        patients = [score.patient for score in volumes[variants[0]]]
        own = [score.ssim for score in volumes[variants[0]]]
        for number, name in enumerate(variants):
            if name not in volumes:
                series[name].append((np.nan, None))
                continue
            values = [score.ssim for score in volumes[name]]
            series[name].append((float(np.mean(values)), image.bootstrap_interval(values, patients)))
            if number > 0:
                changes = [value - reference for value, reference in zip(values, own, strict=True)]
                interval = image.bootstrap_interval(changes, patients)
                x = place + (number - len(variants) / 2) * 0.24
                _difference(differences, x, float(np.mean(changes)), interval, colors[name])
    _bars(means, groups, series, colors)
    means.set_title("SSIM")
    differences.axhline(0, color=BLUE, linewidth=1.2)
    differences.set(title=f"change of SSIM against {variants[0]}", xlim=(-0.6, len(groups) - 0.4))
    _group_axis(differences, groups)
    differences.margins(y=0.15)
    _legend_below(figure, [means], len(variants))
    return figure


def _difference(axis: Axes, x: float, mean: float, interval: Sequence[float] | None, color: str) -> None:
    """Draw a mean difference as a dot with its interval and its number."""
    if interval is not None:
        axis.plot([x, x], interval, color=color, linewidth=2)
    axis.plot(x, mean, "o", color=color, markersize=6)
    right: Any = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 7.5}
    axis.annotate(f"{mean:+.4f}".replace("-", "−"), (x, mean), **right)  # not above: the zero line may pass there
