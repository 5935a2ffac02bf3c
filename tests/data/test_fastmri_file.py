"""Structure of one file: metadata, and all problems by name."""

import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from changed_files import Change, attribute, copy_of, header, linked, own_mask, replaced

from mrilib.data.fastmri_file import DataError, Volume, read_header, read_volume


def declared(*shape: int) -> Change:
    """Replace k-space by one of a shape that is never written."""

    def change(h5: h5py.File) -> None:
        del h5["kspace"]
        h5.create_dataset("kspace", shape, np.complex64, chunks=(1, 1, 64, 64))

    return change


def group(h5: h5py.File) -> None:
    del h5["kspace"]
    h5.create_group("kspace")


def external_storage(h5: h5py.File) -> None:
    shape = h5["kspace"].shape
    del h5["kspace"]
    raw = Path(h5.filename).with_suffix(".raw")
    raw.write_bytes(bytes(8 * int(np.prod(shape))))
    h5.create_dataset("kspace", shape, np.complex64, external=[(str(raw), 0, h5py.h5f.UNLIMITED)])


def virtual(h5: h5py.File) -> None:
    shape = h5["kspace"].shape
    del h5["kspace"]
    layout = h5py.VirtualLayout(shape, np.complex64)
    layout[:] = h5py.VirtualSource("elsewhere.h5", "kspace", shape)
    h5.create_virtual_dataset("kspace", layout)


def through_an_external_group(h5: h5py.File) -> None:
    del h5["kspace"]
    h5["other"] = h5py.ExternalLink("/etc/elsewhere.h5", "/")
    h5["kspace"] = h5py.SoftLink("/other/kspace")


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]><x>&b;</x>'
FILE = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><x>&a;</x>'
UTF16 = ('<?xml version="1.0" encoding="utf-16"?>' + BOMB).encode("utf-16")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda h5: h5.pop("kspace"), "has no dataset kspace"),
        (lambda h5: h5.pop("ismrmrd_header"), "has no dataset ismrmrd_header"),
        (group, "kspace is not a dataset"),
        (attribute("patient_id"), "has no attribute patient_id"),
        (attribute("patient_id", ""), "attribute patient_id is not text"),
        (attribute("patient_id", [1.5, 2.5]), "attribute patient_id is not text"),
        (attribute("acquisition"), "has no attribute acquisition"),
        (attribute("acquisition", "CORPD_FBK"), "acquisition 'CORPD_FBK' is a knee scan"),
        (attribute("max"), "has no attribute max"),
        (attribute("max", np.nan), "attribute max is .*nan.*; expected a positive number up to"),
        (attribute("max", np.inf), "attribute max is .*inf"),
        (attribute("max", -1.0), "attribute max is .*-1.0"),
        (attribute("max", "1e-3"), "attribute max is '1e-3'"),
        (attribute("max", h5py.Empty("f")), "attribute max is"),
        (replaced("kspace", np.abs), r"kspace is float32 \(3, .*expected complex \(slices, coils, H, W\)"),
        (replaced("kspace", lambda k: k.view(np.float32)), "kspace is float32"),
        (replaced("kspace", lambda k: k[:, 0]), r"kspace is complex64 \(3, \d+, \d+\): single-coil data"),
        (replaced("kspace", lambda k: k[:, :1]), r"kspace is complex64 \(3, 1, \d+, \d+\): single-coil data"),
        (replaced("kspace", lambda k: k[:0]), "zero slices"),
        (replaced("kspace", lambda k: k[..., :0]), "not the size of an image"),
        (replaced("kspace", b"text"), r"kspace is object \(\)|kspace is \|S4 \(\)"),
        (declared(3, 8, 2**20, 2**20), "not the size of an image"),
        (replaced("reconstruction_rss", lambda r: r[:2]), r"reconstruction_rss \(2, .*does not fit kspace"),
        (replaced("reconstruction_rss", lambda r: r[0]), r"reconstruction_rss .*does not fit kspace"),
        (replaced("reconstruction_rss", lambda r: r.astype(int)), r"reconstruction_rss is int64 .*real"),
        (replaced("reconstruction_rss", lambda r: r + 0j), "reconstruction_rss is complex"),
        (replaced("reconstruction_rss", lambda r: np.repeat(r, 4, 1)), "does not fit kspace"),
        (own_mask(), "has no attribute acceleration"),
        (own_mask(acceleration=0), "attribute acceleration is"),
        (replaced("ismrmrd_header", BOMB.encode()), "declares a document type or XML entities"),
        (replaced("ismrmrd_header", FILE.encode()), "declares a document type or XML entities"),
        (replaced("ismrmrd_header", np.void(UTF16)), "ismrmrd_header is"),
        (replaced("ismrmrd_header", b"<a><b></a>"), "is not XML"),
        (replaced("ismrmrd_header", b""), "is not XML"),
        (replaced("ismrmrd_header", b"\xff\xfe\xfa"), "is not XML"),
        (replaced("ismrmrd_header", b'<?xml version="1.0" encoding="klingon"?><a/>'), "is not XML"),
        (replaced("ismrmrd_header", b"<a/>"), "has no number at encoding/"),
        (replaced("ismrmrd_header", 3.5), "expected one XML text"),
        (replaced("ismrmrd_header", lambda old: [old, old]), "expected one XML text"),
        (replaced("ismrmrd_header", lambda old: b"<!--" + b"x" * 2**22 + b"-->" + old), "no ISMRMRD header"),
        (header("ISMRMRD", "elsewhere"), "has no number at encoding/encodedSpace"),
        (header("<x>128</x>", "<x>640</x>"), r"contradicts kspace: encodedSpace is \(640, \d+\), kspace \(128,"),
        (header("<x>64</x>", "<x>999</x>"), r"contradicts kspace: reconSpace is \(999,"),
        (header("<center>", "<center>9"), "contradicts kspace: lines -"),
        (header("<maximum>", "<maximum>9"), "contradicts kspace: lines "),
        (linked("kspace", h5py.ExternalLink("other.h5", "/kspace")), "kspace is an external link to /kspace in "),
        (linked("extra", h5py.ExternalLink("other.h5", "/kspace")), "extra is an external link"),
        (linked("kspace", h5py.SoftLink("/nowhere")), "kspace is a soft link to /nowhere"),
        (through_an_external_group, "kspace is a soft link to /other/kspace"),
        (linked(b"\xff", h5py.ExternalLink("other.h5", "/x")), "is an external link to /x in other.h5"),
        (linked(b"\xff", h5py.SoftLink("/nowhere")), "is a soft link to /nowhere"),
        (attribute("max", 1e300), "attribute max is"),
        (replaced("ismrmrd_header", np.bytes_(b"<!--" + b"x" * 2**22)), "no ISMRMRD header"),
        (declared(10**9, 8, 128, 64), "not the size of a volume"),
        (external_storage, "kspace is external storage: its values lie in other files"),
        (virtual, "kspace is a virtual dataset: its values lie in other files"),
    ],
)  # fmt: skip
def test_problems_of_the_structure(volumes: list[Volume], tmp_path: Path, change: Change, reason: str) -> None:
    path = copy_of(volumes[0], tmp_path, change)
    with pytest.raises(DataError, match=rf"^{path.name}: .*{reason}"):
        read_volume(path)


def test_all_problems_are_in_one_message(volumes: list[Volume], tmp_path: Path) -> None:
    changes = (
        attribute("patient_id"),
        attribute("max", np.nan),
        replaced("reconstruction_rss", lambda target: target[:1]),
        replaced("ismrmrd_header", BOMB.encode()),
    )
    with pytest.raises(DataError) as caught:
        read_volume(copy_of(volumes[0], tmp_path, *changes))
    assert all(word in str(caught.value) for word in ("patient_id", "max", "reconstruction_rss", "entities"))
    assert len(str(caught.value).split("; ")) >= 4


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "folder.h5").mkdir()
    (tmp_path / "link.h5").symlink_to(tmp_path / "gone.h5")
    os.mkfifo(tmp_path / "pipe.h5")  # opening it would block
    for name, reason in (("folder", "is not a file"), ("link", "is a link to nothing"), ("pipe", "is not a file")):
        with pytest.raises(DataError, match=f"^{name}.h5: {reason}"):
            read_volume(tmp_path / f"{name}.h5")
    with pytest.raises(DataError, match=r"absent.h5: is not a file"):
        read_volume(tmp_path / "absent.h5")


def test_links_inside_the_file_are_followed(volumes: list[Volume], tmp_path: Path) -> None:
    def change(h5: h5py.File) -> None:
        h5.move("kspace", "raw/data")
        h5["kspace"] = h5py.SoftLink("raw/data")

    path = copy_of(volumes[0], tmp_path, change)
    assert read_volume(path) == volumes[0]._replace(path=path)


@pytest.mark.parametrize("kind", [bytes, np.bytes_, lambda text: np.array([text], "S80"), lambda text: [text]])
def test_text_as_bytes_or_array(volumes: list[Volume], tmp_path: Path, kind: Callable) -> None:
    def change(h5: h5py.File) -> None:
        for name in ("acquisition", "patient_id"):
            old = h5.attrs[name]
            h5.attrs[name] = kind(old.encode()) if kind is bytes else kind(old)
        h5.attrs["max"] = np.array([h5.attrs["max"]])

    path = copy_of(volumes[0], tmp_path, change)
    assert read_volume(path) == volumes[0]._replace(path=path)


def test_other_types_are_read(volumes: list[Volume], tmp_path: Path) -> None:
    def change(h5: h5py.File) -> None:
        xml = h5["ismrmrd_header"][()].decode()
        replaced("ismrmrd_header", xml)(h5)  # a str, not bytes
        replaced("kspace", lambda k: k.astype(np.complex128))(h5)
        replaced("reconstruction_rss", lambda r: r.astype(np.float64))(h5)
        h5.attrs["patient_id"] = 17

    path = copy_of(volumes[0], tmp_path, change)
    assert read_volume(path) == volumes[0]._replace(path=path, patient="17")


def test_names_and_texts_that_are_not_utf8(volumes: list[Volume], tmp_path: Path) -> None:
    def change(h5: h5py.File) -> None:
        h5.create_group(b"\xff\xfe")
        del h5.attrs["patient_id"]
        h5.attrs.create("patient_id", b"M\xfcller", dtype=h5py.string_dtype("utf-8"))

    patient = read_volume(copy_of(volumes[0], tmp_path, change)).patient
    assert patient == "M\N{REPLACEMENT CHARACTER}ller" and patient.encode("utf-8")


def test_header_encodings(volumes: list[Volume]) -> None:
    with h5py.File(volumes[0].path) as h5:
        xml = h5["ismrmrd_header"][()].decode()
    header_of_file = read_header(xml.encode())
    assert header_of_file.recon == volumes[0].image_shape and header_of_file.encoded == volumes[0].matrix
    assert read_header(xml.encode() + b"\0\0") == header_of_file == read_header(xml)
    assert read_header(xml.replace("utf-8", "utf-16").encode("utf-16")) == header_of_file
    assert read_header(b"\xef\xbb\xbf" + xml.encode()) == header_of_file
    with pytest.raises(DataError, match="declares a document type"):
        read_header(UTF16)


@pytest.mark.parametrize("number", ["²", "--5", "5.0", "", "1" * 5000, "-"])
def test_header_with_a_wrong_number(volumes: list[Volume], number: str) -> None:
    with h5py.File(volumes[0].path) as h5:
        xml = h5["ismrmrd_header"][()].decode()
    start = xml.index("<center>")
    spoilt = xml[: start + 8] + number + xml[xml.index("</center>") :]
    with pytest.raises(DataError, match=r"ismrmrd_header has no number at encoding/encodingLimits/.*/center"):
        read_header(spoilt)


def test_pixel_size(volumes, tmp_path):
    volume = volumes[0]
    with h5py.File(volume.path) as h5:
        xml = h5["ismrmrd_header"][()].decode()
    height, width = volume.matrix
    for field, pixel in (("440.0", (440 / height, 230 / width)), ("wide", None), ("0", None), ("nan", None)):
        start, end = (xml.index(part) for part in ("<fieldOfView_mm>", "</fieldOfView_mm>"))
        changed = f"{xml[:start]}<fieldOfView_mm><x>{field}</x><y>230</y><z>5</z>{xml[end:]}"
        assert read_header(changed).pixel == pixel
    path = copy_of(volume, tmp_path, header(xml[start : end + 17], ""))
    assert read_volume(path).pixel is None
    assert read_volume(volume.path).pixel == volume.pixel
