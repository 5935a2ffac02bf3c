"""Working copies of the notebooks: current, and nothing that the user wrote is lost."""

from pathlib import Path

from mrilib.runs.lab import update_copies


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.ipynb")}


def test_copies_follow_the_repository_and_edits_are_kept(tmp_path):
    source, folder = tmp_path / "notebooks", tmp_path / "lab"
    source.mkdir()
    for name in ("a", "b"):
        (source / f"{name}.ipynb").write_text(f"{name}, version 1")
    assert update_copies(source, folder) == []
    assert contents(folder) == {"a.ipynb": "a, version 1", "b.ipynb": "b, version 1"}
    (folder / "a.ipynb").write_text("mine")
    assert update_copies(source, folder) == [] and contents(folder)["a.ipynb"] == "mine"  # nothing new to copy
    for name in ("a", "b"):
        (source / f"{name}.ipynb").write_text(f"{name}, version 2")
    (note,) = update_copies(source, folder)
    assert "a.ipynb has a new version" in note and "a-1.ipynb" in note
    assert contents(folder) == {"a.ipynb": "a, version 2", "a-1.ipynb": "mine", "b.ipynb": "b, version 2"}
    assert contents(source) == {"a.ipynb": "a, version 2", "b.ipynb": "b, version 2"}


def test_a_notebook_of_the_same_name_is_not_overwritten(tmp_path):
    source, folder = tmp_path / "notebooks", tmp_path / "lab"
    source.mkdir()
    folder.mkdir()
    (source / "a.ipynb").write_text("theirs")
    (folder / "a.ipynb").write_text("mine")
    assert len(update_copies(source, folder)) == 1
    assert contents(folder) == {"a.ipynb": "theirs", "a-1.ipynb": "mine"}
