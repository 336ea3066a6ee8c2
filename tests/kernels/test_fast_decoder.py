from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from fast_samples import DEVICE, SMALL, UNTIED, decode_plainly, random_decoder, random_prompts

from quasr.engine.fast import FastDecoder, refusal
from quasr.errors import OptionError
from quasr.kernels import reference
from quasr.kernels.dispatch import choose, plain
from quasr.kernels.state import DecodeState, Places
from quasr.model.config import read_config
from quasr.quant.linear import Int8Linear
from quasr.quant.scheme import parse
from quasr.weights.load import load_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from quasr.kernels.matrix import Matrix
    from quasr.kernels.state import CachePool
    from quasr.model.config import TextConfig
    from quasr.model.decoder import Decoder

torch.set_num_threads(1)
STEPS = 30
LENGTHS = (5, 1, 17, 8)
DEMO = Path(__file__).resolve().parents[2] / "src/quasr/demo/model"


def fast(decoder: Decoder) -> FastDecoder:
    return FastDecoder.from_model(decoder, choose(DEVICE, decoder.norm.weight.dtype))


def begin(
    decoder: FastDecoder, prompts: Sequence[Tensor], limit: int, stop_ids: Sequence[int] = ()
) -> tuple[DecodeState, CachePool]:
    """Prefills the prompts into every second row of a state, with gaps in the pool and its end beginning first."""
    sizes = [len(prompt) for prompt in prompts]
    ends = list(accumulate(size + limit + 3 for size in reversed(sizes)))
    offsets = [end - size - limit for end, size in zip(ends, reversed(sizes), strict=True)][::-1]
    cache = decoder.allocate_cache(ends[-1])
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    state = DecodeState.allocate(2 * len(prompts), limit, stop_ids, DEVICE)
    hidden = decoder.prefill(torch.cat(list(prompts)), sizes, offsets, cache)
    rows = torch.arange(len(prompts), device=DEVICE) * 2 + 1
    idle = torch.zeros(len(prompts), dtype=torch.bool, device=DEVICE)
    places = Places(torch.tensor(offsets, device=DEVICE), torch.tensor(sizes, device=DEVICE), idle)
    state.admit(rows, places, torch.full_like(rows, limit), decoder.choose(hidden))
    return state, cache


def written(state: DecodeState) -> list[list[int]]:
    """The tokens of the rows that `begin` filled."""
    return [row[:end] for row, end in zip(state.history.tolist(), state.cursor.tolist(), strict=True)][1::2]


def same_tokens(decoder: Decoder, lengths: Sequence[int], seed: int) -> None:
    prompts = random_prompts(decoder, lengths, seed)
    expected = [decode_plainly(decoder, prompt, STEPS) for prompt in prompts]
    quick = fast(decoder)
    state, cache = begin(quick, prompts, STEPS)
    for _ in range(STEPS - 1):
        quick.step(state, cache)
    assert written(state) == [row.tokens for row in expected]
    assert state.finished.all()
    for row, found in zip(expected, state.logprobs[1::2].tolist(), strict=True):
        assert found == pytest.approx(row.logprobs, abs=2e-4)


@pytest.mark.parametrize("scheme", ["none", "int8", "int8-g32", "int4-g32"])
@pytest.mark.parametrize("config", [SMALL, UNTIED], ids=["tied", "untied"])
@torch.inference_mode()
def test_same_tokens_as_the_modules(config: TextConfig, scheme: str) -> None:
    same_tokens(random_decoder(config, scheme, 1), LENGTHS, 2)


@torch.inference_mode()
def test_same_tokens_on_the_demo_model() -> None:
    model = load_model(DEMO, read_config(DEMO), torch.float32, DEVICE)
    same_tokens(model.decoder, (9, 30), 4)


@torch.inference_mode()
def test_weights_are_not_held_twice() -> None:
    """The modules' own weights lie inside the fused ones and still give the same output."""
    decoder = random_decoder(SMALL, "int8", 3)
    prompt = random_prompts(decoder, [7], 1)[0]
    before = decode_plainly(decoder, prompt, 4)
    layer = fast(decoder).layers[1]
    attention = decoder.layers[1].self_attn
    start = layer.qkv.weight.data_ptr()
    places = [module.weight.data_ptr() - start for module in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert places == [0, 96 * 96, 96 * 96 + 32 * 96]
    assert attention.v_proj.scale.untyped_storage().data_ptr() == layer.qkv.scale.untyped_storage().data_ptr()
    assert decode_plainly(decoder, prompt, 4) == before


@torch.inference_mode()
def test_a_stop_token_ends_a_row_and_nothing_changes_it_afterwards() -> None:
    decoder = random_decoder(SMALL, "none", 5)
    prompts = random_prompts(decoder, LENGTHS, 6)
    tokens = [decode_plainly(decoder, prompt, STEPS).tokens for prompt in prompts]
    stop = tokens[2][11]
    stops = [stop, 210]
    expected = [row[: next((i for i, token in enumerate(row) if token in stops), STEPS)] for row in tokens]
    quick = fast(decoder)
    state, cache = begin(quick, prompts, STEPS, stops)
    for _ in range(STEPS - 1):
        quick.step(state, cache)
    assert written(state) == expected
    before = [tensor.clone() for tensor in (*vars_of(state), cache.keys, cache.values)]
    quick.step(state, cache)
    for old, new in zip(before, (*vars_of(state), cache.keys, cache.values), strict=True):
        assert torch.equal(old.nan_to_num(9), new.nan_to_num(9))


def vars_of(state: DecodeState) -> list[Tensor]:
    return [state.tokens, state.lengths, state.finished, state.history, state.logprobs, state.cursor]


@pytest.mark.parametrize("right", [0, 1, 3, 4, 6], ids=lambda n: f"{n} of 6 right")
@torch.inference_mode()
def test_any_draft_gives_the_same_tokens(right: int) -> None:
    """Each verification feeds 6 drafted tokens, of which the first `right` are what greedy decoding writes."""
    decoder = random_decoder(SMALL, "int8", 7)
    prompts = random_prompts(decoder, LENGTHS, 8)
    expected = [decode_plainly(decoder, prompt, STEPS).tokens for prompt in prompts]
    quick = fast(decoder)
    state, cache = begin(quick, prompts, STEPS)
    for _ in range(-(-(STEPS - 1) // (right + 1))):
        before = state.cursor.clone()
        found = quick.verify(state, drafts(expected, state.cursor[1::2].tolist(), right), cache)
        left = (state.limits - before).clamp(max=right + 1)
        assert torch.equal(found.accepted[1::2], left[1::2])
        assert not found.accepted[::2].any()
    assert written(state) == expected


def drafts(expected: list[list[int]], cursors: list[int], right: int) -> Tensor:
    """(rows, 6), empty rows first of each pair: `right` coming tokens, then what is never right."""
    rows = []
    for row, cursor in zip(expected, cursors, strict=True):
        coming = (row[cursor:] + [0] * 7)[:7]
        wrong = [(token + 1) % 211 for token in coming]
        rows += [[0] * 6, coming[:right] + wrong[right:6]]
    return torch.tensor(rows, device=DEVICE)


@torch.inference_mode()
def test_a_draft_with_a_stop_token_ends_there() -> None:
    decoder = random_decoder(SMALL, "none", 9)
    prompt = random_prompts(decoder, [6], 3)
    tokens = decode_plainly(decoder, prompt[0], STEPS).tokens
    place = next(end for end in range(3, STEPS) if tokens[end] not in tokens[:end])
    quick = fast(decoder)
    state, cache = begin(quick, prompt, STEPS, [tokens[place]])
    draft = torch.tensor([[0] * (STEPS - 1), tokens[1:]], device=DEVICE)
    quick.verify(state, draft, cache)
    assert written(state) == [tokens[:place]]
    assert state.finished.tolist() == [True, True]


@torch.inference_mode()
def test_a_prompt_of_one_clip_is_the_same_among_others() -> None:
    decoder = random_decoder(SMALL, "none", 9)
    prompts = random_prompts(decoder, (4, 19, 2), 3)
    quick = fast(decoder)
    sizes = [len(prompt) for prompt in prompts]
    ends = [0, *accumulate(sizes)]
    together = quick.prefill(torch.cat(prompts), sizes, ends[:-1], quick.allocate_cache(ends[-1]))
    for row, (start, end) in enumerate(pairwise(ends)):
        alone = quick.prefill(prompts[row], [end - start], [0], quick.allocate_cache(end - start))
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "sums"), [(4, 2 * SMALL.layers), (5, 0)])
@torch.inference_mode()
def test_sums_after_products_of_torch_are_made_by_the_next_norm(rows: int, sums: int) -> None:
    """Triton's table leaves 5 rows in fp32 to torch. The numbers are the same to the bit."""
    triton_linear = pytest.importorskip("quasr.kernels.triton_linear", exc_type=ImportError)
    decoder, cpu = random_decoder(SMALL, "none", 9).cpu(), torch.device("cpu")
    made: list[int] = []

    def add(x: Tensor, matrix: Matrix, residual: Tensor) -> None:
        made.append(len(x))
        reference.add_linear(x, matrix, residual)

    table = plain("a test")
    hidden = []
    for kernels in (table, replace(table, sums_apart=triton_linear.sums_apart, add_linear=add)):
        quick = FastDecoder.from_model(decoder, kernels)
        cache = quick.allocate_cache(rows)
        places = Places(torch.arange(rows), torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.bool))
        x = torch.randn(rows, SMALL.hidden, generator=torch.Generator(cpu).manual_seed(1))
        hidden.append(quick.prefill_tokens(x, places, cache))
    assert torch.equal(*hidden)
    assert made == [rows] * sums


def test_refuses_what_it_cannot_run() -> None:
    decoder = random_decoder(SMALL, "none", 1)
    assert refusal(decoder) is None
    mixed = decoder.layers[1].mlp
    mixed.up_proj = Int8Linear.from_linear(mixed.up_proj, parse("int8"))
    with pytest.raises(OptionError, match="layer 1: matrices that are to be fused have different schemes"):
        FastDecoder.from_model(decoder, choose(DEVICE, torch.float32))
    decoder.layers[0].mlp.down_proj = torch.nn.Identity()
    assert refusal(decoder) == "the fast decoder cannot run layer 0: it has no kernel for Identity"
