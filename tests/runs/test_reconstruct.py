"""Reconstruction of one file: output, provenance, refusals, and the cost of coil compression."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import h5py
import heads
import numpy as np
import pytest
from PIL import Image
from refusals import Refusal, assert_refused

from mrilib.__main__ import main
from mrilib.data.annotations import read_annotations
from mrilib.data.dataset import FastMRIDataset
from mrilib.evaluation import inference, pictures, reconstructions
from mrilib.metrics import image as image_module
from mrilib.runs import reconstruct


@pytest.fixture(scope="module")
def loaded(run):
    """The run's model and parameters, loaded once."""
    return reconstruct.load_run(run)


@pytest.fixture(scope="module", autouse=True)
def _load_once(loaded) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruct, "load_run", lambda directory: loaded)
        yield


@pytest.fixture(scope="module")
def written(run, volumes, tmp_path_factory) -> tuple[Path, str]:
    """Output folder and console text for the first volume at the run's first acceleration. Read-only."""
    folder = tmp_path_factory.mktemp("written")
    return folder, "\n".join(reconstruct.reconstruct(run, volumes[0].path, folder))


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_another_acceleration_does_not_replace_the_first(run, volumes, written, tmp_path, capsys):
    out = shutil.copytree(written[0], tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(before) == {f"{volumes[0].file}{suffix}" for suffix in (".h5", ".jsonl", ".png")}
    command = ["reconstruct", str(run), str(volumes[0].path), "--out", str(out)]
    words = (f"{volumes[0].file}.h5", "acceleration 4", "--out")
    assert_refused([*command, "--acceleration", "8"], words, capsys)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert main([*command, "--acceleration", "4"]) == 0  # the same reconstruction


@pytest.mark.parametrize("name", ["{}.h5", "{}.jsonl", "{}.png"])
def test_other_files_are_not_replaced(run, volumes, tmp_path, capsys, name):
    path = tmp_path / name.format(volumes[0].file)
    path.write_bytes(b"precious")
    assert_refused(
        ["reconstruct", str(run), str(volumes[0].path), "--out", str(tmp_path)], (path.name, "--out"), capsys
    )
    assert path.read_bytes() == b"precious" and len(list(tmp_path.iterdir())) == 1


def test_another_file_of_the_same_name_does_not_replace_the_first(run, volumes, written, tmp_path, capsys):
    other = tmp_path / "data" / volumes[0].path.name
    other.parent.mkdir()
    shutil.copy(volumes[1].path, other)
    words = (other.name, "another file_sha256", "--out")
    assert_refused(["reconstruct", str(run), str(other), "--out", str(written[0])], words, capsys)


def test_output_contains_its_provenance(run, volumes, tmp_path):
    volume = volumes[0]
    assert main(["reconstruct", str(run), str(volume.path), "--out", str(tmp_path), "--acceleration", "8"]) == 0
    with h5py.File(tmp_path / volume.path.name) as h5:
        assert list(h5) == ["reconstruction"]
        attributes = {name: value.item() if hasattr(value, "item") else value for name, value in h5.attrs.items()}
    assert attributes["acceleration"] == 8 and attributes["mask_type"] == "equispaced_fraction"
    assert attributes["seed"] == 0 and attributes["run"] == "small" and attributes["num_coils"] == 4
    for stage in ("stage1", "stage2"):
        path = run / f"{stage}_checkpoints" / f"{stage}_best_model.pt"
        assert attributes[f"{stage}_checkpoint_sha256"] == digest(path)
    assert attributes["file_sha256"] == digest(volume.path)
    assert len(attributes["git_commit"]) == 40 and attributes["mrilib_version"]
    rows = rows_of(tmp_path / f"{volume.file}.jsonl")
    assert [row["slice"] for row in rows] == list(range(volume.slices))
    assert all(row["provenance"] == attributes for row in rows)


def test_provenance_names_a_files_own_mask(run, volumes, tmp_path):
    path = tmp_path / volumes[0].path.name
    shutil.copy(volumes[0].path, path)
    heads.as_test_file(path, acceleration=6)
    assert main(["reconstruct", str(run), str(path), "--out", str(tmp_path / "out")]) == 0
    with h5py.File(tmp_path / "out" / path.name) as h5:
        assert h5.attrs["acceleration"] == 6 and h5.attrs["mask_type"] == "the file's own"


def with_own_mask(folder: Path) -> Path:
    path = heads.write_head(folder / "own.h5")
    heads.as_test_file(path)
    return path


@pytest.mark.parametrize("value", ["0", "-1", "1", "5", "4.5", str(10**30), "nan", "four"])
def test_impossible_accelerations_are_refused(run, volumes, tmp_path, capsys, value):
    command = ["reconstruct", str(run), str(volumes[0].path), "--out", str(tmp_path / "out"), f"--acceleration={value}"]
    words = ("acceleration", value, "4, 8") if value in ("1", "5") else ("acceleration", value)
    assert_refused(command, words, capsys)
    assert not (tmp_path / "out").exists()


REFUSALS = [
    Refusal(
        "own mask", lambda folder: [str(with_own_mask(folder)), "--acceleration=4"], ("own mask", "--acceleration")
    ),
    Refusal("no file", lambda folder: [str(folder / "nothing.h5")], ("nothing.h5",)),
]


@pytest.mark.parametrize("bad", REFUSALS, ids=str)
def test_bad_input_is_refused(run, tmp_path, capsys, bad):
    assert_refused(["reconstruct", str(run), *bad.prepare(tmp_path), "--out", str(tmp_path / "o")], bad.words, capsys)
    assert not (tmp_path / "o").exists()


def test_an_output_that_is_a_file_is_refused(run, volumes, tmp_path, capsys):
    (tmp_path / "out").touch()
    words = ("--out", "is not a folder")
    assert_refused(["reconstruct", str(run), str(volumes[0].path), "--out", str(tmp_path / "out")], words, capsys)


def test_an_unlisted_contrast_is_reconstructed_with_a_warning(run, volumes, written, tmp_path, capsys):
    path = tmp_path / volumes[0].path.name
    shutil.copy(volumes[0].path, path)
    with h5py.File(path, "r+") as h5:
        h5.attrs["acquisition"] = "AXT2STAR"
    assert main(["reconstruct", str(run), str(path), "--out", str(tmp_path / "out")]) == 0
    assert "warning: unknown acquisition 'AXT2STAR'" in capsys.readouterr().out
    with h5py.File(tmp_path / "out" / path.name) as one, h5py.File(written[0] / path.name) as same:
        np.testing.assert_array_equal(one["reconstruction"][()], same["reconstruction"][()])


@pytest.mark.parametrize(("empty", "slices"), [([1], "slice 1"), ([0, 1, 2], "slices 0 to 2")])
def test_empty_kspace_gives_an_image_of_zeros_and_a_warning(run, volumes, tmp_path, capsys, empty, slices):
    path = tmp_path / volumes[0].path.name
    shutil.copy(volumes[0].path, path)
    with h5py.File(path, "r+") as h5:
        for number in empty:
            h5["kspace"][number] = 0
    assert main(["reconstruct", str(run), str(path), "--out", str(tmp_path / "out")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert lines == [f"warning: {path.name}: k-space is all zero in {slices}; the image is zero there"]
    with h5py.File(tmp_path / "out" / path.name) as h5:
        is_zero = [not image.any() for image in h5["reconstruction"]]
    assert [number for number, zero in enumerate(is_zero) if zero] == empty
    assert Image.open(tmp_path / "out" / f"{volumes[0].file}.png").mode == "RGB"


def test_texts_come_with_a_warning_and_the_known_truth(run, volumes, written, tmp_path):
    rows = rows_of(written[0] / f"{volumes[0].file}.jsonl")
    assert all("not for diagnosis" in row["warning"] and row["warning"].endswith("not measured.") for row in rows)
    lines = written[1].splitlines()
    place = next(i for i, line in enumerate(lines) if row_is(line, 0, "generated"))
    assert "not for diagnosis" in lines[place - 1] and row_is(lines[place + 1], 0, "known")
    annotations = read_annotations(volumes[0].path.parent / "brain.csv", volumes[0].path.parent / "brain_file_list.csv")
    assert (
        annotations.reviewed(volumes[0].file) and "Findings:" in rows[0]["known"] and "Unknown" not in rows[0]["known"]
    )

    path = tmp_path / "data" / volumes[0].path.name  # without the tables of annotations
    path.parent.mkdir()
    shutil.copy(volumes[0].path, path)
    copy = shutil.copytree(run, tmp_path / "measured")
    counts = {"reviewed_samples": 9, "findings_true": 8, "findings_missed": 5, "findings_invented": 2}
    counts |= {"clean_slices": 4, "clean_slices_with_invented": 1, "test_set": "the test files of here"}
    (copy / "metrics.json").write_text(json.dumps({"analysis": counts}))
    text = "\n".join(reconstruct.reconstruct(copy, path, tmp_path / "out"))
    assert "on the test files of here it missed 5 of 8 findings and invented 2. 1 of 4 texts" in text
    known = rows_of(tmp_path / "out" / f"{volumes[0].file}.jsonl")[0]["known"]
    assert known.endswith("Unknown: findings.") and "third of the brain" in known


def row_is(line: str, number: int, kind: str) -> bool:
    return line.startswith(f"  slice {number}, {kind}:")


def test_the_picture_has_labels_a_scale_and_the_slices(written, volumes):
    with h5py.File(written[0] / volumes[0].path.name) as h5:
        images = h5["reconstruction"][()]
    picture = np.asarray(Image.open(written[0] / f"{volumes[0].file}.png").convert("L"))
    bare, labelled = (
        np.asarray(pictures.draw_volume(images, header, pixel).convert("L"))
        for header, pixel in (((), None), (("two-stage model",), (1.0, 1.0)))
    )
    assert labelled.shape[0] > bare.shape[0] and picture.shape[1] == bare.shape[1] == 3 * 6 * images.shape[2]
    height, width = 6 * images.shape[1], 6 * images.shape[2]
    slices = [
        bare[-pictures.LINE - height : -pictures.LINE, number * width : (number + 1) * width] for number in range(3)
    ]
    for number, shown in enumerate(slices):
        small = np.asarray(Image.fromarray(shown).resize(images.shape[:0:-1], Image.Resampling.BOX), float)
        assert np.corrcoef(small.ravel(), images[number, ::-1].ravel())[0, 1] > 0.98
    corner = np.s_[-pictures.LINE - height // 3 : -pictures.LINE, : width // 2]
    assert (labelled[corner] == 255).sum() > (bare[corner] == 255).sum() + 100  # the scale bar


def test_names_that_are_no_utf8_are_refused_in_one_line(run, volumes, tmp_path, capsys):
    file, copy = (Path(os.fsdecode(bytes(tmp_path / name) + b"\xff.h5")) for name in ("file", "run"))
    shutil.copy(volumes[0].path, file)
    shutil.copytree(run, copy)
    out = ["--out", str(tmp_path / "out")]
    words = ("no UTF-8", "choose another name")
    assert_refused(["reconstruct", str(run), str(file), *out], ("file\\udcff.h5", *words), capsys)
    assert_refused(["reconstruct", str(copy), str(volumes[0].path), *out], ("run\\udcff.h5", *words), capsys)
    missing = str(file).replace("file", "none")
    assert_refused(["reconstruct", str(run), missing, *out], ("none\\udcff.h5", "not a file"), capsys)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_no_utf8_is_printed_escaped(run, volumes, tmp_path, capsys):
    out = Path(os.fsdecode(bytes(tmp_path) + b"/out\xff"))
    assert main(["reconstruct", str(run), str(volumes[0].path), "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "out\\udcff" in lines[-1] and all(line.isprintable() for line in lines)
    assert (out / volumes[0].path.name).is_file()


# ------------------------------------------------------------------------------------------------- coil compression


def all_coils(volume, config, acceleration: int) -> np.ndarray:
    """Zero-filled images from all coils, by NumPy alone."""
    whole = FastMRIDataset([volume], config.model_copy(update={"num_coils": 99}), acceleration=acceleration)
    images = []
    for sample in (whole[number] for number in range(len(whole))):
        spectrum = np.fft.ifftshift(sample.kspace.numpy() * sample.scale, axes=(-2, -1))
        coils = np.fft.fftshift(np.fft.ifft2(spectrum, norm="ortho"), axes=(-2, -1))
        image = np.sqrt((np.abs(coils) ** 2).sum(0))
        rows, columns = image.shape
        h, w = sample.image_shape
        images.append(image[(rows - h) // 2 :, (columns - w) // 2 :][:h, :w])
    return np.stack(images)


def test_zero_filled_images_use_all_coils(loaded, volumes, tmp_path):
    system, config = loaded
    tested = volumes[:1]
    assert all(volume.coils > config.num_coils for volume in tested)
    writer = inference.VolumeWriter(tmp_path, tested)
    inference.Evaluator(system, max_new_tokens=2).run(FastMRIDataset(tested, config, acceleration=4), 3, writer)
    for volume in tested:
        with h5py.File(tmp_path / "zero_filled" / "4" / volume.path.name) as h5:
            written = h5["reconstruction"][()]
        expected = all_coils(volume, config, 4)
        np.testing.assert_allclose(written, expected, rtol=1e-3, atol=1e-4 * expected.max())

    scores = reconstructions.score_reconstructions(tmp_path, tested, [4])
    section = reconstructions.summarize_methods(scores)["4"]
    more, fewer = section["zero_filled"], section["zero_filled_compressed"]
    assert more["compression_cost_ssim"] == pytest.approx(more["ssim"] - fewer["ssim"])
    assert more["compression_cost_psnr"] == pytest.approx(more["psnr"] - fewer["psnr"])
    assert more["compression_cost_psnr"] > 0


def test_without_compression_there_is_no_cost(loaded, volumes, tmp_path):
    system, config = loaded
    config = config.model_copy(update={"num_coils": 99})
    writer = inference.VolumeWriter(tmp_path, volumes[:1])
    inference.Evaluator(system, max_new_tokens=2).run(FastMRIDataset(volumes[:1], config, acceleration=4), 3, writer)
    scores = reconstructions.score_reconstructions(tmp_path, volumes[:1], [4])
    section = reconstructions.summarize_methods(scores)["4"]
    assert "zero_filled_compressed" not in section
    assert section["zero_filled"]["compression_cost_ssim"] == section["zero_filled"]["compression_cost_psnr"] == 0


def test_previews_show_zero_filled_images_from_all_coils(loaded, volumes):
    system, config = loaded
    data = FastMRIDataset(volumes[:1], config, acceleration=4)
    (shown,) = inference.preview(system, data, 1, lambda batch: batch.target)
    expected = all_coils(volumes[0], config, 4)[1]
    np.testing.assert_allclose(shown.images["zero_filled"], expected, rtol=1e-3, atol=1e-4 * expected.max())


def test_reconstruct_prints_the_cost_of_compression(written, loaded, volumes):
    with h5py.File(volumes[0].path) as h5:
        scores = image_module.score_volume(h5["reconstruction_rss"][()], all_coils(volumes[0], loaded[1], 4))
    assert f"{volumes[0].coils} coils compressed to 4" in written[1]
    assert f"all coils SSIM {scores['ssim']:.3f}, PSNR {scores['psnr']:.2f} dB" in written[1]
