"""Base class of the parameters in `config`: conversion, validation, and error messages of one line."""

import ast
import difflib
import re
import stat
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mrilib.errors import ParameterError, shortened
from mrilib.files import display_path, resolve
from mrilib.plain_yaml import read_yaml

PARAMETERS_HEADER = "# Parameters of this notebook"  # first line of a notebook's parameters cell
MAX_NAMES_SHOWN = 5  # unknown names in one message
MAX_LIST_LENGTH = 1000
MAX_TEXT_LENGTH = 4096  # characters; no path is longer
# line ends, terminal escapes, marks of writing direction, half surrogate pairs
CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")
STAGES = {"02_train_stage1": "stage 1", "03_train_stage2": "stage 2"}  # other notebooks are called by their names
HINTS = {  # what to do if a path does not exist
    "data_dir": "Put fastMRI brain files there, or write phantom data: python -m mrilib make-data DIR",
    "stage1_checkpoint": "Run stage 1 first: python -m mrilib run params/demo --stage1-only",
    "stage2_checkpoint": "Run stage 2 first: python -m mrilib run params/demo",
    "backbone_path": "See docs/your-data.md for where the weights go.",
}


def parameter(default: Any, description: str, **limits: Any) -> Any:
    """Declare a parameter: default, description with unit, and pydantic's limits."""
    return Field(default, description=description, validate_default=True, **limits)


class Parameters(BaseModel):
    """Base of the notebooks' parameters; instances cannot be changed.

    Raises
    ------
    ParameterError
        From `create`, `from_yaml` and `from_notebook`, naming each wrong parameter, its value and the expected one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=False, allow_inf_nan=False)
    notebook: ClassVar[str] = ""  # file name without suffix; empty for shared bases
    existing_paths: ClassVar[tuple[str, ...]] = ()  # parameters that name an existing file or folder, or are empty

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_surprising_values(cls, value: Any, info: Any) -> Any:
        annotation = cls.model_fields[info.field_name].annotation
        # pydantic would convert between True and 1.
        if isinstance(value, bool) and annotation in (int, float):
            raise ValueError("expected a number, not true or false")
        if isinstance(value, int | float) and not isinstance(value, bool) and annotation is bool:
            raise ValueError("expected true or false, not a number")
        if isinstance(value, list) and annotation in (list[int], list[float]) and bool in map(type, value):
            raise ValueError("expected numbers, not true or false")
        if value is None:
            raise ValueError("no value is given; an empty text is written ''")
        if isinstance(value, list) and len(value) > MAX_LIST_LENGTH:
            raise ValueError(f"a list of {len(value)} items; at most {MAX_LIST_LENGTH} are allowed")
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and len(text) > MAX_TEXT_LENGTH:
                raise ValueError(f"a text of {len(text)} characters; at most {MAX_TEXT_LENGTH} are allowed")
            if isinstance(text, str) and CONTROL.search(text):
                raise ValueError("the text contains a control character; remove it")
        return value

    @classmethod
    def create(cls, values: Mapping[str, Any], written_later: Collection[str] = ()) -> Self:
        """Validate values; see the class for the errors.

        Parameters
        ----------
        values : mapping of str to plain values
        written_later : collection of str
            Path parameters with files that need not exist yet.
        """
        unknown = [name for name in values if name not in cls.model_fields]
        if unknown:
            raise ParameterError(_unknown_names(cls, values, unknown), unknown)
        try:
            config = cls(**values)
        except ValidationError as error:
            names = [str(problem["loc"][0]) if problem["loc"] else "" for problem in error.errors()]
            raise ParameterError("; ".join(map(_error_sentence, error.errors())), names) from None
        for name in cls.existing_paths:
            if getattr(config, name) and name not in written_later:
                config.require_path(name)
        return config

    def require_path(self, name: str) -> None:
        """Check that a path exists: a folder for names that end in _dir, else a regular file or a folder."""
        path = getattr(self, name)
        missing = ParameterError(f"{name}: '{path}' does not exist. {HINTS.get(name, '')}".strip(), [name])
        if not path:
            raise missing
        try:
            mode = resolve(path).stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            raise missing from None
        except (ParameterError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ParameterError(f"{name}: '{shortened(path)}' cannot be used: {reason}", [name]) from None
        if not stat.S_ISDIR(mode) and (name.endswith("_dir") or not stat.S_ISREG(mode)):
            kind = "folder" if name.endswith("_dir") else "regular file"
            raise ParameterError(f"{name}: '{path}' is not a {kind}", [name])

    @classmethod
    def check_replaced(cls, values: Mapping[str, Any], names: Collection[str]) -> None:
        """Refuse wrong values of parameters `names` even though a run will replace them."""
        try:
            cls(**{name: value for name, value in values.items() if name in cls.model_fields})
        except ValidationError as error:
            problems = [problem for problem in error.errors() if problem["loc"] and problem["loc"][0] in names]
            if problems:
                raise ParameterError("; ".join(map(_error_sentence, problems))) from None

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """Read a params file and replace the values of `overrides`."""
        overrides = overrides or {}
        values = {**read_yaml(path), **overrides}
        try:
            return cls.create(values)
        except ParameterError as error:
            if error.names and overrides.keys() >= set(error.names):
                raise  # the error is not in the file
            raise ParameterError(f"{display_path(path)}: {error}") from None

    @classmethod
    def from_notebook(cls, namespace: Mapping[str, Any]) -> Self:
        """Read the values of the parameters cell and of the cell that papermill injects below it.

        IPython's input history tells which names these cells assign. So a misspelt parameter is refused, while
        papermill only warns of it.

        Parameters
        ----------
        namespace : mapping
            The notebook's ``globals()``.
        """
        names = _assigned_names(list(namespace.get("In", [])))
        return cls.create({name: namespace[name] for name in names})

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings and lists for JSON and checkpoints."""
        return self.model_dump(mode="json")


def _assigned_names(history: list[str]) -> list[str]:
    """Return the names that the last run parameters cell and the cells injected after it assign."""
    names: list[str] = []
    for source in reversed(history):
        if not source.lstrip().startswith("# Parameters"):  # the first line of papermill's cell, too
            continue
        for node in ast.walk(ast.parse(source)):  # x = 1, x: int = 1 and x, y = 1, 2 all store to names
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id not in names:
                names.append(node.id)
        if source.lstrip().startswith(PARAMETERS_HEADER):
            return names
    raise ParameterError(f"run the parameters cell first (it begins with '{PARAMETERS_HEADER}')")


def _notebook_classes() -> list[type[Parameters]]:
    classes: list[type[Parameters]] = [Parameters]
    for cls in classes:
        classes += cls.__subclasses__()
    return sorted((cls for cls in classes if cls.notebook), key=lambda cls: cls.notebook)


def _unknown_names(cls: type[Parameters], values: Mapping[str, Any], unknown: Sequence[str]) -> str:
    """Return the message for unknown names; if all values fit another notebook, it names that notebook."""
    for other in _notebook_classes():
        if cls.notebook and len(unknown) > 1 and other.model_fields.keys() >= set(values):
            label = STAGES.get(other.notebook, other.notebook)
            names = ", ".join(unknown[:3]) + (", …" if len(unknown) > 3 else "")
            return f"this is a {label.replace(' ', '-')} params file (it sets {names}); give it to {label}"
    sentence = "; ".join(_unknown_name(cls, name) for name in unknown[:MAX_NAMES_SHOWN])
    return sentence if len(unknown) <= MAX_NAMES_SHOWN else f"{len(unknown)} names are unknown. {sentence}"


def _unknown_name(cls: type[Parameters], name: str) -> str:
    others = [other.notebook for other in _notebook_classes() if name in other.model_fields]
    if others and cls.notebook:
        hint = f"it belongs to {', '.join(others)}"
    elif near := difflib.get_close_matches(name, cls.model_fields, n=1, cutoff=0.5):
        hint = f"did you mean '{near[0]}'?"
    else:
        hint = f"the known ones are {', '.join(cls.model_fields)}"
    return f"'{shortened(name)}' is not a parameter of this notebook; {hint}"


def _error_sentence(problem: Any) -> str:
    """Return pydantic's error as ``name: message (given: value)``."""
    name = ".".join(str(part) for part in problem["loc"]) or "parameters"
    message = re.sub(r"^Value error, ", "", problem["msg"])
    try:
        value = shortened(repr(problem["input"]))
    except ValueError:  # Python refuses to print an integer of thousands of digits
        value = "a very large number"
    given = f" (given: {value})" if problem["loc"] else ""
    return f"{name}: {message[0].lower()}{message[1:]}{given}"
