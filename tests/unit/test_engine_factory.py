"""Which engine is made where."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from quant_samples import network

from quasr.engine import factory
from quasr.engine.device import Placement
from quasr.engine.factory import make_engine
from quasr.errors import OptionError
from quasr.quant.apply import replace_layer

CPU = Placement(torch.device("cpu"), torch.float32, ("a test",))


def test_a_cpu_has_the_torch_engine_and_the_reason() -> None:
    engine = make_engine(network(), (), CPU, "int8")
    assert (engine.info.name, engine.info.scheme) == ("torch", "int8")
    assert engine.info.reasons == ("a test", "the torch engine: the fast engine is made for GPUs")


def test_an_engine_can_be_asked_for() -> None:
    assert make_engine(network(), (), CPU, "none", "fast").info.name == "fast"
    assert make_engine(network(), (), CPU, "none", "torch").info.reasons[-1] == "the torch engine was asked for"


@pytest.mark.parametrize("name", ["decoder.layers.1.mlp.down_proj", "encoder.layers.1.fc2"])
def test_layers_without_kernels_name_themselves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    monkeypatch.setattr(factory, "_why_not_fast", lambda *_: factory._lacking_kernels(model))
    assert make_engine(model, (), CPU, "none").info.name == "fast"
    replace_layer(model, name, torch.nn.Identity())
    made = make_engine(model, (), CPU, "none")
    assert made.info.name == "torch"
    assert "layer 1: it has no kernel for Identity" in made.info.reasons[-1]
    with pytest.raises(OptionError, match="no kernel for Identity"):
        make_engine(model, (), CPU, "none", "fast")


def test_triton_hashes_itself_while_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = pytest.importorskip("triton.runtime.cache")
    asked, done = [], threading.Event()
    monkeypatch.setattr(cache, "triton_key", done.set, raising=False)
    monkeypatch.setattr(
        factory.dispatch, "choose", lambda *where: asked.append(where) or SimpleNamespace(name="triton")
    )
    factory.prepare_kernels(replace(CPU, device=torch.device("cuda", 1)))
    assert done.wait(30)
    assert asked == [(torch.device("cuda", 1), torch.float32)]


@pytest.mark.parametrize(("device", "kernels"), [("cpu", "triton"), ("cuda", "reference")])
def test_triton_is_left_alone_where_it_runs_nothing(device: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = pytest.importorskip("triton.runtime.cache")
    before = set(threading.enumerate())
    monkeypatch.setattr(cache, "triton_key", lambda: pytest.fail("it was hashed"), raising=False)
    monkeypatch.setattr(factory.dispatch, "choose", lambda *_: SimpleNamespace(name=kernels))
    factory.prepare_kernels(replace(CPU, device=torch.device(device)))
    assert set(threading.enumerate()) <= before
