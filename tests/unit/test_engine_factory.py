"""Which engine is made where."""

from __future__ import annotations

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
