"""Live view of a training in a notebook: growing curves, and examples of generated text or reconstructions.

A headless record shows nothing during training; the notebooks draw curves and examples at the end.
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
EXAMPLES = 4  # per training, evenly over its epochs
LAYOUT: Any = {"max_width": "100%", "align_self": "flex-start"}  # keeps a picture at its drawn size
DRAWING_SHARE = 0.05  # of the time that drawing may take


class ExampleStore(NamedTuple, Generic[Example]):
    """Storage of examples for resumed trainings, one npz file per epoch.

    Attributes
    ----------
    folder : Path
    pack : callable
        Converts an example to named arrays of numbers or texts.
    unpack : callable
        The inverse of `pack`.
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
        """Read the stored examples by epoch; a damaged file is skipped with a warning."""
        examples: dict[int, Example] = {}
        for path in self.folder.glob("epoch_*.npz"):
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    examples[int(path.stem.removeprefix("epoch_"))] = self.unpack(arrays)
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                logger.warning("%s cannot be read (%s): the example of this epoch is not shown", path, error)
        return dict(sorted(examples.items()))


def text_store(run: Path) -> ExampleStore[pd.DataFrame]:
    """Store stage 1's examples, from `inference.example_texts`, in a run folder."""
    return ExampleStore(
        run / "logs" / "stage1_examples",
        lambda table: {f"column.{name}": np.array(table[name].tolist()) for name in table},
        lambda arrays: pd.DataFrame({name.removeprefix("column."): arrays[name] for name in arrays}),
    )


def image_store(run: Path) -> ExampleStore[list[Comparison]]:
    """Store stage 2's examples, from `inference.preview` and so without scores and boxes, in a run folder."""

    def pack(rows: list[Comparison]) -> dict[str, Any]:
        arrays: dict[str, Any] = {}
        for number, row in enumerate(rows):
            values: dict[str, Any] = {"target": row.target, "maximum": row.maximum, "title": row.title}
            values |= {} if row.pixel is None else {"pixel": row.pixel}
            values |= {f"images.{name}": image for name, image in row.images.items()}
            arrays |= {f"{number}.{name}": _as_array(value) for name, value in values.items()}
        return arrays

    def unpack(arrays: Mapping[str, Any]) -> list[Comparison]:
        rows: list[Comparison] = []
        while f"{len(rows)}.target" in arrays:
            start = f"{len(rows)}."
            values = {name.removeprefix(start): arrays[name] for name in arrays if name.startswith(start)}
            rows.append(
                Comparison(
                    values["target"],
                    {name.removeprefix("images."): values[name] for name in values if name.startswith("images.")},
                    float(values["maximum"]),
                    title=str(values["title"]),
                    pixel=(float(values["pixel"][0]), float(values["pixel"][1])) if "pixel" in values else None,
                )
            )
        return rows

    return ExampleStore(run / "logs" / "stage2_examples", pack, unpack)


def _as_array(value: Any) -> Any:
    return np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)


class Monitor(Generic[Example]):
    """Callbacks of `loop.fit` that draw live curves if `interactive`, and collect examples.

    Parameters
    ----------
    epochs : int
        Number of epochs of the training.
    interactive : bool
        Show the widget.
    example : callable, optional
        Returns an example of the current model; called after about four of the epochs and after the last. It must not
        draw random numbers, which would change the training.
    show : callable, optional
        Converts the examples so far, epoch → example, to HTML or a figure.
    store : ExampleStore, optional
        Keeps the examples in the run folder; a resumed training reads the earlier ones from it.

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
        store: ExampleStore[Example] | None = None,
    ) -> None:
        self.example, self.show, self.store, self.interactive = example, show, store, interactive
        self.every = max(1, epochs // EXAMPLES)
        self.last = epochs
        self.examples: dict[int, Example] = store.load() if store is not None else {}
        self.history = History()
        self._next_drawing = 0.0
        if interactive:
            self.text = ipywidgets.HTML('<p role="status">The curves begin with the first steps.</p>')
            self.picture = ipywidgets.Image(format="png", layout={**LAYOUT, "display": "none"})
            self.example_widget: Any = None
            display(ipywidgets.VBox([self.text, self.picture]))

    def step(self, entry: Mapping[str, float]) -> None:
        """Record a step's log entry (``on_step``), and redraw the curves if it is time."""
        if not self.interactive:
            return
        self.history.steps.append(dict(entry))
        if len(self.history.steps) > 1 and time.monotonic() >= self._next_drawing:
            self._draw_curves()

    def epoch(self, history: History) -> None:
        """Record the history after an epoch (``on_epoch``), collect an example if it is due, and redraw."""
        number = int(history.epochs[-1]["epoch"])
        if self.example is not None and (number % self.every == 0 or number == self.last):
            self.examples[number] = self.example()
            if self.store is not None:
                self.store.save(number, self.examples[number])
        if self.interactive:
            self.history = History(history.steps[:], history.epochs[:], best_epoch=history.best_epoch)
            self._draw_curves()
            if self.show is not None and self.examples:
                self._draw_examples(self.show(self.examples))

    def finish(self, history: History) -> None:
        """Collect the example of the last epoch, if an early stop left it out."""
        number = int(history.epochs[-1]["epoch"])
        if self.example is not None and number not in self.examples:
            self.last = number
            self.epoch(history)

    def _draw_examples(self, content: Figure | str) -> None:
        # Displayed with the first example, and thus below the progress bar, so that the bar stays in view.
        if self.example_widget is None:
            is_text = isinstance(content, str)
            self.example_widget = ipywidgets.HTML() if is_text else ipywidgets.Image(format="png", layout=LAYOUT)
            display(self.example_widget)
        if isinstance(content, str):
            self.example_widget.value = content
        else:
            _show_figure(self.example_widget, content)

    def _draw_curves(self) -> None:
        begin = time.monotonic()
        step, epochs = self.history.steps[-1], len(self.history.epochs)
        _show_figure(self.picture, live_curves(self.history))
        state = f"step {int(step['step'])}: loss {step['loss']:.4f}, learning rate {step['learning_rate']:.2e}"
        done = f"; {epochs} of {self.last} epochs done" if epochs else ""
        self.text.value = f'<p role="status">{state}{done}</p>'
        end = time.monotonic()
        self._next_drawing = end + max(1.0, (end - begin) / DRAWING_SHARE)


def _show_figure(picture: ipywidgets.Image, figure: Figure) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    picture.value = buffer.getvalue()
    picture.layout.display = ""


def live_curves(history: History) -> RecordFigure:
    """Draw losses and learning rate of a training with at least one step; epochs may be missing."""
    with matplotlib.rc_context(STYLE):
        figure = RecordFigure(8.0, 2.5)
        loss, rate = figure.subplots(1, 2)
        curves.plot_loss(loss, history, "", "C0")
        loss.legend()
        curves.plot_rate(rate, {"": history})
    return figure


def text_progress(examples: Mapping[int, pd.DataFrame]) -> str:
    """Write an HTML table of the texts generated for the same slices after several epochs; wrong facts are bold.

    `examples` maps epoch → `inference.example_texts`, with columns file, slice, true and generated.
    """
    first = next(iter(examples.values()))
    rows: list[tuple[str, ...]] = []
    for number, (file, slice_num, true) in enumerate(zip(first["file"], first["slice"], first["true"], strict=True)):
        rows.append((f"{file}, slice {slice_num}", Markup("<i>true</i>"), true))
        for epoch, table in examples.items():
            rows.append(("", f"after epoch {epoch}", marked_text(true, table["generated"].iloc[number])))
    return html_table(("slice", "", "analysis"), rows)
