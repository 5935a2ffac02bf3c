"""Figures of notebook 07: cost of the backbone and speed of the loader."""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from mrilib.comparison.loader_speed import OURS, RATE
from mrilib.config import CostParameters
from mrilib.display.style import BLUE, GREY, ORANGE, WIDTH, RecordFigure, styled


@styled
def backbone_chart(costs: dict[str, Any], config: CostParameters) -> RecordFigure:
    """Draw the times of decoding and prefill, and the memory of a backward pass, from `backbone_speed.measure`."""
    figure = RecordFigure(WIDTH, 3.0)
    left, middle, right = figure.subplots(1, 3, width_ratios=[2, 1.2, 1.2])
    left.plot([1e3 * s for s in costs["steps"]["seconds"]], color=BLUE, linewidth=0.8, label="with the cache")
    recomputing = 1e3 * costs["decoding"]["recompute_seconds"] / config.new_tokens
    span = [config.prefix_tokens, config.prefix_tokens + config.new_tokens]
    left.plot(span, [recomputing] * 2, color=ORANGE, label="recomputing the sequence, mean")
    left.set(yscale="log", xlabel="token", ylabel="time per token [ms]", title="decoding")
    left.legend()
    labels = {"nirvana_seconds": "Nirvana", "llama_seconds": "Llama", "matmul_seconds": "matrix products"}
    times = {label: costs["prefill"][name] for name, label in labels.items()}
    _bars(middle, times, f"prefill of {config.prefill_tokens} tokens", "time [s]")
    labels = {"trainable": "trainable", "frozen": "frozen", "recomputed": "checkpointing"}
    sizes = {label: costs["backward"][f"{name}_bytes"] / 2**20 for name, label in labels.items()}
    _bars(right, sizes, "activations kept for backward", "memory [MiB]")
    return figure


def _bars(axes: Axes, values: dict[str, float], title: str, label: str) -> None:
    axes.bar(list(values), list(values.values()), color=[BLUE, ORANGE, GREY])
    axes.bar_label(axes.containers[0], fmt="%.3g")  # type: ignore[arg-type]
    axes.set(title=title, ylabel=label)
    axes.tick_params(axis="x", labelrotation=20)


@styled
def loader_chart(table: pd.DataFrame) -> RecordFigure:
    """Draw the slices per second of each loader, from `loader_speed.compare`."""
    figure = RecordFigure(WIDTH, 2.4)
    axis = figure.add_subplot()
    names, rates = list(table.index), table[RATE].to_numpy()
    bars = axis.barh(names, rates, color=[BLUE if name == OURS else GREY for name in names])
    axis.bar_label(bars, [f"{rate:.1f}" for rate in rates], padding=3)
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("slices per second, one process")
    axis.margins(x=0.12)
    return figure
