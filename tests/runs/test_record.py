"""Run records: written from the start, atomically, with failures."""

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


def config(directory: Path) -> OutputParameters:
    return OutputParameters.create({"output_dir": str(directory), "interactive": False, "seed": 3})


def record(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "run.json").read_text())


def test_the_record_exists_from_the_start(tmp_path):
    run = record_module.start("explore", config(tmp_path / "a"))
    contents = record(tmp_path / "a")
    assert contents["status"] == "running" and contents["name"] == "a" and contents["planned"] == ["explore"]
    assert contents["notebooks"]["explore"]["config"] == {
        "output_dir": str(tmp_path / "a"),
        "interactive": False,
        "seed": 3,
    }
    assert (
        {"commit", "dirty"} == set(contents["git"])
        and contents["versions"]["torch"]
        and contents["hardware"]["cores"] >= 1
    )
    (log,) = (tmp_path / "a" / "logs").iterdir()
    assert "01_explore_data starts in" in log.read_text()
    run.finish("explore", pictures=2)
    contents = record(tmp_path / "a")
    assert contents["status"] == "done" and contents["notebooks"]["explore"]["pictures"] == 2
    assert contents["updated"] >= contents["started"]


def test_a_run_is_done_when_all_planned_notebooks_are(tmp_path):
    run = record_module.Run(tmp_path / "a", ["stage1", "stage2"])
    run.start("stage1", config(tmp_path))
    run.finish("stage1")
    assert record(tmp_path / "a")["status"] == "running"
    run = record_module.start("stage2", config(tmp_path / "a"))  # as by another process
    assert record(tmp_path / "a")["notebooks"]["stage1"]["status"] == "done"
    run.finish("stage2", "failed", error="ValueError: no")
    assert record(tmp_path / "a")["status"] == "failed"
    run = record_module.start("stage2", config(tmp_path / "a"))
    assert record(tmp_path / "a")["status"] == "running"
    run.finish("stage2")
    assert record(tmp_path / "a")["status"] == "done"
    record_module.start("evaluate", config(tmp_path / "a"))
    assert record(tmp_path / "a")["planned"] == ["stage1", "stage2", "evaluate"]


def test_an_error_in_a_cell_marks_the_run_as_failed(tmp_path, monkeypatch):
    hooks: list[Any] = []
    shell = SimpleNamespace(events=SimpleNamespace(register=lambda event, hook: hooks.append(hook)))
    monkeypatch.setattr(progress, "ipython_shell", lambda: shell)
    record_module.start("explore", config(tmp_path / "a"))
    (hook,) = hooks
    hook(SimpleNamespace(error_in_exec=None, error_before_exec=None))
    assert record(tmp_path / "a")["status"] == "running"
    hook(SimpleNamespace(error_in_exec=ValueError("no such slice"), error_before_exec=None))
    contents = record(tmp_path / "a")
    assert contents["status"] == "failed" and contents["notebooks"]["explore"]["error"] == "ValueError: no such slice"
    hook(SimpleNamespace(error_in_exec=KeyError("later"), error_before_exec=None))
    assert record(tmp_path / "a")["notebooks"]["explore"]["error"] == "ValueError: no such slice"
    record_module.start("explore", config(tmp_path / "b"))
    hooks[-1](SimpleNamespace(error_in_exec=MemoryError(), error_before_exec=None))  # without a message
    assert record(tmp_path / "b")["notebooks"]["explore"]["error"] == "MemoryError: "


def test_a_value_that_json_cannot_hold_does_not_damage_the_record(tmp_path):
    run = record_module.start("explore", config(tmp_path / "a"))
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


def test_metrics_are_merged_by_section(tmp_path):
    run = record_module.Run(tmp_path, ["evaluate"])
    run.update_metrics(reconstruction={"4": {"model": {"ssim": 0.5}}}, cost={"stage1_seconds": 1.0})
    run.update_metrics(cost={"stage2_seconds": 2.0})
    run.update_metrics(reconstruction={"8": {}})
    metrics = files.read_json(tmp_path / "metrics.json")
    assert metrics["cost"] == {"stage1_seconds": 1.0, "stage2_seconds": 2.0}
    assert set(metrics["reconstruction"]) == {"4", "8"}


def test_a_figure_gives_the_same_bytes_twice(tmp_path):
    run = record_module.Run(tmp_path, ["explore"])
    images = []
    for _ in range(2):
        figure = RecordFigure(4, 3)
        figure.add_subplot().plot([1, 2])
        images.append(run.save_figure(figure, "a/b").read_bytes())
    assert images[0] == images[1] and (tmp_path / "figures" / "a" / "b.png").is_file()


def test_runs_are_listed_oldest_first(tmp_path):
    for name, started in (("b", "2024-01-01T00:00:00+0000"), ("a", "2025-01-01T00:00:00+0000")):
        files.write_json(
            tmp_path / name / "run.json", {"started": started, "status": "done", "planned": [], "notebooks": {}}
        )
    (tmp_path / "no run").mkdir()
    assert [path.name for path in record_module.all_runs(tmp_path)] == ["b", "a"]
    assert record_module.all_runs(tmp_path / "none") == []


def test_an_empty_output_dir_creates_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(record_module, "resolve", lambda path: tmp_path / path)
    run = record_module.start("explore", OutputParameters.create({}))
    assert run.directory.parent == tmp_path / "outputs" and run.directory.name.startswith("explore-2")


def test_each_notebook_has_its_own_log(tmp_path):
    for name in ("a", "b"):
        record_module.start("explore", config(tmp_path / name))
        logging.getLogger("mrilib").info("message for %s", name)
    texts = {name: next((tmp_path / name / "logs").iterdir()).read_text() for name in ("a", "b")}
    assert "message for a" in texts["a"] and "message for b" not in texts["a"] and "message for b" in texts["b"]


def test_versions_hardware_and_memory_fit_into_json() -> None:
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


def test_on_a_full_disk_the_error_names_the_file_and_the_run_is_recorded_as_failed(tmp_path, monkeypatch) -> None:
    run = record_module.start("explore", config(tmp_path / "a"))
    write, reserve = Path.write_text, tmp_path / "a" / record_module.RESERVE
    assert reserve.stat().st_size >= 4 * (tmp_path / "a" / "run.json").stat().st_size

    def on_a_full_disk(path: Path, *arguments: Any, **options: Any) -> int:
        if reserve.exists():  # no other space is left
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", on_a_full_disk)
    with pytest.raises(OSError, match=r"No space left on device\): '.*metrics.json'"):
        run.update_metrics(cost={})
    run.finish("explore", "failed", error="OSError: no space")
    assert record(tmp_path / "a")["status"] == "failed" and not reserve.exists()
    monkeypatch.undo()
    record_module.start("explore", config(tmp_path / "a")).finish("explore")
    assert record(tmp_path / "a")["status"] == "done" and not reserve.exists()


def test_a_log_that_cannot_be_written_is_reported_once(tmp_path, capsys, monkeypatch):
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
