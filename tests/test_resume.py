"""Killed, stopped, refused: whatever happens to a training, it ends as if nothing had."""

import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import systems
import torch

from mrilib import runs
from mrilib.checkpoint import load_checkpoint
from mrilib.config import Stage1Parameters, Stage2Parameters
from mrilib.history import read_epochs
from mrilib.runs import read_json_lines

KILLS = 7  # a stage: 14 in all


@pytest.fixture(scope="module")
def backbone_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return systems.write_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(autouse=True)
def free_folders() -> Iterator[None]:
    yield
    for directory in list(runs._held):
        runs.release(directory)
    os.environ.pop(runs.RUN_VARIABLE, None)


Config = Stage1Parameters | Stage2Parameters


def stage1(phantom_dir: Path, backbone_dir: Path, **others: Any) -> Stage1Parameters:
    values = {"epochs": 2, "resume": True, "checkpoint_minutes": 0, "gradient_accumulation_steps": 2, **others}
    return systems.stage1_config(phantom_dir, backbone_dir, **values)


def processes() -> Any:
    """Processes that are ready at once: forked from one that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mrilib.train", "mrilib.pretrain"])
    return context


def train_apart(config: Config, directory: Path) -> float:
    """Train in a process of its own, to the end; seconds."""
    start = time.monotonic()
    process = processes().Process(target=systems.train_in, args=(directory, config))
    process.start()
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - start


def train_with_kills(config: Config, directory: Path, seconds: float, rng: random.Random) -> list[str]:
    """The same, killed at random moments and gone on with; what was under way each time."""
    moments = []
    for number in range(KILLS):
        process = processes().Process(target=systems.train_in, args=(directory, config))
        process.start()
        if number % 2:  # while a checkpoint is being written
            deadline = time.monotonic() + seconds
            skipped = rng.randrange(8)
            while process.is_alive() and time.monotonic() < deadline and skipped >= 0:
                if list(directory.glob("*_checkpoints/*.part")):
                    skipped -= 1
        else:
            process.join(rng.uniform(0.3, 0.9) * seconds)
        process.kill()
        process.join()
        written = list(directory.glob("*_checkpoints/*.part"))
        moments.append("ended" if process.exitcode == 0 else "writing" if written else "between")
    train_apart(config, directory)
    return moments


def contents(directory: Path) -> dict[str, dict[str, Any]]:
    """All checkpoints of a run folder, but what they cost."""
    found = {}
    for path in sorted(directory.glob("*_checkpoints/*.pt")):
        found[path.name] = load_checkpoint(path, path.name.split("_")[0])
        del found[path.name]["cost"]
        del found[path.name]["config"]["output_dir"]
        for epoch in found[path.name]["history"]["epochs"]:
            del epoch["seconds"]
    return found


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{where}/{number}")
    else:
        assert a == b, where


def logged(directory: Path) -> dict[str, list[dict[str, float]]]:
    """Step and epoch logs, but their times."""
    logs = {path.name: read_json_lines(path) for path in sorted((directory / "logs").glob("*.jsonl"))}
    logs |= {path.name: read_epochs(path) for path in sorted((directory / "logs").glob("*.csv"))}
    return {name: [{k: v for k, v in one.items() if k != "seconds"} for one in log] for name, log in logs.items()}


def test_a_run_killed_at_random_moments_ends_bit_for_bit_as_one_that_was_not(phantom_dir, backbone_dir, tmp_path):
    rng = random.Random(5)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    first = stage1(phantom_dir, backbone_dir, save_interval=1, max_train_slices=9)
    seconds = train_apart(first, whole)
    moments = train_with_kills(first, killed, seconds, rng)
    checkpoint = whole / "stage1_checkpoints" / "stage1_best_model.pt"
    values = {"epochs": 2, "resume": True, "checkpoint_minutes": 0, "save_interval": 1, "max_train_slices": 9}
    second = systems.stage2_config(phantom_dir, backbone_dir, checkpoint, **values)
    seconds = train_apart(second, whole)
    moments += train_with_kills(second, killed, seconds, rng)
    assert len(moments) >= 10 and moments.count("writing") >= 2, moments
    assert moments.count("ended") <= 4, moments
    expected = contents(whole)
    assert {"stage1_final_model.pt", "control_final_model.pt", "stage2_final_model.pt", "plain_best_model.pt"} <= set(
        expected
    )
    assert_equal(contents(killed), expected)
    assert logged(killed) == logged(whole)
    steps = [entry["step"] for entry in logged(killed)["stage1.jsonl"]]
    assert steps == list(range(1, len(steps) + 1))
    assert not list(killed.glob("*_checkpoints/*resume*"))
