"""Trainings on the GPU: small ones against the CPU and against two GPUs, and one step of params/full."""

from pathlib import Path
from typing import Any

import pytest
import systems
import torch

from mrilib.comparison import full_size
from mrilib.training import loop, setup
from mrilib.training.history import History

pytestmark = pytest.mark.gpu
SMALL = {"epochs": 1, "max_train_slices": 9, "max_val_slices": 3, "train_control": False, "batch_size": 1}
TOLERANCE = 2e-2  # convolutions round to TF32 on the GPU, 2⁻¹¹


def train(config: Any, directory: Path) -> History:
    stage = setup.build_stage(config, setup.prepare(config))
    return loop.fit(stage, config, *systems.loaders(config), directory)


def rows(stage: int, cases: dict[str, History]) -> list[dict[str, Any]]:
    return [
        {
            "stage": stage,
            "trained on": name,
            "first loss": history.steps[0]["loss"],
            "first gradient norm": history.steps[0]["gradient_norm"],
            "last loss": history.steps[-1]["loss"],
            "median step [s]": sorted(entry["seconds"] for entry in history.steps)[len(history.steps) // 2],
        }
        for name, history in cases.items()
    ]


def test_first_step_equals_the_cpus(phantom_dir, backbone_dir, tmp_path, record_property):
    """Loss and gradient norm of both stages; stage 2 uses the encoder that the CPU has trained."""
    measured: list[dict[str, Any]] = []
    common = {"data": phantom_dir, "backbone": backbone_dir, **SMALL}
    for number in (1, 2):
        histories = {}
        for name in ("cpu", "cuda"):
            if number == 1:
                config: Any = systems.stage1_config(**common).model_copy(update={"device": name})
            else:
                checkpoint = tmp_path / "cpu1" / "stage1_checkpoints" / "stage1_final_model.pt"
                config = systems.stage2_config(**common, checkpoint=checkpoint).model_copy(update={"device": name})
            histories[name] = train(config, tmp_path / f"{name}{number}")
        measured += rows(number, histories)
        record_property("table", measured)
        first, second = (history.steps[0] for history in histories.values())
        for value in ("loss", "gradient_norm"):
            assert second[value] == pytest.approx(first[value], rel=TOLERANCE), value


def test_two_gpus_take_the_same_steps_as_one(phantom_dir, backbone_dir, tmp_path, record_property):
    """`fit` starts accelerate launch, which connects two GPUs by NCCL."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, this machine has one")
    config = systems.stage1_config(phantom_dir, backbone_dir, **SMALL).model_copy(update={"device": "auto"})
    one = config.model_copy(update={"gradient_accumulation_steps": 4, "output_dir": str(tmp_path / "one")})
    two = config.model_copy(
        update={"gradient_accumulation_steps": 2, "num_processes": 2, "output_dir": str(tmp_path / "two")}
    )
    histories = {"one GPU": train(one, tmp_path / "one"), "two GPUs": train(two, tmp_path / "two")}
    record_property("table", rows(1, histories))
    single, double = histories.values()
    assert len(single.steps) == len(double.steps)
    for value in ("loss", "gradient_norm"):
        expected = [entry[value] for entry in single.steps]
        assert [entry[value] for entry in double.steps] == pytest.approx(expected, rel=TOLERANCE)


def test_one_step_of_each_stage_at_full_size(record_property, capfd):
    """params/full: batch 4, 16 coils, 320×320, 1.3B parameters with random values; 15 GB of disk in outputs/."""
    reports = full_size.measure(device="cuda")
    is_halved = "out of memory" in capfd.readouterr().err  # the warning of the process that trains
    record_property("table", [row | {"batch halved": is_halved} for row in full_size.table(reports).to_dict("records")])
    record_property("reports", [report.to_dict() for report in reports])
    assert [report.stage for report in reports] == ["stage1", "stage2"]
    assert all(report.device.startswith("cuda") for report in reports)
    assert [report.batch for report in reports] == [(4, 16, 320, 320)] * 2
    memory = torch.cuda.get_device_properties(0).total_memory
    assert all(0 < report.peak_memory_bytes < memory for report in reports)
