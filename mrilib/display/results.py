"""Figures of 04_evaluate: images, lesions, tokens and texts; each function returns a Figure and shows nothing."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from mrilib.data.findings import CONTRASTS
from mrilib.display.images import (
    ERROR_SCALE,
    display_image,
    display_window,
    draw_image,
    draw_scale_bar,
    error_bar,
    outline,
    score_text,
    slice_scores,
)
from mrilib.display.style import (
    BLACK,
    BLUE,
    ERROR_MAP,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    WIDTH,
    RecordFigure,
    styled,
)
from mrilib.evaluation.examples import DescribedSlice
from mrilib.evaluation.reconstructions import Comparison
from mrilib.metrics.lesions import LOST, Lesion, count_lost
from mrilib.metrics.methods import in_order, method_label

Section = Mapping[str, Mapping[str, Mapping[str, Any]]]  # metrics.json's "reconstruction": acceleration → method

# ------------------------------------------------------------------------------------------------- images


@styled
def headline(rows: Sequence[Comparison], title: str) -> RecordFigure:
    """Draw target, reconstructions and the model's error, a row per slice or zoom, with one header per column.

    A row shares one grey window, 0 to the 99.8th percentile of the whole target slice; the error map ends at 1/5 of
    it. Under each reconstruction are its scores: those given, or SSIM and PSNR of the slice.
    """
    methods = list(rows[0].images)
    headers = ["target", *(method_label(name) for name in methods), f"|error| of the model ×{ERROR_SCALE}"]
    side = WIDTH / len(headers)
    figure = RecordFigure(WIDTH, len(rows) * (side + 0.22) + 1.0)
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(len(rows), len(headers), squeeze=False)
    for number, row in enumerate(rows):
        _headline_row(axes[number], row)
    for axis, header in zip(axes[0], headers, strict=True):
        axis.set_title(textwrap.fill(header, 20))
    place: Any = {"ax": list(axes.flat), "location": "bottom", "shrink": 0.4, "aspect": 40, "pad": 0.02}
    error_bar(figure, "|error| [% of the grey window, 0 to the target's 99.8th percentile]", **place)
    figure.description = f"{title}. Columns: {'; '.join(headers)}. " + " ".join(map(_describe, rows))
    return figure


def _scores_of(row: Comparison, name: str) -> Mapping[str, float]:
    return row.scores[name] if row.scores else slice_scores(row.target, row.images[name], row.maximum)


def _describe(row: Comparison) -> str:
    scores = "; ".join(f"{method_label(name)} {score_text(_scores_of(row, name))}" for name in row.images)
    return f"{', '.join(row.title.splitlines())}: {scores}."


def _headline_row(axes: Sequence[Axes], row: Comparison) -> None:
    target, window = np.asarray(row.target), display_window(row.target)
    part = row.zoom or (slice(0, target.shape[0]), slice(0, target.shape[1]))
    shown = display_image(target[part])
    draw_image(axes[0], shown, 0, window)
    draw_scale_bar(axes[0], shown.shape, row.pixel)
    place: Any = {"ha": "right", "va": "center", "rotation": 90, "multialignment": "center"}
    title = "\n".join(textwrap.fill(line, 24) for line in row.title.splitlines())
    axes[0].text(-0.05, 0.5, title, transform=axes[0].transAxes, **place)
    for box in row.boxes:
        patch = outline(box, target.shape[0], SKY)
        # From the whole displayed image to the displayed part of it.
        patch.set_xy((patch.get_x() - part[1].start, patch.get_y() - (target.shape[0] - part[0].stop)))
        axes[0].add_patch(patch)
    axes[0].set(xlim=(-0.5, shown.shape[1] - 0.5), ylim=(shown.shape[0] - 0.5, -0.5))  # boxes outside stay outside
    for axis, (name, image) in zip(axes[1:], row.images.items(), strict=False):
        draw_image(axis, display_image(np.asarray(image)[part]), 0, window)
        below: Any = {"ha": "center", "va": "top", "transform": axis.transAxes}
        axis.text(0.5, -0.02, score_text(_scores_of(row, name)), **below)
    error = np.abs(np.asarray(row.images["model"])[part] - target[part])
    draw_image(axes[-1], display_image(error), 0, window / ERROR_SCALE, cmap=ERROR_MAP)


@styled
def method_scores(section: Section) -> RecordFigure:
    """Draw SSIM of the methods as dots with 95% intervals over patients: a row per method, a panel per acceleration."""
    accelerations = sorted(section, key=float)
    methods = in_order(name for scores in section.values() for name in scores)
    figure = RecordFigure(WIDTH, 0.9 + 0.3 * len(methods))
    axes = figure.subplots(1, len(accelerations), squeeze=False, sharey=True, sharex=True)[0]
    for axis, acceleration in zip(axes, accelerations, strict=True):
        for place, name in enumerate(methods):
            if name in section[acceleration]:
                scores = section[acceleration][name]
                _dot(axis, scores["ssim"], place, scores.get("ssim_ci95"), BLUE if name == "model" else BLACK, ".3f")
        axis.set(title=f"SSIM at {acceleration}x", ylim=(len(methods) - 0.4, -0.8))
        axis.set_yticks(range(len(methods)), [method_label(name) for name in methods])
        axis.margins(x=0.1)
    return figure


def _dot(axis: Axes, value: float, place: float, interval: Sequence[float] | None, color: str, form: str) -> None:
    """Draw a value as a dot with its interval, and its number above it."""
    if interval is not None:
        axis.plot(interval, [place, place], color=color, linewidth=2)
    axis.plot(value, place, "o", color=color, markersize=5)
    rim = withStroke(linewidth=3, foreground="white")  # on grid lines and on the zero line
    above: Any = {"textcoords": "offset points", "ha": "center", "fontsize": 8.5, "path_effects": [rim]}
    axis.annotate(f"{value:{form}}".replace("-", "−"), (value, place), (0, 4), **above)


# ------------------------------------------------------------------------------------------------- lesions


@styled
def lesion_dots(lesions: Mapping[str, Mapping[str, Sequence[Lesion]]], methods: Sequence[str]) -> RecordFigure:
    """Draw each lesion's contrast retention over its size: a row per acceleration, a column per method.

    `lesions` maps acceleration → method → lesions. Retention is drawn between −0.5 and 1.75; triangles lie outside.
    """
    accelerations = sorted(lesions, key=float)
    columns = [name for name in methods if all(name in lesions[a] for a in accelerations)]
    figure = RecordFigure(WIDTH, 0.6 + 2.3 * len(accelerations))
    axes = figure.subplots(len(accelerations), len(columns), squeeze=False, sharex=True, sharey=True)
    for row, acceleration in zip(axes, accelerations, strict=True):
        for axis, name in zip(row, columns, strict=True):
            measured = lesions[acceleration][name]
            _retention_panel(axis, measured)
            header = f"{method_label(name)}\n" if acceleration == accelerations[0] else ""
            axis.set_title(f"{header}{acceleration}x: {count_lost(measured)} of {len(measured)} lost")
        for value, label, color in ((1, "complete", "#555555"), (LOST, "lost\nbelow", VERMILLION)):
            right: Any = {"transform": row[-1].get_yaxis_transform(), "va": "center", "fontsize": 8.5}
            row[-1].text(1.02, value, label, color=color, **right)
        row[0].set_ylabel("contrast retention")
    for axis in axes[-1]:
        axis.set_xlabel("lesion size: √area of its box [pixels]")
    return figure


def _retention_panel(axis: Axes, lesions: Sequence[Lesion]) -> None:
    low, high = -0.5, 1.75
    for is_lost, color in ((False, BLUE), (True, VERMILLION)):
        some = [lesion for lesion in lesions if lesion.is_lost == is_lost]
        for marker, chosen in (
            ("o", [one for one in some if low <= one.retention <= high]),
            ("v", [one for one in some if one.retention < low]),
            ("^", [one for one in some if one.retention > high]),
        ):
            values = np.clip([one.retention for one in chosen], low, high)
            axis.plot([one.size for one in chosen], values, marker, color=color, markersize=4.5, alpha=0.7)
    axis.axhline(1, color=GREY, linewidth=1)
    axis.axhline(LOST, color=VERMILLION, linewidth=1, linestyle="--")
    axis.set(ylim=(low - 0.15, high + 0.15))


# ------------------------------------------------------------------------------------------------- tokens


@styled
def token_differences(section: Section) -> RecordFigure:
    """Draw the model's SSIM minus that with other tokens and without: a row per comparison, a panel per acceleration.

    Dots are means over volumes, lines 95% intervals over patients.
    """
    rows = {
        "trained_without_tokens": "decoder trained\nwithout tokens",
        "other_patient_tokens": "shuffled tokens\n(another patient's)",
        "no_tokens": "zero tokens",
    }
    accelerations = sorted(section, key=float)
    present = [name for name in rows if any(name in methods for methods in section.values())]
    figure = RecordFigure(WIDTH, 1.2 + 0.5 * len(present))
    axes = figure.subplots(1, len(accelerations), squeeze=False, sharey=True, sharex=True)[0]
    for axis, acceleration in zip(axes, accelerations, strict=True):
        for place, name in enumerate(present):
            scores = section[acceleration].get(name)
            if scores is not None:
                interval = scores["ssim_difference_ci95"]
                _dot(axis, scores["ssim_difference"], place, interval, BLUE, "+.4f")
        axis.axvline(0, color=BLACK, linewidth=1)
        axis.set(
            title=f"{acceleration}x", xlabel="SSIM of the model minus that of the row\n(right: the model is better)"
        )
        axis.set_ylim(len(present) - 0.5, -0.8)
        axis.set_yticks(range(len(present)), [rows[name] for name in present])
        axis.margins(x=0.15)
    return figure


# ------------------------------------------------------------------------------------------------- texts

ANALYSIS_BARS = {  # end of a key in metrics.json's "analysis" → label, colour
    "": ("own\nk-space", BLUE),
    "_other_patient": ("shuffled\ntokens", PURPLE),
    "_without_kspace": ("constant\nprefix", GREY),
    "_best_constant": ("best constant\nanswer", ORANGE),
}
ANALYSIS_PANELS = {
    "cross_entropy": "cross-entropy [nats per token], lower is better\nlines: ± 2 s.e. of the difference to the first",
    "contrast_accuracy": "contrast accuracy\n[share of slices, ± 2 s.e.]",
    "finding_f1": "findings: F1 over exact label,\nside and region [95% interval]",
}


@styled
def analysis_comparison(section: Mapping[str, Any]) -> RecordFigure:
    """Draw cross-entropy, contrast accuracy and finding F1 of the generated text and of its baselines.

    `section` is metrics.json's "analysis"; missing baselines are left out. A line is the interval ``<name>_ci95`` or
    ±2 standard errors ``<name>_se``. For a baseline's cross-entropy it is of the difference to the model's.
    """
    figure = RecordFigure(WIDTH, 3.2)
    for axis, (name, title) in zip(figure.subplots(1, len(ANALYSIS_PANELS)), ANALYSIS_PANELS.items(), strict=True):
        _analysis_panel(axis, name, section)
        axis.set_title(title)
        share, error = section.get("contrast_commonest"), section.get("contrast_commonest_se")
        if name == "contrast_accuracy" and share is not None:
            if error is not None:
                axis.axhspan(share - 2 * error, share + 2 * error, color=BLACK, alpha=0.12, linewidth=0)
            axis.axhline(share, color=BLACK, linestyle=":", linewidth=1.2, label="always the commonest contrast")
            axis.legend(loc="upper right", fontsize=8)
            axis.set(ylim=(0, 1.22), yticks=np.linspace(0, 1, 6))  # above 1: room for the legend
    return figure


def _analysis_panel(axis: Axes, name: str, section: Mapping[str, Any]) -> None:
    present = [kind for kind in ANALYSIS_BARS if section.get(name + kind) is not None]
    for place, kind in enumerate(present):
        value = float(section[name + kind])
        axis.bar(place, value, 0.7, color=ANALYSIS_BARS[kind][1])
        error = section.get(f"{name}_gain_over{kind}_se", section.get(f"{name}{kind}_se"))
        interval = section.get(f"{name}{kind}_ci95")
        if interval is None and error is not None and np.isfinite(error):  # infinite for a single patient
            interval = (value - 2 * error, value + 2 * error)
        if interval is not None:
            axis.plot([place, place], interval, color=BLACK, linewidth=1.2, marker="_", markersize=6)
        top: Any = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
        axis.annotate(f"{value:.3f}", (place, max(value, *(interval or (value,)))), (0, 3), **top)
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
def text_errors(section: Mapping[str, Any]) -> RecordFigure:
    """Draw the true against the generated contrast, and the counts of found, missed and invented findings.

    `section` is metrics.json's "analysis".
    """
    figure = RecordFigure(WIDTH, 3.2)
    confusion, findings = figure.subplots(1, 2)
    _confusion_panel(confusion, section["contrast_confusion"])
    _finding_panel(findings, section)
    return figure


def _confusion_panel(axis: Axes, counts: Mapping[str, Mapping[str, int]]) -> None:
    axis.set_title("contrast: texts by true and generated contrast")
    axis.grid(False)
    if not counts:
        axis.text(0.5, 0.5, "no test sample has a listed contrast", transform=axis.transAxes, ha="center")
        axis.set_axis_off()
        return
    order = [*CONTRASTS.values(), "none"]
    generated = sorted({name for row in counts.values() for name in row} | set(counts), key=order.index)
    true = sorted(counts, key=order.index)
    table = np.array([[counts[row].get(column, 0) for column in generated] for row in true], float)
    shares = table / table.sum(1, keepdims=True)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1.6, aspect="auto")
    for (row, column), count in np.ndenumerate(table):
        axis.text(column, row, f"{int(count)}", ha="center", va="center")
    axis.set_xticks(range(len(generated)), [textwrap.fill(name, 10) for name in generated])
    axis.set_yticks(range(len(true)), true)
    axis.set(xlabel="generated", ylabel="true")


def _finding_panel(axis: Axes, section: Mapping[str, Any]) -> None:
    axis.set_title("findings: exact label, side and region")
    if not section["reviewed_samples"]:
        axis.text(0.5, 0.5, "no test sample was reviewed for findings", transform=axis.transAxes, ha="center")
        axis.set_axis_off()
        return
    true, clean = section["findings_true"], section["clean_slices"]
    bars = (
        (f"found, of {true}", section["findings_found"], BLUE),
        (f"missed, of {true}", section["findings_missed"], VERMILLION),
        ("invented", section["findings_invented"], ORANGE),
        (f"slices without findings\nthat got one, of {clean}", section["clean_slices_with_invented"], PURPLE),
    )
    for place, (_, count, color) in enumerate(bars):
        axis.barh(place, count, 0.65, color=color)
        axis.annotate(str(count), (count, place), (4, 0), textcoords="offset points", va="center")
    axis.set_yticks(range(len(bars)), [label for label, _, _ in bars])
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.margins(x=0.12)
    axis.set_xlabel("count over all texts")


@styled
def described_slices(slices: Sequence[DescribedSlice], columns: int = 3) -> RecordFigure:
    """Draw reconstructions with boxes of the true findings; under each generated text, true text, errors."""
    rows = -(-len(slices) // columns)
    figure = RecordFigure(WIDTH, rows * 4.3)
    axes = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[2.6, 1.7] * rows)
    for axis in axes.flat:
        axis.set_axis_off()
    for number, one in enumerate(slices):
        row, column = divmod(number, columns)
        image = display_image(one.image)
        draw_image(axes[2 * row, column], image, 0, display_window(image), one.title)
        for box in one.boxes or ():
            axes[2 * row, column].add_patch(outline(box, image.shape[0], SKY))
        verdict, color = ("; ".join(one.errors), VERMILLION) if one.errors else ("no error", GREEN)
        if one.boxes is None:
            verdict += "; findings unknown"
        paragraphs = [
            (f"Generated: {one.generated}", BLACK, False),
            (f"True: {one.true}", "#555555", False),
            (f"Errors: {verdict}" if one.errors else verdict.capitalize(), color, True),
        ]
        _text_block(axes[2 * row + 1, column], paragraphs)
    figure.description = " ".join(
        f"{one.title}. Generated: {one.generated} True: {one.true} {'; '.join(one.errors)}" for one in slices
    )
    return figure


@styled
def training_texts(examples: Mapping[int, pd.DataFrame], images: Sequence[NDArray], columns: int = 3) -> RecordFigure:
    """Draw slices with their true text, and the texts generated after the first and after the last shown epoch.

    Parameters
    ----------
    examples : mapping
        Epoch → `inference.example_texts`.
    images : sequence of array, shape (h, w)
        The slices, not flipped.
    """
    first, last = min(examples), max(examples)
    rows = -(-len(images) // columns)
    figure = RecordFigure(WIDTH, rows * 4.3)
    axes = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[2.6, 1.7] * rows)
    for axis in axes.flat:
        axis.set_axis_off()
    descriptions = []
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        draw_image(axes[2 * row, column], display_image(image), 0, display_window(image))
        facts = examples[last].iloc[number]
        paragraphs = [(f"True: {facts['true']}", "#555555", False)]
        for epoch in dict.fromkeys((first, last)):
            text = examples[epoch]["generated"].iloc[number]
            color = GREEN if text == facts["true"] else VERMILLION
            paragraphs.append((f"Epoch {epoch}: {text}", color, epoch == last))
        _text_block(axes[2 * row + 1, column], paragraphs)
        descriptions.append(" ".join(text for text, *_ in paragraphs))
    figure.description = " ".join(descriptions)
    return figure


def _text_block(axis: Axes, paragraphs: Sequence[tuple[str, str, bool]]) -> None:
    """Write paragraphs below each other: text, colour, and whether it is bold."""
    place = 1.0
    for text, color, is_bold in paragraphs:
        lines = textwrap.wrap(text, 40 if is_bold else 46)
        weight = "bold" if is_bold else "normal"
        style: Any = {"va": "top", "fontsize": 8.5, "color": color, "fontweight": weight}
        axis.text(0.0, place, "\n".join(lines), transform=axis.transAxes, **style)
        place -= 0.1 * len(lines) + 0.04
