"""Training killed at random moments ends with the same files, bit for bit, as uninterrupted training."""

import multiprocessing
import random
import re
import time
from pathlib import Path
from typing import Any

import systems
from equality import assert_equal

from mrilib.config import Stage1Parameters, Stage2Parameters
from mrilib.files import read_json_lines
from mrilib.training.checkpoint import load_checkpoint
from mrilib.training.history import read_epochs

KILLS = 5  # for each stage

Config = Stage1Parameters | Stage2Parameters


def start(config: Config, directory: Path) -> tuple[Any, float]:
    """Start a training process; return it and the time at which training began."""
    known = set(directory.glob("logs/*.log"))
    context = multiprocessing.get_context("forkserver")  # forks from a process with all imports, so it starts fast
    context.set_forkserver_preload(["mrilib.runs.train", "mrilib.pretrain.tiny_nirvana"])
    process = context.Process(target=systems.train_in, args=(directory, config))
    process.start()
    while process.is_alive() and set(directory.glob("logs/*.log")) == known:
        time.sleep(0.01)
    return process, time.monotonic()


def train_whole(config: Config, directory: Path) -> float:
    """Train to the end in another process; return the seconds."""
    process, begin = start(config, directory)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - begin


def train_with_kills(config: Config, directory: Path, seconds: float, rng: random.Random) -> list[str]:
    """Train, kill at random moments and resume; return for each kill whether a checkpoint was being written.

    When a training ends before it is killed, the next one starts in another folder.
    """
    moments: list[str] = []
    copies = 1
    while len(moments) < KILLS:
        copy = directory.with_name(f"{directory.name}-{copies}")
        process, _ = start(config, copy)
        if len(moments) % 2:  # while a checkpoint is written
            writes = rng.randrange(1, 4)
            was_writing = True
            while process.is_alive() and writes:
                is_writing = bool(list(copy.glob("*_checkpoints/*.part")))
                writes -= is_writing and not was_writing
                was_writing = is_writing
        else:
            process.join(rng.uniform(0.05, 0.4) * seconds)
        process.kill()
        process.join()
        if process.exitcode == 0:
            copies += 1
        else:
            moments.append("writing" if list(copy.glob("*_checkpoints/*.part")) else "between")
    train_whole(config, copy)
    return moments


def contents(directory: Path) -> dict[str, dict[str, Any]]:
    """All checkpoints of a run folder, without times and paths."""
    checkpoints = {}
    for path in sorted(directory.glob("*_checkpoints/*.pt")):
        content = load_checkpoint(path, re.sub("_(best|final|epoch|resume).*", "", path.stem))
        del content["cost"], content["config"]["output_dir"]
        for epoch in content["history"]["epochs"]:
            del epoch["seconds"]
        checkpoints[path.name] = content
    return checkpoints


def logged(directory: Path) -> dict[str, list[dict[str, float]]]:
    """Step and epoch logs without times."""
    logs = {path.name: read_json_lines(path) for path in sorted((directory / "logs").glob("*.jsonl"))}
    logs |= {path.name: read_epochs(path) for path in sorted((directory / "logs").glob("*.csv"))}
    return {name: [{k: v for k, v in entry.items() if k != "seconds"} for entry in log] for name, log in logs.items()}


def test_killed_training_ends_with_the_same_files(phantom_dir, backbone_dir, tmp_path):
    rng = random.Random(5)
    values = {"epochs": 2, "resume": True, "checkpoint_minutes": 0, "save_interval": 1, "max_train_slices": 9}
    values["train_control"] = True
    config: Config = systems.stage1_config(phantom_dir, backbone_dir, gradient_accumulation_steps=2, **values)
    moments = []
    for names in (("stage1", "constant_prefix"), ("stage2", "no_token_decoder")):
        whole, killed = tmp_path / names[0] / "whole", tmp_path / names[0] / "killed"
        killed.mkdir(parents=True)
        seconds = train_whole(config, whole)
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
