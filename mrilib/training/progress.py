"""Progress bar, log lines and callbacks of a training."""

import logging
from collections.abc import Callable
from typing import Any

from mrilib.files import read_json_lines
from mrilib.progress import progress_bar
from mrilib.training.history import History, read_history
from mrilib.training.state import TrainingState

logger = logging.getLogger("mrilib")


class TrainingProgress:
    """Shows the steps and epochs of a training.

    Parameters
    ----------
    state : TrainingState
    total_steps, epochs : int
        Of the whole training.
    interactive : bool
        Show a notebook's progress widget.
    on_step, on_epoch : callable, optional
        See `loop.fit`.
    """

    def __init__(
        self,
        state: TrainingState,
        total_steps: int,
        epochs: int,
        interactive: bool,
        on_step: Callable[[dict[str, float]], None] | None,
        on_epoch: Callable[[History], None] | None,
    ) -> None:
        self.state, self.total_steps, self.epochs, self.interactive = state, total_steps, epochs, interactive
        self.on_step, self.on_epoch = on_step, on_epoch
        self.is_main, self.name = state.accelerator.is_main_process, state.stage.name

    def __enter__(self) -> "TrainingProgress":
        """Open the progress bar at the present step; only the main process shows one."""
        self.bar: Any = progress_bar(self.total_steps, self.name, self.interactive, self.is_main)
        self.bar.update(self.state.step)
        return self

    def __exit__(self, *_: object) -> None:
        """Close the progress bar."""
        self.bar.close()

    def show_step(self, entry: dict[str, float]) -> None:
        """Show a step's entry of the step log."""
        if not self.is_main:
            return
        self._show(entry)
        if entry["step"] % self.state.config.log_interval == 0 or entry["step"] == self.total_steps:
            logger.info(
                "%s epoch %d/%d step %d/%d loss %.4f lr %.2e gradient norm %.3f, %.2f s/step",
                *(self.name, entry["epoch"], self.epochs, entry["step"], self.total_steps, entry["loss"]),
                *(entry["learning_rate"], entry["gradient_norm"], entry["seconds"]),
            )

    def _show(self, entry: dict[str, float]) -> None:
        self.bar.set_postfix(loss=f"{entry['loss']:.4f}", lr=f"{entry['learning_rate']:.1e}", refresh=False)
        self.bar.update()
        if self.on_step is not None:
            self.on_step(entry)

    def log_epoch(self, row: dict[str, float]) -> None:
        """Log the losses and metrics of an epoch."""
        values = " ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "epoch")
        logger.info("%s epoch %d/%d %s", self.name, row["epoch"], self.epochs, values)

    def show_epoch(self) -> None:
        """Pass the history to `on_epoch`."""
        if self.is_main and self.on_epoch is not None:
            self.on_epoch(self.state.history)

    def follow(self) -> None:
        """Show the steps and epochs that the training processes have logged since the last call."""
        state = self.state
        for entry in read_json_lines(state.steps_path):
            if entry["step"] > state.step:
                state.step = int(entry["step"])
                state.history.steps.append(entry)
                self._show(entry)
        logged = read_history(state.directory, self.name)
        if logged is not None and len(logged.epochs) > len(state.history.epochs):
            state.history.epochs = logged.epochs
            state.history.best_epoch, state.history.best_loss = logged.best_epoch, logged.best_loss
            self.show_epoch()
