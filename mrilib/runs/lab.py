"""Working copies of the notebooks for JupyterLab, so that the repository's own stay as they are.

``make lab`` calls ``python -m mrilib.runs.lab``.
"""

import shutil
from pathlib import Path

from mrilib.files import ROOT, display_path


def update_copies(source: Path, folder: Path) -> list[str]:
    """Copy new and changed notebooks; keep a copy that the user has worked in under another name.

    The unchanged originals are kept in ``.original``, to tell an edited copy from an outdated one.

    Parameters
    ----------
    source : Path
        The repository's notebooks.
    folder : Path
        The copies.

    Returns
    -------
    list of str
        One line for each copy that was replaced although it had been changed.
    """
    originals = folder / ".original"
    originals.mkdir(parents=True, exist_ok=True)
    notes = []
    for notebook in sorted(source.glob("*.ipynb")):
        copy, original = folder / notebook.name, originals / notebook.name
        if copy.exists() and original.exists() and original.read_bytes() == notebook.read_bytes():
            continue
        if copy.exists() and not (original.exists() and copy.read_bytes() == original.read_bytes()):
            number = 1
            while (kept := folder / f"{notebook.stem}-{number}.ipynb").exists():
                number += 1
            copy.rename(kept)
            notes.append(f"{notebook.name} has a new version; your changed copy is {display_path(kept)}")
        shutil.copyfile(notebook, copy)
        shutil.copyfile(notebook, original)
    return notes


if __name__ == "__main__":
    for line in update_copies(ROOT / "notebooks", ROOT / "lab"):
        print(line)
