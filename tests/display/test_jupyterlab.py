"""The notebooks in JupyterLab in a real browser: cells run, sliders change pictures, the console has no errors.

Screenshots go to tests/screenshots. The tests are skipped without Chromium and its driver.
"""

import functools
import json
from pathlib import Path
from typing import Any

import lab
import pytest
import systems

from mrilib.config import ROOT
from mrilib.data.dataset import FastMRIDataset
from mrilib.data.sampler import make_loader
from mrilib.data.splits import split_volumes
from mrilib.model import two_stage
from mrilib.model.decoders import build_decoder
from mrilib.training import loop, setup, stages

pytestmark = pytest.mark.skipif(bool(lab.ABSENT), reason=f"the notebooks were not tried in a browser: {lab.ABSENT}")
TEXTS = (".widget-slider .widget-label", ".widget-slider .widget-readout", ".widget-html-content [role=status]")
COMMON = (
    *("data_dir", "val_fraction", "test_fraction", "split_seed", "num_coils", "img_size"),
    *("config_path", "backbone_path", "device"),
)
SCREENSHOTS = Path(__file__).parents[1] / "screenshots"


def put_notebook(folder: Path, stem: str, values: dict[str, Any]) -> str:
    """Copy a notebook and inject a cell with other parameter values, as papermill does."""
    notebook = json.loads((ROOT / "notebooks" / f"{stem}.ipynb").read_text())
    place = next(i for i, c in enumerate(notebook["cells"]) if "parameters" in c["metadata"].get("tags", []))
    source = "# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in values.items())
    cell = {"cell_type": "code", "id": "injected", "metadata": {}, "source": source, "outputs": []}
    notebook["cells"].insert(place + 1, {**cell, "execution_count": None})
    (folder / f"{stem}.ipynb").write_text(json.dumps(notebook))
    return f"{stem}.ipynb"


@pytest.fixture(scope="module")
def trained(phantom_dir, tmp_path_factory) -> dict[str, Any]:
    """Parameters of 04_evaluate with checkpoints of one short epoch of each stage."""
    directory = tmp_path_factory.mktemp("trained")
    backbone = systems.write_backbone(tmp_path_factory.mktemp("backbone"))
    config = systems.stage1_config(phantom_dir, backbone, epochs=1, max_train_slices=6, max_val_slices=3)
    volumes = split_volumes(config)
    val = make_loader(FastMRIDataset(volumes["val"], config, max_slices=3), 3)
    train = make_loader(FastMRIDataset(volumes["train"], config, training=True, max_slices=6), 3, shuffle=True)
    loop.fit(stages.AnalysisStage(systems.build(config)), config, train, val, directory)
    checkpoints = {
        "stage1_checkpoint": str(directory / "stage1_checkpoints" / "stage1_best_model.pt"),
        "stage2_checkpoint": str(directory / "stage2_checkpoints" / "stage2_best_model.pt"),
    }
    stage2 = systems.stage2_config(phantom_dir, backbone, Path(checkpoints["stage1_checkpoint"]), epochs=1)
    language_model, tokenizer = two_stage.build_backbone(stage2, "cpu")
    system, _ = setup.load_stage1(Path(checkpoints["stage1_checkpoint"]), language_model, tokenizer)
    system.decoder = build_decoder(stage2, two_stage.hidden_size(language_model))
    loop.fit(stages.ReconstructionStage(system), stage2, train, val, directory)
    values = systems.values(phantom_dir, backbone)
    common = {name: values[name] for name in COMMON}
    return {
        **common,
        **checkpoints,
        "constant_prefix_checkpoint": "",
        "no_token_decoder_checkpoint": "",
        "max_new_tokens": 8,
    }


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    server = lab.Server(tmp_path_factory.mktemp("lab"))
    try:
        browser = lab.Lab(server)
        try:
            yield browser
        finally:
            browser.close()
    finally:
        server.close()


def has_other_picture(window: Any, before: Any) -> bool:
    """Whether the page shows a picture other than the one before."""
    return window.picture() not in (None, before)


def try_notebook(window: Any, folder: Path, stem: str, values: dict[str, Any], sliders: tuple[str, ...]) -> None:
    """Run all cells, move each slider by one step, and check both themes."""
    window.open(put_notebook(Path(window.server.folder), stem, {**values, "output_dir": str(folder / "run")}))
    window.run_all(300)
    for label in sliders:
        handle = window.slider(label)
        lab.until(window.picture, 20, "no picture")
        before, value = window.picture(), handle.get_attribute("aria-valuenow")
        window.press(handle)
        changed = functools.partial(has_other_picture, window, before)
        lab.until(changed, 10, f"'{label}' does not change the picture")
        assert handle.get_attribute("aria-valuenow") != value
        assert window.picture()[1:] == before[1:], "the picture must keep its size"
    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        window.theme(theme)
        for css in TEXTS:
            assert window.contrast(css) >= 4.5, f"{css} in {theme}"
        window.screenshot(SCREENSHOTS / f"{stem}_{theme.rsplit(' ', 1)[-1].lower()}.png")
    window.theme("JupyterLab Light")
    assert window.errors() == []


def test_explore_in_the_browser(window, phantom_dir, tmp_path):
    values = {"data_dir": str(phantom_dir), "num_coils": 6, "img_size": 64, "phantom_volumes": 0}
    try_notebook(window, tmp_path, "01_explore_data", values, ("slice", "volume", "acceleration", "coil"))


def test_evaluate_in_the_browser(window, trained, tmp_path):
    try_notebook(window, tmp_path, "04_evaluate", trained, ("slice", "volume", "acceleration", "zoom"))


@pytest.mark.parametrize(
    ("stem", "own", "example"),
    [
        ("02_train_stage1", systems.ENCODER, ".widget-html-content table"),
        ("03_train_stage2", systems.DECODER, ".jp-OutputArea-child:not(:first-child) .widget-image"),
    ],
)
def test_the_training_is_shown_live(window, trained, tmp_path, stem, own, example):
    names = COMMON if stem == "02_train_stage1" else (*COMMON, "stage1_checkpoint")
    values = {**{name: trained[name] for name in names}, **own}
    short = {"epochs": 3, "batch_size": 3, "max_train_slices": 9, "max_val_slices": 3, "train_control": False}
    window.open(put_notebook(Path(window.server.folder), stem, {**values, **short, "output_dir": str(tmp_path)}))
    pictures = set()

    def record_picture() -> None:
        if window.show_widgets():
            pictures.add(str(window.picture()))

    window.run_all(600, record_picture)
    assert len(pictures - {"None"}) >= 2, "the curves do not grow"
    window.show_widgets()
    curve, bar, examples = (window.tops(css) for css in (".widget-image", ".widget-hprogress", example))
    assert curve[0] < bar[-1] < examples[-1], "the progress bar must be between curves and examples"
    window.screenshot(SCREENSHOTS / f"{stem}.png")
    assert window.errors() == []


def test_an_error_in_a_cell_fails_the_test(window, phantom_dir, tmp_path):
    values = {"data_dir": str(phantom_dir), "volume": "nothing", "output_dir": str(tmp_path / "run")}
    window.open(put_notebook(Path(window.server.folder), "01_explore_data", values))
    with pytest.raises(AssertionError, match="ParameterError: volume: 'nothing' is not in"):
        window.run_all(300)
