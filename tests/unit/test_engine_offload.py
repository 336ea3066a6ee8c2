"""Streamed decoder layers: the same tokens, less on the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from quant_samples import CPU, network
from torch import nn

from quasr.engine.base import ClipRequest
from quasr.engine.device import Placement
from quasr.engine.offload import LayerStream, offload
from quasr.engine.torch_engine import TorchEngine
from quasr.errors import OptionError
from quasr.model.asr import Qwen3ASR
from quasr.model.config import ModelConfig
from quasr.quant.apply import quantise
from quasr.quant.recipe import recipe_for


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def deep(layers: int, rules: tuple[str, ...] = ()) -> Qwen3ASR:
    from dataclasses import replace

    small = network().config
    config = ModelConfig(small.audio, replace(small.text, layers=layers), small.layout)
    torch.manual_seed(9)
    model = Qwen3ASR(config).requires_grad_(False).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(0, weight[0].numel() ** -0.5)
    if rules:
        quantise(model, recipe_for("int8", rules=rules))
    return model


def engine(model: Qwen3ASR) -> TorchEngine:
    return TorchEngine(model, (), Placement(CPU, torch.float32))


def requests() -> list[ClipRequest]:
    generator = np.random.default_rng(4)
    clips = [generator.normal(size=frames * 160).astype(np.float32) for frames in (150, 90)]
    return [ClipRequest(samples, (1, 2, 3), (4, 5), 6) for samples in clips]


@pytest.mark.parametrize(("layers", "count"), [(2, 2), (5, 2), (5, 3), (5, 4), (5, 5)])
def test_same_tokens_and_fewer_bytes(layers: int, count: int) -> None:
    whole = engine(deep(layers))
    model = deep(layers)
    a_layer = sum(weight.nbytes for weight in model.decoder.layers[0].parameters())
    offload(model, count, CPU)
    part = engine(model)
    for _ in range(2):
        expected, found = whole.run(requests()), part.run(requests())
        assert [one.tokens for one in found] == [one.tokens for one in expected]
        assert [one.logprobs for one in found] == [one.logprobs for one in expected]
    places = 1 if count == 2 else 2
    assert whole.info.weight_bytes - part.info.weight_bytes == (count - places) * a_layer


def test_layers_of_two_schemes_have_places_of_their_own() -> None:
    rules = ("decoder.layers.0.*=none", "decoder.layers.3.*=none")
    model = deep(5, rules)
    expected = engine(deep(5, rules)).run(requests())
    offload(model, 5, CPU)
    assert engine(model).run(requests()) == expected


def test_the_next_layer_is_copied_after_the_one_before() -> None:
    linears = [nn.Linear(2, 2, bias=False).requires_grad_(False) for _ in range(3)]
    for index, linear in enumerate(linears):
        linear.weight.fill_(index)
    stream = LayerStream(linears, CPU)
    assert len(stream.places) == 2
    for turn in (0, 1, 2, 0, 1, 2):
        place = stream.take(turn)
        assert place.weight.unique().tolist() == [turn]
        stream.give(turn)
        if turn < 2:
            assert {float(other.weight[0, 0]) for other in stream.places} == {turn, turn + 1}


@pytest.mark.parametrize("count", [-1, 1, 3])
def test_numbers_that_save_nothing_or_are_too_many(count: int) -> None:
    with pytest.raises(OptionError, match="can leave 2 to 2 layers"):
        offload(network(), count, CPU)
