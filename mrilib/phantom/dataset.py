"""Phantom data: multi-coil brain scans as fastMRI h5 files, with annotations in fastMRI+ format.

`make_dataset` images the heads of `mrilib.phantom.anatomy` with the scanner of `mrilib.phantom.scanner`.

Orientation is fastMRI's: array rows run from posterior to anterior, so the up/down flipped array is the usual display;
columns run from the patient's right to left. Readout is along rows, phase encoding along columns.

Coil count, width, padding, noise, scale, slice positions and lesions are drawn per patient and shared by the contrasts
of the patient, so that only the image depends on the contrast. All patients are warps of one head.
"""

import csv
import hashlib
import json
import os
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from mrilib.config import ExploreParameters, require_utf8, resolve
from mrilib.data.fastmri_file import PHANTOM_ATTRIBUTE
from mrilib.phantom.anatomy import Patient, add_lesions, draw_patient, render
from mrilib.phantom.scanner import CONTRASTS, SEQUENCES, SLICE_THICKNESS, object_rms, simulate_volume, write_h5

MIN_AREA = 12.0  # [mm²]: smaller lesions in a slice are not annotated
MIN_PIXELS = 4  # likewise
UNREVIEWED_FRACTION = 0.05  # of the patients, in no list of reviewed files
HEALTHY_FRACTION = 0.32  # of the patients, without lesions
PARAMETERS_FILE = "phantom.json"
MAX_VALUES = 2**30  # complex values in a file: 9 GB, which are held in memory
VERSION = 1  # of the phantom; a higher number means other data for the same parameters


class Exam(NamedTuple):
    """Properties that the contrasts of a patient share."""

    patient: Patient
    patient_id: str
    reviewed: bool
    contrasts: tuple[str, ...]
    files: tuple[str, ...]  # stems, one for each contrast
    coils: int
    coil_seed: int
    width: int
    padding: tuple[int, int]
    voxel: float  # in plane, square [mm]
    shift: NDArray[np.float64]  # (2,): shift of the field of view along rows and columns [mm]
    slice_positions: NDArray[np.float64]  # (slices,) [mm]
    snr: float
    level: float  # rms over the head [file units]


def draw_exam(number: int, contrasts: int, slices: int, img_size: int, coils: int, seed: int) -> Exam:
    """Draw patient `number`, independently of the other patients of this seed."""
    rng = np.random.default_rng([seed, number])
    patient = draw_patient(rng)
    # From midbrain and basal ganglia to the vertex; the template's origin lies 20 mm below ours.
    first, last = rng.uniform(-26.0, -14.0), rng.uniform(33.0, 43.0)
    positions = np.linspace(first, last, slices) if slices > 1 else np.array([rng.uniform(first, last)])
    positions = positions + rng.uniform(-1.5, 1.5, slices)
    if rng.random() >= HEALTHY_FRACTION:
        patient = add_lesions(patient, rng, positions)
    counts = sorted({max(2, round(coils * part)) for part in (0.5, 0.75, 1.0, 1.25)})
    width = round(img_size * rng.choice((0.88, 0.95, 1.0, 1.0, 1.09)) / 2) * 2
    width -= int(rng.random() < 0.1)  # fastMRI has odd widths too
    missing = round(width * rng.uniform(0.03, 0.12)) if rng.random() < 0.3 else 0
    left = missing // 2 + int(rng.integers(0, missing // 4 + 1))
    depth = 209.0 / np.linalg.norm(patient.affine[:, 1])  # front to back [mm]
    names = _file_names(number, contrasts, seed)
    return Exam(
        patient=patient,
        patient_id=hashlib.sha256(f"mrilib phantom {seed} {number}".encode()).hexdigest(),
        reviewed=bool(rng.random() >= UNREVIEWED_FRACTION),
        contrasts=tuple(names),
        files=tuple(names.values()),
        coils=int(rng.choice(counts)),
        coil_seed=int(rng.integers(2**32)),
        width=width,
        padding=(left, missing - left),
        voxel=float(depth * rng.uniform(1.05, 1.14) / img_size),
        shift=rng.uniform(-3.0, 3.0, 2),
        slice_positions=positions,
        snr=float(np.exp(rng.uniform(np.log(25), np.log(50)))),
        level=float(2.5e-4 * np.exp(rng.uniform(-1.4, 1.4))),
    )


def _file_names(number: int, contrasts: int, seed: int) -> dict[str, str]:
    """Contrasts of a patient in the order of scanning, with their file stems."""
    rng = np.random.default_rng([seed, number, 1])
    order = rng.permutation(len(CONTRASTS))[:contrasts].tolist()
    site = rng.integers(200, 211)
    # The prime modulus makes the numbers of up to a million files unique.
    digits = [6_000_000 + ((number * len(CONTRASTS) + c) * 7919 + 131 * seed) % 999_983 for c in order]
    return {CONTRASTS[c]: f"file_brain_{CONTRASTS[c]}_{site}_{d}" for c, d in zip(order, digits, strict=True)}


class Box(NamedTuple):
    """Annotation in array coordinates of the reconstruction."""

    slice: int
    x: int
    y: int
    width: int
    height: int
    label: str


def image_exam(exam: Exam, contrast: str, img_size: int, seed: int) -> tuple[NDArray[np.float32], list[Box]]:
    """Image one contrast of an exam without noise, and find the boxes of its lesions.

    Returns
    -------
    image : ndarray, float32, shape (slices, img_size, width)
        With a root mean square of `exam.level` in the head [file units].
    boxes : list of Box
        See `_lesion_boxes`.
    """
    rng = np.random.default_rng([seed, int(exam.patient_id[:8], 16), CONTRASTS.index(contrast)])
    # Slight motion between two contrasts.
    rotation = Rotation.from_euler("xyz", rng.normal(0, 0.25, 3), degrees=True).as_matrix()
    shift = rng.normal(0, 0.3, 3)
    rows = (np.arange(img_size) - img_size // 2) * exam.voxel + exam.shift[0]
    columns = -(np.arange(exam.width) - exam.width // 2) * exam.voxel + exam.shift[1]
    y, x = np.meshgrid(rows, columns, indexing="ij")
    stack, boxes = [], []
    for index, position in enumerate(exam.slice_positions):
        # The mean of two thin sheets approximates the slice profile.
        sheets = [np.stack([x, y, np.full_like(x, position + dz)], -1).reshape(-1, 3)
                  for dz in (-SLICE_THICKNESS / 4, SLICE_THICKNESS / 4)]  # fmt: skip
        signal, opacities = render(exam.patient, np.concatenate(sheets) @ rotation.T + shift, SEQUENCES[contrast])
        stack.append(signal.reshape(2, img_size, exam.width).mean(0))
        boxes += _lesion_boxes(exam, index, [part.reshape(2, img_size, exam.width).mean(0) for part in opacities])
    image = np.stack(stack)
    return image * np.float32(exam.level / object_rms(image)), boxes


def _lesion_boxes(exam: Exam, index: int, opacities: list[NDArray[np.float32]]) -> list[Box]:
    """Boxes of the lesions on slice `index`, from the fraction of each pixel (H, width) that a lesion fills.

    A lesion is annotated if the pixels that it fills at least half make up MIN_PIXELS and MIN_AREA. Its box holds all
    pixels that it fills to at least a fifth.
    """
    boxes = []
    for lesion, opacity in zip(exam.patient.lesions, opacities, strict=True):
        width = min(opacity.shape[0], exam.width)  # of the reconstruction
        left = exam.width // 2 - width // 2
        filled = opacity[:, left : left + width]
        solid = int((filled >= 0.5).sum())
        if solid >= MIN_PIXELS and solid * exam.voxel**2 >= MIN_AREA:
            y, x = np.nonzero(filled >= 0.2)
            size = int(np.ptp(x)) + 1, int(np.ptp(y)) + 1
            boxes.append(Box(index, int(x.min()), int(y.min()), *size, lesion.label))
    return boxes


def make_dataset(
    directory: str | Path,
    volumes: int = 150,
    slices: int = 4,
    img_size: int = 128,
    coils: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Write a data set of simulated brains: fastMRI h5 files, brain.csv and brain_file_list.csv.

    Equal parameters give equal data. An interrupted call can be repeated and resumes where it stopped.

    Parameters
    ----------
    directory : path
        Created if it does not exist.
    volumes : int
        Number of files: one for each contrast of a patient, so three for each patient but perhaps the last.
    slices : int
        Slices of a file.
    img_size : int
        Rows and maximum width of the reconstruction, even [pixels]; k-space has 2·img_size readout points.
    coils : int
        Typical number of coils; files have 0.5 to 1.25 times as many.
    seed : int
        Not negative.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    Path
        The directory.

    Raises
    ------
    ValueError
        If a parameter is out of range, or the directory's path is no UTF-8.
    FileExistsError
        If the directory is a file, or holds h5 files that these parameters would not write.
    """
    directory = Path(directory)
    require_utf8(directory)
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"'{directory}' is a file; give a folder")
    parameters = {"volumes": volumes, "slices": slices, "img_size": img_size, "coils": coils, "seed": seed}
    _check_parameters(parameters)
    files = len(CONTRASTS)  # of a patient
    exams = [(number, min(files, volumes - files * number)) for number in range((volumes + files - 1) // files)]
    expected = {stem for number, contrasts in exams for stem in _file_names(number, contrasts, seed).values()}
    _claim(directory, {**parameters, "version": VERSION}, expected)
    # Patients are independent of each other. A process for a few of them costs more time than it saves.
    jobs = max(1, min(joblib.cpu_count(), len(exams) // 8))
    tasks = (
        joblib.delayed(_write_exam)(directory, number, contrasts, slices, img_size, coils, seed)
        for number, contrasts in exams
    )
    rows: list[tuple] = []
    reviewed: list[str] = []
    with tqdm(total=volumes, desc="phantom", unit="volume", disable=not progress) as bar:
        for stems, boxes in joblib.Parallel(n_jobs=jobs, return_as="generator")(tasks):
            bar.update(len(stems))
            if boxes is not None:
                reviewed += stems
                rows += boxes
    columns = ("file", "slice", "study_level", "x", "y", "width", "height", "label")
    _write_rows(directory / "brain.csv", [columns, *sorted(rows)])
    _write_rows(directory / "brain_file_list.csv", [(stem,) for stem in sorted(reviewed)])
    return directory


def _check_parameters(parameters: dict[str, int]) -> None:
    lowest = {"volumes": 1, "slices": 1, "img_size": 16, "coils": 2, "seed": 0}
    for name, value in parameters.items():
        if value < lowest[name]:
            raise ValueError(f"{name} is {value}; it must be at least {lowest[name]}")
    slices, img_size, coils = (parameters[name] for name in ("slices", "img_size", "coils"))
    values = slices * coils * 3 * img_size**2  # of the k-space of the largest file
    if values > MAX_VALUES:
        raise ValueError(
            f"slices {slices}, coils {coils} and img_size {img_size} make files of {values:.1g} values; at most "
            f"{MAX_VALUES:.1g} are allowed"
        )
    if img_size % 2:
        raise ValueError(f"img_size is {img_size}; it must be even, as fastMRI's crops are")


def _write_exam(
    directory: Path, number: int, contrasts: int, slices: int, img_size: int, coils: int, seed: int
) -> tuple[tuple[str, ...], list[tuple] | None]:
    """Write the missing files of one patient; stems of all its files and rows of brain.csv (None if not reviewed)."""
    with threadpool_limits(1):  # threads do not pay for small arrays
        exam = draw_exam(number, contrasts, slices, img_size, coils, seed)
        rows: list[tuple] = []
        for stem, contrast in zip(exam.files, exam.contrasts, strict=True):
            image, boxes = image_exam(exam, contrast, img_size, seed)
            path = directory / f"{stem}.h5"
            if not path.exists():
                _scan(exam, contrast, image, path, [seed, number, CONTRASTS.index(contrast)])
            # fastMRI+ counts rows on the up/down flipped image.
            rows += [(stem, b.slice, "No", b.x, img_size - b.y - b.height, b.width, b.height, b.label) for b in boxes]
    return tuple(exam.files), rows if exam.reviewed else None


def make_if_absent(config: ExploreParameters) -> bool:
    """Write the phantom of 01_explore_data's parameters, unless it is complete; whether data was written."""
    directory = resolve(config.data_dir)
    if not config.phantom_volumes or (directory.exists() and not (directory / PARAMETERS_FILE).exists()):
        return False  # no phantom requested, or a user's data
    if (directory / "brain_file_list.csv").exists():  # written last
        return False
    make_dataset(
        directory,
        volumes=config.phantom_volumes,
        slices=config.phantom_slices,
        img_size=config.img_size,
        coils=config.phantom_coils,
        seed=config.phantom_seed,
    )
    return True


def _scan(exam: Exam, contrast: str, image: NDArray[np.float32], path: Path, seed: list[int]) -> None:
    """Simulate one contrast's k-space and write it."""
    voxel_size = (exam.voxel, exam.voxel)
    kspace = simulate_volume(
        image,
        exam.coils,
        np.random.default_rng([*seed, 1]),
        coil_rng=np.random.default_rng(exam.coil_seed),
        voxel_size=voxel_size,
        slice_positions=exam.slice_positions.tolist(),
        snr=exam.snr,
        padding=exam.padding,
    )
    height = image.shape[1]
    write_h5(
        path,
        kspace,
        (height, min(height, exam.width)),
        contrast,
        exam.patient_id,
        sequence=SEQUENCES[contrast],
        voxel_size=voxel_size,
        padding=exam.padding,
        attributes={PHANTOM_ATTRIBUTE: "ICBM 152 2009, warped; simulated scan"},
    )


def _claim(directory: Path, parameters: dict[str, int], expected: set[str]) -> None:
    """Write the parameters into a new directory; refuse one that holds other data."""
    directory.mkdir(parents=True, exist_ok=True)
    note = directory / PARAMETERS_FILE
    present = sorted(directory.glob("*.h5"))
    if present and note.is_file() and (before := json.loads(note.read_text())) != parameters:
        raise FileExistsError(
            f"'{directory}' holds a phantom made with {before}, not with {parameters}; choose another directory "
            "or remove that one first"
        )
    foreign = [path.name for path in present if path.stem not in expected or not note.is_file()]
    if foreign:
        raise FileExistsError(
            f"'{directory}' holds {len(foreign)} h5 files ({foreign[0]}, …) that the phantom did not write; "
            "choose an empty directory"
        )
    temporary = note.with_suffix(".tmp")
    temporary.write_text(json.dumps(parameters) + "\n")
    os.replace(temporary, note)


def _write_rows(path: Path, rows: Seq[tuple]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    os.replace(temporary, path)
