"""Check of a data folder: problems and warnings of each file, the summary, the cache, refusing and skipping."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from changed_files import attribute, copy_of, own_mask, replaced, with_values

from mrilib.__main__ import main
from mrilib.config import DataParameters
from mrilib.data import check
from mrilib.data.fastmri_file import DataError, Volume
from mrilib.data.splits import split_volumes


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)


def truncated_chunk(h5: h5py.File) -> None:
    """Damage the compressed chunk of slice 1."""
    data = h5["kspace"][()]
    del h5["kspace"]
    h5.create_dataset("kspace", data=data, chunks=(1, *data.shape[1:]), compression="gzip")
    h5["kspace"].id.write_direct_chunk((1, 0, 0, 0), b"rubbish")


def padded(volumes: list[Volume]) -> Volume:
    return next(volume for volume in volumes if volume.padding != (0, volume.matrix[1]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_values("kspace", (1, 0, 2, 3), np.nan), "kspace: NaN or infinity in slice 1"),
        (with_values("kspace", (2, 1, 2, 3), complex(0, np.inf)), "kspace: NaN or infinity in slice 2"),
        (with_values("reconstruction_rss", (0, 1, 1), -np.inf), "reconstruction_rss: NaN or infinity in slice 0"),
        (replaced("kspace", lambda k: k.astype(complex) * 1e100), "kspace: NaN or infinity in slices 0 to 2"),
        (replaced("reconstruction_rss", lambda r: r.astype(float) * 1e300), "reconstruction_rss: NaN or infinity in"),
        (attribute("max", 0.0), "attribute max is 0, reconstruction_rss has"),
        (attribute("max", 1e-50), "SSIM is scaled by it"),
        (replaced("kspace", lambda k: k * 1e-38), "kspace: too small for single precision in slices 0 to 2"),
        (truncated_chunk, "kspace: slice 1 cannot be read"),
        (attribute("patient_id"), "has no attribute patient_id"),
    ],
)
def test_problems_of_values(volumes: list[Volume], tmp_path: Path, change: Callable, reason: str) -> None:
    report = check.check_file(copy_of(volumes[0], tmp_path, change))
    assert any(reason in problem for problem in report.problems), report
    assert report.volume is None


def test_all_problems_of_a_file_are_listed(volumes: list[Volume], tmp_path: Path) -> None:
    def change(h5: h5py.File) -> None:
        h5["kspace"][1, 0, 0, 0] = np.nan
        h5["reconstruction_rss"][2, 0, 0] = np.inf
        del h5.attrs["patient_id"]
        del h5["ismrmrd_header"]

    report = check.check_file(copy_of(volumes[0], tmp_path, change))
    assert len(report.problems) == 4, report.problems


def test_mask_must_sample_the_centre(volumes: list[Volume], tmp_path: Path) -> None:
    for remainder in (0, 1):
        volume = next(v for v in volumes if v.matrix[1] // 2 % 2 == remainder)
        problems = check.check_file(copy_of(volume, tmp_path, own_mask(acceleration=4))).problems
        assert problems == ["mask does not sample the centre of k-space"] * remainder


def test_data_outside_the_acquired_lines(volumes: list[Volume], tmp_path: Path) -> None:
    volume = padded(volumes)
    line = volume.padding[1] if volume.padding[1] < volume.matrix[1] else 0
    report = check.check_file(copy_of(volume, tmp_path, with_values("kspace", (1, 0, 3, line), 1e-4)))
    assert any("hold data in slice 1" in problem for problem in report.problems), report
    assert check.check_file(volume.path).problems == []


def test_good_files_have_no_problems(volumes: list[Volume]) -> None:
    for volume in volumes:
        assert check.check_file(volume.path) == (volume.path.name, [], [], volume)


def test_zero_and_noise_slices_are_warnings(volumes: list[Volume], tmp_path: Path) -> None:
    volume = max(volumes, key=lambda v: v.padding[0])

    def change(h5: h5py.File) -> None:
        shape = h5["kspace"].shape[1:]
        h5["kspace"][0] = 0
        acquired = np.zeros(shape[-1])
        acquired[volume.padding[0] : volume.padding[1]] = 1
        h5["kspace"][1] = 1e-5 * noise(shape) * acquired
        h5.attrs["max"] = 2 * h5.attrs["max"]
        del h5.attrs["norm"]

    report = check.check_file(copy_of(volume, tmp_path, change))
    assert report.problems == [] and report.volume is not None
    text = "\n".join(report.warnings)
    assert "slice 0: all zero" in text and "slice 1: noise only" in text and "norm" in text and "max is" in text


@pytest.mark.parametrize("shape", [(2, 640, 320), (24, 33, 17), (4, 768, 396)])
def test_slice_kind_separates_noise_from_images(shape: tuple[int, ...]) -> None:
    data = noise(shape)
    assert check.slice_kind(1e-20 * data) == check.slice_kind(1e20 * data) == "noise only"
    masked = data * (np.arange(shape[-1]) % 4 == shape[-1] // 2 % 4)
    assert check.slice_kind(masked) == "noise only"
    y, x = (np.abs(np.arange(n) - n // 2) / n for n in shape[1:])
    decay = 1 / (0.05 + y[:, None] + x[None])
    assert check.slice_kind(data * decay) == check.slice_kind(masked * decay) == ""
    assert check.slice_kind(0 * data) == "all zero"


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([3], "slice 3"), ([0, 1], "slices 0, 1"), ([0, 2, 3, 4, 9], "slices 0, 2 to 4, 9")],
)
def test_slice_numbers_are_listed_as_ranges(numbers: list[int], text: str) -> None:
    assert check.list_slices(numbers) == text


def spoil(volumes: list[Volume], folder: Path) -> dict[str, str]:
    """Fill a folder with good and bad files; name and problem of the bad ones."""
    for volume in volumes:
        shutil.copy(volume.path, folder)
    whole = volumes[0].path.read_bytes()
    (folder / "a_truncated.h5").write_bytes(whole[: len(whole) // 2])
    (folder / "b_text.h5").write_text("not HDF5 at all")
    (folder / "c_empty.h5").write_bytes(b"")
    os.mkfifo(folder / "d_pipe.h5")
    copy_of(volumes[1], folder, with_values("kspace", (1, 0, 0, 0), np.nan)).rename(folder / "e_nan.h5")
    shutil.copy(volumes[1].path, folder)
    (folder / "notes.txt").write_text("not a data file")
    return {"a_truncated.h5": "HDF5", "b_text.h5": "HDF5", "c_empty.h5": "HDF5", "d_pipe.h5": "not a file",
            "e_nan.h5": "NaN"}  # fmt: skip


def test_command_lists_problems_and_summary(
    volumes: list[Volume], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    bad = spoil(volumes, tmp_path)
    assert main(["check", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    lines = out.splitlines()
    for name, reason in bad.items():
        assert reason in lines[lines.index(name) + 1]
    assert not any(volume.path.name in lines for volume in volumes)
    assert f"{12 + 5} files: 12 usable, 5 with problems, 0 with warnings" in out
    assert "patients: 4" in out and "slices: 36, 3 to 3 a file" in out and "1 entries" in out
    for kind in ("contrasts: AXFLAIR (4), AXT1 (4), AXT2 (4)", "coils: ", "k-space (readout × phase): 128×", "64×"):
        assert kind in out
    for name in bad:
        (tmp_path / name).unlink()
    assert main(["check", str(tmp_path)]) == 0
    assert main(["check", str(tmp_path / "nowhere")]) == 1
    assert "is not a folder" in capsys.readouterr().err


def test_name_that_is_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/M\xfcller.h5")).touch()
    assert main(["check", str(tmp_path)]) == 1
    assert "the name of M\N{REPLACEMENT CHARACTER}ller.h5 is not UTF-8; rename the file" in capsys.readouterr().err


def test_subfolders_with_files_are_named(volumes: list[Volume], tmp_path: Path) -> None:
    (tmp_path / "batch_0" / "multicoil_train").mkdir(parents=True)
    with pytest.raises(DataError, match=r"no .h5 file in .*$"):
        check.h5_files(tmp_path)
    shutil.copy(volumes[0].path, tmp_path / "batch_0" / "multicoil_train")
    with pytest.raises(DataError, match=r"no .h5 file in .*; found some in .*multicoil_train"):
        check.h5_files(tmp_path)


def test_unusable_files_are_refused_or_skipped(volumes: list[Volume], tmp_path: Path) -> None:
    bad = spoil(volumes, tmp_path)
    values = {"data_dir": str(tmp_path), "img_size": 64, "val_fraction": 0.25, "test_fraction": 0.25}
    with pytest.raises(DataError, match="5 unusable files") as caught:
        split_volumes(DataParameters.create(values))
    assert all(name in str(caught.value) for name in bad) and "on_bad_file: skip" in str(caught.value)
    split = split_volumes(DataParameters.create({**values, "on_bad_file": "skip"}))
    assert sorted(v.file for part in split.values() for v in part) == [v.file for v in volumes]
    assert [entry["file"] for entry in split.skipped] == sorted(bad)
    for entry in split.skipped:
        assert any(bad[entry["file"]] in problem for problem in entry["problems"]) and entry["folder"]


def test_skipping_every_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.h5").write_text("no")
    with pytest.raises(DataError, match="1 unusable files"):
        check.usable_volumes(tmp_path, "skip")


def test_results_are_cached_until_a_file_changes(
    volumes: list[Volume], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for volume in volumes[:3]:
        shutil.copy(volume.path, tmp_path)
    read: list[str] = []
    original = check.check_files
    monkeypatch.setattr(
        check, "check_files", lambda paths, **others: read.extend(p.name for p in paths) or original(paths, **others)
    )
    check.usable_volumes(tmp_path)
    assert len(read) == 3
    check.usable_volumes(tmp_path)
    assert len(read) == 3
    with h5py.File(tmp_path / volumes[1].path.name, "r+") as h5:
        h5["kspace"][0, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="NaN"):
        check.usable_volumes(tmp_path)
    assert read[3:] == [volumes[1].path.name]
    for cache in (Path(os.environ["XDG_CACHE_HOME"]) / "mrilib").glob("*.json*"):
        cache.write_text("{damaged")
    check.usable_volumes(tmp_path, "skip")
    assert len(read) == 4 + 3


def _abort_on_b(path: Path) -> check.FileReport:
    if path.name.startswith("b"):
        os.abort()
    return check.FileReport(path.name, [], [], None)


def test_file_that_kills_its_process(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.h5" for name in "abc"]
    reports = check.check_files(paths, jobs=2, check=_abort_on_b)
    assert [report.problems for report in reports] == [[], ["reading it killed the process"], []]


def test_no_more_processes_than_files(
    volumes: list[Volume], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for volume in volumes[:2]:
        shutil.copy(volume.path, tmp_path)
    started: list[int] = []
    genuine = check.joblib.Parallel

    def parallel(n_jobs: int, **others: str) -> object:
        started.append(n_jobs)
        return genuine(n_jobs=1, **others)

    monkeypatch.setattr(check.joblib, "Parallel", parallel)
    assert main(["check", str(tmp_path), "--processes", "200"]) == 0
    assert started == [2] and "2 files: 2 usable" in capsys.readouterr().out


def test_number_of_processes_does_not_change_reports(volumes: list[Volume]) -> None:
    paths = [volume.path for volume in volumes[:4]]
    assert check.check_files(paths, jobs=2) == check.check_files(paths, jobs=1)
