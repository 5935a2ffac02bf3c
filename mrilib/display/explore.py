"""Choices and counts of notebook 01: the slice to show, the review state of the slices, energy by coils."""

from collections import Counter
from collections.abc import Sequence

from numpy.typing import NDArray

from mrilib.config import DataParameters, ExploreParameters, ParameterError
from mrilib.data.annotations import Annotations, Box
from mrilib.data.dataset import FastMRIDataset, Volume
from mrilib.display.images import retained_energy


def slice_boxes(annotations: Annotations | None, volume: Volume, slice_num: int) -> tuple[Box, ...]:
    """Return a slice's findings in array coordinates; empty without annotations."""
    return annotations.boxes(volume.file, slice_num, volume.image_shape[0]) if annotations else ()


def pick_slice(
    config: ExploreParameters, volumes: Sequence[Volume], annotations: Annotations | None
) -> tuple[Volume, int]:
    """Pick the volume and slice of the parameters; where they are not set, the one with the most findings.

    Raises
    ------
    ParameterError
        If the volume or slice does not exist.
    """
    files = {volume.file: volume for volume in volumes}
    name = config.volume.removesuffix(".h5")
    if name and name not in files:
        raise ParameterError(f"volume: '{config.volume}' is not in {config.data_dir}; its first is {volumes[0].file}")
    with_findings = [v for v in volumes if any(slice_boxes(annotations, v, number) for number in range(v.slices))]
    volume = files[name] if name else (with_findings or volumes)[0]
    if config.slice_num >= volume.slices:
        raise ParameterError(f"slice_num: {config.slice_num} is not in {volume.file}, slices 0 to {volume.slices - 1}")
    if config.slice_num >= 0:
        return volume, config.slice_num
    return volume, max(range(volume.slices), key=lambda number: len(slice_boxes(annotations, volume, number)))


def review_counts(volumes: Sequence[Volume], annotations: Annotations | None) -> Counter[str]:
    """Count slices "with findings", "clean" (reviewed, without findings) and "unknown" (not reviewed)."""
    counts: Counter[str] = Counter()
    for volume in volumes:
        reviewed = annotations is not None and annotations.reviewed(volume.file)
        for number in range(volume.slices):
            state = "with findings" if slice_boxes(annotations, volume, number) else "clean"
            counts[state if reviewed else "unknown"] += 1
    return counts


def energy_by_coils(volumes: Sequence[Volume], config: DataParameters, count: int = 4) -> dict[str, NDArray]:
    """Compute `retained_energy` of one measured slice per number of coils, for the `count` largest numbers."""
    uncompressed = config.model_copy(update={"num_coils": max(volume.coils for volume in volumes)})
    examples = sorted({volume.coils: volume for volume in volumes}.values(), key=lambda volume: -volume.coils)[:count]
    curves = {}
    for volume in examples:
        dataset = FastMRIDataset([volume], uncompressed, acceleration=config.accelerations[0])
        sample = dataset[volume.slices // 2]
        curves[f"{volume.coils} coils, {volume.acquisition}"] = retained_energy(sample.kspace)
    return curves
