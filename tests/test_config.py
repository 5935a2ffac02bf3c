"""Parameters: what is unknown, of the wrong type, out of range or not there is refused in one plain sentence."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mrilib import config
from mrilib.config import NOTEBOOKS, DataParameters, ExploreParameters, ParameterError, Parameters, TrainingParameters

CLASSES = [cls for _, cls in NOTEBOOKS.values()]


class Small(Parameters):
    """One field of each kind."""

    count: int = config.parameter(3, "a number", ge=1)
    rate: float = config.parameter(0.1, "a rate", gt=0)
    enabled: bool = config.parameter(True, "a switch")
    name: str = config.parameter("", "a name")
    ratios: list[float] = config.parameter([0.5], "some ratios")


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    """Values whose paths exist, for any notebook."""
    (tmp_path / "file").write_text("")
    paths = ("config_path", "backbone_path", "stage1_checkpoint", "stage2_checkpoint")
    return {
        "data_dir": str(tmp_path),
        "constant_prefix_checkpoint": "",
        **{name: str(tmp_path / "file") for name in paths},
    }


def own(cls: type[Parameters], values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in cls.model_fields}


@pytest.mark.parametrize("cls", CLASSES)
def test_defaults_are_valid_documented_and_survive_a_round_trip(cls: type[Parameters], data: dict[str, Any]) -> None:
    made = cls.create(own(cls, data))
    assert cls.create(made.to_dict()) == made
    for name, field in cls.model_fields.items():
        assert field.description, name
        assert field.annotation in (int, float, bool, str) or getattr(field.annotation, "__origin__", None), name
    assert set(cls.existing_paths) <= set(cls.model_fields)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_notebook_refuses_unknown_names_with_the_nearest(cls: type[Parameters], data: dict[str, Any]) -> None:
    for name in cls.model_fields:
        misspelt = name[:-1] + "zz"
        with pytest.raises(ParameterError, match=f"'{misspelt}' is not a parameter of this notebook; did you mean '"):
            cls.create({**own(cls, data), misspelt: 1})
    with pytest.raises(ParameterError, match=r"'qqqqqqqq' is not a parameter.*; the known ones are output_dir, "):
        cls.create({**own(cls, data), "qqqqqqqq": 1})


@pytest.mark.parametrize("cls", CLASSES)
def test_every_notebook_refuses_wrong_types_in_every_parameter(cls: type[Parameters], data: dict[str, Any]) -> None:
    for name in cls.model_fields:
        for wrong in ({"a": 1}, None):
            with pytest.raises(ParameterError, match=rf"^{name}: .*given: "):
                cls.create({**own(cls, data), name: wrong})


@pytest.mark.parametrize("cls", CLASSES)
def test_every_notebook_names_the_file_that_is_not_there(cls: type[Parameters], data: dict[str, Any]) -> None:
    needed = {"varnet_weights": {"varnet_map_network": True}}
    for name in cls.existing_paths:
        with pytest.raises(ParameterError, match=f"^{name}: '/not/there' does not exist"):
            cls.create({**own(cls, data), **needed.get(name, {}), name: "/not/there"})


@pytest.mark.parametrize("cls", CLASSES)
def test_every_number_has_bounds(cls: type[Parameters], data: dict[str, Any]) -> None:
    for name, field in cls.model_fields.items():
        if field.annotation in (int, float, list[int], list[float]):
            for wrong in (10**12, -(10**12)):
                value = [wrong, wrong] if field.annotation in (list[int], list[float]) else wrong
                with pytest.raises(ParameterError, match=name):
                    cls.create({**own(cls, data), name: value})
        if getattr(field.annotation, "__origin__", None) is list:
            with pytest.raises(ParameterError, match=f"^{name}: .*1001 items"):
                cls.create({**own(cls, data), name: [1] * 1001})


def test_a_network_of_absurd_size_is_refused_before_it_is_built(data: dict[str, Any]) -> None:
    for cls, values, told in (
        (config.Stage1Parameters, {"varnet_chans": 512, "varnet_pools": 8}, "varnet_chans"),
        (config.Stage2Parameters, {"baseline_chans": 512, "baseline_pools": 8}, "baseline_chans"),
        (config.PretrainParameters, {"hidden_size": 16384, "num_hidden_layers": 100}, "num_hidden_layers"),
        (config.BenchmarkParameters, {"hidden_size": 4096, "vocab_size": 10**6}, "vocab_size"),
    ):
        with pytest.raises(ParameterError, match=f"{told}.*: together they make a network of about"):
            cls.create({**own(cls, data), **values})


def test_a_params_file_of_another_notebook_is_told(data: dict[str, Any]) -> None:
    stage1, stage2 = (own(cls, data) for cls in (config.Stage1Parameters, config.Stage2Parameters))
    with pytest.raises(ParameterError, match=r"these are the parameters of 03_train_stage2 .*, not of 02_train_stage1"):
        config.Stage1Parameters.create({**stage2, "stage1_checkpoint": "x", "sense": True})
    with pytest.raises(ParameterError, match=r"these are the parameters of 02_train_stage1 .*, not of 03_train_stage2"):
        config.Stage2Parameters.create({**stage1, "vit_embed_dim": 8, "label_smoothing": 0.1})
    with pytest.raises(ParameterError, match=r"'sense' is not .*; it is one of 03_train_stage2$"):
        config.Stage1Parameters.create({**stage1, "sense": True})


def test_advice_names_parameters_and_options_that_exist() -> None:
    """After "give", "set", "raise" or "lower" a message names something that can be given."""
    known = {name for cls in CLASSES for name in cls.model_fields}
    advice = re.compile(r"\b(?:give|set|raise|lower|leave) (\w*_\w+)")
    texts = [
        node.value
        for path in (config.ROOT / "mrilib").rglob("*.py")
        for raised in ast.walk(ast.parse(path.read_text()))
        if isinstance(raised, ast.Raise)
        for node in ast.walk(raised)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    named = {name for text in texts for name in advice.findall(text)}
    # arguments of NirvanaForCausalLM.forward, and keys of Hugging Face's files
    others = {"input_ids", "inputs_embeds", "logits_to_keep", "eos_token", "tie_word_embeddings"}
    assert len(named) > 10 and named <= known | others, named - known


def test_training_refuses_a_data_folder_that_is_not_there_and_explore_can_make_it() -> None:
    with pytest.raises(ParameterError, match=r"data_dir: '/not/there' does not exist.*make-data DIR"):
        DataParameters.create({"data_dir": "/not/there"})
    with pytest.raises(ParameterError, match=r"data_dir: '/not/there' does not exist.*make-data DIR"):
        ExploreParameters.create({"data_dir": "/not/there", "phantom_volumes": 0})
    assert ExploreParameters.create({"data_dir": "/not/there", "phantom_volumes": 3}).phantom_volumes == 3


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (DataParameters, "data_dir"),
        (TrainingParameters, "backbone_path"),
        (config.EvaluateParameters, "stage2_checkpoint"),
    ],
)
def test_a_path_that_must_exist_cannot_be_empty(cls: type[Parameters], name: str, data: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=rf"^{name}: .*given: ''"):
        cls.create({**own(cls, data), name: ""})


def test_a_bare_no_in_yaml_is_the_word(data: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("mixed_precision: no")
    assert TrainingParameters.from_yaml(tmp_path / "x.yaml", own(TrainingParameters, data)).mixed_precision == "no"


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        ("rate", "1e-4", 1e-4),
        ("rate", 2, 2.0),
        ("rate", "2", 2.0),
        ("count", "7", 7),
        ("count", 7.0, 7),
        ("enabled", "false", False),
        ("enabled", "True", True),
        ("ratios", ["1e-1", 1], [0.1, 1.0]),
        ("name", "3", "3"),
    ],
)
def test_strings_of_yaml_and_the_command_line_are_converted(name: str, given: Any, wanted: Any) -> None:
    value = getattr(Small.create({name: given}), name)
    assert value == wanted and type(value) is type(wanted)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"count": 2.5}, r"^count: .*integer.* \(given: 2.5\)"),
        ({"count": "many"}, r"^count: .*integer.*'many'"),
        ({"count": 0}, r"^count: .*greater than or equal to 1 \(given: 0\)"),
        ({"count": True}, r"^count: a number is wanted, not true or false \(given: True\)"),
        ({"rate": False}, r"^rate: a number is wanted, not true or false"),
        ({"ratios": [True]}, r"^ratios: numbers are wanted, not true or false"),
        ({"rate": 0.0}, r"^rate: .*greater than 0"),
        ({"rate": float("nan")}, r"^rate: .*nan"),
        ({"rate": "inf"}, r"^rate: .*finite number.*inf"),
        ({"ratios": [float("inf")]}, r"^ratios.0: .*finite number"),
        ({"ratios": 0.5}, r"^ratios: .*list"),
        ({"enabled": 1}, r"^enabled: true or false is wanted, not a number \(given: 1\)"),
        ({"enabled": "perhaps"}, r"^enabled: .*'perhaps'"),
        ({"name": 3}, r"^name: .*string.*given: 3"),
        ({"rate": "x", "count": "y"}, r"^count: .*; rate: "),
    ],
)
def test_wrong_values_are_refused_by_name(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ParameterError, match=sentence):
        Small.create(values)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"img_size": 100}, "img_size: 100 is not a multiple of 16"),
        ({"accelerations": [4]}, "center_fractions: as many values as accelerations"),
        ({"accelerations": []}, "accelerations: "),
        ({"accelerations": [0, 8]}, "accelerations must be at least 1"),
        ({"center_fractions": [0.08, 1.5]}, r"center_fractions in \(0, 1\]"),
        ({"mask_type": "poisson"}, "mask_type: 'poisson' is not one of fastMRI's: random"),
        ({"crop": "both"}, "crop: .*'readout' or 'image'"),
        ({"seed": 2**32}, "seed: .*less than"),
        ({"val_fraction": 1}, "val_fraction: .*less than 1"),
    ],
)
def test_data_parameters_are_checked(data: dict[str, Any], values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ParameterError, match=sentence):
        DataParameters.create({**own(DataParameters, data), **values})


def test_stages_check_what_belongs_together(data: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match="vit_num_heads: 5 does not divide vit_embed_dim 256"):
        config.Stage1Parameters.create({**own(config.Stage1Parameters, data), "vit_num_heads": 5})
    with pytest.raises(ParameterError, match=r"train_control: .*image_skip"):
        config.Stage2Parameters.create(
            {**own(config.Stage2Parameters, data), "image_skip": False, "sense": False, "train_control": True}
        )
    with pytest.raises(ParameterError, match=r"sense: .*image_skip"):
        changed = {"image_skip": False, "train_control": False, "sense": True}
        config.Stage2Parameters.create({**own(config.Stage2Parameters, data), **changed})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_asked_for_and_absent_is_an_error(data: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match="device: cuda was asked for"):
        TrainingParameters.create({**own(TrainingParameters, data), "device": "cuda"})


def test_parameters_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Small.create({}).count = 4  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------- notebooks

CELL = "# Parameters of this notebook\ncount = 3  # a number\nrate: float = 0.1  # a rate\nenabled = True"
INJECTED = "# Parameters\nrate = 0.5\n"


def ran(*cells: str) -> dict[str, Any]:
    """What a notebook's globals() hold after these cells."""
    namespace: dict[str, Any] = {"unrelated": object(), "In": ["", "import os", *cells, "x = Parameters()"]}
    for cell in cells:
        exec(cell, namespace)
    return namespace


def test_a_notebooks_parameters_are_its_cells() -> None:
    assert Small.from_notebook(ran(CELL)) == Small.create({"count": 3, "rate": 0.1})
    assert Small.from_notebook(ran(CELL, "\n" + INJECTED)).rate == 0.5


def test_only_the_last_run_of_the_cell_counts() -> None:
    assert Small.from_notebook(ran(CELL + "\ncuont = 4", CELL)).count == 3  # corrected and run again
    assert Small.from_notebook(ran(CELL, INJECTED, CELL)).rate == 0.1
    assert Small.from_notebook(ran(CELL, INJECTED, CELL, "count = 9")).count == 9  # the value that the notebook sees


def test_what_papermill_only_warns_of_is_refused() -> None:
    with pytest.raises(ParameterError, match="'cuont' is not a parameter of this notebook; did you mean 'count'"):
        Small.from_notebook(ran(CELL, "# Parameters\ncuont = 4\n"))
    with pytest.raises(ParameterError, match="'cuont' is not a parameter"):
        Small.from_notebook(ran(CELL + "\ncount, cuont = 3, 4"))
    with pytest.raises(ParameterError, match=r"rate: .*'fast'"):
        Small.from_notebook(ran(CELL, "# Parameters\nrate = 'fast'\n"))


def test_without_the_cell_it_says_so() -> None:
    for namespace in ({}, ran("count = 3"), ran(INJECTED)):
        with pytest.raises(ParameterError, match="run the parameters cell first"):
            Small.from_notebook(namespace)


# ------------------------------------------------------------------------------------------------- YAML


def test_yaml_files_are_read_with_overrides_on_top(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("count: 5  # five\nrate: 1e-4\nenabled: false\nratios: [0.1, 1]\n")
    made = Small.from_yaml(path, {"count": "6"})
    assert made == Small.create({"count": 6, "rate": 1e-4, "enabled": False, "ratios": [0.1, 1.0]})
    path.write_text("")
    assert Small.from_yaml(path) == Small.create({})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("count: [", "small.yaml is not YAML"),
        ("count: 1\n\tx: 2", "small.yaml is not YAML"),
        ("- 3", "small.yaml must hold one 'name: value' a line"),
        ("3: 4", "small.yaml must hold one 'name: value' a line"),
        ("false", "small.yaml must hold one 'name: value' a line"),
        ("count: 1\ncount: 2", "small.yaml: 'count' is given twice"),
        ("cuont: 3", "small.yaml: 'cuont' is not a parameter of this notebook; did you mean 'count'"),
        ("rate: fast", "small.yaml: rate: .*'fast'"),
        ("name:", "small.yaml: name: .*given: None"),
    ],
)
def test_bad_yaml_names_the_file(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(text)
    with pytest.raises(ParameterError, match=sentence):
        Small.from_yaml(path)


def test_a_missing_params_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"none.yaml' does not exist"):
        Small.from_yaml(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ParameterError, match=r"bytes.yaml is not YAML"):
        Small.from_yaml(tmp_path / "bytes.yaml")


def test_relative_paths_are_taken_from_the_repository() -> None:
    assert config.resolve("params").is_dir() and config.resolve("params") == config.ROOT / "params"
    assert config.display_path("params/demo/../full") == "params/full"
    assert config.display_path("/somewhere/else") == "/somewhere/else"


@pytest.mark.parametrize("mask_type", ["equispaced_fraction", "magic_fraction"])
def test_a_centre_that_leaves_nothing_to_spread_is_refused(mask_type):
    values = {"data_dir": ".", "mask_type": mask_type, "accelerations": [4, 8], "center_fractions": [0.08, 0.125]}
    with pytest.raises(ParameterError, match=r"center_fractions 0.125 with accelerations 8: the centre alone is 1.00"):
        DataParameters.create(values)
    DataParameters.create({**values, "center_fractions": [0.08, 0.1]})
    DataParameters.create({**values, "mask_type": "equispaced"})  # adds its lines whatever the centre is


def test_an_acceleration_is_evaluated_once():
    """Training may pair one acceleration with several centre fractions; results are kept by acceleration."""
    values = {"accelerations": [4, 4], "center_fractions": [0.08, 0.06]}
    existing = config.EvaluateParameters.existing_paths
    with pytest.raises(ParameterError, match="accelerations: a value is given twice"):
        config.EvaluateParameters.create(values, written_later=existing)
    assert ExploreParameters.create({**values, "phantom_volumes": 3}).accelerations == [4, 4]
