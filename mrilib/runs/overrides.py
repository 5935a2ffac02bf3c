"""Parameters given on the command line as ``-p NOTEBOOK.NAME=VALUE``; values are YAML."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from mrilib.config import NOTEBOOKS, ParameterError, display_path, read_yaml
from mrilib.errors import shortened
from mrilib.plain_yaml import parse

Overrides = dict[str, dict[str, Any]]  # notebook → parameter → value


def parse_overrides(options: Sequence[str], notebooks: Collection[str]) -> Overrides:
    """Parse the options of ``run``: ``stage1.epochs=3`` → {"stage1": {"epochs": 3}}."""
    overrides: Overrides = {}
    for text in options:
        left, equals, value = text.partition("=")
        notebook, dot, name = left.partition(".")
        if not equals or not dot or notebook not in notebooks:
            raise ParameterError(
                f"-p {shortened(text)}: expected NOTEBOOK.NAME=VALUE with NOTEBOOK one of {', '.join(notebooks)}"
            )
        _add(overrides.setdefault(notebook, {}), name, value, text)
    return overrides


def parse_values(options: Sequence[str]) -> dict[str, Any]:
    """Parse the options of ``train``: ``epochs=3`` → {"epochs": 3}."""
    values: dict[str, Any] = {}
    for text in options:
        name, equals, value = text.partition("=")
        if not equals or "." in name:
            reason = f"; '{shortened(name)}' names a notebook, which only `run` needs" if equals else ""
            raise ParameterError(f"-p {shortened(text)}: expected NAME=VALUE{reason}")
        _add(values, name, value, text)
    return values


def _add(values: dict[str, Any], name: str, value: str, text: str) -> None:
    if not name:
        raise ParameterError(f"-p {shortened(text)}: the name is empty; expected NAME=VALUE")
    if name in values:
        raise ParameterError(f"-p {shortened(text)}: {shortened(name)} is given twice")
    values[name] = parse(value, f"-p {text}")


def parse_grid(options: Sequence[str]) -> dict[str, list[Any]]:
    """Parse the options of ``sweep``: ``stage1.epochs=3,6`` → {"stage1.epochs": [3, 6]}.

    The values are the items of a YAML list without its brackets; lists among them keep theirs: ``[4],[4, 8]``.
    """
    grid: dict[str, list[Any]] = {}
    for text in options:
        name, equals, values = text.partition("=")
        notebook, dot, parameter = name.partition(".")
        if not (equals and dot and notebook in NOTEBOOKS):
            raise ParameterError(
                f"-p {shortened(text)}: expected NOTEBOOK.NAME=VALUE,VALUE with NOTEBOOK one of {', '.join(NOTEBOOKS)}"
            )
        if name in grid:
            raise ParameterError(f"-p {shortened(text)}: {name} is given twice; separate its values by commas")
        if parameter not in NOTEBOOKS[notebook][1].model_fields:
            NOTEBOOKS[notebook][1].create({parameter: None})  # raises with the nearest known name
        grid[name] = parse(f"[{values}\n]", f"-p {text}")
        if not grid[name]:
            raise ParameterError(f"-p {shortened(text)}: no value is given")
    return grid


def format_value(value: Any) -> str:
    """Return a value as YAML on one line, for a ``-p`` option."""
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("...\n").strip()


def merge_overrides(*several: Overrides) -> Overrides:
    """Merge overrides; later values replace earlier ones."""
    merged: Overrides = {}
    for overrides in several:
        for notebook, values in overrides.items():
            merged[notebook] = {**merged.get(notebook, {}), **values}
    return merged


def read_overrides(path: Path) -> Overrides:
    """Read the overrides that a run has stored."""
    overrides = read_yaml(path)
    if not all(isinstance(values, dict) for values in overrides.values()):
        raise ParameterError(f"{display_path(path)} is damaged: expected 'name: value' lines below a notebook's name")
    return overrides
