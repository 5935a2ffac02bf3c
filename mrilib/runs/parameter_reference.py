"""Generator of docs/parameters.md and of the notebooks' parameters cells from `config`.

Run ``python -m mrilib.runs.parameter_reference`` after a change of `config`.
"""

import json
import re
import types
import typing
from typing import Any

from mrilib.config import (
    NOTEBOOKS,
    ROOT,
    BackboneParameters,
    DataParameters,
    OutputParameters,
    Stage1Parameters,
    Stage2Parameters,
    TrainingParameters,
    read_yaml,
)
from mrilib.files import write_text
from mrilib.parameters import PARAMETERS_HEADER, Parameters

PATH = ROOT / "docs" / "parameters.md"
SHARED: dict[type[Parameters], str] = {
    OutputParameters: "All notebooks",
    DataParameters: "Data, masks and coils",
    BackboneParameters: "The frozen language model",
    TrainingParameters: "The training loop, both stages",
}
#: the parameters to try first, with what to know when changing them
FIRST = {
    "learning_rate": "Lower it if the loss jumps. With `optimizer: muon` start near 1e-3, with `adamw` near 3e-4.",
    "batch_size": "The memory follows it. With `gradient_accumulation_steps` a step keeps its slices.",
    "epochs": "The length of the training; `max_steps` limits it too. Warm-up and schedule follow.",
    "accelerations": "What the model is trained and scored for. `center_fractions` needs a value for each.",
    "decoder": "The network of stage 2; `no_token_decoder` and the VarNets need no stage 1.",
    "varnet_num_cascades": "The size of the encoder, with `varnet_chans`. Time and memory follow it.",
}
HEADER = """# Parameters

Every parameter of every notebook: type with its limits, default, meaning. The source is `mrilib/config.py`;
`python -m mrilib.runs.parameter_reference` generates this page from it. The defaults are the demo's, in the notebooks'
cells and everywhere else. A params file lists only the parameters that differ; `run.json` records all of them.
`papermill --help-notebook notebooks/02_train_stage1.ipynb` shows the parameters of a notebook.
"""


def reference() -> str:
    """Return the page as Markdown: those to try first, the shared parameters, then those of each notebook."""
    parts = [HEADER, _first_table()]
    for cls, title in SHARED.items():
        users = [stem.split("_")[0] for stem, parameters in NOTEBOOKS.values() if issubclass(parameters, cls)]
        parts.append(f"## {title}\n\nNotebooks {', '.join(sorted(users))}.\n\n{_table(cls)}")
    for stem, cls in sorted(NOTEBOOKS.values(), key=lambda entry: entry[0]):
        bases = [SHARED[base] for base in cls.__mro__[1:] if base in SHARED][::-1]
        parts.append(f"## {stem}\n\nAlso those of: {'; '.join(bases)}.\n\n{_table(cls)}")
    return "\n".join(parts)


def _first_table() -> str:
    """Return a table of the parameters in `FIRST` with their values in the shipped params folders."""
    rows = ["| parameter | `params/demo` | `params/full` | what to know |", "|---|---|---|---|"]
    for name, advice in FIRST.items():
        values = (_shipped_values(name, folder) for folder in ("demo", "full"))
        rows.append(f"| `{name}` | {' | '.join(values)} | {advice} |")
    return "\n".join(["## The first to try\n\nTwo values are those of stage 1 and stage 2.\n", *rows]) + "\n"


def _shipped_values(name: str, folder: str) -> str:
    """Return a parameter's values in the stages of a shipped params folder, without repetition."""
    stages: dict[str, type[Parameters]] = {"stage1": Stage1Parameters, "stage2": Stage2Parameters}
    values = {
        _default(read_yaml(ROOT / "params" / folder / f"{stage}.yaml").get(name, cls.model_fields[name].default)): None
        for stage, cls in stages.items()
        if name in cls.model_fields
    }
    return ", ".join(values)


def _table(cls: type[Parameters]) -> str:
    """Return a table of the parameters that a class adds to its nearest shared base or changes."""
    base = next(parent for parent in cls.__mro__[1:] if parent in SHARED or parent is Parameters)
    inherited = _rows(base)
    rows = [row for name, row in _rows(cls).items() if row != inherited.get(name)]
    return "\n".join(["| parameter | type | default | meaning |", "|---|---|---|---|", *rows]) + "\n"


def _rows(cls: type[Parameters]) -> dict[str, str]:
    rows = {}
    for name, field in cls.model_fields.items():
        description = str(field.description).replace("|", "\\|")
        kind = _type(field.annotation, field.metadata)
        rows[name] = f"| `{name}` | {kind} | {_default(field.default)} | {description} |"
    return rows


def _type(annotation: Any, limits: list[Any]) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    name = str(annotation) if isinstance(annotation, types.GenericAlias) else annotation.__name__
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [f"{sign} {getattr(limit, key)}" for limit in limits for key, sign in signs.items() if hasattr(limit, key)]
    return re.sub(r"\bstr\b", "text", ", ".join([name, *bounds]))


def _default(value: Any) -> str:
    return "empty" if value in ("", []) else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def parameters_cell(cls: type[Parameters]) -> str:
    """Return a notebook's parameters cell: ``name: type = default  # description [choices]``."""
    code = {}
    for name, field in cls.model_fields.items():
        kind: Any = field.annotation
        if not isinstance(kind, types.GenericAlias):
            kind = "str" if typing.get_origin(kind) is typing.Literal else kind.__name__
        value = json.dumps(field.default) if _has_text(field.default) else repr(field.default)
        code[name] = f"{name}: {kind} = {value}"
    column = max(len(line) for line in code.values() if len(line) <= 50)
    lines = [f"{PARAMETERS_HEADER}; papermill's and a params file's values replace them."]
    lines += [f"{line:{column}}  # {_comment(cls, name)}" for name, line in code.items()]
    return "\n".join(lines)


def _has_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _comment(cls: type[Parameters], name: str) -> str:
    field = cls.model_fields[name]
    if typing.get_origin(field.annotation) is not typing.Literal:
        return str(field.description)
    return f"{field.description} [{', '.join(str(value) or 'empty' for value in typing.get_args(field.annotation))}]"


def _update_cells() -> None:
    for stem, cls in NOTEBOOKS.values():
        path = ROOT / "notebooks" / f"{stem}.ipynb"
        notebook = json.loads(path.read_text(encoding="utf-8"))
        cell = next(cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", []))
        text = parameters_cell(cls)
        cell["source"] = text.splitlines(keepends=True) if isinstance(cell["source"], list) else text
        write_text(path, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    write_text(PATH, reference())
    print(PATH.relative_to(ROOT))
    _update_cells()
