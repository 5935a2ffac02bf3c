"""Check of all files of a data folder before training.

``python -m mrilib check DIR`` lists the problems of each file and a summary. The notebooks run the same check when they
load data. Its results are cached by file, size and modification time, so that each file is read completely only once.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import joblib
import numpy as np
from joblib.externals.loky.process_executor import TerminatedWorkerError

from mrilib.config import display_path, printable, require_utf8, resolve
from mrilib.data import findings
from mrilib.data.fastmri_file import (
    LARGEST_SCALE,
    LARGEST_VOLUME,
    MAX_SLICE_VALUES,
    MAX_SLICES,
    SMALLEST_SCALE,
    DataError,
    Volume,
    dataset,
    first_line,
    path_problems,
    read_volume,
    structure,
    unstored,
)
from mrilib.files import write_json
from mrilib.progress import progress_bar

MAX_PEAK_RATIO = 10  # between the attribute max and the maximum of the target; SSIM uses the attribute
NOISE_RATIO = 2.0  # mean power of the centre of k-space over the mean of all: 1 for white noise, over 30 for a head
FEW_FILES = 16  # checked in this process, since starting others takes seconds
VERSION = 4  # of the check; a higher number invalidates cached results

logger = logging.getLogger("mrilib")


class FileReport(NamedTuple):
    """Result of the check of one file."""

    name: str
    problems: list[str]  # the file cannot be used
    warnings: list[str]  # the file can be used
    volume: Volume | None


def check_file(path: Path) -> FileReport:
    """Read one file completely and list all its problems."""
    problems, volume = path_problems(path), None
    warnings: list[str] = []
    if not problems:
        try:
            with h5py.File(path, "r") as h5:
                volume, problems = structure(h5, path)
                _check_kspace(h5, volume, problems, warnings)
                _check_target(h5, volume, problems, warnings)
                if volume is not None:
                    _check_mask(h5, volume, problems)
                    warnings += _metadata_warnings(h5, volume)
        except Exception as error:  # h5py raises almost any exception on a damaged file
            problems.append(f"cannot be read as HDF5 ({first_line(error)})")
    return FileReport(path.name, problems, warnings, None if problems else volume)


def _check_kspace(h5: h5py.File, volume: Volume | None, problems: list[str], warnings: list[str]) -> None:
    kinds: dict[str, list[int]] = {"all zero": [], "noise only": []}
    sizes: dict[str, list[int]] = {"large": [], "small": []}
    outside: list[int] = []
    left, right = volume.padding if volume else (0, None)
    for number, data in _slices(h5, "kspace", 4, "c", problems):
        largest = np.abs(data.view(np.float32)).max()
        if 0 < largest < SMALLEST_SCALE:
            sizes["small"].append(number)
        if largest > LARGEST_SCALE:
            sizes["large"].append(number)
        if kind := slice_kind(data):
            kinds[kind].append(number)
        if data[..., :left].any() or (right is not None and data[..., right:].any()):
            outside.append(number)
    for size, numbers in sizes.items():
        if numbers:
            problems.append(f"kspace: too {size} for single precision in {list_slices(numbers)}; scale the file")
    if outside and right is not None:
        problems.append(
            f"ismrmrd_header contradicts kspace: lines outside of {left} to {right - 1} hold data "
            f"in {list_slices(outside)}"
        )
    warnings += [f"{list_slices(numbers)}: {kind}" for kind, numbers in kinds.items() if numbers]


def _check_target(h5: h5py.File, volume: Volume | None, problems: list[str], warnings: list[str]) -> None:
    peaks = [float(data.max()) for _, data in _slices(h5, "reconstruction_rss", 3, "f", problems)]
    if volume is None or not peaks or np.isclose(max(peaks), volume.maximum, rtol=1e-3, atol=0):
        return
    difference = f"attribute max is {volume.maximum:g}, reconstruction_rss has {max(peaks):g}"
    if max(peaks) / MAX_PEAK_RATIO < volume.maximum < max(peaks) * MAX_PEAK_RATIO:
        warnings.append(difference)
    else:
        problems.append(f"{difference}; SSIM is scaled by it")


def _check_mask(h5: h5py.File, volume: Volume, problems: list[str]) -> None:
    if (stored := dataset(h5, "mask")) is None:
        return
    mask = stored[()]
    center = mask.size // 2
    if not np.isin(mask, (0, 1)).all():
        problems.append("mask holds other values than 0 and 1")
    elif not mask[center] or not volume.padding[0] <= center < volume.padding[1]:
        problems.append("mask does not sample the centre of k-space")


def _metadata_warnings(h5: h5py.File, volume: Volume) -> list[str]:
    warnings = [warning] if (warning := unlisted_contrast(volume)) else []
    unused = ("norm",) if volume.has_target else ("num_low_frequency",) if volume.has_mask else ()
    warnings += [f"has no attribute {name} (not needed here)" for name in unused if name not in h5.attrs]
    if not volume.has_target and not volume.has_mask:
        warnings.append("has neither reconstruction_rss nor mask: it cannot be scored or used to train the decoder")
    return warnings


def unlisted_contrast(volume: Volume) -> str:
    """Warning about a contrast that the text cannot name; empty for a known contrast."""
    try:
        findings.contrast_name(volume.acquisition)
    except ValueError as error:
        return f"{error} (the image does not need it; the text omits the contrast)"
    return ""


def _slices(
    h5: h5py.File, name: str, dimensions: int, kind: str, problems: list[str]
) -> Iterator[tuple[int, np.ndarray]]:
    """Readable, finite slices of an array in single precision; the others are added to `problems`."""
    array = dataset(h5, name)
    if array is None or array.ndim != dimensions or array.dtype.kind != kind or not np.prod(array.shape, dtype=float):
        return
    sizes = np.prod(array.shape[1:], dtype=float), np.prod(array.shape, dtype=float)
    if sizes[0] > MAX_SLICE_VALUES or sizes[1] > LARGEST_VOLUME or array.shape[0] > MAX_SLICES or unstored(name, array):
        return  # a problem that `structure` reports
    single = np.complex64 if kind == "c" else np.float32
    broken, infinite = [], []
    for number in range(array.shape[0]):
        try:
            with np.errstate(over="ignore"):  # values too large for single precision become infinite
                data = array[number].astype(single, copy=False)
        except (OSError, RuntimeError, ValueError) as error:  # a truncated chunk, a wrong checksum, an unknown filter
            broken.append((number, first_line(error)))
            continue
        if np.isfinite(data).all():
            yield number, data
        else:
            infinite.append(number)
    if broken:
        problems.append(f"{name}: {list_slices([n for n, _ in broken])} cannot be read ({broken[0][1]})")
    if infinite:
        problems.append(f"{name}: NaN or infinity in {list_slices(infinite)}")


def slice_kind(data: np.ndarray) -> str:
    """Kind of a slice of k-space (coil, readout, phase): "all zero", "noise only" or "" for an image.

    A slice is noise if its centre (an eighth of each axis, sampled lines only) is about as strong as the rest.
    """
    power = (data.real.astype(np.float64) ** 2 + data.imag.astype(np.float64) ** 2).sum(0)
    lines = power.any(0)
    if not lines.any():
        return "all zero"
    height, width = power.shape
    half = (max(1, height // 16), max(1, width // 16))
    center = np.zeros(width, dtype=bool)
    center[width // 2 - half[1] : width // 2 + half[1] + 1] = True
    if not (center & lines).any():
        return ""
    middle = power[height // 2 - half[0] : height // 2 + half[0] + 1, center & lines]
    return "noise only" if middle.mean() < NOISE_RATIO * power[:, lines].mean() else ""


def list_slices(numbers: Sequence[int]) -> str:
    """Numbers of slices as "slice 3" or "slices 0, 2 to 5, 9"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    ranges = [str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a} to {b}" for a, b in runs]
    return f"slice{'s' if len(numbers) > 1 else ''} {', '.join(ranges)}"


def h5_files(directory: str | Path) -> list[Path]:
    """Paths of the h5 files of a folder, sorted by name.

    Raises
    ------
    DataError
        If the path is not a folder, holds no h5 file (subfolders with h5 files are named), or a name is not UTF-8.
    ParameterError
        If the path of the folder is not UTF-8.
    """
    folder = resolve(directory)
    if not folder.is_dir():
        raise DataError(f"{display_path(folder)} is not a folder")
    require_utf8(folder)
    paths = sorted(path for path in folder.iterdir() if path.suffix == ".h5")
    if not paths:
        below = sorted({path.parent for path in folder.glob("*/*.h5")} | {p.parent for p in folder.glob("*/*/*.h5")})
        hint = f"; found some in {', '.join(display_path(subfolder) for subfolder in below[:5])}" if below else ""
        raise DataError(f"no .h5 file in {display_path(folder)}{hint}")
    for path in paths:
        try:
            path.name.encode()
        except UnicodeEncodeError:  # cannot be written to records and tables
            shown = os.fsencode(path.name).decode(errors="replace")
            raise DataError(f"{display_path(folder)}: the name of {shown} is not UTF-8; rename the file") from None
    return paths


def check_files(
    paths: Sequence[Path],
    jobs: int | None = None,
    bar: Any = None,
    check: Callable[[Path], FileReport] = check_file,
) -> list[FileReport]:
    """Check files in `jobs` processes (by default one per core); reports in the order of `paths`."""
    jobs = min(jobs or (1 if len(paths) <= FEW_FILES else joblib.cpu_count()), max(1, len(paths)))
    reports: dict[Path, FileReport] = {}

    def run(part: Sequence[Path]) -> None:
        tasks = (joblib.delayed(_report)(check, path) for path in part)
        for path, report in joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")(tasks):
            reports[path] = report
            if bar is not None:
                bar.update()

    try:
        run(paths)
    except TerminatedWorkerError:  # a file killed its process: check the rest one by one to find it
        jobs = max(2, jobs)  # joblib runs a single job in this process
        for path in [path for path in paths if path not in reports]:
            try:
                run([path])
            except TerminatedWorkerError:
                reports[path] = FileReport(path.name, ["reading it killed the process"], [], None)
    return [reports[path] for path in paths]


def _report(check: Callable[[Path], FileReport], path: Path) -> tuple[Path, FileReport]:
    return path, check(path)


def usable_volumes(
    directory: str | Path, on_bad_file: str = "refuse", interactive: bool = False
) -> tuple[list[Volume], list[dict[str, Any]]]:
    """Volumes of a folder, after each file has been checked once.

    Returns
    -------
    volumes : list of Volume
        Sorted by name.
    skipped : list of dict
        ``file``, ``folder`` and ``problems`` of each skipped file.

    Raises
    ------
    DataError
        If there is no usable file, or with "refuse" any unusable one; the message lists all problems.
    """
    paths = h5_files(directory)
    cache = _Cache(paths[0].parent)
    new = [path for path in paths if cache.report(path) is None]
    if new:
        bar = progress_bar(len(new), "check", interactive)
        cache.add(new, check_files(new, bar=bar))
        bar.close()
    reports = [report for path in paths if (report := cache.report(path)) is not None]
    bad = [report for report in reports if report.problems]
    folder = display_path(paths[0].parent)
    warned = sum(bool(report.warnings) for report in reports)
    logger.info("%s: %d files, %d with problems, %d with warnings", folder, len(paths), len(bad), warned)
    if bad and (on_bad_file == "refuse" or len(bad) == len(paths)):
        advice = "" if on_bad_file == "skip" else "; to leave them out, set on_bad_file: skip"
        lines = [printable(f"{report.name}: {'; '.join(report.problems)}") for report in bad]
        raise DataError(f"{len(bad)} unusable files in {folder}{advice}:\n" + "\n".join(lines))
    good = [path for path, report in zip(paths, reports, strict=True) if not report.problems]
    skipped = [{"file": report.name, "folder": folder, "problems": report.problems} for report in bad]
    volumes = [read_volume(path) for path in good]
    if unlisted := [volume for volume in volumes if unlisted_contrast(volume)]:
        names = ", ".join(sorted({repr(volume.acquisition) for volume in unlisted}))
        logger.warning(
            "%s: %d files have an unknown contrast (%s); their text omits the contrast", folder, len(unlisted), names
        )
    return volumes, skipped


class _Cache:
    """Check results of the files of a folder, stored in the user's cache folder, since data may be read-only."""

    def __init__(self, folder: Path) -> None:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        self.path = base / "mrilib" / f"check-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}.json"
        self.folder = folder
        self.entries: dict[str, Any] = {}
        try:
            content = json.loads(self.path.read_text())
            if content["version"] == VERSION and content["folder"] == str(folder):
                self.entries = dict(content["files"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # all files are read again

    @staticmethod
    def _state(path: Path) -> list[int]:
        try:
            state = path.stat()
        except OSError:
            return [0, 0]
        return [state.st_size, state.st_mtime_ns]

    def report(self, path: Path) -> FileReport | None:
        entry = self.entries.get(path.name)
        if not isinstance(entry, dict) or entry.get("state") != self._state(path):
            return None
        return FileReport(path.name, entry["problems"], entry["warnings"], None)

    def add(self, paths: Sequence[Path], reports: Sequence[FileReport]) -> None:
        """Store the reports, in memory and in the cache file."""
        for path, report in zip(paths, reports, strict=True):
            entry = {"state": self._state(path), "problems": report.problems, "warnings": report.warnings}
            self.entries[path.name] = entry
        try:
            write_json(self.path, {"version": VERSION, "folder": str(self.folder), "files": self.entries})
        except OSError as error:
            logger.warning(
                "the check of %s cannot be cached (%s); its files are read again each time", self.folder, error
            )


def check_directory(directory: str | Path, jobs: int | None = None) -> tuple[str, bool]:
    """Check all files of a folder, cached or not: problems by file with a summary, and whether there is no problem."""
    paths = h5_files(directory)
    bar = progress_bar(len(paths), "check")
    reports = check_files(paths, jobs, bar)
    bar.close()
    cache = _Cache(paths[0].parent)
    cache.entries = {}
    cache.add(paths, reports)
    lines = []
    for report in reports:
        if report.problems or report.warnings:
            lines.append(printable(report.name))
            lines += [printable(f"  problem: {problem}") for problem in report.problems]
            lines += [printable(f"  warning: {warning}") for warning in report.warnings]
    lines += [*([""] if lines else []), *summary(reports)]
    others = sum(1 for path in paths[0].parent.iterdir() if path.suffix != ".h5")
    if others:
        lines.append(f"not checked: {others} entries that do not end in .h5")
    return "\n".join(lines), not any(report.problems for report in reports)


def summary(reports: Sequence[FileReport]) -> list[str]:
    """Files, patients, contrasts, coils and sizes of the usable volumes, a line each."""
    volumes = [report.volume for report in reports if report.volume is not None]
    bad = sum(bool(report.problems) for report in reports)
    warned = sum(bool(report.warnings) for report in reports)
    lines = [f"{len(reports)} files: {len(reports) - bad} usable, {bad} with problems, {warned} with warnings"]
    if not volumes:
        return lines
    slices = [volume.slices for volume in volumes]
    patients = len({volume.patient for volume in volumes})
    kinds = {
        "with target": sum(v.has_target for v in volumes),
        "with their own mask": sum(v.has_mask for v in volumes),
    }
    return [
        *lines,
        f"patients: {patients}",
        f"slices: {sum(slices)}, {min(slices)} to {max(slices)} a file",
        f"files {', '.join(f'{kind}: {count}' for kind, count in kinds.items())}",
        f"contrasts: {_counts(volume.acquisition for volume in volumes)}",
        f"coils: {_counts(volume.coils for volume in volumes)}",
        f"k-space (readout × phase): {_counts(f'{v.matrix[0]}×{v.matrix[1]}' for v in volumes)}",
        f"images: {_counts(f'{v.image_shape[0]}×{v.image_shape[1]}' for v in volumes)}",
    ]


def _counts(values: Any) -> str:
    return ", ".join(f"{value} ({count})" for value, count in sorted(Counter(values).items()))
