"""Figures of images and data; each function returns a Figure and shows nothing.

Anatomy is grey with anterior up (`display_image`). Errors have their own colour map and colour bar. Images to be
compared share one grey window.
"""

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from fastmri import evaluate as official
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mrilib.data.annotations import Annotations, Box
from mrilib.data.dataset import Slice, Volume
from mrilib.display.style import (
    BLACK,
    BLUE,
    COLORS,
    ERROR_MAP,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    WIDTH,
    RecordFigure,
    styled,
)
from mrilib.evaluation.pictures import scale_bar
from mrilib.evaluation.reconstructions import Comparison
from mrilib.metrics.methods import method_label
from mrilib.physics import coils as coils_module
from mrilib.physics import fourier, masks
from mrilib.physics.masks import MASK_CLASSES

TICK_WIDTH = WIDTH * 72 * 0.6  # of a panel that fills the figure but for its labels [points]
ERROR_SCALE = 5  # errors are shown this much brighter than anatomy
ERROR_LABEL = f"|zero-filled − target| ×{ERROR_SCALE}"
NO_TARGET = "no target in this file"
COIL_MAPS = "coil maps from the centre lines, 0 to 1"

# ------------------------------------------------------------------------------------------------- images


def _as_array(image: ArrayLike | Tensor) -> NDArray:
    return image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)


def display_image(image: ArrayLike | Tensor) -> NDArray:
    """Flip the rows of an h5 array (..., h, w), so that anterior is up."""
    return _as_array(image)[..., ::-1, :]


def display_box(box: Box, rows: int) -> tuple[float, float, float, float]:
    """Return a box as (x, y, width, height) [pixels] on the displayed image of `rows` rows; y grows downwards."""
    return box.x, rows - box.y - box.height, box.width, box.height


def display_window(target: ArrayLike | Tensor) -> float:
    """Return the upper end of the grey window from 0: the 99.8th percentile, robust to a few bright pixels."""
    return float(np.percentile(_as_array(target), 99.8)) or 1.0


def montage(images: NDArray, columns: int) -> NDArray:
    """Tile images row by row and fill up with zeros; (n, h, w) → (rows·h, columns·w)."""
    count, height, width = images.shape
    rows = -(-count // columns)
    padded = np.zeros((rows * columns, height, width), images.dtype)
    padded[:count] = images
    return padded.reshape(rows, columns, height, width).swapaxes(1, 2).reshape(rows * height, columns * width)


class SliceParts(NamedTuple):
    """Displayed images of one undersampled slice: anterior up, on the evaluated crop."""

    mask: NDArray  # bool (phase,)
    zero_filled: NDArray  # float32 (h, w) [file units]
    target: NDArray | None  # float32 (h, w) [file units]
    coil_images: NDArray  # float32 (coil, h, w): magnitude, each relative to its own grey window [1]
    maps: NDArray  # float32 (coil, h, w): magnitude of the sensitivities from the centre lines, 0 to 1

    @property
    def window(self) -> float:
        """Upper end of the grey window that zero-filled image and target share."""
        return display_window(self.zero_filled if self.target is None else self.target)

    @property
    def error(self) -> NDArray:
        """Magnitude of the zero-filled image's error, (h, w) [file units]; needs the target."""
        assert self.target is not None
        return np.abs(self.zero_filled - self.target)


def slice_parts(sample: Slice) -> SliceParts:
    """Compute the images of an overview from a slice."""
    with torch.inference_mode():
        coil_images = fourier.center_crop_or_pad(fourier.ifft2c(sample.kspace), sample.image_shape)
        maps = coils_module.center_coil_maps(sample.kspace[None], sample.mask[None])[0]
        coil_magnitude = display_image(coil_images.abs())
        return SliceParts(
            mask=sample.mask.numpy(),
            zero_filled=display_image(fourier.rss(coil_images) * sample.scale),
            target=None if sample.target is None else display_image(sample.target),
            coil_images=np.stack([image / display_window(image) for image in coil_magnitude]),
            maps=display_image(fourier.center_crop_or_pad(maps, sample.image_shape).abs()),
        )


def log_kspace(sample: Slice, coil: int) -> NDArray:
    """Compute log10 of a coil's k-space magnitude over its largest, from −4 to 0; float32 (readout, phase)."""
    magnitude = sample.kspace[coil].abs()
    largest = max(float(magnitude.max()), torch.finfo(torch.float32).tiny)
    return (magnitude / largest).clamp_min(1e-4).log10().numpy()


def montage_columns(count: int) -> int:
    """Return the number of columns that makes a montage about square."""
    return max(1, int(np.ceil(np.sqrt(count))))


def sampled(mask: ArrayLike) -> str:
    """Describe the sampled fraction: "43 of 128 lines, 33.6%"."""
    lines = np.asarray(mask, bool)
    return f"{int(lines.sum())} of {lines.size} lines, {lines.mean():.1%}"


def slice_scores(target: ArrayLike | Tensor, image: ArrayLike | Tensor, maximum: float) -> dict[str, float]:
    """Compute fastMRI's SSIM and PSNR [dB] of a slice (h, w); data range: the volume's `maximum` [file units]."""
    first, second = display_image(target)[None], display_image(image)[None]
    return {
        "ssim": float(official.ssim(first, second, maxval=maximum)[0]),
        "psnr": float(official.psnr(first, second, maxval=maximum)),
    }


def score_text(scores: Mapping[str, float]) -> str:
    """Format scores for a title: "SSIM 0.872, 30.1 dB"."""
    formats = {"ssim": "SSIM {:.3f}", "psnr": "{:.1f} dB", "nmse": "NMSE {:.3f}", "retention": "contrast kept: {:.0%}"}
    parts = [form.format(scores[name]) for name, form in formats.items() if name in scores]
    return ", ".join(parts).replace("-", "−")


def draw_image(axis: Axes, image: NDArray, low: float, high: float, title: str = "", cmap: str = "gray") -> None:
    """Draw a displayed image (h, w) in the window from `low` to `high`."""
    axis.imshow(image, cmap=cmap, vmin=low, vmax=high)
    axis.set_axis_off()
    axis.set_title(title)


def error_bar(figure: RecordFigure, label: str, **place: Any) -> None:
    """Draw the colour bar of the error map in per cent of the grey window."""
    colors = ScalarMappable(Normalize(0, 100 / ERROR_SCALE), ERROR_MAP)
    bar = figure.colorbar(colors, ticks=np.linspace(0, 100 / ERROR_SCALE, 5), **place)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)


def draw_scale_bar(axis: Axes, shape: tuple[int, ...], pixel: tuple[float, float] | None) -> None:
    """Draw a scale bar into the lower left corner of an image (h, w)."""
    if (bar := scale_bar(shape, pixel)) is None:
        return
    left, row = 0.04 * shape[1], 0.96 * shape[0]
    line_rim, text_rim = ([withStroke(linewidth=width, foreground="black")] for width in (4, 2.5))  # on bright tissue
    line: Any = {"color": "white", "linewidth": 2, "solid_capstyle": "butt", "path_effects": line_rim}
    axis.plot([left, left + bar[1]], [row, row], **line)
    text: Any = {"color": "white", "fontsize": 7.5, "va": "bottom", "path_effects": text_rim}
    axis.text(left, row - 0.02 * shape[0], f"{bar[0]} mm", **text)


def outline(box: Box, rows: int, color: str) -> Rectangle:
    """Return the outline of a box on the displayed image of `rows` rows."""
    x, y, width, height = display_box(box, rows)
    return Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=color, linewidth=1.3)


def _boxes(axis: Axes, boxes: Sequence[Box], rows: int) -> None:
    """Draw boxes with one colour per label, and a legend with their numbers."""
    counts = Counter(box.label for box in boxes)
    colors = dict(zip(counts, (SKY, ORANGE, PURPLE, GREEN, VERMILLION) * 5, strict=False))
    for box in boxes:
        axis.add_patch(outline(box, rows, colors[box.label]))
    handles = [Rectangle((0, 0), 1, 1, fill=False, edgecolor=color, linewidth=1.3) for color in colors.values()]
    if handles:
        labels = [label + (f" ×{counts[label]}" if counts[label] > 1 else "") for label in colors]
        axis.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), handlelength=1.0, borderpad=0.2)


@styled
def slice_overview(sample: Slice, boxes: Sequence[Box] = (), coil: int = 0) -> RecordFigure:
    """Draw k-space of a coil with the mask, zero-filled image, target, coil images, coil maps and error of one slice.

    `boxes` are findings in array coordinates, drawn on the target.
    """
    parts = slice_parts(sample)
    columns = montage_columns(len(parts.maps))
    figure = RecordFigure(WIDTH, 6.9)
    figure.suptitle(f"{sample.file}, slice {sample.slice_num}, {sample.acceleration}x", fontsize=10)
    axes = figure.subplots(2, 3)
    _kspace_panel(axes[0, 0], sample, coil)
    if parts.target is None:
        draw_image(axes[0, 1], parts.zero_filled, 0, parts.window, "zero-filled")
        axes[0, 2].set_axis_off()
        axes[0, 2].set_title(NO_TARGET)
        axes[1, 2].set_axis_off()
    else:
        scores = slice_scores(parts.target, parts.zero_filled, sample.maximum)
        draw_image(axes[0, 1], parts.zero_filled, 0, parts.window, f"zero-filled, {score_text(scores)}")
        draw_image(axes[0, 2], parts.target, 0, parts.window, "target (RSS, fully sampled)")
        draw_scale_bar(axes[0, 2], parts.target.shape, sample.pixel)
        _boxes(axes[0, 2], boxes, parts.target.shape[0])
        draw_image(axes[1, 2], parts.error, 0, parts.window / ERROR_SCALE, ERROR_LABEL, ERROR_MAP)
        place = axes[1, 2].inset_axes((0.0, -0.06, 1.0, 0.035))
        error_bar(figure, "error [% of the target's grey window]", cax=place, orientation="horizontal")
    draw_image(axes[1, 0], montage(parts.coil_images, columns), 0, 1, "coil images, each on its own scale")
    draw_image(axes[1, 1], montage(parts.maps, columns), 0, 1, COIL_MAPS)
    for axis in axes.flat:
        axis.set_anchor("N")
    return figure


def _kspace_panel(axis: Axes, sample: Slice, coil: int) -> None:
    """Draw a coil's log k-space with the mask as a strip above it."""
    axis.imshow(log_kspace(sample, coil), cmap="gray", vmin=-4, vmax=0, aspect="auto")
    axis.set_box_aspect(1)
    axis.set_axis_off()
    axis.set_title(f"measured k-space, coil {coil + 1} of {len(sample.kspace)}", pad=12)
    strip = axis.inset_axes((0.0, 1.01, 1.0, 0.03))
    strip.vlines(np.flatnonzero(sample.mask) + 0.5, 0, 1, BLACK, linewidth=0.25 * TICK_WIDTH / len(sample.mask))
    strip.set(xlim=(0, len(sample.mask)), ylim=(0, 1))
    strip.set_axis_off()
    note = f"log magnitude, four decades\nticks above: {sampled(sample.mask)}"
    axis.text(0.5, -0.03, note, transform=axis.transAxes, ha="center", va="top")


@styled
def reconstruction_comparison(
    rows: Comparison | Sequence[Comparison],
    title: str = "",
    errors_right: bool | None = None,
) -> RecordFigure:
    """Draw the target and reconstructions of some slices, with their errors.

    Parameters
    ----------
    rows : Comparison, or sequence of Comparison
        All with the same methods. A row's images share one grey window, 0 to the target's 99.8th percentile;
        the error map ends at 1/5 of it.
    title : str
    errors_right : bool, optional
        Errors to the right of the images (small, one row a slice) or below them. Default: whichever fits.

    Raises
    ------
    ValueError
        If slices have different methods, or an image differs in shape from its target.
    """
    slices = [rows] if isinstance(rows, Comparison) else list(rows)
    names = _common_methods(slices)
    if errors_right is None:
        errors_right = len(names) == 1 or (len(names) == 2 and len(slices) > 1)
    columns, rows_each = (1 + 2 * len(names), 1) if errors_right else (1 + len(names), 2)
    side = min(WIDTH / columns, 3.1)
    # Wrapped, so that long names do not overlap.
    labels = {name: textwrap.fill(method_label(name), max(12, round(13 * side))) for name in names}
    lines = max(label.count("\n") for label in labels.values())
    figure = RecordFigure(side * columns, len(slices) * rows_each * (side + 0.35 + 0.34 * lines) + 0.6)
    if title:
        figure.suptitle(title, fontsize=10)
    axes = figure.subplots(rows_each * len(slices), columns, squeeze=False)
    for number, row in enumerate(slices):
        first, *others = axes[rows_each * number]
        image_axes, error_axes = others[: len(names)], others[len(names) :]
        if errors_right:
            place: Any = {"rotation": 90, "ha": "right", "va": "center", "multialignment": "center"}
            first.text(-0.05, 0.5, row.title, transform=first.transAxes, **place)
        else:
            corner, *error_axes = axes[2 * number + 1]
            corner.set_axis_off()
            corner.text(0.0, 0.98, row.title, transform=corner.transAxes, va="top")
        _target_panel(first, row)
        for name, image_axis, error_axis in zip(names, image_axes, error_axes, strict=True):
            _method_panels(image_axis, error_axis, row, name, labels[name])
    label = "|error| [% of the grey window, 0 to the target's 99.8th percentile]"
    if not all(row.scores for row in slices):
        label += "; SSIM and PSNR of the slice, with its volume's maximum"
    place = {"ax": list(axes.flat), "location": "bottom", "shrink": 0.4, "aspect": 40, "pad": 0.02}
    error_bar(figure, label, **place)
    return figure


def _common_methods(slices: Sequence[Comparison]) -> list[str]:
    names = list(slices[0].images)
    for row in slices:
        if list(row.images) != names:
            raise ValueError(f"every slice needs the same methods: {names} and {list(row.images)}")
        for name, image in row.images.items():
            shape, target_shape = display_image(image).shape, display_image(row.target).shape
            if shape != target_shape:
                raise ValueError(f"{name} has shape {shape}, its target {target_shape}")
    return names


def _target_panel(axis: Axes, row: Comparison) -> None:
    target, window = display_image(row.target), display_window(row.target)
    draw_image(axis, target, 0, window, "target")
    for box in row.boxes:
        axis.add_patch(outline(box, target.shape[0], SKY))
    draw_scale_bar(axis, target.shape, row.pixel)


def _method_panels(image_axis: Axes, error_axis: Axes, row: Comparison, name: str, label: str) -> None:
    image, window = display_image(row.images[name]), display_window(row.target)
    scores = row.scores[name] if row.scores else slice_scores(row.target, row.images[name], row.maximum)
    draw_image(image_axis, image, 0, window, f"{label}\n{score_text(scores)}")
    error = np.abs(image - display_image(row.target))
    draw_image(error_axis, error, 0, window / ERROR_SCALE, f"{label}\n|error| ×{ERROR_SCALE}", ERROR_MAP)


def reconstruction_progress(examples: Mapping[int, Sequence[Comparison]]) -> RecordFigure:
    """Draw the model's reconstructions of the same slices after several epochs: epoch → `inference.preview`."""
    first = next(iter(examples.values()))
    rows = []
    for number, start in enumerate(first):
        images: dict[str, Any] = {"zero_filled": start.images["zero_filled"]}
        images |= {f"after epoch {epoch}": shown[number].images["model"] for epoch, shown in examples.items()}
        rows.append(start._replace(images=images))
    return reconstruction_comparison(rows, errors_right=False)


# ------------------------------------------------------------------------------------------------- data


@styled
def mask_gallery(
    width: int,
    configurations: Sequence[tuple[float, int]],
    seed: int | tuple[int, ...] = 0,
    padding: tuple[int, int] | None = None,
) -> RecordFigure:
    """Draw fastMRI's masks of one width, each with its sampled fraction.

    Parameters
    ----------
    width : int
        Number of phase-encoding lines.
    configurations : sequence of (center_fraction, acceleration)
    seed : int or tuple of int
    padding : (left, right), optional
        Lines outside [left, right) were never acquired.
    """
    figure = RecordFigure(WIDTH, 0.5 + 0.42 * len(MASK_CLASSES) * len(configurations))
    axes = figure.subplots(len(configurations), 1, squeeze=False)[:, 0]
    for axis, (fraction, acceleration) in zip(axes, configurations, strict=True):
        for row, name in enumerate(MASK_CLASSES):
            function = masks.make_mask_func(name, [fraction], [acceleration])
            mask, _ = masks.sample_mask(function, width, seed, padding or (0, width))
            low = round(width * fraction)  # fastMRI's own centre, which may be one line off the middle
            start = (width - low + 1) // 2
            lines = np.flatnonzero(mask.numpy())
            colors = [BLUE if start <= line < start + low else BLACK for line in lines]
            axis.vlines(lines + 0.5, row - 0.36, row + 0.36, colors, linewidth=0.7 * TICK_WIDTH / width)
            axis.text(width * 1.012, row, f"{mask.float().mean():.1%} = 1/{1 / mask.float().mean():.2f}", va="center")
        axis.set(xlim=(0, width), ylim=(len(MASK_CLASSES) - 0.5, -0.5), yticks=range(len(MASK_CLASSES)))
        axis.set_yticklabels([name.replace("_", " ") for name in MASK_CLASSES])
        axis.grid(False)
        axis.set_title(
            f"{acceleration}x nominal, centre fraction {fraction:g}; right: sampled fraction of the lines", loc="left"
        )
    axes[-1].set_xlabel("phase-encoding line (black: sampled, blue: the fully sampled centre)")
    return figure


def retained_energy(data: Tensor) -> NDArray:
    """Compute the share of the energy in the strongest 1, 2, … virtual coils of `coils.compress_coils`.

    Parameters
    ----------
    data : Tensor, complex64, shape (coil, readout, phase)
        Masked k-space of one slice, before compression.

    Returns
    -------
    array, float64, shape (coil,)
        Cumulative sum of the coil covariance's eigenvalues, largest first, over their total.
    """
    samples = data.reshape(data.shape[0], -1).to(torch.complex128)
    values = torch.linalg.eigvalsh(samples @ samples.mH).flip(-1).clamp_min(0)
    return (values.cumsum(-1) / values.sum()).numpy()


@styled
def coil_compression_curve(curves: Mapping[str, ArrayLike], num_coils: int) -> RecordFigure:
    """Draw the energy lost over the number of virtual coils: name of a slice → its `retained_energy`."""
    figure = RecordFigure(WIDTH, 3.0)
    axis = figure.subplots()
    markers = "osD^vP"
    lowest = 1.0
    for number, (name, curve) in enumerate(curves.items()):
        lost = 1 - np.asarray(curve)[:-1]  # without the last: all coils lose nothing, and log 0 cannot be drawn
        axis.plot(np.arange(1, len(lost) + 1), lost, marker=markers[number % len(markers)], markersize=4, label=name)
        lowest = min(lowest, float(lost.min(initial=1.0)))
    axis.axvline(num_coils, color=BLACK, linestyle=":", linewidth=1.2, label=f"num_coils = {num_coils}")
    axis.set_title("energy lost by compression to fewer virtual coils")
    axis.set(yscale="log", xlabel="virtual coils", ylabel="energy lost [share]", ylim=(max(lowest / 2, 1e-7), 1))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


@styled
def dataset_summary(split: Mapping[str, Sequence[Volume]], annotations: Annotations | None = None) -> RecordFigure:
    """Draw numbers of volumes by part, coils and width, and of slices by finding; contrasts in colours.

    `split` maps "train", "val" and "test" to volumes, as `splits.split_volumes` does.
    """
    volumes = [volume for part in split.values() for volume in part]
    colors = dict(zip(sorted({volume.acquisition for volume in volumes}), COLORS * 3, strict=False))
    figure = RecordFigure(WIDTH, 5.6)
    rows = figure.subfigures(2, 1, squeeze=False)[:, 0]  # laid out apart: long labels must not narrow the upper bars
    (by_part, coils), (widths, labels) = (row.subplots(1, 2) for row in rows)

    part_of = {volume.path: name for name, part in split.items() for volume in part}
    _stacked_bars(by_part, split, volumes, lambda volume: part_of[volume.path], colors)
    by_part.legend()
    for place, part in enumerate(split.values()):
        patients = len({volume.patient for volume in part})
        by_part.text(place, len(part), f"{len(part)} / {patients}", ha="center", va="bottom", fontsize=8)
    by_part.margins(y=0.1)
    by_part.set_title("split by patient: volumes / patients")

    _stacked_bars(coils, sorted({volume.coils for volume in volumes}), volumes, lambda volume: volume.coils, colors)
    coils.set_title("receiver coils")

    lines = sorted({volume.matrix[1] for volume in volumes})
    _stacked_bars(widths, lines, volumes, lambda volume: volume.matrix[1], colors)
    heights = ", ".join(str(height) for height in sorted({volume.matrix[0] for volume in volumes}))
    widths.set_title(f"phase-encoding lines W; readout H {heights}")
    _finding_bars(labels, volumes, annotations, colors)
    return figure


def _stacked_bars(
    axis: Axes,
    places: Iterable[Any],
    volumes: Sequence[Volume],
    place_of: Callable[[Volume], Any],
    colors: Mapping[str, str],
) -> None:
    """Draw the number of volumes at each place, contrasts stacked."""
    places = list(places)
    bottom = np.zeros(len(places))
    for contrast, color in colors.items():
        counts = Counter(place_of(volume) for volume in volumes if volume.acquisition == contrast)
        heights = np.array([counts[place] for place in places], dtype=float)
        axis.bar([str(place) for place in places], heights, bottom=bottom, color=color, width=0.75, label=contrast)
        bottom += heights
    axis.grid(False, axis="x")
    axis.set_ylabel("volumes")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))


def _finding_bars(
    axis: Axes, volumes: Sequence[Volume], annotations: Annotations | None, colors: Mapping[str, str]
) -> None:
    """Draw the number of slices with each of the nine commonest findings, contrasts stacked."""
    axis.set_title("slices with a finding, by label and contrast")
    if annotations is None:
        axis.set_axis_off()
        axis.text(0.5, 0.5, "no annotations: findings unknown", ha="center", transform=axis.transAxes)
        return
    counts: Counter[tuple[str, str]] = Counter()
    totals: Counter[str] = Counter()
    for volume in volumes:
        for number in range(volume.slices):
            boxes = annotations.boxes(volume.file, number, volume.image_shape[0])
            labels = {box.label for box in boxes}
            counts.update((label, volume.acquisition) for label in labels)
    for (label, _), count in counts.items():
        totals[label] += count
    common = [label for label, _ in totals.most_common(9)][::-1]
    left = np.zeros(len(common))
    for contrast, color in colors.items():
        widths = np.array([counts[label, contrast] for label in common], dtype=float)
        axis.barh(common, widths, left=left, color=color, height=0.7)
        left += widths
    axis.set_xlabel("slices")
    axis.grid(False, axis="y")
