"""The example of 00_quickstart: the slice, its lesion, its texts, and what is said about them."""

import json
import re
import shutil

import numpy as np
import pytest
import small_run

from mrilib.comparison import quickstart
from mrilib.config import ROOT, ParameterError, QuickstartParameters
from mrilib.data.splits import load_annotations
from mrilib.display import results
from mrilib.evaluation.reconstructions import Comparison, read_target
from mrilib.metrics import lesions
from mrilib.metrics.image import head_mask
from mrilib.runs.pretrained import from_pretrained
from mrilib.runs.reconstruct import load_run


@pytest.fixture(scope="module")
def loaded(phantom_dir, backbone_dir, tmp_path_factory):
    return load_run(small_run.write_run(tmp_path_factory.mktemp("runs") / "small", phantom_dir, backbone_dir))


def config_of(data, **others) -> QuickstartParameters:
    defaults = {name: field.default for name, field in QuickstartParameters.model_fields.items()}
    return QuickstartParameters.model_construct(**{**defaults, "data_dir": str(data), "acceleration": 4, **others})


def test_example_is_the_slice_of_the_largest_lesion(loaded, phantom_dir, volumes):
    model, settings = loaded
    example = quickstart.reconstruct_example(model, settings, config_of(phantom_dir))
    annotations = load_annotations(settings.model_copy(update={"data_dir": str(phantom_dir)}))
    areas = {}
    for volume in volumes:
        for number in range(volume.slices):
            target = read_target(volume, number)
            boxes = annotations.boxes(volume.file, number, target.shape[0])
            visible = lesions.measure(target, target, boxes, head_mask(target[None])[0])
            name = f"{volume.acquisition}, slice {number}, 4x"  # two patients can share one
            areas[name] = max([areas.get(name, 0), *(box.width * box.height for box, *_ in visible)])
    assert max(areas.values()) > 0 and areas[example.name] == max(areas.values())
    assert example.zoom is not None and set(example.zoom.scores) == set(example.comparison.images)
    assert {"model", "zero_filled"} <= set(example.comparison.images)
    assert example.true.startswith("Axial")
    assert results.headline([example.comparison, example.zoom], example.name).description


def lesion(kept: float) -> Comparison:
    image, scores = np.zeros((8, 8)), {"model": {"retention": kept}}
    return Comparison(image, {"model": image}, 1.0, scores, title="Mass")


@pytest.mark.parametrize(("kept", "verdict"), [(0.4, "40% of the contrast.*lost"), (0.9, "90% of the contrast.*kept")])
def test_summary_says_whether_the_lesion_is_kept(kept, verdict):
    example = quickstart.Example(lesion(kept), lesion(kept), "x", "true", "generated", ["missed: mass, left central"])
    first, second = quickstart.summary(example)
    assert re.search(verdict, first)
    assert second == "The generated text is wrong here: missed: mass, left central."
    assert quickstart.summary(example._replace(zoom=None, errors=[])) == ["The generated text is right here."]


def test_wrong_parameters_are_refused(loaded, volumes, tmp_path):
    model, settings = loaded
    with pytest.raises(ParameterError, match="acceleration: 5 is not one of the model's: 4, 8"):
        quickstart.reconstruct_example(model, settings, config_of(tmp_path, acceleration=5))
    shutil.copy(volumes[0].path, tmp_path)  # without annotations
    with pytest.raises(ParameterError, match=r"data_dir: '.*' needs fully sampled files"):
        quickstart.reconstruct_example(model, settings, config_of(tmp_path))


def test_the_model_in_the_repository_fits_its_backbone_and_its_size_limit():
    folder = ROOT / "models" / "phantom"
    model, config = from_pretrained(folder)
    assert not model.training and config.img_size == 128
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12_000_000
    content = json.loads((folder / "config.json").read_text())
    assert content["metrics"]["analysis"]["findings_true"] > 0
    assert not any(word in json.dumps(content) for word in ("/work", "/home", "/tmp"))
