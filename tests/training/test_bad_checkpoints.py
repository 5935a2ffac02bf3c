"""Damaged and tampered checkpoints are refused with one line that names the problem."""

import copy
import os
import random
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import systems
import torch
from equality import assert_equal

from mrilib.config import ParameterError
from mrilib.model.two_stage import build_backbone
from mrilib.training import setup
from mrilib.training.checkpoint import CheckpointError, load_checkpoint
from mrilib.training.device import prepare
from mrilib.training.loop import Trainer
from mrilib.training.stages import AnalysisStage

FILE = "stage1_checkpoints/stage1_resume.pt"


@pytest.fixture(scope="module")
def trainer(phantom_dir, backbone_dir, tmp_path_factory) -> Trainer:
    """A training of two epochs, stopped after the first and to be resumed."""
    directory = tmp_path_factory.mktemp("run")
    config = systems.stage1_config(
        phantom_dir, backbone_dir, max_train_slices=4, max_val_slices=2, resume=True, output_dir=str(directory)
    )
    prepare(config)
    trainer = Trainer(
        AnalysisStage(systems.build(config), "stage1", config.label_smoothing),
        config,
        *systems.loaders(config),
        directory,
    )

    class Stopped(Exception):
        pass

    def stop(_: Any) -> None:
        raise Stopped

    trainer.progress.on_epoch = stop
    with pytest.raises(Stopped):
        trainer.run()
    shutil.copy(directory / FILE, directory / "whole.pt")
    return trainer


@pytest.fixture(scope="module")
def whole(trainer: Trainer) -> dict[str, Any]:
    return load_checkpoint(trainer.directory / "whole.pt", "stage1")


@pytest.fixture
def path(trainer: Trainer) -> Path:
    path = trainer.directory / FILE
    path.unlink(missing_ok=True)
    return path


def assert_refused(action: Callable[[], Any], words: tuple[str, ...]) -> None:
    """Expect one printable line with all the words and without torch's advice."""
    with pytest.raises((CheckpointError, ParameterError)) as caught:
        action()
    message = str(caught.value)
    assert message.isprintable() and len(message) < 2000
    assert all(word in message for word in words), message
    assert "weights_only" not in message


def write_compressed(whole: Path, path: Path) -> None:
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


FILES: dict[str, tuple[Callable[[Path, Path], Any], tuple[str, ...]]] = {
    "a folder": (lambda whole, path: path.mkdir(), ("is not a file",)),
    "a link to itself": (lambda whole, path: path.symlink_to(path), ("link to itself",)),
    "two links in a circle": (
        lambda whole, path: (path.symlink_to("other"), (path.parent / "other").symlink_to(path)),
        ("link to itself",),
    ),
    "a link to nothing": (lambda whole, path: path.symlink_to(path.with_name("x-" + path.name)), ("does not exist",)),
    "a pipe": (lambda whole, path: os.mkfifo(path), ("is not a file",)),
    "one byte of a tensor changed": (
        lambda whole, path: path.write_bytes(_changed(whole.read_bytes())),
        ("is damaged", "checksum"),
    ),
    "compressed": (write_compressed, ("compressed",)),
}


def _changed(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("kind", FILES)
def test_file_that_is_not_a_checkpoint_is_refused(trainer: Trainer, path: Path, kind: str) -> None:
    write, words = FILES[kind]
    write(trainer.directory / "whole.pt", path)
    try:
        assert_refused(lambda: load_checkpoint(path, "stage1"), (path.name, *words))
    finally:
        if path.is_dir():
            path.rmdir()
        (path.parent / "other").unlink(missing_ok=True)


def at(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set an entry of a checkpoint to a value, or to a function of the old value; the last key may be new."""

    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value(content[keys[-1]]) if callable(value) else value

    return change


def weight(function: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    """Replace the first matrix among the weights by a function of it."""

    def change(content: dict[str, Any]) -> None:
        name = next(name for name, value in content["weights"].items() if value.ndim == 2)
        content["weights"][name] = function(content["weights"][name])

    return change


def recursive_list() -> list[Any]:
    values: list[Any] = []
    values.append(values)
    return values


def doubled(times: int) -> list[Any]:
    values: list[Any] = ["x"]
    for _ in range(times):
        values = [values, values]
    return values


moment = ("optimizer", "state", 0)
TAMPERED: dict[str, tuple[Callable[[dict[str, Any]], None], tuple[str, ...]]] = {
    **{
        f"{key} is {what}": (at(key, value=value), (key,))
        for key in ("epoch", "step", "micro_batch", "weights", "optimizer", "schedule", "rng", "losses", "history",
                    "config", "data", "backbone", "encoder", "cost", "stage")
        for what, value in (("a tensor", torch.ones(2)), ("nothing", None), ("a list of text", ["x"]))
    },
    "format is a tensor": (at("format", value=torch.ones(2)), ("is not a checkpoint of this project",)),
    "sparse weights": (weight(lambda w: w.to_sparse()), ("weights/", "sparse")),
    "meta weights": (weight(lambda w: w.to("meta")), ("weights/", "meta")),
    "int8 weights": (weight(lambda w: w.to(torch.int8)), ("is of type int8, expected float32",)),
    "complex weights": (weight(lambda w: w.to(torch.complex64)), ("is of type complex64, expected float32",)),
    "float8 weights": (weight(lambda w: w.to(torch.float8_e4m3fn)), ("is of type float8",)),
    "NaN weights": (weight(lambda w: w * torch.nan), ("NaN or infinity",)),
    "weights of another shape": (weight(lambda w: w[:1]), ("expected (",)),
    "text as a weight": (weight(lambda w: "text"), ("weights",)),
    "a weight of a name that clears the screen": (at("weights", "\x1b[2Jx\ny", value=torch.ones(1)), ("unknown",)),
    "a number as the name of a weight": (at("weights", 5, value=torch.ones(1)), ("weights",)),
    "a list in itself": (at("losses", value=lambda _: recursive_list()), ("losses", "nested")),
    "lists doubled 14 times": (at("losses", value=lambda _: doubled(14)), ("losses",)),
    "lists doubled 100 times": (at("losses", value=lambda _: doubled(100)), ("losses", "nested")),
    "a huge number": (at("step", value=10**300), ("step", "too large")),
    "a negative step": (at("step", value=-1), ("step",)),
    "true as an epoch": (at("epoch", value=True), ("epoch",)),
    "more epochs than there are": (at("epoch", value=99), ("contradicts itself", "epoch 99 of 2")),
    "a step of another epoch": (at("step", value=0), ("contradicts itself", "step 0 in epoch 2")),
    "a micro batch above the batch": (at("micro_batch", value=999), ("micro_batch 999",)),
    "a loss that is not finite": (at("losses", value=[float("inf")]), ("losses",)),
    "losses of steps not taken": (at("losses", value=[1.0] * 9), ("9 losses",)),
    "an unknown entry of the history": (at("history", "run", value=1), ("history",)),
    "a history without its epochs": (at("history", "epochs", value=[]), ("0 epochs in its history",)),
    "an epoch of text": (at("history", "epochs", value=[{"epoch": "x"}]), ("history",)),
    "an epoch without its losses": (at("history", "epochs", value=[{"epoch": 1}]), ("without its losses",)),
    "a best epoch to come": (at("history", "best_epoch", value=2), ("best epoch 2",)),
    "a cost of text": (at("cost", "seconds", value="x"), ("cost",)),
    "no time": (lambda content: content["cost"].pop("epoch_seconds"), ("cost",)),
    "a nested parameter": (at("config", "epochs", value={"a": 1}), ("config",)),
    "a parameter of another kind": (at("config", "gradient_accumulation_steps", value="x"), ("gradient_accumulation",)),
    "steps an epoch of another kind": (at("steps_per_epoch", value=["x"]), ("steps an epoch",)),
    "a random state of zeros": (at("rng", 0, "torch", value=lambda x: x * 0), ("rng",)),
    "a short random state": (at("rng", 0, "torch", value=lambda x: x[:5]), ("rng",)),
    "a random state of floats": (at("rng", 0, "torch", value=lambda x: x.float()), ("rng",)),
    "another generator": (at("rng", 0, "numpy", "kind", value="PCG64"), ("rng",)),
    "short keys": (at("rng", 0, "numpy", "keys", value=lambda x: x[:5]), ("rng",)),
    "a position behind the keys": (at("rng", 0, "numpy", "position", value=9999), ("rng",)),
    "no state of the optimizer": (lambda content: content["optimizer"].pop("state"), ("optimizer",)),
    "no groups": (at("optimizer", "param_groups", value=[]), ("optimizer/param_groups",)),
    "a group of text": (at("optimizer", "param_groups", value=lambda x: ["x"] * len(x)), ("optimizer/param_groups/0",)),
    "a learning rate of text": (at("optimizer", "param_groups", 0, "lr", value="x"), ("param_groups/0/lr",)),
    "a learning rate that is NaN": (at("optimizer", "param_groups", 0, "lr", value=float("nan")), ("groups/0/lr",)),
    "an optimizer that goes uphill": (at("optimizer", "param_groups", 0, "maximize", value=True), ("0/maximize",)),
    "another epsilon": (at("optimizer", "param_groups", 0, "eps", value=1e18), ("param_groups/0/eps",)),
    "parameters of another group": (at("optimizer", "param_groups", 0, "params", 0, value=99), ("param_groups",)),
    "a moment of text": (at(*moment, "exp_avg", value="x"), ("optimizer/state/0/exp_avg",)),
    "a moment of another shape": (at(*moment, "exp_avg", value=torch.ones(1)), ("optimizer/state/0/exp_avg",)),
    "a negative square": (at(*moment, "exp_avg_sq", value=lambda x: x * 0 - 1), ("exp_avg_sq", "negative")),
    "a moment that is missing": (lambda content: content["optimizer"]["state"][0].pop("exp_avg"), ("exp_avg",)),
    "a step of the optimizer that is NaN": (at(*moment, "step", value=torch.tensor(torch.nan)), ("state/0/step",)),
    "a parameter that is not there": (at("optimizer", "state", 999, value={}), ("optimizer/state",)),
    "an unknown entry of the schedule": (at("schedule", "step", value=5), ("schedule",)),
    "a schedule of text": (at("schedule", "last_epoch", value="x"), ("schedule/last_epoch",)),
    "a schedule of another length": (at("schedule", "base_lrs", value=[1.0]), ("schedule/base_lrs",)),
}  # fmt: skip


@pytest.mark.parametrize("kind", TAMPERED)
def test_resuming_from_a_tampered_checkpoint_is_refused(trainer, whole, path, kind) -> None:
    change, words = TAMPERED[kind]
    content = copy.deepcopy(whole)
    change(content)
    torch.save(content, path)
    assert_refused(trainer.state.restore, (path.name if "parameter" not in kind else "", *words))


def test_attributes_that_a_pickle_attaches_to_a_dict_are_dropped(trainer, whole, path) -> None:
    content = dict(whole)
    content["weights"] = OrderedDict(whole["weights"])
    content["weights"]._metadata = 5
    torch.save(content, path)
    assert not trainer.state.restore() and trainer.state.epoch == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("vit_num_layers", "many"), ("vit_num_layers", [1]), ("img_size", -16), ("img_size", 63), ("crop", "sideways"),
     ("accelerations", 4), ("no_parameter", 1)],
)  # fmt: skip
def test_model_with_tampered_parameters_is_refused(trainer, whole, path, name: str, value: Any) -> None:
    torch.save({**whole, "config": {**whole["config"], name: value}}, path)
    backbone, tokenizer = build_backbone(trainer.config, "cpu")
    assert_refused(lambda: setup.load_stage1(path, backbone, tokenizer), (path.name, name))


def test_flipped_bits_never_change_the_content(trainer, whole, path) -> None:
    data = bytearray((trainer.directory / "whole.pt").read_bytes())
    rng = random.Random(3)
    for _ in range(40):
        position, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        data[position] ^= bit
        path.write_bytes(data)
        data[position] ^= bit
        try:
            assert_equal(load_checkpoint(path, "stage1"), whole)  # e.g. a date or padding of the zip file
        except CheckpointError as error:
            assert str(error).isprintable() and path.name in str(error)
