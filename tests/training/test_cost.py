"""Costs of trainings, measured in turn with the parameters of the trainings."""

import pytest
import systems
import yaml

from mrilib.__main__ import main
from mrilib.config import ParameterError, Stage1Parameters, Stage2Parameters
from mrilib.training import cost


@pytest.fixture
def folder(phantom_dir, backbone_dir, tmp_path):
    """A params folder with two files in methods/."""
    stage1 = systems.stage1_config(phantom_dir, backbone_dir, train_control=False, epochs=1)
    stage2 = systems.stage2_config(phantom_dir, backbone_dir, tmp_path / "stage1.yaml", max_steps=3)
    (tmp_path / "methods").mkdir()
    (tmp_path / "stage1.yaml").write_text(yaml.safe_dump(stage1.to_dict()))
    (tmp_path / "stage2.yaml").write_text(yaml.safe_dump(stage2.to_dict()))
    small = {"decoder": "fastmri_unet", "baseline_chans": 2, "baseline_pools": 2, "max_steps": 5}
    (tmp_path / "methods" / "unet.yaml").write_text(yaml.safe_dump(small))
    (tmp_path / "methods" / "wide_unet.yaml").write_text(yaml.safe_dump({**small, "baseline_chans": 8}))
    return tmp_path


def test_methods_file_overrides_stage2(folder):
    assert isinstance(cost.read_params(folder / "stage1.yaml"), Stage1Parameters)
    stage2, method = cost.read_params(folder / "stage2.yaml"), cost.read_params(folder / "methods" / "unet.yaml")
    assert isinstance(stage2, Stage2Parameters) and stage2.decoder == "unet_dc" and method.decoder == "fastmri_unet"
    differ = {name for name, value in method.to_dict().items() if stage2.to_dict()[name] != value}
    assert differ == {"decoder", "baseline_chans", "baseline_pools", "max_steps"}


def test_trainings_are_measured_in_turn(folder, monkeypatch):
    order = []
    real = cost.StepTimer.measure
    monkeypatch.setattr(cost.StepTimer, "measure", lambda self: order.append(id(self)) or real(self))
    names = ["stage1.yaml", "stage2.yaml", "methods/unet.yaml", "methods/wide_unet.yaml"]
    costs = cost.measure([folder / name for name in names], rounds=2, steps=1)
    assert order[:4] == order[4:] and len(set(order)) == 4
    assert [c.steps for c in costs][1:] == [3, 5, 5] and all(len(c.rounds) == 2 for c in costs)
    narrow, wide = costs[2:]
    assert 4 * narrow.flops < wide.flops < 17 * narrow.flops and all(c.seconds > 0 for c in costs)
    assert costs[0].flops > 0 and costs[1].parameters > 1000


def test_steps_at_equal_compute():
    first = cost.Cost("a", steps=100, parameters=5, flops=4e9, rounds=[1.0, 3.0, 2.0])
    second = cost.Cost("b", steps=10, parameters=5, flops=1e9, rounds=[0.5])
    table = cost.table([first, second])
    assert table["steps of equal time"].tolist() == [100, 400] and table["steps of equal FLOPs"].tolist() == [100, 400]
    both = cost.table([first, second], reference=2)
    assert both["steps of equal time"].tolist() == [102, 410]
    with pytest.raises(ParameterError, match="--reference 3: there are 2 params files"):
        cost.table([first, second], 3)


def test_cost_command(folder, capsys):
    arguments = [str(folder / "methods" / "unet.yaml"), "--rounds", "1", "--steps", "1"]
    assert main(["cost", *arguments]) == 0
    assert "steps of equal FLOPs" in capsys.readouterr().out
    assert main(["cost", str(folder / "nowhere.yaml")]) == 1
    assert "nowhere.yaml' does not exist" in capsys.readouterr().err
