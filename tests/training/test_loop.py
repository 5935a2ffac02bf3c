"""The training loop under interruption: stop requests, NaN losses, lack of memory or disk, several processes."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import pytest
import systems
import torch
import yaml
from refusals import assert_refused

from mrilib import files, processes
from mrilib.config import ROOT, ParameterError, Stage1Parameters
from mrilib.data.fastmri_file import DataError
from mrilib.files import read_json_lines
from mrilib.model import two_stage
from mrilib.training import device, distributed, loop, stages
from mrilib.training.checkpoint import load_checkpoint
from mrilib.training.distributed import TrainingStopped
from mrilib.training.history import History, read_epochs
from mrilib.training.resume import data_content
from mrilib.training.state import TrainingState

RESUME = "stage1_checkpoints/stage1_resume.pt"


@pytest.fixture
def config(phantom_dir: Path, backbone_dir: Path) -> Stage1Parameters:
    """One epoch of three steps."""
    return systems.stage1_config(
        phantom_dir, backbone_dir, epochs=1, max_train_slices=9, max_val_slices=3, train_control=False
    )


def changed(config: Stage1Parameters, **values: Any) -> Stage1Parameters:
    return config.model_copy(update=values)


def stage_of(config: Stage1Parameters, cls: type[stages.AnalysisStage] = stages.AnalysisStage) -> stages.Stage:
    device.prepare(config)
    return cls(systems.build(config), "stage1", config.label_smoothing)


def fit(
    config: Stage1Parameters,
    directory: Path,
    cls: type[stages.AnalysisStage] = stages.AnalysisStage,
    **options: Any,
) -> History:
    return loop.fit(stage_of(config, cls), config, *systems.loaders(config), directory, **options)


def saved_step(directory: Path) -> int:
    return load_checkpoint(directory / RESUME, "stage1")["step"]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(directory / "stage1_checkpoints" / "stage1_final_model.pt", "stage1")["weights"]


def are_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class NaNLoss(stages.AnalysisStage):
    """The loss of the third batch is NaN."""

    calls = 0

    def loss(self, batch: Any) -> Any:
        self.calls += 1
        result = super().loss(batch)
        return result._replace(total=result.total * float("nan")) if self.calls == 3 else result


class InfiniteLoss(stages.AnalysisStage):
    def loss(self, batch: Any) -> Any:
        result = super().loss(batch)
        return result._replace(total=result.total * float("inf"))


class Interrupted(stages.AnalysisStage):
    """The user interrupts the third batch."""

    calls = 0

    def loss(self, batch: Any) -> Any:
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return super().loss(batch)


class OutOfMemory(stages.AnalysisStage):
    """Allocates more memory than there is for more than `slices` slices at once."""

    slices = 1

    def loss(self, batch: Any) -> Any:
        if len(batch.slices) > self.slices:
            torch.empty(2**60)
        return super().loss(batch)


class OutOfMemoryAlways(OutOfMemory):
    slices = 0


class OutOfMemoryInValidation(stages.AnalysisStage):
    def score(self, batch: Any) -> list[dict[str, Any]]:
        torch.empty(2**60)
        return super().score(batch)


class WorkersKilled(stages.AnalysisStage):
    """Kills the processes that load data."""

    def loss(self, batch: Any) -> Any:
        for child in multiprocessing.active_children():
            child.kill()
        return super().loss(batch)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stopped_training_resumes_to_the_same_weights(config, tmp_path, optimizer):
    entries, config = [], changed(config, optimizer=optimizer)
    fit(config, tmp_path / "whole", on_step=entries.append)
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    run = tmp_path / "stopped"
    with pytest.raises(TrainingStopped, match="after step 2"):
        fit(config, run, on_step=lambda entry: entry["step"] == 2 and processes.request_stop(run, "x"))
    (run / processes.STOP_FILE).unlink()
    with pytest.raises(ParameterError, match=r"holds an unfinished training of stage1; set resume: true"):
        fit(config, run)
    with pytest.raises(ParameterError, match=r"was begun with learning_rate: 0.0003 \(now 0.1\)"):
        fit(changed(config, resume=True, learning_rate=0.1), run)
    resumed = fit(changed(config, resume=True), run)
    assert [entry["step"] for entry in resumed.steps] == [1, 2, 3]
    assert are_equal(weights(run), weights(tmp_path / "whole"))
    with pytest.raises(ParameterError, match="holds a finished training"):
        fit(config, run)
    stage = stage_of(config)
    loaded = loop.fit(stage, changed(config, resume=True), *systems.loaders(config), run)
    assert loaded.epochs == resumed.epochs and are_equal(dict(stage.part.state_dict()), weights(run))


class Killed(BaseException):
    """Stands for the end of the process."""


def test_killed_right_after_the_last_checkpoint_or_the_final_model(config, tmp_path, monkeypatch):
    save = TrainingState.save_to_resume

    def save_and_die(state: TrainingState) -> None:
        save(state)
        if state.epoch == config.epochs:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TrainingState, "save_to_resume", save_and_die)
        fit(changed(config, checkpoint_minutes=0), tmp_path)
    content = (tmp_path / RESUME).read_bytes()
    history = fit(changed(config, resume=True), tmp_path)
    assert read_epochs(tmp_path / "logs" / "stage1_history.csv") == history.epochs
    (tmp_path / RESUME).write_bytes(content)  # as if killed before it was deleted
    fit(changed(config, resume=True), tmp_path)
    assert not (tmp_path / RESUME).exists()


def test_keyboard_interrupt_saves_the_last_step(config, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(config, tmp_path, Interrupted)
    assert saved_step(tmp_path) == 2


def test_failed_processes_are_distinguished_from_stopped_ones(config, tmp_path, monkeypatch):
    """If one process fails, the launcher ends the others by SIGTERM, and these write the stop file."""
    stop = tmp_path / processes.STOP_FILE
    monkeypatch.setattr(distributed, "launch_command", lambda *_: [sys.executable, "-c", code])

    def launch() -> None:
        list(distributed.train_in_processes(stage_of(config), changed(config, num_processes=2), tmp_path))

    code = f"import sys; open({str(stop)!r}, 'w').close(); print('error: file_brain.h5 cannot be read'); sys.exit(1)"
    with pytest.raises(RuntimeError, match=r"2 training processes failed, error: file_brain.h5 cannot be read; see"):
        launch()
    assert not stop.exists()
    code = "import sys; print('[rank1]: Traceback (most recent call last):\\n[rank1]: KeyError: 7'); sys.exit(1)"
    with pytest.raises(RuntimeError, match=r"processes failed, error: KeyError: 7; see"):
        launch()
    code = f"import sys; open({str(stop)!r}, 'w').close(); print('stopped: stage1 was stopped'); sys.exit(130)"
    with pytest.raises(TrainingStopped, match="resume: true continues it"):
        launch()


def test_error_of_a_log_names_the_file():
    log = files.JsonLines(Path("/dev/full"))
    with pytest.raises(OSError, match=r"the log '/dev/full' could not be written: .*No space left"):
        log.write(step=1)
    log.close()


def test_nan_loss_stops_with_the_state_before_it_saved(config, tmp_path):
    with pytest.raises(FloatingPointError, match=r"epoch 1, step 3: loss nan.*file_brain_AX.* slice \d.*learning_rate"):
        fit(config, tmp_path, NaNLoss)
    assert saved_step(tmp_path) == 2
    fit(changed(config, resume=True), tmp_path)
    assert [entry["step"] for entry in read_json_lines(tmp_path / "logs" / "stage1.jsonl")] == [1, 2, 3]


def test_nan_losses_are_skipped_and_counted(config, tmp_path):
    assert fit(changed(config, max_train_slices=6), tmp_path / "two").skipped == 0
    history = fit(changed(config, on_nan="skip"), tmp_path / "three", NaNLoss)
    assert history.skipped == 1 and history.epochs[0]["skipped_steps"] == 1
    assert read_epochs(tmp_path / "three" / "logs" / "stage1_history.csv")[0]["skipped_steps"] == 1
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "three").values())
    with pytest.raises(FloatingPointError, match="every step was skipped"):
        fit(changed(config, on_nan="skip"), tmp_path / "none", InfiniteLoss)


def test_lack_of_memory_halves_the_batch(config, tmp_path):
    whole = fit(config, tmp_path / "whole")
    halved = fit(config, tmp_path / "halved", OutOfMemory)
    state = load_checkpoint(tmp_path / "halved" / "stage1_checkpoints" / "stage1_final_model.pt", "stage1")
    assert state["micro_batch"] == 1
    for name in ("loss", "gradient_norm", "cross_entropy", "token_accuracy"):
        values = [[entry[name] for entry in history.steps] for history in (halved, whole)]
        assert values[0] == pytest.approx(values[1], rel=1e-4)


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (OutOfMemoryAlways, r"on a single slice.*batch_size.*activation_checkpointing"),
        (OutOfMemoryInValidation, r"validation of epoch 1: out of memory on \d slices.*batch_size"),
    ],
)
def test_lack_of_memory_names_the_parameters_to_change(config, tmp_path, cls, words):
    with pytest.raises(MemoryError, match=words):
        fit(config, tmp_path, cls)


def test_missing_data_file_is_named_and_the_state_is_saved(config, tmp_path):
    loaders = systems.loaders(config)
    volumes = loaders[0].dataset.volumes

    def move_away(entry: dict[str, float]) -> None:
        volumes[:] = [volume._replace(path=tmp_path / "gone" / volume.path.name) for volume in volumes]

    with pytest.raises(ValueError, match=r"file_brain_AX.*\.h5, slice \d: cannot be read"):
        loop.fit(stage_of(config), config, *loaders, tmp_path / "run", on_step=move_away)
    assert saved_step(tmp_path / "run") == 1
    fit(changed(config, resume=True), tmp_path / "run")


def test_full_disk_leaves_the_previous_checkpoint_intact(config, tmp_path):
    config = changed(config, checkpoint_minutes=0)

    def fill(entry: dict[str, float]) -> None:
        if entry["step"] == 2:
            (tmp_path / f"{RESUME}.part").symlink_to("/dev/full")

    with pytest.raises(OSError, match=r"No space left on device.*the previous one is intact"):
        fit(config, tmp_path, on_step=fill)
    assert saved_step(tmp_path) == 1
    assert len(fit(changed(config, resume=True), tmp_path).steps) == 3


def test_unwritable_checkpoint_folder_is_an_error(config, tmp_path):
    (tmp_path / "stage1_checkpoints").write_text("a file in place of the folder")
    with pytest.raises(OSError, match=r"a checkpoint could not be written: .*there is no previous one"):
        fit(config, tmp_path)


LOCK = "import sys, pathlib; from mrilib import processes as p; p.lock_run(pathlib.Path(sys.argv[1]), wait=0)"


def test_second_process_is_refused(tmp_path):
    processes.lock_run(tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != processes.RUN_VARIABLE}
    command = [sys.executable, "-c", LOCK, str(tmp_path)]
    other = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert other.returncode and f"is in use by process {os.getpid()}" in other.stderr
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)  # belongs to this run
    assert child.returncode == 0, child.stderr


def test_unlocked_folder_can_be_locked_by_others_and_again(tmp_path):
    """A notebook ends, another process resumes in its folder, and the notebook runs again."""
    processes.lock_run(tmp_path)
    processes.unlock_run(tmp_path)
    command = [sys.executable, "-c", f"{LOCK}; input()", str(tmp_path)]
    other = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, text=True)
    while not (tmp_path / ".lock").read_text().startswith(f"process {other.pid} "):
        assert other.poll() is None
        time.sleep(0.05)
    with pytest.raises(ParameterError, match=f"is in use by process {other.pid}"):
        processes.lock_run(tmp_path, wait=0)
    other.communicate("\n")
    processes.lock_run(tmp_path)


def test_old_epoch_checkpoints_are_deleted_but_not_a_users_copies(config, tmp_path):
    copy = tmp_path / "stage1_checkpoints" / "stage1_epoch_1_mine.pt"
    copy.parent.mkdir()
    copy.touch()
    fit(changed(config, epochs=3, save_interval=1, max_checkpoints=2), tmp_path)
    names = {path.name for path in (tmp_path / "stage1_checkpoints").iterdir()}
    assert names == {
        f"stage1_{name}.pt" for name in ("best_model", "final_model", "epoch_2", "epoch_3", "epoch_1_mine")
    }


class ScaledLoss(stages.AnalysisStage):
    def loss(self, batch: Any) -> stages.BatchLoss:
        result = super().loss(batch)
        return stages.BatchLoss(2 * result.total, {**result.statistics, "plain": float(result.total.detach())})


class SampledFractionEncoder(torch.nn.Module):
    """K-space tokens (B, N + 2, hidden) from the sampled fraction alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = torch.nn.Linear(1, width)

    def forward(self, kspace: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        fraction = mask.float().mean(1)[:, None, None]
        return self.map(fraction).expand(-1, (systems.SIZE // 16) ** 2 + 2, -1)


def test_custom_loss_and_custom_encoder(config, tmp_path):
    stage = stage_of(config, ScaledLoss)
    stage.model.encoder = SampledFractionEncoder(two_stage.hidden_size(stage.model.backbone))
    history = loop.fit(stage, config, *systems.loaders(config), tmp_path)
    assert history.steps[0]["gradient_norm_map"] > 0
    assert history.steps[0]["loss"] * 3 < 2 * history.steps[0]["plain"]  # per token, not per slice


def test_two_processes_take_the_same_steps_as_one(config, tmp_path):
    """`fit` starts accelerate launch, with gloo because there is no GPU."""
    one = changed(config, gradient_accumulation_steps=4, batch_size=1, epochs=2, output_dir=str(tmp_path / "one"))
    single = fit(one, tmp_path / "one")
    two = changed(one, gradient_accumulation_steps=2, num_processes=2)
    stage = stage_of(two)
    shown: list[dict[str, float]] = []
    double = loop.fit(stage, two, *systems.loaders(two), tmp_path / "two", on_step=shown.append)
    assert len(double.steps) == len(single.steps) == len(shown) and len(double.epochs) == 2
    for name in ("loss", "gradient_norm", "learning_rate", "cross_entropy"):
        values = [[entry[name] for entry in history.steps] for history in (double, single)]
        assert values[0] == pytest.approx(values[1], rel=1e-3)
    assert [e["val_loss"] for e in double.epochs] == pytest.approx([e["val_loss"] for e in single.epochs], rel=1e-4)
    for name, value in weights(tmp_path / "two").items():
        torch.testing.assert_close(value, weights(tmp_path / "one")[name], rtol=1e-2, atol=1e-4)
    assert are_equal(dict(stage.part.state_dict()), weights(tmp_path / "two"))


def test_train_command_refuses_without_changing_the_folder(config, tmp_path, capsys):
    from mrilib.__main__ import main

    params = tmp_path / "stage1.yaml"
    params.write_text(yaml.safe_dump({**config.to_dict(), "output_dir": str(tmp_path / "run")}))
    arguments = ["train", str(params), "--stage", "1"]
    assert main([*arguments, "-p", "epochs=2"]) == 0
    record = (tmp_path / "run" / "run.json").read_text()
    section = json.loads(record)["notebooks"]["stage1"]
    assert json.loads(record)["status"] == "done" and section["config"]["epochs"] == 2 and section["best_epoch"]
    logs = set((tmp_path / "run" / "logs").iterdir())
    for more, words in (
        ([], ("holds a finished training",)),
        (["--resume"], ("was begun with epochs: 2 (now 1)",)),
        (["--resume", "-p", "epochs=2", "-p", "data_dir=nowhere"], ("data_dir", "nowhere")),
        (["-p", f"output_dir={tmp_path / 'new'}", "-p", "finding_labels=[Nothing]"], ("finding_labels",)),
        (["-p", f"output_dir={tmp_path / 'new'}", "-p", f"data_dir={tmp_path}"], ("no .h5 file",)),
    ):
        assert_refused([*arguments, *more], words, capsys)
    assert (tmp_path / "run" / "run.json").read_text() == record and not (tmp_path / "new").exists()
    assert set((tmp_path / "run" / "logs").iterdir()) == logs


def test_data_may_move_but_not_change(config, phantom_dir, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(phantom_dir, data)
    here = changed(config, data_dir=str(data), resume=True)
    fit(here, tmp_path / "run")
    moved = changed(here, data_dir=str(data.rename(tmp_path / "moved")))
    fit(moved, tmp_path / "run")
    path = systems.loaders(moved)[0].dataset.volumes[0].path
    with h5py.File(path, "r+") as h5:
        h5["kspace"][...] = h5["kspace"][()] * 1.5
    with pytest.raises(ParameterError, match="has other files, slices or texts"):
        fit(moved, tmp_path / "run")


def test_data_content_depends_on_bytes_and_size_but_not_on_times(config, phantom_dir, tmp_path):
    shutil.copytree(phantom_dir, tmp_path / "data")
    loaders = systems.loaders(changed(config, data_dir=str(tmp_path / "data")))
    path, before = loaders[0].dataset.volumes[0].path, data_content(*loaders)
    whole, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    for other in (whole[:-1] + bytes([whole[-1] ^ 1]), whole + b"\0"):
        path.write_bytes(other)
        os.utime(path, ns=times)
        assert data_content(*loaders) != before
    path.write_bytes(whole)
    assert data_content(*loaders) == before


def test_killed_loading_process_is_explained_in_one_line(config, tmp_path):
    with pytest.raises(DataError, match=r"^a process that loads data has ended .*lower num_workers or batch_size.*$"):
        fit(changed(config, num_workers=1), tmp_path, WorkersKilled)
