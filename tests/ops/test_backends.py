"""What can run here, what can't and why, and that every built instruction set computes the same."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stream_r1_kernels import ChunkMask, backends, cached_chunk_attention, chunk_attention, dispatch, info
from stream_r1_kernels.attention import Past
from stream_r1_kernels.schemas import GPU_SCHEMAS, SCHEMAS

EVERY_OP_OF_AN_INSTRUCTION_SET = """
import torch
from stream_r1_kernels import ChunkMask, RotaryGrid, chunk_attention, qk_norm_rotary
from stream_r1_kernels import fused_linear, rms_norm, rms_norm_silu

torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    q, k, v = (torch.randn(2, 120, 3, 33).to(dtype).requires_grad_() for _ in range(3))
    x, weight = torch.randn(2, 12, 60).to(dtype).requires_grad_(), torch.randn(60, requires_grad=True)
    phases = RotaryGrid(20).phases(3, 2, 2, 3)
    results = []
    for backend in ("cpu", "reference"):
        out = chunk_attention(q, k, v, ChunkMask(5, 3, window_frames=6, sink_frames=1), backend=backend)
        rotated = qk_norm_rotary(x, x, weight, weight, *phases, num_heads=3, backend=backend)
        with torch.no_grad():
            linear = fused_linear(x, [x[0, :7]], gelu=True, residual=x[..., :7], backend=backend)
            normed = rms_norm(x, weight, backend=backend)
        active = rms_norm_silu(x, weight, x[:, :2], backend=backend)
        loss = active.float().square().sum() + out.float().square().sum()
        loss = loss + rotated[0].float().pow(3).sum() + rotated[1].float().sum()
        outs = (out, linear, normed, *rotated, active)
        results.append((*outs, *torch.autograd.grad(loss, (q, k, v, x, weight))))
    for a, b in zip(*results):
        unit = torch.finfo(dtype).eps * max(1, b.abs().max().item())
        torch.testing.assert_close(a, b, rtol=4 * unit, atol=8 * unit)
print(torch.ops.stream_r1.cpu_isa())
"""


def best_instruction_set() -> str:
    """What the machine has, whatever these tests run with."""
    code = "import torch, stream_r1_kernels; print(torch.ops.stream_r1.cpu_isa())"
    environment = {name: value for name, value in os.environ.items() if name != "STREAM_R1_ISA"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16", "amx"])
def test_every_instruction_set_that_runs_here(isa: str) -> None:
    environment = {**os.environ, "STREAM_R1_ISA": isa}
    command = [sys.executable, "-c", EVERY_OP_OF_AN_INSTRUCTION_SET]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # a wish for more than the machine has gives what it has
    best = best_instruction_set() if os.environ.get("STREAM_R1_ISA") else torch.ops.stream_r1.cpu_isa()
    order = ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]
    if isa == "amx" and best == "avx512_bf16":  # torch multiplies without tiles then
        best = "amx"
    assert done.stdout.strip() == min(isa, best, key=order.index)


@pytest.mark.parametrize(("wish", "message"), [("AVX2", "got 'AVX2'"), ("sse", "got 'sse'"), ("", None)])
def test_an_unknown_instruction_set_is_an_error(wish: str, message: str | None) -> None:
    code = "import torch, stream_r1_kernels as k; x = torch.ones(1, 2, 4); k.gated_add(x, x, x)"
    environment = {**os.environ, "STREAM_R1_ISA": wish}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if message is None:
        assert done.returncode == 0, done.stderr
    else:
        expected = "ValueError: STREAM_R1_ISA: expected baseline, avx2, avx512, avx512_bf16 or amx, "
        assert expected + message in done.stderr


def test_a_build_for_a_later_torch_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"torch": "3.1.0", "oldest_torch": "3.0", "isa": [], "left_out": {}, "schemas": []}
    monkeypatch.setattr(backends, "read_build_record", lambda: record)
    why = backends._load_extension()
    assert why is not None
    assert "for torch 3.0 and later (built with 3.1.0)" in why
    assert torch.__version__ in why


def test_an_extension_without_its_record_is_explained(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_FOLDER", tmp_path)
    monkeypatch.setenv("STREAM_R1_EXTENSION", str(tmp_path))
    assert backends._load_extension() == (
        f"STREAM_R1_EXTENSION: expected a folder with the extension, _C*.so, got {tmp_path}"
    )
    monkeypatch.delenv("STREAM_R1_EXTENSION")
    assert backends._load_extension() == (
        "the compiled extension is not built: run `pip install -e .` (or install a wheel)"
    )
    (tmp_path / "_C.abi3.so").touch()
    why = backends._load_extension()
    note = tmp_path / "_build.json"
    assert why == f"the compiled extension's {note} is missing or of an older build: build it again"
    record = {"torch": "2.99.1", "oldest_torch": "2.0"}
    note.write_text(json.dumps(record))  # of before it had schemas
    assert backends._load_extension() == why
    note.write_text(json.dumps(record | {"schemas": SCHEMAS}))
    why = backends._load_extension()
    assert why is not None
    assert "built with 2.99.1" in why
    assert f"with torch {torch.__version__}: {tmp_path / '_C.abi3.so'}: file too short" in why


@pytest.mark.parametrize(
    ("built_for", "cuda", "named"),
    [
        ([s.replace("Tensor x, Tensor y", "Tensor y, Tensor x") for s in SCHEMAS], False, "gated_add"),
        (SCHEMAS[1:-1], False, "cpu_isa, dmd_gradient_"),  # the package has gained ops
        ([*SCHEMAS, "roll(Tensor x) -> Tensor"], False, "roll"),  # or lost one
        ([*SCHEMAS, *(s.replace("bool gelu", "int act") for s in GPU_SCHEMAS)], True, "quantize_rows"),
        (SCHEMAS, True, "modulated_norm_fp8, quantize_rows"),
    ],
)
def test_a_build_for_other_schemas_is_refused_before_it_is_loaded(
    built_for, cuda, named, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its kernels, called with other arguments, would fail or compute something else."""
    record = backends.read_build_record()
    assert record is not None  # of the build that runs here, by setup.py
    assert record["schemas"] == [*SCHEMAS, *(GPU_SCHEMAS if "cuda_archs" in record else ())]
    record.pop("cuda_archs", None)
    built = {"schemas": built_for} | ({"cuda_archs": ["80"]} if cuda else {})
    monkeypatch.setattr(backends, "_FOLDER", tmp_path)
    (tmp_path / "_C.abi3.so").touch()  # can't be loaded
    (tmp_path / "_build.json").write_text(json.dumps(record | built))
    assert backends._load_extension() == (
        f"the compiled extension {tmp_path / '_C.abi3.so'} was built for another version of {named} "
        "than this package's: build it again (`pip install -e .` in a checkout)"
    )


@pytest.mark.parametrize("folder", ["empty", "none"])
def test_a_missing_extension_is_an_error_unless_it_is_left_out(folder: str, tmp_path) -> None:
    """Asked for by nobody, plain torch does not stand in for it."""
    code = (
        "import torch, stream_r1_kernels as k; x = torch.ones(1, 2, 4)\n"
        "print(k.gated_add(x, x, x, backend='reference').sum().item())\n"
        "print(k.gated_add(x.double(), x.double(), x.double()).sum().item())\n"
        "print(k.gated_add(x, x, x).sum().item())"
    )
    environment = {**os.environ, "STREAM_R1_EXTENSION": str(tmp_path) if folder == "empty" else "none"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if folder == "none":
        assert done.stdout.split() == ["16.0"] * 3, done.stderr
    else:
        assert done.stdout.split() == ["16.0"] * 2
        assert "RuntimeError: gated_add: backend 'auto': STREAM_R1_EXTENSION: expected" in done.stderr
        assert str(tmp_path) in done.stderr


def test_info_says_what_is_built_and_what_is_left_out() -> None:
    report = info.describe()
    assert "for torch 2.10 and later, with torch 2." in report
    assert ("left out        cuda: " in report) != ("CUDA kernels    " in report)
    rows = {line.split()[0]: line.split()[1:] for line in report.splitlines() if line.strip()}
    assert rows["op"] == ["cpu", "cuda", "triton", "sdpa", "reference"]
    assert rows["cached_chunk_attention"][0] == "yes"
    assert rows["cached_chunk_attention"][3:] == ["yes", "yes"]
    assert rows["gated_add"] == ["yes", rows["gated_add"][1], "-", "-", "yes"]
    assert rows["renew_sink_"][0] == "-"  # in plain torch on CPUs
    assert rows["fused_linear"] == ["yes", "-", "-", "-", "yes"]
    assert rows["rms_norm"] == rows["gated_add"]
    missing = backends.unavailable()
    for name in ("cuda", "triton"):
        assert (f"not {name}: {missing.get(name)}" in report) == (name in missing)


@pytest.fixture
def with_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a build that has them, on a machine with a GPU."""
    monkeypatch.setattr(backends, "_UNAVAILABLE", {})
    monkeypatch.setitem(backends._OPS, "cuda", backends._OPS["cpu"])
    monkeypatch.setattr(backends, "_CUDA_ARCHS", ["80"])


def on_gpu(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device="cuda")


@pytest.mark.usefixtures("with_cuda_kernels")
def test_the_cuda_kernels_are_picked_for_what_they_take() -> None:
    half = on_gpu(1, 4, 2, 64, dtype=torch.bfloat16)
    wide = on_gpu(1, 4, 2, 256, dtype=torch.bfloat16)
    single = on_gpu(1, 4, 2, 64, dtype=torch.float32)
    assert backends.resolve("auto", "cached_chunk_attention", half) == "cuda"
    assert backends.resolve("auto", "cached_chunk_attention", single) == "sdpa"
    assert backends.resolve("auto", "cached_chunk_attention", wide) == "sdpa"
    assert backends.resolve("auto", "modulated_norm", single) == "cuda"
    with pytest.raises(
        TypeError, match=r"'cuda' expects dtype torch.bfloat16, torch.float16; got torch.float32"
    ):
        backends.resolve("cuda", "chunk_attention", single)
    with pytest.raises(ValueError, match="at most 128 channels; got 256"):
        backends.resolve("cuda", "chunk_attention", wide)
    with pytest.raises(RuntimeError, match="needs cuda tensors, got one on cpu"):
        backends.resolve("cuda", "modulated_norm", torch.randn(2))


@pytest.mark.usefixtures("with_cuda_kernels")
def test_a_gpu_that_the_kernels_were_not_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    x = on_gpu(2, 2, 2, dtype=torch.float32)
    assert backends.resolve("auto", "gated_add", x) == "reference"
    with pytest.raises(
        RuntimeError, match=r"compiled for 80, and this GPU has compute capability 7.5: build with"
    ):
        backends.resolve("cuda", "gated_add", x)


def test_a_build_without_cuda_kernels_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"torch": torch.__version__, "isa": [], "left_out": {"cuda": "no nvcc"}}
    monkeypatch.setattr(backends, "read_build_record", lambda: record)
    assert backends._find_unavailable()["cuda"] == "the CUDA kernels were left out of this build: no nvcc"


def test_nothing_imports_triton_until_it_is_chosen() -> None:
    code = "import sys, stream_r1_kernels.info; print([x for x in sys.modules if x.startswith('stream_r1')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "stream_r1_kernels.attention.sdpa" in done.stdout
    assert "triton" not in done.stdout


def test_why_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert backends._find_unavailable()["triton"] == f"torch {torch.__version__} has no CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "triton" not in backends._find_unavailable()
    monkeypatch.setattr(backends.importlib.metadata, "version", lambda name: "3.4.1")
    assert backends._find_unavailable()["triton"] == "Triton 3.4.1 is too old: 3.6 or later is needed"
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert backends._find_unavailable()["triton"] == (
        "Triton is not installed: pip install 'stream-r1[triton]'"
    )


def test_triton_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 4, 2, 64).bfloat16()
    for missing, message in (
        ({"triton": "torch has no CUDA"}, "backend 'triton' can't be used: torch has no CUDA"),
        ({}, "cached_chunk_attention: backend 'triton' needs cuda tensors, got one on cpu"),
    ):
        monkeypatch.setattr(backends, "_UNAVAILABLE", missing)
        with pytest.raises(RuntimeError, match=message):
            cached_chunk_attention(q, q, q, None, backend="triton")


def test_what_the_triton_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public functions, on tensors that are said to be on a GPU."""
    monkeypatch.setattr(backends, "_UNAVAILABLE", {})
    with FakeTensorMode():
        q = torch.empty(2, 6, 3, 48, dtype=torch.bfloat16, device="cuda")
        past = Past(
            *(torch.empty(2, 5, 3, 48, dtype=q.dtype, device="cuda") for _ in "kv"), holds_fresh=False
        )
        out, lse = cached_chunk_attention(q, q, q, past, return_lse=True, backend="triton")
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (2, 3, 6), torch.float32)
        out = chunk_attention(q, q, q, ChunkMask(1, 3), backend="triton")
        assert (out.shape, out.dtype) == (q.shape, q.dtype)
        with pytest.raises(TypeError, match=r"'triton' expects dtype torch.bfloat16, torch.float16; got"):
            chunk_attention(q.float(), q.float(), q.float(), ChunkMask(1, 3), backend="triton")
        wide = torch.empty(1, 6, 3, 256, dtype=torch.bfloat16, device="cuda")
        with pytest.raises(ValueError, match="at most 128 channels; got 256"):
            chunk_attention(wide, wide, wide, ChunkMask(1, 3), backend="triton")
    with pytest.raises(RuntimeError, match="has no kernel of modulated_norm"):
        backends.resolve("triton", "modulated_norm", q)


def test_triton_takes_training_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_UNAVAILABLE", {})
    for cuda in (frozenset(), frozenset(dispatch.OPS)):  # with and without CUDA kernels beside them
        monkeypatch.setitem(backends._OPS, "cuda", cuda)
        with FakeTensorMode():
            q = torch.empty(1, 6, 3, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            for op in dispatch.ATTENTION_OPS:
                assert backends.resolve("auto", op, q) == "triton"


def test_info_says_whose_kernel_torchs_attention_is() -> None:
    lines = info.torch_attention()
    assert len(lines) == 1 + torch.cuda.device_count()
    assert re.fullmatch(r"torch's attention cpu: (\w+), with grad (\w+) \(.*cuDNN.*\)", lines[0])
    names = {kind.lower() for kind in torch.nn.attention.SDPBackend.__members__}
    assert set(re.findall(r"cpu: (\w+), with grad (\w+)", lines[0])[0]) <= names
    assert lines[0] in info.describe()


def test_a_call_is_described_by_its_tensors() -> None:
    q = torch.randn(1, 4, 2, 32, requires_grad=True)
    call = backends.describe_call("cached_chunk_attention", q, None, q.detach()[..., ::2], pieces=2)
    assert call == dispatch.Call("cached_chunk_attention", "cpu", torch.float32, 32, None, True, 2, False)
    with torch.no_grad():
        assert not backends.describe_call("cached_chunk_attention", q).needs_grad
    choice = backends.explain("cached_chunk_attention", q)
    assert (choice.backend, choice.why) == ("cpu", "compiled for this processor")
    assert backends.explain("gated_add", q.double()).refused["cpu"].startswith("expects dtype")
