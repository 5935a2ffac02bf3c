"""The executed notebooks in the repository are those of today's sources, made from a commit without changes."""

import json
from pathlib import Path

import nbformat
import pytest

from mrilib.config import NOTEBOOKS, ROOT
from mrilib.display.tables import runs_text

FOLDERS = sorted(
    path.parent for path in (ROOT / "outputs").glob("reference*/run.json") if "bench" not in path.parent.name
)
NOTEBOOK_FILES = [path for folder in FOLDERS for path in sorted(folder.glob("*.ipynb"))]
SOURCES = {stem: key for key, (stem, _) in NOTEBOOKS.items()}


def code(path: Path) -> list[str]:
    """Code cells without parameters, given or injected."""
    cells = nbformat.read(path, as_version=4).cells
    no_code = {"parameters", "injected-parameters"}
    return [c.source for c in cells if c.cell_type == "code" and not no_code & set(c.metadata.get("tags", []))]


def test_there_is_a_record_of_quickstart_and_demo() -> None:
    recorded = {SOURCES[path.stem] for path in NOTEBOOK_FILES}
    assert {"quickstart", "explore", "stage1", "stage2", "evaluate", "compare"} <= recorded


@pytest.mark.parametrize("path", NOTEBOOK_FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_record_has_the_code_of_its_source(path: Path) -> None:
    assert code(path) == code(ROOT / "notebooks" / path.name), "make record"
    assert path.stat().st_size <= 2_000_000


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_record_is_of_a_commit_without_changes(folder: Path) -> None:
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "done"
    assert all(section["git"]["dirty"] is False for section in record["notebooks"].values())


def test_the_table_of_runs_reads_every_record() -> None:
    """A fresh clone holds these records and no other runs."""
    text = runs_text(ROOT / "outputs")
    assert all(folder.name in text for folder in FOLDERS)
