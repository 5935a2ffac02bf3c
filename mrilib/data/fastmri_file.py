"""One fastMRI brain file: what is known of it without reading its k-space, and what can be wrong with its structure.

Files come from archives, interrupted downloads and other people's converters, so nothing in them is trusted: links and
external storage are not followed out of the file, and headers with entities are not expanded.
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
MAX_SLICE_VALUES = 2**26  # complex values; fastMRI's largest are a ninth of it. More is a damaged or hostile shape.
LARGEST_VOLUME = 2**32  # complex values; fastMRI's largest are a thirtieth of it
MAX_COMPRESSION_RATIO = (
    100  # k-space is noise to a compressor; zeros, which any file can declare, shrink a thousandfold
)
SMALL_ARRAY = 2**24  # bytes that may be declared whatever is stored
LARGEST_ATTRIBUTE = 2**12  # characters of a text
LARGEST_ACCELERATION = 1000
MAX_SLICES = 2**12  # fastMRI's volumes have about 16; an array that was declared and never written can have any number
LARGEST_HEADER = 2**22  # characters; fastMRI's have about 2**14
SMALLEST_SCALE = 1e-30  # [file units]: not far below begins what single precision cannot hold
LARGEST_SCALE = 1e30  # [file units]: the sums of a Fourier transform of larger values overflow in single precision


class DataError(ValueError):
    """A data file that cannot be used; the message names the file and what is wrong with it."""


class Volume(NamedTuple):
    """What is known of one h5 file without reading its k-space."""

    path: Path
    file: str  # name without .h5, as fastMRI+ has it
    slices: int
    coils: int
    matrix: tuple[int, int]  # readout H, phase W of the k-space
    image_shape: tuple[int, int]  # h, w of the evaluated image
    readout: int  # readout length without oversampling
    padding: tuple[int, int]  # phase-encoding lines outside [left, right) were not acquired
    acquisition: str
    patient: str
    maximum: float  # of the target volume [file units]; 0 if there is no target
    has_target: bool
    has_mask: bool  # a test file that brings its own mask
    acceleration: int  # of its own mask; 0 if it brings none
    pixel: tuple[float, float] | None = None  # readout, phase [mm]; None if the header does not tell


class Header(NamedTuple):
    """The encoding that an ISMRMRD header tells, as (x readout, y phase)."""

    encoded: tuple[int, int]  # encodedSpace matrix
    recon: tuple[int, int]  # reconSpace matrix [pixels]
    padding: tuple[int, int]  # acquired phase-encoding lines [left, right)
    pixel: tuple[float, float] | None = None  # encoded field of view over encoded matrix [mm]


def read_volume(path: str | Path) -> Volume:
    """Read header, attributes and shapes of one fastMRI brain file.

    Raises
    ------
    DataError
        Names the file and everything that is wrong with its structure; see `structure`.
    """
    path = Path(path)
    volume, problems = None, unreadable(path)
    if not problems:
        try:
            with h5py.File(path, "r") as h5:
                volume, problems = structure(h5, path)
        except Exception as error:  # on a damaged file h5py raises nearly anything
            problems = [f"cannot be read as HDF5 ({told(error)})"]
    if volume is None:
        raise DataError(f"{path.name}: {'; '.join(problems)}")
    return volume


def unreadable(path: Path) -> list[str]:
    """Why a path should not even be opened (opening a pipe would wait for ever); empty if it is a file."""
    if path.is_file():
        return []
    return ["is a link to nothing" if path.is_symlink() and not path.exists() else "is not a file"]


def told(error: BaseException) -> str:
    """An error's first line, in brackets behind a problem."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def structure(h5: h5py.File, path: Path) -> tuple[Volume | None, list[str]]:
    """Everything that is wrong with an open file's datasets, attributes and header, its arrays' values aside.

    Parameters
    ----------
    h5 : h5py.File
    path : Path
        Of the file.

    Returns
    -------
    volume : Volume, or None if there is a problem
    problems : list of str
        External or soft links that leave the file; missing or wrongly shaped or typed datasets and attributes;
        single-coil data; no slices; an unreadable or hostile header, or one that contradicts the arrays.
    """
    problems = leaving_links(h5)
    left = {problem.split(" ")[0] for problem in problems}
    data, target, mask = (dataset(h5, name) for name in ("kspace", "reconstruction_rss", "mask"))
    names = set(h5)  # "in h5" would follow links
    for name in DATASETS:
        if name in names and name not in left and dataset(h5, name) is None:
            problems.append(f"{name} is not a dataset")
        elif name not in names and name in ("kspace", "ismrmrd_header"):
            problems.append(f"has no dataset {name}")
    for name, array in (("kspace", data), ("reconstruction_rss", target), ("mask", mask)):
        problems += array_problems(name, array, data) if array is not None else []
    texts = {name: text(attribute(h5, name)) for name in ("acquisition", "patient_id")}
    for name, value in texts.items():
        if not value:
            problems.append(f"attribute {name} is no text" if name in h5.attrs else f"has no attribute {name}")
        elif len(value) > LARGEST_ATTRIBUTE:
            problems.append(f"attribute {name} is longer than {LARGEST_ATTRIBUTE} characters")
        elif not value.isprintable():
            problems.append(f"attribute {name} holds control characters: {printable(value)[:80]}")
    if texts["acquisition"] in findings.KNEES:
        problems.append(f"acquisition {texts['acquisition']!r} is a knee's; brain files are wanted")
    maximum, acceleration = number(attribute(h5, "max")), number(attribute(h5, "acceleration"))
    # a volume of zeros has the maximum 0; the losses work in single precision
    if target is not None and (maximum is None or not 0 <= maximum <= LARGEST_SCALE):
        problems.append(_no_number(h5, "max"))
    if mask is not None and (acceleration is None or not 1 <= acceleration <= LARGEST_ACCELERATION):
        problems.append(_no_number(h5, "acceleration"))
    header = None
    if (stored := dataset(h5, "ismrmrd_header")) is not None:
        try:
            header = read_header(_header_text(stored))
        except DataError as error:
            problems.append(str(error))
    if header is not None and data is not None and data.ndim == 4:
        problems += contradictions(header, data.shape[-2:])
    if problems or data is None or header is None:
        return None, problems
    return _volume(path, header, data.shape, target, texts, maximum, acceleration if mask is not None else None), []


def _volume(
    path: Path,
    header: Header,
    shape: tuple[int, ...],
    target: h5py.Dataset | None,
    texts: dict[str, str],
    maximum: float | None,
    acceleration: float | None,
) -> Volume:
    slices, coils, height, width = shape
    readout = min(height, header.recon[0])
    # As fastMRI does for the volumes of FLAIR 203, whose header asks for more columns than there are: a square.
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
        acquisition=texts["acquisition"],
        patient=texts["patient_id"],
        maximum=(maximum or 0.0) if target is not None else 0.0,
        has_target=target is not None,
        has_mask=acceleration is not None,
        acceleration=round(acceleration or 0),
        pixel=header.pixel,
    )


def _no_number(h5: h5py.File, name: str) -> str:
    if name not in h5.attrs:
        return f"has no attribute {name}"
    limit = LARGEST_SCALE if name == "max" else LARGEST_ACCELERATION
    value, stored = attribute(h5, name), h5.attrs.get_id(name)
    found = f"{stored.dtype} {stored.shape}" if value is None else repr(value)[:80]
    return f"attribute {name} is {found}; a positive number up to {limit:g} is wanted"


# ------------------------------------------------------------------------------------------------- links


def leaving_links(h5: h5py.File) -> list[str]:
    """Links, and datasets with external storage, that lead out of the file; none of them is followed."""
    found: list[str] = []

    def visit(raw: bytes) -> None:  # a name need not be UTF-8, on which h5.get insists
        name, kind = shown(raw), h5.id.links.get_info(raw).type
        if kind == h5py.h5l.TYPE_EXTERNAL:
            filename, target = map(shown, h5.id.links.get_val(raw))
            found.append(f"{name} is an external link to {target} in {filename}: it leaves the file")
        elif kind == h5py.h5l.TYPE_SOFT and not _stays(h5, name, target := shown(h5.id.links.get_val(raw))):
            found.append(f"{name} is a soft link to {target}, which is nothing in this file: it leaves the file")

    def shown(raw: bytes) -> str:
        return raw.decode("utf-8", errors="replace")

    h5.id.links.visit(visit)  # every link of every group; soft and external ones are named, not followed
    for name in DATASETS:
        stored = dataset(h5, name) if not any(problem.startswith(f"{name} ") for problem in found) else None
        if stored is not None and (stored.external or stored.is_virtual):
            kind = "external storage" if stored.external else "a virtual dataset"
            found.append(f"{name} is {kind}: its values lie in other files")
    return found


def _stays(h5: h5py.File, name: str, target: str) -> bool:
    """Whether a soft link's target is reached by hard links alone, that is inside of this file."""
    path = PurePosixPath("/") / PurePosixPath(name).parent / target  # an absolute target replaces the rest
    steps = [str(step) for step in [*reversed(path.parents), path] if str(step) != "/"]
    return ".." not in path.parts and all(isinstance(h5.get(step, getlink=True), h5py.HardLink) for step in steps)


def dataset(h5: h5py.File, name: str) -> h5py.Dataset | None:
    """A dataset that lies in the file itself; None if there is none of that name, or its link leaves the file."""
    link = h5.get(name, getlink=True)
    inside = isinstance(link, h5py.HardLink) or (isinstance(link, h5py.SoftLink) and _stays(h5, name, link.path))
    if not inside:
        return None
    found = h5[name]
    return found if isinstance(found, h5py.Dataset) else None


# ------------------------------------------------------------------------------------------------- arrays, attributes


def array_problems(name: str, array: h5py.Dataset, data: h5py.Dataset | None) -> list[str]:
    """What is wrong with the shape and the type of kspace, reconstruction_rss or mask; `data` is kspace."""
    found = f"{name} is {array.dtype} {array.shape}"
    if name == "kspace":
        if array.ndim == 3 and array.dtype.kind == "c":
            return [f"{found}: single-coil data; complex (slices, coils, H, W) is wanted"]
        if array.ndim != 4 or array.dtype.kind != "c":
            return [f"{found}; complex (slices, coils, H, W) is wanted"]
        slices, coils, height, width = array.shape
        if not slices:
            return [f"{found}: zero slices"]
        if coils == 1:
            return [f"{found}: single-coil data; at least two coils are wanted"]
        if min(coils, height, width) < 1 or coils * height * width > MAX_SLICE_VALUES:
            return [f"{found}: not the size of an image"]
        if slices > MAX_SLICES or slices * coils * height * width > LARGEST_VOLUME:
            return [f"{found}: not the size of a volume"]
        return unstored(name, array)
    kinds = "f" if name == "reconstruction_rss" else "buif"
    if array.dtype.kind not in kinds:
        return [f"{found}; {'real (slices, h, w)' if kinds == 'f' else 'true or false (W,)'} is wanted"]
    if data is None or data.ndim != 4:
        return []
    slices, _, height, width = data.shape
    fits = array.shape == (width,)
    if name == "reconstruction_rss":
        fits = array.ndim == 3 and array.shape[0] == slices
        fits = fits and 0 < array.shape[1] <= height and 0 < array.shape[2] <= width
    return unstored(name, array) if fits else [f"{name} {array.shape} does not fit kspace {data.shape}"]


def unstored(name: str, array: h5py.Dataset) -> list[str]:
    """Why an array should not be read: it declares far more than the file stores, or unpacks to more than it declares.

    Chunks that were never written are read as zeros, and gzip makes a thousandth of zeros: a file of a few kB can
    declare any number of gigabytes.
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
            "not written, or holds no image"
        ]
    return []


def attribute(h5: h5py.File, name: str) -> Any:
    """An attribute's value; None if there is none, or an array of more than one value, which is not read."""
    if name not in h5.attrs:
        return None
    stored = h5.attrs.get_id(name)
    return h5.attrs[name] if np.prod(stored.shape or (), dtype=float) == 1 else None


def text(value: Any) -> str:
    """A text attribute, also where a converter wrote bytes or an array of one; empty if it is no text."""
    if isinstance(value, np.ndarray):
        value = value.item() if value.size == 1 else None
    if isinstance(value, str):  # h5py hands on bytes that are no UTF-8 as surrogates, which nothing can print or save
        value = value.encode("utf-8", errors="surrogateescape")
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        value = str(value)  # a patient's number
    return str(value).strip("\0 \t\n") if isinstance(value, str) else ""


def number(value: Any) -> float | None:
    """A numeric attribute, also as an array of one; None if it is no number."""
    array = np.asarray(value)
    return float(array.item()) if array.size == 1 and array.dtype.kind in "fiu" else None


# ------------------------------------------------------------------------------------------------- header


def _header_text(stored: h5py.Dataset) -> bytes:
    if stored.shape == () and stored.dtype.itemsize > LARGEST_HEADER:  # declared so long: not even read
        raise DataError(f"ismrmrd_header has {stored.dtype.itemsize} characters; no ISMRMRD header is that long")
    value = stored[()] if stored.shape == () else None
    if isinstance(value, str):
        value = value.encode()
    if not isinstance(value, bytes):
        raise DataError(f"ismrmrd_header is {stored.dtype} {stored.shape}; one XML text is wanted")
    return value


def read_header(xml: bytes | str) -> Header:
    """The encoding of an ISMRMRD header.

    Parameters
    ----------
    xml : bytes or str
        The ``ismrmrd_header`` dataset.

    Returns
    -------
    Header
        Padding is left = enc_y//2 − center, right = left + maximum + 1 (fastMRI's mri_data.py). The field of view alone
        may be missing: nothing but scale bars needs it.

    Raises
    ------
    DataError
        Not XML, larger than any header, a document type or entities (which can expand to gigabytes, or read other
        files; an ISMRMRD header has none, in whatever encoding), or a number that is missing.
    """
    if len(xml) > LARGEST_HEADER:
        raise DataError(f"ismrmrd_header has {len(xml)} characters; no ISMRMRD header is that long")
    if isinstance(xml, bytes) and not xml.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16 has zeros of its own
        xml = xml.rstrip(b"\0")
    try:
        root: Element = fromstring(xml, forbid_dtd=True)
    except DefusedXmlException:
        raise DataError("ismrmrd_header declares a document type or XML entities; an ISMRMRD header has none") from None
    except (ParseError, ValueError, LookupError) as error:  # the latter two: an encoding that Python does not know
        raise DataError(f"ismrmrd_header is not XML ({told(error)})") from None

    def value(*path: str) -> int:
        node = root.find("/".join(f"i:{part}" for part in ("encoding", *path)), NAMESPACE)
        digits = (node.text or "").strip() if node is not None else ""
        if not (digits.removeprefix("-").isascii() and digits.removeprefix("-").isdigit()) or len(digits) > 9:
            raise DataError(f"ismrmrd_header has no number at encoding/{'/'.join(path)}")
        return int(digits)

    limits = ("encodingLimits", "kspace_encoding_step_1")
    encoded, recon = ((value(space, "matrixSize", "x"), value(space, "matrixSize", "y"))
                      for space in ("encodedSpace", "reconSpace"))  # fmt: skip
    left = encoded[1] // 2 - value(*limits, "center")
    field = [_length(root, "encodedSpace", "fieldOfView_mm", axis) for axis in "xy"]
    pixel = (field[0] / encoded[0], field[1] / encoded[1]) if min(*field, *encoded) > 0 else None
    return Header(encoded, recon, (left, left + value(*limits, "maximum") + 1), pixel)


def _length(root: Element, *path: str) -> float:
    """A length in an ISMRMRD header's encoding [mm]; 0 if there is none that a scanner could have."""
    try:
        length = float(root.findtext("/".join(f"i:{part}" for part in ("encoding", *path)), "", NAMESPACE))
    except ValueError:
        return 0.0
    return length if 1 <= length <= 5000 else 0.0


def contradictions(header: Header, matrix: tuple[int, int]) -> list[str]:
    """What a header says that its k-space (H, W) denies.

    The number of slices is not compared: fastMRI's own headers have it wrong. A reconSpace wider than the k-space is
    fastMRI's FLAIR 203.
    """
    problems = []
    if header.encoded != matrix:
        problems.append(f"ismrmrd_header contradicts kspace: its encodedSpace is {header.encoded}, kspace {matrix}")
    if header.recon[0] > matrix[0] or min(header.recon) < 1:
        problems.append(f"ismrmrd_header contradicts kspace: its reconSpace is {header.recon}, kspace {matrix}")
    left, right = header.padding
    if not 0 <= left < right <= matrix[1]:
        problems.append(
            f"ismrmrd_header contradicts kspace: its lines {left} to {right - 1} were acquired, kspace has 0 to "
            f"{matrix[1] - 1}"
        )
    return problems


MARK = "phantom"  # attribute of the phantom's files: what the head is


def is_phantom(path: Path) -> bool:
    """Whether a file is the phantom's, by its attribute."""
    with h5py.File(path, "r") as h5:
        return MARK in h5.attrs
