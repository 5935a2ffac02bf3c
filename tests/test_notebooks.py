"""Notebook sources: no outputs, the parameters cell of the config, fitting params files; plain papermill."""

import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import nbformat
import pytest
import systems
import yaml
from nbconvert import HTMLExporter
from papermill.inspection import inspect_notebook

from mrilib.__main__ import COMMANDS, main
from mrilib.config import NOTEBOOKS, ROOT
from mrilib.model.decoders import find_decoder
from mrilib.parameters import PARAMETERS_HEADER
from mrilib.runs import parameter_reference

PARAMS = sorted(ROOT.glob("params/*/*.yaml"))
METHODS = sorted(ROOT.glob("params/*/methods/*.yaml"))


def source_of(stem: str) -> dict:
    return json.loads((ROOT / "notebooks" / f"{stem}.ipynb").read_text())


def parameters_cell(stem: str) -> str:
    cells = [cell for cell in source_of(stem)["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    assert len(cells) == 1, f"{stem} needs one parameters cell"
    return "".join(cells[0]["source"])


def test_every_notebook_is_known():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == {stem for stem, _ in NOTEBOOKS.values()}


@pytest.mark.parametrize("stem", [stem for stem, _ in NOTEBOOKS.values()])
def test_sources_carry_no_outputs_and_no_widget_state(stem):
    notebook = source_of(stem)
    assert "widgets" not in notebook["metadata"]
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.parametrize("key", NOTEBOOKS)
def test_parameters_cell_is_the_config(key):
    """The same names, types, defaults and descriptions."""
    stem, cls = NOTEBOOKS[key]
    source = parameters_cell(stem)
    assert source.startswith(PARAMETERS_HEADER)
    assert source == parameter_reference.parameters_cell(cls), "run python -m mrilib.runs.parameter_reference"
    namespace: dict = {}
    exec(source, namespace)
    assigned = {name: namespace[name] for name in cls.model_fields}
    assert cls.create(assigned, written_later=assigned) == cls.create({}, written_later=assigned)


@pytest.mark.parametrize("path", PARAMS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_params_files_fit_their_notebook(path):
    cls = NOTEBOOKS[path.stem][1]
    values = yaml.safe_load(path.read_text())
    assert values["interactive"] is False
    cls(**values)
    defaults = {name: field.default for name, field in cls.model_fields.items()}
    same = [name for name, value in values.items() if value == defaults[name]]
    assert not same, "defaults of the notebook, to be left out"
    assert list(values) == [name for name in cls.model_fields if name in values], "in the order of the notebook"


def test_demo_comparison_and_full_have_a_file_for_each_notebook():
    for folder in ("demo", "comparison", "full"):
        names = {path.stem for path in PARAMS if path.parent.name == folder}
        assert {"explore", "stage1", "stage2", "evaluate", "compare"} <= names


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_methods_fit_stage_2(path):
    values, stage2 = yaml.safe_load(path.read_text()), yaml.safe_load((path.parent.parent / "stage2.yaml").read_text())
    assert find_decoder(values["decoder"]) and values["max_steps"] > 0
    NOTEBOOKS["stage2"][1](**{**stage2, **values})


def papermill(notebook: str, out: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "papermill", f"notebooks/{notebook}.ipynb", str(out), "--no-progress-bar"]
    command += arguments
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def stage1_values(phantom_dir, tmp_path_factory):
    backbone = systems.write_backbone(tmp_path_factory.mktemp("backbone"))
    return systems.values(phantom_dir, backbone, **systems.ENCODER, epochs=1, max_train_slices=6, train_control=False)


def test_a_notebook_runs_by_plain_papermill(stage1_values, tmp_path):
    params = tmp_path / "stage1.yaml"
    params.write_text(yaml.safe_dump({**stage1_values, "output_dir": str(tmp_path / "run")}))
    result = papermill("02_train_stage1", tmp_path / "out.ipynb", "-f", str(params), "-p", "learning_rate", "1e-4")
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "done"
    assert record["notebooks"]["stage1"]["config"]["learning_rate"] == 1e-4
    assert (tmp_path / "run" / "stage1_checkpoints" / "stage1_best_model.pt").exists()
    check_record(tmp_path / "out.ipynb")


def check_record(path: Path) -> None:
    """Check that a rendered notebook and its HTML contain pictures and tables, but no widgets."""
    assert path.stat().st_size < 2e6
    notebook = nbformat.read(path, as_version=4)
    assert "widgets" not in notebook.metadata
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    data = [output.get("data", {}) for output in outputs]
    assert not any("application/vnd.jupyter.widget-view+json" in one for one in data)
    assert not any("<Figure" in one.get("text/plain", "") and "image/png" not in one for one in data)
    assert max(output.get("text", "").count("\n") for output in outputs) < 20, "progress spam"
    html, _ = HTMLExporter().from_notebook_node(notebook)
    pictures = [one["image/png"].strip() for one in data if "image/png" in one]
    assert pictures and all(picture in html for picture in pictures)
    tables = [one["text/html"] for one in data if "text/html" in one]
    assert html.count("<table") == sum(table.count("<table") for table in tables) >= 3
    descriptions = [output.get("metadata", {}).get("image/png", {}).get("alt", "") for output in outputs]
    assert any("Epoch 1:" in text for text in descriptions), "what the model said"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learnin_rate": 1e-4}, "learning_rate"),
        ({"epochs": "several"}, "epochs"),
        ({"data_dir": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_the_first_cell_refuses_wrong_parameters(stage1_values, tmp_path, changed, message):
    params = tmp_path / "stage1.yaml"
    params.write_text(yaml.safe_dump({**stage1_values, "output_dir": str(tmp_path / "run"), **changed}))
    result = papermill("02_train_stage1", tmp_path / "out.ipynb", "-f", str(params))
    assert result.returncode != 0
    assert "ParameterError" in result.stderr and message in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", NOTEBOOKS)
def test_papermills_help_lists_every_parameter_with_its_description(key):
    stem, cls = NOTEBOOKS[key]
    listed = inspect_notebook(str(ROOT / "notebooks" / f"{stem}.ipynb"))
    assert list(listed) == list(cls.model_fields)
    for name, parameter in listed.items():
        text, field = parameter["help"].removeprefix("# "), cls.model_fields[name]
        assert text.startswith(field.description)
        if typing.get_origin(field.annotation) is typing.Literal:
            assert all((value or "empty") in text for value in typing.get_args(field.annotation))
        else:
            assert parameter["inferred_type_name"] in (str(field.annotation), field.annotation.__name__)


def test_documented_papermill_commands_are_right():
    """Notebooks, params files and parameter names of the commands in README and docs."""
    stems = dict(NOTEBOOKS.values())
    commands = []
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = path.read_text().replace("\\\n", " ")
        commands += re.findall(r"papermill notebooks/(\w+)\.ipynb (.*)", text)
    assert len(commands) >= 5
    for stem, rest in commands:
        assert set(re.findall(r" -p (\w+) ", f" {rest} ")) <= set(stems[stem].model_fields), (stem, rest)
        assert all((ROOT / params).is_file() for params in re.findall(r" -f (\S+)", rest))


def test_documented_mrilib_commands_are_right(capsys):
    """Names, options and params files of the commands in README and docs."""
    pages = "\n".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    commands = re.findall(r" -m mrilib ([a-z][\w-]*)([^\n#`]*)", pages)
    assert {name for name, _ in commands} == set(COMMANDS)
    for name, rest in commands:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        text = capsys.readouterr().out
        assert all(option in text for option in re.findall(r"(?<=[\s[])--?[\w-]+", rest)), (name, rest)
        assert all((ROOT / path).exists() for path in re.findall(r"params/[a-z][\w/.]*", rest)), (name, rest)


def test_parameter_reference_is_current():
    page = parameter_reference.PATH.read_text()
    assert page == parameter_reference.reference(), "run python -m mrilib.runs.parameter_reference"
    for _, cls in NOTEBOOKS.values():
        assert all(f"`{name}`" in page for name in cls.model_fields)
