"""What is compared: a recipe, the arms that change it, and seeds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from stream_r1.config import Settings, SettingsError, load_recipe, merge, problems_of
from stream_r1.messages import shown
from stream_r1.recipe import Recipe, build_any, locate

Seed = Annotated[int, Field(ge=0, lt=2**32)]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class StudySettings(Settings):
    """A study: every arm is trained with every seed from the same start, then judged on the same noise.

    recipe: of the distillation that the arms change.
    set: settings that all arms have on top of the recipe's.
    arms: by name, the settings that an arm has on top of those.
    against: the arm that the others are compared with.
    seeds: one run an arm and seed; arms are compared seed by seed.
    videos: that each trained student is judged by; their prompts are the recipe's, in a circle.
    batch: how many of them are made together.
    judge: folder of a reward whose axes are reported; it should not be the one that guides. None: none.
    reference: statistics of real videos that KID compares with. None: no KID.
    shown: prompts of the videos on the page.
    out: folder of the runs, the tables and the page.
    """

    recipe: str
    set: dict[str, Any] = Field(default={})
    arms: Annotated[dict[str, dict[str, Any]], Field(min_length=2, max_length=100)]
    against: str
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=1000)] = (0, 1, 2)
    videos: Annotated[int, Field(ge=2, le=10_000)] = 48
    batch: Annotated[int, Field(ge=1, le=10_000)] = 8
    judge: str | None = None
    reference: str | None = None
    shown: Annotated[tuple[str, ...], Field(max_length=16)] = ()
    out: str = "out/study"

    @model_validator(mode="after")
    def _names(self) -> StudySettings:
        for name in self.arms:
            if not _NAME.fullmatch(name):
                raise ValueError(f"arms: expected names of letters, digits, . _ -, got {shown(name)}")
        if self.against not in self.arms:
            raise ValueError(f"against: expected one of {', '.join(self.arms)}, got {shown(self.against)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected each once, got {list(self.seeds)}")
        return self


@dataclass(frozen=True)
class Run:
    """One arm with one seed, in a folder of its own."""

    arm: str
    seed: int
    recipe: Recipe

    @property
    def folder(self) -> Path:
        return Path(self.recipe.out)


@dataclass(frozen=True)
class Study:
    """The settings, and the runs that they ask for: seed by seed, so that every arm has one early."""

    settings: StudySettings
    runs: list[Run]

    @property
    def out(self) -> Path:
        return Path(self.settings.out)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """The study of a YAML file.

    Raises:
        SettingsError: what is wrong, with the file and the key; the arms' recipes and models are checked too.
    """
    settings = load_recipe(StudySettings, locate(path), overrides)
    runs, problems = [], []
    for seed in settings.seeds:
        for arm, changes in settings.arms.items():
            folder = Path(settings.out) / arm / f"seed-{seed}"
            data = merge(merge(settings.set, changes), {"seed": seed, "out": str(folder)})
            try:
                recipe = build_any(settings.recipe, data)
            except SettingsError as error:
                problems.append(f"arms.{arm}: {error}")
                continue
            if not isinstance(recipe, Recipe):
                raise SettingsError(f"{path}: recipe: expected kind distill, got {recipe.kind!r}")
            runs.append(Run(arm, seed, recipe))
    if problems:
        raise problems_of(str(path), list(dict.fromkeys(problems)))
    for key in ("judge", "reference"):
        named = getattr(settings, key)
        if named is not None and not locate(named).exists():
            raise SettingsError(f"{path}: {key}: {named}: no such file or folder")
    return Study(settings, runs)
