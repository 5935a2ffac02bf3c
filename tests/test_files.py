"""Files are written completely or not at all, and damaged ones are named."""

import json
import os
from pathlib import Path

import pytest

from mrilib import files
from mrilib.config import ParameterError


def fail(*_, **__):
    raise OSError(28, "No space left on device")


def test_json_is_written_completely_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "x.json"
    files.write_json(path, {"a": 1, "ü": [None, True]})
    before = path.read_text()
    for bad in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            files.write_json(path, bad)
    assert path.read_text() == before and [p.name for p in path.parent.iterdir()] == ["x.json"]
    assert files.read_json(path) == {"a": 1, "ü": [None, True]}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises((OSError, KeyboardInterrupt)) as caught, files.atomic_write(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.txt"]
    if isinstance(error, OSError):
        assert caught.value.filename == str(path) and "No space left" in str(caught.value)


@pytest.mark.parametrize("failing", ["a", "b", "c"])
def test_several_files_are_written_together_or_not_at_all(tmp_path, monkeypatch, failing):
    replace, writers = os.replace, dict.fromkeys(("a", "b", "c"), lambda path: path.write_text("new"))
    monkeypatch.setattr(os, "replace", lambda old, new: fail() if Path(new).name == failing else replace(old, new))
    with pytest.raises(OSError, match="No space"):
        files.write_together(tmp_path, writers)
    monkeypatch.undo()
    with pytest.raises(OSError, match="No space"):
        files.write_together(tmp_path, writers | {failing: fail})
    assert not list(tmp_path.iterdir())


def test_missing_and_damaged_json_is_named(tmp_path):
    with pytest.raises(ParameterError, match=r"x.json' does not exist"):
        files.read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(ParameterError, match=r"x.json' is not JSON"):
        files.read_json(tmp_path / "x.json")


def test_json_lines_are_appended_and_flushed_line_by_line(tmp_path):
    path = tmp_path / "logs" / "x.jsonl"
    log = files.JsonLines(path)
    log.write(step=1, loss=0.5)
    log.write(step=2, loss=float("nan"))
    lines = path.read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 1, "loss": 0.5} and len(lines) == 2
    log.close()
    log = files.JsonLines(path)
    log.write(step=3)
    log.close()
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("line", [b'{"step": 2, "lo', b"\xff\xfe", b"[1]", b"null"])
def test_a_damaged_line_of_a_log_is_named(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n{"st')
    with pytest.raises(ParameterError, match=r"the log '.*x.jsonl' is damaged in line 2; delete the line"):
        files.read_json_lines(path)
    path.write_bytes(b'{"step": 1}\n{"st')  # left by a killed process
    assert files.read_json_lines(path) == [{"step": 1}]
