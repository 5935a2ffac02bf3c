"""Facts of a slice as text, and text as facts.

The facts come from the acquisition attribute, the slice number and fastMRI+ (Zhao et al., "fastMRI+, clinical pathology
annotations for knee and brain fully sampled MRI data", Scientific Data 9, 152, 2022). `answer` writes them in one or
two sentences, and `parse` reads such sentences, so that generated text can be scored. The prompt is the same
for all slices, so it contains no information about the slice.

Sides and regions refer to the *displayed* image, which is the array of the h5 file flipped up/down (anterior at the
top):

- side of the box's centre: "midline" within the central tenth of the width, else image "left" or "right";
- region of the box's centre: "anterior", "central" or "posterior" third of the height;
- level, from the slice number: "lower", "middle" or "upper" third of the stack; slice 0 is the lowest.
"""

import re
from dataclasses import dataclass, replace

from mrilib.data.annotations import LABELS, Annotations, Box, csv_line, nearest

#: contrast for each value of the ``acquisition`` attribute
CONTRASTS = {
    "AXT1": "T1",
    "AXT1PRE": "T1 pre-contrast",
    "AXT1POST": "T1 post-contrast",
    "AXT2": "T2",
    "AXFLAIR": "FLAIR",
}
KNEES = ("CORPD_FBK", "CORPDFS_FBK")  # acquisitions of fastMRI's knee files
LEVELS = ("lower", "middle", "upper")
SIDES = ("left", "midline", "right")
REGIONS = ("anterior", "central", "posterior")
MIDLINE_HALF_WIDTH = 0.05  # as a fraction of the image width
#: words with a token of their own in the tiny backbone's pretraining (`pretrain.corpus`)
FACT_WORDS = (*CONTRASTS.values(), *LEVELS, *SIDES, *REGIONS, *LABELS, "Whole study")
_LABEL_OF_TEXT = {label.lower(): label for label in LABELS}


@dataclass(frozen=True, order=True)
class Finding:
    """Label and place of one finding; ValueError for an unknown label, side or region."""

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
                raise ValueError(f"finding: unknown {kind} {value!r}{nearest(value, known)}")


@dataclass(frozen=True)
class Facts:
    """Contrast, level and findings of one slice.

    Attributes
    ----------
    contrast : str or None
        One of ``CONTRASTS.values()``; None if unknown.
    level : str
        One of ``LEVELS``.
    findings : tuple of Finding, or None
        Sorted and unique (several boxes in one place are one finding). () means reviewed without findings; None means
        not reviewed, so unknown.
    study_labels : tuple of str
        Labels of the whole volume, sorted and unique; () if not reviewed.

    Raises
    ------
    ValueError
        For an unknown contrast, level or label, or study labels without a review.
    """

    contrast: str | None
    level: str
    findings: tuple[Finding, ...] | None = None
    study_labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for kind, value, known in (("contrast", self.contrast, CONTRASTS.values()), ("level", self.level, LEVELS)):
            if value not in known and not (kind == "contrast" and value is None):
                raise ValueError(f"facts: unknown {kind} {value!r}{nearest(value, known)}")
        for label in self.study_labels:
            if label not in LABELS:
                raise ValueError(f"facts: unknown study label {label!r}{nearest(label, LABELS)}")
        if self.findings is None and self.study_labels:
            raise ValueError("facts: study labels of a volume that was not reviewed (findings is None)")
        # A canonical order, so that equal facts compare equal and have the same text.
        if self.findings is not None:
            object.__setattr__(self, "findings", tuple(sorted(set(self.findings))))
        object.__setattr__(self, "study_labels", tuple(sorted(set(self.study_labels))))


def contrast_name(acquisition: str) -> str:
    """Contrast of an ``acquisition`` attribute; ValueError for an unknown one."""
    if acquisition not in CONTRASTS:
        raise ValueError(f"unknown acquisition {acquisition!r}{nearest(acquisition, CONTRASTS)}")
    return CONTRASTS[acquisition]


def slice_level(slice_num: int, num_slices: int) -> str:
    """Third of the stack that holds a 0-based slice number; ValueError for a slice outside of the volume."""
    if not 0 <= slice_num < num_slices:
        raise ValueError(f"slice {slice_num} of a volume of {num_slices} slices")
    return LEVELS[3 * slice_num // num_slices]


def box_finding(box: Box, image_shape: tuple[int, int]) -> Finding:
    """Locate a box (array coordinates) on the displayed image of `image_shape` (h, w) [pixels].

    Raises ValueError if the centre of the box lies outside of the image.
    """
    rows, columns = image_shape
    across = (box.x + box.width / 2) / columns
    down = 1 - (box.y + box.height / 2) / rows
    if not (0 <= across <= 1 and 0 <= down <= 1):
        raise ValueError(
            f"box {box.label!r}{csv_line(box)} at column x {box.x:g}, row y {box.y:g} lies outside the image of {rows} "
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
        Without annotations the findings are unknown.
    file : str
        Stem of the h5 file.
    slice_num, num_slices : int
        0-based slice number, and the number of slices in the file.
    acquisition : str
        Attribute of the h5 file; the contrast is unknown if it is not in ``CONTRASTS``.
    image_shape : (h, w)
        Shape of ``reconstruction_rss`` [pixels].

    Raises
    ------
    ValueError
        If the slice or an annotated slice lies outside of the volume, or a box outside of the image.
    """
    contrast, level = CONTRASTS.get(acquisition), slice_level(slice_num, num_slices)
    if annotations is None or not annotations.reviewed(file):
        return Facts(contrast, level, None)
    if annotations.last_slice.get(file, 0) >= num_slices:
        raise ValueError(
            f"{file}: the annotations have a finding on slice {annotations.last_slice[file]}, the file has "
            f"{num_slices} slices, counted from 0; check that both belong together"
        )
    boxes = annotations.boxes(file, slice_num, image_shape[0])
    try:
        findings = tuple(box_finding(box, image_shape) for box in boxes)
    except ValueError as error:
        raise ValueError(f"{file}, slice {slice_num}: {error}") from None
    return Facts(contrast, level, findings, annotations.study_labels(file))


def mirrored(facts: Facts) -> Facts:
    """Facts of a slice whose image is flipped left to right."""
    if facts.findings is None:
        return facts
    swapped = dict(zip(SIDES, reversed(SIDES), strict=True))
    findings = tuple(replace(finding, side=swapped[finding.side]) for finding in facts.findings)
    return replace(facts, findings=findings)


def prompt() -> str:
    """Prompt of all slices."""
    return "Describe this scan."


def answer(facts: Facts) -> str:
    """Write the facts as text.

    For example: "Axial FLAIR image, upper third of the brain. Findings: mass, right posterior." An unknown contrast is
    omitted. "Findings: none." means reviewed without findings; the sentence is omitted for a volume that was not
    reviewed. "Whole study: …" gives the labels of the volume. Inverse of `parse`.
    """
    text = f"Axial {facts.contrast + ' ' if facts.contrast else ''}image, {facts.level} third of the brain."
    if facts.findings is not None:
        listed = "; ".join(f"{finding.label.lower()}, {finding.side} {finding.region}" for finding in facts.findings)
        text += f" Findings: {listed or 'none'}."
    if facts.study_labels:
        text += f" Whole study: {'; '.join(label.lower() for label in facts.study_labels)}."
    return text


_ANSWER = re.compile(
    r"Axial (?:(?P<contrast>[^,.]+) )?image, (?P<level>[^,.]+) third of the brain\."
    r"(?: Findings: (?P<findings>[^.]+)\.)?(?: Whole study: (?P<study>[^.]+)\.)?"
)


def parse(text: str) -> Facts:
    """Facts of an answer; order and repetition of findings do not matter.

    Raises
    ------
    ValueError
        If the text is not of the form that `answer` writes, or holds an unknown contrast, level, label, side or region.
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
        raise ValueError(f"unknown label {text!r}{nearest(text, tuple(_LABEL_OF_TEXT))}")
    return _LABEL_OF_TEXT[text]


def fact_token(word: str) -> str:
    """Token of a contrast, level, label, side or region in a prefix of facts."""
    return f"<{word}>"


def fact_tokens() -> list[str]:
    """All fact tokens, in a fixed order."""
    return [fact_token(word) for word in FACT_WORDS]
