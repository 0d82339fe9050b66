"""VBench's arithmetic, files and tool, beside a published row and a stand-in for its package."""

import json
import sys

import pytest
import typer

from stream_r1.config import SettingsError
from stream_r1.evaluation import vbench_env
from stream_r1.evaluation.plan import load
from stream_r1.evaluation.vbench import DIMENSIONS, read_prompt_list, read_results, totals
from stream_r1.evaluation.vbench_tool import ToolFailedError, missing_dimensions, run_dimension
from stream_r1.files import FileError

# ModelScope on VBench's leaderboard, per cent, in the order of DIMENSIONS
MODELSCOPE = (
    89.87, 95.29, 98.28, 95.79, 66.39, 52.06, 58.57,
    82.25, 38.98, 92.40, 81.72, 33.68, 39.26, 23.39, 25.37, 25.67,
)  # fmt: skip
INFO = [
    {"prompt_en": "a cat, at rest", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a red apple", "dimension": ["color", "scene"]},
    {"prompt_en": "a cat, at rest", "dimension": ["scene"]},
]
# A package of the same name and interface as the tool's, which scores by what it finds
PACKAGE = """
import json, os
class VBench:
    def __init__(self, device, full_info, out):
        self.full_info, self.out = full_info, out
    def evaluate(self, videos_path, name, dimension_list):
        entries = [e for e in json.load(open(self.full_info)) if dimension_list[0] in e["dimension"]]
        names = [e["prompt_en"] + f"-{i}.mp4" for e in entries for i in range(5)]
        found = [name for name in names if os.path.isfile(os.path.join(videos_path, name))]
        if not found:
            raise ValueError("no video of " + dimension_list[0])
        each = [{"video_path": os.path.join(videos_path, one), "video_results": False} for one in found]
        result = {dimension_list[0]: [len(found) / 10, each]}
        json.dump(result, open(os.path.join(self.out, name + "_eval_results.json"), "w"))
"""


def test_totals_are_those_of_the_leaderboard():
    scores = {name: value / 100 for name, value in zip(DIMENSIONS, MODELSCOPE, strict=True)}
    found = totals(scores)
    # the scores are rounded to .005 and their ranges are down to .29 wide
    assert [100 * value for value in found] == pytest.approx([78.05, 66.54, 75.75], abs=0.01)
    del scores["scene"]
    assert totals(scores) is None


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "vbench").mkdir()
    (tmp_path / "vbench" / "VBench_full_info.json").write_text(json.dumps(INFO))
    (tmp_path / "model").mkdir()
    path = tmp_path / "eval.yaml"
    path.write_text(
        f"models: {{m: {{folder: {tmp_path / 'model'}}}}}\nprompts: vbench\nvideos: 2\nparts: [vbench]\n"
        f"vbench: {{full_info: {tmp_path}, python: {sys.executable}, dimensions: [scene, color]}}\n"
        f"out: {tmp_path / 'out'}\n"
    )
    return path


def test_the_tool_finds_the_videos_by_name_and_its_results_are_read(recipe, tmp_path, monkeypatch):
    (tmp_path / "package" / "vbench").mkdir(parents=True)
    (tmp_path / "package" / "vbench" / "__init__.py").write_text(PACKAGE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "package"))
    evaluation = load(recipe)
    assert [video.name for video in evaluation.videos] == [
        "a red apple-0.mp4", "a red apple-1.mp4", "a cat, at rest-0.mp4", "a cat, at rest-1.mp4",
    ]  # fmt: skip
    with pytest.raises(ToolFailedError, match=r"scene of m: .*(No such file|no video of scene)"):
        run_dimension(evaluation, "m", "scene")
    for video in evaluation.videos:
        path = evaluation.file("m", video)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for dimension in missing_dimensions(evaluation, "m"):
        run_dimension(evaluation, "m", dimension)
    assert missing_dimensions(evaluation, "m") == []
    assert read_results(evaluation.vbench_results("m")) == {"color": 0.2, "scene": 0.4}


def test_flickering_is_refused_without_a_gpu_before_anything_is_made(recipe):
    text = recipe.read_text().replace("[scene, color]", "[temporal_flickering], device: cpu")
    recipe.write_text(text)
    with pytest.raises(SettingsError, match=r"device: expected cuda for temporal_flickering.*got .?cpu"):
        load(recipe)
    recipe.write_text(text.replace(f"python: {sys.executable}, ", ""))  # results from elsewhere
    assert load(recipe).settings.vbench.python is None


@pytest.mark.parametrize(("script", "got"), [("exit 127", "which does not run"), ("echo 3.13", "got 3.13")])
def test_an_environment_is_made_with_a_python_that_runs_and_fits(script, got, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    with pytest.raises(
        typer.BadParameter, match=rf"expected 3\.9 or 3\.10, got .*{got.removeprefix('got ')}"
    ):
        vbench_env.main(tmp_path / "env", python=str(python))
    assert not (tmp_path / "env").exists()


@pytest.mark.parametrize("content", ['{"scene": []}', '{"scenery": [0.5, []]}', "[0.5]", '{"scene": [nan'])
def test_damaged_results_are_refused(tmp_path, content):
    (tmp_path / "scene_eval_results.json").write_text(content)
    with pytest.raises(FileError, match=r"scene_eval_results\.json"):
        read_results(tmp_path)


def test_prompts_that_can_not_name_a_file_are_refused(tmp_path):
    path = tmp_path / "VBench_full_info.json"
    for prompt in ("a/b", "x" * 250):
        path.write_text(json.dumps([{"prompt_en": prompt, "dimension": ["scene"]}]))
        with pytest.raises(FileError, match="entry 0: expected a prompt that can name a file"):
            read_prompt_list(tmp_path)
