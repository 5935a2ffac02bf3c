"""Phantom: files, scanner, anatomy and annotations; only the image depends on the contrast."""

import csv
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from fastmri.data.mri_data import SliceDataset
from fastmri.data.subsample import create_mask_for_mask_type
from fastmri.data.transforms import VarNetDataTransform

from mrilib.phantom import anatomy, scanner
from mrilib.phantom import dataset as phantom
from mrilib.physics.fourier import center_crop_or_pad, ifft2c, rss

SIZE = 64
PARAMETERS = {"volumes": 13, "slices": 3, "img_size": SIZE, "coils": 4, "seed": 21, "progress": False}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantom.make_dataset(tmp_path_factory.mktemp("phantom") / "new", **PARAMETERS)


def by_patient(dataset: Path) -> dict[str, dict[str, Path]]:
    patients: dict[str, dict[str, Path]] = defaultdict(dict)
    for path in sorted(dataset.glob("*.h5")):
        with h5py.File(path) as file:
            patients[file.attrs["patient_id"]][file.attrs["acquisition"]] = path
    return patients


def test_files_and_patients(dataset: Path) -> None:
    patients = by_patient(dataset)
    assert sorted(len(contrasts) for contrasts in patients.values()) == [1, 3, 3, 3, 3]
    names = [path.name for path in dataset.glob("*.h5")]
    assert len(names) == 13
    assert not list(dataset.glob("*.tmp"))
    for contrasts in patients.values():
        for contrast, path in contrasts.items():
            kind, part, acquisition, site, number = path.stem.split("_")
            assert (kind, part, acquisition) == ("file", "brain", contrast)
            assert (len(site), len(number)) == (3, 7)


def test_fastmri_reads_the_files(dataset: Path, tmp_path: Path) -> None:
    for path in dataset.glob("*.h5"):  # SliceDataset opens all files of a folder, including the CSV files
        (tmp_path / path.name).symlink_to(path)
    mask_func = create_mask_for_mask_type("equispaced_fraction", [0.08], [4])
    samples = SliceDataset(tmp_path, "multicoil", VarNetDataTransform(mask_func))
    assert len(samples) == 13 * 3
    for sample in samples:
        coils, readout, width, parts = sample.masked_kspace.shape
        assert (readout, parts) == (2 * SIZE, 2) and 2 <= coils <= 5
        assert sample.target.shape == sample.crop_size == (SIZE, min(SIZE, width))
        assert sample.max_value >= sample.target.max() > 0
        assert sample.mask.any()


def test_target_padding_and_attributes(dataset: Path) -> None:
    paddings = set()
    for path in dataset.glob("*.h5"):
        with h5py.File(path) as file:
            kspace = torch.from_numpy(file["kspace"][()])
            target = file["reconstruction_rss"][()]
            root = ElementTree.fromstring(file["ismrmrd_header"][()])
            attributes = dict(file.attrs)
        assert kspace.dtype == torch.complex64 and target.dtype == np.float32
        expected = center_crop_or_pad(rss(ifft2c(kspace)), target.shape[-2:]).numpy()
        np.testing.assert_allclose(target, expected, rtol=1e-5, atol=1e-5 * target.max())
        assert attributes["max"] == pytest.approx(target.max())
        assert attributes["norm"] == pytest.approx(np.linalg.norm(target), rel=1e-5)
        space = {"i": "http://www.ismrm.org/ISMRMRD"}
        limits = root.find(".//i:encodingLimits/i:kspace_encoding_step_1", space)
        assert limits is not None
        low, high, center = (int(limits.findtext(f"i:{key}", None, space)) for key in ("minimum", "maximum", "center"))
        width = int(root.findtext(".//i:encodedSpace/i:matrixSize/i:y", None, space))
        assert width == kspace.shape[-1] and low == 0
        left = width // 2 - center
        acquired = (kspace.abs().sum((0, 1, 2)) > 0).tolist()
        assert acquired == [left <= line < left + high + 1 for line in range(width)]
        paddings.add((left, width - left - high - 1))
        assert root.findtext(".//i:TR", None, space) == str(scanner.SEQUENCES[attributes["acquisition"]].tr)
    assert (0, 0) in paddings and len(paddings) > 1


def test_seed_determines_the_data(dataset: Path, tmp_path: Path) -> None:
    fewer = phantom.make_dataset(tmp_path / "fewer", **{**PARAMETERS, "volumes": 4})
    other = phantom.make_dataset(tmp_path / "other", **{**PARAMETERS, "volumes": 1, "seed": 4})
    for path in fewer.glob("*.h5"):  # a smaller set is a subset of a larger one
        if (dataset / path.name).exists():
            with h5py.File(path) as one, h5py.File(dataset / path.name) as two:
                np.testing.assert_array_equal(one["kspace"][()], two["kspace"][()])
    assert sum((dataset / path.name).exists() for path in fewer.glob("*.h5")) == 4
    assert not {path.name for path in other.glob("*.h5")} & {path.name for path in dataset.glob("*.h5")}


def test_interrupted_call_resumes(tmp_path: Path) -> None:
    parameters = {**PARAMETERS, "volumes": 3}
    folder = phantom.make_dataset(tmp_path, **parameters)
    annotations = (folder / "brain.csv").read_bytes()
    deleted, present, _ = sorted(folder.glob("*.h5"))
    stamp = present.stat().st_mtime_ns
    with h5py.File(deleted) as file:
        before = file["kspace"][()]
    deleted.unlink()
    (folder / "brain.csv").unlink()
    phantom.make_dataset(tmp_path, **parameters)
    with h5py.File(deleted) as file:
        np.testing.assert_array_equal(file["kspace"][()], before)
    assert present.stat().st_mtime_ns == stamp
    assert (folder / "brain.csv").read_bytes() == annotations


def test_other_files_are_not_overwritten(tmp_path: Path) -> None:
    foreign = tmp_path / "file_brain_AXT1_200_6000000.h5"
    foreign.write_bytes(b"a user's data")
    with pytest.raises(FileExistsError, match=r"did not write.*empty directory"):
        phantom.make_dataset(tmp_path, **PARAMETERS)
    assert foreign.read_bytes() == b"a user's data"
    foreign.unlink()
    phantom.make_dataset(tmp_path, **{**PARAMETERS, "volumes": 1})
    with pytest.raises(FileExistsError, match=r"'seed': 21.*another directory"):
        phantom.make_dataset(tmp_path, **{**PARAMETERS, "volumes": 1, "seed": 5})
    foreign.write_bytes(b"a user's data")
    with pytest.raises(FileExistsError, match="file_brain_AXT1_200_6000000"):
        phantom.make_dataset(tmp_path, **{**PARAMETERS, "volumes": 1})


@pytest.mark.parametrize(
    ("name", "value"), [("volumes", 0), ("img_size", 49), ("coils", 1), ("slices", 0), ("seed", -1)]
)
def test_bad_parameters(tmp_path: Path, name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        phantom.make_dataset(tmp_path / "new", **{**PARAMETERS, name: value})
    assert not (tmp_path / "new").exists()


def test_contrasts_of_a_patient_share_all_but_the_image(dataset: Path) -> None:
    for contrasts in by_patient(dataset).values():
        if len(contrasts) < 3:
            continue
        shapes, noise, norms, headers = set(), [], [], set()
        for path in contrasts.values():
            with h5py.File(path) as file:
                kspace = torch.from_numpy(file["kspace"][()])
                norms.append(file.attrs["norm"])
                root = ElementTree.fromstring(file["ismrmrd_header"][()])
            shapes.add(tuple(kspace.shape))
            # Readout oversampling adds rows outside the field of view, which hold only noise.
            noise.append(float(ifft2c(kspace)[..., : SIZE // 2, :].abs().square().mean().sqrt()))
            encoding = root.find("{http://www.ismrm.org/ISMRMRD}encoding")
            headers.add(ElementTree.tostring(encoding))
        assert len(shapes) == len(headers) == 1
        assert max(noise) / min(noise) < 1.05
        assert max(norms) / min(norms) < 1.3


def test_scale_does_not_order_the_contrasts() -> None:
    """The maximum varies more between patients than between contrasts."""
    exams = [phantom.draw_exam(number, 3, 2, 32, 8, 0) for number in range(40)]
    maxima = np.log([[phantom.image_exam(e, c, 32, 0)[0].max() for c in scanner.CONTRASTS] for e in exams[:12]])
    assert np.ptp(maxima.mean(0)) < maxima.std(0).mean()
    assert len({exam.coils for exam in exams}) >= 3 and len({exam.width for exam in exams}) >= 4
    assert any(exam.width % 2 for exam in exams)
    assert np.std([np.log(exam.level) for exam in exams]) > 0.6
    first = [exam.contrasts[0] for exam in exams]
    assert min(first.count(contrast) for contrast in scanner.CONTRASTS) >= 6
    assert 0 < sum(not exam.reviewed for exam in exams) < 8
    assert 0.15 < np.mean([not exam.patient.lesions for exam in exams]) < 0.5


def test_annotations_refer_to_the_flipped_image(dataset: Path) -> None:
    reviewed = (dataset / "brain_file_list.csv").read_text().split()
    with (dataset / "brain.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "slice", "study_level", "x", "y", "width", "height", "label"]
    exams = [phantom.draw_exam(number, 3, 3, SIZE, 4, 21) for number in range(4)]
    for exam in exams:
        for stem, contrast in zip(exam.files, exam.contrasts, strict=True):
            assert (stem in reviewed) == exam.reviewed
            boxes = phantom.image_exam(exam, contrast, SIZE, 21)[1] if exam.reviewed else []
            written = sorted(
                phantom.Box(int(r["slice"]), int(r["x"]), SIZE - int(r["y"]) - int(r["height"]), int(r["width"]),
                            int(r["height"]), r["label"])
                for r in rows if r["file"] == stem
            )  # fmt: skip
            assert written == sorted(boxes)
            assert all(b.x >= 0 and b.y >= 0 and b.x + b.width <= min(SIZE, exam.width) for b in boxes)
            assert all(b.y + b.height <= SIZE for b in boxes)
    assert any(row["study_level"] == "No" for row in rows)


def test_boxes_hold_the_lesions() -> None:
    """Images with and without a lesion differ inside its boxes, in every contrast."""
    counts: dict[str, int] = defaultdict(int)
    for number in range(12):
        exam = phantom.draw_exam(number, 3, 3, 96, 4, 1)
        bare = exam._replace(patient=replace(exam.patient, lesions=()))
        for lesion in exam.patient.lesions:
            if lesion.label == "Edema" or counts[lesion.label] >= 6:
                continue
            single = exam._replace(patient=replace(exam.patient, lesions=(lesion,)))
            for contrast in scanner.CONTRASTS:
                with_lesion, boxes = phantom.image_exam(single, contrast, 96, 1)
                without, no_boxes = phantom.image_exam(bare, contrast, 96, 1)
                assert not no_boxes
                without = without * np.median(with_lesion[without > 0] / without[without > 0])  # rms scales differ
                change = np.abs(with_lesion - without)
                for box in boxes:
                    left = (exam.width - min(96, exam.width)) // 2 + box.x
                    inside = np.zeros(change.shape[1:], bool)
                    inside[box.y : box.y + box.height, left : left + box.width] = True
                    on_slice = change[box.slice]
                    strongest = on_slice[inside].max()
                    typical = np.median(without[box.slice][without[box.slice] > exam.level / 2])
                    assert strongest > 0.1 * typical, (lesion.label, contrast)
                    assert on_slice[~inside].max() < 0.35 * strongest + 0.02 * typical, (lesion.label, contrast)
                    counts[lesion.label] += 1
    assert {"Nonspecific white matter lesion", "Lacunar infarct", "Mass", "Encephalomalacia"} == set(counts)


def test_orientation_of_the_flipped_image() -> None:
    exam = phantom.draw_exam(0, 3, 1, 64, 4, 0)
    place = {"centre": np.array((30.0, 40.0, exam.slice_positions[0])), "radii": np.full(3, 12.0), "axes": np.eye(3)}
    lesion = anatomy.Lesion("Mass", texture_shift=np.zeros(3), tissue_scale=(1.0, 1.0), **place)
    patient = replace(exam.patient, lesions=(lesion,))  # right anterior
    _, (box,) = phantom.image_exam(exam._replace(patient=patient), "AXT2", 64, 0)
    flipped_row = 64 - box.y - box.height
    assert box.x + box.width < 34 and flipped_row + box.height < 34


def test_contrasts_share_the_anatomy() -> None:
    edges = []
    for number in (0, 1):
        exam = phantom.draw_exam(number, 3, 1, 64, 4, 0)
        exam = exam._replace(width=64, slice_positions=np.array([0.0]))
        for contrast in ("AXT1", "AXFLAIR"):
            image = phantom.image_exam(exam, contrast, 64, 0)[0][0]
            edges.append(np.hypot(*np.gradient(image)).ravel())
    same = min(np.corrcoef(edges[0], edges[1])[0, 1], np.corrcoef(edges[2], edges[3])[0, 1])
    other = max(np.corrcoef(edges[0], edges[3])[0, 1], np.corrcoef(edges[1], edges[2])[0, 1])
    assert same > other + 0.1


def test_tissue_contrasts() -> None:
    def signal(contrast: str) -> dict[str, float]:
        return {k: scanner.spin_echo_signal(v, scanner.SEQUENCES[contrast]) for k, v in anatomy.TISSUES.items()}

    t1, t2, flair = (signal(contrast) for contrast in ("AXT1", "AXT2", "AXFLAIR"))
    assert t1["white"] > 1.15 * t1["grey"] > 1.5 * t1["csf"]
    assert t2["csf"] > 1.5 * t2["grey"] > 2 * t2["white"]
    assert flair["csf"] < 0.3 * flair["white"] < 0.3 * flair["grey"]
    for name in ("gliosis", "oedema", "tumour"):
        assert t1[name] < 0.9 * t1["white"] and t2[name] > 1.5 * t2["white"] and flair[name] > 1.1 * flair["white"]
    assert flair["cavity"] < 0.5 * flair["white"]
    # PD (1 - e^(-TR/T1)) e^(-TE/T2) by hand: 0.5 * (1 - 1/e) / e
    assert scanner.spin_echo_signal((500.0, 9.0, 0.5), scanner.SEQUENCES["AXT1"]) == pytest.approx(
        0.5 * 0.632121 / np.e
    )


@pytest.mark.parametrize(("shape", "coils", "padding"), [((2, 33, 29), 3, (2, 1)), ((1, 40, 40), 11, (0, 0))])
def test_simulate_volume(shape: tuple[int, int, int], coils: int, padding: tuple[int, int], tmp_path: Path) -> None:
    slices, height, width = shape
    image = np.zeros(shape)
    image[:, 8:-8, 8:-8] = 2.0
    arguments = {"snr": 20.0, "padding": padding, "voxel_size": (5.0, 5.0)}
    kspace = scanner.simulate_volume(image, coils, np.random.default_rng(0), **arguments)
    assert kspace.shape == (slices, coils, 2 * height, width) and kspace.dtype == np.complex64
    acquired = np.arange(width)[padding[0] : width - padding[1]]
    assert (np.abs(kspace).sum((0, 1, 2)) > 0).nonzero()[0].tolist() == acquired.tolist()
    beyond = ifft2c(torch.from_numpy(kspace))[..., : height // 4, :]
    per_part = float(beyond.abs().square().mean().sqrt()) / np.sqrt(2 * len(acquired) / width)
    assert per_part == pytest.approx(2.0 / 20.0, rel=0.1)
    again = scanner.simulate_volume(image * 1j, coils, np.random.default_rng(0), **arguments)
    np.testing.assert_allclose(
        rss(ifft2c(torch.from_numpy(again))).mean(), rss(ifft2c(torch.from_numpy(kspace))).mean(), rtol=0.05
    )
    path = tmp_path / "file.h5"
    size = (height - height % 2, width)
    scanner.write_h5(path, kspace, size, "AXT2", "someone", sequence=scanner.SEQUENCES["AXT2"], padding=padding)
    with h5py.File(path) as file:
        assert file["reconstruction_rss"].shape == (slices, *size)
        middle = file["reconstruction_rss"][:, size[0] // 2 - 2 : size[0] // 2 + 2, width // 2 - 2 : width // 2 + 2]
    assert middle.mean() == pytest.approx(2.0, rel=0.35)


def test_simulate_and_write_refuse_bad_input(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"image\[None\]"):
        scanner.simulate_volume(np.ones((8, 8)), 2, rng)
    with pytest.raises(ValueError, match="zero everywhere"):
        scanner.simulate_volume(np.zeros((1, 8, 8)), 2, rng)
    with pytest.raises(ValueError, match="padding"):
        scanner.simulate_volume(np.ones((1, 8, 8)), 2, rng, padding=(4, 4))
    kspace = scanner.simulate_volume(np.ones((1, 8, 8)), 2, rng)
    arguments = {"acquisition": "AXT1", "patient_id": "x", "sequence": scanner.SEQUENCES["AXT1"]}
    with pytest.raises(ValueError, match=r"x\.h5.*padding"):
        scanner.write_h5(tmp_path / "x.h5", kspace, (8, 8), padding=(1, 0), **arguments)
    with pytest.raises(ValueError, match=r"x\.h5.*image_shape"):
        scanner.write_h5(tmp_path / "x.h5", kspace, (8, 9), **arguments)
    with pytest.raises(ValueError, match=r"x\.h5.*shape"):
        scanner.write_h5(tmp_path / "x.h5", kspace[0], (8, 8), **arguments)
    assert not list(tmp_path.iterdir())


def test_coils_are_sensitive_near_their_loop() -> None:
    maps = scanner.coil_maps(6, (32, 28), (7.0, 7.0), [0.0, 20.0], np.random.default_rng(1))
    assert maps.shape == (2, 6, 32, 28) and maps.dtype == np.complex64
    brightest = {np.unravel_index(np.abs(one).argmax(), one.shape) for one in maps[0]}
    assert len(brightest) == 6
    for row, column in brightest:
        assert min(row, 31 - row, column, 27 - column) <= 3
    assert np.sqrt((np.abs(maps[:, :, 12:20, 10:18]) ** 2).sum(1)).mean() == pytest.approx(1, rel=0.15)


def test_lesions_lie_in_suitable_tissue() -> None:
    labels = defaultdict(int)
    for number in range(10):
        patient = phantom.draw_exam(number, 3, 4, 32, 4, 2).patient
        for lesion in patient.lesions:
            labels[lesion.label] += 1
            here = anatomy.compose(patient, lesion.centre[None])
            assert here.outside[0] < 0  # within the brain
            if lesion.label == "Nonspecific white matter lesion":
                assert here.white_core[0] > 0.8
            if lesion.label == "Mass":
                assert here.outside[0] < -lesion.radii.max()
    assert set(labels) <= {"Nonspecific white matter lesion", "Lacunar infarct", "Mass", "Edema", "Encephalomalacia"}
    assert labels["Edema"] <= labels["Mass"]
    unknown = anatomy.Lesion("Cyst", np.zeros(3), np.ones(3), np.eye(3), np.zeros(3), (1.0, 1.0))
    with pytest.raises(ValueError, match="Cyst"):
        anatomy.render(replace(patient, lesions=(unknown,)), np.zeros((1, 3)), scanner.SEQUENCES["AXT1"])
