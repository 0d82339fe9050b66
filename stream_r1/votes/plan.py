"""What is compared: settings, and the pairs that a rater is shown, in an order of the rater's own."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from stream_r1.config import Settings, SettingsError, load_recipe
from stream_r1.data.prompts import read_prompt_file
from stream_r1.disk.fingerprint import fingerprint
from stream_r1.disk.origin import keep_origin, require_origin

Side = Literal["left", "right"]
CHECK = "check"
QUESTIONS = {
    "dynamics": "Which one moves better: more, and as such things move?",
    "visual quality": "Which one looks better: sharper, cleaner, without flicker?",
    "overall": "Which one is the better video of this text?",
}


class VoteSettings(Settings):
    """A comparison.

    models: by name, a folder with one mp4 a prompt, in the natural order of their names.
    prompts: a text file, one prompt a line, as many as videos.
    out: folder of the votes and the report; kept between runs.
    questions: by name, as raters read them; all can be answered with a tie.
    pairs_a_rater: how many pairs a rater is shown at most; None: all.
    attention_checks: pairs among them of a video and a badly damaged copy; who prefers a damaged one is left
        out of the report.
    seed: of the orders.
    """

    models: dict[str, str] = Field(min_length=2)
    prompts: str
    out: str = "out/votes"
    questions: dict[str, str] = Field(default=QUESTIONS, min_length=1)
    pairs_a_rater: int | None = Field(default=None, ge=1)
    attention_checks: int = Field(default=2, ge=0)
    seed: int = 0

    @model_validator(mode="after")
    def _names(self) -> VoteSettings:
        for name in (*self.models, *self.questions):
            if not re.fullmatch(r"[^\x00-\x1f|]{1,80}", name):
                raise ValueError(f"names: expected 1 to 80 characters without |, got {name!r}")
        return self


@dataclass(frozen=True)
class Item:
    """A pair to vote on: prompt `index`, and the models on both sides; `CHECK` stands for a damaged copy."""

    index: int
    left: str
    right: str

    @property
    def key(self) -> str:
        """The same whichever side is which."""
        return "|".join([str(self.index), *sorted((self.left, self.right))])

    @property
    def is_check(self) -> bool:
        return CHECK in (self.left, self.right)


@dataclass(frozen=True)
class Comparison:
    """The settings with the videos that they name.

    Attributes:
        videos: by model, a file a prompt.
    """

    settings: VoteSettings
    prompts: list[str]
    videos: Mapping[str, list[Path]]

    @property
    def out(self) -> Path:
        return Path(self.settings.out)

    def require_same(self) -> None:
        """Raises SettingsError when the votes that are there are on other videos, models or prompts."""
        require_origin(self.out, self._origin, self.database)

    def begin(self) -> None:
        """Make the folder of the votes, and keep what they will be on; otherwise as `require_same`."""
        self.require_same()
        self.out.mkdir(parents=True, exist_ok=True)
        keep_origin(self.out, self._origin)

    @cached_property
    def _origin(self) -> dict[str, Any]:
        return {
            "models": list(self.videos),
            "prompts": fingerprint([], *self.prompts),
            "videos": {name: fingerprint(files) for name, files in self.videos.items()},
        }

    @property
    def database(self) -> Path:
        return self.out / "votes.sqlite"

    def damaged(self, index: int) -> Path:
        """The damaged copy of the first model's video of a prompt."""
        return self.out / "checks" / f"{index}.mp4"

    def file(self, index: int, name: str) -> Path:
        return self.damaged(index) if name == CHECK else self.videos[name][index]

    @cached_property
    def checked(self) -> list[int]:
        """The prompts of the attention checks."""
        count = min(self.settings.attention_checks, len(self.prompts))
        return sorted(random.Random(f"{self.settings.seed} checks").sample(range(len(self.prompts)), count))

    def items(self, rater: str) -> list[Item]:
        """What a rater is shown, in order: always the same for one rater, different between raters.

        Where a rater sees a part of the pairs, the parts of the raters are drawn independently.
        """
        draw = random.Random(f"{self.settings.seed} {rater}")
        pairs = list(itertools.product(range(len(self.prompts)), itertools.combinations(self.videos, 2)))
        draw.shuffle(pairs)
        if self.settings.pairs_a_rater is not None:
            pairs = pairs[: self.settings.pairs_a_rater]
        first = next(iter(self.videos))
        shown = [(index, *pair) for index, pair in pairs]
        for index in self.checked:  # anywhere but first: a rater has to know what good ones look like
            shown.insert(draw.randint(min(1, len(shown)), len(shown)), (index, first, CHECK))
        return [Item(index, *((a, b) if draw.random() < 0.5 else (b, a))) for index, a, b in shown]


def load(path: str | Path, overrides: list[str]) -> Comparison:
    """The comparison of a YAML file.

    Raises:
        SettingsError: what is wrong, with the file and the key.
    """
    settings = load_recipe(VoteSettings, path, overrides)
    prompts = read_prompt_file(Path(settings.prompts))
    videos = {}
    for name, folder in settings.models.items():
        if name == CHECK:
            raise SettingsError(f"{path}: models: expected another name than {CHECK!r}, which is the checks'")
        files = sorted(Path(folder).glob("*.mp4"), key=_natural)
        if len(files) != len(prompts):
            raise SettingsError(
                f"{path}: models.{name}: expected {len(prompts)} mp4 files, one a prompt of "
                f"{settings.prompts}, got {len(files)} in {folder}"
            )
        videos[name] = files
    return Comparison(settings, prompts, videos)


def _natural(path: Path) -> list[tuple[int, str]]:
    """clip-10 comes after clip-9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]
