"""Every file of a data folder opened and read before a night of training is spent on it.

`python -m mrilib check DIR` tells every problem by file and sums up what is there. The notebooks ask the same question
when they start: what was found is remembered per file, size and time of change, so that a folder is read once.
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
    read_volume,
    structure,
    told,
    unreadable,
    unstored,
)

MOST_PEAK = 10  # times that the attribute max may be larger or smaller than what it is the maximum of
VERSION = 4  # raised when files are looked at in another way than before: what is remembered counts no more
ALONE = 16  # so few files are read in this process: starting others takes seconds
NOISE_RATIO = 2.0  # mean power of the centre of k-space over the mean of all: 1 for white noise, over 30 for a head

logger = logging.getLogger("mrilib")


class FileReport(NamedTuple):
    """What one file was found to be."""

    name: str
    problems: list[str]  # it cannot be used
    warnings: list[str]  # it can, but look at it
    volume: Volume | None


def check_file(path: Path) -> FileReport:
    """Read one file to its end and list everything that is wrong with it."""
    problems, volume = unreadable(path), None
    warnings: list[str] = []
    if not problems:
        try:
            with h5py.File(path, "r") as h5:
                volume, problems = structure(h5, path)
                more, warnings = _contents(h5, volume)
                problems += more
        except Exception as error:  # on a damaged file h5py raises nearly anything; the others must be told
            problems.append(f"cannot be read as HDF5 ({told(error)})")
    return FileReport(path.name, problems, warnings, None if problems else volume)


def _contents(h5: h5py.File, volume: Volume | None) -> tuple[list[str], list[str]]:
    """Problems and warnings of the arrays' values; arrays of a wrong type are left to `structure`."""
    problems: list[str] = []
    kinds: dict[str, list[int]] = {"all zero": [], "noise only": []}
    padding = volume.padding if volume else None
    beyond: list[int] = []
    tiny: list[int] = []
    large: list[int] = []
    for number, data in _slices(h5, "kspace", 4, "c", problems):
        largest = np.abs(data.view(np.float32)).max()
        if 0 < largest < SMALLEST_SCALE:
            tiny.append(number)
        if largest > LARGEST_SCALE:
            large.append(number)
        if kind := slice_kind(data):
            kinds[kind].append(number)
        if padding and (data[..., : padding[0]].any() or data[..., padding[1] :].any()):
            beyond.append(number)
    if large:
        problems.append(f"kspace: too large for single precision in {_listed(large)}; scale the file")
    if tiny:
        problems.append(f"kspace: too small for single precision in {_listed(tiny)}; scale the file")
    if beyond and padding:
        problems.append(
            f"ismrmrd_header contradicts kspace: lines outside of {padding[0]} to {padding[1] - 1} hold data in "
            f"{_listed(beyond)}"
        )
    warnings = [f"{_listed(numbers)}: {kind}" for kind, numbers in kinds.items() if numbers]
    peaks = [float(data.max()) for _, data in _slices(h5, "reconstruction_rss", 3, "f", problems)]
    if volume is not None and peaks and not np.isclose(max(peaks), volume.maximum, rtol=1e-3, atol=0):
        said = f"attribute max is {volume.maximum:g}, reconstruction_rss has {max(peaks):g}"
        far = not max(peaks) / MOST_PEAK < volume.maximum < max(peaks) * MOST_PEAK
        (problems if far else warnings).append(f"{said}; SSIM is scaled by it" if far else said)
    mask = dataset(h5, "mask")
    if volume is not None and mask is not None:
        values = mask[()]
        if not np.isin(values, (0, 1)).all():
            problems.append("mask holds other values than 0 and 1")
        elif not values[values.size // 2] or not volume.padding[0] <= values.size // 2 < volume.padding[1]:
            problems.append("mask does not sample the centre of k-space")
    if volume is not None and (unlisted := unlisted_contrast(volume)):
        warnings.append(unlisted)
    if volume is not None:
        expected = ("norm",) if volume.has_target else ("num_low_frequency",) if volume.has_mask else ()
        warnings += [f"has no attribute {name} (not needed here)" for name in expected if name not in h5.attrs]
        if not volume.has_target and not volume.has_mask:
            warnings.append("has neither reconstruction_rss nor mask: it cannot be scored, nor train the decoder")
    return problems, warnings


def unlisted_contrast(volume: Volume) -> str:
    """A warning of a contrast that is not in the list, which images do not need; empty for one that is."""
    try:
        findings.contrast_name(volume.acquisition)
    except ValueError as error:
        return f"{error} (the image does not need it; the text leaves the contrast out)"
    return ""


def _slices(
    h5: h5py.File, name: str, dimensions: int, kind: str, problems: list[str]
) -> Iterator[tuple[int, np.ndarray]]:
    """The readable, finite slices of an array in single precision; the others go to `problems`."""
    array = dataset(h5, name)
    if array is None or array.ndim != dimensions or array.dtype.kind != kind or not np.prod(array.shape, dtype=float):
        return
    sizes = np.prod(array.shape[1:], dtype=float), np.prod(array.shape, dtype=float)
    if sizes[0] > MAX_SLICE_VALUES or sizes[1] > LARGEST_VOLUME or array.shape[0] > MAX_SLICES or unstored(name, array):
        return  # told by its structure
    single = np.complex64 if kind == "c" else np.float32
    broken, infinite = [], []
    for number in range(array.shape[0]):
        try:
            with np.errstate(over="ignore"):  # what single precision, which all works in, cannot hold is infinite
                data = array[number].astype(single, copy=False)
        except (OSError, RuntimeError, ValueError) as error:  # a chunk cut off, a checksum, an unknown filter
            broken.append((number, told(error)))
            continue
        if np.isfinite(data).all():
            yield number, data
        else:
            infinite.append(number)
    if broken:
        problems.append(f"{name}: {_listed([n for n, _ in broken])} cannot be read ({broken[0][1]})")
    if infinite:
        problems.append(f"{name}: NaN or infinity in {_listed(infinite)}")


def slice_kind(data: np.ndarray) -> str:
    """Tell whether k-space holds an image.

    Parameters
    ----------
    data : array, complex, shape (coil, readout, phase)

    Returns
    -------
    str
        "all zero"; "noise only" where the centre of k-space (an eighth of each axis, sampled lines) is no stronger than
        the rest; "" for an image.
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


def _listed(numbers: Sequence[int]) -> str:
    """slice 3; slices 0, 2 to 5, 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    told_runs = [str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a} to {b}" for a, b in runs]
    return f"slice{'s' if len(numbers) > 1 else ''} {', '.join(told_runs)}"


# ------------------------------------------------------------------------------------------------- folders


def h5_files(directory: str | Path) -> list[Path]:
    """The h5 files of a folder, sorted by name.

    Raises
    ------
    DataError
        If it is no folder or has none, folders below that hold some being named; or if a file's name is no UTF-8.
    ParameterError
        If the folder's path is no UTF-8.
    """
    folder = resolve(directory)
    if not folder.is_dir():
        raise DataError(f"{display_path(folder)} is not a folder")
    require_utf8(folder)
    paths = sorted(path for path in folder.iterdir() if path.suffix == ".h5")
    if not paths:
        below = sorted({path.parent for path in folder.glob("*/*.h5")} | {p.parent for p in folder.glob("*/*/*.h5")})
        hint = f"; {', '.join(display_path(one) for one in below[:5])} hold some" if below else ""
        raise DataError(f"no .h5 file in {display_path(folder)}{hint}")
    for path in paths:
        try:
            path.name.encode()
        except UnicodeEncodeError:  # neither a record nor a table could hold it
            shown = os.fsencode(path.name).decode(errors="replace")
            raise DataError(f"{display_path(folder)}: the name of {shown} is no UTF-8; rename the file") from None
    return paths


def check_files(
    paths: Sequence[Path],
    jobs: int | None = None,
    bar: Any = None,
    check: Callable[[Path], FileReport] = check_file,
) -> list[FileReport]:
    """Reports of files, in their order.

    Parameters
    ----------
    paths : sequence of Path
    jobs : int, optional
        Processes; by default one a core, or none for a few files.
    bar : tqdm bar, optional
    check : callable
        What looks at one file.
    """
    jobs = min(jobs or (1 if len(paths) <= ALONE else joblib.cpu_count()), max(1, len(paths)))
    reports: dict[Path, FileReport] = {}

    def take(part: Sequence[Path]) -> None:
        tasks = (joblib.delayed(_report)(check, path) for path in part)
        for path, report in joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")(tasks):
            reports[path] = report
            if bar is not None:
                bar.update()

    try:
        take(paths)
    except TerminatedWorkerError:  # some file has killed its process: the rest one by one, to know which
        jobs = max(2, jobs)  # in a process of its own, not in this one
        for path in [path for path in paths if path not in reports]:
            try:
                take([path])
            except TerminatedWorkerError:
                reports[path] = FileReport(path.name, ["reading it killed the process"], [], None)
    return [reports[path] for path in paths]


def _report(check: Callable[[Path], FileReport], path: Path) -> tuple[Path, FileReport]:
    return path, check(path)


def usable_volumes(
    directory: str | Path, on_bad_file: str = "refuse", interactive: bool = False
) -> tuple[list[Volume], list[dict[str, Any]]]:
    """The volumes of a folder, every file of which has been read to its end once.

    Parameters
    ----------
    directory : path
    on_bad_file : {"refuse", "skip"}
    interactive : bool
        Show a notebook's progress widget while files are read.

    Returns
    -------
    volumes : list of Volume
        Sorted by name.
    skipped : list of dict
        ``file``, ``folder`` and ``problems`` of each file that was left out.

    Raises
    ------
    DataError
        If there is no file, no usable file, or an unusable one that is not to be skipped; all problems are listed.
    """
    paths = h5_files(directory)
    memory = _Memory(paths[0].parent)
    new = [path for path in paths if memory.report(path) is None]
    if new:
        from mrilib.progress import progress_bar

        bar = progress_bar(len(new), "check", interactive)
        for path, report in zip(new, check_files(new, bar=bar), strict=True):
            memory.add(path, report)
        bar.close()
        memory.save()
    reports = [found for path in paths if (found := memory.report(path)) is not None]
    bad = [report for report in reports if report.problems]
    folder = display_path(paths[0].parent)
    warned = sum(bool(report.warnings) for report in reports)
    logger.info("%s: %d files, %d with problems, %d with warnings", folder, len(paths), len(bad), warned)
    if bad and (on_bad_file == "refuse" or len(bad) == len(paths)):
        advice = "" if on_bad_file == "skip" else "; on_bad_file: skip would leave them out"
        lines = [printable(f"{report.name}: {'; '.join(report.problems)}") for report in bad]
        raise DataError(f"{len(bad)} unusable files in {folder}{advice}:\n" + "\n".join(lines))
    good = [path for path, report in zip(paths, reports, strict=True) if not report.problems]
    skipped = [{"file": report.name, "folder": folder, "problems": report.problems} for report in bad]
    volumes = [read_volume(path) for path in good]
    if unlisted := [volume for volume in volumes if unlisted_contrast(volume)]:
        names = ", ".join(sorted({repr(volume.acquisition) for volume in unlisted}))
        logger.warning(
            "%s: %d files of a contrast that is not in the list (%s); their text leaves the contrast out",
            folder,
            len(unlisted),
            names,
        )
    return volumes, skipped


class _Memory:
    """What was found in the files of a folder; kept in the user's cache folder, as data may be read-only."""

    def __init__(self, folder: Path) -> None:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        self.path = base / "mrilib" / f"check-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}.json"
        self.found: dict[str, Any] = {}
        try:
            content = json.loads(self.path.read_text())
            if content["version"] == VERSION and content["folder"] == str(folder):
                self.found = dict(content["files"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # nothing is remembered: everything is read again
        self.folder = folder

    @staticmethod
    def _state(path: Path) -> list[int]:
        try:
            state = path.stat()
        except OSError:
            return [0, 0]
        return [state.st_size, state.st_mtime_ns]

    def report(self, path: Path) -> FileReport | None:
        entry = self.found.get(path.name)
        if not isinstance(entry, dict) or entry.get("state") != self._state(path):
            return None
        return FileReport(path.name, entry["problems"], entry["warnings"], None)

    def add(self, path: Path, report: FileReport) -> None:
        entry = {"state": self._state(path), "problems": report.problems, "warnings": report.warnings}
        self.found[path.name] = entry

    def save(self) -> None:
        from mrilib.files import write_json

        try:
            write_json(self.path, {"version": VERSION, "folder": str(self.folder), "files": self.found})
        except OSError as error:
            logger.warning(
                "what was found in %s cannot be remembered (%s): it is read again each time", self.folder, error
            )


def check_directory(directory: str | Path, jobs: int | None = None) -> tuple[str, bool]:
    """Read every file of a folder, whatever is remembered; what ``python -m mrilib check`` prints.

    Returns
    -------
    text : str
        Problems and warnings by file, then the summary.
    fine : bool
        Whether no file has a problem.
    """
    from mrilib.progress import progress_bar

    paths = h5_files(directory)
    bar = progress_bar(len(paths), "check")
    reports = check_files(paths, jobs, bar)
    bar.close()
    memory = _Memory(paths[0].parent)
    memory.found = {}
    for path, report in zip(paths, reports, strict=True):
        memory.add(path, report)
    memory.save()
    lines = []
    for report in reports:
        if report.problems or report.warnings:
            lines.append(printable(report.name))
            lines += [printable(f"  problem: {problem}") for problem in report.problems]
            lines += [printable(f"  warning: {warning}") for warning in report.warnings]
    lines += [*([""] if lines else []), *summary(reports)]
    others = sum(1 for path in paths[0].parent.iterdir() if path.suffix != ".h5")
    if others:
        lines.append(f"not looked at: {others} entries that do not end in .h5")
    return "\n".join(lines), not any(report.problems for report in reports)


def summary(reports: Sequence[FileReport]) -> list[str]:
    """Files, patients, contrasts, coils and sizes of what is usable, a line each."""
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
