"""Choices and counts of notebook 01."""

import pytest

from mrilib.config import ExploreParameters, ParameterError
from mrilib.data.splits import load_annotations
from mrilib.display import explore


@pytest.fixture
def config(phantom_dir):
    return ExploreParameters.create({"data_dir": str(phantom_dir), "num_coils": 6, "img_size": 64})


def test_the_slice_with_most_findings_is_picked_unless_one_is_given(config, volumes):
    annotations = load_annotations(config)
    volume, slice_num = explore.pick_slice(config, volumes, annotations)
    numbers = [len(explore.slice_boxes(annotations, volume, number)) for number in range(volume.slices)]
    assert numbers[slice_num] == max(numbers) > 0
    assert explore.pick_slice(config, volumes, None) == (volumes[0], 0)
    other = config.model_copy(update={"volume": f"{volumes[-1].file}.h5", "slice_num": 2})
    assert explore.pick_slice(other, volumes, annotations) == (volumes[-1], 2)
    with pytest.raises(ParameterError, match="slice_num: 7 is not in"):
        explore.pick_slice(config.model_copy(update={"slice_num": 7}), volumes, annotations)
    with pytest.raises(ParameterError, match="volume: 'nothing' is not in"):
        explore.pick_slice(config.model_copy(update={"volume": "nothing"}), volumes, annotations)


def test_every_slice_has_one_review_state(config, volumes):
    annotations = load_annotations(config)
    counts = explore.review_counts(volumes, annotations)
    slices = sum(volume.slices for volume in volumes)
    unknown = sum(volume.slices for volume in volumes if not annotations.reviewed(volume.file))
    assert set(counts) == {"with findings", "clean", "unknown"} and sum(counts.values()) == slices
    assert counts["unknown"] == unknown
    assert explore.review_counts(volumes, None) == {"unknown": slices}


def test_energy_is_of_one_slice_per_number_of_coils(config, volumes):
    curves = explore.energy_by_coils(volumes, config, count=2)
    coils = sorted({volume.coils for volume in volumes}, reverse=True)[:2]
    assert [len(curve) for curve in curves.values()] == coils
