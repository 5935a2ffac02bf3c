"""The recorded state of the repository."""

import subprocess

from mrilib import environment


def test_records_and_data_do_not_make_the_code_dirty(tmp_path, monkeypatch):
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *arguments], cwd=tmp_path, check=True)

    for name in ("mrilib/code.py", "notebooks/a.ipynb", "outputs/reference/a.ipynb", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "first")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment.git_state()["dirty"] is False
    for name, is_dirty in (("outputs/reference/a.ipynb", False), ("README.md", False), ("notebooks/a.ipynb", True)):
        (tmp_path / name).write_text("2")
        assert environment.git_state()["dirty"] is is_dirty
    git("checkout", "-q", ".")
    (tmp_path / "mrilib" / "new.py").write_text("1")
    assert environment.git_state()["dirty"] is True


def test_there_is_no_state_without_git(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment.git_state() == {"commit": None, "dirty": None}
