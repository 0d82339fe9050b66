"""Typed settings: YAML recipes, overrides from the command line, and refusals that help.

Everything a run can be told is a field of a `Settings` model. A recipe is checked completely before
anything is loaded: unknown keys (with the nearest valid one), wrong types, values outside their range and
combinations that cannot work, all problems at once, on one line.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import types
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stream_r1.files import FileError, read_text
from stream_r1.messages import shown, some

_MOST_BYTES = 2**18  # of a recipe
_MOST_VALUES = 20_000  # in it, what an alias stands for counted each time
_MOST_DEEP = 16  # parts of a dotted key
_MOST_BASES = 16  # below one another

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Unit = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, lt=2**31)]


class Settings(BaseModel):
    """Base of every settings model: immutable; unknown keys and numbers that are not finite are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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
    seen: set[str] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = f"line {key_node.start_mark.line + 1}"
        if not isinstance(key, str):
            raise SettingsError(f"{line}: expected text as a key, got {shown(key)}")
        if key in seen:
            raise SettingsError(f"{line}: key {shown(key)} is there twice")
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    value = yaml.SafeLoader.construct_yaml_int(loader, node) if len(node.value) <= 100 else 2**64
    if not -(2**63) <= value < 2**63:
        line = f"line {node.start_mark.line + 1}"
        raise SettingsError(f"{line}: expected a whole number of at most 64 bits, got {shown(node.value)}")
    return value


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML text; raise `SettingsError` naming ``source`` and the line.

    What aliases stand for is counted before anything is made of it.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _values_in(node, {}) > _MOST_VALUES:
            raise SettingsError(f"expected at most {_MOST_VALUES} values, aliases written out, got more")
        return loader.construct_document(node)
    except SettingsError as error:
        raise SettingsError(f"{source}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}, line {mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise SettingsError(f"{where}: not valid YAML ({problem})") from None
    except RecursionError:
        raise SettingsError(f"{source}: not valid YAML (nested too deeply, or within itself)") from None
    except (ValueError, TypeError, OverflowError) as error:  # of a date, a set, ...
        raise SettingsError(f"{source}: not valid YAML ({error})") from None


def _values_in(node: yaml.Node, known: dict[int, int]) -> int:
    """Values of a document, those behind an alias as often as it is used; known: by node, as far as seen."""
    if id(node) in known:
        if known[id(node)] == 0:
            raise RecursionError  # an alias within what it stands for
        return known[id(node)]
    known[id(node)] = 0
    parts = node.value if isinstance(node, yaml.CollectionNode) else ()
    inner = [child for part in parts for child in (part if isinstance(part, tuple) else (part,))]
    known[id(node)] = 1 + sum(_values_in(child, known) for child in inner)
    return known[id(node)]


def read_recipe(path: str | Path, keys: Collection[str] | None = None) -> dict[str, Any]:
    """The recipe's plain data, with the recipes named by ``base:`` (relative to the file) underneath it.

    Args:
        keys: that a recipe may have; a base with others is no recipe, and nothing is told of what is in it.
    """
    path = Path(path)
    data = _read(path)
    layers, opened = [data], {os.path.realpath(path)}
    while (base := layers[-1].pop("base", None)) is not None:
        if not isinstance(base, str) or not base.isprintable():
            raise SettingsError(f"{path}: base: expected a file name, got {shown(base)}")
        named, path = f"{path}: base", path.parent / base
        if os.path.realpath(path) in opened:
            raise SettingsError(f"{path}: base recipes go in a circle")
        if len(opened) == _MOST_BASES:
            raise SettingsError(
                f"{named}: expected at most {_MOST_BASES} recipes below one another, got more"
            )
        opened.add(os.path.realpath(path))
        layers.append(_read_base(path, named, keys))
    data = {}
    for layer in reversed(layers):
        data = merge(data, layer)
    return data


def _read(path: Path) -> dict[str, Any]:
    """One file of settings."""
    try:
        text = read_text(path, "a recipe (a YAML file)", _MOST_BYTES)
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        there = f"; beside it: {some(near)}" if near else ""
        raise SettingsError(f"{path}: no such recipe{there}") from None
    except FileError as error:
        raise SettingsError(str(error)) from None
    data = parse_yaml(text, str(path))
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise SettingsError(f"{path}: expected keys and values, got {shown(data)}")
    return data


def _read_base(path: Path, named: str, keys: Collection[str] | None) -> dict[str, Any]:
    """A recipe that another one names, who may not be the one that may read it: its lines are not told."""
    try:
        data = _read(path)
    except SettingsError:
        if not path.exists():
            raise
        raise SettingsError(f"{named}: expected a recipe (a YAML file of settings), got {path}") from None
    if keys is not None and not data.keys() <= {*keys, "base"}:
        raise SettingsError(f"{named}: expected a recipe, got {path} with keys that no recipe has")
    return data


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
        if not equals or len(parts) > _MOST_DEEP or not all(part.isidentifier() for part in parts):
            raise SettingsError(
                f"override {shown(item)}: expected key=value with a dotted key, as student.lr=1e-5"
            )
        value: Any = parse_yaml(text, f"override {shown(item)}")
        for part in reversed(parts):
            value = {part: value}
        out = merge(out, value)
    return out


def build(model: type[S], data: dict[str, Any], source: str = "settings") -> S:
    """``data`` as ``model``, types strict (no ``"3"`` for 3); `SettingsError` names all problems."""
    try:
        return model.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        errors = [dict(e) for e in error.errors(include_url=False)]
        # A list that is too short says so only where nothing else is wrong with it.
        found = [_problem(model, e) for e in errors if e["type"] != "too_short"]
        problems = _merge_unions(found or [_problem(model, e) for e in errors])
        told = [f"{key}: {text}" if key else text for key, text in problems]
        raise problems_of(source, told) from None


def _together(problems: list[str]) -> str:
    """One problem, or how many there are and the first ones."""
    return problems[0] if len(problems) == 1 else f"{len(problems)} problems: {_first(problems)}"


def _first(problems: list[str], limit: int = 12) -> str:
    more = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
    return "; ".join(problems[:limit]) + more


def problems_of(source: str, problems: Sequence[str]) -> SettingsError:
    """What is wrong with settings, all of it, as an error on one line."""
    return SettingsError(f"{source}: {_together(list(problems))}")


def load_recipe(model: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """A recipe file with overrides on top, checked."""
    data = merge(read_recipe(path), parse_overrides(overrides))
    return build(model, data, str(path) + (" with overrides" if overrides else ""))


def _problem(model: type[BaseModel], error: dict[str, Any]) -> tuple[str, str]:
    """The dotted key of one of pydantic's errors, and its message with what came and may have been meant."""
    kind, came, place = error["type"], error["input"], error["loc"]
    unknown = kind == "extra_forbidden"
    owner, keys = model, []
    for at, part in enumerate(place):
        ends = at == len(place) - 1
        if isinstance(part, int) or part in owner.model_fields or (unknown and ends):
            keys.append(_key(str(part)))  # what else is there are members of unions
        if isinstance(part, str) and not ends:
            owner = _field_model(owner, part) or owner
    key, message = ".".join(keys), error["msg"].removeprefix("Value error, ")
    if unknown:
        valid = list(owner.model_fields)
        return key, f"unknown key{_near(place[-1], valid)}; valid keys: {', '.join(valid)}"
    if kind in ("value_error", "missing"):
        return key, message[0].lower() + message[1:] if kind == "missing" else message
    if message.startswith("Input should be "):
        message = "expected " + message.removeprefix("Input should be ")
    choices = re.findall(r"'([^']*)'", message) if kind in ("literal_error", "enum") else []
    return key, f"{message}, got {shown(came)}{_near(came, choices)}"


def _merge_unions(problems: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """One line a key: a field that may be a number or nothing gives one problem a member otherwise."""
    out: dict[str, list[str]] = {}
    for key, text in problems:
        known = out.setdefault(key, [])
        if text not in known:
            known.append(text)
    return [(key, "; or ".join(texts)) for key, texts in out.items()]


def _key(name: str) -> str:
    return name if len(name) <= 80 and name.isprintable() else shown(name)


def _near(came: Any, valid: list[str]) -> str:
    near = difflib.get_close_matches(str(came)[:80], valid, n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


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
