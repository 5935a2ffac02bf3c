"""Browsers for JupyterLab: sliders around one picture.

The pictures are drawn with Pillow, because matplotlib is too slow for sliders; `images` draws the same content for
headless records.
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

from mrilib.config import DataParameters, ParameterError
from mrilib.data import findings
from mrilib.data.annotations import Annotations, Box
from mrilib.data.dataset import FastMRIDataset, Slice, Volume
from mrilib.display.images import (
    COIL_MAPS,
    ERROR_LABEL,
    ERROR_SCALE,
    NO_TARGET,
    SliceParts,
    display_box,
    display_image,
    display_window,
    log_kspace,
    montage,
    montage_columns,
    sampled,
    score_text,
    slice_parts,
    slice_scores,
)
from mrilib.display.style import ERROR_MAP, SKY
from mrilib.evaluation import reconstructions
from mrilib.evaluation.pictures import scale_bar
from mrilib.metrics.methods import method_label
from mrilib.physics.masks import MASK_CLASSES

SIDE = 320  # of a tile [screen pixels]
CAPTION = 22  # height of the line above a tile [screen pixels]
GAP = 8  # between tiles [screen pixels]


@functools.cache
def _color_table(name: str) -> NDArray[np.uint8]:
    """Return a colour map as 256 RGB values."""
    return (matplotlib.colormaps[name](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


@functools.cache
def _font() -> Any:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 12)


def _outlined() -> dict[str, Any]:
    """Return the style of text on an image: readable on bright tissue too."""
    return {"font": _font(), "stroke_width": 2, "stroke_fill": "black"}


def tile(image: NDArray, high: float, caption: str, low: float = 0.0, cmap: str = "gray") -> Image.Image:
    """Fit a displayed image (h, w) into a square of `SIDE` pixels and write a line of text above it.

    The window is from `low` to `high`; `cmap` names a matplotlib colour map.
    """
    height, width = image.shape
    level = np.clip((image - low) * (255 / max(high - low, float(np.finfo(np.float32).tiny))), 0, 255).astype(np.uint8)
    scale = SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # Coloured after resizing, which is faster and adds no colours that the map lacks.
    resized = Image.fromarray(level).resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.BILINEAR)
    picture = Image.fromarray(_color_table(cmap)[np.asarray(resized)])
    square = Image.new("RGB", (SIDE, SIDE + CAPTION), "white")
    square.paste(picture, ((SIDE - size[0]) // 2, CAPTION + (SIDE - size[1]) // 2))
    ImageDraw.Draw(square).text((SIDE // 2, CAPTION // 2), caption, fill="black", font=_font(), anchor="mm")
    return square


def draw_boxes(picture: Image.Image, boxes: Sequence[Box], shape: tuple[int, int]) -> None:
    """Draw findings, in array coordinates, onto the tile of an image of this shape (h, w) [pixels]."""
    draw = ImageDraw.Draw(picture)
    scale = SIDE / max(shape)
    left, top = (SIDE - round(shape[1] * scale)) // 2, CAPTION + (SIDE - round(shape[0] * scale)) // 2
    for box in boxes:
        x, y, width, height = (scale * value for value in display_box(box, shape[0]))
        draw.rectangle((left + x, top + y, left + x + width, top + y + height), outline=SKY, width=2)
        above = top + y > CAPTION + 16
        start = min(left + x, SIDE - _font().getlength(box.label) - 3)
        place, anchor = (top + y - 4, "ls") if above else (top + y + height + 2, "la")
        draw.text((start, place), box.label, fill=SKY, anchor=anchor, **_outlined())


def draw_scale_bar(picture: Image.Image, shape: tuple[int, ...], pixel: tuple[float, float] | None) -> None:
    """Draw a scale bar into the lower left corner of the tile of an image of this shape (h, w) [pixels]."""
    if (bar := scale_bar(shape, pixel)) is None:
        return
    scale = SIDE / max(shape)
    left = (SIDE - round(shape[1] * scale)) // 2 + 8
    right = left + round(bar[1] * scale)
    bottom = CAPTION + (SIDE + round(shape[0] * scale)) // 2 - 10
    draw = ImageDraw.Draw(picture)
    draw.rectangle((left - 1, bottom - 2, right + 1, bottom + 2), fill="black")
    draw.line((left, bottom, right, bottom), fill="white", width=2)
    draw.text((left, bottom - 5), f"{bar[0]} mm", fill="white", anchor="ls", **_outlined())


def error_scale_strip() -> Image.Image:
    """Draw the error map's colour bar in per cent of the grey window, as wide as a tile."""
    strip = Image.new("RGB", (SIDE, CAPTION), "white")
    draw, end, middle = ImageDraw.Draw(strip), f"{100 / ERROR_SCALE:g} % of the target's window", CAPTION // 2
    left, right = 20, SIDE - 10 - round(_font().getlength(end))
    colors = _color_table(ERROR_MAP)[np.linspace(0, 255, right - left).round().astype(int)]
    strip.paste(Image.fromarray(np.repeat(colors[None], 10, axis=0)), (left, middle - 5))
    draw.text((left - 6, middle), "0", fill="black", font=_font(), anchor="rm")
    draw.text((right + 6, middle), end, fill="black", font=_font(), anchor="lm")
    return strip


def sheet(tiles: Sequence[Image.Image], columns: int, below: Image.Image) -> bytes:
    """Arrange tiles of equal size row by row, with `below` under the last one; PNG."""
    width, height = tiles[0].size
    rows = -(-len(tiles) // columns)
    bottom = rows * (height + GAP) - GAP
    page = Image.new("RGB", (columns * (width + GAP) - GAP, bottom + below.height), "white")
    page.paste(below, ((len(tiles) - 1) % columns * (width + GAP), bottom))
    for number, picture in enumerate(tiles):
        page.paste(picture, (number % columns * (width + GAP), number // columns * (height + GAP)))
    buffer = io.BytesIO()
    page.save(buffer, "png", compress_level=1)  # fast rather than small
    return buffer.getvalue()


def overview_png(sample: Slice, parts: SliceParts, boxes: Sequence[Box] = (), coil: int = 0) -> bytes:
    """Draw the picture of `images.slice_overview` fast, from the slice's `images.slice_parts`."""
    columns = montage_columns(len(parts.maps))
    shape = parts.zero_filled.shape
    lines = log_kspace(sample, coil)
    strip = max(1, lines.shape[0] // 32)
    lines[:strip] = np.where(parts.mask, 0.0, -4.0)  # the mask, as a strip on top
    lines[strip : 2 * strip] = -4.0
    tiles = [tile(lines, 0, f"log k-space, coil {coil + 1}; {sampled(parts.mask)}", low=-4)]
    if parts.target is None:
        tiles += [tile(parts.zero_filled, parts.window, "zero-filled"), tile(np.zeros(shape), 1, NO_TARGET)]
    else:
        scores = slice_scores(parts.target, parts.zero_filled, sample.maximum)
        tiles.append(tile(parts.zero_filled, parts.window, f"zero-filled, {score_text(scores)}"))
        tiles.append(tile(parts.target, parts.window, "target"))
        draw_scale_bar(tiles[-1], shape, sample.pixel)
        draw_boxes(tiles[-1], boxes, shape)
    tiles.append(tile(montage(parts.coil_images, columns), 1, "coil images, each on its own scale"))
    tiles.append(tile(montage(parts.maps, columns), 1, COIL_MAPS))
    if parts.target is None:
        return sheet(tiles, 3, Image.new("RGB", (SIDE, CAPTION), "white"))  # the same size as with a target
    tiles.append(tile(parts.error, parts.window / ERROR_SCALE, ERROR_LABEL, cmap=ERROR_MAP))
    return sheet(tiles, 3, error_scale_strip())


class _Browser(ipywidgets.VBox):
    """Controls above a picture; a subclass draws it for the controls' values."""

    def __init__(self, controls: Sequence[Any]) -> None:
        # Shown at its drawn size; a box would stretch it over the whole column.
        self.picture = ipywidgets.Image(format="png", layout={"max_width": "100%", "align_self": "flex-start"})
        self.text = ipywidgets.HTML()
        box = ipywidgets.Layout(flex_flow="row wrap")
        super().__init__([ipywidgets.HBox(list(controls), layout=box), self.text, self.picture])
        for control in controls:
            control.observe(self._redraw, names="value")
        self._redraw()

    def _redraw(self, change: Any = None) -> None:
        text, self.picture.value = self.draw()
        self.text.value = f'<p role="status">{html.escape(text)}</p>'  # screen readers announce its changes

    def draw(self) -> tuple[str, bytes]:
        """Return a line of text and the PNG for the controls' values."""
        raise NotImplementedError


def _volume_controls(volumes: Sequence[Volume]) -> tuple[Any, Any]:
    """Make a slider for the volume, and one for the slice that follows the volume's length."""
    names = [(f"{volume.acquisition} {volume.file.rsplit('_', 1)[-1]}", i) for i, volume in enumerate(volumes)]
    volume = ipywidgets.SelectionSlider(options=names, value=0, description="volume", layout={"width": "360px"})
    middle = volumes[0].slices // 2
    slice_num = ipywidgets.IntSlider(middle, 0, max(1, volumes[0].slices - 1), description="slice")

    def shorten(change: Any) -> None:
        slice_num.max = max(1, volumes[change["new"]].slices - 1)  # a slider needs two places

    volume.observe(shorten, names="value")
    return volume, slice_num


class SliceBrowser(_Browser):
    """Browser of `overview_png` by volume, slice, acceleration, mask type and coil.

    Parameters
    ----------
    volumes : sequence of Volume
    config : DataParameters
        num_coils, crop, accelerations with their center_fractions, and the first mask type.
    annotations : Annotations, optional
    """

    def __init__(
        self, volumes: Sequence[Volume], config: DataParameters, annotations: Annotations | None = None
    ) -> None:
        self.volumes, self.config, self.annotations = list(volumes), config, annotations
        self.volume, self.slice = _volume_controls(self.volumes)
        self.acceleration = ipywidgets.SelectionSlider(options=config.accelerations, description="acceleration")
        self.mask_type = ipywidgets.Dropdown(
            options=tuple(MASK_CLASSES), value=config.mask_type, description="mask type"
        )
        coils = min(config.num_coils, max(volume.coils for volume in volumes))
        self.coil = ipywidgets.IntSlider(1, 1, max(2, coils), description="coil")
        # The last slices are cached for the coil slider and for moving back and forth.
        self._dataset: Callable[..., FastMRIDataset] = functools.cache(self._make_dataset)
        self._parts: Callable[..., tuple[Slice, SliceParts]] = functools.lru_cache(8)(self._make_parts)
        super().__init__([self.volume, self.slice, self.acceleration, self.mask_type, self.coil])

    def _make_dataset(self, volume: int, acceleration: int, mask_type: str) -> FastMRIDataset:
        config = self.config.model_copy(update={"mask_type": mask_type})
        return FastMRIDataset([self.volumes[volume]], config, self.annotations, acceleration=acceleration)

    def _make_parts(self, volume: int, slice_num: int, acceleration: int, mask_type: str) -> tuple[Slice, SliceParts]:
        sample = self._dataset(volume, acceleration, mask_type)[slice_num]
        return sample, slice_parts(sample)

    def draw(self) -> tuple[str, bytes]:
        """Return the slice's file and analysis, and its overview."""
        volume = self.volumes[self.volume.value]
        slice_num = min(self.slice.value, volume.slices - 1)
        sample, parts = self._parts(self.volume.value, slice_num, self.acceleration.value, self.mask_type.value)
        boxes = self.annotations.boxes(sample.file, slice_num, sample.image_shape[0]) if self.annotations else ()
        if self.config.crop == "image":
            boxes = ()  # their coordinates are those of the uncropped image
        coil = min(self.coil.value, len(parts.maps)) - 1
        unknown = "" if sample.facts.findings is not None else " (not reviewed: findings unknown)"
        return f"{sample.file}: {findings.answer(sample.facts)}{unknown}", overview_png(sample, parts, boxes, coil)


class ReconstructionBrowser(_Browser):
    """Browser of target, zero-filled image, a method's image and its error on one shared window, with zoom.

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
        """Return file and slice, and a sheet of target, zero-filled image, reconstruction and error."""
        volume = self.volumes[self.volume.value]
        slice_num = min(self.slice.value, volume.slices - 1)
        target = reconstructions.read_target(volume, slice_num)
        window = display_window(target)
        zoomed_target = self._zoomed(display_image(target))
        tiles = [tile(zoomed_target, window, "target")]
        draw_scale_bar(tiles[0], zoomed_target.shape, volume.pixel)
        for method in dict.fromkeys(("zero_filled", self.method.value)):
            if not (self.directory / method).is_dir():
                continue
            image = reconstructions.read_slice(self.directory, method, self.acceleration.value, volume, slice_num)
            caption = f"{method_label(method)}, {score_text(slice_scores(target, image, volume.maximum))}"
            tiles.append(tile(self._zoomed(display_image(image)), window, caption))
        error = np.abs(display_image(image) - display_image(target))
        caption = f"|{method_label(self.method.value)} − target| ×{ERROR_SCALE}"
        tiles.append(tile(self._zoomed(error), window / ERROR_SCALE, caption, cmap=ERROR_MAP))
        return f"{volume.file}, slice {slice_num}, {self.acceleration.value}x", sheet(tiles, 2, error_scale_strip())
