from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from weights_samples import random_network

from quasr.model.decoder import KVCache, RMSNorm, rope_angles, rotate

if TYPE_CHECKING:
    from quasr.model.asr import Qwen3ASR

torch.set_num_threads(1)
CPU = torch.device("cpu")


@pytest.fixture
def network() -> Qwen3ASR:
    return random_network().eval()


def prompt(network: Qwen3ASR, tokens: list[list[int]]) -> tuple[torch.Tensor, list[int]]:
    rows = [torch.tensor(row) for row in tokens]
    none = torch.zeros(0, network.config.text.hidden)
    return network.embed_prompts([none] * len(rows), rows, [torch.tensor([], dtype=torch.long)] * len(rows))


def test_rms_norm_by_hand() -> None:
    norm = RMSNorm(2, eps=0.0)
    assert norm(torch.tensor([3.0, 4.0])).tolist() == pytest.approx([3 / math.sqrt(12.5), 4 / math.sqrt(12.5)])


def test_rope_by_hand() -> None:
    """Head dim 4, theta 100: rates 1 and 0.1; element i turns with element i + 2."""
    cos, sin = rope_angles(torch.tensor([[3]]), 4, 100.0)
    got = rotate(torch.tensor([1.0, 2.0, 5.0, 7.0]).view(1, 1, 1, 4), cos, sin).flatten().tolist()
    c, s, d, t = math.cos(3), math.sin(3), math.cos(0.3), math.sin(0.3)
    assert got == pytest.approx([c - 5 * s, 2 * d - 7 * t, 5 * c + s, 7 * d + 2 * t], rel=1e-5)


def test_prompt_is_prefix_audio_suffix(network: Qwen3ASR) -> None:
    audio = [torch.full((2, 20), 0.5), torch.full((1, 20), 0.25)]
    prefixes, suffixes = [torch.tensor([1]), torch.tensor([2, 3])], [torch.tensor([4, 5]), torch.tensor([6])]
    rows, lengths = network.embed_prompts(audio, prefixes, suffixes)
    table = network.decoder.embed_tokens.weight
    assert lengths == [5, 4]
    assert torch.equal(rows[0], torch.cat([table[[1]], audio[0], table[[4, 5]]]))
    assert torch.equal(rows[1], torch.cat([table[[2, 3]], audio[1], table[[6]], torch.zeros(1, 20)]))


@torch.inference_mode()
def test_steps_equal_a_longer_prompt(network: Qwen3ASR) -> None:
    """Feeding tokens one by one through the ragged cache gives the logits of a prefill that holds them all."""
    starts = [[3, 9, 4, 17, 5], [8, 2]]
    more = [[11, 30, 6], [7, 1, 19]]
    embeddings, lengths = prompt(network, starts)
    cache = KVCache.allocate(network.config.text, 2, 8, torch.float32, CPU)
    network.prefill(embeddings, lengths, cache)
    for done in range(3):
        filled = torch.tensor(lengths) + done
        tokens = torch.tensor([row[done] for row in more])
        got = network.step(tokens, filled, int(filled.max()), cache)
        longer = [start + extra[: done + 1] for start, extra in zip(starts, more, strict=True)]
        for row, sequence in enumerate(longer):
            alone, length = prompt(network, [sequence])
            fresh = KVCache.allocate(network.config.text, 1, 8, torch.float32, CPU)
            expected = network.prefill(alone, length, fresh)[0]
            torch.testing.assert_close(got[row], expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_padding_of_a_prompt_is_not_seen(network: Qwen3ASR) -> None:
    embeddings, lengths = prompt(network, [[3, 9, 4, 17, 5], [8, 2]])
    spoiled = embeddings.clone()
    spoiled[1, 2:] = 100.0
    caches = [KVCache.allocate(network.config.text, 2, 8, torch.float32, CPU) for _ in range(2)]
    one, two = network.prefill(embeddings, lengths, caches[0]), network.prefill(spoiled, lengths, caches[1])
    assert torch.equal(one, two)
    assert torch.equal(
        network.step(torch.tensor([1, 1]), torch.tensor(lengths), 5, caches[0]),
        network.step(torch.tensor([1, 1]), torch.tensor(lengths), 5, caches[1]),
    )


@torch.inference_mode()
def test_kept_rows_go_on_as_before(network: Qwen3ASR) -> None:
    embeddings, lengths = prompt(network, [[3, 9, 4], [8, 2], [5, 5, 5, 5]])
    cache = KVCache.allocate(network.config.text, 3, 8, torch.float32, CPU)
    network.prefill(embeddings, lengths, cache)
    rows = torch.tensor([2, 0])
    kept = cache.keep(rows)
    tokens, filled = torch.tensor([1, 2, 3]), torch.tensor(lengths)
    whole = network.step(tokens, filled, 4, cache)
    part = network.step(tokens[rows], filled[rows], 4, kept)
    torch.testing.assert_close(part, whole[rows], rtol=1e-5, atol=1e-5)


def test_untied_head_is_its_own() -> None:
    tied, untied = random_network().decoder, random_network(tied=False).decoder
    hidden = torch.randn(1, 20)
    assert torch.equal(tied.logits(hidden), torch.nn.functional.linear(tied.norm(hidden), tied.embed_tokens.weight))
    assert untied.lm_head is not None
    assert torch.equal(untied.logits(hidden), untied.lm_head(untied.norm(hidden)))
