"""Typed settings: YAML recipes, overrides from the command line, and refusals that help.

Everything a run can be told is a field of a `Settings` model. A recipe is checked completely before
anything is loaded: unknown keys (with the nearest valid one), wrong types, values outside their range and
combinations that cannot work, all problems at once, each on a line of its own.
"""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class Settings(BaseModel):
    """Base of every settings model: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SettingsError(ValueError):
    """Settings that cannot be used; the message names source, key, what was expected and what came."""


S = TypeVar("S", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML with the floats of YAML 1.2 (``1e-4`` is a number) and without silently repeated keys."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+0123456789."),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise SettingsError(f"line {key_node.start_mark.line + 1}: key {key!r} is there twice")
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML text; raise `SettingsError` naming ``source`` and the line."""
    try:
        return yaml.load(text, _Loader)
    except SettingsError as error:
        raise SettingsError(f"{source}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}, line {mark.line + 1}" if mark else source
        raise SettingsError(f"{where}: not valid YAML ({getattr(error, 'problem', error)})") from None


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The recipe's plain data, with the recipes named by ``base:`` (relative to the file) underneath it."""
    return _read(Path(path), ())


def _read(path: Path, opened: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in opened:
        raise SettingsError(f"{path}: base recipes go in a circle")
    if path.is_dir():
        raise SettingsError(f"{path}: expected a recipe (a YAML file), got a folder")
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        there = f"; beside it: {', '.join(near)}" if near else ""
        raise SettingsError(f"{path}: no such recipe{there}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: expected a recipe (a YAML file in UTF-8): {error}") from None
    data = parse_yaml(text, str(path))
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise SettingsError(f"{path}: expected keys and values, got {_kind(data)}")
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise SettingsError(f"{path}: base: expected a file name, got {_kind(base)}")
    return merge(_read(path.parent / base, (*opened, path.resolve())), data)


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``under``, mappings key by key, everything else replaced."""
    out = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else value
    return out


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """``["student.lr=1e-5", "weighting.mode=full"]`` as nested data; values are YAML."""
    out: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        parts = key.split(".")
        if not equals or not all(part.isidentifier() for part in parts):
            raise SettingsError(
                f"override {item!r}: expected key=value with a dotted key, as student.lr=1e-5"
            )
        value: Any = parse_yaml(text, f"override {item!r}")
        for part in reversed(parts):
            value = {part: value}
        out = merge(out, value)
    return out


def build(model: type[S], data: dict[str, Any], source: str = "settings") -> S:
    """``data`` as ``model``, types strict (no ``"3"`` for 3); `SettingsError` names all problems."""
    try:
        return model.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        found = [
            _problem(model, dict(e)) for e in error.errors(include_url=False) if e["type"] != "too_short"
        ]
        found = found or [
            _problem(model, dict(e)) for e in error.errors(include_url=False)
        ]  # too short, nothing else
        problems = _merge_unions(found)
        lines = [f"{key}: {text}" if key else text for key, text in problems]
        if len(lines) == 1:
            raise SettingsError(f"{source}: {lines[0]}") from None
        raise SettingsError(f"{source}: {len(lines)} problems\n  " + "\n  ".join(lines)) from None


def load_recipe(model: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """A recipe file with overrides on top, checked."""
    data = merge(read_recipe(path), parse_overrides(overrides))
    return build(model, data, str(path) + (" with overrides" if overrides else ""))


_EXPECTED = {
    "float_type": "a number",
    "float_parsing": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "dataclass_type": "keys and values",
}


def _problem(model: type[BaseModel], error: dict[str, Any]) -> tuple[str, str]:
    loc = list(error["loc"])
    kind, came = error["type"], error["input"]
    owner, keys = model, []
    for part in loc[:-1] if loc else []:
        owner_next = _field_model(owner, part) if isinstance(part, str) else None
        if (
            isinstance(part, int)
            or owner_next is not None
            or (isinstance(part, str) and part in owner.model_fields)
        ):
            keys.append(str(part))
        if owner_next is not None:
            owner = owner_next
    last = str(loc[-1]) if loc else ""
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return ".".join([*keys, last]), _unknown(last, list(owner.model_fields))
    if loc and (last in owner.model_fields or isinstance(loc[-1], int)):
        keys.append(last)
    key = ".".join(keys)
    if kind == "missing":
        return key, "is required and has no default"
    if kind == "literal_error":
        return key, f"expected one of {_choices(error)}, got {came!r}{_near(came, _literals(error))}"
    if kind == "enum":
        return key, f"expected one of {error['ctx']['expected']}, got {came!r}"
    if kind == "value_error":
        return key, str(error["ctx"]["error"])
    if kind in _EXPECTED:
        return key, f"expected {_EXPECTED[kind]}, got {_kind(came)}"
    text = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return key, f"expected {text}, got {_kind(came)}"


def _merge_unions(problems: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """One line a key: a field that may be a number or nothing gives one problem a member otherwise."""
    out: dict[str, list[str]] = {}
    for key, text in problems:
        known = out.setdefault(key, [])
        if text not in known:
            known.append(text)
    return [(key, "; or ".join(texts)) for key, texts in out.items()]


def _unknown(key: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown key; {hint}valid keys: {', '.join(valid)}"


def _literals(error: dict[str, Any]) -> list[str]:
    return re.findall(r"'([^']*)'", error["ctx"]["expected"])


def _choices(error: dict[str, Any]) -> str:
    found = _literals(error)
    return ", ".join(found) if found else str(error["ctx"]["expected"])


def _near(came: Any, valid: list[str]) -> str:
    near = difflib.get_close_matches(str(came), valid, n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _kind(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, dict):
        return "keys and values"
    return "a list" if isinstance(value, list) else type(value).__name__


def _field_model(owner: type[BaseModel], name: str) -> type[BaseModel] | None:
    field = owner.model_fields.get(name)
    return None if field is None else _model_in(field.annotation)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, list, tuple):
        for member in get_args(annotation):
            found = _model_in(member)
            if found is not None:
                return found
    return None
