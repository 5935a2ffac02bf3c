"""Killed, stopped, refused: whatever happens to a training, it ends as if nothing had."""

import multiprocessing
import random
import re
import time
from pathlib import Path
from typing import Any

import systems
import torch

from mrilib.config import Stage1Parameters, Stage2Parameters
from mrilib.files import read_json_lines
from mrilib.training.checkpoint import load_checkpoint
from mrilib.training.history import read_epochs

KILLS = 5  # a stage: 10 in all


Config = Stage1Parameters | Stage2Parameters


def stage1(phantom_dir: Path, backbone_dir: Path, **others: Any) -> Stage1Parameters:
    values = {"epochs": 2, "resume": True, "checkpoint_minutes": 0, "gradient_accumulation_steps": 2, **others}
    return systems.stage1_config(phantom_dir, backbone_dir, **values)


def processes() -> Any:
    """Processes that are ready at once: forked from one that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mrilib.runs.train", "mrilib.pretrain.tiny_nirvana"])
    return context


def start(config: Config, directory: Path) -> tuple[Any, float]:
    """A training in a process of its own, once it has begun, and the time of that."""
    known = set(directory.glob("logs/*.log"))
    process = processes().Process(target=systems.train_in, args=(directory, config))
    process.start()
    while process.is_alive() and set(directory.glob("logs/*.log")) == known:
        time.sleep(0.01)
    return process, time.monotonic()


def train_apart(config: Config, directory: Path) -> float:
    """Train in a process of its own, to the end; seconds."""
    process, begun = start(config, directory)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - begun


def train_with_kills(config: Config, directory: Path, seconds: float, rng: random.Random) -> list[str]:
    """The same, killed at random moments and gone on with; what was under way each time.

    Whenever it gets to its end, the next training starts, in another folder.
    """
    moments: list[str] = []
    copies = 1
    while len(moments) < KILLS:
        copy = directory.with_name(f"{directory.name}-{copies}")
        process, _ = start(config, copy)
        if len(moments) % 2:  # in the middle of writing a checkpoint
            writes = rng.randrange(1, 4)
            before = True
            while process.is_alive() and writes:
                now = bool(list(copy.glob("*_checkpoints/*.part")))
                writes -= now and not before
                before = now
        else:
            process.join(rng.uniform(0.05, 0.4) * seconds)
        process.kill()
        process.join()
        if process.exitcode == 0:
            copies += 1
        else:
            moments.append("writing" if list(copy.glob("*_checkpoints/*.part")) else "between")
    train_apart(config, copy)
    return moments


def contents(directory: Path) -> dict[str, dict[str, Any]]:
    """All checkpoints of a run folder, but what they cost."""
    found = {}
    for path in sorted(directory.glob("*_checkpoints/*.pt")):
        found[path.name] = load_checkpoint(path, re.sub("_(best|final|epoch|resume).*", "", path.stem))
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
    values = {"epochs": 2, "resume": True, "checkpoint_minutes": 0, "save_interval": 1, "max_train_slices": 9}
    values["train_control"] = True
    config: Config = systems.stage1_config(phantom_dir, backbone_dir, gradient_accumulation_steps=2, **values)
    moments = []
    for names in (("stage1", "constant_prefix"), ("stage2", "no_token_decoder")):
        whole, killed = tmp_path / names[0] / "whole", tmp_path / names[0] / "killed"
        killed.mkdir(parents=True)
        seconds = train_apart(config, whole)
        moments += train_with_kills(config, killed, seconds, rng)
        expected = contents(whole)
        kinds = ("best_model", "final_model", "epoch_2")
        assert {f"{name}_{kind}.pt" for name in names for kind in kinds} <= set(expected)
        finished = [path for path in killed.parent.glob("killed-*") if contents(path)]
        assert finished
        for path in finished:
            assert_equal(contents(path), expected)
            assert logged(path) == logged(whole)
        for name in names:
            steps = [entry["step"] for entry in read_json_lines(whole / "logs" / f"{name}.jsonl")]
            assert steps == list(range(1, len(steps) + 1))
        checkpoint = whole / "stage1_checkpoints" / "stage1_best_model.pt"
        if names[0] == "stage1":
            config = systems.stage2_config(phantom_dir, backbone_dir, checkpoint, **values)
    assert len(moments) >= 10 and moments.count("writing") >= 2, moments
