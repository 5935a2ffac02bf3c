"""fastMRI+ annotations from CSV files, and users' reports from JSON lines."""

import codecs
import csv as csv_module
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

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


LABELS = tuple(sorted(BOX_LABELS + STUDY_LABELS))
LARGEST_FILE = 2**28  # bytes, 10 times a table or a report file for all brain slices of fastMRI
MAX_TEXT_LENGTH = 20_000  # characters of a prompt or a response, about 5,000 tokens
_BOX_COLUMNS = ("x", "y", "width", "height")
_COLUMNS = ("file", "slice", "study_level", *_BOX_COLUMNS, "label")


@dataclass(frozen=True)
class Box:
    """A fastMRI+ box in array coordinates of the h5 file.

    Attributes
    ----------
    x, y : float
        First column and first row [pixels of the reconstruction].
    width, height : float
        [pixels]
    label : str
        One of ``LABELS``.
    line : int
        Line of the CSV file; 0 if there is none.
    """

    x: float
    y: float
    width: float
    height: float
    label: str
    line: int = field(default=0, compare=False)


def nearest(value: object, known: Iterable[str]) -> str:
    """Hint for an unknown value: the most similar known name, or else all of them."""
    names = list(known)
    close = get_close_matches(str(value)[:200], names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(names)}"


def csv_line(box: Box) -> str:
    """Line of the CSV file that a box comes from, for an error message."""
    return f" (line {box.line} of the CSV)" if box.line else ""


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


@dataclass(frozen=True)
class Annotations:
    """Contents of a fastMRI+ CSV file and its list of reviewed files. Files are named without ``.h5``."""

    files: frozenset[str]
    _boxes: dict[tuple[str, int], tuple[Box, ...]] = field(repr=False)
    _study: dict[str, tuple[str, ...]] = field(repr=False)

    def reviewed(self, file: str) -> bool:
        """Whether a radiologist reviewed the volume. If not, its findings are unknown, not absent."""
        return file in self.files

    def boxes(self, file: str, slice_num: int, image_height: int) -> tuple[Box, ...]:
        """Boxes of one slice in array coordinates, y' = H − y − height, in the order of the CSV file.

        Parameters
        ----------
        file : str
            Stem of the h5 file.
        slice_num : int
            0-based.
        image_height : int
            H, the number of rows of ``reconstruction_rss`` [pixels].

        Raises
        ------
        ValueError
            If a box ends below the image, so that `image_height` is not that of the annotated image.
        """
        flipped = []
        for box in self._boxes.get((file, slice_num), ()):
            y = image_height - box.y - box.height
            if y < 0:
                raise ValueError(
                    f"{file}, slice {slice_num}: box {box.label!r}{csv_line(box)} reaches row {box.y + box.height:g} "
                    f"of {image_height} rows; the annotations belong to a larger reconstruction"
                )
            flipped.append(replace(box, y=y))
        return tuple(flipped)

    @cached_property
    def last_slice(self) -> dict[str, int]:
        """Last slice with a box, for each file with boxes."""
        last: dict[str, int] = {}
        for file, slice_num in self._boxes:
            last[file] = max(slice_num, last.get(file, 0))
        return last

    def study_labels(self, file: str) -> tuple[str, ...]:
        """Labels of the whole volume, sorted; () also if the file was not reviewed."""
        return self._study.get(file, ())


def read_annotations(csv: str | Path, file_list: str | Path) -> Annotations:
    """Read fastMRI+'s ``brain.csv`` and ``brain_file_list.csv``.

    Parameters
    ----------
    csv : path
        Columns file, slice, study_level, x, y, width, height, label. x, y is the top left corner of a box on the
        up/down flipped image [pixels]. Rows with study_level Yes apply to the volume and have no box.
    file_list : path
        One reviewed file a line, no header.

    Raises
    ------
    ValueError
        Names file and line: a missing column, a row with fewer cells than the header, a wrong number, a negative or
        infinite box, a study_level other than Yes and No, an unknown label, a file that is not in the list.
    FileNotFoundError
        If either file is missing.
    """
    csv, file_list = Path(csv), Path(file_list)
    for path in (csv, file_list):
        _require_file(path, "table of annotations")
    files = _read_file_list(file_list)
    boxes: dict[tuple[str, int], list[Box]] = {}
    study: dict[str, set[str]] = {}
    for line, row in enumerate(_read_table(csv), start=2):
        where = f"{csv}, line {line}"
        file, label = row["file"], row["label"]
        if file not in files:
            raise ValueError(f"{where}: {_shown(file)} is not in {file_list}, which must list every reviewed file")
        if label not in LABELS:
            raise ValueError(f"{where}: unknown label {_shown(label)}{nearest(label, LABELS)}")
        if not re.fullmatch(r"[0-9]{1,9}", row["slice"]):
            raise ValueError(f"{where}: slice {_shown(row['slice'])} is not a number from 0 on")
        if row["study_level"] == "Yes":
            if given := [name for name in _BOX_COLUMNS if row[name]]:
                raise ValueError(f"{where}: study_level Yes, but {', '.join(given)} given; such rows have no box")
            study.setdefault(file, set()).add(label)
        elif row["study_level"] == "No":
            x, y, width, height = (_pixels(row[name], name, where) for name in _BOX_COLUMNS)
            if not width or not height:  # fastMRI+ has two of these
                logger.warning(
                    "%s: width %g, height %g: a box without area appears only in the text", where, width, height
                )
            boxes.setdefault((file, int(row["slice"])), []).append(Box(x, y, width, height, label, line))
        else:
            raise ValueError(f"{where}: study_level is {_shown(row['study_level'])}; it must be Yes or No")
    return Annotations(
        frozenset(files),
        {place: tuple(of_slice) for place, of_slice in boxes.items()},
        {file: tuple(sorted(labels)) for file, labels in study.items()},
    )


def _read_table(csv: Path) -> list[dict[str, str]]:
    """Rows of a fastMRI+ CSV file as text; an entry that is missing at the end of a line is empty."""
    try:
        # Text only: pandas would silently turn a column with one bad number into text anyway.
        table = pd.read_csv(csv, dtype=str, keep_default_na=False, skip_blank_lines=False)
        header = [str(name) for name in pd.read_csv(csv, dtype=str, header=None, nrows=1).iloc[0]]
        with open(csv, encoding="utf-8-sig", newline="") as file:  # pandas fills a row that is too short
            cells = [len(row) for row in csv_module.reader(file)]
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, csv_module.Error) as error:
        raise ValueError(f"{csv}: not a readable CSV file: {str(error).splitlines()[0]}") from error
    if repeated := sorted({name for name in header if header.count(name) > 1}):
        raise ValueError(f"{csv}, line 1: column {', '.join(repeated)} is given twice; leave one of them out")
    if missing := [name for name in _COLUMNS if name not in table.columns]:
        raise ValueError(f"{csv}, line 1: column {', '.join(missing)} missing; needed are {', '.join(_COLUMNS)}")
    if not isinstance(table.index, pd.RangeIndex):  # pandas uses surplus values as an index
        raise ValueError(f"{csv}, line 2: more values than the {len(table.columns)} columns of line 1")
    for line, count in enumerate(cells[1:], start=2):
        if count < len(header):
            raise ValueError(f"{csv}, line {line}: the row has {count} cells, the header {len(header)}")
    return [{name: row[name].strip() for name in _COLUMNS} for row in table.to_dict("records")]


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
            raise ValueError(f"{path}, line {number}: {_shown(line)} is not one file name")
        files.add(name)
    return files


def _pixels(text: str, name: str, where: str) -> float:
    # float() would also accept digits of other scripts and underscores.
    if not re.fullmatch(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]{1,3})?|[+-]?(nan|inf)", text):
        raise ValueError(f"{where}: {name} {_shown(text)} is not a number")
    value = float(text)
    if not (np.isfinite(value) and value >= 0):
        raise ValueError(f"{where}: {name} is {text[:200]}; it must be finite and not negative")
    return value


def _require_file(path: Path, kind: str) -> None:
    """Refuse anything but a regular file of plausible size; opening a pipe would block."""
    if not path.is_file():
        if not path.exists():
            raise FileNotFoundError(f"{path}: {kind} does not exist")
        raise ValueError(f"{path}: {kind} must be a file")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path}: {path.stat().st_size} bytes; no {kind} is that large")


class Report(NamedTuple):
    """A user's text for one slice."""

    file: str  # stem of the h5 file
    slice: int  # 0-based
    prompt: str
    response: str


def read_reports(path: str | Path) -> dict[tuple[str, int], Report]:
    """Read reports, one JSON object a line with the keys file (with or without .h5), slice, prompt, response.

    Returns
    -------
    dict from (file stem, slice number) to Report

    Raises
    ------
    ValueError
        Names file and line: not JSON, missing or unknown keys, a wrong type, an empty text, a slice given twice.
    """
    path = Path(path)
    _require_file(path, "file of reports")
    reports: dict[tuple[str, int], Report] = {}
    lines: dict[tuple[str, int], int] = {}
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    for line, raw in enumerate(content, start=1):
        if not raw.strip() and line == len(content):
            continue
        where = f"{path}, line {line}"
        try:
            entry = json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # includes UnicodeDecodeError and JSONDecodeError
            raise ValueError(f"{where}: not a JSON object: {error}") from error
        report = _read_report(entry, where)
        place = (report.file, report.slice)
        if place in reports:
            raise ValueError(f"{where}: {place[0][:200]}, slice {place[1]} was already given in line {lines[place]}")
        reports[place], lines[place] = report, line
    return reports


def _read_report(entry: Any, where: str) -> Report:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: a JSON {type(entry).__name__}, not an object with {', '.join(Report._fields)}")
    for key in entry:
        if key not in Report._fields:
            raise ValueError(f"{where}: unknown key {_shown(key)}{nearest(key, Report._fields)}")
    for key in Report._fields:
        if key not in entry:
            raise ValueError(f"{where}: key {key!r} is missing")
        value = entry[key]
        if key == "slice":
            if type(value) is not int or value < 0:
                raise ValueError(f"{where}: slice is {_shown(value)}; it must be a number from 0 on")
        elif not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where}: {key} is {_shown(value)}; it must be a text that is not empty")
        elif len(value) > MAX_TEXT_LENGTH:
            raise ValueError(f"{where}: {key} has {len(value)} characters; at most {MAX_TEXT_LENGTH} are allowed")
        elif any("\ud800" <= character <= "\udfff" for character in value):  # no tokenizer accepts these
            raise ValueError(f"{where}: {key} holds half a surrogate pair, which is not a character")
    return Report(**{**entry, "file": entry["file"].strip().removesuffix(".h5")})
