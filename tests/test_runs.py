"""Run records: written at once, whole, and true about failures."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.figure
import pytest

from mrilib import runs
from mrilib.config import OutputParameters, ParameterError


@pytest.fixture(autouse=True)
def quiet_logger() -> Any:
    yield
    for handler in list(runs.logger.handlers):
        runs.logger.removeHandler(handler)
        handler.close()


def parameters(directory: Path) -> OutputParameters:
    return OutputParameters.create({"output_dir": str(directory), "interactive": False, "seed": 3})


def record(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "run.json").read_text())


def test_the_record_is_there_from_the_start(tmp_path: Path) -> None:
    run = runs.start("explore", parameters(tmp_path / "a"))
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
    run = runs.Run(tmp_path / "a", ["stage1", "stage2"])
    run.start("stage1", parameters(tmp_path))
    run.finish("stage1")
    assert record(tmp_path / "a")["status"] == "running"
    run = runs.start("stage2", parameters(tmp_path / "a"))  # another process takes the record up
    assert record(tmp_path / "a")["notebooks"]["stage1"]["status"] == "done"
    run.finish("stage2", "failed", error="ValueError: no")
    assert record(tmp_path / "a")["status"] == "failed"
    run = runs.start("stage2", parameters(tmp_path / "a"))
    assert record(tmp_path / "a")["status"] == "running"
    run.finish("stage2")
    assert record(tmp_path / "a")["status"] == "done"
    runs.start("evaluate", parameters(tmp_path / "a"))
    assert record(tmp_path / "a")["planned"] == ["stage1", "stage2", "evaluate"]


def test_a_failing_cell_marks_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks: list[Any] = []
    shell = SimpleNamespace(events=SimpleNamespace(register=lambda event, hook: hooks.append(hook)))
    monkeypatch.setattr(runs, "_ipython", lambda: shell)
    runs.start("explore", parameters(tmp_path / "a"))
    (hook,) = hooks
    hook(SimpleNamespace(error_in_exec=None, error_before_exec=None))
    assert record(tmp_path / "a")["status"] == "running"
    hook(SimpleNamespace(error_in_exec=ValueError("no such slice"), error_before_exec=None))
    found = record(tmp_path / "a")
    assert found["status"] == "failed" and found["notebooks"]["explore"]["error"] == "ValueError: no such slice"
    hook(SimpleNamespace(error_in_exec=KeyError("later"), error_before_exec=None))
    assert record(tmp_path / "a")["notebooks"]["explore"]["error"] == "ValueError: no such slice"
    runs.start("explore", parameters(tmp_path / "b"))
    hooks[-1](SimpleNamespace(error_in_exec=MemoryError(), error_before_exec=None))  # it says nothing
    assert record(tmp_path / "b")["notebooks"]["explore"]["error"] == "MemoryError: "


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    runs.write_json(path, {"a": 1, "ü": [None, True]})
    before = path.read_text()
    for bad in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            runs.write_json(path, bad)
        assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert runs.read_json(path) == {"a": 1, "ü": [None, True]}


def test_a_fact_that_json_cannot_hold_does_not_spoil_the_record(tmp_path: Path) -> None:
    run = runs.start("explore", parameters(tmp_path / "a"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.note("explore", loss=float("inf"))
    run.finish("explore", "failed", error="loss is not finite")
    assert record(tmp_path / "a")["status"] == "failed"


def test_missing_and_damaged_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"x.json' does not exist"):
        runs.read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(ParameterError, match=r"x.json' is not JSON"):
        runs.read_json(tmp_path / "x.json")


def test_metrics_are_merged_by_section(tmp_path: Path) -> None:
    run = runs.Run(tmp_path, ["evaluate"])
    run.update_metrics(reconstruction={"4": {"model": {"ssim": 0.5}}}, cost={"stage1_seconds": 1.0})
    run.update_metrics(cost={"stage2_seconds": 2.0})
    run.update_metrics(reconstruction={"8": {}})
    metrics = runs.read_json(tmp_path / "metrics.json")
    assert metrics["cost"] == {"stage1_seconds": 1.0, "stage2_seconds": 2.0}
    assert set(metrics["reconstruction"]) == {"4", "8"}


def test_a_figure_gives_the_same_bytes_again(tmp_path: Path) -> None:
    run = runs.Run(tmp_path, ["explore"])
    images = []
    for _ in range(2):
        figure = matplotlib.figure.Figure()
        figure.add_subplot().plot([1, 2])
        images.append(run.save_figure(figure, "a/b").read_bytes())
    assert images[0] == images[1] and (tmp_path / "figures" / "a" / "b.png").is_file()


def test_json_lines_are_on_disk_line_by_line(tmp_path: Path) -> None:
    log = runs.JsonLines(tmp_path / "logs" / "x.jsonl")
    log.write(step=1, loss=0.5)
    log.write(step=2, loss=float("nan"))
    lines = (tmp_path / "logs" / "x.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 1, "loss": 0.5} and len(lines) == 2
    log.close()
    log = runs.JsonLines(tmp_path / "logs" / "x.jsonl")
    log.write(step=3)
    log.close()
    assert len((tmp_path / "logs" / "x.jsonl").read_text().splitlines()) == 3


def test_runs_are_listed_oldest_first(tmp_path: Path) -> None:
    for name, started in (("b", "2024-01-01T00:00:00+0000"), ("a", "2025-01-01T00:00:00+0000")):
        runs.write_json(tmp_path / name / "run.json", {"started": started})
    (tmp_path / "no run").mkdir()
    assert [path.name for path in runs.all_runs(tmp_path)] == ["b", "a"]
    assert runs.all_runs(tmp_path / "none") == []


def test_an_empty_output_dir_makes_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "resolve", lambda path: tmp_path / path)
    run = runs.start("explore", OutputParameters.create({}))
    assert run.directory.parent == tmp_path / "outputs" and run.directory.name.startswith("explore-2")


def test_the_log_of_the_next_notebook_is_its_own(tmp_path: Path) -> None:
    for name in ("a", "b"):
        runs.start("explore", parameters(tmp_path / name))
        logging.getLogger("mrilib").info("message for %s", name)
    texts = {name: next((tmp_path / name / "logs").iterdir()).read_text() for name in ("a", "b")}
    assert "message for a" in texts["a"] and "message for b" not in texts["a"] and "message for b" in texts["b"]


def test_versions_hardware_and_memory_are_plain() -> None:
    json.dumps([runs.versions(), runs.hardware(), runs.git_state()], allow_nan=False)
    assert runs.hardware()["memory_bytes"] > 1e8 and runs.peak_memory_bytes() > 1e7
