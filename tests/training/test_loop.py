"""The loop's troubles: stop files, sick losses, memory, full disks, second processes, several processes."""

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


@pytest.fixture
def config(phantom_dir: Path, backbone_dir: Path) -> Stage1Parameters:
    return systems.stage1_config(
        phantom_dir, backbone_dir, epochs=1, max_train_slices=9, max_val_slices=3, train_control=False
    )


def with_(config: Stage1Parameters, **others: Any) -> Stage1Parameters:
    return config.model_copy(update=others)


def stage_of(config: Stage1Parameters, cls: type[stages.AnalysisStage] = stages.AnalysisStage) -> stages.Stage:
    device.prepare(config)
    return cls(systems.build(config), "stage1", config.label_smoothing)


def fit(stage: stages.Stage, config: Stage1Parameters, directory: Path, **others: Any) -> History:
    return loop.fit(stage, config, *systems.loaders(config), directory, **others)


def weights(directory: Path, name: str = "final_model") -> dict[str, torch.Tensor]:
    return load_checkpoint(directory / "stage1_checkpoints" / f"stage1_{name}.pt", "stage1")["weights"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Sick(stages.AnalysisStage):
    """Its loss is NaN in the third batch that it sees."""

    seen = 0

    def loss(self, batch: Any) -> Any:
        self.seen += 1
        result = super().loss(batch)
        return result._replace(total=result.total * float("nan")) if self.seen == 3 else result


class Hungry(stages.AnalysisStage):
    """Runs out of memory, truly, on more than `fits` slices at once."""

    fits = 1

    def loss(self, batch: Any) -> Any:
        if len(batch.slices) > self.fits:
            torch.empty(2**60)
        return super().loss(batch)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_stopped_training_goes_on_as_if_nothing_had_been(config, tmp_path, optimizer):
    told, config = [], with_(config, optimizer=optimizer)
    fit(stage_of(config), config, tmp_path / "whole", on_step=told.append)
    assert [entry["step"] for entry in told] == [1, 2, 3]
    stop = tmp_path / "stopped"
    with pytest.raises(TrainingStopped, match="after step 2"):
        fit(
            stage_of(config),
            config,
            stop,
            on_step=lambda e: processes.request_stop(stop, "x") if e["step"] == 2 else None,
        )
    (stop / processes.STOP_FILE).unlink()
    with pytest.raises(ParameterError, match=r"holds an unfinished training of stage1; set resume: true"):
        fit(stage_of(config), config, stop)
    with pytest.raises(ParameterError, match=r"was begun with learning_rate: 0.0003 \(now 0.1\)"):
        fit(stage_of(config), with_(config, resume=True, learning_rate=0.1), stop)
    again = fit(stage_of(config), with_(config, resume=True), stop)
    assert [entry["step"] for entry in again.steps] == [1, 2, 3]
    assert same(weights(stop), weights(tmp_path / "whole"))
    # A finished one is refused, or taken over.
    with pytest.raises(ParameterError, match="holds a finished training"):
        fit(stage_of(config), config, stop)
    stage = stage_of(config)
    taken = fit(stage, with_(config, resume=True), stop)
    assert taken.epochs == again.epochs and same(dict(stage.part.state_dict()), weights(stop))


class Killed(BaseException):
    """Nothing more happens in this process."""


def test_killed_right_after_its_last_state_or_its_final_model(config, tmp_path, monkeypatch):
    save = TrainingState.save_to_resume

    def save_and_die(state: TrainingState) -> None:
        save(state)
        if state.epoch == config.epochs:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TrainingState, "save_to_resume", save_and_die)
        fit(stage_of(config), with_(config, checkpoint_minutes=0), tmp_path)
    unfinished = tmp_path / "stage1_checkpoints" / "stage1_resume.pt"
    content = unfinished.read_bytes()
    history = fit(stage_of(config), with_(config, resume=True), tmp_path)
    assert read_epochs(tmp_path / "logs" / "stage1_history.csv") == history.epochs
    unfinished.write_bytes(content)  # as if it had been killed before it was deleted
    fit(stage_of(config), with_(config, resume=True), tmp_path)
    assert not unfinished.exists()


def test_what_a_notebooks_interrupt_breaks_off_is_saved(config, tmp_path):
    class Interrupted(stages.AnalysisStage):
        def loss(self, batch: Any) -> Any:
            self.seen = getattr(self, "seen", 0) + 1
            if self.seen == 3:
                raise KeyboardInterrupt
            return super().loss(batch)

    with pytest.raises(KeyboardInterrupt):
        fit(stage_of(config, Interrupted), config, tmp_path)
    assert load_checkpoint(tmp_path / "stage1_checkpoints" / "stage1_resume.pt", "stage1")["step"] == 2


def test_processes_that_fail_are_not_taken_for_stopped(config, tmp_path, monkeypatch):
    """One fails; the launcher ends the others by SIGTERM, which they turn into the stop file."""
    stop = tmp_path / processes.STOP_FILE
    code = f"import sys; open({str(stop)!r}, 'w').close(); print('error: file_brain.h5 cannot be read'); sys.exit(1)"
    monkeypatch.setattr(distributed, "launch_command", lambda *_: [sys.executable, "-c", code])
    with pytest.raises(RuntimeError, match=r"2 training processes failed, error: file_brain.h5 cannot be read; see"):
        list(distributed.train_in_processes(stage_of(config), with_(config, num_processes=2), tmp_path))
    assert not stop.exists()
    code = "import sys; print('[rank1]: Traceback (most recent call last):\\n[rank1]: KeyError: 7'); sys.exit(1)"
    with pytest.raises(RuntimeError, match=r"processes failed, error: KeyError: 7; see"):
        list(distributed.train_in_processes(stage_of(config), with_(config, num_processes=2), tmp_path))
    code = f"import sys; open({str(stop)!r}, 'w').close(); print('stopped: stage1 was stopped'); sys.exit(130)"
    with pytest.raises(TrainingStopped, match="resume: true continues it"):
        list(distributed.train_in_processes(stage_of(config), with_(config, num_processes=2), tmp_path))


def test_a_log_that_cannot_be_written_is_named():
    log = files.JsonLines(Path("/dev/full"))
    with pytest.raises(OSError, match=r"the log '/dev/full' could not be written: .*No space left"):
        log.write(step=1)
    log.close()


def test_a_sick_loss_stops_with_the_state_before_it_saved(config, tmp_path):
    with pytest.raises(FloatingPointError, match=r"epoch 1, step 3: loss nan.*file_brain_AX.* slice \d.*learning_rate"):
        fit(stage_of(config, Sick), config, tmp_path)
    assert load_checkpoint(tmp_path / "stage1_checkpoints" / "stage1_resume.pt", "stage1")["step"] == 2
    fit(stage_of(config), with_(config, resume=True), tmp_path)  # the loss of its third batch is well
    assert [entry["step"] for entry in read_json_lines(tmp_path / "logs" / "stage1.jsonl")] == [1, 2, 3]


def test_a_sick_loss_is_skipped_and_counted(config, tmp_path):
    before = fit(stage_of(config), with_(config, max_train_slices=6), tmp_path / "two")
    assert before.skipped == 0
    history = fit(stage_of(config, Sick), with_(config, on_nan="skip"), tmp_path / "three")
    assert history.skipped == 1 and history.epochs[0]["skipped_steps"] == 1
    assert read_epochs(tmp_path / "three" / "logs" / "stage1_history.csv")[0]["skipped_steps"] == 1
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "three").values())

    class AllSick(stages.AnalysisStage):
        def loss(self, batch: Any) -> Any:
            result = super().loss(batch)
            return result._replace(total=result.total * float("inf"))

    with pytest.raises(FloatingPointError, match="every step was skipped"):
        fit(stage_of(config, AllSick), with_(config, on_nan="skip"), tmp_path / "none")


def test_memory_that_runs_out_halves_the_batch_or_names_what_to_turn(config, tmp_path):
    whole = fit(stage_of(config), config, tmp_path / "whole")
    halved = fit(stage_of(config, Hungry), config, tmp_path / "halved")
    state = load_checkpoint(tmp_path / "halved" / "stage1_checkpoints" / "stage1_final_model.pt", "stage1")
    assert state["micro_batch"] == 1
    for name in ("loss", "gradient_norm", "cross_entropy", "token_accuracy"):
        values = [[entry[name] for entry in history.steps] for history in (halved, whole)]
        assert values[0] == pytest.approx(values[1], rel=1e-4)
    Hungry.fits = 0
    try:
        with pytest.raises(MemoryError, match=r"on a single slice.*batch_size.*activation_checkpointing"):
            fit(stage_of(config, Hungry), config, tmp_path / "none")
    finally:
        Hungry.fits = 1


def test_memory_that_runs_out_in_validation_names_what_to_turn_too(config, tmp_path):
    class HungryLater(stages.AnalysisStage):
        def score(self, batch: Any) -> list[dict[str, Any]]:
            torch.empty(2**60)
            return super().score(batch)

    with pytest.raises(MemoryError, match=r"validation of epoch 1: out of memory on \d slices.*batch_size"):
        fit(stage_of(config, HungryLater), config, tmp_path / "told")


def test_a_data_file_that_vanishes_is_named_and_nothing_is_lost(config, tmp_path):
    loaders = systems.loaders(config)
    volumes = loaders[0].dataset.volumes

    def vanish(entry: dict[str, float]) -> None:
        volumes[:] = [volume._replace(path=tmp_path / "gone" / volume.path.name) for volume in volumes]

    with pytest.raises(ValueError, match=r"file_brain_AX.*\.h5, slice \d: cannot be read"):
        loop.fit(stage_of(config), config, *loaders, tmp_path / "run", on_step=vanish)
    assert load_checkpoint(tmp_path / "run" / "stage1_checkpoints" / "stage1_resume.pt", "stage1")["step"] == 1
    fit(stage_of(config), with_(config, resume=True), tmp_path / "run")


def test_a_full_disk_ends_in_an_error_and_the_last_checkpoint_is_whole(config, tmp_path):
    every = with_(config, checkpoint_minutes=0)
    folder = tmp_path / "stage1_checkpoints"

    def fill(entry: dict[str, float]) -> None:
        if entry["step"] == 2:  # writing there meets the kernel's own "no space left"
            (folder / "stage1_resume.pt.part").symlink_to("/dev/full")

    with pytest.raises(OSError, match=r"No space left on device.*the previous one is intact"):
        fit(stage_of(config), every, tmp_path, on_step=fill)
    assert load_checkpoint(folder / "stage1_resume.pt", "stage1")["step"] == 1
    again = fit(stage_of(config), with_(every, resume=True), tmp_path)
    assert len(again.steps) == 3


def test_a_read_only_folder_is_told(config, tmp_path):
    (tmp_path / "stage1_checkpoints").write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"a checkpoint could not be written: .*there is no previous one"):
        fit(stage_of(config), config, tmp_path)


def test_a_second_process_is_refused(config, tmp_path):
    processes.lock_run(tmp_path)
    code = "import sys, pathlib; from mrilib import processes as p; p.lock_run(pathlib.Path(sys.argv[1]), wait=0)"
    environment = {name: value for name, value in os.environ.items() if name != processes.RUN_VARIABLE}
    command = [sys.executable, "-c", code, str(tmp_path)]
    stranger = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert stranger.returncode and f"is in use by process {os.getpid()}" in stranger.stderr
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)  # it is this run's own
    assert child.returncode == 0, child.stderr


def test_a_folder_that_was_given_up_is_claimed_anew(tmp_path):
    """A notebook that has finished, another process that goes on in its folder, and the notebook run again."""
    processes.lock_run(tmp_path)
    processes.unlock_run(tmp_path)
    code = "import sys, pathlib; from mrilib import processes as p; p.lock_run(pathlib.Path(sys.argv[1])); input()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    other = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, text=True)
    while not (tmp_path / ".lock").read_text().startswith(f"process {other.pid} "):
        assert other.poll() is None
        time.sleep(0.05)
    with pytest.raises(ParameterError, match=f"is in use by process {other.pid}"):
        processes.lock_run(tmp_path, wait=0)
    other.communicate("\n")
    processes.lock_run(tmp_path)


def test_old_epoch_checkpoints_are_deleted(config, tmp_path):
    copy = tmp_path / "stage1_checkpoints" / "stage1_epoch_1_mine.pt"
    copy.parent.mkdir()
    copy.touch()
    fit(stage_of(config), with_(config, epochs=3, save_interval=1, max_checkpoints=2), tmp_path)
    names = {path.name for path in (tmp_path / "stage1_checkpoints").iterdir()}
    assert names == {
        f"stage1_{name}.pt" for name in ("best_model", "final_model", "epoch_2", "epoch_3", "epoch_1_mine")
    }


def test_a_loss_and_an_encoder_of_ones_own_plug_in(config, tmp_path):
    """A loss is a Stage with another `loss`; an encoder is any module from (k-space, mask) to (B, N + 2, hidden)."""

    class Focal(stages.AnalysisStage):
        def loss(self, batch: Any) -> stages.BatchLoss:
            result = super().loss(batch)
            return stages.BatchLoss(2 * result.total, {**result.statistics, "plain": float(result.total.detach())})

    class Means(torch.nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.map = torch.nn.Linear(1, width)

        def forward(self, kspace: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            share = mask.float().mean(1)[:, None, None]
            return self.map(share).expand(-1, (systems.SIZE // 16) ** 2 + 2, -1)

    stage = stage_of(config, Focal)
    stage.model.encoder = Means(two_stage.hidden_size(stage.model.backbone))
    history = fit(stage, config, tmp_path)
    assert history.steps[0]["gradient_norm_map"] > 0
    assert history.steps[0]["loss"] * 3 < 2 * history.steps[0]["plain"]  # over many tokens, not one slice


def test_two_processes_take_the_same_steps_as_one(config, tmp_path):
    """From the notebook's side: fit starts accelerate launch; gloo, since there is no GPU."""
    one = with_(config, gradient_accumulation_steps=4, batch_size=1, epochs=2, output_dir=str(tmp_path / "one"))
    alone = fit(stage_of(one), one, tmp_path / "one")
    two = with_(one, gradient_accumulation_steps=2, num_processes=2)
    stage = stage_of(two)
    shown: list[dict[str, float]] = []
    both = fit(stage, two, tmp_path / "two", on_step=shown.append)
    assert len(both.steps) == len(alone.steps) == len(shown) and len(both.epochs) == 2
    for name in ("loss", "gradient_norm", "learning_rate", "cross_entropy"):
        values = [[entry[name] for entry in history.steps] for history in (both, alone)]
        assert values[0] == pytest.approx(values[1], rel=1e-3)
    assert [e["val_loss"] for e in both.epochs] == pytest.approx([e["val_loss"] for e in alone.epochs], rel=1e-4)
    for name, value in weights(tmp_path / "two").items():
        torch.testing.assert_close(value, weights(tmp_path / "one")[name], rtol=1e-2, atol=1e-4)
    assert same(dict(stage.part.state_dict()), weights(tmp_path / "two"))


def test_the_train_command(config, tmp_path, capsys):
    from mrilib.__main__ import main

    params = tmp_path / "stage1.yaml"
    params.write_text(yaml.safe_dump({**config.to_dict(), "output_dir": str(tmp_path / "run")}))
    arguments = ["train", str(params), "--stage", "1"]
    assert main([*arguments, "-p", "epochs=2"]) == 0
    record = (tmp_path / "run" / "run.json").read_text()
    section = json.loads(record)["notebooks"]["stage1"]
    assert json.loads(record)["status"] == "done" and section["config"]["epochs"] == 2 and section["best_epoch"]
    logs = set((tmp_path / "run" / "logs").iterdir())
    # what is refused changes nothing in the folder, and makes none
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


def test_other_content_of_the_data_is_refused(config, phantom_dir, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(phantom_dir, data)
    here = with_(config, data_dir=str(data), resume=True)
    fit(stage_of(here), here, tmp_path / "run")
    moved = with_(here, data_dir=str(data.rename(tmp_path / "moved")))
    fit(stage_of(moved), moved, tmp_path / "run")  # the same content elsewhere
    path = systems.loaders(moved)[0].dataset.volumes[0].path
    with h5py.File(path, "r+") as h5:
        h5["kspace"][...] = h5["kspace"][()] * 1.5  # names and shapes stay
    with pytest.raises(ParameterError, match="has other files, slices or texts"):
        fit(stage_of(moved), moved, tmp_path / "run")


def test_one_changed_value_or_another_size_of_a_file_is_another_content(config, phantom_dir, tmp_path):
    shutil.copytree(phantom_dir, tmp_path / "data")
    loaders = systems.loaders(with_(config, data_dir=str(tmp_path / "data")))
    path, before = loaders[0].dataset.volumes[0].path, data_content(*loaders)
    whole, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    for other in (whole[:-1] + bytes([whole[-1] ^ 1]), whole + b"\0"):
        path.write_bytes(other)
        os.utime(path, ns=times)
        assert data_content(*loaders) != before
    path.write_bytes(whole)
    assert data_content(*loaders) == before


class WorkersKilled(stages.AnalysisStage):
    """Kills the processes that load data in the second step."""

    def loss(self, batch: Any) -> Any:
        for child in multiprocessing.active_children():
            child.kill()
        return super().loss(batch)


def test_a_killed_loading_process_is_told_in_one_line(config, tmp_path):
    with pytest.raises(DataError, match=r"^a process that loads data has ended .*lower num_workers or batch_size.*$"):
        fit(stage_of(config, WorkersKilled), with_(config, num_workers=1), tmp_path)
