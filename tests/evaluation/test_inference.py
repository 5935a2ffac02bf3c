"""Unknown scores are null and explained in words: nothing reviewed, one patient, an unlisted contrast."""

import json
import shutil
from collections import Counter

import h5py
import numpy as np
import pytest
import systems
import torch
from made_results import score

from mrilib.__main__ import main
from mrilib.data import findings
from mrilib.data.dataset import FastMRIDataset
from mrilib.data.fastmri_file import read_volume
from mrilib.data.findings import Facts, Finding
from mrilib.data.splits import load_annotations
from mrilib.display import compare_runs, conclusions, results, tables
from mrilib.evaluation import inference, reconstructions
from mrilib.metrics import image, text_scores
from mrilib.runs.record import Run

MASS = Finding("Mass", "left", "central")
FINDING_KEYS = ("finding_f1", "finding_precision", "finding_recall", "any_finding_accuracy")


def text_rows(truth, predicted=None, patients="ab", **others):
    """Rows of `Evaluator.run` in which the model's text and the constant prefix's have the facts `predicted`."""
    return [
        {
            "patient": patient,
            "acceleration": 4,
            "facts": facts,
            "tokens": 3,
            "nats_own": 1.0,
            "correct_own": 2,
            "generated": findings.answer(guess),
            "generated_without_kspace": findings.answer(guess),
            "nats_without_kspace": 2.0,
            **others,
        }
        for facts, guess, patient in zip(truth, predicted or truth, patients, strict=True)
    ]


def texts_of(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts]


# ------------------------------------------------------------------------------------------------- nothing reviewed


def test_unreviewed_findings_have_no_score(tmp_path):
    unknown = [Facts("T1", "lower"), Facts("T2", "upper")]
    predicted = [Facts("T1", "lower", (MASS,)), Facts("T2", "upper", ())]
    folder = tmp_path / "one"
    Run(folder, []).update_metrics(analysis=inference.score_texts(text_rows(unknown, predicted), unknown))
    analysis = json.loads((folder / "metrics.json").read_text(), parse_constant=pytest.fail)["analysis"]
    assert analysis["reviewed_samples"] == 0
    for name in (*FINDING_KEYS, "finding_f1_without_kspace", "finding_f1_best_constant"):
        assert name in analysis and analysis[name] is None, name

    table = tables.analysis_table({"analysis": analysis})
    assert set(table.iloc[3, 1:]) == {"–"}
    assert "no test sample was reviewed for findings" in conclusions.text_conclusion(analysis)
    figure = results.analysis_comparison(analysis)
    assert not figure.axes[2].patches
    assert "no test sample\nwas reviewed\nfor findings" in texts_of(figure)
    (folder / "run.json").write_text(json.dumps({"status": "done", "started": "", "notebooks": {}, "planned": []}))
    assert "finding F1" not in compare_runs.metrics_table({"one": folder}).index
    assert tables.runs_table(tmp_path)["finding F1"].tolist() == ["–"]


def test_without_true_and_predicted_findings_there_is_no_f1():
    clean = [Facts("T1", "lower", ())]
    scores = text_scores.finding_scores(clean, clean)
    assert [scores[name] for name in ("f1", "precision", "recall")] == [None] * 3
    assert scores["any_finding_accuracy"] == 1 and scores["samples"] == 1
    analysis = inference.score_texts(text_rows(clean * 2), clean)
    assert "nothing to find" in conclusions.text_conclusion(analysis)


# ------------------------------------------------------------------------------------------------- one patient


def test_one_patient_has_no_interval_and_no_verdict():
    own, other = ([score("a", ssim), score("a", ssim + 0.1)] for ssim in (0.8, 0.7))
    summary = image.summarize(own)
    assert summary["ssim"] == pytest.approx(0.85) and summary["patients"] == 1
    assert [summary[f"{name}_ci95"] for name in image.METRICS] == [None] * len(image.METRICS)
    section = reconstructions.summarize_methods({"4": {"model": own, "trained_without_tokens": other}})
    assert tables.reconstruction_table(section)["4x SSIM (95% interval)"].tolist() == ["0.850", "0.750"]
    sentence = conclusions.token_conclusion(section)
    assert "one test patient: no interval" in sentence and "+0.1000" in sentence
    assert "one test patient gives no interval" in conclusions.answer({"reconstruction": section}, "test", True)
    for text in (sentence, conclusions.image_conclusion(section)):
        assert not any(word in text for word in ("better", "worse", "different", " to "))
    for figure in (results.token_differences(section), results.method_scores(section)):
        spans = [np.ptp(line.get_xdata()) for axis in figure.axes for line in axis.lines]
        assert not any(spans)


def test_contrast_floor_of_one_patient_has_no_error():
    truth = [Facts("T1", "lower"), Facts("T1", "upper")]
    scores = inference.score_texts(text_rows(truth, patients="aa"), truth)
    assert scores["contrast_commonest"] == 1 and scores["contrast_commonest_se"] is None
    assert "±" not in conclusions.text_conclusion(scores)
    results.analysis_comparison(scores)._repr_png_()
    assert inference.score_texts(text_rows(truth, patients="ab"), truth)["contrast_commonest_se"] is not None


def test_samples_without_another_patient_are_left_out_and_counted():
    truth = [Facts("T1", "lower", ()), Facts("T2", "upper", ())]
    rows = text_rows(truth, nats_other_patient=3.0, correct_other_patient=1)
    rows += text_rows(truth[:1], patients="c")  # the only patient at its acceleration
    rows[-1] |= {"nats_own": 10.0, "nats_without_kspace": 11.0, "acceleration": 6}
    scores = inference.score_texts(rows, truth)
    assert scores["cross_entropy"] == pytest.approx(12 / 9)
    assert scores["cross_entropy_other_patient"] == pytest.approx(1.0)
    assert scores["cross_entropy_gain_over_other_patient"] == pytest.approx(2 / 3)  # on the same samples
    assert scores["other_patient_samples"] == 2
    assert "1 of 3 samples" in conclusions.text_conclusion(scores)

    without = inference.score_texts(text_rows(truth[:1], patients="c"), truth)
    assert without["cross_entropy_other_patient"] is None and without["other_patient_samples"] == 0
    assert "no other patient" in conclusions.text_conclusion(without)
    assert tables.analysis_table({"analysis": without})["shuffled tokens"].tolist() == ["–"] * 4
    results.analysis_comparison(without)._repr_png_()


def test_findings_are_counted_as_found_missed_and_invented():
    other = Finding("Edema", "left", "central")
    truth = [
        Facts("T1", "lower", (MASS, other)),
        Facts("T2", "upper", ()),
        Facts("T2", "upper", ()),
        Facts("T1", "lower"),
    ]
    predicted = [Facts("T1", "lower", (MASS,)), Facts("T1", "upper", (MASS, other)), Facts("T2", "upper", ()), truth[0]]
    rows = text_rows(truth, predicted, "abcd")
    rows.append({**rows[0], "generated": "rubbish"})
    analysis = inference.score_texts(rows, truth)
    counts = {name: analysis[name] for name in analysis if name.startswith(("findings_", "clean_"))}
    assert counts == {
        "findings_true": 4,
        "findings_found": 1,
        "findings_missed": 3,
        "findings_invented": 2,
        "clean_slices": 2,
        "clean_slices_with_invented": 1,
    }
    low, high = analysis["finding_f1_ci95"]
    assert 0 <= low <= analysis["finding_f1"] <= high <= 1
    assert analysis["contrast_confusion"] == {"T1": {"T1": 2, "none": 1}, "T2": {"T1": 1, "T2": 1}}
    warning = text_scores.text_warning(analysis | {"test_set": "the test files of here"})
    assert "4 texts on the test files of here it missed 3 of 4 findings and invented 2" in warning
    assert "1 of 2 texts on slices without findings invent one" in warning
    figure = results.text_errors(analysis)
    assert [text.get_text() for text in figure.axes[1].texts] == ["1", "3", "2", "1"]
    assert {text.get_text() for text in figure.axes[0].texts} == {"0", "1", "2"}


@pytest.mark.parametrize("analysis", [None, {}, {"reviewed_samples": 0, "findings_true": 0}, {"reviewed_samples": 5}])
def test_rates_that_were_not_measured_are_named(analysis):
    assert text_scores.text_warning(analysis).endswith("not measured.")


def test_errors_of_a_text_are_listed():
    truth = Facts("T1", "lower", (MASS,))
    assert text_scores.list_errors(truth, truth) == [] and text_scores.list_errors(truth, None) == ["not readable"]
    wrong = text_scores.list_errors(truth, Facts("T2", "upper", (Finding("Edema", "right", "anterior"),)))
    assert wrong == [
        "wrong contrast: T2",
        "wrong level: upper",
        "missed: mass, left central",
        "invented: edema, right anterior",
    ]
    assert text_scores.list_errors(Facts(None, "lower"), Facts("T2", "lower", (MASS,))) == []  # nothing else is known


# ------------------------------------------------------------------------------------------------- an unlisted contrast


def copy_with_acquisition(volume, folder, acquisition="AXT2STAR"):
    path = folder / volume.path.name
    shutil.copy(volume.path, path)
    with h5py.File(path, "r+") as h5:
        h5.attrs["acquisition"] = acquisition
    return path


def test_an_unlisted_contrast_is_a_warning(volumes, tmp_path, capsys):
    path = copy_with_acquisition(volumes[0], tmp_path)
    assert main(["check", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "1 usable" in output and "warning: unknown acquisition 'AXT2STAR'; did you mean 'AXT2'?" in output
    assert "contrasts: AXT2STAR (1)" in output
    assert read_volume(path).acquisition == "AXT2STAR"


def test_a_knee_is_refused(volumes, tmp_path, capsys):
    copy_with_acquisition(volumes[0], tmp_path, "CORPD_FBK")
    assert main(["check", str(tmp_path)]) == 1
    assert "knee" in capsys.readouterr().out


def test_text_leaves_an_unlisted_contrast_out(volumes, tmp_path, phantom_dir, backbone_dir):
    volume = read_volume(copy_with_acquisition(volumes[0], tmp_path))
    config = systems.stage1_config(phantom_dir, backbone_dir)
    one = FastMRIDataset([volume], config, training=True)[0]
    assert torch.equal(one.kspace, FastMRIDataset(volumes[:1], config, training=True)[0].kspace)
    text = findings.answer(one.facts)
    assert one.facts.contrast is None and text == "Axial image, lower third of the brain."
    assert findings.parse(text) == one.facts
    system = systems.build(config)
    assert "T2" not in system.tokenizer.decode(system.tokenize([one]).ids[0])


def test_an_unlisted_contrast_is_not_scored():
    truth = [Facts(None, "lower", ()), Facts("T1", "lower", ()), Facts("T2", "upper", ())]
    predicted = [Facts("T2", "lower", ()), Facts("T1", "lower", ()), Facts(None, "upper", ())]
    scores = inference.score_texts(text_rows(truth, predicted, "abc"), truth)
    assert scores["contrast_accuracy"] == scores["contrast_commonest"] == 0.5 and scores["contrast_samples"] == 2
    assert scores["level_accuracy"] == 1 and scores["samples"] == 3
    assert "of 2 slices" in conclusions.text_conclusion(scores)

    unknown = inference.score_texts(text_rows(truth[:1] * 2, predicted[:1] * 2), truth)
    names = ("contrast_accuracy", "contrast_accuracy_se", "contrast_commonest", "contrast_accuracy_without_kspace")
    assert [unknown[name] for name in names] == [None] * len(names) and unknown["contrast_samples"] == 0
    assert "no test sample has a contrast that is in the list" in conclusions.text_conclusion(unknown)
    assert tables.analysis_table({"analysis": unknown}).iloc[1, 1:].tolist() == ["–"] * 4
    figure = results.analysis_comparison(unknown)
    assert "no test sample has\na listed contrast" in texts_of(figure)


@pytest.mark.parametrize(
    ("true", "generated", "marked"),
    [
        ("Axial image, lower third", "Axial T1 image, lower third", "Axial T1 image, lower"),
        ("Axial T1 image, lower third", "Axial image, lower third", "Axial image, lower"),
        ("Axial image, lower third", "Axial image, upper third", "image, <b>upper</b> third"),
    ],
)
def test_marked_text_without_a_contrast(true, generated, marked):
    parts = (f"{text} of the brain." for text in (true, generated))
    assert marked in tables.marked_text(*parts)


def test_examples_and_previews_of_an_unlisted_contrast(volumes, tmp_path, phantom_dir, backbone_dir):
    volume = read_volume(copy_with_acquisition(volumes[0], tmp_path))
    config = systems.stage1_config(phantom_dir, backbone_dir)
    data = FastMRIDataset([volume], config)
    system = systems.build(config)
    assert len(inference.example_texts(system, data, 2, max_new_tokens=2)) == 2
    comparisons = inference.preview(system, data, 1, lambda batch: batch.target)
    assert comparisons[0].title.startswith("contrast unknown, slice")


def test_examples_are_of_different_patients(volumes, phantom_dir, backbone_dir):
    config = systems.stage1_config(phantom_dir, backbone_dir)
    data, system = FastMRIDataset(volumes, config), systems.build(config)
    patients = {volume.file: volume.patient for volume in volumes}
    count = len(set(patients.values()))
    table = inference.example_texts(system, data, count, max_new_tokens=1)
    assert {patients[file] for file in table["file"]} == set(patients.values())
    targets = inference.example_images(data, table)
    for target, file, number in zip(targets, table["file"], table["slice"], strict=True):
        with h5py.File(phantom_dir / f"{file}.h5") as h5:
            np.testing.assert_array_equal(target, h5["reconstruction_rss"][number])


def test_recall_by_label_counts_found_findings(volumes, phantom_dir, backbone_dir, monkeypatch):
    config = systems.stage1_config(phantom_dir, backbone_dir)
    data, system = FastMRIDataset(volumes, config, load_annotations(config)), systems.build(config)
    truth = [data.facts(index) for index in range(len(data))]
    expected = Counter(finding.label for facts in truth for finding in facts.findings or ())
    assert expected

    def generate(prefix, prompts, max_new_tokens):
        return [findings.answer(facts) for facts in current]

    current: list = []
    monkeypatch.setattr(system, "generate", generate)
    encode = inference.collate

    def collate(slices):
        current[:] = [one.facts for one in slices]
        return encode(slices)

    monkeypatch.setattr(inference, "collate", collate)
    table = inference.recall_by_label(system, data, batch_size=2)
    assert dict(zip(table["label"], table["findings"], strict=True)) == expected
    assert table["found"].equals(table["findings"])
    monkeypatch.setattr(system, "generate", lambda prefix, prompts, _: ["nothing readable"] * len(prompts))
    assert inference.recall_by_label(system, data)["found"].sum() == 0


# ------------------------------------------------------------------------------------------------- other patients


def test_drawn_slices_are_of_other_patients(volumes, phantom_dir, backbone_dir):
    config = systems.stage1_config(phantom_dir, backbone_dir)
    data = FastMRIDataset(volumes[:6], config)
    patients = {volume.file: volume.patient for volume in volumes}
    drawn = inference.draw_other_patients(data, seed=0)
    assert len(drawn) == len(data)
    for (file, _), index in drawn.items():
        assert patients[file] != patients[data.volumes[data.samples[index][0]].file]
    assert drawn == inference.draw_other_patients(data, seed=0) != inference.draw_other_patients(data, seed=1)
    assert inference.draw_other_patients(FastMRIDataset(volumes[:1], config), seed=0) == {}
