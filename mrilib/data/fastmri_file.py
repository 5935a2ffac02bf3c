"""One fastMRI brain file: its header, attributes and shapes, and the problems of its structure.

Files may be damaged or hostile: links and external storage are not followed out of the file, headers with entities are
not expanded, and no array is read before its declared size has been compared with its stored size.
"""

from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element, ParseError

import h5py
import numpy as np
from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from mrilib.config import printable
from mrilib.data import findings

NAMESPACE = {"i": "http://www.ismrm.org/ISMRMRD"}
DATASETS = ("kspace", "ismrmrd_header", "reconstruction_rss", "mask")
PHANTOM_ATTRIBUTE = "phantom"  # of the files of `mrilib.phantom`: a description of the head
MAX_SLICE_VALUES = 2**26  # complex values, 9 times fastMRI's largest slice
LARGEST_VOLUME = 2**32  # complex values, 30 times fastMRI's largest volume
MAX_SLICES = 2**12  # fastMRI's volumes have about 16
MAX_COMPRESSION_RATIO = 100  # k-space is mostly noise and compresses little; zeros compress 1000:1
SMALL_ARRAY = 2**24  # bytes that an array may declare whatever it stores
LARGEST_ATTRIBUTE = 2**12  # characters
LARGEST_HEADER = 2**22  # characters; fastMRI's have about 2**14
LARGEST_ACCELERATION = 1000
SMALLEST_SCALE = 1e-30  # [file units]: normalisation needs values well above the smallest of single precision
LARGEST_SCALE = 1e30  # [file units]: sums in a Fourier transform of larger values overflow in single precision


class DataError(ValueError):
    """A data file that cannot be used; the message names the file and the problem."""


class Volume(NamedTuple):
    """Metadata of one h5 file, available without reading its k-space."""

    path: Path
    file: str  # name without .h5, as in fastMRI+
    slices: int
    coils: int
    matrix: tuple[int, int]  # readout H, phase W of the k-space
    image_shape: tuple[int, int]  # (h, w) of the evaluated image [pixels]
    readout: int  # readout length without oversampling
    padding: tuple[int, int]  # phase-encoding lines outside [left, right) were not acquired
    acquisition: str
    patient: str
    maximum: float  # of the target volume [file units]; 0 without a target
    has_target: bool
    has_mask: bool  # as the files of fastMRI's test set
    acceleration: int  # of the file's own mask; 0 without a mask
    pixel: tuple[float, float] | None = None  # readout, phase [mm]; None if the header lacks it


class Header(NamedTuple):
    """Encoding from an ISMRMRD header, as (x readout, y phase)."""

    encoded: tuple[int, int]  # encodedSpace matrix
    recon: tuple[int, int]  # reconSpace matrix [pixels]
    padding: tuple[int, int]  # acquired phase-encoding lines [left, right)
    pixel: tuple[float, float] | None = None  # encoded field of view / encoded matrix [mm]


def read_volume(path: str | Path) -> Volume:
    """Read header, attributes and shapes of one fastMRI brain file.

    Raises
    ------
    DataError
        Names the file and all problems of its structure; see `structure`.
    """
    path = Path(path)
    volume, problems = None, path_problems(path)
    if not problems:
        try:
            with h5py.File(path, "r") as h5:
                volume, problems = structure(h5, path)
        except Exception as error:  # h5py raises almost any exception on a damaged file
            problems = [f"cannot be read as HDF5 ({first_line(error)})"]
    if volume is None:
        raise DataError(f"{path.name}: {'; '.join(problems)}")
    return volume


def path_problems(path: Path) -> list[str]:
    """Reasons not to open a path (opening a pipe would block); empty for a regular file."""
    if path.is_file():
        return []
    return ["is a link to nothing" if path.is_symlink() and not path.exists() else "is not a file"]


def first_line(error: BaseException) -> str:
    """First non-empty line of an error's message, or the name of its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def structure(h5: h5py.File, path: Path) -> tuple[Volume | None, list[str]]:
    """Check the datasets, attributes and header of an open file; the values of the arrays are not read.

    Parameters
    ----------
    h5 : h5py.File
    path : Path

    Returns
    -------
    volume : Volume, or None if there is a problem
    problems : list of str
        External links, or soft links that leave the file; datasets and attributes that are missing or have a wrong
        shape or type; single-coil data; no slices; a header that is unreadable, hostile or contradicts the arrays.
    """
    problems = leaving_links(h5)
    problems += _missing_datasets(h5, {problem.split(" ")[0] for problem in problems})
    arrays = {name: array for name in ("kspace", "reconstruction_rss", "mask") if (array := dataset(h5, name))}
    kspace = arrays.get("kspace")
    for name, array in arrays.items():
        problems += array_problems(name, array, kspace)
    problems += _text_problems(h5) + _number_problems(h5, arrays)
    header = None
    if (stored := dataset(h5, "ismrmrd_header")) is not None:
        try:
            header = read_header(_header_text(stored))
        except DataError as error:
            problems.append(str(error))
    if header is not None and kspace is not None and kspace.ndim == 4:
        problems += contradictions(header, kspace.shape[-2:])
    if problems or kspace is None or header is None:
        return None, problems
    return _volume(h5, path, header, arrays), []


def _missing_datasets(h5: h5py.File, leaving: set[str]) -> list[str]:
    names = set(h5)  # "in h5" would follow links
    problems = []
    for name in DATASETS:
        if name in names and name not in leaving and dataset(h5, name) is None:
            problems.append(f"{name} is not a dataset")
        elif name not in names and name in ("kspace", "ismrmrd_header"):
            problems.append(f"has no dataset {name}")
    return problems


def _text_problems(h5: h5py.File) -> list[str]:
    problems = []
    for name in ("acquisition", "patient_id"):
        value = text(attribute(h5, name))
        if not value:
            problems.append(f"attribute {name} is not text" if name in h5.attrs else f"has no attribute {name}")
        elif len(value) > LARGEST_ATTRIBUTE:
            problems.append(f"attribute {name} is longer than {LARGEST_ATTRIBUTE} characters")
        elif not value.isprintable():
            problems.append(f"attribute {name} holds control characters: {printable(value)[:80]}")
        elif name == "acquisition" and value in findings.KNEES:
            problems.append(f"acquisition {value!r} is a knee scan; only brain scans are supported")
    return problems


def _number_problems(h5: h5py.File, arrays: dict[str, h5py.Dataset]) -> list[str]:
    """Problems of the attributes max (needed for a target) and acceleration (needed for a mask)."""
    ranges = {"max": ("reconstruction_rss", 0, LARGEST_SCALE), "acceleration": ("mask", 1, LARGEST_ACCELERATION)}
    problems = []
    for name, (array, lowest, highest) in ranges.items():
        value = attribute(h5, name)
        limited = number(value)
        if array not in arrays or (limited is not None and lowest <= limited <= highest):
            continue
        if name not in h5.attrs:
            problems.append(f"has no attribute {name}")
            continue
        stored = h5.attrs.get_id(name)
        plain = value.item() if isinstance(value, np.generic) else value
        shown = f"{stored.dtype} {stored.shape}" if value is None else repr(plain)[:80]
        problems.append(f"attribute {name} is {shown}; expected a positive number up to {highest:g}")
    return problems


def _volume(h5: h5py.File, path: Path, header: Header, arrays: dict[str, h5py.Dataset]) -> Volume:
    target = arrays.get("reconstruction_rss")
    slices, coils, height, width = arrays["kspace"].shape
    readout = min(height, header.recon[0])
    # A header with more columns than the k-space (fastMRI's FLAIR 203) means a square image, as in fastMRI.
    image_shape = (readout, header.recon[1]) if header.recon[1] <= width else (min(readout, width), width)
    if target is not None:
        image_shape = target.shape[1:]
    return Volume(
        path=path,
        file=path.stem,
        slices=slices,
        coils=coils,
        matrix=(height, width),
        image_shape=image_shape,
        readout=max(readout, image_shape[0]),
        padding=header.padding,
        acquisition=text(attribute(h5, "acquisition")),
        patient=text(attribute(h5, "patient_id")),
        maximum=(number(attribute(h5, "max")) or 0.0) if target is not None else 0.0,
        has_target=target is not None,
        has_mask="mask" in arrays,
        acceleration=round(number(attribute(h5, "acceleration")) or 0) if "mask" in arrays else 0,
        pixel=header.pixel,
    )


def require_unchanged(h5: h5py.File, volume: Volume) -> None:
    """Refuse a file whose arrays no longer have the shapes of `volume`.

    Raises
    ------
    DataError
        Names the file and the array.
    """
    expected: dict[str, tuple[int, ...]] = {"kspace": (volume.slices, volume.coils, *volume.matrix)}
    if volume.has_target:
        expected["reconstruction_rss"] = (volume.slices, *volume.image_shape)
    if volume.has_mask:
        expected["mask"] = volume.matrix[1:]
    for name, shape in expected.items():
        array = dataset(h5, name)
        if array is None or array.shape != shape or (name == "kspace" and array.dtype.kind != "c"):
            now = "is gone" if array is None else f"is now {array.dtype} {array.shape}"
            raise DataError(
                f"{volume.path.name}: the file was replaced while it was in use: {name} {now}, was {shape}; "
                "restore the old file, or start a new run"
            )


def leaving_links(h5: h5py.File) -> list[str]:
    """Problems of links, and of datasets with external storage, that lead out of the file; none is followed."""
    problems: list[str] = []

    def visit(raw: bytes) -> None:  # bytes, since h5.get requires a UTF-8 name
        name, kind = decoded(raw), h5.id.links.get_info(raw).type
        if kind == h5py.h5l.TYPE_EXTERNAL:
            filename, target = map(decoded, h5.id.links.get_val(raw))
            problems.append(f"{name} is an external link to {target} in {filename}: it leaves the file")
        elif kind == h5py.h5l.TYPE_SOFT and not _stays(h5, name, target := decoded(h5.id.links.get_val(raw))):
            problems.append(f"{name} is a soft link to {target}, which is not in this file: it leaves the file")

    def decoded(raw: bytes) -> str:
        return raw.decode("utf-8", errors="replace")

    h5.id.links.visit(visit)  # visits soft and external links without following them
    for name in DATASETS:
        array = dataset(h5, name) if not any(problem.startswith(f"{name} ") for problem in problems) else None
        if array is not None and (array.external or array.is_virtual):
            kind = "external storage" if array.external else "a virtual dataset"
            problems.append(f"{name} is {kind}: its values lie in other files")
    return problems


def _stays(h5: h5py.File, name: str, target: str) -> bool:
    """Whether a soft link's target lies inside the file, reached by hard links only."""
    path = PurePosixPath("/") / PurePosixPath(name).parent / target  # an absolute target replaces the rest
    steps = [str(step) for step in [*reversed(path.parents), path] if str(step) != "/"]
    return ".." not in path.parts and all(isinstance(h5.get(step, getlink=True), h5py.HardLink) for step in steps)


def dataset(h5: h5py.File, name: str) -> h5py.Dataset | None:
    """Dataset that lies in the file itself; None if it is missing or its link leaves the file."""
    link = h5.get(name, getlink=True)
    inside = isinstance(link, h5py.HardLink) or (isinstance(link, h5py.SoftLink) and _stays(h5, name, link.path))
    if not inside:
        return None
    node = h5[name]
    return node if isinstance(node, h5py.Dataset) else None


def array_problems(name: str, array: h5py.Dataset, kspace: h5py.Dataset | None) -> list[str]:
    """Problems of the shape and type of kspace, reconstruction_rss or mask."""
    shown = f"{name} is {array.dtype} {array.shape}"
    if name == "kspace":
        problem = _kspace_problem(array)
        return [f"{shown}{problem}"] if problem else unstored(name, array)
    kinds = "f" if name == "reconstruction_rss" else "buif"
    if array.dtype.kind not in kinds:
        return [f"{shown}; expected {'real (slices, h, w)' if kinds == 'f' else 'true or false (W,)'}"]
    if kspace is None or kspace.ndim != 4:
        return []
    slices, _, height, width = kspace.shape
    fits = array.shape == (width,)
    if name == "reconstruction_rss":
        fits = array.ndim == 3 and array.shape[0] == slices
        fits = fits and 0 < array.shape[1] <= height and 0 < array.shape[2] <= width
    return unstored(name, array) if fits else [f"{name} {array.shape} does not fit kspace {kspace.shape}"]


def _kspace_problem(array: h5py.Dataset) -> str:
    expected = "expected complex (slices, coils, H, W)"
    if array.ndim == 3 and array.dtype.kind == "c":
        return f": single-coil data; {expected}"
    if array.ndim != 4 or array.dtype.kind != "c":
        return f"; {expected}"
    slices, coils, height, width = array.shape
    if not slices:
        return ": zero slices"
    if coils == 1:
        return ": single-coil data; expected at least two coils"
    if min(coils, height, width) < 1 or coils * height * width > MAX_SLICE_VALUES:
        return ": not the size of an image"
    if slices > MAX_SLICES or slices * coils * height * width > LARGEST_VOLUME:
        return ": not the size of a volume"
    return ""


def unstored(name: str, array: h5py.Dataset) -> list[str]:
    """Problem of an array that declares far more values than the file stores; such an array must not be read.

    Unwritten chunks read as zeros, and gzip compresses zeros 1000:1, so a file of a few kB can declare gigabytes.
    """
    filters = [array.id.get_create_plist().get_filter(n)[0] for n in range(array.id.get_create_plist().get_nfilters())]
    if filters.count(h5py.h5z.FILTER_DEFLATE) > 1:
        return [f"{name} is compressed more than once"]
    declared = float(np.prod(array.shape, dtype=float)) * array.dtype.itemsize
    chunk = float(np.prod(array.chunks or (1,), dtype=float)) * array.dtype.itemsize
    stored = array.id.get_storage_size()
    if max(declared, chunk) > max(SMALL_ARRAY, MAX_COMPRESSION_RATIO * stored):
        return [
            f"{name} {array.shape} declares {max(declared, chunk):.3g} bytes, the file stores {stored} of them: it was "
            "not written, or is not an image"
        ]
    return []


def attribute(h5: h5py.File, name: str) -> Any:
    """Value of a scalar attribute; None if it is missing or has several values, which are not read."""
    if name not in h5.attrs:
        return None
    stored = h5.attrs.get_id(name)
    return h5.attrs[name] if np.prod(stored.shape or (), dtype=float) == 1 else None


def text(value: Any) -> str:
    """Text attribute, also from bytes, an integer or an array of one; empty for anything else."""
    if isinstance(value, np.ndarray):
        value = value.item() if value.size == 1 else None
    if isinstance(value, str):  # h5py decodes invalid UTF-8 to surrogates, which cannot be printed or saved
        value = value.encode("utf-8", errors="surrogateescape")
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        value = str(value)
    return str(value).strip("\0 \t\n") if isinstance(value, str) else ""


def number(value: Any) -> float | None:
    """Numeric attribute, also from an array of one; None for anything else."""
    array = np.asarray(value)
    return float(array.item()) if array.size == 1 and array.dtype.kind in "fiu" else None


def is_phantom(path: Path) -> bool:
    """Whether a file was written by `mrilib.phantom`."""
    with h5py.File(path, "r") as h5:
        return PHANTOM_ATTRIBUTE in h5.attrs


def _header_text(stored: h5py.Dataset) -> bytes:
    if stored.shape == () and stored.dtype.itemsize > LARGEST_HEADER:
        raise DataError(f"ismrmrd_header has {stored.dtype.itemsize} characters; no ISMRMRD header is that long")
    value = stored[()] if stored.shape == () else None
    if isinstance(value, str):
        value = value.encode()
    if not isinstance(value, bytes):
        raise DataError(f"ismrmrd_header is {stored.dtype} {stored.shape}; expected one XML text")
    return value


def read_header(xml: bytes | str) -> Header:
    """Read the encoding from an ISMRMRD header.

    Parameters
    ----------
    xml : bytes or str
        The ``ismrmrd_header`` dataset.

    Returns
    -------
    Header
        Padding is left = enc_y // 2 − center and right = left + maximum + 1, as in fastMRI's mri_data.py. Only the
        field of view may be missing.

    Raises
    ------
    DataError
        If the header is not XML, is too long, lacks a number, or declares a document type or entities. Entities can
        expand to gigabytes or read other files.
    """
    if len(xml) > LARGEST_HEADER:
        raise DataError(f"ismrmrd_header has {len(xml)} characters; no ISMRMRD header is that long")
    if isinstance(xml, bytes) and not xml.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16 text contains zero bytes
        xml = xml.rstrip(b"\0")
    try:
        root: Element = fromstring(xml, forbid_dtd=True)
    except DefusedXmlException:
        raise DataError("ismrmrd_header declares a document type or XML entities; an ISMRMRD header has none") from None
    except (ParseError, ValueError, LookupError) as error:  # the last two for an unknown encoding
        raise DataError(f"ismrmrd_header is not XML ({first_line(error)})") from None
    limits = ("encodingLimits", "kspace_encoding_step_1")
    encoded, recon = ((_integer(root, space, "matrixSize", "x"), _integer(root, space, "matrixSize", "y"))
                      for space in ("encodedSpace", "reconSpace"))  # fmt: skip
    left = encoded[1] // 2 - _integer(root, *limits, "center")
    field = [_length(root, "encodedSpace", "fieldOfView_mm", axis) for axis in "xy"]
    pixel = (field[0] / encoded[0], field[1] / encoded[1]) if min(*field, *encoded) > 0 else None
    return Header(encoded, recon, (left, left + _integer(root, *limits, "maximum") + 1), pixel)


def _text_at(root: Element, path: tuple[str, ...]) -> str:
    """Text at a path below the encoding of an ISMRMRD header; empty if it is missing."""
    return (root.findtext("/".join(f"i:{part}" for part in ("encoding", *path)), "", NAMESPACE) or "").strip()


def _integer(root: Element, *path: str) -> int:
    text = _text_at(root, path)
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()) or len(text) > 9:
        raise DataError(f"ismrmrd_header has no number at encoding/{'/'.join(path)}")
    return int(text)


def _length(root: Element, *path: str) -> float:
    """Length [mm]; 0 if it is missing or outside of 1 mm to 5 m."""
    try:
        length = float(_text_at(root, path))
    except ValueError:
        return 0.0
    return length if 1 <= length <= 5000 else 0.0


def contradictions(header: Header, matrix: tuple[int, int]) -> list[str]:
    """Contradictions between a header and its k-space matrix (H, W).

    The number of slices is not compared, since it is wrong in some of fastMRI's headers. A reconSpace wider than the
    k-space is allowed, as in fastMRI's FLAIR 203.
    """
    problems = []
    if header.encoded != matrix:
        problems.append(f"ismrmrd_header contradicts kspace: encodedSpace is {header.encoded}, kspace {matrix}")
    if header.recon[0] > matrix[0] or min(header.recon) < 1:
        problems.append(f"ismrmrd_header contradicts kspace: reconSpace is {header.recon}, kspace {matrix}")
    left, right = header.padding
    if not 0 <= left < right <= matrix[1]:
        problems.append(
            f"ismrmrd_header contradicts kspace: lines {left} to {right - 1} were acquired, kspace has 0 to "
            f"{matrix[1] - 1}"
        )
    return problems
