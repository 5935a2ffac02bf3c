"""Charts of what the backbone and the loader cost."""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mrilib.comparison.loader_speed import OURS
from mrilib.config import BenchmarkParameters
from mrilib.display.style import BLUE, GREY, ORANGE, WIDTH, RecordFigure, styled


@styled
def chart(found: dict[str, Any], config: BenchmarkParameters) -> Figure:
    """Cost of a token over the sequence, of a prefill, and memory for a backward pass."""
    figure = RecordFigure(WIDTH, 3.0)
    left, middle, right = figure.subplots(1, 3, width_ratios=[2, 1.2, 1.2])
    pre, dec, back, steps = (found[name] for name in ("prefill", "decoding", "backward", "steps"))
    left.plot([1e3 * s for s in steps["seconds"]], color=BLUE, linewidth=0.8, label="with the cache")
    whole = 1e3 * dec["recompute_seconds"] / config.new_tokens
    span = [config.prefix_tokens, config.prefix_tokens + config.new_tokens]
    left.plot(span, [whole] * 2, color=ORANGE, label="recomputing, mean")
    left.set(yscale="log", xlabel="token", ylabel="time of one token [ms]", title="Decoding")
    left.legend()
    names = {"nirvana_seconds": "Nirvana", "llama_seconds": "Llama", "matmul_seconds": "its products"}
    _bars(middle, {names[k]: pre[k] for k in names}, f"Prefill of {config.prefill_tokens} tokens", "[s]")
    kinds = {"trainable": "trainable", "frozen": "frozen", "recomputed": "recomputing"}
    values = {label: back[f"{kind}_bytes"] / 2**20 for kind, label in kinds.items()}
    _bars(right, values, "Kept for backward", "[MiB]")
    return figure


def _bars(axes: Axes, values: dict[str, float], title: str, unit: str) -> None:
    axes.bar(list(values), list(values.values()), color=[BLUE, ORANGE, GREY])
    axes.bar_label(axes.containers[0], fmt="%.3g")  # type: ignore[arg-type]
    axes.set(title=title, ylabel=unit)
    axes.tick_params(axis="x", labelrotation=20)


@styled
def speed_bars(table: pd.DataFrame) -> RecordFigure:
    """Slices a second of each way as bars, from `compare`."""
    figure = RecordFigure(WIDTH, 2.4)
    axis = figure.add_subplot()
    names, rates = list(table.index), table["slices a second"].to_numpy()
    bars = axis.barh(names, rates, color=[BLUE if name == OURS else GREY for name in names])
    axis.bar_label(bars, [f"{rate:.1f}" for rate in rates], padding=3)
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("slices a second, one process")
    axis.margins(x=0.12)
    return figure
