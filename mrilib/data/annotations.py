"""fastMRI+ annotations and users' own reports, read from CSV and JSON lines."""

import codecs
import json
import logging
import re
from collections.abc import Iterable
from csv import Error as CsvError
from csv import reader as csv_reader
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

logger = logging.getLogger("mrilib")


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
        naming file and line: a missing column, a row with fewer cells than the header, something that is not a number,
        a negative or infinite box, a study_level that is neither Yes nor No, an unknown label, a row of a file that the
        list does not hold
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
        with open(csv, encoding="utf-8-sig", newline="") as file:  # pandas fills a row that is too short
            cells = [len(row) for row in csv_reader(file)]
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, CsvError) as error:
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
        if cells[line - 1] < len(header):
            raise ValueError(f"{where}: the row has {cells[line - 1]} cells, the header {len(header)}")
        values = {name: row[name].strip() for name in _COLUMNS}
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


# ------------------------------------------------------------------------------------------------- users' own reports


class Report(NamedTuple):
    """A user's own text for one slice: stem of the h5 file, 0-based slice number, prompt and response."""

    file: str
    slice: int
    prompt: str
    response: str


MAX_TEXT_LENGTH = 20_000  # characters of a prompt or a response, some 5,000 tokens


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
            elif len(entry[key]) > MAX_TEXT_LENGTH:
                raise ValueError(
                    f"{where}: {key} has {len(entry[key])} characters; at most {MAX_TEXT_LENGTH} are allowed"
                )
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
