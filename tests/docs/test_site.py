"""The site has every page, says what every setting means, and describes arguments that exist."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import yaml

import stream_r1
import stream_r1_kernels
from build_support.site import commands_page, recipes_page, root_pages
from stream_r1.config import Settings

ROOT = Path(__file__).parents[2]
MADE = {"recipes.md", "commands.md", *root_pages.PAGES.values()}  # by build_support/site


def modules():
    for package in (stream_r1, stream_r1_kernels):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.endswith(("__main__", "._C")):
                yield importlib.import_module(found.name)


MODULES = list(modules())


def kinds_of(model):
    for child in model.__subclasses__():
        yield from (child, *kinds_of(child))


SETTINGS = sorted({m for m in kinds_of(Settings) if m.__module__.startswith("stream_r1")}, key=str)


def pages_of(entry):
    """The pages below one entry of the nav."""
    if isinstance(entry, str):
        yield entry
    else:
        for child in entry.values() if isinstance(entry, dict) else entry:
            yield from pages_of(child)


def test_the_reference_has_every_op():
    page = (ROOT / "docs/reference/ops.md").read_text()
    described = re.findall(r"^::: stream_r1_kernels\.(\w+)$", page, re.M)
    assert sorted(described) == sorted([*stream_r1_kernels.__all__, "backends"])


def test_every_page_is_in_the_navigation():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    docs = ROOT / "docs"
    assert sorted(pages_of(config["nav"])) == sorted(
        MADE | {str(p.relative_to(docs)) for p in docs.rglob("*.md")}
    )


@pytest.mark.parametrize("model", SETTINGS, ids=lambda model: f"{model.__module__}.{model.__name__}")
def test_every_setting_has_a_meaning(model):
    meanings = recipes_page.meanings(model)
    assert list(meanings) == list(model.model_fields)
    assert all(len(meaning) > 3 for meaning in meanings.values())


@pytest.mark.parametrize("model", SETTINGS, ids=lambda model: f"{model.__module__}.{model.__name__}")
def test_no_meaning_is_of_a_setting_that_is_gone(model):
    told = re.findall(r"^ {4}([a-z_][\w, ]*): ", model.__doc__ or "", re.M)
    assert {name for names in told for name in names.split(", ")} <= set(model.model_fields)


def test_meanings_are_read_with_their_continuations_and_from_bases():
    class Base(Settings):
        """Something.

        Not a setting: this.

        one, two: what they are,
            on two lines.
        """

        one: int = 1
        two: int = 2

    class Child(Base):
        """Something else.

        two: another meaning.
        three: the third.
        """

        three: int = 3

    assert recipes_page.meanings(Child) == {
        "one": "what they are, on two lines.",
        "two": "another meaning.",
        "three": "the third.",
    }
    assert recipes_page.introduction(Base) == "Something.\n\nNot a setting: this."


def test_the_recipes_page_has_every_recipe_and_every_setting_with_its_default():
    page = recipes_page.page()
    for path in ROOT.glob("recipes/**/*.yaml"):
        assert f"### {path.relative_to(ROOT / 'recipes')}\n" in page
    for row in (
        "| `weighting.beta` | number ≥ 0 | `2.0` |",
        "| `student.lora.rank` | whole number ≥ 1, ≤ 65536 | `64` |",
        "| `rollout.steps` | list of: number ≥ 0, ≤ 1000 | `[1000, 750, 500, 250]` |",
        "| `models.student` | text | required |",
        "| `stream.positions` | `absolute`, `window` or null | `null` |",
        "| `student.betas` | 2 of: number ≥ 0, ≤ 1 | `[0.0, 0.999]` |",
    ):
        assert row in page
    anchors = set(re.findall(r"\{ #([\w-]+) \}", page))
    links = set(re.findall(r"\]\(#([\w-]+)\)", page))
    assert links
    assert links == anchors


def test_the_commands_page_has_every_command_and_option():
    page = commands_page.page()
    for command in ("demo", "train", "sample", "replay", "info", "study", "eval", "serve", "data ode-pairs"):
        assert f"## {command}\n" in page
    assert re.search(r"^\| `--seconds [^`]*` \| Length; .*default: 5\.0", page, re.M)
    assert re.search(r"^\| `recipe` \| A recipe, ", page, re.M)


@pytest.mark.parametrize(
    ("source", "link", "on_site"),
    [
        ("README.md", "docs/sampling.md", "sampling.md"),
        ("README.md", "docs/drop-in/weighting.md#parts", "drop-in/weighting.md#parts"),
        ("README.md", "LICENSE", "LICENSE.txt"),
        ("assets/README.md", "../README.md", "index.md"),
        (
            "assets/README.md",
            "../recipes/tiny/uniform.yaml",
            "recipes/tiny/uniform.yaml",
        ),  # refused by mkdocs
        ("README.md", "https://arxiv.org/abs/2605.03849", "https://arxiv.org/abs/2605.03849"),
        ("README.md", "#layout", "#layout"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(source, link, on_site):
    text = f"see [this]({link}), [and](docs/training.md)"
    assert f"[this]({on_site})" in root_pages.with_links_of_the_site(text, source)


def documented():
    """Public functions and classes with a section of arguments."""
    for module in MODULES:
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            members = vars(value).items() if inspect.isclass(value) else ()
            for key, found in ((name, value), *((f"{name}.{k}", v) for k, v in members)):
                found = getattr(found, "__func__", found)
                if re.search(r"^ *Args:$", getattr(found, "__doc__", None) or "", re.M):
                    yield pytest.param(found, id=f"{module.__name__}.{key}")


def test_sections_of_docstrings_stand_apart():
    """One that follows a line of text is read as text."""
    joined = re.compile(r"^ *\S.*\n *(?:Args|Attributes|Raises|Returns|Yields):$", re.M)
    wrong = [m.__name__ for m in MODULES if joined.search(Path(m.__file__).read_text(encoding="utf-8"))]
    assert not wrong


@pytest.mark.parametrize("found", list(documented()))
def test_what_is_described_as_an_argument_is_one(found):
    section = re.search(r"^Args:\n((?:    .*\n|\n)+)", f"{inspect.getdoc(found)}\n", re.M)
    assert section is not None
    names = re.findall(r"^ {4}(\*{0,2}\w[\w, *]*): ", section[1], re.M)
    assert names
    parameters = set(inspect.signature(found).parameters)
    assert {name.lstrip("*") for joined in names for name in joined.split(", ")} <= parameters
