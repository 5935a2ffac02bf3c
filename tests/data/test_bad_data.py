"""Bad data files, annotations and reports are refused in one line that names the file and the problem."""

import json
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from changed_files import Change, attribute, copy_of, header, linked, own_mask, replaced, with_values

from mrilib.__main__ import main
from mrilib.config import DataParameters
from mrilib.data import annotations, check
from mrilib.data.dataset import FastMRIDataset
from mrilib.data.fastmri_file import DataError, Volume, read_volume
from mrilib.data.splits import load_annotations

GROWTH = 256 * 2**20  # bytes of memory for refusing a file


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """Make any attempt to read gigabytes fail."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + GROWTH, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def declared(name: str, shape: tuple[int, ...], dtype: Any = np.complex64, **others: Any) -> Change:
    """A dataset of a shape that is never written."""

    def change(h5: h5py.File) -> None:
        h5.pop(name, None)
        h5.create_dataset(name, shape, dtype, **others)

    return change


def twice_compressed(h5: h5py.File) -> None:
    data = h5["kspace"][()]
    del h5["kspace"]
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_chunk((1, *data.shape[1:]))
    settings.set_deflate(9)
    settings.set_deflate(9)
    space, kind = h5py.h5s.create_simple(data.shape), h5py.h5t.py_create(data.dtype)
    h5py.h5d.create(h5.id, b"kspace", kind, space, settings)
    h5["kspace"][:] = data


def zeros(h5: h5py.File) -> None:
    """Zeros compressed by gzip, and one slice that is not zero."""
    del h5["kspace"]
    chunk = (1, 1, 512, 512)
    array = h5.create_dataset("kspace", (64, 4, 512, 512), np.complex64, chunks=chunk, compression="gzip")
    array[0, 0] = 1


def loop(h5: h5py.File) -> None:
    del h5["kspace"]
    h5["kspace"] = h5py.SoftLink("/other")
    h5["other"] = h5py.SoftLink("/kspace")


def committed_type(h5: h5py.File) -> None:
    del h5["kspace"]
    h5["kspace"] = np.dtype(np.complex64)


def compound(h5: h5py.File) -> None:
    shape = h5["kspace"].shape
    del h5["kspace"]
    h5["kspace"] = np.zeros(shape, [("real", "f4"), ("imag", "f4")])


def references(h5: h5py.File) -> None:
    h5.attrs["max"] = h5["kspace"].ref


H5: tuple[tuple[str, Change | tuple[Change, ...], str], ...] = (
    ("slices of 8192² that are not stored", declared("kspace", (2, 8, 8192, 8192)), "not the size of an image"),
    ("slices of 4096² that are not stored", declared("kspace", (2, 4, 4096, 4096)), "the file stores 0"),
    ("100 GB of zeros", declared("kspace", (24, 16, 1024, 32000), chunks=(1, 1, 64, 64), compression="gzip"),
     "not the size"),
    ("300 MB of zeros", zeros, "declares 5.37e\\+08 bytes, the file stores"),
    ("a chunk larger than its array", declared("kspace", (3, 4, 128, 64), chunks=(3, 4, 8192, 4096),
                                              maxshape=(None, None, None, None)), "declares .* bytes"),
    ("gzip twice", twice_compressed, "kspace is compressed more than once"),
    ("a target that is not stored", declared("reconstruction_rss", (3, 8192, 8192), np.float32),
     "reconstruction_rss .*does not fit kspace"),
    ("k-space near 1e38", replaced("kspace", lambda k: k / np.abs(k).max() * 1e38), "too large for single precision"),
    ("k-space near 1e31 in one slice", with_values("kspace", (1, 0, 0, 0), 1e31),
     "too large for single precision in slice 1"),
    ("a maximum near 1e38", attribute("max", 1e38), "attribute max is 1e\\+38; expected a positive number up to"),
    ("k-space with a scalar", replaced("kspace", 1j), r"kspace is complex128 \(\)"),
    ("k-space of integers", replaced("kspace", lambda k: k.real.astype(int)), "kspace is int64"),
    ("k-space of strings", replaced("kspace", np.full((2, 2, 2, 2), b"x")), r"kspace is \|S1"),
    ("k-space of records", compound, "kspace is "),
    ("k-space that is empty", replaced("kspace", h5py.Empty("c8")), "kspace is complex64 None"),
    ("k-space of five axes", replaced("kspace", lambda k: k[None]), "kspace is complex64"),
    ("a type in k-space's place", committed_type, "kspace is not a dataset"),
    ("soft links in a loop", loop, "kspace is a soft link to /other"),
    ("a soft link to itself", linked("kspace", h5py.SoftLink("kspace")), "kspace is a soft link"),
    ("an external link to a device", linked("kspace", h5py.ExternalLink("/dev/zero", "/x")), "leaves the file"),
    ("a target with a scalar", replaced("reconstruction_rss", 1.0), "does not fit kspace"),
    ("a target that is empty", replaced("reconstruction_rss", h5py.Empty("f4")), "reconstruction_rss"),
    ("a target without rows", replaced("reconstruction_rss", lambda r: r[:, :0]), "does not fit kspace"),
    ("a mask of strings", (own_mask(acceleration=4), replaced("mask", b"mask")), "mask is "),
    ("a mask of two axes", (own_mask(acceleration=4), replaced("mask", np.eye(4) > 0)),
     "mask .*does not fit"),
    ("a mask of twos", (own_mask(acceleration=4), replaced("mask", lambda m: m * 2 + 2)),
     "mask holds other values"),
    ("an acceleration of 1e300", own_mask(acceleration=1e300), "attribute acceleration is"),
    ("a maximum that is a reference", references, "attribute max is"),
    ("a maximum of many numbers", attribute("max", np.arange(8000.0)), r"attribute max is float64 \(8000,\)"),
    ("a patient of many numbers", attribute("patient_id", np.arange(8000.0)), r"attribute patient_id"),
    ("a patient with a long name", attribute("patient_id", b"x" * 60000), "attribute patient_id is longer than"),
    ("a patient with terminal escapes", attribute("patient_id", "\x1b[2Jred"), r"control characters: \\x1b\[2Jred"),
    ("an acquisition with terminal escapes", attribute("acquisition", "AXT1\x1b[2J"), r"control characters"),
    ("an acquisition of several lines", attribute("acquisition", "AXT1\nAXT2"), r"control characters"),
    ("a patient of bytes 0xff", attribute("patient_id", np.void(b"\xff\xfe")), "attribute patient_id is not text"),
    ("a patient that is a float", attribute("patient_id", 1.5), "attribute patient_id is not text"),
    ("a patient of spaces", attribute("patient_id", " \t\n"), "attribute patient_id is not text"),
    ("a header that is empty", replaced("ismrmrd_header", h5py.Empty("S1")), "ismrmrd_header"),
    ("a header that is a group", lambda h5: (h5.pop("ismrmrd_header"), h5.create_group("ismrmrd_header"))[0],
     "ismrmrd_header is not a dataset"),
    ("a header with a stylesheet's entity", replaced("ismrmrd_header", b'<!DOCTYPE a SYSTEM "file:///dev/zero"><a/>'),
     "document type"),
    ("a header of deep nesting", replaced("ismrmrd_header", b"<a>" * 10**5 + b"</a>" * 10**5), "ismrmrd_header"),
    ("a header with an integer of 400 digits", header("<maximum>", "<maximum>" + "9" * 400), "has no number at"),
    ("a header with Arabic digits", header("<center>", "<center>\u0663"), "has no number at"),
    ("a header with a negative matrix", header("<x>128</x>", "<x>-128</x>"), "contradicts kspace"),
    ("a header of nul bytes", replaced("ismrmrd_header", np.void(bytes(8))), "ismrmrd_header"),
)  # fmt: skip


@pytest.mark.parametrize(("change", "words"), [row[1:] for row in H5], ids=[row[0].replace(" ", "-") for row in H5])
def test_bad_data_files(
    change: Change | tuple, words: str, volumes: list[Volume], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = copy_of(volumes[0], tmp_path, *(change if isinstance(change, tuple) else (change,)))
    assert main(["check", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == path.name and all(line.isprintable() for line in lines)
    problems = [line for line in lines if line.startswith("  problem: ")]
    assert any(re.search(words, line) for line in problems), (words, problems)
    assert max(map(len, problems)) < 500
    with pytest.raises(DataError, match=r"^1 unusable files in .*\n\S+\.h5: .*$") as refused:
        check.usable_volumes(tmp_path)
    assert len(str(refused.value).splitlines()) == 2


CSV = "file,slice,study_level,x,y,width,height,label\n"


def box(
    x: str = "10", y: str = "10", width: str = "5", height: str = "5", slice_num: str = "0"
) -> Callable[[Path, str], None]:
    """A table with one box."""

    def write(folder: Path, file: str) -> None:
        (folder / "brain.csv").write_text(f"{CSV}{file},{slice_num},No,{x},{y},{width},{height},Mass\n")

    return write


def content(name: str, value: bytes) -> Callable[[Path, str], None]:
    return lambda folder, file: (folder / name).write_bytes(value) and None


def special(name: str, make: Callable[[Path], Any]) -> Callable[[Path, str], None]:
    """Replace a file by something that must not be opened."""

    def write(folder: Path, file: str) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return write


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


def twice_x(folder: Path, file: str) -> None:
    (folder / "brain.csv").write_text(f"file,slice,study_level,x,y,width,height,label,x\n{file},0,No,1,1,9,9,Edema,5\n")


def short_row(rest: str) -> Callable[[Path, str], None]:
    """A table with one good row and one that ends too early."""

    def write(folder: Path, file: str) -> None:
        (folder / "brain.csv").write_text(f"{CSV}{file},0,No,1,1,9,9,Edema\n{file},{rest}\n")

    return write


ANNOTATIONS: tuple[tuple[str, Callable[[Path, str], None], tuple[str, ...]], ...] = (
    ("a pipe as table", special("brain.csv", os.mkfifo), ("brain.csv", "must be a file")),
    ("a pipe as list", special("brain_file_list.csv", os.mkfifo), ("brain_file_list.csv", "must be a file")),
    ("a column twice", twice_x, ("line 1", "column x is given twice")),
    ("a row that is cut off", short_row("0,No,10,10"), ("brain.csv, line 3", "the row has 5 cells, the header 8")),
    ("a row without its label", short_row("0,No,1,1,2,2"), ("brain.csv, line 3", "the row has 7 cells, the header 8")),
    ("a row of a name alone", short_row(""), ("brain.csv, line 3", "the row has 2 cells, the header 8")),
    ("a folder as table", special("brain.csv", Path.mkdir), ("brain.csv", "must be a file")),
    ("a device as table", special("brain.csv", lambda p: p.symlink_to("/dev/zero")), ("brain.csv", "must be a file")),
    ("a terabyte as table", special("brain.csv", sparse), ("brain.csv", "that large")),
    ("a terabyte as list", special("brain_file_list.csv", sparse), ("brain_file_list.csv", "that large")),
    ("digits that are not ASCII", box(x="\u0661\u0660"), ("brain.csv, line 2", "x '\u0661\u0660' is not a number")),
    ("digits with underscores", box(x="1_0"), ("brain.csv, line 2", "x '1_0' is not a number")),
    ("a coordinate inf", box(y="inf"), ("brain.csv, line 2", "y is inf", "finite")),
    ("a coordinate of 1e400", box(y="1e400"), ("brain.csv, line 2", "y", "1e400")),
    ("a coordinate NaN", box(x="NaN"), ("brain.csv, line 2", "x 'NaN' is not a number")),
    ("hexadecimal digits", box(x="0x10"), ("brain.csv, line 2", "x '0x10' is not a number")),
    ("a box outside in x", box(x="500"), ("slice 0", "line 2", "column x 500", "outside the image")),
    ("a box outside in y", box(y="500"), ("slice 0", "line 2", "row", "larger reconstruction")),
    ("a slice that the file does not have", box(slice_num="99"), ("slice 99",)),
    ("bytes that are no text", content("brain.csv", bytes(range(256))), ("brain.csv",)),
    ("nul bytes", content("brain.csv", bytes(100)), ("brain.csv",)),
    ("an empty table", content("brain.csv", b""), ("brain.csv",)),
    ("another table", content("brain.csv", b"a,b\n1,2\n"), ("brain.csv, line 1", "missing")),
    ("a quote that is not closed", content("brain.csv", CSV.encode() + b'"x,0,No,1,1,1,1,Mass\n'), ("brain.csv",)),
    ("a list of bytes", content("brain_file_list.csv", b"\xff\xfe\xff"), ("brain_file_list.csv",)),
    ("a list with commas", content("brain_file_list.csv", b"a,b\n"), ("brain_file_list.csv, line 1",)),
)  # fmt: skip


@pytest.mark.parametrize(
    ("write", "words"), [row[1:] for row in ANNOTATIONS], ids=[row[0].replace(" ", "-") for row in ANNOTATIONS]
)
def test_bad_annotations(write: Callable, words: tuple[str, ...], volumes: list[Volume], tmp_path: Path) -> None:
    (tmp_path / "brain_file_list.csv").write_text(f"{volumes[0].file}\n")
    box()(tmp_path, volumes[0].file)
    write(tmp_path, volumes[0].file)
    config = DataParameters.create(
        {"data_dir": str(volumes[0].path.parent), "img_size": 64, "annotations_dir": str(tmp_path)}
    )
    with pytest.raises(ValueError) as refused:
        FastMRIDataset(volumes[:1], config, load_annotations(config))
    text = str(refused.value)
    assert all(word in text for word in words) and len(text.splitlines()) == 1 and text.isprintable(), text
    assert volumes[0].file in text or "brain" in text


def line(**changed: Any) -> bytes:
    return json.dumps({"file": "a", "slice": 0, "prompt": "p", "response": "r", **changed}).encode()


REPORTS: tuple[tuple[str, bytes | Callable[[Path], Any], str], ...] = (
    ("a pipe", os.mkfifo, "must be a file"),
    ("a folder", Path.mkdir, "must be a file"),
    ("a device", lambda path: path.symlink_to("/dev/zero"), "must be a file"),
    ("a terabyte", sparse, "that large"),
    ("a link to itself", lambda path: path.symlink_to(path.name), "does not exist|must be a file"),
    ("a text of a book's length", b'{"file": "a", "slice": 0, "prompt": "p", "response": "%s"}' % (b"b" * 20_001),
     "line 1: response has 20001 characters"),
    ("bytes", bytes(range(256)), "line 1: not a JSON object"),
    ("nul bytes", bytes(100), "line 1: not a JSON object"),
    ("a list", b"[1]", "line 1: a JSON list"),
    ("null", b"null", "line 1: a JSON NoneType"),
    ("deep nesting", b"[" * 10**6, "line 1: not a JSON object"),
    ("an integer of 10000 digits", line().replace(b"0", b"9" * 10**4), "line 1: not a JSON object"),
    ("a negative slice", line(slice=-1), "line 1: slice is -1"),
    ("a slice that is true", line(slice=True), "line 1: slice is True"),
    ("a slice that is nan", line(slice=float("nan")), "line 1: slice is nan"),
    ("a slice that is 1e3", line(slice=1e3), "line 1: slice is 1000.0"),
    ("a text that is a list", line(response=["r"]), "line 1: response is"),
    ("an empty text", line(prompt="  "), "line 1: prompt is"),
    ("half a surrogate pair", line(prompt="\ud800"), "line 1: prompt holds half"),
    ("a key with terminal escapes", line(**{"\x1b[2J": 1}), "line 1: unknown key"),
    ("a key of a megabyte", line(**{"k" * 2**20: 1}), "line 1: unknown key"),
    ("a text of a megabyte in slice's place", line(slice="9" * 2**20), "line 1: slice is"),
    ("a key that is missing", b'{"file": "a", "slice": 1, "prompt": "p"}', "line 1: key 'response' is missing"),
    ("an unknown key", line(respons="r"), "line 1: unknown key 'respons'; did you mean 'response'"),
    ("a slice that is text", line(slice="1"), "line 1: slice is '1'"),
    ("a blank line", line() + b"\n\n" + line(slice=1), "line 2: not a JSON object"),
    ("a line cut off", line() + b"\n" + line()[:-5], "line 2: not a JSON object"),
    ("the same slice twice", line() + b"\n" + line(), "line 2: .*already given in line 1"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "words"), [row[1:] for row in REPORTS], ids=[row[0].replace(" ", "-") for row in REPORTS]
)
def test_bad_reports(bad: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "reports.jsonl"
    path.write_bytes(bad) if isinstance(bad, bytes) else bad(path)
    with pytest.raises((ValueError, OSError), match=words) as refused:
        annotations.read_reports(path)
    text = str(refused.value)
    assert "reports.jsonl" in text and len(text.splitlines()) == 1 and len(text) < 1000 and text.isprintable()


def test_check_prints_no_control_character(
    volumes: list[Volume], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    names = ["\x1b]0;title\x07.h5", "new\nline.h5", "\x1b[31mred.h5"]
    for name in names:
        (tmp_path / name).write_bytes(b"no")
    assert main(["check", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.splitlines())
    assert r"\x1b]0;title\x07.h5" in out and r"new\nline.h5" in out and r"\x1b[31mred.h5" in out


@pytest.mark.parametrize("change", [
    replaced("kspace", lambda k: k[..., :-2]), replaced("kspace", lambda k: k[:1]),
    replaced("kspace", lambda k: k.real),
    lambda h5: h5.pop("kspace"), lambda h5: h5.pop("reconstruction_rss"),
    linked("kspace", h5py.ExternalLink("x", "/y")),
    replaced("reconstruction_rss", lambda r: r[:, :-2]), loop,
], ids=range(8))  # fmt: skip
def test_file_replaced_while_in_use(volumes: list[Volume], tmp_path: Path, change: Change) -> None:
    path = tmp_path / volumes[0].path.name
    shutil.copy(volumes[0].path, path)
    config = DataParameters.create({"data_dir": str(tmp_path), "img_size": 64})
    dataset = FastMRIDataset([read_volume(path)], config)
    copy_of(volumes[0], tmp_path, change)
    with pytest.raises(
        DataError, match=f"^{path.name}: the file was replaced while it was in use: .*old file"
    ) as caught:
        dataset[2]
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("width", "height"), [("0", "0"), ("0.0", "1"), ("1", "0e5")])
def test_box_without_area_gives_a_warning(
    width: str, height: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fastMRI+ has two of these."""
    monkeypatch.setattr(annotations.logger, "propagate", True)
    (tmp_path / "list.csv").write_text("a\n")
    box(width=width, height=height)(tmp_path, "a")
    with caplog.at_level("WARNING", "mrilib"):
        annotations.read_annotations(tmp_path / "brain.csv", tmp_path / "list.csv")
    assert "brain.csv, line 2" in caplog.text and "a box without area" in caplog.text
