"""The parameter reference, from `config`: ``python -m mrilib.reference`` writes docs/parameters.md."""

import re
import types
import typing
from typing import Any

from mrilib.config import (
    NOTEBOOKS,
    ROOT,
    BackboneParameters,
    BenchParameters,
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
    BenchParameters: "The comparison with other methods",
}
HEADER = """# Parameters

Every parameter of every notebook: type with its limits, default, meaning. `mrilib/config.py` is the source; this page
is made from it by `python -m mrilib.reference`. The defaults are the full-size model's;
the cells of the notebooks hold the demo's. A params file names every parameter of its notebook, so its values are what
counts in a run. `papermill --help-notebook notebooks/02_train_stage1.ipynb` shows a notebook's own.
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


def _value(default: Any) -> str:
    return "empty" if default in ("", []) else f"`{str(default).lower() if isinstance(default, bool) else default}`"


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(reference(), encoding="utf-8")
    print(PATH.relative_to(ROOT))
