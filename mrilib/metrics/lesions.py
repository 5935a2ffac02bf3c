"""Contrast retention of annotated lesions: whether a reconstruction still shows each of them.

The contrast of a lesion is the median inside its box minus the median of a ring around it. The ring lies inside the
head and outside of every other box. Medians are robust to single bright pixels and to the corners of the box.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage

from mrilib.data.annotations import Annotations, Box
from mrilib.data.dataset import Volume
from mrilib.metrics.image import head_mask
from mrilib.metrics.methods import in_order

LOST = 0.5  # contrast retention below which a lesion is lost
FAINT = 0.1  # contrast, relative to the ring's median, below which the target does not show a lesion
RING = 4  # width of the ring [pixels]
GAP = 1  # pixels around a box that belong to neither box nor ring: the lesion's soft edge
MIN_RING = 12  # [pixels]


class Lesion(NamedTuple):
    """One box of one slice, in the target and in a reconstruction."""

    file: str
    patient: str
    slice_num: int
    box: Box  # in array coordinates
    target: float  # contrast in the target [file units]
    reconstruction: float  # contrast in the reconstruction [file units]

    @property
    def size(self) -> float:
        """Square root of the box's area [pixels]."""
        return float(np.sqrt(self.box.width * self.box.height))

    @property
    def retention(self) -> float:
        """Contrast retention: 1 is complete, 0 is none, negative is an inverted contrast."""
        return self.reconstruction / self.target

    @property
    def is_lost(self) -> bool:
        """Whether the contrast retention is below `LOST`."""
        return self.retention < LOST


def _slices(box: Box, margin: int, shape: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a box with a margin, clipped to the image; empty for a box outside of it."""
    top, left = (max(0, int(np.floor(start)) - margin) for start in (box.y, box.x))
    bottom = max(0, min(shape[0], int(np.ceil(box.y + box.height)) + margin))
    right = max(0, min(shape[1], int(np.ceil(box.x + box.width)) + margin))
    return slice(top, bottom), slice(left, right)


def regions(box: Box, others: Sequence[Box], head: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Mark the pixels of a lesion and of the ring around it.

    Parameters
    ----------
    box : Box
        In array coordinates.
    others : sequence of Box
        All boxes of the slice; none of their pixels is in the ring.
    head : array, bool, shape (h, w)

    Returns
    -------
    lesion, ring : array, bool, shape (h, w)
    """
    lesion, ring = np.zeros_like(head), np.zeros_like(head)
    lesion[_slices(box, 0, head.shape)] = True
    ring[_slices(box, GAP + RING, head.shape)] = True
    for other in (box, *others):
        ring[_slices(other, GAP, head.shape)] = False
    # The erosion removes scalp and air at the head's border.
    return lesion & head, ring & ndimage.binary_erosion(head, iterations=2)


def measure(
    target: NDArray, image: NDArray, boxes: Sequence[Box], head: NDArray[np.bool_]
) -> list[tuple[Box, float, float]]:
    """Measure the contrast of each lesion that the target shows: box, contrast in the target, contrast in the image.

    Lesions with a ring of fewer than `MIN_RING` pixels are left out, and so are lesions that the target does not show.
    """
    measured = []
    for box in boxes:
        lesion, ring = regions(box, boxes, head)
        if not lesion.any() or ring.sum() < MIN_RING:
            continue
        background = float(np.median(target[ring]))
        contrast = float(np.median(target[lesion])) - background
        if abs(contrast) < FAINT * background or contrast == 0:
            continue
        measured.append((box, contrast, float(np.median(image[lesion])) - float(np.median(image[ring]))))
    return measured


def volume_lesions(
    volumes: Sequence[Volume], annotations: Annotations, directory: str | Path
) -> tuple[list[Lesion], int]:
    """Measure every lesion of the reviewed volumes in a folder of reconstructions.

    Parameters
    ----------
    volumes : sequence of Volume
        Those without a target are ignored.
    annotations : Annotations
    directory : path
        Holds ``<file>.h5`` in fastMRI's submission format for each volume.

    Returns
    -------
    lesions : list of Lesion
    left_out : int
        Number of boxes that `measure` leaves out; the same for every method.

    Raises
    ------
    ValueError
        If a reconstruction has not the shape of its target.
    """
    lesions: list[Lesion] = []
    box_count = 0
    for volume in volumes:
        if not volume.has_target or not annotations.reviewed(volume.file):
            continue
        path = Path(directory) / volume.path.name
        with h5py.File(volume.path, "r") as truth, h5py.File(path, "r") as reconstruction:
            targets, images = truth["reconstruction_rss"][()], reconstruction["reconstruction"][()]
        if images.shape != targets.shape:
            raise ValueError(f"{path}: the shape {images.shape} differs from the target's, {targets.shape}")
        heads = head_mask(targets)
        for number, (target, image, head) in enumerate(zip(targets, images, heads, strict=True)):
            boxes = annotations.boxes(volume.file, number, target.shape[0])
            box_count += len(boxes)
            for box, *contrasts in measure(target, image, boxes, head):
                lesions.append(Lesion(volume.file, volume.patient, number, box, *contrasts))
    return lesions, box_count - len(lesions)


def lesions_in(
    directory: str | Path,
    volumes: Mapping[int, Sequence[Volume]],
    annotations: Annotations,
    methods: Mapping[str, Iterable[str]],
) -> tuple[dict[str, dict[str, list[Lesion]]], int]:
    """Measure the lesions in each ``<directory>/<method>/<acceleration>``.

    Parameters
    ----------
    directory : path
    volumes : mapping
        Acceleration → volumes that are reconstructed at it.
    annotations : Annotations
    methods : mapping
        Acceleration → methods.

    Returns
    -------
    lesions : dict
        Acceleration → method → lesions, the same ones in the same order for all methods. Accelerations without a
        lesion are left out.
    left_out : int
        Number of boxes that are left out of every method; the largest of the accelerations.
    """
    lesions: dict[str, dict[str, list[Lesion]]] = {}
    left_out = 0
    for acceleration, names in methods.items():
        measured = {}
        for name in in_order(names):
            folder = Path(directory) / name / acceleration
            measured[name], missing = volume_lesions(volumes[int(acceleration)], annotations, folder)
        left_out = max(left_out, missing)
        if any(measured.values()):
            lesions[acceleration] = measured
    return lesions, left_out


def count_lost(lesions: Sequence[Lesion]) -> int:
    """Count the lost lesions."""
    return sum(lesion.is_lost for lesion in lesions)


def pick_lesions(lesions: Sequence[Lesion]) -> list[tuple[Lesion, str]]:
    """Pick the largest lesion and the largest lost one for a figure, each with its role.

    Without a lost lesion the second is the one with the lowest contrast retention. A single lesion is picked once.
    """
    if not lesions:
        return []
    largest = max(lesions, key=lambda lesion: lesion.size)
    others = [lesion for lesion in lesions if lesion is not largest]
    lost = [lesion for lesion in others if lesion.is_lost]
    picked = [(largest, "largest lesion")]
    if lost:
        picked.append((max(lost, key=lambda lesion: lesion.size), "largest lost lesion"))
    elif others:
        picked.append((min(others, key=lambda lesion: lesion.retention), "lesion with the lowest contrast"))
    return picked


def lesion_table(lesions: Mapping[str, Mapping[str, Sequence[Lesion]]]) -> pd.DataFrame:
    """Tabulate every lesion: a row per acceleration, method and lesion.

    Parameters
    ----------
    lesions : mapping
        Acceleration → method → lesions.
    """
    return pd.DataFrame(
        {
            "acceleration": acceleration,
            "method": method,
            "file": lesion.file,
            "slice": lesion.slice_num,
            "label": lesion.box.label,
            "size [pixels]": round(lesion.size, 2),
            "contrast in the target [file units]": lesion.target,
            "contrast retention": round(lesion.retention, 4),
            "lost": lesion.is_lost,
        }
        for acceleration, methods in lesions.items()
        for method, measured in methods.items()
        for lesion in measured
    )


def add_lesions(
    section: dict[str, dict[str, dict[str, Any]]], lesions: Mapping[str, Mapping[str, Sequence[Lesion]]]
) -> None:
    """Add the number of lesions, of lost ones, and quartiles of the retention to metrics.json's "reconstruction"."""
    for acceleration, methods in lesions.items():
        for method, measured in methods.items():
            section[acceleration][method] |= {
                "lesions": len(measured),
                "lesions_lost": count_lost(measured),
                "lesion_retention_quartiles": [
                    float(value) for value in np.percentile([one.retention for one in measured], [25, 50, 75])
                ],
            }
