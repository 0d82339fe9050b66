"""The check of a GPU where there is none: stages say why, a stand-in runs them, what dies costs itself."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import fit, page, records, runner
from benchmarks.gpu_check.context import CannotRunError, Context
from benchmarks.gpu_check.ops import errors, ops
from benchmarks.gpu_check.plan import BUDGET, NAMES, STAGES, Stage
from benchmarks.gpu_check.records import Record
from benchmarks.gpu_check.sizes import SMALL
from benchmarks.gpu_check.stages import tests as tests_stage
from benchmarks.gpu_check.summary import summary
from stream_r1.estimate.devices import DEVICES
from stream_r1.estimate.roofline import ASSUMED
from stream_r1.estimate.work import Work

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def context(stage: str, out: Path, seconds: float = 100) -> Context:
    return Context(stage, CPU, out, time.time() + seconds)


def found(out: Path) -> list[Record]:
    return records.read(out / "results.jsonl")


def test_deadlines_follow_each_other_and_the_budget() -> None:
    untils = [stage.until for stage in STAGES]
    assert untils == sorted(untils)
    assert untils[-1] == BUDGET
    assert STAGES[-1].deadline(60) == 60


def test_architectures_are_those_with_their_own_instructions() -> None:
    capabilities = ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
    assert [gpu_check.arch_of(each) for each in capabilities] == ["80", "89", "90a", "100a", "120"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_stage_says_so_and_the_run_goes_to_its_end(tmp_path: Path) -> None:
    assert gpu_check.main(["--out", str(tmp_path), "--stages", "ceilings,accuracy,counters"]) == 3
    ended = records.ends(found(tmp_path))
    assert list(ended) == ["ceilings", "accuracy", "counters"]
    assert all(end["rc"] == records.CANNOT_RUN and "finds no GPU" in end["why"] for end in ended.values())
    assert (tmp_path / "summary.md").read_text().count("could not run") == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stages", "ceilings,speed"], "'speed'"),
        (["--budget", "0"], "--budget"),
        (["--extension", "nowhere"], "_C*.so"),
        (["--page-only"], "--page FILE"),
        (["--page", "."], "--page: expected a file"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_check.main([*arguments, "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """What the stages find on a CPU, at small sizes."""
    out = tmp_path_factory.mktemp("stand-in")
    for name in ("environment", "ceilings", "accuracy", "timings", "sampler", "profile", "training"):
        importlib.import_module(f"benchmarks.gpu_check.stages.{name}").run(context(name, out))
    return found(out)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_stages_run_on_a_stand_in(stand_in: list[Record]) -> None:
    assert [r["name"] for r in records.of_kind(stand_in, "sdpa")] == ["sampling", "teacher"]
    accuracy = records.of_kind(stand_in, "accuracy")
    assert {r["op"] for r in accuracy if r["right"]} >= {case.op for case in ops(SMALL)}
    assert all(r["right"] for r in accuracy if r["backend"] in ("cpu", "sdpa", "reference"))
    timed = [r for r in records.of_kind(stand_in, "timing") if r["seconds"]]
    assert {r["case"] for r in timed if r["backend"] == "cpu"} == {case.name for case in ops(SMALL)}
    assert all(r["seconds"] >= r["best"] > 0 and r["error"] < 0.02 for r in timed)
    streams = records.of_kind(stand_in, "sampler")
    assert {(r["decoder"], r["fps"] is None) for r in streams if not r["cuda_graph"]} == {
        ("taehv", False),
        ("wan", False),
    }
    assert all("CUDA" in r["why"] for r in streams if r["cuda_graph"])
    assert all(r["kernels"] for r in records.of_kind(stand_in, "profile"))
    alone, sharded = records.of_kind(stand_in, "training")
    assert alone["loss"] == pytest.approx(sharded["loss"], rel=0.02)
    assert records.of_kind(stand_in, "sharded")[0]["right"]


def test_a_wrong_result_is_seen() -> None:
    case = next(iter(ops(SMALL)))
    inputs = case.inputs(CPU, torch.float32)
    expected = case.expected(inputs)
    got = case.results(case.backends(inputs)["cpu"], inputs)
    assert max(errors(got, expected)) < 1e-5
    assert max(errors((got[0] + 0.1 * expected[0].abs().max(),), expected)) > 0.09
    assert errors((torch.full_like(got[0], torch.nan),), expected) == [float("inf")]


def test_a_line_that_a_kill_broke_off_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    records.append(file, {"stage": "a", "kind": "copy"})
    with file.open("a") as opened:
        opened.write('{"stage": "b", "ki')
    assert records.read(file) == [{"stage": "a", "kind": "copy"}]


def stages_of_code(monkeypatch: pytest.MonkeyPatch, codes: dict[str, str]) -> None:
    """Runs this code in place of stages."""
    real = runner.Runner._start

    def start(self: runner.Runner, name: str, command: list[str], environment: dict[str, str]):  # type: ignore[no-untyped-def]
        return real(self, name, [sys.executable, "-c", codes[name]], environment)

    monkeypatch.setattr(runner.Runner, "_start", start)


def test_a_stage_that_crashes_or_hangs_with_its_children_ends_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child"
    hangs = (
        "import subprocess, sys, time; "
        f"p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        f"open({str(child)!r}, 'w').write(str(p.pid)); time.sleep(60)"
    )
    codes = {"crash": "import os; os.abort()", "hang": hangs, "good": "pass", "build": "raise SystemExit(4)"}
    stages_of_code(monkeypatch, codes)
    run = runner.Runner(tmp_path, BUDGET / 100, "cpu", (["ignored"], {}))
    # in hundredths of a second: late enough for a busy machine to come to an end by itself
    stages = [Stage("crash", 500, ""), Stage("hang", 600, ""), Stage("good", 9000, "")]
    assert not run.run(stages)
    ended = records.ends(found(tmp_path))
    assert list(ended) == ["build", "crash", "hang", "good"]
    assert [end["rc"] for end in ended.values()] == [4, -signal.SIGABRT, records.TIMED_OUT, 0]
    assert ended["hang"]["why"] == "past its deadline"
    for _ in range(200):  # the child that it left goes with its group, when its parent's parent sees it
        if not _alive(int(child.read_text())):
            break
        time.sleep(0.05)
    assert not _alive(int(child.read_text()))
    assert "| build | the extension | failed (4) |" in summary(found(tmp_path))


def _alive(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_run_that_is_killed_leaves_what_it_had(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*command, "--stages", "ceilings,sampler"], cwd=ROOT, env=environment)
    results = tmp_path / "results.jsonl"
    for _ in range(600):
        if results.exists() and "rc" in results.read_text():
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert {r["kind"] for r in found(tmp_path) if "kind" in r} >= {"copy", "matmul", "matmul8", "launch"}
    assert "ceilings" in (tmp_path / "summary.md").read_text()


def test_a_test_that_hangs_or_crashes_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "suite"
    folder.mkdir()
    (folder / "test_some.py").write_text(
        "import os, time\n"
        "def test_good(): pass\n"
        "def test_hangs(): time.sleep(60)\n"
        "def test_crashes(): os.abort()\n"
        "def test_fails(): assert 1 == 2\n"
        "def test_last(): pass\n"
    )
    monkeypatch.setattr(tests_stage, "FOLDER", str(folder))
    monkeypatch.setattr(tests_stage, "SECONDS", 2.0)
    monkeypatch.setattr(tests_stage.os, "cpu_count", lambda: 2)
    with pytest.raises(RuntimeError, match="3 of 5 tests"):
        tests_stage.run(context("tests", tmp_path))
    outcomes = {r["name"].rpartition("::")[2]: r["outcome"] for r in records.of_kind(found(tmp_path), "test")}
    assert outcomes.pop("test_hangs") == "timed out"
    assert outcomes.pop("test_crashes") == f"its process ended with {-signal.SIGABRT}"
    assert outcomes == {"test_good": "passed", "test_fails": "failed", "test_last": "passed"}


def test_tests_of_gpus_need_torch_and_pytest_alone(tmp_path: Path) -> None:
    hidden = (
        "diffusers",
        "transformers",
        "pydantic",
        "av",
        "typer",
        "rich",
        "yaml",
        "PIL",
        "accelerate",
        "peft",
    )
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({hidden}))\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", *tests_stage.OPTIONS, "-x", "-k", "stream or one_piece or dmd"]
    done = subprocess.run(
        [*command, "tests/gpu"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    imports = "import benchmarks.gpu_check.stages." + ", benchmarks.gpu_check.stages.".join(NAMES)
    done = subprocess.run(
        [sys.executable, "-c", imports],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_what_needs_a_gpus_tools_says_which(tmp_path: Path) -> None:
    for name in ("sanitizer", "counters"):
        stage = importlib.import_module(f"benchmarks.gpu_check.stages.{name}")
        with pytest.raises(CannotRunError, match=r"compute-sanitizer|ncu|Nsight"):
            stage.run(context(name, tmp_path))


def measured() -> list[Record]:
    """Of a made-up H100 that reaches round shares of its datasheet."""
    h100 = DEVICES["H100"]
    matmul = {"kind": "matmul", "stage": "ceilings", "best": 1.0}
    timing = {
        "kind": "timing",
        "stage": "timings",
        "op": "cached_chunk_attention",
        "case": "cached_chunk_attention",
    }
    return [
        {"kind": "device", "stage": "environment", "name": "NVIDIA H100 80GB HBM3"},
        {"kind": "copy", "stage": "ceilings", "bytes": int(0.9 * h100.bandwidth), "seconds": 1.0},
        {**matmul, "shape": [8, 8, 8], "flops": int(0.9 * h100.matmul16), "seconds": 1.0},
        {**matmul, "shape": [128 * 132, 8, 128], "flops": int(0.4 * h100.matmul16), "seconds": 1.0},
        {**matmul, "shape": [128 * 132, 8, 256], "flops": int(0.9 * h100.matmul16), "seconds": 1.0},
        {
            **matmul,
            "kind": "matmul8",
            "shape": [128 * 132, 8, 128],
            "flops": 1979 * 10**12 // 2,
            "seconds": 1.0,
        },
        {"kind": "launch", "stage": "ceilings", "seconds": 3e-6},
        {**timing, "backend": "sdpa", "flops": int(0.5 * h100.matmul16), "seconds": 1.0, "error": 0.001},
        {
            **timing,
            "backend": "sdpa cuDNN",
            "flops": int(0.7 * h100.matmul16),
            "seconds": 1.0,
            "error": 0.001,
        },
        {**timing, "backend": "cuda", "flops": int(0.3 * h100.matmul16), "seconds": 1.0, "error": 0.1},
        {"kind": "sampler", "stage": "sampler", "decoder": "wan", "fps": 30.0, "decode": 0.25},
    ]


def test_assumptions_are_fitted_to_what_was_measured() -> None:
    h100 = DEVICES["H100"]
    assert fit.known_device(measured()) is h100
    convolution = Work("aten.convolution", "convolution", torch.bfloat16, int(0.2 * h100.matmul16 / 4), 1)
    copies = Work("aten.copy", "elementwise", torch.bfloat16, 0, int(0.9 * h100.bandwidth / 20))
    got = fit.fitted(measured(), h100, [convolution, copies])
    assert got.memory == pytest.approx(0.9)
    assert got.matmul == pytest.approx(0.6)  # of the real shapes alone
    assert got.matmul8 == pytest.approx(0.5)
    assert got.kernel == 3e-6
    assert got.library_attention[9, 0] == pytest.approx(0.7)
    assert got.own_attention[9, 0] == pytest.approx(0.3)
    assert got.convolution == pytest.approx(0.05 / 0.2)  # 0.25 s less 0.05 s of copies
    assert got.library_attention[8, 0] == ASSUMED.library_attention[8, 0]
    assert fit.fitted([], h100) == ASSUMED


def test_the_page_has_a_section_a_machine(stand_in: list[Record], tmp_path: Path) -> None:
    file = tmp_path / "gpu-measured.md"
    file.write_text(f"{page.HEAD}\n{page.NOBODY}\n")
    page.put_section(file, "## GPU A\n\nbefore\n")
    page.put_section(file, page.section(stand_in))
    page.put_section(file, "## GPU A\n\nafter it\n")
    text = file.read_text()
    assert text.startswith(page.HEAD)
    assert page.NOBODY not in text
    assert "before" not in text
    assert text.index("after it") > text.index("A stream whose window is full:")
    rows = [line for line in text.splitlines() if line.startswith("| `gated_add`")]
    assert len(rows) == 1
    assert json.loads(json.dumps(stand_in)) == stand_in
