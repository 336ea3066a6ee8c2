"""Which engine is made where."""

from __future__ import annotations

import pytest
import torch
from quant_samples import network

from quasr.engine import factory
from quasr.engine.device import Placement
from quasr.engine.factory import make_engine
from quasr.errors import OptionError

CPU = Placement(torch.device("cpu"), torch.float32, ("a test",))


def test_a_cpu_has_the_torch_engine_and_the_reason() -> None:
    engine = make_engine(network(), (), CPU, "int8")
    assert (engine.info.name, engine.info.scheme) == ("torch", "int8")
    assert engine.info.reasons == ("a test", "the torch engine: the fast engine is made for GPUs")


def test_an_engine_can_be_asked_for() -> None:
    assert make_engine(network(), (), CPU, "none", "fast").info.name == "fast"
    assert make_engine(network(), (), CPU, "none", "torch").info.reasons[-1] == "the torch engine was asked for"


def test_layers_without_kernels_name_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    monkeypatch.setattr(factory, "_why_not_fast", lambda *_: factory.refusal(model.decoder))
    assert make_engine(model, (), CPU, "none").info.name == "fast"
    model.decoder.layers[1].mlp.down_proj = torch.nn.Identity()  # type: ignore[union-attr, assignment]
    made = make_engine(model, (), CPU, "none")
    assert made.info.name == "torch"
    assert "layer 1: it has no kernel for Identity" in made.info.reasons[-1]
    with pytest.raises(OptionError, match="no kernel for Identity"):
        make_engine(model, (), CPU, "none", "fast")
