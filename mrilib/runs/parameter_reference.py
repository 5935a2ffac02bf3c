"""Write docs/parameters.md and the parameters cells of the notebooks from `config`.

``python -m mrilib.runs.parameter_reference`` writes them again after a change of `config`.
"""

import json
import re
import types
import typing
from typing import Any

from mrilib.config import (
    NOTEBOOKS,
    PARAMETERS_HEADER,
    ROOT,
    BackboneParameters,
    DataParameters,
    OutputParameters,
    Parameters,
    TrainingParameters,
)

PATH = ROOT / "docs" / "parameters.md"
SHARED: dict[type[Parameters], str] = {
    OutputParameters: "All notebooks",
    DataParameters: "Data, masks and coils",
    BackboneParameters: "The frozen language model",
    TrainingParameters: "The training loop, both stages",
}
HEADER = """# Parameters

Every parameter of every notebook: type with its limits, default, meaning. `mrilib/config.py` is the source; this page
is made from it by `python -m mrilib.runs.parameter_reference`. The defaults are the demo's, in the cells of the
notebooks and everywhere else. A params file lists only the parameters that differ; `run.json` records all of them.
`papermill --help-notebook notebooks/02_train_stage1.ipynb` shows a notebook's own.
"""


def reference() -> str:
    """The page as Markdown: shared parameters once, then each notebook's own."""
    parts = [HEADER]
    for cls, title in SHARED.items():
        users = [stem[:2] for stem, parameters in NOTEBOOKS.values() if issubclass(parameters, cls)]
        parts.append(f"## {title}\n\nNotebooks {', '.join(sorted(users))}.\n\n{_table(cls)}")
    for stem, cls in sorted(NOTEBOOKS.values(), key=lambda entry: entry[0]):
        bases = [SHARED[base] for base in cls.__mro__[1:] if base in SHARED][::-1]
        parts.append(f"## {stem}\n\nAlso those of: {'; '.join(bases)}.\n\n{_table(cls)}")
    return "\n".join(parts)


def _table(cls: type[Parameters]) -> str:
    """The parameters that a class adds to its nearest shared base, or gives another default, meaning or limit."""
    base = next(one for one in cls.__mro__[1:] if one in SHARED or one is Parameters)
    lines = ["| parameter | type | default | meaning |", "|---|---|---|---|"]
    for name, field in cls.model_fields.items():
        inherited = base.model_fields.get(name)
        row = (_type(field.annotation, field.metadata), _value(field.default), field.description)
        if inherited and row == (
            _type(inherited.annotation, inherited.metadata),
            _value(inherited.default),
            inherited.description,
        ):
            continue
        cells = [f"`{name}`", row[0], row[1], str(row[2]).replace("|", "\\|")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else "None of its own.\n"


def _type(annotation: Any, limits: list[Any]) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    name = str(annotation) if isinstance(annotation, types.GenericAlias) else annotation.__name__
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    told = [f"{sign} {getattr(limit, key)}" for limit in limits for key, sign in signs.items() if hasattr(limit, key)]
    return re.sub(r"\bstr\b", "text", ", ".join([name, *told]))


def meaning(cls: type[Parameters], name: str) -> str:
    """What a parameters cell says of a parameter: its description, and the values that it may have if they are few."""
    field = cls.model_fields[name]
    if typing.get_origin(field.annotation) is not typing.Literal:
        return str(field.description)
    return f"{field.description} [{', '.join(str(value) or 'empty' for value in typing.get_args(field.annotation))}]"


def parameters_cell(cls: type[Parameters]) -> str:
    """A notebook's parameters cell with the defaults: ``name: type = value  # meaning``."""
    lines = [f"{PARAMETERS_HEADER}; papermill's and a params file's values replace them."]
    code = {}
    for name, field in cls.model_fields.items():
        kind: Any = field.annotation
        if not isinstance(kind, types.GenericAlias):
            kind = "str" if typing.get_origin(kind) is typing.Literal else kind.__name__
        value = json.dumps(field.default) if _texts(field.default) else repr(field.default)
        code[name] = f"{name}: {kind} = {value}"
    column = max(len(one) for one in code.values() if len(one) <= 50)
    lines += [f"{one:{column}}  # {meaning(cls, name)}" for name, one in code.items()]
    return "\n".join(lines)


def _texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def _write_cells() -> None:
    for stem, cls in NOTEBOOKS.values():
        path = ROOT / "notebooks" / f"{stem}.ipynb"
        notebook = json.loads(path.read_text(encoding="utf-8"))
        cell = next(one for one in notebook["cells"] if "parameters" in one["metadata"].get("tags", []))
        as_list = isinstance(cell["source"], list)
        text = parameters_cell(cls)
        cell["source"] = text.splitlines(keepends=True) if as_list else text
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(path.relative_to(ROOT))


def _value(default: Any) -> str:
    return "empty" if default in ("", []) else f"`{str(default).lower() if isinstance(default, bool) else default}`"


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(reference(), encoding="utf-8")
    print(PATH.relative_to(ROOT))
    _write_cells()
