"""Parameters on the command line: ``-p`` options of `run` and `sweep`."""

import pytest

from mrilib.config import ParameterError
from mrilib.runs.overrides import format_value, parse_grid, parse_overrides


def test_values_are_yaml():
    options = ["stage1.learning_rate=1e-4", "stage1.train_control=false", "evaluate.accelerations=[4]"]
    assert parse_overrides(options, ("stage1", "evaluate")) == {
        "stage1": {"learning_rate": "1e-4", "train_control": False},  # YAML 1.1 reads 1e-4 as text; config converts it
        "evaluate": {"accelerations": [4]},
    }
    with pytest.raises(ParameterError, match="stage3"):
        parse_overrides(["stage3.epochs=1"], ("stage1",))


@pytest.mark.parametrize("value", ["1e-4", 3e-4, True, "", [4, 8], "a: b", "no", None, "x" * 300])
def test_formatted_values_are_parsed_back(value):
    text = f"stage1.name={format_value(value)}"
    assert "\n" not in text
    assert parse_overrides([text], ("stage1",)) == {"stage1": {"name": value}}


def test_values_of_a_grid_are_separated_by_commas():
    options = ["stage1.learning_rate=1e-4,3e-4", "evaluate.accelerations=[4],[4, 8]", "stage1.varnet_weights='',a b.pt"]
    assert parse_grid(options) == {
        "stage1.learning_rate": ["1e-4", "3e-4"],
        "evaluate.accelerations": [[4], [4, 8]],
        "stage1.varnet_weights": ["", "a b.pt"],
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["learning_rate=1,2"], "NOTEBOOK.NAME"),
        (["stage3.epochs=1,2"], "stage3"),
        (["stage1.learnin_rate=1,2"], "learning_rate"),
        (["stage1.epochs=1,2", "stage1.epochs=3"], "twice"),
        (["stage1.epochs="], "no value"),
        (["stage1.epochs=[1,2"], "not YAML"),
    ],
)
def test_a_wrong_grid_is_refused(options, message):
    with pytest.raises(ParameterError, match=message):
        parse_grid(options)
