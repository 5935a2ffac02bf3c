"""04_evaluate on data and models that lack something: its cells are run in this process."""

import json
import shutil
from pathlib import Path
from typing import Any

import changed_files
import heads
import IPython.display
import pytest
import systems

from mrilib.config import ROOT
from mrilib.display.style import RecordFigure
from mrilib.model import two_stage
from mrilib.model.decoders import build_decoder
from mrilib.training import loop, setup, stages

NAMES = (
    *("data_dir", "val_fraction", "test_fraction", "split_seed", "num_coils", "img_size"),
    *("config_path", "backbone_path", "device", "interactive"),
)


@pytest.fixture(scope="module")
def checkpoints(phantom_dir, backbone_dir, tmp_path_factory) -> dict[str, str]:
    """Checkpoints of one short epoch: both stages, and a U-Net that uses no tokens."""
    directory = tmp_path_factory.mktemp("trained")
    few: dict[str, Any] = {"epochs": 1, "max_train_slices": 3, "max_val_slices": 3}
    one = systems.stage1_config(phantom_dir, backbone_dir, **few)
    both = setup.make_loaders(one)
    loop.fit(stages.AnalysisStage(systems.build(one)), one, both.train, both.val, directory)
    stage1 = directory / "stage1_checkpoints" / "stage1_best_model.pt"
    two = systems.stage2_config(phantom_dir, backbone_dir, stage1, **few)
    backbone, tokenizer = two_stage.build_backbone(two, "cpu")
    system, _ = setup.load_stage1(stage1, backbone, tokenizer)
    system.decoder = build_decoder(two, two_stage.hidden_size(backbone))
    both = setup.make_loaders(two)
    loop.fit(stages.ReconstructionStage(system), two, both.train, both.val, directory)
    alone = two.model_copy(update={"decoder": "fastmri_unet", "baseline_chans": 2, "baseline_pools": 2})
    stage = setup.build_stage(alone, setup.prepare(alone))
    loop.fit(stage, alone, both.train, both.val, directory / "alone")
    stage2 = Path("stage2_checkpoints") / "stage2_best_model.pt"
    return {"stage1": str(stage1), "stage2": str(directory / stage2), "alone": str(directory / "alone" / stage2)}


@pytest.fixture
def evaluate(phantom_dir, backbone_dir, checkpoints, tmp_path, monkeypatch):
    """A function that runs the notebook with some other parameters and returns what it displays, and its metrics."""

    def run(**others: Any) -> tuple[list[Any], dict[str, Any]]:
        values = systems.values(phantom_dir, backbone_dir)
        values = {name: values[name] for name in NAMES} | {
            "output_dir": str(tmp_path / "run"),
            "stage1_checkpoint": checkpoints["stage1"],
            "stage2_checkpoint": checkpoints["stage2"],
            **dict.fromkeys(("constant_prefix_checkpoint", "no_token_decoder_checkpoint"), ""),
            "max_new_tokens": 4,
            **others,
        }
        shown: list[Any] = []
        monkeypatch.setattr(IPython.display, "display", shown.append)
        namespace: dict[str, Any] = {"In": []}  # IPython's history, from which the parameters are read
        for cell in json.loads((ROOT / "notebooks" / "04_evaluate.ipynb").read_text())["cells"]:
            if cell["cell_type"] == "code":
                namespace["In"].append("".join(cell["source"]))
                exec(namespace["In"][-1], namespace)
                if "parameters" in cell["metadata"].get("tags", []):
                    namespace |= values
        for figure in shown:
            if isinstance(figure, RecordFigure):
                assert figure.png() and figure.alt_text()
        return shown, json.loads((tmp_path / "run" / "metrics.json").read_text())

    return run


def answer_of(shown: list[Any]) -> str:
    return next(one.data for one in shown if isinstance(one, IPython.display.Markdown))


def figure_names(tmp_path: Path) -> set[str]:
    return {path.stem for path in (tmp_path / "run" / "figures").glob("*.png")}


def test_without_annotations_at_one_acceleration(evaluate, volumes, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for volume in volumes:
        shutil.copy(volume.path, data)
    shown, metrics = evaluate(data_dir=str(data), accelerations=[4], center_fractions=[0.08])
    answer = answer_of(shown)
    assert "was not measured" in answer and "lesions" not in answer and "findings" not in answer
    assert set(metrics["reconstruction"]) == {"4"} and metrics["analysis"]["findings_true"] == 0
    assert metrics["analysis"]["finding_f1_ci95"] is None
    expected = {"reconstructions_4x", "metrics", "token_differences", "text_scores", "text_errors", "texts"}
    assert figure_names(tmp_path) == expected
    assert "no lesions to measure" in capsys.readouterr().out
    assert any("How often it misses and invents findings: not measured" in getattr(one, "data", "") for one in shown)


def test_test_files_that_nobody_reviewed(evaluate, volumes, tmp_path):
    """The training data have annotations; the findings of the test files are unknown, not absent."""
    other = tmp_path / "other"
    other.mkdir()
    for number, volume in enumerate(volumes[::4]):
        path = changed_files.copy_of(volume, other, changed_files.attribute("patient_id", f"patient {number}"))
        path.rename(other / f"unreviewed{number}.h5")
    shown, metrics = evaluate(test_dir=str(other), accelerations=[8], center_fractions=[0.08])
    assert metrics["analysis"]["reviewed_samples"] == 0 and metrics["analysis"]["clean_slices"] == 0
    assert str(other) in metrics["analysis"]["test_set"]
    assert "lesions lost" not in answer_of(shown) and "lesions" not in figure_names(tmp_path)
    (described,) = [one for one in shown if isinstance(one, RecordFigure) and "Generated: " in one.alt_text()]
    assert all("findings unknown" in text for text in texts_starting(described, ("Errors", "No error")))


def texts_starting(figure: RecordFigure, starts: tuple[str, ...]) -> list[str]:
    texts = [text.get_text().replace("\n", " ") for axis in figure.axes for text in axis.texts]
    found = [text for text in texts if text.startswith(starts)]
    assert found
    return found


def test_a_decoder_without_tokens(evaluate, checkpoints, tmp_path, capsys):
    shown, metrics = evaluate(stage1_checkpoint="", stage2_checkpoint=checkpoints["alone"])
    assert "the language model has no part in the image" in answer_of(shown) and "lesions" in answer_of(shown)
    assert "analysis" not in metrics
    assert figure_names(tmp_path) == {"reconstructions_4x", "reconstructions_8x", "metrics", "lesions"}
    output = capsys.readouterr().out
    assert "the decoder uses no image tokens" in output and "generates no texts" in output


def test_test_files_without_targets(evaluate, volumes, tmp_path, capsys):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for volume in volumes[::5]:
        path = changed_files.copy_of(volume, hidden, changed_files.attribute("patient_id", volume.file))
        heads.as_test_file(path, acceleration=6)
    shown, metrics = evaluate(test_dir=str(hidden))
    assert "no test volume has a target" in answer_of(shown) and "right contrast" in answer_of(shown)
    assert metrics["reconstruction"] == {} and metrics["analysis"]["samples"] == 9
    assert figure_names(tmp_path) == {"text_scores", "text_errors", "texts"}
    assert "cannot be scored" in capsys.readouterr().out
