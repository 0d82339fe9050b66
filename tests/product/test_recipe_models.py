"""What a recipe says reaches the models that it names, in their real formats at small sizes."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from stream_r1 import recipe as recipes
from stream_r1.assembly import load_models, make_init_trainer, write_ode_pairs
from stream_r1.config import SettingsError
from stream_r1.data.prompts import read_prompt_file
from stream_r1.models.checkpoints import load_student
from stream_r1.recipe import read_prompts

TESTS = Path(__file__).resolve().parents[1]
WAN = TESTS.parent / "recipes" / "wan2.1-1.3b"


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def overrides(world, tmp_path_factory):
    """The published recipes' models are the small world's, VideoReward's and UMT5's folders."""
    root = tmp_path_factory.mktemp("wan")
    reward = module(TESTS / "rewards" / "videoalign_folder.py").write_reward(root)
    module(TESTS / "models" / "test_text.py").save_umt5(root / "umt5", seed=0, width=384)
    folders = {name: world / name for name in ("student", "teacher", "vae")}
    folders |= {"critic": world / "teacher", "reward": reward.folder, "text": root / "umt5"}
    named = [f"models.{name}={folder}" for name, folder in folders.items()]
    return [*named, f"prompts={world / 'prompts.txt'}", f"text.cache={root / 'cache'}"]


@pytest.mark.parametrize(("name", "frames"), [("stream-r1", 32), ("reward-forcing", 4)])
def test_the_reward_looks_at_the_frames_that_the_method_needs(overrides, name, frames):
    """Every one for saliency (of an odd number the last is left over); 2 a second for scores alone."""
    models = load_models(recipes.load(WAN / f"{name}.yaml", overrides))
    video = torch.rand(1, 33, 3, 56, 56, requires_grad=True)
    models.reward.score(video, ["a fox"]).sum().backward()
    assert (video.grad.flatten(2).abs().sum(2) > 0).sum() == frames


@pytest.mark.parametrize(
    ("name", "stream"),
    [("stream-r1", (9, 3, "window", 0.999)), ("self-forcing", (21, 0, "absolute", None))],
)
def test_a_method_takes_the_start_that_another_streams_with(world, overrides, tmp_path, name, stream):
    """ode-init.yaml exports a student with the stream's settings in its config.json; a method has its own."""
    recipe = recipes.load_start(WAN / "ode-init.yaml", [f"prompts={world / 'prompts.txt'}"])
    start = load_student(world / "student", **recipe.stream.overrides())
    start.save_pretrained(tmp_path / "start")
    chosen = recipes.load(WAN / f"{name}.yaml", [*overrides, f"models.student={tmp_path / 'start'}"])
    (tmp_path / "again.yaml").write_text(chosen.as_yaml())
    assert recipes.load(tmp_path / "again.yaml") == chosen
    config = load_student(tmp_path / "start", **chosen.stream.overrides()).config
    assert (config.window_frames, config.sink_frames, config.positions, config.sink_ema) == stream


def test_prompts_are_encoded_once_and_the_encoder_is_given_back(overrides):
    recipe = recipes.load(WAN / "stream-r1.yaml", overrides)
    text = load_models(recipe).text
    states = text.encode([*read_prompts(recipe.prompts), recipe.matching.negative_text])
    assert states.dtype == torch.bfloat16
    assert not text.loaded
    text.encode(["a prompt of nobody"])
    assert text.loaded


def test_only_prompts_that_trajectories_have_are_encoded(world, overrides, tmp_path):
    """A file of prompts may be large, and few trajectories are made of it."""
    (tmp_path / "prompts.txt").write_text("\n".join(f"prompt {i}" for i in range(50)))
    others = ("models.critic", "models.reward", "prompts")
    changed = [
        *(each for each in overrides if each.split("=")[0] not in others),
        *(
            f"prompts={tmp_path / 'prompts.txt'}",
            f"text.cache={tmp_path / 'cache'}",
            f"out={tmp_path / 'out'}",
        ),
        *(f"pairs.folder={tmp_path / 'pairs'}", "pairs.count=2", "pairs.solver_steps=2"),
        *("rollout.frames=3", "rollout.height=4", "rollout.width=4", "batch=1", "accumulation=1"),
    ]
    recipe = recipes.load_start(WAN / "ode-init.yaml", changed)
    assert list(write_ode_pairs(recipe)) == [1, 2]
    assert len(list((tmp_path / "cache").iterdir())) == 3  # and the negative prompt
    trainer = make_init_trainer(recipe, tmp_path / "checkpoints")
    assert len(list((tmp_path / "cache").iterdir())) == 3
    assert len(trainer.objective) == 2
    assert trainer.prompts == ["prompt 0", "prompt 1"]
    more = recipes.load_start(WAN / "ode-init.yaml", [*changed, "pairs.count=3"])
    before = {path: path.read_bytes() for path in (tmp_path / "pairs").iterdir()}
    assert list(write_ode_pairs(more)) == [3]
    assert all(path.read_bytes() == content for path, content in before.items())


def test_prompts_from_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is one of the test dependencies")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "prompts.parquet"
    parquet.write_table(pa.table({"id": [1, 2, 3, 4], "prompt": ["a fox ", None, "", "ein Käfer"]}), path)
    assert read_prompts(str(path)) == ["a fox", "ein Käfer"]
    parquet.write_table(pa.table({"id": [1], "words": ["a"]}), path)
    with pytest.raises(SettingsError, match="expected a column prompt, caption, text, got id, words"):
        read_prompts(str(path))
    parquet.write_table(pa.table({"text": [1.5]}), path)
    with pytest.raises(SettingsError, match=r"text: expected text, got 1\.5"):
        read_prompts(str(path))
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(SettingsError, match="not a readable"):
        read_prompts(str(path))


def test_parquet_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "prompts.parquet"
    path.write_bytes(b"")
    with pytest.raises(SettingsError, match=r"needs the package pyarrow: pip install stream-r1\[parquet\]"):
        read_prompts(str(path))


LINES = ["a fox", "ein K\u00e4fer", "a b\u2028c", "line \x85 nel \x0b tab \x0c feed"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_prompt_files_of_any_encoding(tmp_path, encoding, end):
    path = tmp_path / "prompts.txt"
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    text = end.join([mark + LINES[0] + " \t", "", *LINES[1:], "  "])
    for last in ("", end):
        path.write_bytes((text + last).encode(encoding))
        assert read_prompts(str(path)) == LINES


def test_prompts_are_bounded(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a fox\n" * 100)
    with pytest.raises(SettingsError, match=r"prompts\.txt: .* at most 599 bytes \(max_bytes\), got 600"):
        read_prompt_file(path, max_bytes=599)
    pa = pytest.importorskip("pyarrow", reason="pyarrow is one of the test dependencies")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "prompts.PARQUET"
    words = "a fox " * 100
    parquet.write_table(pa.table({"prompt": pa.array([words] * 200_000).dictionary_encode()}), path)
    assert path.stat().st_size < 100_000  # 120 MB of text
    with pytest.raises(SettingsError, match=r"PARQUET: .* at most 1000000 bytes of text \(max_bytes\), got"):
        read_prompt_file(path, max_bytes=1_000_000)
    parquet.write_table(pa.table({"prompt": [words] * 3, "other": [1, 2, 3]}), path)
    assert read_prompt_file(path) == [words.strip()] * 3
    parquet.write_table(pa.table({"text": [b"x" * 1000]}), path)
    with pytest.raises(SettingsError, match=r"text: expected text, got b'xx") as error:
        read_prompt_file(path)
    assert len(str(error.value)) < 200 + len(str(path))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\n \n", "at least one prompt"),
        (b"", "at least one prompt"),
        (b"\xef\xbb\xbf", "at least one prompt"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"caf\xe9", "UTF-8"),
        ("a fox\nan owl\n".encode("utf-16-le"), "line 1: expected text, got a NUL"),
        (b"a fox\n" + b"x" * 70_000, "line 2: expected at most 65536 characters"),
    ],
)
def test_prompt_files_of_no_use(tmp_path, content, told):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=f"prompts: .*prompts.txt.*{told}"):
        read_prompts(str(path))
