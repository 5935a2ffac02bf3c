"""Methods of a sweep: grouping of runs, refusals, scores and intervals over seeds and patients."""

import json

import numpy as np
import pandas as pd
import pytest
from made_runs import make_method_run

from mrilib.comparison import methods
from mrilib.config import ComparisonParameters, ParameterError
from mrilib.files import write_json


def config_of(*runs):
    return ComparisonParameters.create({"runs": [str(run) for run in runs]})


@pytest.fixture(scope="module")
def runs(tmp_path_factory, volumes):
    """Two methods with two seeds, and one with one seed."""
    parent = tmp_path_factory.mktemp("runs")
    made = [make_method_run(parent, "two_stage", volumes[:6], 0.05, seed) for seed in (0, 1)]
    made += [make_method_run(parent, "no_token_decoder_equal_time", volumes[:6], 0.1, seed) for seed in (0, 1)]
    return [*made, make_method_run(parent, "varnet", volumes[:6], 0.2)]


@pytest.fixture(scope="module")
def compared(runs):
    return methods.read_comparison(config_of(*runs))


def test_the_folder_name_gives_the_method():
    assert methods.method_of("comparison-no_token_decoder_equal_time-seed-1") == "no_token_decoder_equal_time"
    assert methods.method_of("measure1-varnet_measured_lines-seed-10") == "varnet_measured_lines"
    assert methods.method_of("my_own_decoder-seed-0") == "my_own_decoder"
    grid = methods.method_of("c-varnet-stage2.learning_rate-1e-3-seed-0")
    assert methods.label(grid) == "fastMRI's VarNet, stage2.learning_rate-1e-3"
    assert methods.ordered(["own", grid, "two_stage", "varnet"]) == ["two_stage", "varnet", grid, "own"]


def test_seeds_are_grouped_and_scores_are_those_of_the_evaluation(compared, runs, volumes):
    assert {name: len(folders) for name, folders in compared.methods.items()} == {
        "two_stage": 2,
        "no_token_decoder_equal_time": 2,
        "varnet": 1,
    }
    assert compared.names == ["two_stage", "no_token_decoder_equal_time", "varnet", "zero_filled"]
    written = [json.loads((run / "metrics.json").read_text())["reconstruction"] for run in runs]
    for acceleration in ("4", "8"):
        estimate = compared.estimate("two_stage", acceleration, "ssim_head")
        expected = np.mean([section[acceleration]["model"]["ssim_head"] for section in written[:2]])
        assert estimate.mean == pytest.approx(expected)
        assert estimate.interval[0] < estimate.mean < estimate.interval[1]
        assert len(compared.lesions) and compared.estimate("varnet", acceleration, "is_lost").mean <= 1
    assert compared.costs.loc["two_stage", "steps"] == "3 + 3" and compared.costs.loc["varnet", "steps"] == "3"
    assert compared.costs.loc["two_stage", "minutes"] == 20 and compared.costs.loc["two_stage", "parameters"] == 2000


def test_the_better_method_has_a_positive_paired_difference(compared):
    better = compared.difference("two_stage", "no_token_decoder_equal_time", "4", "ssim_head")
    assert 0 < better.interval[0] < better.mean < better.interval[1]
    same = compared.difference("two_stage", "two_stage", "4", "ssim_head")
    assert same.mean == 0 and same.interval[0] < 0 < same.interval[1], "seeds of both sides are independent"


def frame(values):
    """Rows of run × patient values."""
    return pd.DataFrame(
        {"run": str(run), "patient": str(patient), "value": value}
        for run, patients in enumerate(values)
        for patient, value in enumerate(patients)
    )


def test_intervals_hold_the_spread_of_seeds_and_of_patients():
    rng = np.random.default_rng(0)
    patients = rng.standard_normal(40)
    one_seed = methods.resampled_means(frame([patients]), "value")
    assert one_seed.std() == pytest.approx(patients.std() / np.sqrt(40), rel=0.1)
    seeds = methods.resampled_means(frame([[0.0] * 5, [1.0] * 5]), "value")
    assert set(np.unique(seeds)) == {0, 0.5, 1}
    shifted = methods.resampled_means(frame([patients + 1]), "value", 1)
    assert np.allclose(shifted - one_seed, 1), "differences are paired by patient"
    assert np.ptp(methods.resampled_means(frame([[2.0]]), "value")) == 0


def test_one_seed_and_one_patient_have_no_interval(tmp_path, volumes):
    alone = [volume for volume in volumes if volume.patient == volumes[0].patient][:1]
    run = make_method_run(tmp_path, "two_stage", alone, 0.1)
    assert methods.read_comparison(config_of(run)).estimate("two_stage", "4", "ssim_head").interval is None


def test_runs_of_other_data_masks_or_crop_are_refused(runs, tmp_path, volumes):
    for name, value in (("data_dir", "data/other"), ("mask_type", "random"), ("crop", "image")):
        other = make_method_run(tmp_path / name, "varnet", volumes[:1], 0.1, **{name: value})
        with pytest.raises(ParameterError, match=rf"varnet-seed-0' was evaluated with {name} '{value}'.*same data"):
            methods.read_comparison(config_of(runs[0], other))
    other = make_method_run(tmp_path, "varnet", volumes[:3], 0.1)
    with pytest.raises(ParameterError, match="varnet-seed-0' has reconstructed other test files"):
        methods.read_comparison(config_of(runs[0], other))


def test_runs_of_one_method_with_other_parameters_are_refused(runs, tmp_path, volumes):
    other = make_method_run(tmp_path, "varnet", volumes[:6], 0.1, seed=1)
    record = json.loads((other / "run.json").read_text())
    record["notebooks"]["stage2"]["config"]["epochs"] = 2
    write_json(other / "run.json", record)
    with pytest.raises(ParameterError, match=r"are both varnet but differ in stage2\.epochs"):
        methods.read_comparison(config_of(runs[-1], other))


def test_selection(runs, tmp_path, volumes, monkeypatch):
    monkeypatch.setattr("mrilib.files.ROOT", tmp_path)
    with pytest.raises(ParameterError, match="no evaluated run"):
        methods.select_runs(config_of())
    run = make_method_run(tmp_path / "outputs", "varnet", volumes[:1], 0.1)
    failed = make_method_run(tmp_path / "outputs", "two_stage", volumes[:1], 0.1)
    record = json.loads((failed / "run.json").read_text())
    record["notebooks"]["evaluate"]["status"] = record["status"] = "failed"
    write_json(failed / "run.json", record)
    assert methods.select_runs(config_of()) == ([run], [])
    assert methods.select_runs(config_of(run, failed)) == ([run], ["outputs/comparison-two_stage-seed-0"])
    with pytest.raises(ParameterError, match="is no run folder"):
        methods.select_runs(config_of(tmp_path))


def test_shifts_belong_to_the_run_of_their_checkpoint(runs, tmp_path, volumes):
    checkpoint = str(runs[-1] / "stage2_checkpoints" / "stage2_best_model.pt")
    shift = make_method_run(tmp_path, "varnet", volumes[:6], 0.4, seed=7, shift="noise 2", stage2_checkpoint=checkpoint)
    table = methods.read_comparison(config_of(*runs, shift)).shifts
    before, after = (json.loads((run / "metrics.json").read_text())["reconstruction"] for run in (runs[-1], shift))
    losses = [before[a]["model"]["ssim_head"] - after[a]["model"]["ssim_head"] for a in ("4", "8")]
    assert table.loc["varnet", "noise 2"] == pytest.approx(np.mean(losses)) and list(table.columns) == ["noise 2"]
    with pytest.raises(ParameterError, match=r"has the shift 'noise 2' of .* not compared"):
        methods.read_comparison(config_of(runs[0], shift))


def test_the_example_is_a_lesion_with_a_zoom(compared):
    whole, zoom = methods.example_slices(compared, "8")
    assert list(whole.images) == [methods.label(name) for name in compared.names]
    assert zoom.zoom is not None and set(zoom.scores) == set(whole.images)
    assert zoom.scores["zero-filled"].keys() == {"retention"}
    without = compared._replace(lesions=pd.DataFrame())
    (only,) = methods.example_slices(without, "8")
    assert only.zoom is None and only.boxes == ()
