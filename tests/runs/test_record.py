"""Run records: written at once, whole, and true about failures."""

import errno
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from refusals import assert_refused

from mrilib import environment, files, progress
from mrilib.config import OutputParameters, ParameterError
from mrilib.display.style import RecordFigure
from mrilib.runs import record as record_module
from mrilib.training import history


@pytest.fixture(autouse=True)
def quiet_logger() -> Any:
    yield
    for handler in list(record_module.logger.handlers):
        record_module.logger.removeHandler(handler)
        handler.close()


def parameters(directory: Path) -> OutputParameters:
    return OutputParameters.create({"output_dir": str(directory), "interactive": False, "seed": 3})


def record(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "run.json").read_text())


def test_the_record_is_there_from_the_start(tmp_path: Path) -> None:
    run = record_module.start("explore", parameters(tmp_path / "a"))
    found = record(tmp_path / "a")
    assert found["status"] == "running" and found["name"] == "a" and found["planned"] == ["explore"]
    assert found["notebooks"]["explore"]["config"] == {
        "output_dir": str(tmp_path / "a"),
        "interactive": False,
        "seed": 3,
    }
    assert {"commit", "dirty"} == set(found["git"]) and found["versions"]["torch"] and found["hardware"]["cores"] >= 1
    (log,) = (tmp_path / "a" / "logs").iterdir()
    assert "01_explore_data starts in" in log.read_text()
    run.finish("explore", pictures=2)
    found = record(tmp_path / "a")
    assert found["status"] == "done" and found["notebooks"]["explore"]["pictures"] == 2
    assert found["updated"] >= found["started"]


def test_a_run_is_done_when_all_that_is_planned_is(tmp_path: Path) -> None:
    run = record_module.Run(tmp_path / "a", ["stage1", "stage2"])
    run.start("stage1", parameters(tmp_path))
    run.finish("stage1")
    assert record(tmp_path / "a")["status"] == "running"
    run = record_module.start("stage2", parameters(tmp_path / "a"))  # another process takes the record up
    assert record(tmp_path / "a")["notebooks"]["stage1"]["status"] == "done"
    run.finish("stage2", "failed", error="ValueError: no")
    assert record(tmp_path / "a")["status"] == "failed"
    run = record_module.start("stage2", parameters(tmp_path / "a"))
    assert record(tmp_path / "a")["status"] == "running"
    run.finish("stage2")
    assert record(tmp_path / "a")["status"] == "done"
    record_module.start("evaluate", parameters(tmp_path / "a"))
    assert record(tmp_path / "a")["planned"] == ["stage1", "stage2", "evaluate"]


def test_a_failing_cell_marks_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks: list[Any] = []
    shell = SimpleNamespace(events=SimpleNamespace(register=lambda event, hook: hooks.append(hook)))
    monkeypatch.setattr(progress, "ipython_shell", lambda: shell)
    record_module.start("explore", parameters(tmp_path / "a"))
    (hook,) = hooks
    hook(SimpleNamespace(error_in_exec=None, error_before_exec=None))
    assert record(tmp_path / "a")["status"] == "running"
    hook(SimpleNamespace(error_in_exec=ValueError("no such slice"), error_before_exec=None))
    found = record(tmp_path / "a")
    assert found["status"] == "failed" and found["notebooks"]["explore"]["error"] == "ValueError: no such slice"
    hook(SimpleNamespace(error_in_exec=KeyError("later"), error_before_exec=None))
    assert record(tmp_path / "a")["notebooks"]["explore"]["error"] == "ValueError: no such slice"
    record_module.start("explore", parameters(tmp_path / "b"))
    hooks[-1](SimpleNamespace(error_in_exec=MemoryError(), error_before_exec=None))  # it says nothing
    assert record(tmp_path / "b")["notebooks"]["explore"]["error"] == "MemoryError: "


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1, "ü": [None, True]})
    before = path.read_text()
    for bad in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            files.write_json(path, bad)
        assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert files.read_json(path) == {"a": 1, "ü": [None, True]}


def test_a_fact_that_json_cannot_hold_does_not_spoil_the_record(tmp_path: Path) -> None:
    run = record_module.start("explore", parameters(tmp_path / "a"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.note("explore", loss=float("inf"))
    run.finish("explore", "failed", error="loss is not finite")
    assert record(tmp_path / "a")["status"] == "failed"


def test_missing_and_damaged_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"x.json' does not exist"):
        files.read_json(tmp_path / "x.json")
    with pytest.raises(ParameterError, match="is no regular file"):
        files.read_json(tmp_path)
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(ParameterError, match=r"x.json' is not JSON"):
        files.read_json(tmp_path / "x.json")


def test_metrics_are_merged_by_section(tmp_path: Path) -> None:
    run = record_module.Run(tmp_path, ["evaluate"])
    run.update_metrics(reconstruction={"4": {"model": {"ssim": 0.5}}}, cost={"stage1_seconds": 1.0})
    run.update_metrics(cost={"stage2_seconds": 2.0})
    run.update_metrics(reconstruction={"8": {}})
    metrics = files.read_json(tmp_path / "metrics.json")
    assert metrics["cost"] == {"stage1_seconds": 1.0, "stage2_seconds": 2.0}
    assert set(metrics["reconstruction"]) == {"4", "8"}


def test_a_figure_gives_the_same_bytes_again(tmp_path: Path) -> None:
    run = record_module.Run(tmp_path, ["explore"])
    images = []
    for _ in range(2):
        figure = RecordFigure(4, 3)
        figure.add_subplot().plot([1, 2])
        images.append(run.save_figure(figure, "a/b").read_bytes())
    assert images[0] == images[1] and (tmp_path / "figures" / "a" / "b.png").is_file()


def test_json_lines_are_on_disk_line_by_line(tmp_path: Path) -> None:
    log = files.JsonLines(tmp_path / "logs" / "x.jsonl")
    log.write(step=1, loss=0.5)
    log.write(step=2, loss=float("nan"))
    lines = (tmp_path / "logs" / "x.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 1, "loss": 0.5} and len(lines) == 2
    log.close()
    log = files.JsonLines(tmp_path / "logs" / "x.jsonl")
    log.write(step=3)
    log.close()
    assert len((tmp_path / "logs" / "x.jsonl").read_text().splitlines()) == 3


def test_runs_are_listed_oldest_first(tmp_path: Path) -> None:
    for name, started in (("b", "2024-01-01T00:00:00+0000"), ("a", "2025-01-01T00:00:00+0000")):
        files.write_json(
            tmp_path / name / "run.json", {"started": started, "status": "done", "planned": [], "notebooks": {}}
        )
    (tmp_path / "no run").mkdir()
    assert [path.name for path in record_module.all_runs(tmp_path)] == ["b", "a"]
    assert record_module.all_runs(tmp_path / "none") == []


def test_an_empty_output_dir_makes_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_module, "resolve", lambda path: tmp_path / path)
    run = record_module.start("explore", OutputParameters.create({}))
    assert run.directory.parent == tmp_path / "outputs" and run.directory.name.startswith("explore-2")


def test_the_log_of_the_next_notebook_is_its_own(tmp_path: Path) -> None:
    for name in ("a", "b"):
        record_module.start("explore", parameters(tmp_path / name))
        logging.getLogger("mrilib").info("message for %s", name)
    texts = {name: next((tmp_path / name / "logs").iterdir()).read_text() for name in ("a", "b")}
    assert "message for a" in texts["a"] and "message for b" not in texts["a"] and "message for b" in texts["b"]


def test_versions_hardware_and_memory_are_plain() -> None:
    json.dumps([environment.versions(), environment.hardware(), environment.git_state()], allow_nan=False)
    assert environment.hardware()["memory_bytes"] > 1e8 and environment.peak_memory_bytes() > 1e7


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x80\xff\x00", ("is not JSON",)),
        (b"[" * 100_000, ("is not JSON",)),
        (b"9" * 5000, ("is not JSON",)),
        (b"[]", ("is not a run record",)),
        (b"null", ("is not a run record",)),
        (b'{"status": "done", "started": 5, "planned": [], "notebooks": {}}', ("is not a run record", "started")),
        (b'{"status": "done", "started": "x", "planned": ["x"], "notebooks": {}}', ("is not a run record", "planned")),
        (
            b'{"status": "done", "started": "x", "planned": [], "notebooks": {"stage1": 3}}',
            ("is not a run record", "notebooks/stage1"),
        ),
    ],
)
def test_a_damaged_record_is_refused_in_one_line(tmp_path, capsys, content: bytes, words: tuple[str, ...]) -> None:
    run = tmp_path / "a"
    run.mkdir()
    (run / "run.json").write_bytes(content)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "compare.yaml").write_text("runs: []")
    for command in (
        ["runs", str(tmp_path)],
        ["reconstruct", str(run), str(tmp_path / "x.h5")],
        ["run", str(tmp_path / "p"), "--name", str(run), "--resume"],
    ):
        assert_refused(command, (str(run / "run.json"), *words), capsys)


@pytest.mark.parametrize("line", [b'{"step": 2, "lo', b"\xff\xfe", b"[1]", b"null"])
def test_a_damaged_line_of_a_log_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n{"st')
    with pytest.raises(ParameterError, match=r"the log '.*x.jsonl' is damaged in line 2; delete the line"):
        files.read_json_lines(path)
    path.write_bytes(b'{"step": 1}\n{"st')  # a process that was killed left this
    assert files.read_json_lines(path) == [{"step": 1}]


def test_a_full_disk_is_told_with_the_files_name_and_the_run_is_marked_as_failed(tmp_path, monkeypatch) -> None:
    run = record_module.start("explore", parameters(tmp_path / "a"))
    write, reserve = Path.write_text, tmp_path / "a" / record_module.RESERVE
    assert reserve.stat().st_size >= 4 * (tmp_path / "a" / "run.json").stat().st_size

    def on_a_full_disk(path: Path, *arguments: Any, **options: Any) -> int:
        if reserve.exists():  # its room is all that can be had
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", on_a_full_disk)
    with pytest.raises(OSError, match=r"No space left on device\): '.*metrics.json'"):
        run.update_metrics(cost={})
    run.finish("explore", "failed", error="OSError: no space")
    assert record(tmp_path / "a")["status"] == "failed" and not reserve.exists()
    monkeypatch.undo()
    record_module.start("explore", parameters(tmp_path / "a")).finish("explore")
    assert record(tmp_path / "a")["status"] == "done" and not reserve.exists()


def test_a_log_that_cannot_be_written_says_so_once(tmp_path, capsys, monkeypatch):
    handler = record_module.LogFile(tmp_path / "x.log", encoding="utf-8")

    def full(text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(handler.stream, "write", full)
    for _ in range(3):
        handler.handle(logging.LogRecord("mrilib", logging.INFO, "", 0, "text", (), None))
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "x.log" in error and "No space left" in error


def test_a_table_of_epochs_on_a_full_disk_names_its_file(tmp_path, monkeypatch):
    history.write_epochs(tmp_path / "stage1.csv", [{"epoch": 1}])

    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space left.*stage1\.csv"):
        history.write_epochs(tmp_path / "stage1.csv", [{"epoch": 1}, {"epoch": 2}])
    assert history.read_epochs(tmp_path / "stage1.csv") == [{"epoch": 1.0}]
