"""Browsers for JupyterLab: sliders around one picture.

The pictures are put together from arrays, colour tables and Pillow's text, as matplotlib would take longer than the eye
is ready to wait; `figures` draws their static twins for headless records.
"""

import functools
import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mrilib.config import MASK_TYPES, DataParameters, ParameterError
from mrilib.data import findings
from mrilib.data.annotations import Annotations, Box
from mrilib.data.dataset import FastMRIDataset, Slice, Volume
from mrilib.display.images import (
    ERROR_SCALE,
    SliceParts,
    display_box,
    display_image,
    display_window,
    log_kspace,
    montage,
    montage_columns,
    sampled,
    scale_bar,
    slice_parts,
    slice_scores,
)
from mrilib.display.style import ERROR_MAP, SKY
from mrilib.evaluation import reconstructions
from mrilib.metrics.methods import method_label

SIDE = 320  # of a tile [screen pixels]
CAPTION = 22  # height of the line above a tile [screen pixels]
GAP = 8  # between tiles [screen pixels]


@functools.cache
def _table(name: str) -> NDArray[np.uint8]:
    """A colour map as 256 RGB values."""
    return (matplotlib.colormaps[name](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


@functools.cache
def _font() -> Any:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 12)


def tile(
    image: NDArray, high: float, caption: str, low: float = 0.0, cmap: str = "gray", side: int = SIDE
) -> Image.Image:
    """An image with a line of text above it, fitted into a square.

    Parameters
    ----------
    image : array, float, shape (h, w)
        As displayed, first row on top.
    high, low : float
        Ends of the window.
    caption : str
    cmap : str
        matplotlib's name of a colour map.
    side : int
        Of the square [screen pixels].
    """
    height, width = image.shape
    level = np.clip((image - low) * (255 / max(high - low, float(np.finfo(np.float32).tiny))), 0, 255).astype(np.uint8)
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # resized first, coloured then: less to do, and no colours that the map does not have
    resized = Image.fromarray(level).resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.BILINEAR)
    picture = Image.fromarray(_table(cmap)[np.asarray(resized)])
    whole = Image.new("RGB", (side, side + CAPTION), "white")
    whole.paste(picture, ((side - size[0]) // 2, CAPTION + (side - size[1]) // 2))
    ImageDraw.Draw(whole).text((side // 2, CAPTION // 2), caption, fill="black", font=_font(), anchor="mm")
    return whole


def draw_boxes(picture: Image.Image, boxes: Sequence[Box], shape: tuple[int, int]) -> None:
    """Draw findings, given in array coordinates, onto the tile of an image of this shape (h, w) [pixels]."""
    draw = ImageDraw.Draw(picture)
    side = picture.width
    scale = side / max(shape)
    left, top = (side - round(shape[1] * scale)) // 2, CAPTION + (side - round(shape[0] * scale)) // 2
    for box in boxes:
        x, y, width, height = (scale * value for value in display_box(box, shape[0]))
        draw.rectangle((left + x, top + y, left + x + width, top + y + height), outline=SKY, width=2)
        above = top + y > CAPTION + 16
        start = min(left + x, side - _font().getlength(box.label) - 3)
        place, anchor = (top + y - 4, "ls") if above else (top + y + height + 2, "la")
        style: Any = {"font": _font(), "stroke_width": 2, "stroke_fill": "black"}
        draw.text((start, place), box.label, fill=SKY, anchor=anchor, **style)


def draw_scale_bar(picture: Image.Image, shape: tuple[int, ...], pixel: tuple[float, float] | None) -> None:
    """Draw a scale bar into the lower left corner of the tile of an image of this shape (h, w) [pixels]."""
    if (bar := scale_bar(shape, pixel)) is None:
        return
    side = picture.width
    scale = side / max(shape)
    left = (side - round(shape[1] * scale)) // 2 + 8
    bottom = CAPTION + (side + round(shape[0] * scale)) // 2 - 10
    draw = ImageDraw.Draw(picture)
    right = left + round(bar[1] * scale)
    draw.rectangle((left - 1, bottom - 2, right + 1, bottom + 2), fill="black")  # it may lie on bright tissue
    draw.line((left, bottom, right, bottom), fill="white", width=2)
    style: Any = {"font": _font(), "stroke_width": 2, "stroke_fill": "black"}
    draw.text((left, bottom - 5), f"{bar[0]} mm", fill="white", anchor="ls", **style)


def error_scale_strip(side: int = SIDE, error_scale: float = ERROR_SCALE) -> Image.Image:
    """The error map from 0 to its end in per cent of the grey window, as wide as a tile."""
    strip = Image.new("RGB", (side, CAPTION), "white")
    draw, end, middle = ImageDraw.Draw(strip), f"{100 / error_scale:g} % of the target's window", CAPTION // 2
    left, right = 20, side - 10 - round(_font().getlength(end))
    colors = _table(ERROR_MAP)[np.linspace(0, 255, right - left).round().astype(int)]
    strip.paste(Image.fromarray(np.repeat(colors[None], 10, axis=0)), (left, middle - 5))
    draw.text((left - 6, middle), "0", fill="black", font=_font(), anchor="rm")
    draw.text((right + 6, middle), end, fill="black", font=_font(), anchor="lm")
    return strip


def sheet(tiles: Sequence[Image.Image], columns: int, below: Image.Image | None = None) -> bytes:
    """Tiles of equal size, row by row, as PNG; `below`, as wide as a tile, comes under the last one."""
    width, height = tiles[0].size
    rows = -(-len(tiles) // columns)
    foot = below.height if below is not None else 0
    whole = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP + foot), "white")
    if below is not None:
        whole.paste(below, ((len(tiles) - 1) % columns * (width + GAP), rows * (height + GAP) - GAP))
    for number, one in enumerate(tiles):
        whole.paste(one, (number % columns * (width + GAP), number // columns * (height + GAP)))
    buffer = io.BytesIO()
    whole.save(buffer, "png", compress_level=1)  # the kernel's speed counts here, not the size
    return buffer.getvalue()


def overview_png(one: Slice, parts: SliceParts, boxes: Sequence[Box] = (), coil: int = 0) -> bytes:
    """The picture of `figures.slice_overview`, drawn fast.

    Parameters
    ----------
    one : Slice
    parts : SliceParts
        `figures.slice_parts` of it.
    boxes : sequence of Box
        Findings in array coordinates, drawn on the target.
    coil : int
        Coil of the k-space tile.
    """
    columns = montage_columns(len(parts.maps))
    shape = parts.zero_filled.shape
    window = display_window(parts.zero_filled if parts.target is None else parts.target)
    lines = log_kspace(one, coil)
    strip = max(1, lines.shape[0] // 32)
    lines[:strip] = np.where(parts.mask, 0.0, -4.0)  # the mask, as a strip on top
    lines[strip : 2 * strip] = -4.0
    tiles = [tile(lines, 0, f"log k-space, coil {coil + 1}; {sampled(parts.mask)}", low=-4)]
    if parts.target is None:
        tiles += [tile(parts.zero_filled, window, "zero-filled"), tile(np.zeros(shape), 1, "no target in this file")]
    else:
        scores = slice_scores(parts.target, parts.zero_filled, one.maximum)
        tiles.append(tile(parts.zero_filled, window, _scored("zero-filled", scores)))
        tiles.append(tile(parts.target, window, "target"))
        draw_scale_bar(tiles[-1], shape, one.pixel)
        draw_boxes(tiles[-1], boxes, shape)
    tiles.append(tile(montage(parts.coil_images, columns), parts.coil_window, "coil images"))
    tiles.append(tile(montage(parts.maps, columns), 1, "coil maps from the centre lines, 0 to 1"))
    if parts.target is not None:
        error = np.abs(parts.zero_filled - parts.target)
        tiles.append(tile(error, window / ERROR_SCALE, f"|zero-filled − target| ×{ERROR_SCALE}", cmap=ERROR_MAP))
    blank = Image.new("RGB", (SIDE, CAPTION), "white")  # the picture keeps its size from file to file
    return sheet(tiles, 3, below=blank if parts.target is None else error_scale_strip())


def _scored(name: str, scores: dict[str, float]) -> str:
    return f"{name}, SSIM {scores['ssim']:.3f}, {scores['psnr']:.1f} dB"


class _Browser(ipywidgets.VBox):
    """Controls above a picture that follows them; a subclass says what to draw."""

    def __init__(self, controls: Sequence[Any]) -> None:
        # Never larger than it is drawn: a box would stretch it over the whole column
        self.picture = ipywidgets.Image(format="png", layout={"max_width": "100%", "align_self": "flex-start"})
        self.text = ipywidgets.HTML()
        box = ipywidgets.Layout(flex_flow="row wrap")
        super().__init__([ipywidgets.HBox(list(controls), layout=box), self.text, self.picture])
        for control in controls:
            control.observe(self._changed, names="value")
        self._changed()

    def _changed(self, change: Any = None) -> None:
        text, self.picture.value = self.draw()
        self.text.value = f'<p role="status">{html.escape(text)}</p>'  # screen readers tell it when it changes

    def draw(self) -> tuple[str, bytes]:
        """The line of text and the PNG for the controls' present values."""
        raise NotImplementedError


def _volume_controls(volumes: Sequence[Volume]) -> tuple[Any, Any]:
    """A slider for the volume, and one for the slice that knows the volume's length."""
    names = [(f"{one.acquisition} {one.file.rsplit('_', 1)[-1]}", number) for number, one in enumerate(volumes)]
    volume = ipywidgets.SelectionSlider(options=names, value=0, description="volume", layout={"width": "360px"})
    middle = volumes[0].slices // 2
    slice_num = ipywidgets.IntSlider(middle, 0, max(1, volumes[0].slices - 1), description="slice")

    def shorten(change: Any) -> None:
        slice_num.max = max(1, volumes[change["new"]].slices - 1)  # a slider needs two places

    volume.observe(shorten, names="value")
    return volume, slice_num


class SliceBrowser(_Browser):
    """Volume, slice, acceleration, mask type and coil by slider; the picture is `overview_png`.

    Parameters
    ----------
    volumes : sequence of Volume
    config : DataParameters
        num_coils, crop, accelerations with their center_fractions, and the mask type to begin with.
    annotations : Annotations, optional
    """

    def __init__(
        self, volumes: Sequence[Volume], config: DataParameters, annotations: Annotations | None = None
    ) -> None:
        self.volumes, self.config, self.annotations = list(volumes), config, annotations
        self.volume, self.slice = _volume_controls(self.volumes)
        self.acceleration = ipywidgets.SelectionSlider(options=config.accelerations, description="acceleration")
        self.mask_type = ipywidgets.Dropdown(options=MASK_TYPES, value=config.mask_type, description="mask type")
        coils = min(config.num_coils, max(volume.coils for volume in volumes))
        self.coil = ipywidgets.IntSlider(1, 1, max(2, coils), description="coil")
        # Datasets are light; slices are kept for the coil slider, and for going back and forth.
        self._dataset: Callable[..., FastMRIDataset] = functools.lru_cache(None)(self._make_dataset)
        self._parts: Callable[..., tuple[Slice, SliceParts]] = functools.lru_cache(8)(self._make_parts)
        super().__init__([self.volume, self.slice, self.acceleration, self.mask_type, self.coil])

    def _make_dataset(self, volume: int, acceleration: int, mask_type: str) -> FastMRIDataset:
        config = self.config.model_copy(update={"mask_type": mask_type})
        return FastMRIDataset([self.volumes[volume]], config, self.annotations, acceleration=acceleration)

    def _make_parts(self, volume: int, slice_num: int, acceleration: int, mask_type: str) -> tuple[Slice, SliceParts]:
        one = self._dataset(volume, acceleration, mask_type)[slice_num]
        return one, slice_parts(one)

    def draw(self) -> tuple[str, bytes]:
        """The slice's file and analysis, and its overview."""
        volume = self.volumes[self.volume.value]
        slice_num = min(self.slice.value, volume.slices - 1)
        one, parts = self._parts(self.volume.value, slice_num, self.acceleration.value, self.mask_type.value)
        boxes = self.annotations.boxes(one.file, slice_num, one.image_shape[0]) if self.annotations else ()
        if self.config.crop == "image":
            boxes = ()  # they are those of the uncropped image
        coil = min(self.coil.value, len(parts.maps)) - 1
        unknown = "" if one.facts.findings is not None else " (not reviewed: findings unknown)"
        return f"{one.file}: {findings.answer(one.facts)}{unknown}", overview_png(one, parts, boxes, coil)


class ReconstructionBrowser(_Browser):
    """Target, zero-filled, a method's image and its error on one shared window, with zoom.

    Parameters
    ----------
    directory : Path
        A run's ``reconstructions/``: ``<method>/<acceleration>/<file>.h5``.
    volumes : sequence of Volume
        Test volumes, with targets.
    accelerations : sequence of int

    Raises
    ------
    ParameterError
        If the directory holds no reconstructions.
    """

    def __init__(self, directory: Path, volumes: Sequence[Volume], accelerations: Sequence[int]) -> None:
        self.directory, self.volumes = directory, list(volumes)
        methods = sorted(path.name for path in directory.glob("*") if path.is_dir())
        if not methods:
            raise ParameterError(f"'{directory}' holds no reconstructions; run 04_evaluate first")
        first = "model" if "model" in methods else methods[0]
        self.volume, self.slice = _volume_controls(self.volumes)
        self.acceleration = ipywidgets.SelectionSlider(options=list(accelerations), description="acceleration")
        options = [(method_label(name), name) for name in methods]
        self.method = ipywidgets.Dropdown(options=options, value=first, description="method")
        self.zoom = ipywidgets.FloatSlider(1, min=1, max=6, step=0.5, description="zoom")
        self.row = ipywidgets.FloatSlider(0.5, min=0, max=1, step=0.02, description="from top")
        self.column = ipywidgets.FloatSlider(0.5, min=0, max=1, step=0.02, description="from left")
        super().__init__([self.volume, self.slice, self.acceleration, self.method, self.zoom, self.row, self.column])

    def _zoomed(self, image: NDArray) -> NDArray:
        size = [max(1, round(length / self.zoom.value)) for length in image.shape]
        top, left = (
            round((length - part) * place)
            for length, part, place in zip(image.shape, size, (self.row.value, self.column.value), strict=True)
        )
        return image[top : top + size[0], left : left + size[1]]

    def draw(self) -> tuple[str, bytes]:
        """File and slice; target, zero-filled, reconstruction and error."""
        volume = self.volumes[self.volume.value]
        slice_num = min(self.slice.value, volume.slices - 1)
        target = reconstructions.read_target(volume, slice_num)
        window = display_window(target)
        shown = self._zoomed(display_image(target))
        tiles = [tile(shown, window, "target")]
        draw_scale_bar(tiles[0], shown.shape, volume.pixel)
        for method in dict.fromkeys(("zero_filled", self.method.value)):
            if not (self.directory / method).is_dir():
                continue
            image = reconstructions.read_slice(self.directory, method, self.acceleration.value, volume, slice_num)
            caption = _scored(method_label(method), slice_scores(target, image, volume.maximum))
            tiles.append(tile(self._zoomed(display_image(image)), window, caption))
        error = np.abs(display_image(image) - display_image(target))
        caption = f"|{method_label(self.method.value)} − target| ×{ERROR_SCALE}"
        tiles.append(tile(self._zoomed(error), window / ERROR_SCALE, caption, cmap=ERROR_MAP))
        return f"{volume.file}, slice {slice_num}, {self.acceleration.value}x", sheet(tiles, 2, error_scale_strip())
