"""Checkpoints: atomic writing, reading without running code, and refusal of files that do not fit."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mrilib.training import checkpoint
from mrilib.training.checkpoint import (
    ENTRIES,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
)
from mrilib.training.device import rng_state, set_rng_state
from mrilib.training.load_state import load_weights


def content() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {
        "stage": "stage1",
        "epoch": 2,
        "step": 10,
        "micro_batch": 3,
        "weights": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": {},
        "rng": [rng_state()],
        "losses": [],
        "history": {"epochs": [], "best_epoch": 0, "best_loss": 0.5, "skipped": 0},
        "config": {"learning_rate": 1e-4, "accelerations": [4, 8], "name": "x", "on": True},
        **dict.fromkeys(("data", "backbone", "encoder"), "a hash"),
        "cost": {"seconds": 1.0, "epoch_seconds": 0.0, "peak_memory_bytes": 1},
    }


def test_checkpoint_round_trip_with_weights_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.pt"
    saved = content()
    save_checkpoint(path, saved)
    assert [p.name for p in path.parent.iterdir()] == ["a.pt"]
    assert set(torch.load(path, weights_only=True)) == {*ENTRIES, "format"}
    loaded = load_checkpoint(path, "stage1")
    assert loaded["config"] == saved["config"] and loaded["epoch"] == 2
    model = nn.Linear(3, 2)
    load_weights(model, loaded["weights"], "a.pt")
    assert torch.equal(model.weight, saved["weights"]["weight"])
    torch.optim.AdamW(model.parameters()).load_state_dict(loaded["optimizer"])


def test_failure_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, content())
    before = path.read_bytes()

    def disk_full(_: Any, file: Any) -> None:
        file.write(b"half a checkpoint")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", disk_full)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(path, {**content(), "epoch": 3})
    assert path.read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("I/O error")))
        with pytest.raises(OSError, match="I/O error"):
            save_checkpoint(path, {**content(), "epoch": 3})
    assert path.read_bytes() == before
    save_checkpoint(path, {**content(), "epoch": 3})
    assert load_checkpoint(path, "stage1")["epoch"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


class RunsCode:
    """A pickle that creates a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("writer", ["torch", "legacy", "pickle"])
def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path, writer: str) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    evil = {"format": 1, "stage": "stage1", "weights": RunsCode(trace)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=writer == "torch")
    words = r"evil.pt' .*may run code when it is opened: it was not opened"
    with pytest.raises(CheckpointError, match=words) as caught:
        load_checkpoint(path, "stage1")
    for advice in ("weights_only", "safe_globals", "torch.load"):  # advice to run it anyway
        assert advice not in str(caught.value)
    assert not trace.exists()
    if writer == "pickle":
        pickle.loads(path.read_bytes())
        assert trace.exists()  # an ordinary reader runs it


def test_numpy_scalars_are_refused_when_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", {"stage": "stage1", "loss": np.float64(0.5)})
    with pytest.raises(CheckpointError, match="holds more than plain tensors"):
        load_checkpoint(tmp_path / "a.pt", "stage1")


def test_truncated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pt"
    save_checkpoint(whole, content())
    data = whole.read_bytes()
    damaged = [data[: len(data) * part // 16] for part in range(16)]
    pickled = pickle.dumps({"format": 1, "stage": "stage1"})
    damaged += [pickled[:length] for length in range(len(pickled))]
    damaged += [b"\x80\x02J\x01"]  # an integer of four bytes, cut after one
    damaged += [b"plain text, no pickle", bytes(range(256)), b"PK\x03\x04 no zip", data[:64] + bytes(64) + data[128:]]
    path = tmp_path / "damaged.pt"
    for content_bytes in damaged:
        path.write_bytes(content_bytes)
        with pytest.raises(CheckpointError, match=r"'.*damaged.pt' is "):
            load_checkpoint(path, "stage1")


def test_checkpoint_of_another_project_or_stage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(CheckpointError, match=r"checkpoint '.*a.pt' does not exist"):
        load_checkpoint(path, "stage1")
    for foreign in ({"weight": torch.zeros(2)}, [1, 2], {"format": 99, "stage": "stage1"}, {"format": 1}):
        torch.save(foreign, path)
        with pytest.raises(CheckpointError, match=r"'.*a.pt' is not a checkpoint of this project"):
            load_checkpoint(path, "stage1")
    save_checkpoint(path, content())
    with pytest.raises(CheckpointError, match=r"a.pt' is of stage1; give one of stage2"):
        load_checkpoint(path, "stage2")


def test_checkpoint_with_wrong_content_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    saved = content()
    del saved["backbone"], saved["optimizer"]
    save_checkpoint(path, saved)
    with pytest.raises(CheckpointError, match=r"a.pt' lacks optimizer, backbone$"):
        load_checkpoint(path, "stage1")
    save_checkpoint(path, {**content(), "weights": [1, 2]})
    with pytest.raises(CheckpointError, match=r"a.pt' has wrong entries: weights: expected a tensor for each name$"):
        load_checkpoint(path, "stage1")
    with pytest.raises(CheckpointError, match=r"weight is a str, expected \(2, 3\)"):
        load_weights(nn.Linear(3, 2), {"weight": "text", "bias": torch.zeros(2)}, "a.pt")  # type: ignore[dict-item]


def test_wrong_names_and_shapes_are_listed_and_nothing_is_loaded() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    state = {name: value + 1 for name, value in model.state_dict().items()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state["0.weight"] = torch.zeros(2, 4)
    state["extra"] = state.pop("1.bias")
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, state, "a.pt")
    assert str(caught.value) == (
        "a.pt does not fit the model: missing 1.bias; unknown extra; 0.weight is (2, 4), expected (2, 3)"
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"missing 0.weight.* and 8 more$"):
        load_weights(nn.Sequential(*(nn.Linear(1, 1) for _ in range(10))), {}, "a.pt")


def test_random_numbers_continue_after_loading(tmp_path: Path) -> None:
    def draw() -> tuple[list[float], list[float]]:
        # an odd number of normal deviates leaves one cached
        return torch.rand(3).tolist(), np.random.standard_normal(3).tolist()  # noqa: NPY002

    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 (the global generator is what is saved)
    draw()
    save_checkpoint(tmp_path / "a.pt", {**content(), "rng": [rng_state()]})
    expected = [draw(), draw()]
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    set_rng_state(load_checkpoint(tmp_path / "a.pt", "stage1")["rng"][0])
    assert [draw(), draw()] == expected
