"""Whether the CUDA kernels are built, for which GPUs, and what is said when they are not."""

from pathlib import Path

import pytest

from build_support import cuda


@pytest.fixture
def fake_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CUDA_HOME with a complete toolkit, on a machine without a GPU."""
    for name in ("bin/nvcc", "lib64/libcudart_static.a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("STREAM_R1_CUDA", raising=False)
    monkeypatch.setattr(cuda, "_has_gpu", lambda: False)
    return tmp_path


@pytest.fixture
def no_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_toolkit", lambda: None)
    monkeypatch.delenv("STREAM_R1_CUDA", raising=False)


def test_left_out_where_nothing_could_run_them(fake_toolkit: Path) -> None:
    assert cuda.decide(None) == (
        None,
        "there is no GPU here and torch has no CUDA; STREAM_R1_CUDA=1 builds the kernels all the same",
    )


def test_built_where_something_can_run_them(fake_toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit, why = cuda.decide("13.0")
    assert toolkit is not None
    assert toolkit.nvcc == fake_toolkit / "bin/nvcc"
    assert why == ""
    monkeypatch.setattr(cuda, "_has_gpu", lambda: True)
    assert cuda.decide(None)[0] is not None


def test_the_environment_decides(fake_toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAM_R1_CUDA", "1")
    assert cuda.decide(None)[0] is not None
    monkeypatch.setenv("STREAM_R1_CUDA", "0")
    assert cuda.decide("13.0") == (None, "STREAM_R1_CUDA=0")
    monkeypatch.setenv("STREAM_R1_CUDA", "yes")
    with pytest.raises(RuntimeError, match="STREAM_R1_CUDA: expected 0 or 1, got 'yes'"):
        cuda.decide("13.0")


@pytest.mark.usefixtures("no_toolkit")
def test_without_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit, why = cuda.decide("13.0")
    assert toolkit is None
    assert "nvcc was not found" in why
    monkeypatch.setenv("STREAM_R1_CUDA", "1")
    with pytest.raises(RuntimeError, match="STREAM_R1_CUDA=1, but nvcc was not found"):
        cuda.decide("13.0")


def test_without_the_static_runtime(fake_toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fake_toolkit / "lib64/libcudart_static.a").unlink()
    assert "no libcudart_static.a" in cuda.decide("13.0")[1]


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAM_R1_CUDA_ARCHS", "80; 90a,120")
    assert cuda.archs() == ["80", "90a", "120"]
    assert cuda.arch_flags(["80", "120"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    for wrong in ("", "sm_80", "80;ampere"):
        monkeypatch.setenv("STREAM_R1_CUDA_ARCHS", wrong)
        with pytest.raises(ValueError, match="STREAM_R1_CUDA_ARCHS: expected capabilities"):
            cuda.archs()
