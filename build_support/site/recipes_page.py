"""The page recipes.md, made from the recipes and from the classes that declare their settings."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stream_r1.config import Settings
from stream_r1.demo.settings import DemoSettings
from stream_r1.evaluation.plan import EvalSettings
from stream_r1.recipe import InitRecipe, Recipe
from stream_r1.rewards.videoalign import VideoAlignSettings
from stream_r1.study.plan import StudySettings
from stream_r1.tiny_world.codec import CodecSettings
from stream_r1.tiny_world.reward import RewardTrainingSettings
from stream_r1.tiny_world.student import StudentSettings
from stream_r1.tiny_world.teacher import TeacherSettings

RECIPES = Path(__file__).parents[2] / "recipes"
_MEANING = re.compile(r"^(?P<names>[a-z_]\w*(?:, [a-z_]\w*)*): (?P<text>.+(?:\n    .+)*)", re.M)

# Title, introduction and the class that declares the settings.
SECTIONS: list[tuple[str, str, type[Settings]]] = [
    (
        "Settings of a distillation",
        "Recipes of `kind: distill`, the default, for `stream-r1 train`. Defaults are the published values.",
        Recipe,
    ),
    (
        "Settings of a student's initialization",
        "Recipes of `kind: ode-init` and `kind: teacher-forcing`, for `stream-r1 train`; also read by "
        "`stream-r1 data ode-pairs`.",
        InitRecipe,
    ),
    (
        "Settings of the demo",
        "`stream-r1 demo --set key=value`; its training has a recipe of the first kind.",
        DemoSettings,
    ),
    (
        "Settings of a study",
        "`stream-r1 study STUDY [key=value ...]`: see [its page](study.md).",
        StudySettings,
    ),
    (
        "Settings of an evaluation",
        "`stream-r1 eval RECIPE [key=value ...]`: see [its page](evaluation.md).",
        EvalSettings,
    ),
    (
        "Settings of the VideoAlign reward",
        "The `config.json` in the folder that `models.reward` names: see "
        "[the reward's page](reward-videoalign.md).",
        VideoAlignSettings,
    ),
    (
        "Settings of the tiny autoencoder",
        "`python -m stream_r1.tiny_world codec RECIPE [key=value ...]`.",
        CodecSettings,
    ),
    (
        "Settings of the tiny teacher",
        "`python -m stream_r1.tiny_world teacher RECIPE [key=value ...]`.",
        TeacherSettings,
    ),
    (
        "Settings of the tiny student's initialization",
        "`python -m stream_r1.tiny_world student RECIPE [key=value ...]`.",
        StudentSettings,
    ),
    (
        "Settings of the tiny rewards",
        "`python -m stream_r1.tiny_world reward RECIPE [key=value ...]`.",
        RewardTrainingSettings,
    ),
]

_HEAD = """# Recipes and settings

A recipe is a YAML file with all settings of a run: `stream-r1 train RECIPE [key=value ...]`. Keys that it
leaves out have defaults; `base:` starts from another recipe, so an ablation lists only what it changes;
`key=value` on the command line, with dotted keys (`weighting.beta=1`), overrides both.
`stream-r1 train RECIPE --check` shows the result and runs nothing.

Unknown keys, wrong types, values out of range and combinations that can't work are refused before anything
loads, all at once.
"""


def page() -> str:
    recipes = sorted(RECIPES.glob("**/*.yaml"), key=lambda path: (len(path.parts), path))
    parts = [_HEAD, "## The recipes\n", *map(_recipe, recipes)]
    told: dict[type[Settings], str] = {}
    for title, about, model in SECTIONS:
        parts += [f"## {title}\n", f"{about}\n", *_settings(model, "", _anchor(title), told)]
    return "\n".join(parts)


def meanings(model: type[Settings]) -> dict[str, str]:
    """What each setting means, from the `name: meaning` lines of its class's docstring or of a base's."""
    found: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        for match in _MEANING.finditer(inspect.cleandoc(owner.__dict__.get("__doc__") or "")):
            found |= dict.fromkeys(match["names"].split(", "), " ".join(match["text"].split()))
    return {name: found[name] for name in model.model_fields if name in found}


def introduction(model: type[Settings]) -> str:
    """The docstring without what it says about single settings."""
    return _MEANING.sub("", inspect.getdoc(model) or "").strip()


def _recipe(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    about = []
    for line in lines:
        if not line.startswith("#"):
            break
        about.append(line.removeprefix("#").removeprefix(" "))
    body = "\n".join(f"    {line}".rstrip() for line in lines[len(about) :])
    return (
        f"### {path.relative_to(RECIPES)}\n\n{_prose(about)}\n\n"
        f'??? note "recipes/{path.relative_to(RECIPES)}"\n\n    ```yaml\n{body}\n    ```\n'
    )


def _prose(lines: list[str]) -> str:
    """Lines of a comment as Markdown: what is set in is code."""
    out: list[str] = []
    for line in lines:
        code = line.startswith("  ")
        if out and code != out[-1].startswith("    "):
            out.append("")
        out.append(f"    {line.strip()}" if code else line)
    return "\n".join(out)


def _settings(
    model: type[Settings], prefix: str, section: str, told: dict[type[Settings], str]
) -> Iterator[str]:
    """A table of a model's own settings, then a section of each model in it that was not `told` before."""
    schema, texts = model.model_json_schema(), meanings(model)
    rows, groups = [], []
    for name, field in model.model_fields.items():
        key, about, group = prefix + name, schema["properties"][name], _group(field.annotation)
        if group is None:
            kind = _type(about)
        else:
            if group not in told:
                told[group] = f"[`{key}.*`](#{_anchor(section, key)})"
                groups.append((key, group))
            kind = told[group] + (" or null" if _nullable(about) else "")
        rows.append(f"| `{key}` | {kind} | {_default(about, group)} | {_cell(texts[name])} |")
    yield _in_yaml(introduction(model)) + "\n"
    yield "\n".join(["| setting | type | default | meaning |", "|---|---|---|---|", *rows]) + "\n"
    for key, group in groups:
        yield f"### {key} {{ #{_anchor(section, key)} }}\n"
        yield from _settings(group, f"{key}.", section, told)


def _anchor(*words: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", " ".join(words).lower())


def _group(annotation: Any) -> type[Settings] | None:
    """The model of a field that holds settings itself."""
    members = [annotation, *getattr(annotation, "__args__", ())]
    return next((m for m in members if isinstance(m, type) and issubclass(m, Settings)), None)


def _nullable(about: dict[str, Any]) -> bool:
    return any(member.get("type") == "null" for member in about.get("anyOf", ()))


_NAMES = {
    "boolean": "true or false",
    "string": "text",
    "null": "null",
    "integer": "whole number",
    "number": "number",
    "object": "keys and values",
}
_BOUNDS = {"exclusiveMinimum": "> {}", "minimum": "≥ {}", "exclusiveMaximum": "< {}", "maximum": "≤ {}"}


def _type(about: dict[str, Any]) -> str:
    """The type in words, from a JSON schema."""
    if "anyOf" in about:
        return " or ".join(_type(member) for member in about["anyOf"])
    if "const" in about:
        return f"`{about['const']}`"
    if "enum" in about:
        return ", ".join(f"`{choice}`" for choice in about["enum"])
    if about["type"] == "array":
        if "prefixItems" in about:
            return f"{len(about['prefixItems'])} of: {_type(about['prefixItems'][0])}"
        return f"list of: {_type(about['items'])}"
    # a bound that only keeps numbers within what a tensor can have is none that a reader needs
    bounds = [
        text.format(f"{about[key]:g}") for key, text in _BOUNDS.items() if about.get(key, 2**31) < 2**31
    ]
    return " ".join([_NAMES[about["type"]], ", ".join(bounds)]).strip()


def _default(about: dict[str, Any], group: type[Settings] | None) -> str:
    if "default" not in about:
        return "required"
    default = about["default"]
    if group is not None and default is not None:
        fixed = {name: value for name, value in default.items() if _differs(group, name, value)}
        return f"`{json.dumps(fixed)}`" if fixed else ""
    return f"`{default if isinstance(default, str) and default else json.dumps(default)}`"


def _differs(group: type[Settings], name: str, value: Any) -> bool:
    """Whether the owner of a group sets a field of it to something else than the group's own default."""
    own = group.model_json_schema()["properties"][name]
    return "default" not in own or own["default"] != value


def _cell(text: str) -> str:
    return _in_yaml(text).replace("|", "\\|")


def _in_yaml(text: str) -> str:
    """A recipe's word for None is null."""
    return re.sub(r"\bNone\b", "null", text)
