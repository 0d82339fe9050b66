"""What is chosen by device; without a GPU, for the functions that choose are given one by name."""

from __future__ import annotations

import pytest
import torch

from stream_r1.devices import decoding_dtype, has_fast_bfloat16, tuned_convolutions

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16), ((12, 0), torch.bfloat16)],
)
def test_gpus_decode_in_bfloat16_where_they_have_it(
    capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert decoding_dtype(GPU) == decoding_dtype("cuda:0") == decoding_dtype(GPU, small=True) == expected


@pytest.mark.parametrize("there", [{}, {"avx512_bf16": True}, {"amx_bf16": True}])
def test_cpus_decode_in_float32_but_small_assets(
    there: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: there)
    assert has_fast_bfloat16(torch.device("cpu")) == bool(there)
    assert decoding_dtype("cpu") == decoding_dtype("meta", small=True) == torch.float32
    assert decoding_dtype("cpu", small=True) == (torch.bfloat16 if there else torch.float32)


def test_convolutions_are_tuned_on_gpus_and_the_setting_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn = torch.backends.cudnn
    for before in (False, True):
        monkeypatch.setattr(cudnn, "benchmark", before)
        with tuned_convolutions(GPU):
            assert cudnn.benchmark
        assert cudnn.benchmark is before
        with tuned_convolutions(torch.device("cpu")):
            assert cudnn.benchmark is before
    monkeypatch.setattr(cudnn, "benchmark", False)
    with pytest.raises(ZeroDivisionError), tuned_convolutions(GPU):
        raise ZeroDivisionError
    assert not cudnn.benchmark
    monkeypatch.setattr(cudnn, "deterministic", True)  # who wants the same bits every time gets them
    with tuned_convolutions(GPU):
        assert not cudnn.benchmark
