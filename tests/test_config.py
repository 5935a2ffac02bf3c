"""Parameters: unknown names, wrong types, values out of range and missing files give one plain sentence."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mrilib import config
from mrilib.config import (
    NOTEBOOKS,
    DataParameters,
    EvaluateParameters,
    ExploreParameters,
    ParameterError,
    Stage1Parameters,
    Stage2Parameters,
    TrainingParameters,
)
from mrilib.parameters import Parameters, parameter

CLASSES = [cls for _, cls in NOTEBOOKS.values()]


class Small(Parameters):
    """One field of each kind."""

    count: int = parameter(3, "a number", ge=1)
    rate: float = parameter(0.1, "a rate", gt=0)
    enabled: bool = parameter(True, "a switch")
    name: str = parameter("", "a name")
    ratios: list[float] = parameter([0.5], "some ratios")


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    """Values with existing paths, for any notebook."""
    (tmp_path / "file").write_text("")
    paths = ("config_path", "backbone_path", "stage1_checkpoint", "stage2_checkpoint")
    values = {"data_dir": str(tmp_path), "constant_prefix_checkpoint": "", "no_token_decoder_checkpoint": ""}
    return values | dict.fromkeys(paths, str(tmp_path / "file"))


def create(cls: type[Parameters], data: dict[str, Any], **values: Any) -> Parameters:
    """Create parameters from those of `data` that the class has, and from `values`."""
    return cls.create({**{name: value for name, value in data.items() if name in cls.model_fields}, **values})


# ---------------------------------------------------------------------------------------------------- every notebook


@pytest.mark.parametrize("cls", CLASSES)
def test_defaults_are_valid_described_and_survive_a_round_trip(cls, data):
    parameters = create(cls, data)
    assert cls.create(parameters.to_dict()) == parameters
    for name, field in cls.model_fields.items():
        assert field.description and "\n" not in field.description, name
        assert field.annotation in (int, float, bool, str) or getattr(field.annotation, "__origin__", None), name
    assert set(cls.existing_paths) <= set(cls.model_fields)


@pytest.mark.parametrize("cls", CLASSES)
def test_unknown_names_are_refused_with_the_nearest_known_name(cls, data):
    for name in cls.model_fields:
        misspelt = name[:-1] + "zz"
        with pytest.raises(ParameterError, match=f"'{misspelt}' is not a parameter of this notebook; did you mean '"):
            create(cls, data, **{misspelt: 1})
    with pytest.raises(ParameterError, match=r"'qqqqqqqq' is not a parameter.*; the known ones are output_dir, "):
        create(cls, data, qqqqqqqq=1)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_parameter_refuses_wrong_types(cls, data):
    for name in cls.model_fields:
        for wrong in ({"a": 1}, None):
            with pytest.raises(ParameterError, match=rf"^{name}: .*given: "):
                create(cls, data, **{name: wrong})


@pytest.mark.parametrize("cls", CLASSES)
def test_missing_files_are_named(cls, data):
    needed = {"varnet_weights": {"varnet_map_network": True}}
    for name in cls.existing_paths:
        with pytest.raises(ParameterError, match=f"^{name}: '/not/there' does not exist"):
            create(cls, data, **needed.get(name, {}), **{name: "/not/there"})


@pytest.mark.parametrize("cls", CLASSES)
def test_numbers_and_lists_have_bounds(cls, data):
    for name, field in cls.model_fields.items():
        if field.annotation in (int, float, list[int], list[float]):
            for wrong in (10**12, -(10**12)):
                value = [wrong, wrong] if field.annotation in (list[int], list[float]) else wrong
                with pytest.raises(ParameterError, match=name):
                    create(cls, data, **{name: value})
        if getattr(field.annotation, "__origin__", None) is list:
            with pytest.raises(ParameterError, match=f"^{name}: .*1001 items"):
                create(cls, data, **{name: [1] * 1001})


# ------------------------------------------------------------------------------------------- checks of single classes


@pytest.mark.parametrize(
    ("cls", "values", "sentence"),
    [
        (DataParameters, {"data_dir": ""}, r"^data_dir: .*given: ''"),
        (DataParameters, {"data_dir": "/not/there"}, r"^data_dir: '/not/there' does not exist.*make-data DIR"),
        (DataParameters, {"img_size": 100}, "img_size: 100 is not a multiple of 16"),
        (DataParameters, {"accelerations": [4]}, "center_fractions: give as many values as accelerations"),
        (DataParameters, {"accelerations": []}, "accelerations: "),
        (DataParameters, {"accelerations": [0, 8]}, "accelerations must be at least 1"),
        (DataParameters, {"center_fractions": [0.08, 1.5]}, r"center_fractions in \(0, 1\]"),
        (DataParameters, {"crop": "both"}, "crop: .*'readout' or 'image'"),
        (DataParameters, {"seed": 2**32}, "seed: .*less than"),
        (DataParameters, {"val_fraction": 1}, "val_fraction: .*less than 1"),
        (TrainingParameters, {"backbone_path": ""}, r"^backbone_path: .*given: ''"),
        (EvaluateParameters, {"stage2_checkpoint": ""}, r"^stage2_checkpoint: .*given: ''"),
        (Stage1Parameters, {"vit_num_heads": 5}, "vit_num_heads: 5 does not divide vit_embed_dim 256"),
        (Stage2Parameters, {"image_skip": False, "sense": False, "train_control": True}, "train_control: .*to false"),
        (Stage2Parameters, {"image_skip": False, "sense": True}, "sense: .*image_skip"),
        (Stage1Parameters, {"varnet_chans": 512, "varnet_pools": 8}, "varnet_chans.*: together they give a network of"),
        (Stage2Parameters, {"baseline_chans": 512, "baseline_pools": 8}, "baseline_chans.*: together they give"),
        (config.PretrainParameters, {"hidden_size": 16384, "num_hidden_layers": 100}, "num_hidden_layers: together"),
        (config.CostParameters, {"hidden_size": 4096, "vocab_size": 10**6}, "vocab_size: together they give"),
    ],
)
def test_wrong_values_are_refused(data, cls, values, sentence):
    with pytest.raises(ParameterError, match=sentence):
        create(cls, data, **values)


def test_explore_accepts_a_missing_data_folder_if_it_writes_phantom_data():
    with pytest.raises(ParameterError, match=r"data_dir: '/not/there' does not exist.*make-data DIR"):
        ExploreParameters.create({"data_dir": "/not/there", "phantom_volumes": 0})
    assert ExploreParameters.create({"data_dir": "/not/there", "phantom_volumes": 3}).phantom_volumes == 3


@pytest.mark.parametrize("mask_type", ["equispaced_fraction", "magic_fraction"])
def test_a_centre_that_leaves_too_few_outer_lines_is_refused(mask_type):
    values = {"data_dir": ".", "mask_type": mask_type, "accelerations": [4, 8], "center_fractions": [0.08, 0.125]}
    with pytest.raises(ParameterError, match=r"center_fractions 0.125 with accelerations 8: the centre alone takes 1"):
        DataParameters.create(values)
    DataParameters.create({**values, "center_fractions": [0.08, 0.1]})
    DataParameters.create({**values, "mask_type": "equispaced"})  # its outer lines do not depend on the centre


def test_evaluation_refuses_an_acceleration_given_twice():
    """Training may pair one acceleration with several centre fractions; results are stored by acceleration."""
    values = {"accelerations": [4, 4], "center_fractions": [0.08, 0.06]}
    with pytest.raises(ParameterError, match="accelerations: a value is given twice"):
        EvaluateParameters.create(values, written_later=EvaluateParameters.existing_paths)
    assert ExploreParameters.create({**values, "phantom_volumes": 3}).accelerations == [4, 4]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(data):
    with pytest.raises(ParameterError, match="device: cuda is not available"):
        create(TrainingParameters, data, device="cuda")


def test_parameters_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Small.create({}).count = 4  # type: ignore[misc]


# --------------------------------------------------------------------------------------------- messages and conversion


@pytest.mark.parametrize("folder", ["comparison", "full"])
@pytest.mark.parametrize(("wrong", "right"), [(Stage1Parameters, "stage2"), (Stage2Parameters, "stage1")])
def test_a_params_file_of_the_other_stage_is_refused(folder, wrong, right):
    path = f"params/{folder}/{right}.yaml"
    number = right[-1]
    message = rf"^{path}: this is a stage-{number} params file \(it sets .*\); give it to stage {number}$"
    with pytest.raises(ParameterError, match=message):
        wrong.from_yaml(config.ROOT / path)


def test_parameters_of_another_notebook_are_refused(data):
    with pytest.raises(ParameterError, match=r"this is a 04_evaluate params file .*; give it to 04_evaluate$"):
        Stage1Parameters.create({"max_new_tokens": 3, "bart_slices": 0})
    with pytest.raises(ParameterError, match=r"'sense' is not .*; it belongs to 03_train_stage2$"):
        create(Stage1Parameters, data, sense=True)


def test_advice_names_existing_parameters():
    """After "give", "set", "raise", "lower" or "leave", messages name a parameter."""
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
    others = {"input_ids", "inputs_embeds", "past_key_values", "logits_to_keep", "eos_token", "tie_word_embeddings"}
    assert len(named) > 10 and named <= known | others, named - known


@pytest.mark.parametrize(
    ("name", "given", "converted"),
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
def test_strings_are_converted(name, given, converted):
    value = getattr(Small.create({name: given}), name)
    assert value == converted and type(value) is type(converted)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"count": 2.5}, r"^count: .*integer.* \(given: 2.5\)"),
        ({"count": "many"}, r"^count: .*integer.*'many'"),
        ({"count": 0}, r"^count: .*greater than or equal to 1 \(given: 0\)"),
        ({"count": True}, r"^count: expected a number, not true or false \(given: True\)"),
        ({"rate": False}, r"^rate: expected a number, not true or false"),
        ({"ratios": [True]}, r"^ratios: expected numbers, not true or false"),
        ({"rate": 0.0}, r"^rate: .*greater than 0"),
        ({"rate": float("nan")}, r"^rate: .*nan"),
        ({"rate": "inf"}, r"^rate: .*finite number.*inf"),
        ({"ratios": [float("inf")]}, r"^ratios.0: .*finite number"),
        ({"ratios": 0.5}, r"^ratios: .*list"),
        ({"enabled": 1}, r"^enabled: expected true or false, not a number \(given: 1\)"),
        ({"enabled": "perhaps"}, r"^enabled: .*'perhaps'"),
        ({"name": 3}, r"^name: .*string.*given: 3"),
        ({"rate": "x", "count": "y"}, r"^count: .*; rate: "),
    ],
)
def test_messages_name_the_parameter_and_its_value(values, sentence):
    with pytest.raises(ParameterError, match=sentence):
        Small.create(values)


# ----------------------------------------------------------------------------------------------------------- notebooks

CELL = "# Parameters of this notebook\ncount = 3  # a number\nrate: float = 0.1  # a rate\nenabled = True"
INJECTED = "# Parameters\nrate = 0.5\n"


def globals_after(*cells: str) -> dict[str, Any]:
    """Return a notebook's globals() after these cells."""
    namespace: dict[str, Any] = {"unrelated": object(), "In": ["", "import os", *cells, "x = Parameters()"]}
    for cell in cells:
        exec(cell, namespace)
    return namespace


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        ([CELL], {"count": 3, "rate": 0.1}),
        ([CELL, "\n" + INJECTED], {"rate": 0.5}),
        ([CELL + "\ncuont = 4", CELL], {"count": 3}),  # corrected and run again
        ([CELL, INJECTED, CELL], {"rate": 0.1}),
        ([CELL, INJECTED, CELL, "count = 9"], {"count": 9}),
    ],
)
def test_values_come_from_the_last_run_of_the_parameters_cell(cells, values):
    assert Small.from_notebook(globals_after(*cells)) == Small.create(values)


@pytest.mark.parametrize(
    ("cells", "sentence"),
    [
        ([CELL, "# Parameters\ncuont = 4\n"], "'cuont' is not a parameter of this notebook; did you mean 'count'"),
        ([CELL + "\ncount, cuont = 3, 4"], "'cuont' is not a parameter"),
        ([CELL, "# Parameters\nrate = 'fast'\n"], r"rate: .*'fast'"),
        ([], "run the parameters cell first"),
        (["count = 3"], "run the parameters cell first"),
        ([INJECTED], "run the parameters cell first"),
    ],
)
def test_wrong_cells_are_refused(cells, sentence):
    with pytest.raises(ParameterError, match=sentence):
        Small.from_notebook(globals_after(*cells))


# ---------------------------------------------------------------------------------------------------------------- YAML


def test_overrides_replace_values_of_the_file(tmp_path, data):
    path = tmp_path / "small.yaml"
    path.write_text("count: 5  # five\nrate: 1e-4\nenabled: false\nratios: [0.1, 1]\n")
    small = Small.from_yaml(path, {"count": "6"})
    assert small == Small.create({"count": 6, "rate": 1e-4, "enabled": False, "ratios": [0.1, 1.0]})
    path.write_text("")
    assert Small.from_yaml(path) == Small.create({})
    path.write_text("mixed_precision: no")  # YAML reads false
    assert create(TrainingParameters, data, **config.read_yaml(path)).mixed_precision == "no"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("count: [", "small.yaml is not YAML"),
        ("count: 1\n\tx: 2", "small.yaml is not YAML"),
        ("- 3", "small.yaml must hold one 'name: value' per line"),
        ("3: 4", "small.yaml must hold one 'name: value' per line"),
        ("false", "small.yaml must hold one 'name: value' per line"),
        ("count: 1\ncount: 2", "small.yaml: 'count' is given twice"),
        ("cuont: 3", "small.yaml: 'cuont' is not a parameter of this notebook; did you mean 'count'"),
        ("rate: fast", "small.yaml: rate: .*'fast'"),
        ("name:", "small.yaml: name: .*given: None"),
        (b"\xff\xfe\x00", "small.yaml is not YAML"),
        (None, "small.yaml' does not exist"),
    ],
)
def test_errors_in_a_params_file_name_the_file(tmp_path, text, sentence):
    path = tmp_path / "small.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ParameterError, match=sentence):
        Small.from_yaml(path)


def test_relative_paths_start_at_the_repository():
    assert config.resolve("params").is_dir() and config.resolve("params") == config.ROOT / "params"
    assert config.display_path("params/demo/../full") == "params/full"
    assert config.display_path("/somewhere/else") == "/somewhere/else"
