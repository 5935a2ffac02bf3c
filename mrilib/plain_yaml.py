"""YAML of params files and of ``-p`` options: text, numbers, truth values, lists and mappings.

The size and the depth are limited. YAML features that parameters do not need are refused: tags, aliases (a few lines
of them expand to gigabytes), merge keys, dates, octal and base-60 integers.
"""

import re
import stat
from pathlib import Path
from typing import Any

import yaml

from mrilib.errors import ParameterError, shortened
from mrilib.files import display_path

MAX_LENGTH = 2**18  # characters; a params file has about 2**12
MAX_DEPTH = 8  # nested lists and mappings; parameters need three
MAX_DIGITS = 19  # of an integer
TIMESTAMP = "tag:yaml.org,2002:timestamp"
INTEGER = "tag:yaml.org,2002:int"
FLOAT = "tag:yaml.org,2002:float"
STRING = "tag:yaml.org,2002:str"
MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which reads dates as text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != TIMESTAMP]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a params file: a YAML mapping.

    Raises
    ------
    ParameterError
        Naming the file, and the line if one is wrong.
    """
    shown = display_path(path)
    values = parse(_read_text(path), shown)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ParameterError(f"{shown} must hold one 'name: value' per line")
    return values


def _read_text(path: str | Path) -> str:
    shown = display_path(path)
    try:
        # Reading from a FIFO or a device might never end.
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise ParameterError(f"the params file '{shown}' is not a regular file")
        with open(path, "rb") as file:
            content = file.read(MAX_LENGTH + 1)
    except FileNotFoundError:
        raise ParameterError(f"the params file '{shown}' does not exist") from None
    except OSError as error:
        raise ParameterError(f"the params file '{shown}' cannot be read: {error.strerror}") from None
    if len(content) > MAX_LENGTH:
        raise ParameterError(f"the params file '{shown}' is larger than {MAX_LENGTH} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ParameterError(f"{shown} is not YAML: it is not UTF-8 text") from None


def parse(text: str, where: str) -> Any:
    """Parse YAML text.

    Parameters
    ----------
    text : str
    where : str
        File or option that the text comes from, for error messages.

    Raises
    ------
    ParameterError
        Naming `where`, the line and the key.
    """
    where = shortened(where)
    if len(text) > MAX_LENGTH:
        raise ParameterError(f"{where}: the text is larger than {MAX_LENGTH} characters")
    try:
        _check_events(text, where)
        node = yaml.compose(text, _Loader)
        if node is None:
            return None
        _check_node(node, where, "")
        return _Loader("").construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ParameterError(f"{where} is not YAML: {shortened(str(error.problem or error.context))}{place}") from None
    except yaml.YAMLError as error:
        raise ParameterError(f"{where} is not YAML: {' '.join(str(error).split())}") from None


def _check_events(text: str, where: str) -> None:
    """Refuse tags, aliases and deep nesting before anything is built from the text."""
    depth = 0
    event: Any
    for event in yaml.parse(text, _Loader):
        place = f"{where}, line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise ParameterError(f"{place}: the alias *{shortened(str(event.anchor))} is not allowed; write its value")
        if getattr(event, "tag", None) is not None:
            raise ParameterError(f"{place}: the tag {shortened(event.tag)} is not allowed; write the value without it")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ParameterError(f"{place}: lists or mappings are nested more than {MAX_DEPTH} deep")


def _check_node(node: yaml.Node, where: str, key: str) -> None:
    """Refuse unusual integers, merge keys, keys that are not text, and duplicate keys."""
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _check_node(item, where, f"{key}.{number}" if key else "")
    elif isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for name, value in node.value:
            line = f"{where}, line {name.start_mark.line + 1}"
            if name.tag == MERGE:
                raise ParameterError(f"{line}: the merge key << is not allowed; write the values themselves")
            if name.tag != STRING:
                raise ParameterError(f"{line}: a key must be text; {where} must hold one 'name: value' per line")
            if name.value in names:  # PyYAML would silently use the last value
                raise ParameterError(f"{where}: '{shortened(name.value)}' is given twice")
            names.add(name.value)
            _check_node(value, where, f"{key}.{name.value}" if key else name.value)
    else:
        _check_number(node, f"{where}, line {node.start_mark.line + 1}" + (f": {shortened(key)}" if key else ""))


def _check_number(node: yaml.Node, place: str) -> None:
    if node.tag in (INTEGER, FLOAT) and ":" in node.value:
        raise ParameterError(f"{place}: YAML reads {shortened(node.value)} as a number of base 60; put it in quotes")
    if node.tag != INTEGER:
        return
    if re.fullmatch(r"[-+]?0[0-7_]+", node.value):
        raise ParameterError(f"{place}: YAML reads {shortened(node.value)} as an octal integer; remove the zeros")
    if len(node.value.replace("_", "").lstrip("+-").lstrip("0")) > MAX_DIGITS:
        raise ParameterError(f"{place}: an integer of more than {MAX_DIGITS} digits: {shortened(node.value)}")
