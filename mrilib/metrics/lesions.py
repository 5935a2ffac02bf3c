"""Contrast retention of annotated lesions: whether a reconstruction still shows each of them.

The contrast of a lesion is the median inside its box minus the median of a ring around it. The ring lies inside the
head and outside of every other box. Medians are robust to single bright pixels and to the corners of the box.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage

from mrilib.data.annotations import Annotations, Box
from mrilib.data.dataset import Volume
from mrilib.metrics.image import head_mask
from mrilib.metrics.methods import in_order, method_label

LOST = 0.5  # contrast retention below which a lesion is lost
FAINT = 0.1  # contrast, relative to the ring's median, below which the target does not show a lesion
RING = 4  # width of the ring [pixels]
GAP = 1  # pixels around a box that belong to neither box nor ring: the lesion's soft edge
MIN_RING = 12  # [pixels]
SIZES = (6.0, 10.0)  # upper limits of small and medium lesions: square root of the box's area [pixels]
SIZE_NAMES = (f"under {SIZES[0]:g} px", f"{SIZES[0]:g} to {SIZES[1]:g} px", f"{SIZES[1]:g} px and more")


class Lesion(NamedTuple):
    """One box of one slice, in the target and in a reconstruction."""

    file: str
    patient: str
    slice_num: int
    label: str
    size: float  # square root of the box's area [pixels]
    target: float  # contrast in the target [file units]
    reconstruction: float  # contrast in the reconstruction [file units]

    @property
    def retention(self) -> float:
        """Contrast retention: 1 is complete, 0 is none, negative is an inverted contrast."""
        return self.reconstruction / self.target


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
                size = float(np.sqrt(box.width * box.height))
                lesions.append(Lesion(volume.file, volume.patient, number, box.label, size, *contrasts))
    return lesions, box_count - len(lesions)


def lesions_in(
    directory: str | Path, volumes: Sequence[Volume], annotations: Annotations, methods: Mapping[str, Iterable[str]]
) -> tuple[dict[str, dict[str, list[Lesion]]], int]:
    """Measure the lesions in each ``<directory>/<method>/<acceleration>``.

    Returns
    -------
    lesions : dict
        Acceleration → method → lesions.
    left_out : int
        Number of boxes that are left out of every method.
    """
    lesions: dict[str, dict[str, list[Lesion]]] = {}
    left_out = 0
    for acceleration, names in methods.items():
        for name in in_order(names):
            folder = Path(directory) / name / acceleration
            lesions.setdefault(acceleration, {})[name], left_out = volume_lesions(volumes, annotations, folder)
    return lesions, left_out


def size_name(size: float) -> str:
    """Return the size class of a lesion, from the square root of its box's area [pixels]."""
    return SIZE_NAMES[int(np.searchsorted(SIZES, size, side="right"))]


def lesion_table(lesions: Mapping[str, Mapping[str, Sequence[Lesion]]]) -> pd.DataFrame:
    """Tabulate contrast retention and lost lesions by acceleration, method and size.

    Parameters
    ----------
    lesions : mapping
        Acceleration → method → lesions.
    """
    rows = []
    for acceleration, methods in lesions.items():
        for method, measured in methods.items():
            for name in (*SIZE_NAMES, "all"):
                retentions = [one.retention for one in measured if name in ("all", size_name(one.size))]
                if not retentions:
                    continue
                low, middle, high = np.percentile(retentions, [25, 50, 75])
                rows.append(
                    {
                        "acceleration": f"{acceleration}x",
                        "method": method_label(method),
                        "lesions": name,
                        "number": len(retentions),
                        "contrast retention, median": f"{middle:.2f}",
                        "quartiles": f"{low:.2f} to {high:.2f}",
                        "lost": sum(retention < LOST for retention in retentions),
                    }
                )
    return pd.DataFrame(rows)
