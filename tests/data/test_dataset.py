"""h5 → Slice → Batch: input without the answer, fastMRI's masks, crops, splits and batches."""

import json
import logging
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from changed_files import as_test_file, copy_of, header, replaced, with_values
from fastmri.data.mri_data import SliceDataset
from fastmri.data.transforms import VarNetDataTransform

from mrilib.config import DataParameters, ParameterError
from mrilib.data.dataset import FastMRIDataset
from mrilib.data.fastmri_file import DataError, Volume, read_volume
from mrilib.data.sampler import ShapeBatchSampler, collate, make_loader
from mrilib.data.splits import index_volumes, load_annotations, split_volumes
from mrilib.model.encoder import KSpaceEncoder
from mrilib.physics import coils as coils_module
from mrilib.physics import fourier
from mrilib.physics import masks as masks_module

SIZE = 64


def parameters(directory: Path, **changes: Any) -> DataParameters:
    values = {"img_size": SIZE, "num_coils": 16, "center_fractions": [0.08, 0.04]}
    return DataParameters.create({"data_dir": str(directory), **values, **changes})


def encoder() -> KSpaceEncoder:
    torch.manual_seed(0)
    sizes = {"num_cascades": 1, "chans": 2, "pools": 2, "sens_chans": 2, "sens_pools": 2}
    return KSpaceEncoder(16, SIZE, vit_embed_dim=16, vit_num_layers=1, vit_num_heads=2, **sizes).eval()


def padded(volumes: list[Volume]) -> Volume:
    return next(v for v in volumes if v.padding != (0, v.matrix[1]))


# ------------------------------------------------------------------------------------------------- nothing leaks


@pytest.mark.parametrize("num_coils", [16, 4])
@pytest.mark.parametrize("training", [False, True])
def test_input_does_not_depend_on_the_answer(
    volumes: list[Volume], tmp_path: Path, num_coils: int, training: bool
) -> None:
    volume = padded(volumes)
    config = parameters(tmp_path, num_coils=num_coils)
    original = FastMRIDataset([volume], config, training=training)[1]

    def change(h5: h5py.File) -> None:
        data = h5["kspace"][()]
        data[..., ~original.mask.numpy()] = np.nan
        data[[0, 2]] = np.nan  # other slices
        h5["kspace"][...] = data
        h5["reconstruction_rss"][...] = np.random.default_rng(0).random(h5["reconstruction_rss"].shape)
        h5.attrs["acquisition"] = "AXT1POST"
        h5.attrs["max"] = h5.attrs["max"] * 3
        h5.attrs["norm"] = 5.0
        h5.attrs["patient_id"] = "somebody else"

    changed_volume = read_volume(copy_of(volume, tmp_path, change))
    changed = FastMRIDataset([changed_volume], config, training=training)[1]
    assert not torch.equal(changed.target, original.target) and changed.facts != original.facts
    assert changed.maximum != original.maximum and changed.patient != original.patient

    assert torch.equal(changed.kspace, original.kspace)
    assert torch.equal(changed.mask, original.mask)
    assert changed.scale == original.scale
    maps = [coils_module.center_coil_maps(s.kspace[None], s.mask[None]) for s in (original, changed)]
    assert torch.equal(*maps)
    model = encoder()
    with torch.no_grad():
        tokens = [model(s.kspace[None], s.mask[None]) for s in (original, changed)]
    assert torch.equal(*tokens) and tokens[0].isfinite().all()


# ------------------------------------------------------------------------------------------------- masks and units


@pytest.mark.parametrize("mask_type", masks_module.MASK_CLASSES)
def test_validation_samples_equal_varnetdatatransform(volumes: list[Volume], tmp_path: Path, mask_type: str) -> None:
    few = [padded(volumes), next(v for v in volumes if v.matrix[1] % 2)]
    for volume in few:  # SliceDataset opens every file of a folder
        shutil.copy(volume.path, tmp_path)
    dataset = FastMRIDataset(index_volumes(tmp_path), parameters(tmp_path, mask_type=mask_type))
    mask_func = masks_module.make_mask_func(mask_type, [0.08, 0.04], [4, 8])
    theirs = SliceDataset(tmp_path, "multicoil", VarNetDataTransform(mask_func, use_seed=True))
    expected = {(sample.fname, sample.slice_num): sample for sample in theirs}
    assert len(expected) == len(dataset) == 6
    for index in range(len(dataset)):
        ours = dataset[index]
        sample = expected[f"{ours.file}.h5", ours.slice_num]
        assert torch.equal(ours.mask, sample.mask.reshape(-1))
        assert torch.equal(ours.target, sample.target)
        assert ours.maximum == sample.max_value
        masked = torch.view_as_complex(sample.masked_kspace)
        cropped = fourier.remove_readout_oversampling(masked, ours.kspace.shape[-2])
        torch.testing.assert_close(ours.kspace * ours.scale, cropped, rtol=1e-4, atol=1e-6 * cropped.abs().max().item())


def test_normalised_kspace_has_unit_rms_and_scale_restores_it(volumes: list[Volume], tmp_path: Path) -> None:
    for volume in (padded(volumes), volumes[-1]):
        sample = FastMRIDataset([volume], parameters(tmp_path))[2]
        assert sample.kspace.dtype == torch.complex64
        assert sample.kspace.abs().square().mean() == pytest.approx(1, rel=1e-4)
        assert (sample.kspace[..., ~sample.mask] == 0).all()
        with h5py.File(volume.path) as h5:
            raw = torch.from_numpy(h5["kspace"][2])
        raw = fourier.remove_readout_oversampling(raw, volume.readout)
        torch.testing.assert_close(sample.kspace[..., sample.mask] * sample.scale, raw[..., sample.mask])
        # The image of all lines is the target.
        image = fourier.center_crop_or_pad(fourier.rss(fourier.ifft2c(raw)), volume.image_shape)
        torch.testing.assert_close(image, sample.target, rtol=1e-4, atol=1e-5 * volume.maximum)


def test_training_masks_depend_on_slice_seed_and_mask_number(volumes: list[Volume], tmp_path: Path) -> None:
    def masks(epoch: int, masks_per_slice: int = 3, **changes: Any) -> list[tuple[bool, ...]]:
        config = parameters(tmp_path, mask_type="random", **changes)
        dataset = FastMRIDataset(volumes[:2], config, training=True, masks_per_slice=masks_per_slice)
        dataset.epoch = epoch
        return [tuple(dataset[index].mask.tolist()) for index in range(len(dataset))]

    first = masks(0)
    assert first == masks(0) == masks(3) == masks(6)
    assert len(set(first)) == len(first)  # every file and slice its own
    for other in (masks(1), masks(2), masks(0, seed=1), masks(3, masks_per_slice=0)):
        assert all(a != b for a, b in zip(first, other, strict=True))
    assert masks(0, masks_per_slice=0) == first


def test_validation_masks_depend_on_the_file_only(volumes: list[Volume], tmp_path: Path) -> None:
    datasets = [FastMRIDataset(volumes[:2], parameters(tmp_path, seed=seed), masks_per_slice=2) for seed in (0, 7)]
    datasets[1].epoch = 5
    masks = [[dataset[index].mask for index in range(6)] for dataset in datasets]
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))
    assert torch.equal(masks[0][0], masks[0][2])


def test_one_acceleration(volumes: list[Volume], tmp_path: Path) -> None:
    config = parameters(tmp_path)
    dataset = FastMRIDataset(volumes, config, acceleration=8)
    assert {dataset[index].acceleration for index in range(len(dataset))} == {8}
    with pytest.raises(ParameterError, match=r"acceleration 6 is not one of accelerations \[4, 8\]"):
        FastMRIDataset(volumes, config, acceleration=6)


def test_mask_without_centre_line_is_refused(volumes: list[Volume], tmp_path: Path) -> None:
    config = parameters(tmp_path, mask_type="random", center_fractions=[0.001, 0.001])
    dataset = FastMRIDataset(volumes, config, training=True)
    with pytest.raises(DataError, match=r"file_brain_\w+.h5, slice \d: .*centre of k-space.*center_fractions"):
        for index in range(len(dataset)):
            dataset[index]


# ------------------------------------------------------------------------------------------------- coils, crops


def test_coils_are_compressed_from_masked_data(volumes: list[Volume], tmp_path: Path) -> None:
    volume = max(volumes, key=lambda v: v.coils)
    assert volume.coils > 5
    few, all_coils = (FastMRIDataset([volume], parameters(tmp_path, num_coils=n))[0] for n in (5, 16))
    assert few.kspace.shape[0] == 5 and all_coils.kspace.shape[0] == volume.coils
    before, after = (fourier.rss(fourier.ifft2c(s.kspace * s.scale)) for s in (all_coils, few))
    assert (before - after).norm() / before.norm() < 0.05
    expected = coils_module.compress_coils(all_coils.kspace * all_coils.scale, 5)
    torch.testing.assert_close(few.kspace * few.scale, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_crop_image_crops_the_fully_sampled_image(volumes: list[Volume], tmp_path: Path) -> None:
    for img_size in (48, SIZE):
        for volume in (padded(volumes), next(v for v in volumes if v.matrix[1] % 2)):
            config = parameters(tmp_path, crop="image", img_size=img_size, mask_type="random", accelerations=[1, 1])
            sample = FastMRIDataset([volume], config)[1]
            assert sample.kspace.shape[1:] == (img_size, img_size) and sample.image_shape == (img_size, img_size)
            assert sample.mask.all()
            image = fourier.rss(fourier.ifft2c(sample.kspace)) * sample.scale
            expected = fourier.center_crop_or_pad(sample.target, volume.image_shape)
            image = fourier.center_crop_or_pad(image, volume.image_shape)
            inside = expected > 0
            torch.testing.assert_close(image[inside], expected[inside], rtol=1e-3, atol=1e-4 * volume.maximum)


def test_crop_image_refuses_files_with_their_own_mask(volumes: list[Volume], tmp_path: Path) -> None:
    mask = np.arange(volumes[0].matrix[1]) % 2 == 0
    volume = read_volume(copy_of(volumes[0], tmp_path, as_test_file(mask)))
    with pytest.raises(DataError, match=f"{volume.file} has its own mask; use crop: readout"):
        FastMRIDataset([volume], parameters(tmp_path, crop="image"))


def test_test_files_have_a_mask_and_no_target(volumes: list[Volume], tmp_path: Path) -> None:
    original = padded(volumes)
    left, right = original.padding
    mask = np.zeros(original.matrix[1], dtype=bool)
    mask[::3] = mask[30:40] = True
    volume = read_volume(copy_of(original, tmp_path, as_test_file(mask)))
    assert volume.has_mask and not volume.has_target and volume.maximum == 0
    assert volume.image_shape == original.image_shape and volume.readout == original.readout
    dataset = FastMRIDataset([volume], parameters(tmp_path))
    sample = dataset[0]
    assert sample.target is None and sample.acceleration == 4
    mask[:left] = mask[right:] = False
    assert torch.equal(sample.mask, torch.from_numpy(mask))
    batch = collate([sample, dataset[1]])
    assert batch.target is None and batch.kspace.shape[0] == 2


def test_volume_narrower_than_its_header_is_evaluated_as_a_square(volumes: list[Volume], tmp_path: Path) -> None:
    original = min(volumes, key=lambda v: v.matrix[1])
    width = original.matrix[1]

    wider = header(f"<y>{original.image_shape[1]}</y>", f"<y>{SIZE}</y>", after="<reconSpace>")
    assert width < SIZE
    volume = read_volume(copy_of(original, tmp_path, as_test_file(np.ones(width, dtype=bool)), wider))
    assert volume.image_shape == (width, width) and volume.readout == SIZE  # as in fastMRI, for FLAIR 203


def test_zero_coils_and_slices_give_no_nan(volumes: list[Volume], tmp_path: Path) -> None:
    zeros = [with_values("kspace", place, 0) for place in (0, (1, 0), (1, 2))]
    volume = read_volume(copy_of(volumes[0], tmp_path, *zeros))
    model = encoder()
    for num_coils in (16, volume.coils - 1):  # compression leaves rounding errors in some virtual coils
        dataset = FastMRIDataset([volume], parameters(tmp_path, num_coils=num_coils))
        batch = collate([dataset[index] for index in range(3)])
        assert torch.view_as_real(batch.kspace).isfinite().all() and batch.scale.isfinite().all()
        assert batch.scale[0] == 1 and not batch.kspace[0].any()
        tokens = model(batch.kspace, batch.mask)
        assert tokens.isfinite().all()
        tokens.square().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("unit", [1e-24, 1e-15, 1e15])
@pytest.mark.parametrize("num_coils", [16, 4])
def test_normalisation_is_independent_of_the_unit(
    volumes: list[Volume], tmp_path: Path, unit: float, num_coils: int
) -> None:
    """In float32, squares of 1e-24 underflow."""
    volume = volumes[0]
    path = copy_of(volume, tmp_path, replaced("kspace", lambda kspace: (kspace * unit).astype("c8")))
    config = parameters(tmp_path, num_coils=num_coils)
    own, scaled = (FastMRIDataset([v], config)[1] for v in (volume, read_volume(path)))
    torch.testing.assert_close(scaled.kspace, own.kspace, rtol=1e-3, atol=1e-4)
    assert scaled.scale == pytest.approx(unit * own.scale, rel=1e-4)


@pytest.mark.parametrize("num_coils", [16, 4])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_measured_nan_is_refused(volumes: list[Volume], tmp_path: Path, value: float, num_coils: int) -> None:
    config = parameters(tmp_path, num_coils=num_coils)
    change = with_values("kspace", (1, 0, 3, volumes[0].matrix[1] // 2), value)
    dataset = FastMRIDataset([read_volume(copy_of(volumes[0], tmp_path, change))], config)
    with pytest.raises(DataError, match=rf"{volumes[0].path.name}, slice 1: NaN or infinity in the measured lines"):
        dataset[1]
    assert dataset[0].kspace.isfinite().all()


def test_impossible_mask_is_refused_at_construction(volumes: list[Volume], tmp_path: Path) -> None:
    config = parameters(tmp_path, accelerations=[16], center_fractions=[0.056])
    possible = []
    for volume in volumes:
        try:
            masks_module.check_mask(config.mask_type, 0.056, 16, volume.matrix[1])
        except ValueError:
            with pytest.raises(ValueError, match=r"center_fractions 0.056 with accelerations 16"):
                FastMRIDataset([volume], config)
        else:
            possible.append(FastMRIDataset([volume], config))
    assert 0 < len(possible) < len(volumes)


# ------------------------------------------------------------------------------------------------- splits


def patients_of(part: list[Volume]) -> set[str]:
    return {volume.patient for volume in part}


def test_split_is_by_patient_complete_and_reproducible(phantom_dir: Path, volumes: list[Volume]) -> None:
    config = parameters(phantom_dir, val_fraction=0.25, test_fraction=0.25)
    split = split_volumes(config)
    assert [len(patients_of(split[name])) for name in ("train", "val", "test")] == [2, 1, 1]
    assert sorted(v.file for part in split.values() for v in part) == [v.file for v in volumes]
    assert not patients_of(split["train"]) & (patients_of(split["val"]) | patients_of(split["test"]))
    assert split_volumes(config) == split
    seeds = {
        tuple(v.file for v in split_volumes(config.model_copy(update={"split_seed": s}))["test"]) for s in range(9)
    }
    assert len(seeds) > 1


def test_given_folders_are_used_and_overlap_is_refused(volumes: list[Volume], tmp_path: Path) -> None:
    patients = sorted(patients_of(volumes))
    folders = {}
    for name, own in {"train": patients[:2], "val": [patients[2]], "test": [patients[3]]}.items():
        folders[name] = tmp_path / name
        folders[name].mkdir()
        for volume in volumes:
            if volume.patient in own:
                (folders[name] / volume.path.name).symlink_to(volume.path)
    config = parameters(folders["train"], val_dir=str(folders["val"]), test_dir=str(folders["test"]))
    split = split_volumes(config)
    assert [sorted(patients_of(split[name])) for name in folders] == [patients[:2], patients[2:3], patients[3:]]

    half = split_volumes(parameters(folders["train"], val_dir=str(folders["val"]), test_fraction=0.4))
    assert patients_of(half["val"]) == {patients[2]} and len(patients_of(half["test"])) == 1

    one = next(v for v in volumes if v.patient == patients[0])
    (folders["test"] / one.path.name).symlink_to(one.path)
    with pytest.raises(DataError, match="1 patients are in both train and test"):
        split_volumes(config)


def test_empty_part_is_refused(phantom_dir: Path) -> None:
    with pytest.raises(DataError, match="data_dir has 4 patients; give test_dir, or raise test_fraction"):
        split_volumes(parameters(phantom_dir, test_fraction=0))
    with pytest.raises(DataError, match=r"no train volumes.*; lower val_fraction or test_fraction"):
        split_volumes(parameters(phantom_dir, val_fraction=0.5, test_fraction=0.5))


def test_unknown_files_in_reports_and_annotations_give_warnings(
    phantom_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logging.getLogger("mrilib")
    monkeypatch.setattr(log, "propagate", True)  # in case a run's log disabled it
    monkeypatch.setattr(log, "handlers", [])
    names = (phantom_dir / "brain_file_list.csv").read_text().split()
    misspelt = names[0].replace("brain", "brian")
    report = {"file": misspelt, "slice": 0, "prompt": "Describe.", "response": "Nothing."}
    (tmp_path / "reports.jsonl").write_text(json.dumps(report) + "\n")
    (tmp_path / "brain.csv").write_text((phantom_dir / "brain.csv").read_text())
    (tmp_path / "brain_file_list.csv").write_text("\n".join([*names, "file_elsewhere"]) + "\n")
    split_volumes(parameters(phantom_dir))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    split_volumes(parameters(phantom_dir, reports_path=str(tmp_path / "reports.jsonl"), annotations_dir=str(tmp_path)))
    messages = sorted({record.getMessage() for record in caplog.records if record.levelname == "WARNING"})[::-1]
    assert len(messages) == 2
    assert "reports_path" in messages[0] and "1 of 1 files are in no data folder" in messages[0]
    assert f"'{misspelt}'; did you mean '{names[0]}'?" in messages[0]
    assert "annotations_dir" in messages[1] and "'file_elsewhere'" in messages[1] and "did you mean" not in messages[1]


def test_report_of_a_missing_slice_is_refused(volumes: list[Volume], phantom_dir: Path, tmp_path: Path) -> None:
    reports = tmp_path / "reports.jsonl"
    line = {"file": volumes[0].file, "slice": volumes[0].slices, "prompt": "?", "response": "."}
    reports.write_text(json.dumps(line) + "\n")
    config = parameters(phantom_dir, reports_path=str(reports))
    with pytest.raises(DataError, match=rf"a report of {volumes[0].file}, slice {volumes[0].slices}, but"):
        FastMRIDataset(volumes, config)
    FastMRIDataset(volumes[1:], config)  # other data are not affected


@pytest.mark.parametrize("coils", [3, 9])
@pytest.mark.parametrize("storage", [{"chunks": (1, 9, 8, 6), "compression": "gzip"}, {"chunks": (1, 2, 8, 6)}, {}])
def test_lines_are_read_from_any_storage(
    volumes: list[Volume], phantom_dir: Path, tmp_path: Path, coils: int, storage: dict
) -> None:
    generator = np.random.default_rng(0)
    shape = (2, coils, 8, 6)
    stored = (generator.normal(size=shape) + 1j * generator.normal(size=shape)).astype(np.complex64)
    measured = torch.tensor([0, 3, 5])
    dataset = FastMRIDataset(volumes, parameters(phantom_dir))
    if "chunks" in storage:
        storage = {**storage, "chunks": (1, min(coils, storage["chunks"][1]), 8, 6)}
    for dtype in (np.complex64, np.complex128, ">c8"):
        with h5py.File(tmp_path / "one.h5", "w") as h5:
            data = h5.create_dataset("kspace", data=stored.astype(dtype), **storage)
            for number in (0, 1, 0):
                lines = dataset._reader.read(data, number, measured)
                assert torch.equal(lines, torch.from_numpy(stored[number])[..., measured])


def test_annotations_come_from_the_data_folder_or_annotations_dir(
    phantom_dir: Path, volumes: list[Volume], tmp_path: Path
) -> None:
    own = load_annotations(parameters(phantom_dir))
    assert own is not None and 0 < sum(own.reviewed(v.file) for v in volumes) < len(volumes)
    shutil.copy(volumes[0].path, tmp_path)
    assert load_annotations(parameters(tmp_path)) is None
    assert load_annotations(parameters(tmp_path, annotations_dir=str(phantom_dir))) is not None
    shutil.copy(phantom_dir / "brain.csv", tmp_path)
    with pytest.raises(ParameterError, match=r"annotations_dir: '.*brain_file_list.csv' does not exist"):
        load_annotations(parameters(tmp_path))


def test_findings_of_unreviewed_volumes_are_unknown(phantom_dir: Path, volumes: list[Volume]) -> None:
    config = parameters(phantom_dir)
    annotations = load_annotations(config)
    assert annotations is not None
    with_annotations, without = FastMRIDataset(volumes, config, annotations), FastMRIDataset(volumes, config)
    for index in range(0, len(volumes) * 3, 3):
        facts = with_annotations[index].facts
        assert (facts.findings is None) == (not annotations.reviewed(volumes[index // 3].file))
        assert without[index].facts.findings is None and without[index].facts.contrast == facts.contrast


# ------------------------------------------------------------------------------------------------- broken files


def test_all_unusable_files_are_listed(volumes: list[Volume], tmp_path: Path) -> None:
    whole = volumes[0].path.read_bytes()
    (tmp_path / "a_truncated.h5").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b_text.h5").write_text("not HDF5 at all")
    (tmp_path / "c_empty.h5").write_bytes(b"")
    shutil.copy(volumes[0].path, tmp_path)
    with pytest.raises(DataError, match="3 unusable files in") as caught:
        index_volumes(tmp_path)
    names = [line.split(":")[0] for line in str(caught.value).splitlines()[1:]]
    assert names == ["a_truncated.h5", "b_text.h5", "c_empty.h5"]
    empty = tmp_path / "nothing"
    empty.mkdir()
    with pytest.raises(DataError, match=r"no .h5 file in .*nothing"):
        index_volumes(empty)


def test_unreadable_slice_is_named(volumes: list[Volume], tmp_path: Path) -> None:
    path = copy_of(volumes[0], tmp_path)
    dataset = FastMRIDataset([read_volume(path)], parameters(tmp_path))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=rf"{path.name}, slice 1: cannot be read"):
        dataset[1]


# ------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_have_one_shape_and_hold_every_slice_once(
    phantom_dir: Path, volumes: list[Volume], batch_size: int, shuffle: bool
) -> None:
    dataset = FastMRIDataset(volumes, parameters(phantom_dir))
    sampler = make_loader(dataset, batch_size, seed=3, shuffle=shuffle).batch_sampler
    batches = list(sampler)
    assert len(sampler) == len(batches)
    assert sorted(index for batch in batches for index in batch) == list(range(len(dataset)))
    assert all(len({dataset.shape_key(index) for index in batch}) == 1 for batch in batches)
    assert all(0 < len(batch) <= batch_size for batch in batches)
    assert list(sampler) == batches == list(make_loader(dataset, batch_size, seed=3, shuffle=shuffle).batch_sampler)
    dataset.epoch = 1
    assert (list(sampler) != batches) == shuffle
    dataset.epoch = 0
    assert (list(make_loader(dataset, batch_size, seed=4, shuffle=shuffle).batch_sampler) != batches) == shuffle


@pytest.mark.parametrize("crop", ["readout", "image"])
def test_loaded_batches_stack(phantom_dir: Path, volumes: list[Volume], crop: str) -> None:
    dataset = FastMRIDataset(volumes, parameters(phantom_dir, crop=crop, num_coils=6), max_slices=14)
    assert len(dataset) == 14
    count = 0
    for batch in make_loader(dataset, 4):
        count += len(batch.slices)
        assert batch.target is not None and batch.target.shape[1:] == batch.image_shape
        assert batch.kspace.shape[0] == len(batch.slices) == len(batch.scale) == len(batch.maximum)
        assert batch.mask.shape == (len(batch.slices), batch.kspace.shape[-1])
        assert batch.to("cpu").kspace.equal(batch.kspace)
    assert count == 14


def test_max_slices_are_spread_evenly(phantom_dir: Path, volumes: list[Volume]) -> None:
    for count in (1, 2, 13, 35):
        samples = FastMRIDataset(volumes, parameters(phantom_dir), max_slices=count).samples
        assert len(set(samples)) == count and samples == sorted(samples)
        gaps = np.diff([3 * volume + slice_num for volume, slice_num in samples])
        assert count < 3 or gaps.max() - gaps.min() <= 1
    assert len(FastMRIDataset(volumes, parameters(phantom_dir), max_slices=math.prod((4, 9))).samples) == 36


def test_loading_processes_do_not_change_batches(phantom_dir: Path, volumes: list[Volume]) -> None:
    datasets = [FastMRIDataset(volumes[:2], parameters(phantom_dir, num_workers=n), training=True) for n in (0, 1)]
    for a, b in zip(*(list(make_loader(dataset, 2, 1, True)) for dataset in datasets), strict=True):
        assert torch.equal(a.kspace, b.kspace) and torch.equal(a.mask, b.mask)
        assert [s.slice_num for s in a.slices] == [s.slice_num for s in b.slices]


def test_without_kspace_keeps_texts_and_batches(volumes: list[Volume]) -> None:
    data = FastMRIDataset(volumes, parameters(volumes[0].path.parent), training=True)
    with_kspace = make_loader(data, 3, seed=5, shuffle=True)
    without = make_loader(data.without_kspace(), 3, seed=5, shuffle=True)
    for a, b in zip(with_kspace, without, strict=True):
        assert [(s.file, s.slice_num, s.facts) for s in a.slices] == [(s.file, s.slice_num, s.facts) for s in b.slices]
        assert a.target is not None and b.target is None
        assert b.kspace.shape == (len(b.slices), 0)


def test_batches_are_shared_between_processes(volumes: list[Volume], phantom_dir: Path) -> None:
    """Together, all processes of a resumed run use the remaining batches once, in the planned order."""
    dataset = FastMRIDataset(volumes, parameters(phantom_dir), training=True)
    sampler = ShapeBatchSampler(dataset, 2, seed=3, shuffle=True)
    plan = sampler.plan()
    assert list(sampler) == plan and len(sampler) == len(plan)
    parts = []
    for number in range(3):
        sampler.skip, sampler.share = 4, (number, 3)
        parts.append(list(sampler))
        assert len(sampler) == len(parts[-1])
    taken = [parts[i % 3][i // 3] for i in range(len(plan) - 4)]
    assert taken == plan[4:]
    dataset.epoch = 1
    assert sampler.plan() != plan
    assert sorted(i for batch in sampler.plan() for i in batch) == list(range(len(dataset)))


def test_repeated_slice_has_another_mask(volumes: list[Volume], phantom_dir: Path) -> None:
    """A repeat has its own mask and may be mirrored, reproducibly and for any number of processes."""
    config = parameters(phantom_dir, mask_type="random")
    dataset = FastMRIDataset(volumes, config, load_annotations(config), training=True, mirror_fraction=0.5)
    dataset.epoch = 3
    sampler = ShapeBatchSampler(dataset, 4, seed=1, shuffle=True, finding_fraction=0.9)
    batches = list(sampler)
    keys = [[(key, 0) if isinstance(key, int) else key for key in batch] for batch in batches]
    assert [[index for index, _ in batch] for batch in keys] == sampler.plan()
    assert batches == list(sampler)
    sampler.share, sampler.skip = (1, 2), 1
    assert list(sampler) == batches[2::2]
    used = [key for batch in keys for key in batch]
    assert len(set(used)) == len(used)
    (index, uses), *_ = Counter(index for index, _ in used).most_common()
    assert [repeat for key, repeat in used if key == index] == list(range(uses)) and uses > 2
    masks = [tuple(dataset[index, repeat].mask.tolist()) for repeat in range(uses)]
    assert len(set(masks)) == len(masks)
    mirrored = [dataset[index, repeat].mirrored for repeat in range(20)]
    assert 0 < sum(mirrored) < 20 and mirrored == [dataset[index, repeat].mirrored for repeat in range(20)]
    assert tuple(dataset[index, 0].mask.tolist()) == masks[0] == tuple(dataset[index].mask.tolist())
    dataset.masks_per_slice = 2
    first, second, third = (dataset[index, repeat].mask for repeat in range(3))
    assert torch.equal(first, third) and not torch.equal(first, second)


def test_finding_fraction_of_an_epoch(volumes: list[Volume], phantom_dir: Path) -> None:
    config = parameters(phantom_dir)
    dataset = FastMRIDataset(volumes, config, load_annotations(config), training=True)
    has_finding = [bool(dataset.facts(index).findings) for index in range(len(dataset))]
    assert 0 < sum(has_finding) < len(has_finding)

    def shares(share: float, **others: Any) -> list[float]:
        taken = []
        for dataset.epoch in range(40):
            sampler = ShapeBatchSampler(dataset, 3, seed=1, finding_fraction=share, **{"shuffle": True, **others})
            order = [index for batch in sampler.plan() for index in batch]
            assert len(order) == len(dataset)
            assert len(sampler.plan()) == len(ShapeBatchSampler(dataset, 3, seed=1, shuffle=True).plan())
            taken.append(sum(has_finding[index] for index in order) / len(order))
        return taken

    base = sum(has_finding) / len(has_finding)
    keys = {dataset.shape_key(index) for index in range(len(dataset)) if has_finding[index]}
    at_most = np.mean([dataset.shape_key(index) in keys for index in range(len(dataset))])
    assert set(shares(1.0)) == {at_most} and at_most > base
    assert np.mean(shares(0.5)) == pytest.approx((at_most + base) / 2, abs=0.05)
    assert set(shares(0.0)) == set(shares(0.5, shuffle=False)) == {base}, "validation uses every slice once"
    assert len(set(shares(0.5))) > 3, "drawn for each epoch"
    unknown = FastMRIDataset(volumes, config, None, training=True)
    with pytest.raises(ValueError, match=r"finding_fraction: 0\.5, but no training slice is known to have a finding"):
        ShapeBatchSampler(unknown, 3, shuffle=True, finding_fraction=0.5)


def test_reading_a_slice_keeps_earlier_slices(volumes: list[Volume], phantom_dir: Path) -> None:
    """Slices are read through one reused buffer."""
    dataset = FastMRIDataset(volumes, parameters(phantom_dir))
    first = dataset[0]
    before = first.kspace.clone()
    for index in range(1, len(dataset)):
        assert not torch.equal(dataset[index].kspace, before)
    assert torch.equal(first.kspace, before) and torch.equal(dataset[0].kspace, before)


@pytest.mark.parametrize("batch_size", [2, 4, 5, 100])
def test_batches_have_nearly_equal_sizes(volumes: list[Volume], phantom_dir: Path, batch_size: int) -> None:
    dataset = FastMRIDataset(volumes, parameters(phantom_dir), training=True)
    groups: dict[tuple[int, ...], list[int]] = {}
    for batch in ShapeBatchSampler(dataset, batch_size, seed=3, shuffle=True).plan():
        (key,) = {dataset.shape_key(index) for index in batch}
        groups.setdefault(key, []).append(len(batch))
    for sizes in groups.values():
        assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
        assert len(sizes) == -(-sum(sizes) // batch_size)


def test_chunks_of_a_batch(volumes: list[Volume], phantom_dir: Path) -> None:
    dataset = FastMRIDataset(volumes, parameters(phantom_dir))
    batch = collate([dataset[0], dataset[1], dataset[2]])
    chunks = list(batch.chunks(2))
    assert [len(chunk.slices) for chunk in chunks] == [2, 1]
    assert torch.equal(torch.cat([chunk.kspace for chunk in chunks]), batch.kspace)
    assert [one.slice_num for chunk in chunks for one in chunk.slices] == [one.slice_num for one in batch.slices]
    assert batch.target is not None and chunks[1].target is not None
    assert torch.equal(chunks[1].target[0], batch.target[2])
