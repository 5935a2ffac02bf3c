"""Progress bars for terminals, notebooks and headless records."""

import sys
from typing import Any


def ipython_shell() -> Any:
    """Return the IPython shell that runs this process; None outside IPython."""
    module = sys.modules.get("IPython")
    return module.get_ipython() if module else None


class _NotebookLine:
    """Text stream for tqdm: one notebook output that shows the last line, so that records stay short."""

    def __init__(self) -> None:
        from IPython.display import Code, display

        self.show = lambda text: Code(text, language="text")
        self.handle = display(self.show("…"), display_id=True)

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            self.handle.update(self.show(line))

    def flush(self) -> None:
        """Do nothing: there is no buffer."""


def progress_bar(total: int, description: str, interactive: bool = False, show: bool = True) -> Any:
    """Return a tqdm bar: a widget in an interactive notebook, one line in a headless one, else in the terminal."""
    from tqdm import tqdm

    if not show:
        return tqdm(disable=True)
    if ipython_shell() is None:
        return tqdm(total=total, desc=description, dynamic_ncols=True)
    if interactive:
        from tqdm.notebook import tqdm as notebook_tqdm

        return notebook_tqdm(total=total, desc=description)
    return tqdm(total=total, desc=description, file=_NotebookLine(), mininterval=1.0, ncols=110, ascii=" ━")
