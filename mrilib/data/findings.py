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

import logging
import re
from dataclasses import dataclass, replace

from mrilib.data import annotations
from mrilib.data import findings as findings_module
from mrilib.data.annotations import LABELS, Annotations, Box, _nearest, _of_line

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


_LABEL_OF_TEXT = {label.lower(): label for label in LABELS}


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


#: what a prefix can carry
FACT_WORDS = (
    *findings_module.CONTRASTS.values(),
    *findings_module.LEVELS,
    *findings_module.SIDES,
    *findings_module.REGIONS,
    *annotations.LABELS,
    "Whole study",
)


def fact_token(word: str) -> str:
    """The token that stands for a contrast, level, label, side or region in a prefix."""
    return f"<{word}>"


def fact_tokens() -> list[str]:
    """All of them, in a fixed order."""
    return [fact_token(word) for word in FACT_WORDS]
