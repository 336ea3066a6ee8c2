from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from quant_samples import relative_error
from torch import nn

from quasr.model.decoder import TokenEmbedding
from quasr.quant.embedding import Int8Embedding

torch.set_num_threads(1)

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def embedding(dtype: torch.dtype = torch.float32) -> TokenEmbedding:
    torch.manual_seed(8)
    return TokenEmbedding(301, 64).requires_grad_(False).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_and_head_come_from_the_same_codes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quasr.quant.embedding.HEAD_NUMBERS", 100 * 64)
    original = embedding(dtype)
    layer = Int8Embedding.from_embedding(original)
    truth = layer.weight.double() * layer.scale.double()
    tokens = torch.tensor([[0, 300], [7, 7]])
    assert relative_error(layer(tokens), truth[tokens]) < TOLERANCE[dtype]
    x = torch.randn(2, 3, 64).to(dtype)
    assert layer(tokens).dtype == layer.logits(x).dtype == dtype
    assert relative_error(layer.logits(x), F.linear(x.double(), truth)) < 2 * TOLERANCE[dtype]
    assert relative_error(layer.logits(x), original.logits(x)) < 0.01
    assert relative_error(layer.dequantize(), original.weight) < 0.01


def test_a_quarter_of_the_bytes() -> None:
    layer = Int8Embedding.from_embedding(embedding())
    assert {name: (value.dtype, tuple(value.shape)) for name, value in layer.state_dict().items()} == {
        "weight": (torch.int8, (301, 64)),
        "scale": (torch.float32, (301, 1)),
    }
    empty = Int8Embedding.shaped_like(nn.Embedding(301, 64, device="meta"))
    assert all(value.is_meta for value in empty.state_dict().values())
    assert empty.weight.shape == layer.weight.shape
    assert "vocab=301" in repr(layer)
