"""Copies of data files with one thing changed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mrilib.data.fastmri_file import Volume


def copy_of(volume: Volume, directory: Path, change: Callable[[h5py.File], None] = lambda h5: None) -> Path:
    path = directory / volume.path.name
    shutil.copy(volume.path, path)
    with h5py.File(path, "r+") as h5:
        change(h5)
    return path


def replaced(name: str, value: Any) -> Callable[[h5py.File], None]:
    """`value` may be a function of the old array."""

    def change(h5: h5py.File) -> None:
        new = value(h5[name][()]) if callable(value) else value
        del h5[name]
        h5[name] = new

    return change


def attribute(name: str, value: Any = None) -> Callable[[h5py.File], None]:
    def change(h5: h5py.File) -> None:
        del h5.attrs[name]
        if value is not None:
            h5.attrs[name] = value

    return change


def header(old: str, new: str) -> Callable[[h5py.File], None]:
    def change(h5: h5py.File) -> None:
        xml = h5["ismrmrd_header"][()].decode()
        assert old in xml
        del h5["ismrmrd_header"]
        h5["ismrmrd_header"] = xml.replace(old, new).encode()

    return change


def own_mask(**attributes: Any) -> Callable[[h5py.File], None]:
    def change(h5: h5py.File) -> None:
        h5["mask"] = np.arange(h5["kspace"].shape[-1]) % 2 == 0
        for name, value in attributes.items():
            h5.attrs[name] = value

    return change


def linked(name: str | bytes, link: Any) -> Callable[[h5py.File], None]:
    def change(h5: h5py.File) -> None:
        if isinstance(name, str):
            h5.pop(name, None)
        h5[name] = link

    return change
