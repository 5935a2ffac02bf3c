"""Tables, figures and conclusions of 06_comparison, computed from a `MethodComparison`."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from mrilib.comparison.methods import ORACLES, Estimate, MethodComparison, label
from mrilib.display.images import (
    display_image,
    display_window,
    draw_image,
    draw_scale_bar,
    outline,
    score_text,
    slice_scores,
)
from mrilib.display.style import BLACK, BLUE, GREY, SKY, VERMILLION, WIDTH, RecordFigure, styled
from mrilib.display.tables import SMALL_SSIM
from mrilib.evaluation.reconstructions import Comparison

OWN, CONTROL = "two_stage", "no_token_decoder_equal_time"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def _text(estimate: Estimate, form: str) -> str:
    """Format an estimate: "0.953 (0.949 to 0.957)"."""
    interval = ""
    if estimate.interval is not None:
        low, high = estimate.interval
        interval = f" ({low:{form}} to {high:{form}})"
    return f"{estimate.mean:{form}}{interval}".replace("-", "−")


def _color(method: str) -> str:
    return BLUE if method == OWN else BLACK


def _accelerations(comparison: MethodComparison) -> list[str]:
    return list(comparison.volumes)


# ------------------------------------------------------------------------------------------------- the answer


def answer(comparison: MethodComparison) -> str:
    """State in one sentence, in Markdown, the best method at each acceleration and the cheapest that equals it."""
    parts = [_best(comparison, acceleration) for acceleration in _accelerations(comparison)]
    limit = ""
    if any(len(runs) == 1 for runs in comparison.methods.values()):
        limit = "; with one seed of a method, this compares trainings rather than methods"
    return f"**By SSIM inside the head: {'; '.join(parts)}{limit}.**"


def _best(comparison: MethodComparison, acceleration: str) -> str:
    ranked = {
        method: comparison.estimate(method, acceleration, "ssim_head").mean
        for method in comparison.names
        if method not in ORACLES
    }
    best = max(ranked, key=lambda method: ranked[method])
    text = f"at {acceleration}x the best method is the {label(best)} with {ranked[best]:.3f}"
    minutes = comparison.costs["minutes"].to_dict()
    if best in minutes:
        text += f" after {minutes[best]:.3g} min of training"
    intervals = {
        method: comparison.difference(best, method, acceleration, "ssim_head").interval
        for method in ranked
        if method != best
    }
    equal = [method for method, interval in intervals.items() if interval is not None and interval[0] <= 0]
    if any(interval is None for interval in intervals.values()):
        text += ", without a verdict, as one patient and one seed give no interval"
    elif equal:
        text += f", not measurably above {_listed([label(method) for method in equal])}"
    elif intervals:
        text += ", measurably above all others"
    return text


def spread_note(comparison: MethodComparison) -> str:
    """State what the intervals hold: the seeds of each method and the patients."""
    patients = comparison.scores["patient"].nunique()
    volumes = len(next(iter(comparison.volumes.values())))
    counts = {method: len(runs) for method, runs in comparison.methods.items()}
    text = f"{volumes} test volumes of {patients} patient{'s' * (patients != 1)}. "
    text += "In brackets: 95% intervals, from resampling seeds and patients."
    if 1 < (fewest := min(counts.values())) < 5:
        text += f" {fewest} seeds show less than the whole spread between trainings."
    if single := [label(method) for method, count in counts.items() if count == 1]:
        who = "All methods have" if len(single) == len(counts) else f"{_listed(single)}: only"
        text += f" {who} one seed, so the interval is over patients only and holds no spread between trainings."
    if comparison.left_out:
        text += f" Not evaluated, so left out: {', '.join(comparison.left_out)}."
    return text


def method_table(comparison: MethodComparison) -> pd.DataFrame:
    """Tabulate scores, lost lesions and cost: a row per method."""
    rows: dict[str, dict[str, str]] = {}
    for method in comparison.names:
        row = rows.setdefault(label(method), {})
        for acceleration in _accelerations(comparison):
            row[f"{acceleration}x SSIM in head"] = _text(comparison.estimate(method, acceleration, "ssim_head"), ".3f")
            row[f"{acceleration}x PSNR in head [dB]"] = _text(
                comparison.estimate(method, acceleration, "psnr_head"), ".1f"
            )
            if total := _lesion_count(comparison, acceleration):
                lost = comparison.estimate(method, acceleration, "is_lost").mean * total
                row[f"{acceleration}x lesions lost"] = f"{lost:.3g} of {total}"
        if method in comparison.costs.index:
            cost = comparison.costs.loc[method]
            row["training [min]"] = f"{cost['minutes']:.3g}"
            row["steps (stages)"] = str(cost["steps"])
            row["trainable parameters"] = f"{cost['parameters']:,}"
    return pd.DataFrame.from_dict(rows, orient="index").fillna("–")


def _lesion_count(comparison: MethodComparison, acceleration: str) -> int:
    """Count the lesions that are measured in each run."""
    if comparison.lesions.empty:
        return 0
    part = comparison.lesions[comparison.lesions["acceleration"] == acceleration]
    return int((part["run"] + part["method"]).value_counts().max()) if len(part) else 0


# ------------------------------------------------------------------------------------------------- cost


@styled
def score_by_cost(comparison: MethodComparison) -> RecordFigure:
    """Draw SSIM inside the head over training minutes, a panel per acceleration.

    Dashed lines are methods without training. Those below the trained methods are only named, with their value.
    """
    accelerations = _accelerations(comparison)
    height = max(2.4, 0.19 * len(comparison.names) + 0.4)
    figure = RecordFigure(WIDTH, height * len(accelerations) + 0.4)
    axes = figure.subplots(len(accelerations), 1, squeeze=False, sharex=True)[:, 0]
    for axis, acceleration in zip(axes, accelerations, strict=True):
        points = {}
        for method, minutes in comparison.costs["minutes"].items():
            estimate = comparison.estimate(str(method), acceleration, "ssim_head")
            points[str(method)] = float(minutes), estimate.mean
            axis.plot(minutes, estimate.mean, "o", color=_color(str(method)), markersize=6)
            if estimate.interval is not None:
                axis.plot([minutes, minutes], estimate.interval, color=_color(str(method)), linewidth=1.5)
        axis.set_xscale("log")
        axis.margins(y=0.15)
        axis.set_ylabel(f"SSIM inside the head, {acceleration}x")
        low, high = axis.get_ylim()
        untrained = [method for method in comparison.names if method not in (*ORACLES, *points)]
        for method in untrained:
            points[method] = np.inf, comparison.estimate(method, acceleration, "ssim_head").mean
            axis.axhline(points[method][1], color=GREY, linewidth=1, linestyle="--")
        axis.set_ylim(low, high)
        _label_points(axis, points, 0.17 / height)
    minutes = comparison.costs["minutes"]
    axes[-1].set_xlim(minutes.min() / 1.3, minutes.max() * 1.3)
    axes[-1].xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes[-1].xaxis.set_minor_locator(NullLocator())
    axes[-1].set_xlabel("training of all stages [min]")
    figure.description = "SSIM inside the head over training minutes. " + cost_conclusion(comparison)
    return figure


def _label_points(axis: Axes, points: Mapping[str, tuple[float, float]], gap: float) -> None:
    """Write the methods in a column on the right, at least `gap` apart, with a thin line to each point.

    `points` maps a method to minutes and SSIM; the minutes are infinite for a line. `gap` is in parts of the axis.
    """
    low, high = axis.get_ylim()
    order = sorted(points, key=lambda method: points[method][1])
    wanted = [max((points[method][1] - low) / (high - low), 0) for method in order]
    for number in range(1, len(wanted)):
        wanted[number] = max(wanted[number], wanted[number - 1] + gap)
    top = 1.0
    for number in reversed(range(len(wanted))):  # back inside the axis
        wanted[number] = min(wanted[number], top)
        top = wanted[number] - gap
    for method, place in zip(order, wanted, strict=True):
        x, y = points[method]
        text = label(method) if y >= low else f"{label(method)}: {y:.3f}, below"
        start: Any = {"xy": (x, y), "xycoords": "data"}
        if np.isinf(x):
            start = {"xy": (1, max(y, low)), "xycoords": axis.get_yaxis_transform()}
        line: Any = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
        style: Any = {"textcoords": "axes fraction", "va": "center", "color": _color(method), "annotation_clip": False}
        axis.annotate(text, **start, xytext=(1.05, place), arrowprops=line, **style)


def cost_conclusion(comparison: MethodComparison) -> str:
    """List, for each acceleration, the trained methods with a higher SSIM inside the head than all cheaper ones."""
    lines = []
    for acceleration in _accelerations(comparison):
        best, kept = -np.inf, []
        for method, minutes in comparison.costs["minutes"].sort_values().items():
            score = comparison.estimate(str(method), acceleration, "ssim_head").mean
            if score > best:
                best = score
                kept.append(f"{label(str(method))}, {score:.3f} after {minutes:.3g} min")
        lines.append(f"- **{acceleration}x**: better than all cheaper methods: {'; '.join(kept)}.")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- lesions


@styled
def lost_lesions(comparison: MethodComparison) -> RecordFigure:
    """Draw the number of lost lesions as dots with 95% intervals: a row per method, a panel per acceleration."""
    accelerations = [name for name in _accelerations(comparison) if _lesion_count(comparison, name)]
    methods = [method for method in comparison.names if method not in ORACLES]
    figure = RecordFigure(WIDTH, 0.9 + 0.3 * len(methods))
    axes = figure.subplots(1, len(accelerations), squeeze=False, sharey=True, sharex=True)[0]
    for axis, acceleration in zip(axes, accelerations, strict=True):
        total = _lesion_count(comparison, acceleration)
        for place, method in enumerate(methods):
            _draw_dot(axis, comparison.estimate(method, acceleration, "is_lost"), place, ".3g", total, _color(method))
        axis.set(title=f"lesions lost at {acceleration}x, of {total}", ylim=(len(methods) - 0.4, -0.8))
        axis.set_yticks(range(len(methods)), [textwrap.fill(label(method), 34) for method in methods])
        axis.margins(x=0.1)
    return figure


def _draw_dot(axis: Axes, estimate: Estimate, place: int, form: str, factor: float = 1, color: str = BLUE) -> None:
    """Draw an estimate, times a factor, as a dot with its interval, and its number above it."""
    if estimate.interval is not None:
        axis.plot([factor * end for end in estimate.interval], [place, place], color=color, linewidth=2)
    axis.plot(factor * estimate.mean, place, "o", color=color, markersize=5)
    above: Any = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
    axis.annotate(
        f"{factor * estimate.mean:{form}}".replace("-", "−"), (factor * estimate.mean, place), (0, 4), **above
    )


def lesion_conclusion(comparison: MethodComparison) -> str:
    """Name the method that loses fewest lesions at each acceleration, and those that do not measurably differ."""
    lines = []
    for acceleration in _accelerations(comparison):
        total = _lesion_count(comparison, acceleration)
        if not total:
            continue
        lost = {
            method: comparison.estimate(method, acceleration, "is_lost").mean
            for method in comparison.names
            if method not in ORACLES
        }
        best = min(lost, key=lambda method: lost[method])
        intervals = {
            method: comparison.difference(method, best, acceleration, "is_lost").interval
            for method in lost
            if method != best
        }
        more = [label(method) for method, interval in intervals.items() if interval is not None and interval[0] > 0]
        fewest = _listed([label(method) for method, share in lost.items() if share == lost[best]])
        text = f"- **{acceleration}x**: fewest are lost by {fewest}, {lost[best] * total:.3g} of {total} lesions; "
        lines.append(text + (f"measurably more by {_listed(more)}." if more else "measurably more by none."))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- shifts


@styled
def shift_map(comparison: MethodComparison) -> RecordFigure:
    """Draw the loss of SSIM inside the head under each distribution shift: a row per method."""
    table = comparison.shifts
    figure = RecordFigure(WIDTH, 1.0 + 0.32 * len(table))
    axis = figure.subplots()
    values = table.to_numpy(float)
    top = max(float(np.nanmax(values)), 1e-9)
    axis.imshow(values, cmap="Blues", vmin=0, vmax=1.6 * top, aspect="auto")  # black numbers stay readable
    for (row, column), value in np.ndenumerate(values):
        text = "–" if np.isnan(value) else f"{value:.3f}".replace("-", "−")
        axis.text(column, row, text, ha="center", va="center")
    axis.set_xticks(range(table.shape[1]), list(table.columns))
    axis.set_yticks(range(len(table)), [label(str(method)) for method in table.index])
    axis.xaxis.tick_top()
    axis.grid(False)
    axis.set_title("SSIM inside the head: in distribution minus under the shift")
    return figure


def shift_conclusion(comparison: MethodComparison) -> str:
    """Name, for each shift, the methods that lose least and most; zero-filled images are no method."""
    lines = []
    for shift, losses in comparison.shifts.items():
        ranked = losses.drop("zero_filled", errors="ignore").dropna().sort_values()
        if ranked.empty:
            continue
        least, most = (f"{label(str(ranked.index[end]))} ({ranked.iloc[end]:.3f})" for end in (0, -1))
        text = f"{least} loses least SSIM, {most} most" if len(ranked) > 1 else f"measured for one method, {least}"
        lines.append(f"- **{shift}**: {text}.".replace("(-", "(−"))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- pictures


@styled
def method_images(rows: Sequence[Comparison], columns: int = 5) -> RecordFigure:
    """Draw the target and all methods side by side, and the zooms beneath; further methods follow in another band.

    All images share one grey window, 0 to the 99.8th percentile of the target slice. The first row of a band has each
    image's SSIM and PSNR of the slice, a zoom the lesion's contrast retention.
    """
    names = ["target", *rows[0].images]
    bands = -(-len(names) // columns)
    side = WIDTH / columns
    figure = RecordFigure(WIDTH, bands * (len(rows) * (side + 0.2) + 0.55))
    figure.suptitle(rows[0].title, fontsize=10)
    axes = figure.subplots(bands * len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for number, name in enumerate(names):
        band, column = divmod(number, columns)
        for place, row in enumerate(rows):
            axis = axes[band * len(rows) + place, column]
            _draw_method(axis, row, name)
            if place == 0:
                axis.set_title(textwrap.fill(name, 28))
    figure.description = f"{rows[0].title}. Images: {'; '.join(names)}."
    return figure


def _draw_method(axis: Axes, row: Comparison, name: str) -> None:
    target = np.asarray(row.target)
    image = target if name == "target" else np.asarray(row.images[name])
    part = row.zoom or (slice(0, target.shape[0]), slice(0, target.shape[1]))
    draw_image(axis, display_image(image[part]), 0, display_window(row.target))
    for box in row.boxes:
        patch = outline(box, target.shape[0], SKY)
        # From the whole displayed image to the displayed part of it.
        patch.set_xy((patch.get_x() - part[1].start, patch.get_y() - (target.shape[0] - part[0].stop)))
        axis.add_patch(patch)
    text = row.title if row.zoom else ""
    if name == "target":
        draw_scale_bar(axis, image[part].shape, row.pixel)
    else:
        text = score_text(row.scores[name] if row.scores else slice_scores(row.target, image, row.maximum))
    axis.text(0.5, -0.02, textwrap.fill(text, 30), ha="center", va="top", transform=axis.transAxes)


# ------------------------------------------------------------------------------------------------- the value of stage 1

DIFFERENCES = {  # value → title, format
    "ssim_head": ("SSIM inside the head\n(right: two stages are better)", "+.4f"),
    "psnr_head": ("PSNR inside the head [dB]\n(right: two stages are better)", "+.2f"),
    "is_lost": ("share of lesions lost\n(left: two stages are better)", "+.3f"),
}


def can_compare_at_equal_time(comparison: MethodComparison) -> bool:
    """Whether the two-stage model and the decoder without tokens of the same time are among the methods."""
    return {OWN, CONTROL} <= set(comparison.methods)


@styled
def equal_time_difference(comparison: MethodComparison) -> RecordFigure:
    """Draw the two-stage model minus the decoder without tokens of the same time: dots with 95% intervals."""
    accelerations = _accelerations(comparison)
    has_lesions = all(_lesion_count(comparison, acceleration) for acceleration in accelerations)
    shown = [value for value in DIFFERENCES if value != "is_lost" or has_lesions]
    figure = RecordFigure(WIDTH, 1.0 + 0.4 * len(accelerations))
    for axis, value in zip(figure.subplots(1, len(shown), squeeze=False, sharey=True)[0], shown, strict=True):
        title, form = DIFFERENCES[value]
        for place, acceleration in enumerate(accelerations):
            _draw_dot(axis, comparison.difference(OWN, CONTROL, acceleration, value), place, form)
        axis.axvline(0, color=VERMILLION, linewidth=1)
        axis.set(title=title, ylim=(len(accelerations) - 0.5, -0.8))
        axis.set_yticks(range(len(accelerations)), [f"{acceleration}x" for acceleration in accelerations])
        axis.margins(x=0.2)
    return figure


def equal_time_conclusion(comparison: MethodComparison) -> str:
    """State at each acceleration whether the two-stage model is better for its time, and the measured times."""
    lines = []
    for acceleration in _accelerations(comparison):
        estimate = comparison.difference(OWN, CONTROL, acceleration, "ssim_head")
        verdict = "cannot be compared (one patient and one seed)"
        if estimate.interval is not None:
            low, high = estimate.interval
            verdict = (
                "not measurably different from" if low <= 0 <= high else "better than" if low > 0 else "worse than"
            )
            if not verdict.startswith("not") and abs(estimate.mean) < SMALL_SSIM:
                verdict = f"slightly {verdict}"
            verdict = f"is {verdict} the decoder without tokens"
        lines.append(f"- **{acceleration}x**: the two-stage model {verdict}: SSIM {_text(estimate, '+.4f')}.")
    minutes = comparison.costs["minutes"].to_dict()
    lines.append(
        f"- Measured training time: {minutes[OWN]:.3g} min of both stages, {minutes[CONTROL]:.3g} min without."
    )
    return "\n".join(lines)
