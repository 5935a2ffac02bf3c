"""Copies of data files with one change; each function but `copy_of` returns a change of an open file."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mrilib.data.fastmri_file import Volume

Change = Callable[[h5py.File], Any]


def copy_of(volume: Volume, directory: Path, *changes: Change) -> Path:
    path = directory / volume.path.name
    shutil.copy(volume.path, path)
    with h5py.File(path, "r+") as h5:
        for change in changes:
            change(h5)
    return path


def replaced(name: str, value: Any) -> Change:
    """`value` may be a function of the old array."""

    def change(h5: h5py.File) -> None:
        new = value(h5[name][()]) if callable(value) else value
        del h5[name]
        h5[name] = new

    return change


def with_values(name: str, place: Any, value: Any) -> Change:
    return lambda h5: h5[name].__setitem__(place, value)


def attribute(name: str, value: Any = None) -> Change:
    """Set the attribute, or delete it without a value."""

    def change(h5: h5py.File) -> None:
        del h5.attrs[name]
        if value is not None:
            h5.attrs[name] = value

    return change


def header(old: str, new: str, after: str = "") -> Change:
    """Replace the first `old` that follows `after`."""

    def change(h5: h5py.File) -> None:
        xml = h5["ismrmrd_header"][()].decode()
        start = xml.index(after)
        assert old in xml[start:]
        del h5["ismrmrd_header"]
        h5["ismrmrd_header"] = (xml[:start] + xml[start:].replace(old, new, 1)).encode()

    return change


def own_mask(**attributes: Any) -> Change:
    def change(h5: h5py.File) -> None:
        h5["mask"] = np.arange(h5["kspace"].shape[-1]) % 2 == 0
        h5.attrs.update(attributes)

    return change


def as_test_file(mask: np.ndarray, acceleration: int = 4) -> Change:
    """As in fastMRI's test set: masked k-space with its mask, without target, max and norm."""

    def change(h5: h5py.File) -> None:
        h5["kspace"][...] = np.where(mask, h5["kspace"][()], 0)
        h5["mask"] = mask
        del h5["reconstruction_rss"], h5.attrs["max"], h5.attrs["norm"]
        h5.attrs.update(acceleration=acceleration, num_low_frequency=round(0.1 * mask.size))

    return change


def linked(name: str | bytes, link: Any) -> Change:
    def change(h5: h5py.File) -> None:
        if isinstance(name, str):
            h5.pop(name, None)
        h5[name] = link

    return change
