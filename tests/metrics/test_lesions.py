"""Contrast retention of lesions: measurement, lost lesions, lesions that are left out."""

import h5py
import numpy as np
import pytest

from mrilib.data.annotations import Box, read_annotations
from mrilib.evaluation.reconstructions import write_reconstruction
from mrilib.metrics import lesions
from mrilib.metrics.image import head_mask

BOX = Box(x=30, y=24, width=7, height=6, label="Mass")
OTHER = Box(x=39, y=24, width=5, height=6, label="Edema")


@pytest.fixture
def scene():
    """A head of 1 with neighbouring lesions of 1.5 and 0.6, scalp of 3, air of 0."""
    y, x = np.mgrid[:64, :64] - 32.0
    radius = np.hypot(x, y)
    image = np.where(radius < 28, 1.0, 0.0) + np.where((radius > 26) & (radius < 28), 2.0, 0.0)
    for box, value in ((BOX, 1.5), (OTHER, 0.6)):
        image[int(box.y) : int(box.y + box.height), int(box.x) : int(box.x + box.width)] = value
    return image, head_mask(image[None])[0]


@pytest.mark.parametrize("retention", [1.0, 0.4, 0.0, -0.5])
def test_contrast_is_measured_in_target_and_image(scene, retention):
    target, head = scene
    image = np.where((target > 0.5) & (target < 2), 1 + retention * (target - 1), target)
    measured = lesions.measure(target, image, [BOX, OTHER], head)
    assert [box for box, _, _ in measured] == [BOX, OTHER]
    for (_, in_target, in_image), expected in zip(measured, (0.5, -0.4), strict=True):
        assert in_target == pytest.approx(expected) and in_image == pytest.approx(retention * expected)


def test_contrast_is_robust_to_outliers_and_an_offset(scene):
    target, head = scene
    image = 0.9 * target + 0.2
    image[26, 32] = image[22, 28] = 50
    (_, in_target, in_image), _ = lesions.measure(target, image, [BOX, OTHER], head)
    assert in_image == pytest.approx(0.9 * in_target)


def test_ring_is_in_the_head_and_in_no_box(scene):
    _, head = scene
    edge = Box(x=4, y=30, width=6, height=4, label="Mass")
    for box, others in ((BOX, [BOX, OTHER]), (edge, [edge])):
        lesion, ring = lesions.regions(box, others, head)
        assert lesion.any() and not (ring & ~head).any()
        for other in others:
            rows = slice(int(other.y), int(other.y + other.height))
            assert not ring[rows, int(other.x) : int(other.x + other.width)].any()
    assert lesions.regions(edge, [edge], head)[1].sum() < lesions.regions(BOX, [BOX], head)[1].sum()


def test_lesions_that_the_target_does_not_show_are_left_out(scene):
    target, head = scene
    faint = np.where(target == 1.5, 1.09, target)
    assert [box for box, _, _ in lesions.measure(faint, target, [BOX, OTHER], head)] == [OTHER]
    outside = Box(x=0, y=0, width=3, height=3, label="Mass")
    assert lesions.measure(target, target, [outside], head) == []


def test_lesions_of_the_phantom_are_retained_or_lost(phantom_dir, volumes, tmp_path):
    annotations = read_annotations(phantom_dir / "brain.csv", phantom_dir / "brain_file_list.csv")
    for volume in volumes:
        with h5py.File(volume.path) as h5:
            target = h5["reconstruction_rss"][()]
        write_reconstruction(tmp_path / "same" / volume.path.name, target)
        write_reconstruction(tmp_path / "flat" / volume.path.name, np.ones_like(target))
    same, left_out = lesions.volume_lesions(volumes, annotations, tmp_path / "same")
    flat, also_left_out = lesions.volume_lesions(volumes, annotations, tmp_path / "flat")
    total = sum(
        len(annotations.boxes(volume.file, number, volume.image_shape[0]))
        for volume in volumes
        for number in range(volume.slices)
        if annotations.reviewed(volume.file)
    )
    assert len(same) + left_out == total and left_out == also_left_out and len(same) > 5
    assert {one.retention for one in same} == {1.0} and {one.retention for one in flat} == {0.0}
    measured = {"4": {"model": same, "zero_filled": flat}}
    table = lesions.lesion_table(measured)
    assert len(table) == 2 * len(same) and table.groupby("method")["lost"].sum().tolist() == [0, len(flat)]
    section = {"4": {"model": {"ssim": 1.0}, "zero_filled": {}}}
    lesions.add_lesions(section, measured)
    assert section["4"]["model"]["ssim"] == 1 and section["4"]["model"]["lesions_lost"] == 0
    assert section["4"]["zero_filled"]["lesions_lost"] == section["4"]["zero_filled"]["lesions"] == len(flat)
    assert section["4"]["model"]["lesion_retention_quartiles"] == [1, 1, 1]


def test_a_reconstruction_of_another_size_is_refused(phantom_dir, volumes, tmp_path):
    annotations = read_annotations(phantom_dir / "brain.csv", phantom_dir / "brain_file_list.csv")
    reviewed = next(volume for volume in volumes if annotations.reviewed(volume.file))
    write_reconstruction(tmp_path / reviewed.path.name, np.ones((3, 8, 8)))
    with pytest.raises(ValueError, match=reviewed.path.name):
        lesions.volume_lesions([reviewed], annotations, tmp_path)


def lesion(size: float, retention: float) -> lesions.Lesion:
    return lesions.Lesion("file", "patient", 0, Box(10, 10, size, size, "Mass"), 1.0, retention)


def test_the_largest_and_a_lost_lesion_are_picked():
    large, small, lost = lesion(9, 0.9), lesion(3, 0.7), lesion(5, 0.2)
    assert lesions.pick_lesions([small, lesion(4, 0.1), large, lost]) == [
        (large, "largest lesion"),
        (lost, "largest lost lesion"),
    ]
    assert lesions.pick_lesions([large, lesion(5, 0.8), small])[1] == (small, "lesion with the lowest contrast")
    assert lesions.pick_lesions([lost]) == [(lost, "largest lesion")] and lesions.pick_lesions([]) == []


def test_lesions_are_measured_in_the_volumes_of_each_acceleration(phantom_dir, volumes, tmp_path):
    """A file with its own mask is reconstructed at its acceleration only."""
    annotations = read_annotations(phantom_dir / "brain.csv", phantom_dir / "brain_file_list.csv")
    groups = {4: volumes[:6], 6: volumes[6:], 8: []}
    for acceleration, part in groups.items():
        for volume in part:
            with h5py.File(volume.path) as h5:
                write_reconstruction(
                    tmp_path / "model" / str(acceleration) / volume.path.name, h5["reconstruction_rss"][()]
                )
    measured, _ = lesions.lesions_in(tmp_path, groups, annotations, {"4": ["model"], "6": ["model"], "8": ["model"]})
    assert set(measured) <= {"4", "6"} and measured
    for acceleration, methods in measured.items():
        assert {one.file for one in methods["model"]} <= {volume.file for volume in groups[int(acceleration)]}
