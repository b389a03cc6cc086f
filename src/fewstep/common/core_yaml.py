"""YAML with the scalars of YAML 1.2's core schema, no key twice, and text fields that stay text.

YAML 1.1, which PyYAML reads, takes `on`, `yes` and `no` for truth values, 010 for eight, 1:30 for ninety, 2024-01-02
for a date and 1e-3 for text. Here `true` and `false` alone are truth values, a number with a leading zero is text
(which a field of numbers still reads as one), and 1e-3 is a number. A field that a config declares as text gets text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

TAG = "tag:yaml.org,2002:"
SCALARS = (
    ("merge", r"<<", "<"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
)
"""Plain scalars that are no text: tag, pattern, first characters. YAML 1.2.2, section 10.3.2, but for leading zeros."""
PLAIN = {f"{TAG}{tag}" for tag, *_ in SCALARS} - {f"{TAG}null"}
"""Tags of scalars that become text where a field holds text; other tags are of no type here and refused."""
INNER = {"\u0085": "\U000f0085", "\u2028": "\U000f2028", "\u2029": "\U000f2029"}
"""Line ends of YAML 1.1 that are none here -> characters for private use that take their places while PyYAML reads."""
OUTER = str.maketrans({stand_in: character for character, stand_in in INNER.items()})


class CoreLoader(yaml.SafeLoader):
    """A safe loader of the core schema that refuses a key that appears twice."""

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        """Restore a scalar's own characters."""
        node: yaml.ScalarNode = super().compose_scalar_node(anchor)  # type: ignore[no-untyped-call]
        node.value = node.value.translate(OUTER)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a key that appears twice, before keys are merged in."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)  # type: ignore[no-untyped-call]
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == f"{TAG}merge":
                continue
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"key {key.value!r} appears twice, the second time in line {line}; keep one")
            seen.add(key.value)
        return node


class CoreDumper(yaml.SafeDumper):
    """A safe dumper that quotes text which YAML 1.1 or the core schema would read as something else."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Represent text, quoted if it holds characters that end a line in YAML 1.1 alone."""
        style = '"' if any(character in data for character in INNER) else None
        return self.represent_scalar(f"{TAG}str", data, style)


CoreDumper.add_representer(str, CoreDumper.represent_str)
CoreLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in SCALARS:
    CoreLoader.add_implicit_resolver(TAG + _tag, re.compile(rf"(?:{_pattern})\Z"), list(_first))
    CoreDumper.add_implicit_resolver(TAG + _tag, re.compile(rf"(?:{_pattern})\Z"), list(_first))


def load(text: str, annotation: Any = None) -> Any:
    """Return what a YAML document holds.

    Args:
        annotation: type of what it is read for, a config or a type of a field; plain scalars that it declares as text
            stay text.

    Raises:
        ValueError: not YAML, or a key that appears twice.
    """
    for character, stand_in in INNER.items():
        text = text.replace(character, stand_in)
    try:
        loader = CoreLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if annotation is not None:
                _keep_text(node, annotation, annotation)
            return loader.construct_document(node)  # type: ignore[no-untyped-call]
        finally:
            loader.dispose()  # type: ignore[no-untyped-call]
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(str(error).translate(OUTER) or type(error).__name__) from error


def parse(text: str, annotation: Any = None) -> Any:
    """Return the value of an override: text as it is written where its field holds text, else what YAML makes of it.

    Raises:
        ValueError: it is for another field, and no YAML.
    """
    if annotation is None or not is_text(annotation):
        return load(text, annotation)
    plain = text.strip()
    if NoneType in _options(annotation) and plain in ("", "~", "null"):
        return None
    if len(plain) > 1 and plain[0] == plain[-1] and plain[0] in "'\"":
        return load(plain)
    return text if str in _options(annotation) else plain


def dump(data: Any) -> str:
    """Return a mapping as YAML that `load` and readers of YAML 1.1 read alike."""
    return yaml.dump(data, Dumper=CoreDumper, sort_keys=False, allow_unicode=True)


def is_text(annotation: Any) -> bool:
    """Return whether a field of this type holds text alone, or None."""
    options = [option for option in _options(annotation) if option is not NoneType]
    return bool(options) and all(option is str or isinstance(option, str) for option in options)


def takes_truth(annotation: Any) -> bool:
    """Return whether a field of this type may hold a truth value."""
    return annotation is Any or any(option is bool or option is Any for option in _options(annotation))


def annotation_at(model: type[BaseModel] | None, parts: Sequence[str]) -> Any:
    """Return the type of the field that a dotted key names; None where there is none."""
    found: Any = model
    for number, part in enumerate(parts):
        nested = model_of(found)
        if nested is None and _item_of(found) is not None:  # a list of named items: this part is a name
            found = _item_of(found)
        elif nested is not None and (field := _field(nested, part)) is not None:
            found = _section(field.annotation, part, model)
        else:
            return None
        if found is None and number + 1 < len(parts):
            return None
    return found


def _field(model: type[BaseModel], name: str) -> FieldInfo | None:
    """Return a field by its name, or by the name that it had in an earlier version (`Config.renamed`)."""
    renamed: Mapping[str, str] = getattr(model, "renamed", {})
    return model.model_fields.get(renamed.get(name, name))


def _section(annotation: Any, name: str, root: Any) -> Any:
    """Return the type of a field. Changes to a section (any mapping) have the type of that section."""
    if get_origin(annotation) is dict and model_of(root) is not None:
        field = _field(model_of(root), name)  # type: ignore[arg-type]
        return field.annotation if field else annotation
    return annotation


def _keep_text(node: yaml.Node, annotation: Any, root: Any) -> None:
    """Mark the plain scalars below a node that are declared as text; make sections without lines empty mappings."""
    model, item = model_of(annotation), _item_of(annotation)
    if isinstance(node, yaml.MappingNode) and model is not None:
        node.value = [(key, _section_node(key, value, model)) for key, value in node.value]
        for key, value in node.value:
            if key.tag == f"{TAG}merge":
                _keep_text(value, annotation, root)
            elif (field := _field(model, key.value)) is not None:
                _keep_text(value, _section(field.annotation, key.value, root), root)
    elif isinstance(node, yaml.MappingNode) and item is not None:  # named items and what changes in them
        for _, value in node.value:
            _keep_text(value, item, root)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _keep_text(value, annotation if item is None else item, root)
    elif isinstance(node, yaml.ScalarNode) and is_text(annotation) and node.tag in PLAIN:
        node.tag = f"{TAG}str"


def _section_node(key: yaml.Node, value: yaml.Node, model: type[BaseModel]) -> yaml.Node:
    """Return the value of a key; an empty mapping for a section without lines, as where all are comments."""
    field = _field(model, key.value) if isinstance(key, yaml.ScalarNode) else None
    section = field is not None and model_of(field.annotation) is not None
    if section and value.tag == f"{TAG}null" and NoneType not in _options(field.annotation if field else None):
        return yaml.MappingNode(f"{TAG}map", [], value.start_mark, value.end_mark)
    return value


def _options(annotation: Any) -> list[Any]:
    """Return the types of a union and the values of its literals; of any other type, the type itself."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _options(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [option for part in get_args(annotation) for option in _options(part)]
    return list(get_args(annotation)) if origin is Literal else [annotation]


def model_of(annotation: Any) -> type[BaseModel] | None:
    """Return the config that a field holds; None if it holds none."""
    found = [a for a in _options(annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
    return found[0] if found else None


def _item_of(annotation: Any) -> Any:
    """Return the type of a list's items; None if a field holds no list."""
    lists = [a for a in _options(annotation) if get_origin(a) in (tuple, list)]
    return get_args(lists[0])[0] if lists and get_args(lists[0]) else None
