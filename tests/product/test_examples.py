"""The examples run as they are; the notebook cell by cell, with fewer steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from stream_r1.sampling.video import read_video

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: object, folder: Path) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_stream(tmp_path):
    out = tmp_path / "seen.mp4"
    assert "frames a second" in run("stream.py", out, folder=tmp_path)
    video, _ = read_video(out)
    assert len(video) == 69  # 9 + 5 * 12 frames


def test_weighting(tmp_path):
    lines = run("weighting.py", 2, folder=tmp_path).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["0", "1"]


def test_the_notebook(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in json.loads((EXAMPLES / "distil.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]).replace("steps=30", "steps=2"), names)
    told = capsys.readouterr().out
    assert "student/loss" in told
    assert "after {'presence'" in told
