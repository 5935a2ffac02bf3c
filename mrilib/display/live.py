"""What one sees while a stage trains: its curves as they grow, and examples of what the model says or draws.

A headless record shows none of it while it happens: curves and examples, which are kept, have their figures at the end.
"""

import io
import logging
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import ipywidgets
import matplotlib
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.figure import Figure
from torch import Tensor

from mrilib.display import curves
from mrilib.display.style import STYLE, RecordFigure
from mrilib.display.tables import Markup, html_table, marked_text
from mrilib.evaluation.reconstructions import Comparison
from mrilib.training.history import History

logger = logging.getLogger("mrilib")

Example = TypeVar("Example")
EXAMPLES = 4  # taken in the course of a training, evenly over its epochs
LAYOUT: Any = {"max_width": "100%", "align_self": "flex-start"}  # of a picture: a box would stretch it
SHARE = 0.05  # of the time that drawing may take


class Kept(NamedTuple, Generic[Example]):
    """Where examples are kept for a process that goes on with the training, one npz file an epoch, and how.

    Attributes
    ----------
    folder : Path
    pack : callable
        Turns an example into named arrays of numbers or texts.
    unpack : callable
        The inverse.
    """

    folder: Path
    pack: Callable[[Example], dict[str, Any]]
    unpack: Callable[[Mapping[str, Any]], Example]

    def save(self, epoch: int, example: Example) -> None:
        """Write the example of an epoch."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / "part"
        with open(part, "wb") as file:
            np.savez_compressed(file, **self.pack(example))
        part.replace(self.folder / f"epoch_{epoch}.npz")

    def load(self) -> dict[int, Example]:
        """The examples that are there, by epoch; a damaged one is left out with a warning."""
        found: dict[int, Example] = {}
        for path in self.folder.glob("epoch_*.npz"):
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    found[int(path.stem.removeprefix("epoch_"))] = self.unpack(arrays)
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                logger.warning("%s cannot be read (%s): the example of this epoch is left out", path, error)
        return dict(sorted(found.items()))


def texts_in(run: Path) -> Kept[pd.DataFrame]:
    """Stage 1's examples in a run folder: `inference.example_texts`."""
    return Kept(
        run / "logs" / "stage1_examples",
        lambda table: {f"column.{name}": np.array(table[name].tolist()) for name in table},
        lambda arrays: pd.DataFrame({name.removeprefix("column."): arrays[name] for name in arrays}),
    )


def images_in(run: Path) -> Kept[list[Comparison]]:
    """Stage 2's examples in a run folder: `inference.preview`, without scores and boxes, which it does not have."""

    def pack(shown: list[Comparison]) -> dict[str, Any]:
        arrays: dict[str, Any] = {}
        for number, one in enumerate(shown):
            told: dict[str, Any] = {"target": one.target, "maximum": one.maximum, "title": one.title}
            told |= {} if one.pixel is None else {"pixel": one.pixel}
            told |= {f"images.{name}": image for name, image in one.images.items()}
            arrays |= {f"{number}.{name}": _array(value) for name, value in told.items()}
        return arrays

    def unpack(arrays: Mapping[str, Any]) -> list[Comparison]:
        shown: list[Comparison] = []
        while f"{len(shown)}.target" in arrays:
            start = f"{len(shown)}."
            images = f"{start}images."
            pixel = f"{start}pixel"
            shown.append(
                Comparison(
                    arrays[f"{start}target"],
                    {name.removeprefix(images): arrays[name] for name in arrays if name.startswith(images)},
                    float(arrays[f"{start}maximum"]),
                    title=str(arrays[f"{start}title"]),
                    pixel=(float(arrays[pixel][0]), float(arrays[pixel][1])) if pixel in arrays else None,
                )
            )
        return shown

    return Kept(run / "logs" / "stage2_examples", pack, unpack)


def _array(value: Any) -> Any:
    return np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)


class Watch(Generic[Example]):
    """Callbacks of `training.fit`: live curves in an interactive notebook, examples in any.

    Parameters
    ----------
    epochs : int
        Of the training.
    interactive : bool
        Show the widget.
    example : callable, optional
        Asks the model in its present state, called after four of the epochs and after the last. Deterministic: it must
        not draw random numbers, or training would go another way for being watched.
    show : callable, optional
        Turns the examples so far, epoch → example, into what is shown of them: HTML or a figure.
    kept : Kept, optional
        Keeps the examples in the run folder; those of a training that is gone on with are read from it.

    Attributes
    ----------
    examples : dict of int → Example
        By epoch.
    """

    def __init__(
        self,
        epochs: int,
        interactive: bool,
        example: Callable[[], Example] | None = None,
        show: Callable[[Mapping[int, Example]], Figure | str] | None = None,
        kept: Kept[Example] | None = None,
    ) -> None:
        self.example, self.show, self.interactive = example, show, interactive
        self.every = max(1, epochs // EXAMPLES)
        self.last = epochs
        self.kept = kept
        self.examples: dict[int, Example] = kept.load() if kept is not None else {}
        self.history = History()
        self._next = 0.0
        if interactive:
            self.text = ipywidgets.HTML('<p role="status">The curves begin with the first steps.</p>')
            self.picture = ipywidgets.Image(format="png", layout={**LAYOUT, "display": "none"})
            self.shown: Any = None
            display(ipywidgets.VBox([self.text, self.picture]))

    def step(self, entry: Mapping[str, float]) -> None:
        """Take a step's log entry (``on_step``); draw if it is time, and if there is a line to draw."""
        if not self.interactive:
            return
        self.history.steps.append(dict(entry))
        if len(self.history.steps) > 1 and time.monotonic() >= self._next:
            self._draw()

    def epoch(self, history: History) -> None:
        """Take the history after an epoch (``on_epoch``); ask for an example if its turn has come, and draw."""
        number = int(history.epochs[-1]["epoch"])
        if self.example is not None and (number % self.every == 0 or number == self.last):
            self.examples[number] = self.example()
            if self.kept is not None:
                self.kept.save(number, self.examples[number])
        if self.interactive:
            self.history = History(history.steps[:], history.epochs[:], best_epoch=history.best_epoch)
            self._draw()
            if self.show is not None and self.examples:
                self._show(self.show(self.examples))

    def finish(self, history: History) -> None:
        """After the training: take the example of its last epoch if it is not there (it stopped early, say)."""
        if self.example is not None and int(history.epochs[-1]["epoch"]) not in self.examples:
            self.last = int(history.epochs[-1]["epoch"])
            self.epoch(history)

    def _show(self, shown: Figure | str) -> None:
        # Displayed with the first example, so below the progress bar: above it, they would push it out of sight.
        if self.shown is None:
            self.shown = ipywidgets.HTML() if isinstance(shown, str) else ipywidgets.Image(format="png", layout=LAYOUT)
            display(self.shown)
        if isinstance(shown, str):
            self.shown.value = shown
        else:
            _put(self.shown, shown)

    def _draw(self) -> None:
        begin = time.monotonic()
        steps, epochs = self.history.steps, self.history.epochs
        _put(self.picture, live_curves(self.history))
        done = f"; {len(epochs)} of {self.last} epochs done" if epochs else ""
        told = f"step {int(steps[-1]['step'])}: loss {steps[-1]['loss']:.4f}, learning rate "
        self.text.value = f'<p role="status">{told}{steps[-1]["learning_rate"]:.2e}{done}</p>'
        end = time.monotonic()
        self._next = end + max(1.0, (end - begin) / SHARE)


def _put(picture: ipywidgets.Image, figure: Figure) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    picture.value = buffer.getvalue()
    picture.layout.display = ""


def live_curves(history: History) -> Figure:
    """Loss with its validation, and learning rate, of a training that may have just begun.

    Parameters
    ----------
    history : History
        At least one step; epochs may still be missing.
    """
    with matplotlib.rc_context(STYLE):
        figure = RecordFigure(8.0, 2.5)
        loss, rate = figure.subplots(1, 2)
        curves.plot_loss(loss, history, "", "C0")
        loss.legend()
        curves.plot_rate(rate, {"": history})
    return figure


def text_progress(examples: Mapping[int, pd.DataFrame]) -> str:
    """What the model said of the same slices after some of the epochs, as an HTML table; wrong facts are bold.

    Parameters
    ----------
    examples : mapping of int → DataFrame
        Epoch → `inference.example_texts`: columns file, slice, true, generated.
    """
    first = next(iter(examples.values()))
    rows: list[tuple[str, ...]] = []
    for number, (file, slice_num, true) in enumerate(zip(first["file"], first["slice"], first["true"], strict=True)):
        rows.append((f"{file}, slice {slice_num}", Markup("<i>true</i>"), true))
        for epoch, table in examples.items():
            rows.append(("", f"after epoch {epoch}", marked_text(true, table["generated"].iloc[number])))
    return html_table(("slice", "", "analysis"), rows)
