"""Findings to text and back: what is known about a slice, the prompt, the answer, and how answers are scored.

The facts of a slice come from the acquisition attribute, the slice's place in the stack and fastMRI+ (Zhao et al.,
"fastMRI+, clinical pathology annotations for knee and brain fully sampled MRI data", Scientific Data 9, 152, 2022).
``answer`` tells them in one or two short sentences, ``parse`` reads such sentences back, so that generated text can be
scored against the truth. The prompt is one constant: nothing of the answer can reach the input through it.

Sides and regions are those of the *displayed* image, which is the h5's array flipped up/down (anterior at the top):

- side, from the box's centre: "midline" inside the central tenth of the width, else "left" or "right" as one sees it
  on the displayed image (image left, not the patient's left);
- region, from the box's centre: "anterior", "central" or "posterior" third of the displayed image's height;
- level, from the slice number: "lower", "middle" or "upper" third of the stack; slice 0 is the lowest.
"""

from __future__ import annotations

import codecs
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

logger = logging.getLogger("mrilib")

#: name of a contrast for each value of the h5's ``acquisition`` attribute
CONTRASTS = {
    "AXT1": "T1",
    "AXT1PRE": "T1 pre-contrast",
    "AXT1POST": "T1 post-contrast",
    "AXT2": "T2",
    "AXFLAIR": "FLAIR",
}
#: fastMRI's knee acquisitions: such files are no brains
KNEES = ("CORPD_FBK", "CORPDFS_FBK")
LEVELS = ("lower", "middle", "upper")
SIDES = ("left", "midline", "right")
REGIONS = ("anterior", "central", "posterior")
#: half of the midline's width, as a fraction of the image's width
MIDLINE_HALF_WIDTH = 0.05

#: fastMRI+ labels of the brain that come with a box
BOX_LABELS = (
    "Absent septum pellucidum",
    "Craniectomy",
    "Craniectomy with Cranioplasty",
    "Craniotomy",
    "Dural thickening",
    "Edema",
    "Encephalomalacia",
    "Enlarged ventricles",
    "Extra-axial mass",
    "Intraventricular substance",
    "Lacunar infarct",
    "Likely cysts",
    "Mass",
    "Nonspecific lesion",
    "Nonspecific white matter lesion",
    "Normal variant",
    "Paranasal sinus opacification",
    "Pineal cyst",
    "Possible artifact",
    "Posttreatment change",
    "Resection cavity",
)
#: fastMRI+ labels of the brain that apply to the whole volume
STUDY_LABELS = (
    "Colpocephaly",
    "Extra-axial collection",
    "Global Ischemia",
    "Global label: Small vessel chronic white matter ischemic change",
    "Global white matter disease",
    "Innumerable bilateral focal brain lesions",
    "Motion artifact",
    "Normal for age",
    "Possible demyelinating disease",
)
#: every label; the text has words for each of them both as a finding and as a label of the whole study
LABELS = tuple(sorted(BOX_LABELS + STUDY_LABELS))
_LABEL_OF_TEXT = {label.lower(): label for label in LABELS}

#: bytes; the annotations of all of fastMRI's brains, and a report of each of its slices, are a tenth of it
LARGEST_TEXT = 2**28
_COLUMNS = ("file", "slice", "study_level", "x", "y", "width", "height", "label")
_BOX_COLUMNS = ("x", "y", "width", "height")


@dataclass(frozen=True)
class Box:
    """A fastMRI+ box in the h5's own array coordinates.

    Attributes
    ----------
    x, y : float
        first column and first row of the box [pixels of the reconstruction]; y grows with the array's row index
    width, height : float
        [pixels]
    label : str
        one of ``LABELS``
    line : int
        of the CSV; 0 if it comes from none
    """

    x: float
    y: float
    width: float
    height: float
    label: str
    line: int = field(default=0, compare=False)


@dataclass(frozen=True, order=True)
class Finding:
    """One finding as the text tells it. Raises ValueError for a label, side or region that has no words."""

    label: str
    side: str
    region: str

    def __post_init__(self) -> None:
        for kind, value, known in (
            ("label", self.label, LABELS),
            ("side", self.side, SIDES),
            ("region", self.region, REGIONS),
        ):
            if value not in known:
                raise ValueError(f"finding: unknown {kind} {value!r}{_nearest(value, known)}")


@dataclass(frozen=True)
class Facts:
    """What is known about one slice.

    Attributes
    ----------
    contrast : str or None
        one of ``CONTRASTS.values()``; None for an acquisition that is not in ``CONTRASTS``: unknown
    level : str
        "lower", "middle" or "upper" third of the stack
    findings : tuple of Finding, or None
        sorted and without repeats (several boxes in one place are one finding); () means reviewed and nothing found,
        None means not reviewed, hence unknown
    study_labels : tuple of str
        labels of the whole volume, sorted and without repeats; always () if not reviewed
    """

    contrast: str | None
    level: str
    findings: tuple[Finding, ...] | None = None
    study_labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for kind, value, known in (("contrast", self.contrast, CONTRASTS.values()), ("level", self.level, LEVELS)):
            if value not in known and not (kind == "contrast" and value is None):
                raise ValueError(f"facts: unknown {kind} {value!r}{_nearest(value, known)}")
        for label in self.study_labels:
            if label not in LABELS:
                raise ValueError(f"facts: unknown study label {label!r}{_nearest(label, LABELS)}")
        if self.findings is None and self.study_labels:
            raise ValueError("facts: study labels of a volume that was not reviewed (findings is None)")
        # one canonical order, so that equal facts are equal objects and have one text
        if self.findings is not None:
            object.__setattr__(self, "findings", tuple(sorted(set(self.findings))))
        object.__setattr__(self, "study_labels", tuple(sorted(set(self.study_labels))))


def _cut(value: object) -> str:
    """A value for a message, which a megabyte of it would not make clearer."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _nearest(value: object, known: Iterable[str]) -> str:
    names = list(known)
    close = get_close_matches(str(value)[:200], names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(names)}"


# ------------------------------------------------------------------------------------------------- reading fastMRI+


@dataclass(frozen=True)
class Annotations:
    """The contents of a fastMRI+ CSV and its list of reviewed files. Files are named by their stem, without ``.h5``."""

    files: frozenset[str]
    _boxes: dict[tuple[str, int], tuple[Box, ...]] = field(repr=False)
    _study: dict[str, tuple[str, ...]] = field(repr=False)

    def reviewed(self, file: str) -> bool:
        """Whether a radiologist has seen this volume. If not, its findings are unknown, not absent."""
        return file in self.files

    def boxes(self, file: str, slice_num: int, image_height: int) -> tuple[Box, ...]:
        """Boxes of one slice in array coordinates, y' = H − y − height.

        Parameters
        ----------
        file : str
            stem of the h5 file
        slice_num : int
            0-based
        image_height : int
            H, the number of rows of ``reconstruction_rss`` [pixels]

        Returns
        -------
        tuple of Box
            in the CSV's order; empty for a slice without boxes *and* for a file nobody reviewed (ask ``reviewed``)

        Raises
        ------
        ValueError
            if a box ends below the image, which says that `image_height` is not the annotated image's
        """
        flipped = []
        for box in self._boxes.get((file, slice_num), ()):
            y = image_height - box.y - box.height
            if y < 0:
                raise ValueError(
                    f"{file}, slice {slice_num}: box {box.label!r}{_of_line(box)} reaches row {box.y + box.height:g} "
                    f"of {image_height} rows; the annotations belong to a larger reconstruction"
                )
            flipped.append(replace(box, y=y))
        return tuple(flipped)

    @cached_property
    def last_slice(self) -> dict[str, int]:
        """The last slice with a box, of every file that has any."""
        last: dict[str, int] = {}
        for file, slice_num in self._boxes:
            last[file] = max(slice_num, last.get(file, 0))
        return last

    def study_labels(self, file: str) -> tuple[str, ...]:
        """Labels of the whole volume, sorted; () if there are none or the file was not reviewed."""
        return self._study.get(file, ())


def read_annotations(csv: str | Path, file_list: str | Path) -> Annotations:
    """Read fastMRI+'s ``brain.csv`` and ``brain_file_list.csv``.

    Parameters
    ----------
    csv : path
        columns file, slice, study_level, x, y, width, height, label; x, y is a box's top left corner on the up/down
        flipped image [pixels]; rows with study_level Yes apply to the volume and have no box
    file_list : path
        one reviewed file a line, no header

    Returns
    -------
    Annotations

    Raises
    ------
    ValueError
        naming file and line: a missing column, something that is not a number, a negative or infinite box, a
        study_level that is neither Yes nor No, an unknown label, a row of a file that the list does not hold
    FileNotFoundError
        if either file is missing
    """
    csv, file_list = Path(csv), Path(file_list)
    for path in (csv, file_list):
        _require_file(path, "table of annotations")
    files = _read_file_list(file_list)
    try:
        # everything as text first: pandas would turn a column with one bad number silently into strings
        table = pd.read_csv(csv, dtype=str, keep_default_na=False, skip_blank_lines=False)
        header = [str(name) for name in pd.read_csv(csv, dtype=str, header=None, nrows=1).iloc[0]]
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{csv}: not a readable CSV file: {str(error).splitlines()[0]}") from error
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise ValueError(f"{csv}, line 1: column {', '.join(twice)} is given twice; leave one of them out")
    missing = [name for name in _COLUMNS if name not in table.columns]
    if missing:
        raise ValueError(f"{csv}, line 1: column {', '.join(missing)} missing; needed are {', '.join(_COLUMNS)}")
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes surplus values for an index
        raise ValueError(f"{csv}, line 2: more values than the {len(table.columns)} columns of line 1")

    boxes: dict[tuple[str, int], list[Box]] = {}
    study: dict[str, set[str]] = {}
    for line, row in enumerate(table.to_dict("records"), start=2):
        where = f"{csv}, line {line}"
        values = {name: _text(row[name]) for name in _COLUMNS}
        file, label = values["file"], values["label"]
        if file not in files:
            raise ValueError(f"{where}: {_cut(file)} is not in {file_list}, which must list every reviewed file")
        if label not in LABELS:
            raise ValueError(f"{where}: unknown label {_cut(label)}{_nearest(label, LABELS)}")
        if not re.fullmatch(r"[0-9]{1,9}", values["slice"]):
            raise ValueError(f"{where}: slice {_cut(values['slice'])} is not a number from 0 on")
        if values["study_level"] == "Yes":
            given = [name for name in _BOX_COLUMNS if values[name]]
            if given:
                raise ValueError(f"{where}: study_level Yes, but {', '.join(given)} given; such rows have no box")
            study.setdefault(file, set()).add(label)
        elif values["study_level"] == "No":
            x, y, width, height = (_pixels(values[name], name, where) for name in _BOX_COLUMNS)
            if not width or not height:  # fastMRI+ has two of them
                logger.warning(
                    "%s: width %g, height %g: a box without area; only the text tells of it", where, width, height
                )
            boxes.setdefault((file, int(values["slice"])), []).append(Box(x, y, width, height, label, line))
        else:
            raise ValueError(f"{where}: study_level is {_cut(values['study_level'])}; it must be Yes or No")
    return Annotations(
        frozenset(files),
        {key: tuple(found) for key, found in boxes.items()},
        {file: tuple(sorted(labels)) for file, labels in study.items()},
    )


def _read_file_list(path: Path) -> set[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file: {error}") from error
    files = set()
    for number, line in enumerate(lines, start=1):
        name = line.strip()
        if not name and number == len(lines):
            continue
        if not re.fullmatch(r"[^,;\s\"]+", name):
            raise ValueError(f"{path}, line {number}: {_cut(line)} is not one file name")
        files.add(name)
    return files


def _of_line(box: Box) -> str:
    return f" (line {box.line} of the CSV)" if box.line else ""


def _text(value: object) -> str:
    return value.strip() if isinstance(value, str) else ""  # pandas puts NaN where a line is too short


def _pixels(text: str, name: str, where: str) -> float:
    if not re.fullmatch(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]{1,3})?|[+-]?(nan|inf)", text):  # float takes any digits
        raise ValueError(f"{where}: {name} {_cut(text)} is not a number")
    value = float(text)
    if not (np.isfinite(value) and value >= 0):
        raise ValueError(f"{where}: {name} is {text[:200]}; it must be finite and not negative")
    return value


def _require_file(path: Path, what: str) -> None:
    """Refuse what should not be opened (a pipe, which would wait for ever) or is larger than any text of its kind."""
    if not path.is_file():
        if not path.exists():
            raise FileNotFoundError(f"{path}: {what} does not exist")
        raise ValueError(f"{path}: {what} must be a file")
    if path.stat().st_size > LARGEST_TEXT:
        raise ValueError(f"{path}: {path.stat().st_size} bytes; no {what} is that large")


# ------------------------------------------------------------------------------------------------- facts of a slice


def contrast_name(acquisition: str) -> str:
    """Name of the contrast of an ``acquisition`` attribute; ValueError naming an unknown one."""
    if acquisition not in CONTRASTS:
        raise ValueError(f"unknown acquisition {acquisition!r}{_nearest(acquisition, CONTRASTS)}")
    return CONTRASTS[acquisition]


def slice_level(slice_num: int, num_slices: int) -> str:
    """Third of the stack that a 0-based slice number lies in; slice 0 is the lowest."""
    if not 0 <= slice_num < num_slices:
        raise ValueError(f"slice {slice_num} of a volume of {num_slices} slices")
    return LEVELS[3 * slice_num // num_slices]


def box_finding(box: Box, image_shape: tuple[int, int]) -> Finding:
    """Side and region of a box (array coordinates) from its centre on the displayed, up/down flipped image.

    `image_shape` is that of ``reconstruction_rss``, (h, w) [pixels]. Raises ValueError for a centre outside of it.
    """
    rows, columns = image_shape
    across = (box.x + box.width / 2) / columns
    down = 1 - (box.y + box.height / 2) / rows
    if not (0 <= across <= 1 and 0 <= down <= 1):
        raise ValueError(
            f"box {box.label!r}{_of_line(box)} at column x {box.x:g}, row y {box.y:g} lies outside the image of {rows} "
            f"rows and {columns} columns; the annotations belong to another reconstruction"
        )
    side = "midline" if abs(across - 0.5) <= MIDLINE_HALF_WIDTH else "left" if across < 0.5 else "right"
    return Finding(box.label, side, REGIONS[min(2, int(3 * down))])


def slice_facts(
    annotations: Annotations | None,
    file: str,
    slice_num: int,
    num_slices: int,
    acquisition: str,
    image_shape: tuple[int, int],
) -> Facts:
    """Facts of one slice.

    Parameters
    ----------
    annotations : Annotations or None
        None where there are no annotations at all: findings are unknown then
    file : str
        stem of the h5 file
    slice_num, num_slices : int
        0-based slice number, and the number of slices of the array
    acquisition : str
        the h5's attribute; the contrast of one that is not in ``CONTRASTS`` is unknown
    image_shape : (int, int)
        rows and columns of ``reconstruction_rss`` [pixels]

    Raises
    ------
    ValueError
        a slice outside the volume, a box outside the image or of a slice that the volume does not have
    """
    contrast, level = CONTRASTS.get(acquisition), slice_level(slice_num, num_slices)
    if annotations is None or not annotations.reviewed(file):
        return Facts(contrast, level, None)
    if annotations.last_slice.get(file, 0) >= num_slices:
        raise ValueError(
            f"{file}: the annotations have a finding on slice {annotations.last_slice[file]}, the file has "
            f"{num_slices} slices, counted from 0; one of them is not the right one"
        )
    boxes = annotations.boxes(file, slice_num, image_shape[0])
    try:
        findings = tuple(box_finding(box, image_shape) for box in boxes)
    except ValueError as error:
        raise ValueError(f"{file}, slice {slice_num}: {error}") from None
    return Facts(contrast, level, findings, annotations.study_labels(file))


# ------------------------------------------------------------------------------------------------- text and back


def mirrored(facts: Facts) -> Facts:
    """Facts of a slice whose image is flipped left to right."""
    if facts.findings is None:
        return facts
    swapped = dict(zip(SIDES, reversed(SIDES), strict=True))
    findings = tuple(replace(finding, side=swapped[finding.side]) for finding in facts.findings)
    return replace(facts, findings=findings)


def prompt() -> str:
    """The one prompt of all slices. It is a constant, so it cannot tell contrast, slice number or file name."""
    return "Describe this scan."


def answer(facts: Facts) -> str:
    """The facts in plain words, e.g. "Axial FLAIR image, upper third of the brain. Findings: mass, right posterior."

    An unknown contrast is left out: "Axial image, upper third of the brain." The findings sentence says "Findings:
    none." for a reviewed slice without findings and is left out for a volume that nobody reviewed; "Whole study: …"
    follows where the volume has labels of its own. Inverse of ``parse``.
    """
    text = f"Axial {facts.contrast + ' ' if facts.contrast else ''}image, {facts.level} third of the brain."
    if facts.findings is not None:
        listed = "; ".join(f"{found.label.lower()}, {found.side} {found.region}" for found in facts.findings)
        text += f" Findings: {listed or 'none'}."
    if facts.study_labels:
        text += f" Whole study: {'; '.join(label.lower() for label in facts.study_labels)}."
    return text


_ANSWER = re.compile(
    r"Axial (?:(?P<contrast>[^,.]+) )?image, (?P<level>[^,.]+) third of the brain\."
    r"(?: Findings: (?P<findings>[^.]+)\.)?(?: Whole study: (?P<study>[^.]+)\.)?"
)


def parse(text: str) -> Facts:
    """Read an answer back into facts; the order of findings and repeats do not matter.

    Raises
    ------
    ValueError
        saying what is wrong: not the sentences that ``answer`` writes, or an unknown contrast, level, label, side or
        region
    """
    match = _ANSWER.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"not an answer of the form {answer(Facts('T1', 'lower', ()))!r}: {text!r}")
    findings: tuple[Finding, ...] | None = None
    if match["findings"] == "none":
        findings = ()
    elif match["findings"] is not None:
        findings = tuple(_parse_finding(item) for item in match["findings"].split("; "))
    study = tuple(_parse_label(item) for item in match["study"].split("; ")) if match["study"] else ()
    return Facts(match["contrast"], match["level"], findings, study)


def _parse_finding(item: str) -> Finding:
    parts = re.fullmatch(r"([^,]+), (\S+) (\S+)", item)
    if parts is None:
        raise ValueError(f"finding {item!r} is not of the form 'label, side region'")
    return Finding(_parse_label(parts[1]), parts[2], parts[3])


def _parse_label(text: str) -> str:
    if text not in _LABEL_OF_TEXT:
        raise ValueError(f"unknown label {text!r}{_nearest(text, tuple(_LABEL_OF_TEXT))}")
    return _LABEL_OF_TEXT[text]


# ------------------------------------------------------------------------------------------------- users' own reports


class Report(NamedTuple):
    """A user's own text for one slice: stem of the h5 file, 0-based slice number, prompt and response."""

    file: str
    slice: int
    prompt: str
    response: str


LONGEST_TEXT = 20_000  # characters of a prompt or a response, some 5,000 tokens


def read_reports(path: str | Path) -> dict[tuple[str, int], Report]:
    """Read reports, one JSON object a line with the keys file (with or without .h5), slice, prompt, response.

    Returns
    -------
    dict from (file stem, slice number) to Report

    Raises
    ------
    ValueError
        naming file and line: not JSON, missing or unknown keys, a wrong type, an empty text, the same slice twice
    """
    path = Path(path)
    _require_file(path, "file of reports")
    reports: dict[tuple[str, int], Report] = {}
    first_line: dict[tuple[str, int], int] = {}
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, raw in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        if not raw.strip() and number == len(lines):
            continue
        try:
            entry = json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are both ValueErrors
            raise ValueError(f"{where}: not a JSON object: {error}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: a JSON {type(entry).__name__}, not an object with {', '.join(Report._fields)}")
        for key in entry:
            if key not in Report._fields:
                raise ValueError(f"{where}: unknown key {_cut(key)}{_nearest(key, Report._fields)}")
        for key in Report._fields:
            if key not in entry:
                raise ValueError(f"{where}: key {key!r} is missing")
            if key == "slice":
                if type(entry[key]) is not int or entry[key] < 0:
                    raise ValueError(f"{where}: slice is {_cut(entry[key])}; it must be a number from 0 on")
            elif not isinstance(entry[key], str) or not entry[key].strip():
                raise ValueError(f"{where}: {key} is {_cut(entry[key])}; it must be a text that is not empty")
            elif len(entry[key]) > LONGEST_TEXT:
                raise ValueError(f"{where}: {key} has {len(entry[key])} characters; at most {LONGEST_TEXT} are allowed")
            elif any("\ud800" <= character <= "\udfff" for character in entry[key]):  # which no tokenizer takes
                raise ValueError(f"{where}: {key} holds half a surrogate pair, which is no character")
        entry["file"] = entry["file"].strip().removesuffix(".h5")
        place = (entry["file"], entry["slice"])
        if place in reports:
            raise ValueError(
                f"{where}: {place[0][:200]}, slice {place[1]} was already given in line {first_line[place]}"
            )
        reports[place], first_line[place] = Report(**entry), number
    return reports


# ------------------------------------------------------------------------------------------------- scores


def finding_scores(truth: Sequence[Facts], predicted: Sequence[Facts | None]) -> dict[str, float | None]:
    """Micro-averaged scores of findings over exact (label, side, region).

    Over all reviewed slices, F1 = 2 TP / (2 TP + FP + FN). A clean slice counts: every finding claimed on it is a
    false positive (and calling it clean adds nothing, as there is nothing to find). Text that did not parse (None),
    or that says nothing about findings, misses every true finding and counts as one false positive, so that
    rubbish costs on clean slices too. Slices that nobody reviewed are left out.

    Parameters
    ----------
    truth : sequence of Facts
    predicted : sequence of Facts or None
        what ``parse`` gave for the generated text, None where it raised

    Returns
    -------
    dict
        f1, precision, recall, any_finding_accuracy (share of slices rightly called clean or not), parsed (share of
        slices with readable findings), samples (reviewed slices). A ratio of nothing to nothing is None: F1 where
        there was nothing to find and nothing claimed, all of them where nothing was reviewed.
    """
    true_positives = false_positives = false_negatives = right = readable = samples = 0
    for facts, guess in zip(truth, predicted, strict=True):
        counts = finding_counts(facts, guess)
        if counts is None:
            continue
        samples += 1
        right_ones, wrong_ones, missed = counts
        true_positives += right_ones
        false_positives += wrong_ones
        false_negatives += missed
        if guess is not None and guess.findings is not None:
            readable += 1
            right += bool(facts.findings) == bool(guess.findings)
    return {
        "f1": _ratio(2 * true_positives, 2 * true_positives + false_positives + false_negatives),
        "precision": _ratio(true_positives, true_positives + false_positives),
        "recall": _ratio(true_positives, true_positives + false_negatives),
        "any_finding_accuracy": _ratio(right, samples),
        "parsed": _ratio(readable, samples),
        "samples": samples,
    }


def finding_counts(facts: Facts, guess: Facts | None) -> tuple[int, int, int] | None:
    """True positives, false positives and false negatives of one slice, as `finding_scores` sums them.

    None of a slice that nobody reviewed.
    """
    if facts.findings is None:
        return None
    found = set(facts.findings)
    if guess is None or guess.findings is None:
        return 0, 1, len(found)
    claimed = set(guess.findings)
    return len(found & claimed), len(claimed - found), len(found - claimed)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def best_constant_answer(facts: Sequence[Facts]) -> tuple[Finding, ...]:
    """The one set of findings that, given for every slice, has the highest F1 of ``finding_scores`` on `facts`.

    With N reviewed slices and T true findings, a constant set K scores 2 Σ n_f / (N |K| + T), n_f being the number of
    slices with finding f. For a given size the commonest findings are best, so taking them one by one as long as the
    score rises is exact. Returns () where no slice has a finding.
    """
    reviewed = [one.findings for one in facts if one.findings is not None]
    counts = Counter(found for findings in reviewed for found in findings)
    total = sum(counts.values())
    best, best_f1, hits = 0, 0.0, 0
    ranked = sorted(counts, key=lambda found: (-counts[found], found))
    for size, found in enumerate(ranked, start=1):
        hits += counts[found]
        f1 = 2 * hits / (len(reviewed) * size + total)
        if f1 > best_f1:
            best, best_f1 = size, f1
    return tuple(sorted(ranked[:best]))


def attribute_accuracy(truth: Sequence[Facts], predicted: Sequence[Facts | None], attribute: str) -> float | None:
    """Share of slices whose "contrast" or "level" the text names rightly; text that did not parse is wrong.

    Slices of an unknown contrast are left out. None where no slice is left.
    """
    if attribute not in ("contrast", "level"):
        raise ValueError(f"attribute {attribute!r} is neither 'contrast' nor 'level'")
    right = [
        guess is not None and getattr(facts, attribute) == getattr(guess, attribute)
        for facts, guess in zip(truth, predicted, strict=True)
        if getattr(facts, attribute) is not None
    ]
    return _ratio(sum(right), len(right))
