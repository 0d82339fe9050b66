"""Recipes: what is read, laid on one another and overridden, and every kind of refusal."""

from pathlib import Path

import pytest

from stream_r1 import recipe
from stream_r1.config import Settings, SettingsError, build, merge, parse_overrides, read_recipe
from stream_r1.distill.settings import DistillSettings
from stream_r1.drawn_world import all_scenes

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes" / "tiny").glob("*.yaml"))


class Inner(Settings):
    width: float = 1.0
    names: tuple[str, ...] = ()


class Outer(Settings):
    inner: Inner = Inner()
    count: int | None = None
    fast: bool = False


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_valid_and_its_resolved_form_is_the_same_recipe(path, tmp_path):
    loaded = recipe.load(path)
    again = tmp_path / "again.yaml"
    again.write_text(loaded.as_yaml(), encoding="utf-8")
    assert recipe.load(again) == loaded
    assert isinstance(loaded.distillation(), DistillSettings)


def test_ablations_change_their_mode_and_where_they_write_alone():
    full = recipe.load(ROOT / "recipes/tiny/stream-r1.yaml").model_dump()
    modes = {}
    for path in RECIPES:
        other = recipe.load(path).model_dump()
        modes[path.stem] = other["weighting"]["mode"]
        differing = {key for key in full if full[key] != other[key]}
        assert differing <= {"weighting", "out"}
        assert full["weighting"] | {"mode": None} == other["weighting"] | {"mode": None}
    assert modes.pop("stream-r1") == "full"
    assert all(name == mode for name, mode in modes.items())
    assert set(modes) == {"uniform", "re-dmd", "spatial", "temporal", "no-balance"}


def test_a_base_lies_under_a_recipe_and_overrides_on_top(tmp_path):
    (tmp_path / "a.yaml").write_text("count: 1\ninner: {width: 2.0, names: [x]}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\ninner: {width: 1e-4}\n")
    data = merge(read_recipe(tmp_path / "b.yaml"), parse_overrides(["inner.names=[y, z]", "fast=true"]))
    made = build(Outer, data)
    assert made == Outer(count=1, fast=True, inner=Inner(width=1e-4, names=("y", "z")))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["inner.widht=2"],
            ["inner.widht: unknown key", "did you mean 'width'?", "valid keys: width, names"],
        ),
        (["cuont=2"], ["cuont: unknown key", "did you mean 'count'?"]),
        (["inner.width=wide"], ["inner.width: expected a valid number, got 'wide'"]),
        (["inner.width='2'"], ["inner.width: expected a valid number, got '2'"]),
        (["count=2.5"], ["count: expected a valid integer, got"]),
        (["count=true"], ["count: expected a valid integer, got True"]),
        (["fast=1"], ["fast: expected a valid boolean, got 1"]),
        (["inner=3"], ["inner: expected an object, got 3"]),
        (["inner.names=x"], ["inner.names: expected a valid array, got 'x'"]),
        (["inner.names=[x, 3]"], ["inner.names.1: expected a valid string, got 3"]),
        (
            ["count=x", "inner.width=null"],
            ["2 problems", "count: expected", "inner.width: expected a valid number"],
        ),
        (["count"], ["override 'count': expected key=value"]),
        (["a b=1"], ["expected key=value with a dotted key"]),
        (["count=[1"], ["override 'count=[1'", "not valid YAML"]),
    ],
)
def test_refusals_name_the_key_what_was_expected_and_what_came(overrides, told):
    with pytest.raises(SettingsError) as error:
        build(Outer, parse_overrides(overrides), "here")
    for part in told:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("count: 1\ncount: 2\n", "key 'count' is there twice"),
        ("- 1\n- 2\n", r"expected keys and values, got \[1, 2\]"),
        ("count: [1\n", "not valid YAML"),
        ("base: 3\n", "base: expected a file name"),
        ("base: it.yaml\n", "in a circle"),
        ("base: other.yaml\n", "no such recipe; beside it: it.yaml"),
        (b"\x80\x02", r"it\.yaml: expected a recipe \(a YAML file\) in UTF-8"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, text, told):
    path = tmp_path / "it.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SettingsError, match=told):
        read_recipe(path)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("matching.guidance=1.5", "matching: guidance: is 1 less than .* write guidance_scale: 2.5"),
        ("weighting.mode=ful", "did you mean 'full'?"),
        ("accumulation=3", "expected a divisor of batch"),
        ("rollout.steps=[250, 500]", "falling timesteps"),
        ("critic_warmup=100000", "the generator would never learn"),
        ("student.lr=0", "student.lr: expected greater than 0, got 0"),
        ("student.lr=.inf", "student.lr"),
        ("models.text=UMT5", "models.text: expected embeddings of 384 numbers .* got 24 of"),
    ],
)
def test_the_tiny_recipe_refuses_what_cannot_work(override, told, tmp_path):
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text('{"d_model": 24}')
    override = override.replace("UMT5", str(tmp_path))
    with pytest.raises(SettingsError, match=told.replace("?", r"\?")):
        recipe.load(ROOT / "recipes/tiny/stream-r1.yaml", [override])


def test_prompts_come_from_a_file_or_the_drawn_world(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n  two \n", encoding="utf-8")
    assert recipe.read_prompts(str(tmp_path / "p.txt")) == ["one", "two"]
    drawn = recipe.read_prompts("drawn")
    assert drawn == [scene.prompt for scene in all_scenes()]
    (tmp_path / "p.txt").write_text("\n")
    with pytest.raises(SettingsError, match="at least one prompt"):
        recipe.read_prompts(str(tmp_path / "p.txt"))
