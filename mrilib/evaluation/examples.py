"""Slices for the figures of 04_evaluate: with lesions, by rank, and with their texts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mrilib.data.annotations import Annotations, Box
from mrilib.data.fastmri_file import Volume
from mrilib.evaluation.inference import parse_or_none
from mrilib.evaluation.reconstructions import Comparison, PickedSlice, read_slice, read_target
from mrilib.metrics import text_scores
from mrilib.metrics.lesions import Lesion, pick_lesions


def comparisons(
    directory: Path, acceleration: int | str, picked: Sequence[PickedSlice], methods: Sequence[str]
) -> list[Comparison]:
    """Read written reconstructions of picked slices and their targets, for the figures of `display.images`."""
    result = []
    for volume, slice_num, role in picked:
        images = {method: read_slice(directory, method, acceleration, volume, slice_num) for method in methods}
        title = f"{role} volume\n{volume.acquisition}, slice {slice_num}"
        target = read_target(volume, slice_num)
        result.append(Comparison(target, images, volume.maximum, title=title, pixel=volume.pixel))
    return result


def lesion_comparisons(
    directory: Path,
    acceleration: int | str,
    volumes: Sequence[Volume],
    lesions: Mapping[str, Sequence[Lesion]],
    methods: Sequence[str],
) -> list[Comparison]:
    """Read the slice of the model's largest lesion, a zoom on it, and a zoom on a lost lesion.

    Parameters
    ----------
    directory : Path
        A run's ``reconstructions/``.
    acceleration : int or str
    volumes : sequence of Volume
    lesions : mapping
        Method → lesions, from `lesions.lesions_in`.
    methods : sequence of str

    Returns
    -------
    list of Comparison
        The scores of a zoom are the lesion's contrast retention; empty without lesions.
    """
    by_file = {volume.file: volume for volume in volumes}
    rows: list[Comparison] = []
    for lesion, role in pick_lesions(lesions["model"]):
        volume, place = by_file[lesion.file], lesions["model"].index(lesion)
        (whole,) = comparisons(directory, acceleration, [PickedSlice(volume, lesion.slice_num, "")], methods)
        place_of = lesion.file, lesion.slice_num
        boxes = [other.box for other in lesions["model"] if (other.file, other.slice_num) == place_of]
        whole = whole._replace(boxes=boxes, title=f"{volume.acquisition}\nslice {lesion.slice_num}")
        if not rows:
            rows.append(whole)
        retention = {method: {"retention": lesions[method][place].retention} for method in methods}
        zoom = zoom_on(lesion.box, volume.image_shape)
        rows.append(whole._replace(title=f"{role}\n{lesion.box.label}", scores=retention, zoom=zoom))
    return rows


ZOOM = 28  # smallest side of a zoom [pixels]


def zoom_on(box: Box, shape: tuple[int, int]) -> tuple[slice, slice]:
    """Return rows and columns of a square about a box, inside an image of this shape (h, w) [pixels]."""
    side = min(max(ZOOM, round(3 * max(box.width, box.height))), *shape)
    top, left = (
        min(max(0, round(start + length / 2 - side / 2)), size - side)
        for start, length, size in ((box.y, box.height, shape[0]), (box.x, box.width, shape[1]))
    )
    return slice(top, top + side), slice(left, left + side)


class DescribedSlice(NamedTuple):
    """A slice's reconstruction with its true and its generated text."""

    image: np.ndarray  # (h, w) [file units], not flipped
    title: str
    true: str
    generated: str
    errors: list[str]  # `text_scores.list_errors`
    boxes: Sequence[Box] | None  # true findings, in array coordinates; None if they are unknown


def described_slices(
    directory: Path,
    volumes: Sequence[Volume],
    rows: Sequence[dict[str, Any]],
    annotations: Annotations | None,
    count: int = 6,
) -> list[DescribedSlice]:
    """Draw slices at the lowest acceleration with a fixed seed, half of them with a true or a generated finding.

    Parameters
    ----------
    directory : Path
        A run's ``reconstructions/``.
    volumes : sequence of Volume
    rows : sequence of dict
        Those of `Evaluator.run`.
    annotations : Annotations, optional
    count : int
    """

    def boxes_of(file: str, slice_num: int) -> Sequence[Box] | None:
        if annotations is None or not annotations.reviewed(file):
            return None
        return annotations.boxes(file, slice_num, by_file[file].image_shape[0])

    lowest = [row for row in rows if row["acceleration"] == min(row["acceleration"] for row in rows)]
    order = [lowest[i] for i in np.random.default_rng(0).permutation(len(lowest))]
    guesses = {id(row): parse_or_none(row["generated"]) for row in order}
    with_finding = [row for row in order if row["facts"].findings or ((guess := guesses[id(row)]) and guess.findings)]
    first = with_finding[: count // 2]
    picked = first + [row for row in order if not any(row is other for other in first)][: count - len(first)]
    by_file = {volume.file: volume for volume in volumes}
    return [
        DescribedSlice(
            image=read_slice(directory, "model", row["acceleration"], by_file[row["file"]], row["slice"]),
            title=f"{by_file[row['file']].acquisition}, slice {row['slice']}, {row['acceleration']}x",
            true=row["true"],
            generated=row["generated"],
            errors=text_scores.list_errors(row["facts"], guesses[id(row)]),
            boxes=boxes_of(row["file"], row["slice"]),
        )
        for row in picked
    ]
