"""The bench: parts that resume, equal conditions, tables from files."""

import itertools
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import systems
import torch
import yaml

from mrilib import bart, bench, bench_tables
from mrilib.config import BenchParameters, ParameterError
from mrilib.data import FastMRIDataset
from mrilib.distributed import TrainingStopped
from mrilib.figures import zero_filled_image
from mrilib.runs import read_json_lines

METHODS = ["model", "trained_without_tokens", "decoder_alone", "varnet", "unet"]


@pytest.fixture(scope="module")
def values(phantom_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("params")
    backbone = systems.write_backbone(folder / "backbone")
    common = {"max_val_slices": 3, "center_fractions": [0.16, 0.08], "num_coils": 8, "split_seed": 2}
    one = systems.values(phantom_dir, backbone, **systems.ENCODER, **common)
    late = {"sense": True, "encoder_image": True, "tokens_from": 0.5, "lesion_weight": 0.1, "data_echo": 2}
    two = systems.values(phantom_dir, backbone, **systems.DECODER, **common, **late, train_control=False)
    for name, content in (("stage1", one), ("stage2", two)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return {
        "bench_parts": ["costs", "stage1", "train", "score", "shifts"],
        "stage1_params": str(folder / "stage1.yaml"),
        "stage2_params": str(folder / "stage2.yaml"),
        "bench_seeds": [0, 1],
        "stage1_steps": 2,
        "methods": METHODS,
        "steps": [4] * len(METHODS),
        "learning_rates": [1e-3] * len(METHODS),
        "validations": 2,
        "bart_slices": 1,
        "max_new_tokens": 4,
        "shifts": ["acceleration 6", "noise 2"],
        "interactive": False,
    }


@pytest.fixture(scope="module")
def done(values, tmp_path_factory):
    """A bench that has run as a whole, two seeds, with BART's grid cut short."""
    directory = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bart, "KERNELS", (4,))
        patch.setattr(bart, "CALIBRATIONS", (24,))
        patch.setattr(bart, "STRENGTHS", (0.005,))
        one = bench.Bench(BenchParameters.create(values), directory)
        assert one.run() == []
    return one


def test_every_method_had_its_steps_and_says_what_it_cost(done):
    for seed in (0, 1):
        for name in METHODS:
            told = json.loads((done.directory / f"seed{seed}" / name / "done.json").read_text())
            assert told["steps"] == 4 and told["seconds"] > 0 and told["parameters"] > 0
            assert [point["step"] for point in told["validation"]] == [2, 4]
            assert told["seconds"] < told["seconds_with_validation"]
        steps = read_json_lines(done.directory / f"seed{seed}" / "model" / "logs" / "model.jsonl")
        assert [step["gradient_norm_token_projection"] > 0 for step in steps] == [False, False, True, True]
    other = bench.Bench(done.config.model_copy(update={"learning_rates": [1e-4] * len(METHODS)}), done.directory)
    with pytest.raises(ParameterError, match="varnet was made with other values of learning_rate; remove the folder"):
        other.trained("varnet", 0)
    assert done.trained("model", 0).decoder.sense and done.trained("trained_without_tokens", 0).decoder.sense
    assert json.loads((done.directory / "seed0" / "stage1" / "done.json").read_text())["control"]["steps"] == 2


def test_rivals_are_trained_by_their_authors_loss(done):
    for name, weight in (("model", 0.1), ("decoder_alone", 0.1), ("varnet", 0.0), ("unet", 0.0)):
        told = json.loads((done.directory / "seed0" / name / "done.json").read_text())
        assert told["made_with"]["lesion_weight"] == weight
        assert told["made_with"]["tokens_from"] == (0.5 if name == "model" else 0.0)
        assert told["made_with"]["data_echo"] == (2 if name == "model" else 1)  # where something is frozen


def test_what_is_done_is_not_done_again(done, values, monkeypatch):
    times = {path: path.stat().st_mtime_ns for path in done.directory.rglob("*") if path.is_file()}
    monkeypatch.setattr(bench.training, "fit", None)
    monkeypatch.setattr(bench.bart, "reconstruct", None)
    assert bench.Bench(BenchParameters.create(values), done.directory).run() == []
    assert {path: path.stat().st_mtime_ns for path in done.directory.rglob("*") if path.is_file()} == times


@pytest.mark.parametrize(
    ("name", "attribute", "new"),
    [
        ("unet", "stage2", {"token_pixels": True}),
        ("stage1", "stage1", {"recon_weight": 1.0}),
        ("model", "stage1", {"recon_weight": 1.0}),  # of the stage 1 that its tokens come from
    ],
)
def test_a_parameter_newer_than_a_training_counts_as_its_default(done, monkeypatch, name, attribute, new):
    monkeypatch.setattr(bench.training, "fit", None)  # nothing is trained again
    path = done.directory / "seed0" / name / "done.json"
    kept = path.read_text()
    record = json.loads(kept)
    (made_with,) = [
        part for part in (record["made_with"], record["made_with"].get("stage1", {})) if set(new) <= set(part)
    ]
    for parameter in new:
        del made_with[parameter]
    path.write_text(json.dumps(record))
    backup: list[tuple[Path, bytes]] = []

    def again():
        return done.train_stage1(0) if name == "stage1" else done.train_method(name, 0)

    try:
        assert again()["steps"] > 0
        if name == "model":  # and is loaded: its checkpoint and stage 1's know nothing of them either
            for checkpoint in done.directory.glob("seed0/*/stage?_checkpoints/*_model.pt"):
                content = torch.load(checkpoint, weights_only=True)
                backup.append((checkpoint, checkpoint.read_bytes()))
                for parameter in ("recon_weight", "mirror_share", "token_pixels"):
                    content["config"].pop(parameter, None)
                torch.save(content, checkpoint)
            assert done.trained("model", 0).encoder.pixel_head is None
        monkeypatch.setattr(done, attribute, getattr(done, attribute).model_copy(update=new))
        with pytest.raises(ParameterError, match=f"{name} was made with other values of"):
            again()
    finally:
        path.write_text(kept)
        for checkpoint, content in backup:
            checkpoint.write_bytes(content)


def test_other_parameters_are_refused_rather_than_mixed(done, values):
    changed = BenchParameters.create({**values, "steps": [4, 6, 4, 4, 4]})
    with pytest.raises(ParameterError, match=r"trained_without_tokens was made with other values of steps"):
        bench.Bench(changed, done.directory).run()


def test_a_limit_of_seconds_leaves_jobs_for_the_next_call(values, tmp_path, monkeypatch):
    ticks = iter(range(0, 10**6, 1000))
    one = bench.Bench(BenchParameters.create({**values, "bench_seconds": 1500, "bench_parts": ["train"]}), tmp_path)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(ticks))
    begun = []
    monkeypatch.setattr(one, "train_method", lambda name, seed: begun.append(name))
    left = one.run()
    assert len(begun) == 1 and len(left) == 2 * len(METHODS) - 1


def test_a_training_that_time_was_over_for_goes_on_where_it_stopped(values, done, tmp_path, monkeypatch):
    one = bench.Bench(
        BenchParameters.create({**values, "bench_seconds": 4, "bench_parts": ["train"], "bench_seeds": [0]}), tmp_path
    )
    one.config = one.config.model_copy(update={"methods": ["varnet"], "steps": [4], "learning_rates": [1e-3]})
    log = tmp_path / "seed0" / "varnet" / "logs" / "varnet.jsonl"
    clock = itertools.count()
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(clock)))
    assert one.run() == ["train varnet, seed 0"] and not (tmp_path / "seed0" / "varnet" / "done.json").exists()
    assert 0 < len(read_json_lines(log)) < 4 and not (tmp_path / "seed0" / "varnet" / "stop").exists()
    monkeypatch.undo()
    one.config = one.config.model_copy(update={"bench_seconds": 0, "steps": [6]})
    with pytest.raises(ParameterError, match=r"begun with 2 steps an epoch \(now 3\)"):
        one.run()
    one.config = one.config.model_copy(update={"steps": [4]})
    assert one.run() == [] and len(read_json_lines(log)) == 4
    whole = read_json_lines(done.directory / "seed0" / "varnet" / "logs" / "varnet.jsonl")
    for name in ("loss", "gradient_norm", "learning_rate"):
        assert [step[name] for step in read_json_lines(log)] == [step[name] for step in whole]


def test_a_training_that_someone_stops_is_not_taken_for_late(values, tmp_path, monkeypatch):
    one = bench.Bench(BenchParameters.create({**values, "bench_seconds": 1500, "bench_parts": ["train"]}), tmp_path)

    def stopped(name, seed):
        raise TrainingStopped(name)

    monkeypatch.setattr(one, "train_method", stopped)
    with pytest.raises(TrainingStopped):
        one.run()


def test_tokens_need_stage_1(values, tmp_path):
    one = bench.Bench(BenchParameters.create({**values, "bench_parts": ["train"]}), tmp_path)
    for name in ("model", "trained_without_tokens"):  # the latter has its image
        with pytest.raises(ParameterError, match="stage 1 of seed 0 is not trained"):
            one.train_method(name, 0)
    with pytest.raises(ParameterError, match="varnet of seed 1 is not trained"):
        one.trained("varnet", 1)


def test_methods_see_the_same_batches(done):
    data = FastMRIDataset(done.volumes["train"], done.stage2, training=True)
    for epoch in (0, 1):
        data.epoch = epoch
        first, second = (list(bench.FixedSteps(data, 3, seed=5, steps=11)) for _ in range(2))
        assert first == second and len(first) == 11
    data.epoch = 0
    assert first != list(bench.FixedSteps(data, 3, seed=5, steps=11)) != list(bench.FixedSteps(data, 3, 6, 11))


def test_costs_are_measured_once_side_by_side(done, values, monkeypatch):
    path = done.directory / "costs" / "done.json"
    each = json.loads(path.read_text())["seconds"]
    assert set(each) == {"stage1", "control", *METHODS}
    assert all(len(rounds) == bench.COST_ROUNDS and min(rounds) > 0 for rounds in each.values())
    monkeypatch.setattr(bench, "seconds_per_step", None)
    assert done.measure_costs() == each
    kept = path.read_text()
    more = {"methods": [*METHODS, "varnet_equal_size"], "steps": [4] * 6, "learning_rates": [1e-3] * 6}
    other = bench.Bench(BenchParameters.create({**values, **more, "bench_parts": []}), done.directory)
    with pytest.raises(ParameterError, match="measured without varnet_equal_size; remove the folder"):
        other.measure_costs()
    other.stage1 = other.stage1.model_copy(update={"varnet_image_weight": 1.0})
    with pytest.raises(ParameterError, match="costs was made with other values of stage1; remove the folder"):
        other.measure_costs()
    own, both = "all steps [s]", "with what it needs before [s]"
    try:
        numbers = {name: 10.0 * number for number, name in enumerate(("stage1", *METHODS, "control"), 1)}
        seconds = {name: [1.0, number, 2 * number] for name, number in numbers.items()}
        path.write_text(json.dumps({**json.loads(kept), "seconds": seconds}))
        stage1, model, varnet = 10, 10 * (2 + METHODS.index("model")), 10 * (2 + METHODS.index("varnet"))
        table = bench_tables.cost_table(done).set_index("training")
        assert table["steps"].tolist() == ["2", "2", *["4"] * len(METHODS), ""]
        assert table.loc["stage 1", "from, to [s]"] == "1.000, 20.000"
        table = table.drop(columns="from, to [s]")
        assert float(table.loc["all, 2 seeds", own]) == 2 * table.drop("all, 2 seeds")[own].astype(float).sum()
        table = table.drop("all, 2 seeds").astype(float)
        assert table.loc["stage 1", "steps"] == 2 and table.loc["two-stage model", "steps"] == 4
        assert table.loc["fastMRI's VarNet", own] == table.loc["fastMRI's VarNet", both] == 4 * varnet
        assert table.loc["two-stage model", own] == 4 * model
        assert table.loc["two-stage model", both] == 4 * model + 2 * stage1
        plain = table.loc[bench_tables.method_label("trained_without_tokens")]  # it starts from stage 1's image
        assert plain[both] == plain[own] + 2 * stage1
    finally:
        path.write_text(kept)


def test_one_network_has_one_cost_and_rounds_go_in_turn(values, tmp_path, monkeypatch):
    names = ["varnet", "varnet_both_stages", "without_tokens_equal_time"]
    numbers = {"methods": names, "steps": [4, 8, 4], "learning_rates": [1e-3] * 3}
    asked = []
    monkeypatch.setattr(bench, "seconds_per_step", lambda one, name: asked.append(name) or float(len(asked)))
    each = bench.Bench(BenchParameters.create({**values, **numbers, "bench_parts": []}), tmp_path).measure_costs()
    # the decoder without tokens is not among the methods, so the one of equal time is timed by itself
    assert asked == ["stage1", "control", "varnet", "without_tokens_equal_time"] * bench.COST_ROUNDS
    assert each["varnet"] == each["varnet_both_stages"] == [3.0, 7.0, 11.0]
    assert list(each) == ["stage1", "control", *names] and each["without_tokens_equal_time"] == [4.0, 8.0, 12.0]


def test_a_step_costs_what_its_part_of_the_training_does(values, monkeypatch, tmp_path):
    """Stage 1 before and after VarNet stands and the text joins, with what is kept for echoes, each by its share."""
    seen = []

    class Told(bench.training.AnalysisStage):
        def loss(self, batch):
            seen.append((self.progress, len(self.echoes)))
            return super().loss(batch)

    monkeypatch.setattr(bench.training, "AnalysisStage", Told)
    monkeypatch.setattr(bench.np, "median", lambda seconds: 100.0 ** len(medians.append(seconds) or medians))
    medians = []
    one = bench.Bench(BenchParameters.create({**values, "bench_parts": []}), tmp_path)
    late = {"text_from": 0.75, "varnet_until": 0.25, "data_echo": 3, "batch_size": 2, "finding_chans": 2}
    one.stage1 = one.stage1.model_copy(update={**late, "finding_labels": ["Mass", "Edema"], "finding_map_weight": 3.0})
    assert bench.seconds_per_step(one, "stage1", steps=2) == 0.25 * 100 + 0.5 * 100**2 + 0.25 * 100**3
    each = [(0.0, 0), *((0.25, kept) for kept in (0, 2, 2)), (0.75, 0)]
    assert seen == each * 2 and all(len(seconds) == 1 and seconds[0] > 0 for seconds in medians)
    seen.clear()
    bench.seconds_per_step(one, "control", steps=2)
    assert [progress for progress, _ in seen] == [0.0] * 2


def test_the_control_has_as_many_steps_of_text(values, tmp_path, monkeypatch):
    one = bench.Bench(BenchParameters.create({**values, "stage1_steps": 12, "bench_parts": []}), tmp_path)
    late = {"text_from": 2 / 3, "finding_labels": ["Mass"], "finding_share": 0.5}
    one.stage1 = one.stage1.model_copy(update=late)
    told = []

    def fit(stage, config, folder, steps, texts):
        told.append((stage.name, steps, config.finding_share, stage.rate_anew_from))
        return {}

    monkeypatch.setattr(one, "_fit", fit)
    one.train_stage1(0)
    assert told == [("stage1", 12, 0.5, 2 / 3), ("control", 4, 0.5, 0.0)]


def test_tables_hold_every_method_at_every_acceleration(done):
    scores = bench_tables.scores_of(done, done.volumes["test"], "reconstructions")
    swaps = {"no_tokens", "other_patient_tokens"}
    wanted = {*METHODS, *swaps, "zero_filled", "nearest_training_slice", *(["bart"] if bart.version() else [])}
    assert {name: set(methods) for name, methods in scores.items()} == {"4": wanted, "8": wanted}
    assert {len(scores["4"][name]) for name in METHODS} == {2} and len(scores["4"]["nearest_training_slice"]) == 1
    table = bench_tables.score_table(done, scores)
    assert len(table) >= 2 * len(wanted) and "±" in table["SSIM in head"][0]
    own = table[table["method"] == "two-stage model"]
    assert own["steps"].tolist() == [4, 4] and own["seeds"].tolist() == [2, 2]
    change = bench_tables.differences(scores)
    mine, other = (bench_tables.seed_means(scores["4"][name], "ssim_head") for name in ("model", "varnet"))
    row = change[(change["acceleration"] == "4x") & (change.iloc[:, 1] == "fastMRI's VarNet")].iloc[0]
    assert float(row["SSIM in head, mean"]) == pytest.approx(sum(mine) / 2 - sum(other) / 2, abs=1e-4)
    assert float(row["SSIM in head, least"]) == pytest.approx(min(mine) - max(other), abs=1e-4)
    json.dumps(bench_tables.metrics_section(scores), allow_nan=False)


def test_what_is_scored_is_known_without_its_images(done, monkeypatch):
    """So a second seed can be added where the first one's images and weights are no more."""
    volumes = done.volumes["test"]
    before = bench_tables.scores_of(done, volumes, "reconstructions")
    table, told = bench_tables.lesions(done, 0)
    images = sorted(done.directory.glob("seed*/reconstructions/*/*/*.h5"))
    kept = [(path, path.read_bytes()) for path in images]
    weights = list(done.directory.glob("seed*/*/stage2_checkpoints"))
    try:
        for path in images:
            path.unlink()
        for folder in weights:
            folder.rename(folder.with_name("away"))
        assert done.run() == []
        assert bench_tables.scores_of(done, volumes, "reconstructions") == before
        again, told_again = bench_tables.lesions(done, 0)
        assert again.equals(table) and told_again == told
        assert bench_tables.pictures(done, before, 0) == {}
    finally:
        for path, content in kept:
            path.write_bytes(content)
        for folder in weights:
            folder.with_name("away").rename(folder)


def test_a_method_trained_anew_is_scored_anew(done, monkeypatch, tmp_path):
    """Scores of weights that are gone are not taken for those of the new ones; other methods keep theirs."""
    directory = tmp_path / "copy"
    shutil.copytree(done.directory, directory)
    one = bench.Bench(done.config, directory)
    bench_tables.scores_of(one, one.volumes["test"], "reconstructions")
    seed = directory / "seed0"
    for name in ("unet", "model"):
        shutil.rmtree(seed / name)
    monkeypatch.setattr(one, "_fit", lambda *args, **kwargs: {})
    for name in ("unet", "varnet"):
        one.train_method(name, 0)
    left = {path.relative_to(seed).parts[-3] for path in seed.rglob(bench.SCORES)}
    assert "unet" not in left and {"varnet", "model", "no_tokens", "zero_filled"} <= left
    one.train_method("model", 0)
    left = {path.relative_to(seed).parts[-3] for path in seed.rglob(bench.SCORES)}
    assert not left & {"model", "no_tokens", "other_patient_tokens"} and "varnet" in left
    assert not (seed / "texts.json").exists() and (directory / "seed1" / "texts.json").exists()


def test_decoders_are_not_kept_beside_a_new_stage_1(done, values, monkeypatch, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(done.directory, directory)
    one = bench.Bench(done.config, directory)
    shutil.rmtree(directory / "seed0" / "stage1")
    monkeypatch.setattr(one, "_fit", lambda *args, **kwargs: {})
    one.train_stage1(0)
    left = {path.parent.name for path in directory.rglob("done.json") if path.parent.parent.name == "seed0"}
    assert left == {"stage1", "decoder_alone", "varnet", "unet"}
    assert not (directory / "seed0" / "reconstructions" / "model").exists()
    assert (directory / "seed1" / "model" / "done.json").exists()


def test_rivals_have_their_own_cascades(done):
    from fastmri.models import VarNet

    cascades = {name: len(done.build(name).varnet.cascades) for name in ("varnet", "varnet_of_encoder")}
    assert cascades == {"varnet": done.config.varnet_cascades, "varnet_of_encoder": done.stage1.varnet_num_cascades}
    assert isinstance(done.build("varnet").varnet, VarNet)
    assert done._needed("varnet")["varnet_num_cascades"] == done.config.varnet_cascades


def test_shifts_and_lesions_and_figures(done):
    scores = bench_tables.scores_of(done, done.volumes["test"], "reconstructions")
    table = bench_tables.shift_table(done, scores)
    assert set(table["condition"]) == {"acceleration 6", "noise 2"}
    assert set(table.groupby("condition").size()) == {len(METHODS) + 2 + bool(bart.version())}
    noisy = bench_tables.scores_of(done, done.shifted("noise 2")[0], "shifts/noise_2")
    assert set(noisy["4"]["varnet"]) == {0} and set(scores["4"]["varnet"]) == {0, 1}
    # the fall is of the seed that was away, though home has two
    for column, metric, form in (("SSIM in head", "ssim_head", "{:.3f}"), ("PSNR in head", "psnr_head", "{:.2f}")):
        fall = np.mean(
            [
                bench_tables.seed_means({0: scores[a]["varnet"][0]}, metric)[0]
                - bench_tables.seed_means(noisy[a]["varnet"], metric)[0]
                for a in ("4", "8")
            ]
        )
        row = table[(table["condition"] == "noise 2") & (table["method"] == "fastMRI's VarNet")].iloc[0]
        assert row[f"{column}, fall"] == form.format(fall)
    assert set(noisy) == {"4", "8"} and noisy["4"]["zero_filled"] != scores["4"]["zero_filled"]
    lesions, told = bench_tables.lesions(done, 0)
    assert "Left out" in told and set(lesions["acceleration"]) == {"4x", "8x"}
    counts = lesions[lesions["lesions"] == "all"]["number"]
    assert counts.nunique() == 1 and counts.iloc[0] > 0
    assert len(bench_tables.quality_curves(done).axes[0].get_lines()) == 3 * len(METHODS)
    shown = bench_tables.pictures(done, scores, 0)
    assert {"median_4x_1", "worst_8x_2"} <= set(shown)
    texts = json.loads((done.directory / "seed1" / "texts.json").read_text())
    assert bench_tables.text_table(done)["acceleration"].tolist() == ["all", "4x", "8x"]
    assert {"all", "4", "8"} == set(texts) and "finding_f1_without_kspace" in texts["4"]
    errors = bench_tables.text_table(done)["its standard error (patients)"].tolist()
    assert all(error == "–" or float(error) >= 0 for error in errors)


def test_other_volumes_by_folder(values, phantom_dir, tmp_path):
    one = bench.Bench(BenchParameters.create(values), tmp_path)
    volumes, accelerations, masks = one.shifted(f"folder {phantom_dir}")
    assert len(volumes) == 12 and accelerations == [4, 8] and masks == {}
    head, accelerations, _ = one.shifted("head nibabel")
    assert [volume.coils for volume in head] == [one.stage2.num_coils] and accelerations == [4, 8]
    assert bench.shift_name("folder data/other") == "folder_data_other"
    fresh, accelerations, masks = one.shifted("patients 5")
    assert len(fresh) == len(one.volumes["test"]) and accelerations == [4, 8] and masks == {}
    known = {volume.patient for part in one.volumes.values() for volume in part}
    assert not known & {volume.patient for volume in fresh} and fresh[0].recon[0] == one.stage2.img_size
    made = json.loads((phantom_dir / "phantom.json").read_text())
    assert {volume.slices for volume in fresh} == {made["slices"]}
    with pytest.raises(ParameterError, match="these are the patients of"):
        one.shifted(f"patients {made['seed']}")
    before = {path: path.stat().st_mtime_ns for path in fresh[0].path.parent.glob("*.h5")}
    again, *_ = one.shifted("patients 5")
    assert [volume.path for volume in again] == [volume.path for volume in fresh]
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"steps": [1]}, "one value per method"),
        ({"methods": ["unet"] * 5}, "named twice"),
        ({"shifts": ["patients next"]}, "patients want a seed"),
        ({"bench_parts": ["trian"]}, "trian is not known"),
        ({"learning_rates": [0.0] * 5}, "above 0"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(values, changed, told):
    with pytest.raises(ParameterError, match=told):
        BenchParameters.create({**values, **changed})


def test_every_known_method_is_built_and_gives_an_image(done):
    """Those of equal size and of measured lines too; none of them is the other."""
    batch = systems.batch_of(FastMRIDataset(done.volumes["test"], done.stage2, acceleration=4), 1)
    built = {name: done._system(name, 0) for name in bench.METHODS}
    for name, system in built.items():
        assert system(batch).shape == batch.target.shape, name
    sizes = {name: bench.count_parameters(system.decoder) for name, system in built.items()}
    assert sizes["varnet_equal_size"] == pytest.approx(sizes["model"], rel=0.3) and sizes["varnet"] < sizes["model"]
    assert built["varnet_measured_lines"].decoder.measured_lines and not built["varnet"].decoder.measured_lines
    assert not built["tokens_alone"].decoder.image_skip
    reading = {name for name, system in built.items() if system.decoder.encoder_image}
    assert reading == {"model", "trained_without_tokens", "without_tokens_equal_time"}
    one = bench.Bench(done.config, done.directory)
    one.stage2 = one.stage2.model_copy(update={"encoder_weights": True})  # which this encoder has none of
    for name in bench.METHODS:
        assert one._stage2(name).encoder_weights == (name in reading)
        if name in reading:
            with pytest.raises(ParameterError, match="encoder_weights: this encoder restores no image"):
                one._system(name, 0)
        else:
            one._system(name, 0)


def test_rates_are_tried_on_validation(values, tmp_path):
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(values))
    tried = list(bench.try_rates(str(tmp_path / "b.yaml"), ["unet"], rates=(1e-4, 1e-2), share=0.5))
    assert [(name, rate) for name, rate, _ in tried] == [("unet", 1e-4), ("unet", 1e-2)]
    assert tried[0][2] != tried[1][2] and all(0 < loss < 1 for _, _, loss in tried)


def test_stage_1_sees_slices_flipped_and_forced_as_its_parameters_say(done):
    one = bench.Bench(done.config, done.directory)
    for share in (0.0, 1.0):
        config = one.stage1 = one.stage1.model_copy(update={"mirror_share": share, "teacher_forcing": share})
        slices = [each for batch in one._loaders(config, 2, texts=True)[0] for each in batch.slices]
        assert slices and all(each.mirrored == each.forced == bool(share) for each in slices)


def test_what_needs_no_compression_gets_all_coils(values, tmp_path, monkeypatch):
    one = bench.Bench(BenchParameters.create(values), tmp_path)
    one.stage2 = one.stage2.model_copy(update={"num_coils": 2})
    tested, validated, reconstructed = one.volumes["test"], [], {}

    def choose(batches):
        validated.extend(batch.kspace.shape[1] for batch in batches)
        return bart.Settings(), []

    def reconstruct(batch, settings):
        reconstructed[batch.slices[0].file] = batch.kspace.shape[1]
        return torch.zeros(len(batch.slices), *batch.recon)

    monkeypatch.setattr(bart, "choose", choose)
    monkeypatch.setattr(bart, "reconstruct", reconstruct)
    for name in ("bart", "zero_filled"):
        one.reconstruct(name, 0, tested, tmp_path / "images", [4])
    assert reconstructed == {volume.file: volume.coils for volume in tested}
    assert validated and min(validated) > 2
    whole = FastMRIDataset(tested[:1], one.stage2.model_copy(update={"num_coils": 99}), acceleration=4)
    with h5py.File(tmp_path / "images" / "zero_filled" / "4" / tested[0].path.name) as h5:
        np.testing.assert_allclose(h5["reconstruction"][1], zero_filled_image(whole[1]).numpy(), rtol=1e-4)

    path = tmp_path / "bart_4x.json"
    kept = {name: value for name, value in json.loads(path.read_text()).items() if name != "coils"}
    path.write_text(json.dumps(kept))  # as it was when BART got compressed coils
    with pytest.raises(ParameterError, match=r"bart_4x.json: BART's settings were chosen on compressed coils"):
        one.choose_bart(4)
