"""Facts as text and back, the fastMRI+ reader, users' reports, and text scores."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrilib.data import annotations as annotations_module
from mrilib.data import findings as findings_module
from mrilib.data.annotations import Box
from mrilib.data.findings import Facts, Finding
from mrilib.evaluation.inference import score_texts
from mrilib.metrics import text_scores

PLUS = Path(__file__).parents[2] / "data" / "fastmri_plus"
CSV, FILE_LIST = PLUS / "brain.csv", PLUS / "brain_file_list.csv"
HEADER = "file,slice,study_level,x,y,width,height,label\n"

labels = st.sampled_from(annotations_module.LABELS)
findings = st.builds(Finding, labels, st.sampled_from(findings_module.SIDES), st.sampled_from(findings_module.REGIONS))
contrasts = st.sampled_from([*findings_module.CONTRASTS.values(), None])
levels = st.sampled_from(findings_module.LEVELS)
all_facts = st.one_of(
    st.builds(Facts, contrasts, levels, st.none()),
    st.builds(Facts, contrasts, levels, *(st.lists(items, max_size=6).map(tuple) for items in (findings, labels))),
)


@pytest.fixture(scope="module")
def annotations():
    return annotations_module.read_annotations(CSV, FILE_LIST)


def write(tmp_path, rows, files="a\nb\n"):
    (tmp_path / "brain.csv").write_text(HEADER + rows)
    (tmp_path / "list.csv").write_text(files)
    return tmp_path / "brain.csv", tmp_path / "list.csv"


# ------------------------------------------------------------------------------------------------- text and back


@given(all_facts)
def test_parse_inverts_answer(facts):
    assert findings_module.parse(findings_module.answer(facts)) == facts


@given(all_facts, all_facts)
def test_different_facts_have_different_texts(one, other):
    assert (one == other) == (findings_module.answer(one) == findings_module.answer(other))


def test_wording():
    facts = Facts(
        "FLAIR",
        "upper",
        (Finding("Mass", "right", "posterior"), Finding("Edema", "left", "anterior")),
        ("Motion artifact",),
    )
    assert findings_module.answer(facts) == (
        "Axial FLAIR image, upper third of the brain. Findings: edema, left anterior; "
        "mass, right posterior. Whole study: motion artifact."
    )
    assert findings_module.answer(Facts("T2", "lower", ())).endswith(" Findings: none.")
    assert "Findings" not in findings_module.answer(Facts("T2", "lower", None))


def test_findings_are_unique_and_unordered():
    mass, edema = Finding("Mass", "left", "central"), Finding("Edema", "left", "central")
    assert Facts("T1", "lower", (mass, edema, mass)) == Facts("T1", "lower", (edema, mass))
    text = "Axial T1 image, lower third of the brain. Findings: mass, left central; edema, left central."
    assert findings_module.parse(text).findings == (edema, mass)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not an answer"),
        ("Axial T1 image, lower third of the brain", "not an answer"),
        ("Axial T1 image, lower third of the brain. Findings: none. And more.", "not an answer"),
        ("Axial T3 image, lower third of the brain.", "unknown contrast 'T3'"),
        ("Axial T1 image, top third of the brain.", "unknown level 'top'"),
        (
            "Axial T1 image, lower third of the brain. Findings: mas, left central.",
            "unknown label 'mas'; did you mean 'ma",
        ),
        ("Axial T1 image, lower third of the brain. Findings: mass, centre central.", "unknown side"),
        ("Axial T1 image, lower third of the brain. Findings: mass, left front.", "unknown region"),
        ("Axial T1 image, lower third of the brain. Findings: mass left central.", "not of the form"),
        ("Axial T1 image, lower third of the brain. Whole study: normal for age.", "not reviewed"),
    ],
)
def test_other_text_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        findings_module.parse(text)


def test_prompt_holds_no_fact():
    words = [*findings_module.CONTRASTS, *findings_module.FACT_WORDS]
    assert not [word for word in words if word.lower() in findings_module.prompt().lower()]


# ------------------------------------------------------------------------------------------------- fastMRI+ as it is


def test_every_row_of_fastmri_plus_round_trips(annotations):
    table = pd.read_csv(CSV)
    assert set(table["label"]) == set(annotations_module.LABELS)
    boxes = 0
    for (file, number), rows in table.groupby(["file", "slice"]):
        acquisition = file.split("_")[2]
        facts = findings_module.slice_facts(annotations, file, number, 16, acquisition, (320, 320))
        assert findings_module.parse(findings_module.answer(facts)) == facts
        assert facts.contrast == findings_module.CONTRASTS[acquisition]
        assert {finding.label for finding in facts.findings} == set(rows.loc[rows["study_level"] == "No", "label"])
        assert set(facts.study_labels) >= set(rows.loc[rows["study_level"] == "Yes", "label"])
        boxes += len(annotations.boxes(file, number, 320))
    assert boxes == (table["study_level"] == "No").sum() == 7570
    assert len(annotations.files) == 1001


def test_box_in_array_coordinates(annotations):
    # the first row of the file: 2,No,91,132,7,6 on the flipped image of 320 rows
    box = annotations.boxes("file_brain_AXFLAIR_200_6002425", 2, 320)[0]
    assert box == Box(91, 320 - 132 - 6, 7, 6, "Nonspecific white matter lesion")
    with pytest.raises(ValueError, match=r"slice 2.*reaches row 138 of 130 rows"):
        annotations.boxes("file_brain_AXFLAIR_200_6002425", 2, 130)


def test_no_finding_differs_from_unknown(annotations):
    with_rows = {file for file, _ in annotations._boxes} | set(annotations._study)
    clean = sorted(annotations.files - with_rows)[0]
    assert findings_module.slice_facts(annotations, clean, 0, 16, "AXT1", (320, 320)).findings == ()
    for known, file in ((annotations, "file_brain_AXT1_000_0000000"), (None, clean)):
        facts = findings_module.slice_facts(known, file, 0, 16, "AXT1", (320, 320))
        assert facts.findings is None and facts.study_labels == ()
        assert "none" not in findings_module.answer(facts)


def test_finding_on_a_missing_slice(tmp_path):
    csv, files = write(tmp_path, "a,3,No,3,1,2,4,Edema\n")
    annotations = annotations_module.read_annotations(csv, files)
    assert len(findings_module.slice_facts(annotations, "a", 3, 4, "AXT1", (20, 20)).findings) == 1
    with pytest.raises(ValueError, match="a: the annotations have a finding on slice 3, the file has 3 slices"):
        findings_module.slice_facts(annotations, "a", 0, 3, "AXT1", (20, 20))


def test_side_and_region_refer_to_the_displayed_image():
    def place(x, y):
        finding = findings_module.box_finding(Box(x - 1, y - 1, 2, 2, "Mass"), (120, 100))
        return finding.side, finding.region

    assert place(20, 110) == ("left", "anterior")  # the array's last rows are displayed at the top
    assert place(80, 10) == ("right", "posterior")
    assert place(50, 60) == ("midline", "central")
    assert place(44, 60)[0] == "left" and place(46, 60)[0] == "midline" and place(56, 60)[0] == "right"
    assert place(20, 79)[1] == "central" and place(20, 81)[1] == "anterior"
    with pytest.raises(ValueError, match="outside the image"):
        place(101, 10)


def test_box_covers_the_same_pixels_after_the_flip(tmp_path):
    csv, files = write(tmp_path, "a,0,No,3,1,2,4,Edema\n")
    (box,) = annotations_module.read_annotations(csv, files).boxes("a", 0, 11)
    displayed = [[row in range(1, 5) and column in range(3, 5) for column in range(7)] for row in range(11)]
    array = displayed[::-1]
    inside = {(row, column) for row in range(11) for column in range(7) if array[row][column]}
    assert inside == {
        (row, column)
        for row in range(int(box.y), int(box.y + box.height))
        for column in range(int(box.x), int(box.x + box.width))
    }


def test_levels_of_odd_stacks():
    expected = ["lower", "lower", "middle", "middle", "upper"]
    assert [findings_module.slice_level(number, 5) for number in range(5)] == expected
    assert findings_module.slice_level(0, 1) == "lower"
    with pytest.raises(ValueError, match="slice 16 of a volume of 16"):
        findings_module.slice_level(16, 16)


def test_unknown_acquisition():
    with pytest.raises(ValueError, match="unknown acquisition 'AXT1POSTT'; did you mean 'AXT1POST'"):
        findings_module.contrast_name("AXT1POSTT")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("a,0,No,1,2,3,x,Mass", "line 3: height 'x' is not a number"),
        ("a,0,No,1,2,3,,Mass", "line 3: height '' is not a number"),
        ("a,0,No,1,2,-3,4,Mass", "line 3: width is -3"),
        ("a,0,No,nan,2,3,4,Mass", "line 3: x is nan"),
        ("a,0.5,No,1,2,3,4,Mass", "line 3: slice '0.5'"),
        ("a,-1,No,1,2,3,4,Mass", "line 3: slice '-1'"),
        ("a,\N{ARABIC-INDIC DIGIT THREE},No,1,2,3,4,Mass", "line 3: slice"),
        pytest.param(f"a,{'9' * 5000},No,1,2,3,4,Mass", "line 3: slice", id="slice with 5000 digits"),
        ("a,0,no,1,2,3,4,Mass", "line 3: study_level is 'no'; it must be Yes or No"),
        ("a,0,Yes,1,,,,Motion artifact", "line 3: study_level Yes, but x given"),
        ("a,0,No,1,2,3,4,Masss", "line 3: unknown label 'Masss'; did you mean 'Mass'"),
        ("c,0,No,1,2,3,4,Mass", "line 3: 'c' is not in"),
        ("a,0,No,1,2,3", "line 3: the row has 6 cells, the header 8"),
        ("a,0,No,1,2,3,4,Mass,5", "brain.csv: not a readable CSV.*line 3"),
    ],
)
def test_bad_rows(tmp_path, row, reason):
    with pytest.raises(ValueError, match=reason) as error:
        annotations_module.read_annotations(*write(tmp_path, f"a,0,No,1,2,3,4,Edema\n{row}\n"))
    assert "brain.csv" in str(error.value)


def test_bad_files(tmp_path):
    csv, files = write(tmp_path, "a,0,No,1,2,3,4,Mass,5\n")
    with pytest.raises(ValueError, match="line 2: more values"):
        annotations_module.read_annotations(csv, files)
    csv, files = write(tmp_path, "", files="a\n\nb\n")
    with pytest.raises(ValueError, match=r"list\.csv, line 2"):
        annotations_module.read_annotations(csv, files)
    with pytest.raises(FileNotFoundError):
        annotations_module.read_annotations(csv, tmp_path / "absent.csv")


# ------------------------------------------------------------------------------------------------- reports


def test_reports(tmp_path):
    path = tmp_path / "reports.jsonl"
    line = {"file": "a", "slice": 3, "prompt": "Describe.", "response": "A brain — normal."}
    path.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    assert annotations_module.read_reports(path) == {
        ("a", 3): annotations_module.Report("a", 3, "Describe.", "A brain — normal.")
    }


def test_byte_order_mark_is_ignored(tmp_path):
    """Editors on Windows put one at the start of a text file."""
    csv, names = write(tmp_path, "a,0,No,1,2,3,4,Edema\n")
    names.write_bytes(b"\xef\xbb\xbf" + names.read_bytes())
    assert annotations_module.read_annotations(csv, names).reviewed("a")
    reports = tmp_path / "reports.jsonl"
    reports.write_bytes(b"\xef\xbb\xbf" + b'{"file": "a", "slice": 0, "prompt": "p", "response": "r"}')
    assert list(annotations_module.read_reports(reports)) == [("a", 0)]


# ------------------------------------------------------------------------------------------------- scores

MASS, EDEMA, CYST = (Finding(label, "left", "central") for label in ("Mass", "Edema", "Likely cysts"))


def with_findings(*findings):
    return Facts("T1", "lower", findings)


def test_scores_by_hand():
    truth = [
        with_findings(MASS, EDEMA),
        with_findings(MASS),
        with_findings(),
        with_findings(),
        with_findings(CYST),
        Facts("T1", "lower", None),
    ]
    guess = [
        with_findings(MASS),
        with_findings(Finding("Mass", "right", "central")),
        with_findings(),
        with_findings(EDEMA),
        None,
        with_findings(MASS),
    ]
    scores = text_scores.finding_scores(truth, guess)
    # 1 hit; false: wrong side, edema on a slice without findings, text that cannot be parsed; missed: edema, mass, cyst
    assert scores["f1"] == pytest.approx(2 / (2 + 3 + 3))
    assert scores["precision"] == pytest.approx(1 / 4) and scores["recall"] == pytest.approx(1 / 4)
    assert scores["any_finding_accuracy"] == pytest.approx(3 / 5)
    assert scores["parsed"] == pytest.approx(4 / 5) and scores["samples"] == 5


def text_rows(truth, guess, patients):
    """Rows of `Evaluator.run` for slices with the generated facts `guess`."""
    return [
        {
            "patient": patient,
            "facts": facts,
            "tokens": 3,
            "nats_own": 1.0,
            "correct_own": 2,
            "generated": findings_module.answer(answer) if answer else "not an answer",
            "generated_without_kspace": None,
        }
        for facts, answer, patient in zip(truth, guess, patients, strict=True)
    ]


def test_standard_error_of_f1_is_clustered_by_patient():
    truth = [
        with_findings(MASS),
        with_findings(MASS),
        with_findings(MASS, EDEMA),
        with_findings(EDEMA),
        Facts("T1", "lower", None),
    ]
    guess = [with_findings(MASS), None, with_findings(MASS), with_findings(CYST), with_findings(MASS)]
    rows = text_rows(truth, guess, patients="aabbb")
    scores = score_texts(rows, truth)
    # Patient a: 1 hit, 1 text that cannot be parsed (false and missed). Patient b: 1 hit, 2 missed, 1 false.
    halves, wholes = np.array([2.0, 2.0]), np.array([4.0, 5.0])
    f1 = halves.sum() / wholes.sum()
    assert scores["finding_f1"] == pytest.approx(f1) == text_scores.finding_scores(truth, guess)["f1"]
    left_out = [halves[1] / wholes[1], halves[0] / wholes[0]]
    residuals = (halves - f1 * wholes) / wholes.sum()
    assert scores["finding_f1_se"] == pytest.approx(np.sqrt(2 * (residuals**2).sum()))
    assert scores["finding_f1_se"] == pytest.approx(
        abs(left_out[0] - left_out[1]) / 2, rel=0.1
    )  # close to the jackknife
    assert score_texts(text_rows(truth, guess, "aaaaa"), truth)["finding_f1_se"] is None  # one patient
    clean = [with_findings(), with_findings()]
    assert score_texts(text_rows(clean, clean, "ab"), clean)["finding_f1_se"] is None  # no finding


def test_extreme_scores():
    truth = [with_findings(MASS), with_findings()]
    assert text_scores.finding_scores(truth, truth)["f1"] == 1
    assert text_scores.finding_scores(truth, [None, None])["f1"] == 0
    assert text_scores.finding_scores(truth, [Facts("T1", "lower", None)] * 2)["parsed"] == 0
    assert text_scores.finding_scores([with_findings()], [with_findings()])["f1"] is None  # no finding, none predicted
    assert text_scores.finding_scores([with_findings()], [None])["f1"] == 0
    with pytest.raises(ValueError, match="shorter"):
        text_scores.finding_scores(truth, truth[:1])


@given(
    st.lists(
        st.lists(st.sampled_from([MASS, EDEMA, CYST]), max_size=3).map(lambda some: with_findings(*some)), max_size=6
    )
)
def test_best_constant_answer_is_optimal(facts):
    def score(constant):
        f1 = text_scores.finding_scores(facts, [with_findings(*constant)] * len(facts))["f1"]
        return 1.0 if f1 is None else f1  # no finding, none predicted

    subsets = [[f for bit, f in enumerate((MASS, EDEMA, CYST)) if number >> bit & 1] for number in range(8)]
    assert score(text_scores.best_constant_answer(facts)) == pytest.approx(max(score(some) for some in subsets))


def test_attribute_accuracy():
    truth = [Facts("T1", "lower"), Facts("T2", "upper"), Facts("T2", "upper")]
    guess = [Facts("T1", "upper"), Facts("T2", "upper"), None]
    assert text_scores.attribute_accuracy(truth, guess, "contrast") == pytest.approx(2 / 3)
    assert text_scores.attribute_accuracy(truth, guess, "level") == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="neither"):
        text_scores.attribute_accuracy(truth, guess, "findings")


def test_reports_accept_file_names_with_extension(tmp_path):
    path = tmp_path / "reports.jsonl"
    lines = [{"file": name, "slice": 1, "prompt": "p", "response": "r"} for name in ("a.h5", "b")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert set(annotations_module.read_reports(path)) == {("a", 1), ("b", 1)}
    path.write_text("".join(json.dumps({**lines[0], "file": name}) + "\n" for name in ("a.h5", "a")))
    with pytest.raises(ValueError, match="line 2: a, slice 1 was already given in line 1"):
        annotations_module.read_reports(path)
