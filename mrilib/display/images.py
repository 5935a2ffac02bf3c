"""Figures of images and data. Each function returns a Figure; nothing is shown, nothing stays in pyplot's memory.

Anatomy is grey and displayed as `display_image` turns it (anterior up); errors are in one perceptual map with their
scale beside them; images that are to be compared share one window; methods keep their colours (Okabe and Ito's, which
the colour-blind can tell apart). Curves and scores are drawn in `charts`.
"""

import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from fastmri import evaluate as official
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mrilib.config import MASK_TYPES
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
from mrilib.evaluation.reconstructions import Comparison
from mrilib.metrics.methods import method_label
from mrilib.physics import coils as coils_module
from mrilib.physics import fourier, masks

ERROR_SCALE = 5  # errors are shown so many times brighter than anatomy


# ------------------------------------------------------------------------------------------------- images


def display_image(image: ArrayLike | Tensor) -> NDArray:
    """An array of the h5 as it is displayed, with its rows in reverse: anterior up; (..., h, w) → (..., h, w)."""
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    return array[..., ::-1, :]


def display_box(box: Box, rows: int) -> tuple[float, float, float, float]:
    """(x, y, width, height) [pixels] of a box on the displayed image of so many rows; y grows downwards."""
    return box.x, rows - box.y - box.height, box.width, box.height


def display_window(target: ArrayLike | Tensor) -> float:
    """Upper end of the grey window from 0: the 99.8th percentile, which a few bright pixels do not move."""
    array = target.detach().cpu().numpy() if isinstance(target, Tensor) else np.asarray(target)
    return float(np.percentile(array, 99.8)) or 1.0


def montage(images: NDArray, columns: int) -> NDArray:
    """Images side by side, row by row, zeros where there is none; (n, h, w) → (rows·h, columns·w)."""
    count, height, width = images.shape
    rows = -(-count // columns)
    padded = np.zeros((rows * columns, height, width), images.dtype)
    padded[:count] = images
    return padded.reshape(rows, columns, height, width).swapaxes(1, 2).reshape(rows * height, columns * width)


class SliceParts(NamedTuple):
    """What there is to see of one undersampled slice; images are displayed ones (anterior up) on the evaluated crop."""

    mask: NDArray  # bool (phase,)
    zero_filled: NDArray  # float32 (h, w) [file units]
    target: NDArray | None  # float32 (h, w) [file units]
    coil_images: NDArray  # float32 (coil, h, w): magnitude [1]
    coil_window: float  # upper end of their grey window
    maps: NDArray  # float32 (coil, h, w): magnitude of the sensitivities from the centre lines, 0 to 1


def slice_parts(one: Slice) -> SliceParts:
    """Compute the parts of an overview from a slice."""
    with torch.inference_mode():
        coil_images = fourier.center_crop_or_pad(fourier.ifft2c(one.kspace), one.image_shape)
        maps = coils_module.center_coil_maps(one.kspace[None], one.mask[None])[0]
        coil_magnitude = display_image(coil_images.abs())
        return SliceParts(
            mask=one.mask.numpy(),
            zero_filled=display_image(fourier.rss(coil_images) * one.scale),
            target=None if one.target is None else display_image(one.target),
            coil_images=coil_magnitude,
            coil_window=display_window(coil_magnitude[:, ::2, ::2]),
            maps=display_image(fourier.center_crop_or_pad(maps, one.image_shape).abs()),
        )


def log_kspace(one: Slice, coil: int) -> NDArray:
    """Log10 of a coil's k-space magnitude over its largest, from −4 to 0; float32 (readout, phase)."""
    magnitude = one.kspace[coil].abs()
    largest = max(float(magnitude.max()), torch.finfo(torch.float32).tiny)
    return (magnitude / largest).clamp_min(1e-4).log10().numpy()


def montage_columns(count: int) -> int:
    """Columns of a montage that is about as wide as high."""
    return max(1, int(np.ceil(np.sqrt(count))))


def sampled(mask: ArrayLike) -> str:
    """Sampled fraction as the figures tell it: "43 of 128 lines, 33.6%"."""
    lines = np.asarray(mask, bool)
    return f"{int(lines.sum())} of {lines.size} lines, {lines.mean():.1%}"


def slice_scores(target: ArrayLike | Tensor, image: ArrayLike | Tensor, maximum: float) -> dict[str, float]:
    """fastMRI's SSIM and PSNR [dB] of one slice (h, w), with the volume's `maximum` [file units] as data range."""
    one, other = display_image(target)[None], display_image(image)[None]
    return {
        "ssim": float(official.ssim(one, other, maxval=maximum)[0]),
        "psnr": float(official.psnr(one, other, maxval=maximum)),
    }


def _image(axis: Axes, image: NDArray, low: float, high: float, title: str = "", cmap: str = "gray") -> None:
    axis.imshow(image, cmap=cmap, vmin=low, vmax=high)
    axis.set_axis_off()
    axis.set_title(title)


def _error_colors(error_scale: float) -> ScalarMappable:
    """The error map in per cent of the grey window."""
    return ScalarMappable(Normalize(0, 100 / error_scale), ERROR_MAP)


def scale_bar(shape: tuple[int, ...], pixel: tuple[float, float] | None) -> tuple[int, float] | None:
    """Length of an image's scale bar, [mm] and [pixels]: 50, 20 or 10 mm, whichever is at most a third of its width."""
    if pixel is None:
        return None
    return next(((mm, mm / pixel[1]) for mm in (50, 20, 10) if mm / pixel[1] <= shape[1] / 3), None)


def _scale_bar(axis: Axes, shape: tuple[int, ...], pixel: tuple[float, float] | None) -> None:
    if (bar := scale_bar(shape, pixel)) is None:
        return
    left, row = 0.04 * shape[1], 0.96 * shape[0]
    outline = [withStroke(linewidth=2.5, foreground="black")]  # it may lie on bright tissue
    rim = [withStroke(linewidth=4, foreground="black")]
    axis.plot([left, left + bar[1]], [row, row], color="white", linewidth=2, solid_capstyle="butt", path_effects=rim)
    axis.text(
        left, row - 0.02 * shape[0], f"{bar[0]} mm", color="white", fontsize=7.5, va="bottom", path_effects=outline
    )


def _outline(box: Box, rows: int, color: str) -> Rectangle:
    x, y, width, height = display_box(box, rows)
    return Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=color, linewidth=1.3)


def _boxes(axis: Axes, boxes: Sequence[Box], rows: int) -> None:
    found = dict.fromkeys(box.label for box in boxes)
    colors = dict(zip(found, (SKY, ORANGE, PURPLE, GREEN, VERMILLION) * 5, strict=False))
    counts = Counter(box.label for box in boxes)
    for box in boxes:
        axis.add_patch(_outline(box, rows, colors[box.label]))
    handles = [Rectangle((0, 0), 1, 1, fill=False, edgecolor=color, linewidth=1.3) for color in colors.values()]
    if handles:
        labels = [label + (f" ×{counts[label]}" if counts[label] > 1 else "") for label in colors]
        axis.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), handlelength=1.0, borderpad=0.2)


@styled
def slice_overview(one: Slice, boxes: Sequence[Box] = (), coil: int = 0, title: str = "") -> Figure:
    """One slice under the microscope.

    Parameters
    ----------
    one : Slice
    boxes : sequence of Box
        Findings in array coordinates, drawn on the target.
    coil : int
        Coil of the k-space panel.
    title : str
        Above everything; empty: file, slice and acceleration.

    Returns
    -------
    Figure
        Measured k-space of one coil with its mask, zero-filled, target; all coils, their maps, and the error.
    """
    parts = slice_parts(one)
    coils, columns = len(parts.maps), montage_columns(len(parts.maps))
    figure = RecordFigure(WIDTH, 6.9)
    figure.suptitle(title or f"{one.file}, slice {one.slice_num}, {one.acceleration}x", fontsize=10)
    axes = figure.subplots(2, 3)
    window = display_window(parts.zero_filled if parts.target is None else parts.target)
    axes[0, 0].imshow(log_kspace(one, coil), cmap="gray", vmin=-4, vmax=0, aspect="auto")
    axes[0, 0].set_box_aspect(1)
    axes[0, 0].set_axis_off()
    axes[0, 0].set_title(f"measured k-space, coil {coil + 1} of {coils}", pad=12)
    strip = axes[0, 0].inset_axes((0.0, 1.01, 1.0, 0.03))
    strip.imshow(parts.mask[None], cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    strip.set_axis_off()
    note = f"log magnitude, four decades\nmask above: {sampled(parts.mask)}"
    axes[0, 0].text(0.5, -0.03, note, transform=axes[0, 0].transAxes, ha="center", va="top")
    if parts.target is None:
        _image(axes[0, 1], parts.zero_filled, 0, window, "zero-filled")
        axes[0, 2].set_axis_off()
        axes[0, 2].set_title("no target in this file")
        axes[1, 2].set_axis_off()
    else:
        scores = slice_scores(parts.target, parts.zero_filled, one.maximum)
        _image(axes[0, 1], parts.zero_filled, 0, window, f"zero-filled, {_told(scores)}")
        _image(axes[0, 2], parts.target, 0, window, "target (RSS, fully sampled)")
        _scale_bar(axes[0, 2], parts.target.shape, one.pixel)
        _boxes(axes[0, 2], boxes, parts.target.shape[0])
        error = np.abs(parts.zero_filled - parts.target)
        _image(axes[1, 2], error, 0, window / ERROR_SCALE, f"|zero-filled − target| ×{ERROR_SCALE}", ERROR_MAP)
        bar = figure.colorbar(_error_colors(ERROR_SCALE), cax=axes[1, 2].inset_axes((0.0, -0.06, 1.0, 0.035)),
                              orientation="horizontal")  # fmt: skip
        bar.set_label("error [% of the target's grey window]", fontsize=8)
        bar.ax.tick_params(labelsize=8)
    _image(axes[1, 0], montage(parts.coil_images, columns), 0, parts.coil_window, "coil images")
    _image(axes[1, 1], montage(parts.maps, columns), 0, 1, "coil maps from the centre lines, 0 to 1")
    for axis in axes.flat:
        axis.set_anchor("N")
    return figure


@styled
def reconstruction_comparison(
    rows: Comparison | Sequence[Comparison],
    error_scale: float = ERROR_SCALE,
    zoom: tuple[float, float, float] | None = None,
    title: str = "",
    beside: bool | None = None,
) -> Figure:
    """Target and reconstructions of some slices, errors below them.

    Parameters
    ----------
    rows : Comparison, or sequence of Comparison
        All with the same methods. A row's images share one grey window, 0 to the target's 99.8th percentile.
    error_scale : float
        The error map is black at 0 and brightest at the window's end over `error_scale`.
    zoom : (row, column, side), optional
        Centre and side of a square of the displayed image, as fractions of its size, shown enlarged in each corner.
    title : str
    beside : bool, optional
        Errors beside the images (small ones, a row a slice) or below them; by default whichever suits the numbers.

    Raises
    ------
    ValueError
        If slices have different methods, or an image is not of its target's size.
    """
    slices = [rows] if isinstance(rows, Comparison) else list(rows)
    names = list(slices[0].images)
    for one in slices:
        if list(one.images) != names:
            raise ValueError(f"every slice needs the same methods: {names} and {list(one.images)}")
        for name, image in one.images.items():
            shape, wanted = display_image(image).shape, display_image(one.target).shape
            if shape != wanted:
                raise ValueError(f"{name} is {shape}, its target {wanted}")
    if beside is None:
        beside = len(names) == 1 or (len(names) == 2 and len(slices) > 1)
    columns = 1 + len(names) * (2 if beside else 1)
    side = min(WIDTH / columns, 3.1)
    rows_each = 1 if beside else 2
    # long names side by side run into each other: as many letters a line as an image is wide
    labels = {name: textwrap.fill(method_label(name), max(12, round(13 * side))) for name in names}
    lines = max(label.count("\n") for label in labels.values())
    figure = RecordFigure(side * columns, len(slices) * rows_each * (side + 0.35 + 0.34 * lines) + 0.6)
    if title:
        figure.suptitle(title, fontsize=10)
    axes = figure.subplots(rows_each * len(slices), columns, squeeze=False)
    for number, one in enumerate(slices):
        target, window = display_image(one.target), display_window(one.target)
        first, *above = axes[rows_each * number]
        _image(first, target, 0, window, "target")
        for box in one.boxes:
            first.add_patch(_outline(box, target.shape[0], SKY))
        _scale_bar(first, target.shape, one.pixel)
        _inset(first, target, window, zoom)
        below = above[len(names) :] if beside else axes[rows_each * number + 1][1:]
        for name, image_axis, error_axis in zip(names, above, below, strict=False):
            image = display_image(one.images[name])
            scores = one.scores[name] if one.scores else slice_scores(one.target, one.images[name], one.maximum)
            _image(image_axis, image, 0, window, f"{labels[name]}\n{_told(scores)}")
            _inset(image_axis, image, window, zoom)
            label = f"{labels[name]}\n|error| ×{error_scale:g}"
            _image(error_axis, np.abs(image - target), 0, window / error_scale, label, ERROR_MAP)
        if beside and one.title:
            place: Any = {"transform": first.transAxes, "rotation": 90, "multialignment": "center"}
            first.text(-0.05, 0.5, one.title, ha="right", va="center", **place)
        elif not beside:
            axes[2 * number + 1][0].set_axis_off()
            axes[2 * number + 1][0].text(0.0, 0.98, one.title, transform=axes[2 * number + 1][0].transAxes, va="top")
    place = {"location": "bottom", "shrink": 0.4, "aspect": 40, "pad": 0.02}
    bar = figure.colorbar(_error_colors(error_scale), ax=list(axes.flat), **place)
    whose = "" if all(one.scores for one in slices) else "; SSIM and PSNR of the slice, with its volume's maximum"
    bar.set_label("|error| [% of the grey window, 0 to the target's 99.8th percentile]" + whose, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def reconstruction_progress(examples: Mapping[int, Sequence[Comparison]]) -> Figure:
    """What the model drew of the same slices after some of the epochs.

    Parameters
    ----------
    examples : mapping of int → sequence of Comparison
        Epoch → `inference.preview`.
    """
    first, *others = examples.values()
    rows = []
    for number, start in enumerate(first):
        images: dict[str, Any] = {"zero_filled": start.images["zero_filled"]}
        for epoch, shown in zip(examples, (first, *others), strict=True):
            images[f"after epoch {epoch}"] = shown[number].images["model"]
        rows.append(start._replace(images=images))
    return reconstruction_comparison(rows, beside=False)


def _inset(axis: Axes, image: NDArray, window: float, zoom: tuple[float, float, float] | None) -> None:
    if zoom is None:
        return
    (rows, columns), half = image.shape, zoom[2] / 2
    top, bottom = (int(np.clip((zoom[0] + sign * half) * rows, 0, rows)) for sign in (-1, 1))
    left, right = (int(np.clip((zoom[1] + sign * half) * columns, 0, columns)) for sign in (-1, 1))
    place = (left - 0.5, top - 0.5)
    axis.add_patch(Rectangle(place, right - left, bottom - top, fill=False, edgecolor=ORANGE, linewidth=1))
    corner = axis.inset_axes((0.6, 0.0, 0.4, 0.4))
    corner.imshow(image[top:bottom, left:right], cmap="gray", vmin=0, vmax=window)
    corner.set(xticks=[], yticks=[])
    for spine in corner.spines.values():
        spine.set(visible=True, edgecolor=ORANGE, linewidth=1)


def _told(scores: Mapping[str, float]) -> str:
    formats = {"ssim": "SSIM {:.3f}", "psnr": "{:.1f} dB", "nmse": "NMSE {:.3f}"}
    return ", ".join(text.format(scores[name]) for name, text in formats.items() if name in scores)


# ------------------------------------------------------------------------------------------------- data


@styled
def mask_gallery(
    width: int,
    configurations: Sequence[tuple[float, int]],
    mask_types: Sequence[str] = MASK_TYPES,
    seed: int | tuple[int, ...] = 0,
    padding: tuple[int, int] | None = None,
) -> Figure:
    """fastMRI's masks of one width, each with the fraction that it samples.

    Parameters
    ----------
    width : int
        Phase-encoding lines.
    configurations : sequence of (center_fraction, acceleration)
    mask_types : sequence of str
    seed : int or tuple of int
    padding : (left, right), optional
        Lines outside [left, right) were never acquired.
    """
    figure = RecordFigure(WIDTH, 0.5 + 0.42 * len(mask_types) * len(configurations))
    axes = figure.subplots(len(configurations), 1, squeeze=False)[:, 0]
    for axis, (fraction, acceleration) in zip(axes, configurations, strict=True):
        for row, name in enumerate(mask_types):
            function = masks.make_mask_func(name, [fraction], [acceleration])
            mask, _ = masks.sample_mask(function, width, seed, padding or (0, width))
            low = round(width * fraction)  # fastMRI's own centre, which may be off the middle by one line
            start = (width - low + 1) // 2
            stop = start + low
            color = np.where(mask.numpy(), 0, 255).astype(np.uint8)[None, :, None].repeat(3, axis=2)
            color[:, start:stop] = [int(BLUE[i : i + 2], 16) for i in (1, 3, 5)]
            axis.imshow(color, extent=(0, width, row + 0.36, row - 0.36), aspect="auto", interpolation="nearest")
            axis.text(width * 1.012, row, f"{mask.float().mean():.1%} = 1/{1 / mask.float().mean():.2f}", va="center")
        axis.set(xlim=(0, width), ylim=(len(mask_types) - 0.5, -0.5), yticks=range(len(mask_types)))
        axis.set_yticklabels([name.replace("_", " ") for name in mask_types])
        axis.grid(False)
        axis.set_title(f"{acceleration}x nominal, centre fraction {fraction:g}; right: lines sampled", loc="left")
    axes[-1].set_xlabel("phase-encoding line (black: sampled, blue: the fully sampled centre)")
    return figure


def retained_energy(data: Tensor) -> NDArray:
    """Share of the energy that the strongest 1, 2, … virtual coils keep.

    Parameters
    ----------
    data : Tensor, complex64, shape (coil, readout, phase)
        Masked k-space of one slice, before compression.

    Returns
    -------
    array, float64, shape (coil,)
        Sums of the coil covariance's eigenvalues, largest first, over their total; what `kspace.compress_coils` keeps.
    """
    samples = data.reshape(data.shape[0], -1).to(torch.complex128)
    values = torch.linalg.eigvalsh(samples @ samples.mH).flip(-1).clamp_min(0)
    return (values.cumsum(-1) / values.sum()).numpy()


@styled
def coil_compression_curve(curves: Mapping[str, ArrayLike], num_coils: int) -> Figure:
    """Energy lost over the number of virtual coils.

    Parameters
    ----------
    curves : mapping
        Name of a slice → its `retained_energy`.
    num_coils : int
        Where compression stops; marked.
    """
    figure = RecordFigure(WIDTH, 3.0)
    axis = figure.subplots()
    markers = "osD^vP"
    lowest = 1.0
    for number, (name, curve) in enumerate(curves.items()):
        lost = 1 - np.asarray(curve)[:-1]  # all coils lose nothing, which a logarithmic axis cannot show
        axis.plot(np.arange(1, len(lost) + 1), lost, marker=markers[number % len(markers)], markersize=4, label=name)
        lowest = min(lowest, float(lost.min(initial=1.0)))
    axis.axvline(num_coils, color=BLACK, linestyle=":", linewidth=1.2, label=f"num_coils = {num_coils}")
    axis.set_title("what compression to fewer, virtual coils would lose")
    axis.set(yscale="log", xlabel="virtual coils", ylabel="energy lost [share]", ylim=(max(lowest / 2, 1e-7), 1))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


@styled
def dataset_summary(split: Mapping[str, Sequence[Volume]], annotations: Annotations | None = None) -> Figure:
    """Volumes per contrast and part, coils, widths, labels per contrast.

    Parameters
    ----------
    split : mapping
        "train", "val", "test" → volumes, as `data.split_volumes` gives them.
    annotations : Annotations, optional
        Without them the last panel says that nothing is known.
    """
    volumes = [volume for part in split.values() for volume in part]
    contrasts = sorted({volume.acquisition for volume in volumes})
    shades = dict(zip(contrasts, COLORS * 3, strict=False))
    figure = RecordFigure(WIDTH, 5.6)
    rows = figure.subfigures(2, 1, squeeze=False)[:, 0]  # each by itself: long names of labels must not narrow the bars
    (by_part, coils), (widths, labels) = (row.subplots(1, 2) for row in rows)

    def stack(axis: Axes, places: Sequence[Any], key: Callable[[Volume], Any], members: Sequence[Volume]) -> None:
        bottom = np.zeros(len(places))
        for contrast in contrasts:
            counts = Counter(key(volume) for volume in members if volume.acquisition == contrast)
            heights = np.array([counts[place] for place in places], dtype=float)
            names = [str(place) for place in places]
            axis.bar(names, heights, bottom=bottom, color=shades[contrast], width=0.75, label=contrast)
            bottom += heights
        axis.grid(False, axis="x")
        axis.set_ylabel("volumes")
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))

    part_of = {volume.path: name for name, part in split.items() for volume in part}
    stack(by_part, list(split), lambda volume: part_of[volume.path], volumes)
    by_part.legend()
    for place, (_, part) in enumerate(split.items()):
        patients = len({volume.patient for volume in part})
        by_part.text(place, len(part), f"{len(part)} / {patients}", ha="center", va="bottom", fontsize=8)
    by_part.margins(y=0.1)
    by_part.set_title("split by patient: volumes / patients")
    stack(coils, sorted({volume.coils for volume in volumes}), lambda volume: volume.coils, volumes)
    coils.set_title("receiver coils")
    sizes = sorted({(volume.matrix[1], volume.matrix[0]) for volume in volumes})
    stack(widths, [f"{w}" for w, _ in sizes], lambda volume: str(volume.matrix[1]), volumes)
    widths.set_title("phase-encoding lines W; readout H " + ", ".join(str(h) for h in sorted({h for _, h in sizes})))
    _label_counts(labels, volumes, annotations, shades)
    return figure


def _label_counts(
    axis: Axes, volumes: Sequence[Volume], annotations: Annotations | None, shades: Mapping[str, str]
) -> None:
    axis.set_title("slices with a finding, by label and contrast")
    if annotations is None:
        axis.set_axis_off()
        axis.text(0.5, 0.5, "no annotations: findings unknown", ha="center", transform=axis.transAxes)
        return
    found: Counter[tuple[str, str]] = Counter()
    for volume in volumes:
        for number in range(volume.slices):
            boxes = annotations.boxes(volume.file, number, volume.image_shape[0])
            found.update((label, volume.acquisition) for label in {box.label for box in boxes})
    totals: Counter[str] = Counter()
    for (label, _), count in found.items():
        totals[label] += count
    common = [label for label, _ in totals.most_common(9)][::-1]
    left = np.zeros(len(common))
    for contrast, color in shades.items():
        counts = np.array([found[label, contrast] for label in common], dtype=float)
        axis.barh(common, counts, left=left, color=color, height=0.7)
        left += counts
    axis.set_xlabel("slices")
    axis.grid(False, axis="y")
