"""Files that are not what they should be, and arguments: one line that names the file, whatever it is."""

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stream_r1.cli import main
from stream_r1.recipe import load_any

WEIGHTS = "diffusion_pytorch_model.safetensors"
Damage = Callable[[Path], object]


def replaced(make: Callable[[Path], object]) -> Damage:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def flip(at: int) -> Damage:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[at] ^= 0xFF
        path.write_bytes(content)

    return damage


OF_ANY: dict[str, Damage] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 3]),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe\x00" + path.read_bytes()),
    "a folder": replaced(Path.mkdir),
    "a pipe": replaced(lambda path: os.mkfifo(path)),
    "a device": replaced(lambda path: path.symlink_to("/dev/zero")),
    "a loop": replaced(lambda path: path.symlink_to(path)),
    "escape codes": lambda path: path.write_text("\x1b[2J\nTraceback (most recent call last)\n" * 3),
}


def json_with(**changes: object) -> Damage:
    def damage(path: Path) -> None:
        content = json.loads(path.read_text())
        content.update(changes)
        path.write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))

    return damage


OF_JSON: dict[str, Damage] = {
    "deep": lambda path: path.write_text('{"a":' * 100_000),
    "nan": lambda path: path.write_text(path.read_text().replace("{", '{"x": NaN,', 1)),
    "too large a number": lambda path: path.write_text(path.read_text().replace("{", '{"x": 1e400,', 1)),
    "digits": lambda path: path.write_text(path.read_text().replace("{", '{"x": ' + "9" * 5000 + ",", 1)),
    "twice": lambda path: path.write_text(path.read_text().replace("{", '{"x": 1, "x": 2,', 1)),
    "a list": lambda path: path.write_text("[1, 2]"),
}
OF_SIZES: dict[str, Damage] = {  # of a transformer
    "10^12 layers": json_with(num_layers=10**12),
    "more layers than weights": json_with(num_layers=1000),
    "a wide model": json_with(num_attention_heads=1024, attention_head_dim=1024, ffn_dim=2**20),
    "a text as a size": json_with(ffn_dim="16"),
    "true as a size": json_with(num_layers=True),
    "no whole number": json_with(text_dim=384.5),
    "a negative size": json_with(in_channels=-4),
    "a patch of nothing": json_with(patch_size=[1, 0, 2]),
    "a short patch": json_with(patch_size=[2]),
    "a list of sizes": json_with(freq_dim=[16]),
    "another class": json_with(_class_name=["x" * 9999]),
}


def with_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(path: Path) -> None:
        tensors = {name: t.clone() for name, t in load_file(path).items()}
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        change(tensors)
        save_file(tensors, path, metadata=metadata)

    return damage


def first(tensors: dict[str, torch.Tensor]) -> str:
    return max(tensors, key=lambda name: (tensors[name].numel(), name))


def header(length: int, text: bytes = b"{}") -> Damage:
    return lambda path: path.write_bytes(struct.pack("<Q", length) + text)


OF_TENSORS: dict[str, Damage] = {
    "a long header": header(2**60),
    "no header": header(2, b"{]"),
    "a header in part": flip(3),
    "a place beyond": header(
        68, b'{"a":{"dtype":"F32","shape":[9999999999],"data_offsets":[0,99999999]}}'[:68]
    ),
    "nan": with_tensors(lambda t: t.update({first(t): t[first(t)] * torch.nan})),
    "infinite": with_tensors(lambda t: t.update({first(t): t[first(t)] + torch.inf})),
    "one missing": with_tensors(lambda t: t.pop(first(t))),
    "one of another shape": with_tensors(lambda t: t.update({first(t): t[first(t)][..., None].clone()})),
    "one of whole numbers": with_tensors(lambda t: t.update({first(t): t[first(t)].long()})),
}
EXTRA: dict[str, Damage] = {"one too many": with_tensors(lambda t: t.update({"x\x1b[31my": torch.ones(2)}))}

RECIPES = {
    "aliases": "a0: &a0 [x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 12)),
    "within itself": "a: &a [*a]\n",
    "deep": "[" * 5000,
    "code": "out: !!python/object/apply:os.system [ls]\n",
    "a key that is a list": "? [1]\n: 2\n",
    "digits": "steps: " + "9" * 6000,
    "hexadecimal digits": "steps: 0x" + "f" * 9000,
    "1e400": "steps: 1e400",
    "nan": "student: {lr: .nan}",
    "too long": "x" * 300_000,
    "long text": f"steps: {'z' * 9999}",
    "no date": "out: 2001-99-01",
    "many keys": "\n".join(f"k{i}: {i}" for i in range(3000)),
    "a base of text": "base: /etc/passwd",
    "a base of zeros": "base: /dev/zero",
    "a base of secrets": "base: secret.yaml",
    "a base that is a list": "base: [a]",
    "its own base": "base: it.yaml",
    "a zero byte": 'base: "a\\0b"',
    "bases without end": "base: base-99.yaml",
    "a kind that is a list": "kind: [distill]",
}
SETTINGS = [
    "rollout.frames=99999999999", "rollout.height=4096 rollout.width=4096 rollout.frames=9999", "steps=true",
    "steps=1e400", "steps=0x" + "f" * 50, "student.lr=1e999", "student.lr=.inf", "batch=10000000000",
    "rollout.length=[3, 99999999999]", "weighting.history=99999999999", "stream.window_frames=99999999999",
    "distributed.timeout_minutes=1e300", "rollout.steps=[" + "1," * 2000 + "1]", "a" * 9999 + "=1",
    ".".join("a" * 9999) + "=1", "steps=[[[[", "steps='\x1b[31m'", "models={student: 1}", "=1", "prompts=[a]",
]  # fmt: skip
ARGUMENTS = [
    ("sample",), ("sample", "x", "--scale", "0"), ("sample", "x", "--size", "64x112", "--scale", "99999999"),
    ("sample", "x", "--seconds", "nan"), ("sample", "x", "--seconds", "1e400"), ("sample", *("x" * 300)),
    ("sample", "x", "--size", "99999999x99999999"), ("sample", "x", "--size", "0x0"),
    ("sample", "x", "--size", "1" * 5000 + "x8"), ("sample", "x", "--dtype", "int7"),
    ("sample", "x", "--device", "mars"), ("sample", "x", "--decoder", "taehv:/nowhere"),
    ("sample", "x", "--seed", "-1"), ("estimate", "{recipe}", "--gpus", "0"),
    ("estimate", "{recipe}", "--gpus", "9" * 30), ("estimate", "{recipe}", "--device", "y" * 9999),
    ("replay",), ("replay", "/nowhere"), ("replay", "{golden}", "--tolerance", "-1"), ("data",),
    ("data", "nonsense"), ("nonsense\n\x1b[31m",), ("train",), ("train", "/nowhere.yaml"),
    ("info", "/nowhere"), ("demo", "--set", "chunks=0"), ("demo", "--set", "chunks=99999999999"),
    ("demo", "--set", "budget=nan"), ("data", "ode-pairs", "{recipe}"),
]  # fmt: skip


class Product:
    """The command line over a copy of the world, of which each case damages a file."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capfd = folder, capfd

    def refuse(self, arguments: list[str], named: str) -> str:
        """Runs a command that must end in 2 with one line, in which is `named`; gives the line."""
        self.capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main(arguments)
        shown = self.capfd.readouterr().err
        assert end.value.code == 2, shown
        assert shown.startswith("stream-r1: "), shown
        assert shown.count("\n") == 1, shown
        assert shown.endswith("\n"), shown
        assert shown[:-1].isprintable(), shown
        assert len(shown) < 2200, shown
        for advice in ("Traceback", "weights_only", "trust_remote_code", "--debug", "C++", "frame #"):
            assert advice not in shown, shown
        assert named in shown
        return shown


@pytest.fixture
def product(original: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Product:
    shutil.copytree(original, tmp_path / "copy")
    for file in (tmp_path / "copy").glob("*.yaml"):
        file.write_text(file.read_text().replace(str(original), str(tmp_path / "copy")))
    return Product(tmp_path / "copy", capfd)


def _with_adapter(at: Path) -> list[str]:
    return ["sample", "x", "--models", str(at), "--adapter", str(at / "adapter"), "--out", str(at / "x.mp4")]


def _with_videoalign(at: Path) -> list[str]:
    return ["train", str(at / "recipe.yaml"), f"models.reward={at / 'videoalign' / 'VideoReward'}"]


# What a command reads first of all it reads; the part of its path that must be named.
READERS: dict[str, tuple[str, dict[str, Damage], Callable[[Path], list[str]]]] = {
    "recipe": ("recipe.yaml", OF_ANY, lambda at: ["train", str(at / "recipe.yaml"), "--check"]),
    "recipe of a prediction": ("recipe.yaml", OF_ANY, lambda at: ["estimate", str(at / "recipe.yaml")]),
    "configuration": (
        "student/config.json",
        OF_ANY | OF_JSON | OF_SIZES,
        lambda at: ["sample", "x", "--models", str(at), "--out", str(at / "x.mp4")],
    ),
    "checked configuration": (
        "teacher/config.json",
        OF_ANY | OF_JSON,
        lambda at: ["train", str(at / "recipe.yaml"), "--check"],
    ),
    "described configuration": ("vae/config.json", OF_ANY | OF_JSON, lambda at: ["info", str(at / "vae")]),
    "weights": (
        f"student/{WEIGHTS}",
        OF_ANY | OF_TENSORS | EXTRA,
        lambda at: ["sample", "x", "--models", str(at), "--out", str(at / "x.mp4")],
    ),
    "described weights": (
        f"student/{WEIGHTS}",
        {"header": header(2**60), "empty": OF_ANY["empty"], "cut": OF_ANY["cut"]},
        lambda at: ["info", str(at / "student" / WEIGHTS)],
    ),
    "checkpoint": (
        "student.pt",
        OF_ANY,
        lambda at: ["sample", "x", "--models", str(at), "--checkpoint", str(at / "student.pt"),
                    "--out", str(at / "x.mp4")],
    ),
    "recording": (
        "golden.safetensors",
        OF_ANY | OF_TENSORS,
        lambda at: ["replay", str(at / "golden.safetensors")],
    ),
    "adapter's configuration": ("adapter/adapter_config.json", OF_ANY | OF_JSON, _with_adapter),
    "adapter": ("adapter/adapter_model.safetensors", OF_ANY | OF_TENSORS | EXTRA, _with_adapter),
    "tiny autoencoder": (
        "taehv.safetensors",
        OF_ANY | OF_TENSORS | EXTRA,
        lambda at: ["sample", "x", "--models", str(at), "--decoder", f"taehv:{at / 'taehv.safetensors'}",
                    "--out", str(at / "x.mp4")],
    ),
    "trajectories": (
        "pairs/pairs-000000.safetensors",
        OF_ANY | OF_TENSORS,
        lambda at: ["train", str(at / "start.yaml")],
    ),
    "VideoAlign's configuration": (
        "videoalign/VideoReward/model_config.json",
        OF_ANY | OF_JSON,
        _with_videoalign,
    ),
    "VideoAlign's settings": ("videoalign/VideoReward/config.json", OF_ANY | OF_JSON, _with_videoalign),
    "VideoAlign's instruction": ("videoalign/VideoReward/instruction.txt", OF_ANY, _with_videoalign),
    "VideoAlign's weights": (
        "videoalign/VideoReward/checkpoint-20/model.safetensors",
        OF_ANY | OF_TENSORS | EXTRA,
        _with_videoalign,
    ),
    "VideoAlign's base model": (
        "videoalign/base/config.json",
        OF_ANY | OF_JSON | {"10^12 layers": json_with(num_hidden_layers=10**12),
                            "more layers than weights": json_with(num_hidden_layers=1000)},
        _with_videoalign,
    ),
    "VideoAlign's tokenizer": ("videoalign/base/tokenizer.json", OF_ANY | OF_JSON, _with_videoalign),
}  # fmt: skip
CASES = [(reader, damage) for reader, (_, damages, _) in READERS.items() for damage in damages]


@pytest.mark.parametrize(("reader", "damage"), CASES, ids=[" - ".join(case) for case in CASES])
def test_a_damaged_file_is_one_line(product: Product, reader: str, damage: str) -> None:
    name, damages, arguments = READERS[reader]
    damages[damage](product.folder / name)
    product.refuse(arguments(product.folder), Path(name).parts[0])


@pytest.mark.parametrize("name", RECIPES)
def test_a_hostile_recipe_is_one_line_and_tells_nothing_of_other_files(product: Product, name: str) -> None:
    (product.folder / "it.yaml").write_text(RECIPES[name])
    line = product.refuse(["train", str(product.folder / "it.yaml"), "--check"], ".yaml")
    assert not re.search(r"root:|hunter2|password", line)


@pytest.mark.parametrize("overrides", SETTINGS, ids=lambda text: text[:40])
def test_hostile_settings_are_one_line(product: Product, overrides: str) -> None:
    recipe = str(product.folder / "recipe.yaml")
    product.refuse(["train", recipe, "--check", *re.split(r" (?=\S+=)", overrides)], "override")


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda a: " ".join(a)[:40])
def test_hostile_arguments_are_one_line(product: Product, arguments: tuple[str, ...]) -> None:
    files = {
        "recipe": str(product.folder / "recipe.yaml"),
        "golden": str(product.folder / "golden.safetensors"),
    }
    product.refuse([argument.format(**files) if "{" in argument else argument for argument in arguments], "")


def index_of(shard: object) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).rename(folder / "a.safetensors")
        told = {"weight_map": dict.fromkeys(tensors, shard)}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(told))

    return damage


def linked_out(folder: Path) -> None:
    index_of("b.safetensors")(folder)
    (folder / "a.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "b.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")


INDICES: dict[str, tuple[Damage, str]] = {
    "above": (index_of("../teacher/x.safetensors"), "../teacher"),
    "absolute": (index_of("/etc/passwd"), "/etc/passwd"),
    "a number": (index_of(3), "3"),
    "no weights": (index_of("config.json"), "config.json"),
    "a link out": (linked_out, "elsewhere"),
    "not there": (index_of("c.safetensors"), "c.safetensors"),
    "another name": (
        lambda folder: (
            index_of("a.safetensors")(folder),
            with_tensors(lambda t: t.update(other=torch.ones(1)))(folder / "a.safetensors"),
        ),
        "other",
    ),
    "a list": (
        lambda folder: (folder / f"{WEIGHTS}.index.json").write_text('{"weight_map": [1]}'),
        "weight_map",
    ),
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_names_files_of_its_folder_only(product: Product, name: str) -> None:
    damage, told = INDICES[name]
    damage(product.folder / "student")
    out = ["--out", str(product.folder / "x.mp4")]
    line = product.refuse(["sample", "x", "--models", str(product.folder), *out], "student")
    assert told in line


def test_a_hub_cache_s_links_are_followed(tmp_path: Path) -> None:
    from stream_r1.models.weight_files import read_tensors

    folder = tmp_path / "models--a--b" / "snapshots" / "1234" / "transformer"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    folder.mkdir(parents=True)
    save_file({"x": torch.ones(2)}, tmp_path / "models--a--b" / "blobs" / "5678")
    (folder / "x.safetensors").symlink_to("../../../blobs/5678")
    (folder / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"x": "x.safetensors"}}')
    assert read_tensors(folder)["x"].tolist() == [1, 1]


def test_a_chain_of_bases_is_followed(product: Product) -> None:
    recipe = yaml.safe_load((product.folder / "recipe.yaml").read_text())
    del recipe["steps"]
    (product.folder / "it.yaml").write_text(yaml.safe_dump(recipe | {"base": "base-9.yaml"}))
    assert load_any(product.folder / "it.yaml").steps == 3
