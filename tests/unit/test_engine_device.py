from __future__ import annotations

import os
import sys

import pytest
import torch

from quasr.engine import device as device_module
from quasr.engine.device import choose, device_names, peak_memory, spare_memory
from quasr.errors import MissingDependencyError, OptionError, ResourceError


def fake_cuda(monkeypatch: pytest.MonkeyPatch, count: int, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Fake {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_cpu_is_fp32_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, 0)
    placement = choose()
    assert placement.device == torch.device("cpu")
    assert placement.dtype is torch.float32
    assert placement.dtype_name == "fp32"
    assert "no CUDA device" in placement.reasons[0]


@pytest.mark.parametrize(("capability", "dtype"), [((9, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_gpu_dtype_follows_its_generation(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    fake_cuda(monkeypatch, 2, capability)
    assert choose().device == torch.device("cuda", 0)
    assert choose("cuda:1").device == torch.device("cuda", 1)
    assert choose("cuda").dtype is dtype
    assert choose("cpu").dtype is torch.float32
    assert choose("cuda", "fp32").dtype is torch.float32


def test_missing_device_says_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, 1)
    with pytest.raises(ResourceError, match=r"no device cuda:3 here: there is cpu, cuda:0 \(Fake 0\)"):
        choose("cuda:3")
    fake_cuda(monkeypatch, 0)
    with pytest.raises(ResourceError, match="there is cpu"):
        choose("cuda")


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("tpu", "auto"),
        ("cuda:x", "auto"),
        ("cpu", "int3"),
        ("cuda:-1", "auto"),
        ("cuda:99999999999999999999", "auto"),
        ("cuda:" + "9" * 5000, "auto"),
    ],
    ids=lambda name: name[:12],
)
def test_unknown_names(device: str, dtype: str) -> None:
    with pytest.raises(OptionError, match="unknown"):
        choose(device, dtype)


def test_without_torch_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"quasr\[cuda\]"):
        device_module.choose()


def test_names_and_peak_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, 0)
    assert device_names() == ["cpu"]
    host, gpu = peak_memory("cpu")
    assert gpu is None
    assert host is not None
    assert 2**24 < host < 2**40


def test_a_memory_plan_asks_for_blocks_that_extend_but_not_against_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variable = "PYTORCH_CUDA_ALLOC_CONF"
    monkeypatch.delenv(variable, raising=False)
    spare_memory()
    assert os.environ[variable] == "expandable_segments:True"
    monkeypatch.setenv(variable, "max_split_size_mb:64")
    spare_memory()
    assert os.environ[variable] == "max_split_size_mb:64"
