"""The style of all figures: colours, sizes, and a Figure that notebooks show as a small PNG."""

import functools
import io
from collections.abc import Callable
from typing import Any, ParamSpec

import matplotlib.colors
import numpy as np
from cycler import cycler
from matplotlib.axis import Tick
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image

from mrilib.config import printable

# The colour-blind safe palette of Okabe and Ito (jfly.uni-koeln.de/color).
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#000000", "#8C8C8C"
COLORS = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, BLACK)
ERROR_MAP = "inferno"
WIDTH = 9.5  # of a figure, as wide as a notebook's column [inches]
STYLE: Any = {
    "figure.facecolor": "white",  # readable in dark themes too
    "figure.dpi": 100,
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLORS),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.5,
}
P = ParamSpec("P")


@functools.cache
def _palette() -> NDArray[np.uint8]:
    """Return the 256 colours of the figures: greys, the error map, and tints of Okabe and Ito's colours."""
    greys = np.repeat(np.linspace(0, 255, 138)[:, None], 3, axis=1)
    errors = 255 * matplotlib.colormaps[ERROR_MAP](np.linspace(0, 1, 64))[:, :3]
    pure = 255 * np.array([matplotlib.colors.to_rgb(color) for color in COLORS[:6]])
    shares = np.linspace(1, 0.12, 9)[:, None, None]
    tints = (shares * pure + (1 - shares) * 255).reshape(-1, 3)
    return np.concatenate([greys, errors, tints]).round().astype(np.uint8)


def to_palette(pixels: NDArray[np.uint8]) -> Image.Image:
    """Convert an RGB image (h, w, 3) to the nearest palette colours; the PNG is a third as large."""
    red, green, blue = np.moveaxis(pixels.astype(np.uint32), -1, 0)
    packed, places = np.unique((red << 16) | (green << 8) | blue, return_inverse=True)
    colors = np.stack([packed >> 16, (packed >> 8) & 255, packed & 255], axis=1).astype(np.float32)
    palette = _palette().astype(np.float32)
    # The squared distance without |color|², which does not change the nearest.
    nearest = np.argmin((palette**2).sum(1) - 2 * colors @ palette.T, axis=1).astype(np.uint8)
    image = Image.fromarray(nearest[places].reshape(pixels.shape[:2]))  # mode "L"; a palette makes it "P"
    image.putpalette(_palette().tobytes())
    return image


class RecordFigure(Figure):
    """A Figure that a notebook shows as a small PNG, with or without pyplot.

    Parameters
    ----------
    width, height : float [inches]
    """

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), dpi=100, layout="constrained")
        FigureCanvasAgg(self)
        self.description = ""

    def png(self, dpi: int = 100) -> bytes:
        """Return the figure as PNG in the palette's colours; `dpi` in dots per inch."""
        buffer, small = io.BytesIO(), io.BytesIO()
        self.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", facecolor="white")
        to_palette(np.asarray(Image.open(buffer).convert("RGB"))).save(small, "png", optimize=True)
        return small.getvalue()

    def _repr_png_(self) -> tuple[bytes, dict[str, Any]]:
        png = self.png(dpi=200)  # two pixels of the picture per pixel of the page, for HiDPI screens
        width, height = Image.open(io.BytesIO(png)).size
        return png, {"alt": self.alt_text(), "width": width // 2, "height": height // 2}

    def alt_text(self) -> str:
        """Describe the figure for screen readers: `description`, else its titles, each once."""
        if self.description:
            return printable(self.description)
        titles = [self.get_suptitle(), *(axis.get_title() or axis.get_title("left") for axis in self.axes)]
        return "; ".join(dict.fromkeys(title.replace("\n", ", ") for title in titles if title))


def styled(function: Callable[P, RecordFigure]) -> Callable[P, RecordFigure]:
    """Draw with `STYLE`, and show file and run names as they are, without reading formulas in their ``$``."""

    @functools.wraps(function)
    def draw(*args: P.args, **kwargs: P.kwargs) -> RecordFigure:
        with matplotlib.rc_context(STYLE):
            figure = function(*args, **kwargs)
        ticks = {label for tick in figure.findobj(Tick) for label in (tick.label1, tick.label2)}  # 10⁻³ is a formula
        for text in figure.findobj(Text):
            if text not in ticks:
                text.set_parse_math(False)
                text.set_text(printable(text.get_text(), keep="\n"))
        return figure

    return draw
