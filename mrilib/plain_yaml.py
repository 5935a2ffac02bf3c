"""YAML of parameters: plain text, numbers, truth values, lists and mappings, within limits of size and depth.

Text from a params file or the command line is read here and nowhere else. What parameters do not need is refused:
tags, aliases (a few lines of them expand to gigabytes), merge keys, dates, octal and base-60 integers.
"""

import re
from typing import Any

import yaml

from mrilib.errors import shortened

LARGEST = 2**18  # characters; a params file has about 2**12
DEEPEST = 8  # lists and mappings within each other; parameters need three
LONGEST_INTEGER = 19  # digits
TIMESTAMP = "tag:yaml.org,2002:timestamp"
INTEGER = "tag:yaml.org,2002:int"
FLOAT = "tag:yaml.org,2002:float"
MERGE = "tag:yaml.org,2002:merge"


class YamlError(ValueError):
    """Text that is not YAML or holds what parameters do not need; the message names file or option, line and key."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader; dates stay text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != TIMESTAMP]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse(text: str, where: str) -> Any:
    """The value that YAML text holds.

    Parameters
    ----------
    text : str
    where : str
        Name of the file or the option that the text comes from, for error messages.

    Raises
    ------
    YamlError
    """
    where = shortened(where)
    if len(text) > LARGEST:
        raise YamlError(f"{where}: the text is larger than {LARGEST} characters")
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
        raise YamlError(f"{where} is not YAML: {shortened(str(error.problem or error.context))}{place}") from None
    except yaml.YAMLError as error:
        raise YamlError(f"{where} is not YAML: {' '.join(str(error).split())}") from None


def _check_events(text: str, where: str) -> None:
    """Refuse tags, aliases and deep nesting before anything is built from the text."""
    depth = 0
    event: Any
    for event in yaml.parse(text, _Loader):
        place = f"{where}, line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise YamlError(f"{place}: the alias *{shortened(str(event.anchor))} is not allowed; write its value")
        if getattr(event, "tag", None) is not None:
            raise YamlError(f"{place}: the tag {shortened(event.tag)} is not allowed; write the value without it")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise YamlError(f"{place}: lists or mappings are nested more than {DEEPEST} deep")


def _check_node(node: yaml.Node, where: str, key: str) -> None:
    """Refuse unusual integers, merge keys, keys that are no text, and keys that are given twice."""
    place = f"{where}, line {node.start_mark.line + 1}" + (f": {shortened(key)}" if key else "")
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _check_node(item, where, f"{key}.{number}" if key else "")
    elif isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for name, value in node.value:
            line = f"{where}, line {name.start_mark.line + 1}"
            if name.tag == MERGE:
                raise YamlError(f"{line}: the merge key << is not allowed; write the values themselves")
            if name.tag != "tag:yaml.org,2002:str":
                raise YamlError(f"{line}: a key must be text; {where} must hold one 'name: value' a line")
            if name.value in names:  # YAML would take the last of two values without a word
                raise YamlError(f"{where}: '{shortened(name.value)}' is given twice")
            names.add(name.value)
            _check_node(value, where, f"{key}.{name.value}" if key else name.value)
    elif node.tag in (INTEGER, FLOAT) and ":" in node.value:
        raise YamlError(f"{place}: YAML reads {shortened(node.value)} as a number of base 60; put it in quotes")
    elif node.tag == INTEGER:
        if re.fullmatch(r"[-+]?0[0-7_]+", node.value):
            raise YamlError(f"{place}: YAML reads {shortened(node.value)} as an octal integer; leave the zeros out")
        if len(node.value.replace("_", "").lstrip("+-").lstrip("0")) > LONGEST_INTEGER:
            raise YamlError(f"{place}: an integer of more than {LONGEST_INTEGER} digits: {shortened(node.value)}")
