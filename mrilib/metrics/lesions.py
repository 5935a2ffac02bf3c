"""What a radiologist would ask: is each known lesion still there?

For every annotated box: the contrast of the lesion to its surroundings in the reconstruction over that in the target.
Median of the box against the median of a ring around it, inside the head and outside of every other box, so that
neither a bright pixel nor the box's corners decide.
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

LOST = 0.5  # a lesion with less of its contrast than this is lost
FAINT = 0.1  # contrast over the surroundings' median below which a target does not show a lesion
RING = 4  # width of the ring [pixels]
GAP = 1  # pixels beside a box that belong to neither: the lesion's soft edge
MIN_RING = 12  # [pixels]
SIZES = (6.0, 10.0)  # upper ends of small and medium: root of the box's area [pixels]
SIZE_NAMES = (f"under {SIZES[0]:g} px", f"{SIZES[0]:g} to {SIZES[1]:g} px", f"{SIZES[1]:g} px and more")


class Lesion(NamedTuple):
    """One box of one slice, in the target and in a reconstruction."""

    file: str
    patient: str
    slice_num: int
    label: str
    size: float  # root of the box's area [pixels]
    target: float  # contrast: median of the box − median of the ring [file units]
    reconstruction: float  # the same in the reconstruction [file units]

    @property
    def ratio(self) -> float:
        """Contrast kept: 1 all of it, 0 none, negative: dark where it was bright."""
        return self.reconstruction / self.target


def _slices(box: Box, margin: int, shape: tuple[int, int]) -> tuple[slice, slice]:
    top, left = (max(0, int(np.floor(start)) - margin) for start in (box.y, box.x))
    # not below 0: a box beside the image has no pixels, and a negative end would count from the far side
    bottom = max(0, min(shape[0], int(np.ceil(box.y + box.height)) + margin))
    right = max(0, min(shape[1], int(np.ceil(box.x + box.width)) + margin))
    return slice(top, bottom), slice(left, right)


def regions(box: Box, others: Sequence[Box], head: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Pixels of a lesion and of its surroundings.

    Parameters
    ----------
    box : Box
        In array coordinates.
    others : sequence of Box
        Every box of the slice; their pixels are nobody's surroundings.
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
    # the head's rim is scalp and air, neither of which a lesion lies in
    return lesion & head, ring & ndimage.binary_erosion(head, iterations=2)


def measure(
    target: NDArray, image: NDArray, boxes: Sequence[Box], head: NDArray[np.bool_]
) -> list[tuple[Box, float, float]]:
    """Contrast of each lesion that the target shows: (box, in the target, in the image) [their unit].

    Left out are lesions with fewer than 12 pixels of surroundings, and those whose contrast in the target is below a
    tenth of their surroundings: what the target does not show, nothing can lose.
    """
    measured = []
    for box in boxes:
        lesion, ring = regions(box, boxes, head)
        if not lesion.any() or ring.sum() < MIN_RING:
            continue
        around = float(np.median(target[ring]))
        contrast = float(np.median(target[lesion])) - around
        if abs(contrast) < FAINT * around or contrast == 0:
            continue
        measured.append((box, contrast, float(np.median(image[lesion])) - float(np.median(image[ring]))))
    return measured


def volume_lesions(
    volumes: Sequence[Volume], annotations: Annotations, directory: str | Path
) -> tuple[list[Lesion], int]:
    """Every lesion of the reviewed volumes in a folder of reconstructions.

    Parameters
    ----------
    volumes : sequence of Volume
        With targets.
    annotations : Annotations
    directory : path
        Holds ``<file>.h5`` in fastMRI's submission format for each.

    Returns
    -------
    lesions : list of Lesion
    left_out : int
        Boxes whose lesion the target does not show, or that have no surroundings; the same for every method.
    """
    lesions: list[Lesion] = []
    boxes_seen = 0
    for volume in volumes:
        if not volume.has_target or not annotations.reviewed(volume.file):
            continue
        with h5py.File(volume.path, "r") as truth, h5py.File(Path(directory) / volume.path.name, "r") as reconstruction:
            targets, images = truth["reconstruction_rss"][()], reconstruction["reconstruction"][()]
        if images.shape != targets.shape:
            raise ValueError(f"{directory}/{volume.path.name}: {images.shape} is not its target's {targets.shape}")
        heads = head_mask(targets)
        for number, (target, image, head) in enumerate(zip(targets, images, heads, strict=True)):
            boxes = annotations.boxes(volume.file, number, target.shape[0])
            boxes_seen += len(boxes)
            for box, own, kept in measure(target, image, boxes, head):
                size = float(np.sqrt(box.width * box.height))
                lesions.append(Lesion(volume.file, volume.patient, number, box.label, size, own, kept))
    return lesions, boxes_seen - len(lesions)


def lesions_in(
    directory: str | Path, volumes: Sequence[Volume], annotations: Annotations, methods: Mapping[str, Iterable[str]]
) -> tuple[dict[str, dict[str, list[Lesion]]], int]:
    """Lesions of each acceleration and method in ``<directory>/<method>/<acceleration>``, and how many are left out."""
    found: dict[str, dict[str, list[Lesion]]] = {}
    left_out = 0
    for acceleration, names in methods.items():
        for name in in_order(names):
            folder = Path(directory) / name / acceleration
            found.setdefault(acceleration, {})[name], left_out = volume_lesions(volumes, annotations, folder)
    return found, left_out


def size_name(size: float) -> str:
    """The class of a lesion's size [pixels]."""
    return SIZE_NAMES[int(np.searchsorted(SIZES, size, side="right"))]


def lesion_table(lesions: Mapping[str, Mapping[str, Sequence[Lesion]]]) -> pd.DataFrame:
    """Contrast kept and lesions lost, by acceleration, method and size.

    Parameters
    ----------
    lesions : mapping
        acceleration → method → lesions.
    """
    rows = []
    for acceleration, methods in lesions.items():
        for method, found in methods.items():
            for name in (*SIZE_NAMES, "all"):
                ratios = [one.ratio for one in found if name in ("all", size_name(one.size))]
                if not ratios:
                    continue
                low, middle, high = np.percentile(ratios, [25, 50, 75])
                rows.append(
                    {
                        "acceleration": f"{acceleration}x",
                        "method": method_label(method),
                        "lesions": name,
                        "number": len(ratios),
                        "contrast kept, median": f"{middle:.2f}",
                        "quartiles": f"{low:.2f} to {high:.2f}",
                        "lost": sum(ratio < LOST for ratio in ratios),
                    }
                )
    return pd.DataFrame(rows)
