"""Random small decoders in every scheme, and greedy decoding with the plain modules to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quasr.model.config import TextConfig
from quasr.model.decoder import Decoder, KVCache
from quasr.quant.embedding import Int8Embedding
from quasr.quant.linear import Int4Linear, Int8Linear
from quasr.quant.scheme import parse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

SMALL = TextConfig(vocab_size=211, hidden=96, layers=2, heads=6, kv_heads=2, head_dim=16, ffn=160)
UNTIED = TextConfig(vocab_size=97, hidden=64, layers=3, heads=4, kv_heads=4, head_dim=32, ffn=192, tied_head=False)

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
PRODUCTS = (*PROJECTIONS, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def random_decoder(config: TextConfig, scheme: str, seed: int, dtype: torch.dtype = torch.float32) -> Decoder:
    """Normal weights, norms that are not all one, quantised where `scheme` says so."""
    torch.manual_seed(seed)
    decoder = Decoder(config)
    with torch.no_grad():
        for weight in decoder.parameters():
            weight.normal_(1, 0.2) if weight.dim() == 1 else weight.normal_(0, 1.5 * weight.shape[1] ** -0.5)
    decoder = decoder.to(dtype).requires_grad_(False).eval()
    if scheme != "none":
        quantise_decoder(decoder, scheme)
    return decoder.to(DEVICE)


def quantise_decoder(decoder: Decoder, scheme: str) -> None:
    """All products in `scheme`, the embedding in int8."""
    kind = {"int8": Int8Linear, "int4": Int4Linear}[scheme.partition("-")[0]]
    for layer in decoder.layers:
        for name in PRODUCTS:
            path, _, leaf = name.rpartition(".")
            linear = layer.get_submodule(name)
            setattr(layer.get_submodule(path), leaf, kind.from_linear(linear, parse(scheme)))
    decoder.embed_tokens = Int8Embedding.from_embedding(decoder.embed_tokens)


@dataclass(frozen=True)
class Decoded:
    """What one prompt becomes."""

    tokens: list[int]
    logprobs: list[float]


def decode_plainly(decoder: Decoder, prompt: Tensor, steps: int) -> Decoded:
    """`steps` greedy tokens after one prompt (tokens, hidden), by the modules, one row alone, without stop tokens."""
    cache = KVCache.allocate(decoder.config, 1, len(prompt) + steps, prompt.dtype, prompt.device)
    hidden = decoder.prefill(prompt[None], cache)[:, -1]
    found = Decoded([], [])
    for step in range(steps):
        logprobs = decoder.logits(hidden).float().log_softmax(-1)[0]
        found.tokens.append(int(logprobs.argmax()))
        found.logprobs.append(float(logprobs.max()))
        filled = torch.tensor([len(prompt) + step], device=prompt.device)
        if step + 1 < steps:
            hidden = decoder.step(torch.tensor(found.tokens[-1:], device=prompt.device), filled, int(filled), cache)
    return found


def random_prompts(decoder: Decoder, lengths: Sequence[int], seed: int) -> list[Tensor]:
    """Embedded random tokens, (length, hidden) each."""
    torch.manual_seed(seed)
    return [decoder.embed_tokens(torch.randint(decoder.config.vocab_size, (n,), device=DEVICE)) for n in lengths]
