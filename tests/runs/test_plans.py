"""The plan of a run: what it takes from a params folder, and the baselines that it evaluates."""

from pathlib import Path
from typing import Any

import pytest

from mrilib import files
from mrilib.__main__ import make_parser
from mrilib.config import ROOT, ParameterError
from mrilib.runs import notebooks

FOLDERS = ("demo", "comparison", "full")


def values_of(folder: str, directory: Path, *options: str) -> dict[str, dict[str, Any]]:
    """Parameters of all notebooks of a shipped params folder in a new run."""
    command = ["run", str(ROOT / "params" / folder), "--name", str(directory), *options]
    plan = notebooks.make_plan(make_parser().parse_args(command))
    return {name: notebooks.notebook_values(plan, name) for name in plan.notebooks}


@pytest.mark.parametrize("folder", FOLDERS)
def test_shipped_folders_evaluate_the_baselines_that_they_train(folder, tmp_path):
    values = values_of(folder, tmp_path / "run")
    notebooks.check_baselines(values, tmp_path / "run")
    evaluated = values["evaluate"]
    assert evaluated["constant_prefix_checkpoint"].endswith("run/stage1_checkpoints/constant_prefix_best_model.pt")
    control = evaluated["no_token_decoder_checkpoint"]  # in the comparison it is a method, with its own run
    assert (
        not control
        if folder == "comparison"
        else control.endswith("run/stage2_checkpoints/no_token_decoder_best_model.pt")
    )


def test_a_baseline_that_is_not_trained_is_refused(tmp_path):
    values = values_of("demo", tmp_path / "run", "-p", "stage1.train_control=false")
    with pytest.raises(ParameterError, match="constant_prefix_checkpoint: stage1 does not train this baseline"):
        notebooks.check_baselines(values, tmp_path / "run")


@pytest.mark.parametrize("folder", ["demo", "comparison"])
def test_a_fresh_clone_accepts_the_shipped_folders(folder, tmp_path, monkeypatch):
    """Neither phantom data nor checkpoints exist; the defaults of the notebooks name them too."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.setattr(files, "ROOT", tmp_path)
    plan = notebooks.make_plan(make_parser().parse_args(["run", str(ROOT / "params" / folder)]))
    values = {name: notebooks.notebook_values(plan, name) for name in plan.notebooks}
    phantom = notebooks.check_plan(plan, values)
    assert phantom.phantom_volumes > 0 and not (tmp_path / "data").exists()
    without_phantom = {**values, "explore": {**values["explore"], "phantom_volumes": 0}}
    with pytest.raises(ParameterError, match=r"data_dir: '.*' does not exist"):
        notebooks.check_plan(plan, without_phantom)
