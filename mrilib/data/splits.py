"""Split of the volumes into training, validation and test data, by patient."""

import logging
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from mrilib.config import DataParameters, ParameterError, display_path, resolve
from mrilib.data import annotations as annotations_module
from mrilib.data.annotations import Annotations
from mrilib.data.check import h5_files, usable_volumes
from mrilib.data.dataset import FastMRIDataset
from mrilib.data.fastmri_file import DataError, Volume, read_volume

logger = logging.getLogger("mrilib")


def index_volumes(directory: str | Path) -> list[Volume]:
    """Volumes of a folder, sorted by name; unlike `check.usable_volumes`, this reads no arrays.

    Raises
    ------
    DataError
        If there is no h5 file, or any is unusable; the message lists all problems.
    """
    volumes, problems = [], []
    for path in h5_files(directory):
        try:
            volumes.append(read_volume(path))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(f"{len(problems)} unusable files in {display_path(directory)}:\n" + "\n".join(problems))
    return volumes


class Split(dict[str, list[Volume]]):
    """Volumes of "train", "val" and "test".

    Attributes
    ----------
    skipped : list of dict
        ``file``, ``folder`` and ``problems`` of the skipped files (``on_bad_file: skip``).
    """

    skipped: list[dict[str, Any]]


def split_volumes(config: DataParameters) -> Split:
    """Split into training, validation and test volumes; no patient is in two of them.

    `val_dir` and `test_dir` are used if given; otherwise patients of `data_dir` are drawn with `split_seed`.

    Raises
    ------
    DataError
        If a file is unusable and not skipped, a patient is in two folders, or a part is empty.
    """
    skipped: list[dict[str, Any]] = []

    def usable(directory: str) -> list[Volume]:
        volumes, bad = usable_volumes(directory, config.on_bad_file, config.interactive)
        skipped.extend(bad)
        return volumes

    volumes = usable(config.data_dir)
    parts = {
        "val": usable(config.val_dir) if config.val_dir else [],
        "test": usable(config.test_dir) if config.test_dir else [],
    }
    patients = sorted({volume.patient for volume in volumes})
    order = np.random.default_rng(config.split_seed).permutation(len(patients))
    shuffled = [patients[i] for i in order]
    for name, fraction in (("test", config.test_fraction), ("val", config.val_fraction)):
        if not parts[name] and fraction:
            count = max(1, round(fraction * len(patients)))
            chosen, shuffled = set(shuffled[:count]), shuffled[count:]
            parts[name] = [volume for volume in volumes if volume.patient in chosen]
    remaining = set(shuffled)
    split = Split({"train": [volume for volume in volumes if volume.patient in remaining], **parts})
    split.skipped = skipped
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        both = {v.patient for v in split[a]} & {v.patient for v in split[b]}
        if both:
            raise DataError(f"{len(both)} patients are in both {a} and {b}, for instance {sorted(both)[0]}")
    for name, part in split.items():
        if not part:
            advice = (
                "lower val_fraction or test_fraction, or give val_dir or test_dir"
                if name == "train"
                else f"give {name}_dir, or raise {name}_fraction"
            )
            raise DataError(f"no {name} volumes: data_dir has {len(patients)} patients; {advice}")
    files = {volume.file for part in split.values() for volume in part}
    warn_of_unknown_files(config, files | {Path(entry["file"]).stem for entry in skipped})
    return split


def warn_of_unknown_files(config: DataParameters, files: Collection[str]) -> None:
    """Warn about reports and annotations of files other than `files`, the stems of the files in all data folders."""
    reports = annotations_module.read_reports(resolve(config.reports_path)) if config.reports_path else {}
    annotations = load_annotations(config)
    named = {
        f"reports_path '{config.reports_path}'": {file for file, _ in reports},
        f"annotations_dir '{config.annotations_dir or config.data_dir}'": annotations.files if annotations else set(),
    }
    for where, mentioned in named.items():
        unknown = sorted(mentioned - set(files))
        if unknown:
            near = get_close_matches(unknown[0], files, n=1, cutoff=0.9)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            logger.warning(
                "%s: %d of %d files are in no data folder and are not used, for instance '%s'%s",
                *(where, len(unknown), len(mentioned), unknown[0], hint),
            )


def load_annotations(config: DataParameters) -> Annotations | None:
    """Read the fastMRI+ annotations of `annotations_dir`, else of the data folder; None if there are none."""
    folder = resolve(config.annotations_dir or config.data_dir)
    tables = folder / "brain.csv", folder / "brain_file_list.csv"
    if not config.annotations_dir and not any(table.exists() for table in tables):
        return None
    for table in tables:
        if not table.exists():
            raise ParameterError(f"annotations_dir: '{display_path(table)}' does not exist")
    return annotations_module.read_annotations(*tables)


def require_targets(volumes: Sequence[Volume], purpose: str = "training the image decoder") -> None:
    """Refuse volumes without a target, which `purpose` needs; DataError names them."""
    without = [volume.path.name for volume in volumes if not volume.has_target]
    if without:
        raise DataError(
            f"{len(without)} files have no reconstruction_rss, which {purpose} needs: "
            f"{', '.join(without[:5])}{', …' if len(without) > 5 else ''}; give test files as test_dir"
        )


def require_boxes(dataset: FastMRIDataset, labels: Sequence[str]) -> None:
    """Refuse labels of detection maps for which no training slice has a box.

    Raises
    ------
    ParameterError
        Names the label and the most similar label that has boxes.
    """
    annotations = dataset.annotations
    available = set() if annotations is None else {
        box.label
        for volume in dataset.volumes if annotations.reviewed(volume.file)
        for number in range(volume.slices)
        for box in annotations.boxes(volume.file, number, volume.image_shape[0])
    }  # fmt: skip
    for label in labels:
        if label not in available:
            near = get_close_matches(label, available, n=1)
            listed = ", ".join(sorted(available)) or "none"
            raise ParameterError(
                f"finding_labels: no training slice has a box of '{label}'"
                + (f"; did you mean '{near[0]}'?" if near else f"; labels with boxes: {listed}")
                + ("" if available else ". Boxes come with annotations_dir")
            )
