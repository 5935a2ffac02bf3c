"""Progress bars for terminals, notebooks and headless records, and the peak memory of a process."""

import logging
import sys
from typing import Any

logger = logging.getLogger("mrilib")


def ipython_shell() -> Any:
    """IPython's shell if this process runs in one, else None."""
    module = sys.modules.get("IPython")
    return module.get_ipython() if module else None


class _InPlace:
    """A text stream for tqdm that shows its last line in one notebook output, so that records hold no progress spam."""

    def __init__(self) -> None:
        from IPython.display import Code, display

        self.show = lambda text: Code(text, language="text")
        self.handle = display(self.show("…"), display_id=True)

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            self.handle.update(self.show(line))

    def flush(self) -> None:
        """Nothing is kept back."""


def progress_bar(total: int, description: str, interactive: bool = False, show: bool = True) -> Any:
    """A tqdm bar: a widget in an interactive notebook, one line in a headless record, the terminal elsewhere."""
    if not show:
        from tqdm import tqdm

        return tqdm(disable=True)
    if ipython_shell() is None:
        from tqdm import tqdm

        return tqdm(total=total, desc=description, dynamic_ncols=True)
    if interactive:
        from tqdm.notebook import tqdm as notebook_tqdm

        return notebook_tqdm(total=total, desc=description)
    from tqdm import tqdm

    return tqdm(total=total, desc=description, file=_InPlace(), mininterval=1.0, ncols=110, ascii=" ━")
