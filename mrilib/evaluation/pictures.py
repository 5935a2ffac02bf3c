"""The picture that `mrilib reconstruct` writes: all slices, with labels, a scale bar and a grey scale."""

import textwrap
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

TILE = 384  # smallest width of a slice [picture pixels]
COLUMNS = 4
FONT = 24  # readable where the picture is shown 800 pixels wide [picture pixels]
LINE = 34  # height of a line of text [picture pixels]


def scale_bar(shape: tuple[int, ...], pixel: tuple[float, float] | None) -> tuple[int, float] | None:
    """Choose a scale bar of 50, 20 or 10 mm that covers at most a third of the width of an image (h, w).

    Returns its length in mm and in pixels; None if no length fits or the pixel size (readout, phase) [mm] is unknown.
    """
    if pixel is None:
        return None
    return next(((mm, mm / pixel[1]) for mm in (50, 20, 10) if mm / pixel[1] <= shape[1] / 3), None)


def draw_volume(images: NDArray, header: Sequence[str], pixel: tuple[float, float] | None = None) -> Image.Image:
    """Draw the slices of a volume on one grey scale, under lines of text.

    Parameters
    ----------
    images : array, shape (slices, h, w) [file units]
        Not flipped; the picture has anterior up.
    header : sequence of str
        Paragraphs above the slices.
    pixel : (readout, phase), optional
        Pixel size [mm], for the scale bar on the first slice.

    Returns
    -------
    Image
        RGB.
    """
    count, height, width = images.shape
    zoom = max(1, -(-TILE // width))
    tile = width * zoom, height * zoom
    columns = min(COLUMNS, count)
    maximum = float(images.max())
    lines = [line for text in header for line in textwrap.wrap(text, columns * tile[0] // (FONT // 2))]
    top = LINE * (len(lines) + 1) + 10  # a line of the grey scale
    rows = -(-count // columns)
    page = Image.new("RGB", (columns * tile[0], top + rows * (tile[1] + LINE)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(FONT)
    for number, line in enumerate(lines):
        draw.text((6, 4 + number * LINE), line, fill="black", font=font)
    _draw_grey_scale(page, LINE * len(lines) + 4, maximum)
    for number, image in enumerate(images):
        left, upper = number % columns * tile[0], top + number // columns * (tile[1] + LINE)
        level = (255 * image[::-1] / (maximum or 1)).round().clip(0, 255).astype(np.uint8)
        page.paste(Image.fromarray(level).resize(tile, Image.Resampling.BICUBIC), (left, upper))
        draw.text((left + 6, upper + tile[1] + 2), f"slice {number}", fill="black", font=font)
        bar = scale_bar((height, width), pixel)
        if number == 0 and bar is not None:
            line_y = upper + tile[1] - 14
            draw.rectangle(
                (left + 12, line_y - 2, left + 12 + bar[1] * zoom, line_y + 2), fill="white", outline="black"
            )
            place = left + 12, line_y - 6
            draw.text(place, f"{bar[0]} mm", fill="white", font=font, anchor="ls", stroke_width=2, stroke_fill="black")
    return page


def _draw_grey_scale(page: Image.Image, top: int, maximum: float) -> None:
    draw, font, left, length = ImageDraw.Draw(page), ImageFont.load_default(FONT), 26, 160
    ramp = np.repeat(np.linspace(0, 255, length).astype(np.uint8)[None], FONT, axis=0)
    draw.text((6, top), "0", fill="black", font=font)
    page.paste(Image.fromarray(ramp), (left, top + 3))
    draw.text((left + length + 8, top), f"{maximum:.3g} [file units]", fill="black", font=font)
