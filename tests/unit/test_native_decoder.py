"""The decoder in C against the plain formula in float64, over awkward sizes, and what it does not depend on."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from native_folder import Made, Sizes, make_folder, reference

from quasr.engine import native_decoder
from quasr.engine.native_decoder import NativeDecoder, NativeNetwork, open_native, who_decodes
from quasr.engine.onnx_session import Runtime
from quasr.errors import CheckpointError, OptionError, QuasrError
from quasr.native import library

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from quasr.engine.onnx_decoder import Choice

CPU = Runtime("cpu", 2)

TOLERANCE = 2e-3
"""|found - truth| / |truth|: keys and values have 11 bits."""

SIZES = {
    "int8": Sizes(),
    "int8-g64-one-query-head": Sizes(group=64, heads=(4, 4, 16)),
    "int8-g32-three-query-heads": Sizes(group=32, hidden=96, heads=(6, 2, 16), ffn=160, vocab=33),
    "int4": Sizes(bits=4, heads=(8, 2, 128)),
    "int4-g64": Sizes(bits=4, group=64, head_group=64, heads=(4, 4, 64), ffn=192),
    "int4-g32": Sizes(bits=4, group=32, head_group=32, hidden=160, heads=(3, 1, 32), ffn=96, vocab=70),
    "int8-g256": Sizes(group=256, head_group=256, heads=(4, 2, 64), ffn=512),
}


@pytest.fixture(scope="module")
def compiled() -> ctypes.CDLL:
    try:
        return library.load()
    except QuasrError as error:
        pytest.skip(f"the decoder in C cannot be built here: {error}")


def prompts(sizes: Sizes, *lengths: int) -> list[NDArray[np.float32]]:
    rng = np.random.default_rng(7)
    return [rng.standard_normal((length, sizes.hidden)).astype(np.float32) for length in lengths]


def decoder(compiled: ctypes.CDLL, made: Made, rows: int = 1, capacity: int = 40, threads: int = 2) -> NativeDecoder:
    return NativeNetwork(compiled, made.folder, made.manifest, threads).cache(rows, capacity)


def test_reading_adds_up_all_that_it_reads(compiled: ctypes.CDLL) -> None:
    """All of a multiple of sixteen lines of 64 bytes."""
    words = np.random.default_rng(1).integers(0, 1 << 32, 16 * 16 * 7, np.uint32)
    compiled.quasr_read.restype = ctypes.c_uint32
    found = compiled.quasr_read(ctypes.c_void_p(words.ctypes.data), ctypes.c_int64(words.nbytes))
    assert found == int(words.sum(dtype=np.uint64)) % (1 << 32)


def prefill(cache: NativeDecoder, row: int, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """The logits of a prompt (1, vocab)."""
    cache.prefill(row, embeddings)
    return cache.logits


def step(cache: NativeDecoder, embeddings: NDArray[np.float32], positions: Sequence[int]) -> NDArray[np.float32]:
    """The logits of a step (rows, vocab)."""
    cache.step(embeddings, positions)
    return cache.logits


def error(found: NDArray[np.float32], truth: NDArray[Any]) -> float:
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def check_prompts_and_steps(compiled: ctypes.CDLL, made: Made) -> None:
    """Ragged rows of 1, 3, 17 and 31 tokens, then a step of all."""
    clips = prompts(made.sizes, 2, 4, 18, 32)
    cache = decoder(compiled, made, rows=4, capacity=32)
    truth = [reference(made, clip) for clip in clips]
    for row, clip in enumerate(clips):
        assert error(prefill(cache, row, clip[:-1])[0], truth[row][-2]) < TOLERANCE
    stepped = step(cache, np.stack([clip[-1] for clip in clips]), [len(clip) - 1 for clip in clips])
    assert error(stepped, np.stack([one[-1] for one in truth])) < TOLERANCE


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_prompts_and_steps_are_the_formula_s(compiled: ctypes.CDLL, sizes: Sizes, tmp_path: Path) -> None:
    check_prompts_and_steps(compiled, make_folder(tmp_path, sizes))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    ["-mno-avx512vnni", "-mno-avx512f", "-mno-f16c -mno-avx", "-DNEAR_CACHE=32768", "-DNEAR_CACHE=49152"],
)
def test_other_processors_give_the_same(compiled: ctypes.CDLL, flags: str, tmp_path: Path) -> None:
    """Without VNNI, without AVX-512, with neither vectors of 8 nor halves; with a small near cache and a large one."""
    compiler = library.find_compiler() or []
    target = tmp_path / "other.so"
    command = [*compiler, *library.FLAGS, *flags.split(), "-o", str(target), str(library.SOURCE)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"this compiler has no {flags}")
    other = ctypes.CDLL(str(target))
    for name, sizes in SIZES.items():
        check_prompts_and_steps(other, make_folder(tmp_path / name, sizes))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_clip_does_not_depend_on_its_neighbours_or_on_threads(
    compiled: ctypes.CDLL, bits: int, tmp_path: Path
) -> None:
    """Bit for bit, although products of few and of many tokens are two functions."""
    made = make_folder(tmp_path, Sizes(bits=bits))
    lengths = [5, 31, 1, 16, 17, 2, 9, 30]
    clips = prompts(made.sizes, *lengths)
    many = decoder(compiled, made, rows=8, threads=3)
    first = [prefill(many, row, clip).copy()[0] for row, clip in enumerate(clips)]
    newest = np.stack(prompts(made.sizes, *[1] * 8))[:, 0]
    together = [step(many, newest, np.add(lengths, later).tolist()).copy() for later in range(3)]
    for row, clip in enumerate(clips):
        alone = decoder(compiled, made, threads=1)
        assert np.array_equal(prefill(alone, 0, clip)[0], first[row])
        for later in range(3):
            assert np.array_equal(step(alone, newest[row : row + 1], [lengths[row] + later])[0], together[later][row])


@pytest.mark.parametrize(("name", "threads"), [("int4-g32", 1), ("int4-g32", 2), ("int4", 3), ("int4", 4)])
def test_steps_of_any_number_of_rows_are_those_of_one(
    compiled: ctypes.CDLL, name: str, threads: int, tmp_path: Path
) -> None:
    """1, 2, 4 tokens are a tile of the step's product, 9 are the prompt's."""
    made = make_folder(tmp_path, SIZES[name])
    clips = prompts(made.sizes, *range(2, 11))
    alone = []
    for clip in clips:
        one = decoder(compiled, made, threads=1)
        prefill(one, 0, clip[:-1])
        alone.append(step(one, clip[-1:], [len(clip) - 1])[0].copy())
    for rows in range(1, 10):
        cache = decoder(compiled, made, rows=rows, threads=threads)
        for row, clip in enumerate(clips[:rows]):
            prefill(cache, row, clip[:-1])
        found = step(cache, np.stack([clip[-1] for clip in clips[:rows]]), list(range(1, rows + 1)))
        assert np.array_equal(found, alone[:rows])


PIECE = 4096
"""Logits of which a thread of decoder.c finds the likeliest at once."""


@pytest.mark.parametrize("vocab", [1, 15, 16, 203, PIECE, PIECE + 1, 2 * PIECE + 37])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_likeliest_token_is_that_of_its_logits(
    compiled: ctypes.CDLL, vocab: int, threads: int, tmp_path: Path
) -> None:
    made = make_folder(tmp_path, Sizes(layers=1, hidden=32, group=32, heads=(2, 1, 16), ffn=32, vocab=vocab))
    cache = decoder(compiled, made, rows=3, threads=threads)
    for row, clip in enumerate(prompts(made.sizes, 3, 2, 1)):
        assert same_choice(cache.prefill(row, clip), cache.logits)
    rows = np.concatenate(prompts(made.sizes, 3))
    assert same_choice(cache.step(rows, [3, 2, 1]), cache.logits)


def same_choice(found: Choice, logits: NDArray[np.float32]) -> bool:
    """By the plain formula in float64."""
    scores = logits.astype(np.float64)
    expected = scores.max(axis=1) - np.log(np.exp(scores).sum(axis=1))
    return bool(
        np.array_equal(found.tokens, scores.argmax(axis=1)) and np.allclose(found.logprobs, expected, atol=1e-5)
    )


HALVED = Sizes(layers=1, heads=(4, 2, 32), ffn=128, vocab=2 * PIECE + 37)
"""With columns that the head's halves can be read by."""


@pytest.fixture
def halved(compiled: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Made:
    """A folder whose head is kept in halves."""
    made = make_folder(tmp_path, HALVED)
    monkeypatch.setattr(native_decoder, "HALVED_ROWS", 1)
    if not NativeNetwork(compiled, made.folder, made.manifest, 1).halved:
        pytest.skip("this processor reads the whole head at once")
    return made


def whole_head(compiled: ctypes.CDLL, made: Made, rows: int) -> NativeDecoder:
    """A decoder that reads all of the head."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_decoder, "HALVED_ROWS", made.sizes.vocab + 1)
        cache = decoder(compiled, made, rows=rows)
    assert not cache._network.halved
    return cache


@pytest.mark.parametrize("threads", [1, 3])
def test_a_head_in_halves_chooses_the_same(compiled: ctypes.CDLL, halved: Made, threads: int) -> None:
    """1, 3, 8 and 11 rows; the likeliest has the logit of the head to the bit."""
    clips = prompts(halved.sizes, *range(1, 12))
    whole, found = whole_head(compiled, halved, 11), decoder(compiled, halved, rows=11, threads=threads)
    assert found._network.halved
    for row, clip in enumerate(clips):
        check_halved(found.prefill(row, clip), found.logits, whole.prefill(row, clip), whole.logits)
    for rows in (1, 3, 8, 11):
        newest, positions = np.stack([clip[0] for clip in clips[:rows]]), list(range(1, rows + 1))
        one, other = found.step(newest, positions), whole.step(newest, positions)
        check_halved(one, found.logits, other, whole.logits)
        alone = decoder(compiled, halved, rows=1, threads=1)
        alone.prefill(0, clips[0])
        single = alone.step(newest[:1], positions[:1])
        assert np.array_equal(alone.logits[0], found.logits[0])
        assert (single.tokens[0], single.logprobs[0]) == (one.tokens[0], one.logprobs[0])


def check_halved(found: Choice, logits: NDArray[np.float32], truth: Choice, true: NDArray[np.float32]) -> None:
    assert np.array_equal(found.tokens, truth.tokens)
    # Nothing is sure of anything here: the tokens of which upper halves alone are read have almost all of it.
    assert np.allclose(found.logprobs, truth.logprobs, atol=2e-2)
    right = logits == true
    assert right[np.arange(len(right)), truth.tokens].all()
    # Lower halves are 0 to 15 beside codes of -128 to 127.
    assert 0.04 < error(logits, true) < 0.08


def test_a_head_in_halves_is_told(halved: Made) -> None:
    assert opened(halved) == (True, "the decoder is compiled C (of its head, the upper half of each code first)")


def activations_of(halved: Made, embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
    """What the last token has before the head."""
    logits = reference(halved, embeddings)[-1]
    return np.asarray(np.linalg.lstsq(halved.weights["embed_tokens"], logits, rcond=None)[0])


def put_row(halved: Made, row: int, codes: NDArray[np.int64], scale: float) -> None:
    data, width = np.memmap(halved.folder / "decoder.onnx.data", np.uint8, "r+"), halved.sizes.hidden
    begin = halved.manifest.decoder["embed_tokens.weight"].offset + row * width
    data[begin : begin + width] = codes.astype(np.int8).view(np.uint8)
    begin = halved.manifest.decoder["embed_tokens.scale"].offset + row * 4
    data[begin : begin + 4].view(np.float32)[0] = scale
    data.flush()


def test_lower_halves_may_point_where_the_activations_do(compiled: ctypes.CDLL, halved: Made) -> None:
    """A row whose codes are 0 and 15, with which the upper halves are the same: what the lower ones add is many times
    what chance allows, so all of the head is read, for this clip and for no other beside it."""
    one, other = prompts(halved.sizes, 6, 6)
    put_row(halved, 5000, np.where(activations_of(halved, one) > 0, 15, 0), 6 / (75 * halved.sizes.hidden**0.5))
    found, whole, alone = (
        decoder(compiled, halved, rows=2),
        whole_head(compiled, halved, 2),
        decoder(compiled, halved),
    )
    for cache, clips in ((found, (other, one)), (whole, (other, one)), (alone, (other,))):
        for row, clip in enumerate(clips):
            cache.prefill(row, clip[:-1])
    both, truth = (cache.step(np.stack([other[-1], one[-1]]), [5, 5]) for cache in (found, whole))
    assert truth.tokens[1] == 5000
    assert np.array_equal(both.tokens, truth.tokens)
    assert np.array_equal(found.logits[1], whole.logits[1])
    single = alone.step(other[-1:], [5])
    assert np.array_equal(found.logits[0], alone.logits[0])
    assert both.logprobs[0] == single.logprobs[0]


def test_the_guessed_best_is_doubted_too(compiled: ctypes.CDLL, halved: Made) -> None:
    """Two rows along the activations, guessed to be alike. What the lower halves add to the better one is so much that
    its guess does not reach its own logit, so it is none of those that may."""
    (clip,) = prompts(halved.sizes, 5)
    x = activations_of(halved, clip)
    better, other = np.where(x > 0, 127, -128), np.where(x > 0, 72, -57)
    guesses = [((codes + 128) // 16 * 16 - 128 + 7.5) @ x for codes in (better, other)]
    scale = 2 / (75 * halved.sizes.hidden**0.5)
    put_row(halved, 5000, better, scale)
    put_row(halved, 100, other, 0.999 * scale * guesses[0] / guesses[1])
    found, whole = decoder(compiled, halved), whole_head(compiled, halved, 1)
    assert whole.prefill(0, clip).tokens.tolist() == [5000]
    assert found.prefill(0, clip).tokens.tolist() == [5000]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_head_in_halves_has_no_number_where_it_has_none(compiled: ctypes.CDLL, halved: Made, bad: float) -> None:
    (clip,) = prompts(halved.sizes, 5)
    data = np.memmap(halved.folder / "decoder.onnx.data", np.uint8, "r+")
    begin = halved.manifest.decoder["embed_tokens.scale"].offset
    data[begin : begin + 4 * halved.sizes.vocab].view(np.float32)[4321] = bad
    data.flush()
    found, whole = decoder(compiled, halved), whole_head(compiled, halved, 1)
    one, other = found.prefill(0, clip), whole.prefill(0, clip)
    assert np.array_equal(found.logits, whole.logits, equal_nan=True)
    assert np.array_equal(one.logprobs, other.logprobs, equal_nan=True)


def test_of_equal_tokens_it_is_the_lowest(compiled: ctypes.CDLL, tmp_path: Path) -> None:
    """Rows of the table that are the same, in lanes, pieces and streams of their own."""
    made = make_folder(tmp_path, Sizes(layers=1, hidden=32, group=32, heads=(2, 1, 16), ffn=32, vocab=3 * PIECE))
    (clip,) = prompts(made.sizes, 5)
    likeliest = int(decoder(compiled, made).prefill(0, clip).tokens[0])
    data = np.memmap(tmp_path / "decoder.onnx.data", np.uint8, "r+")
    for leaf, width in (("weight", 32), ("scale", 4)):
        begin = made.manifest.decoder[f"embed_tokens.{leaf}"].offset
        rows = data[begin : begin + 3 * PIECE * width].reshape(-1, width)
        for twin in (1000, 1001, 1016, 5000, 12000):
            rows[twin] = rows[likeliest]
    data.flush()
    cache = decoder(compiled, made, threads=3)
    found = cache.prefill(0, clip)
    assert found.tokens.tolist() == [min(likeliest, 1000)]
    assert same_choice(found, cache.logits)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_token_has_a_probability_beside_nan_or_infinity(compiled: ctypes.CDLL, tmp_path: Path, bad: float) -> None:
    """One logit of 9,000, by its scale. Minus infinity is a token that cannot be."""
    made = make_folder(tmp_path, Sizes(layers=1, hidden=32, group=32, heads=(2, 1, 16), ffn=32, vocab=9000))
    (clip,) = prompts(made.sizes, 5)
    data = np.memmap(tmp_path / "decoder.onnx.data", np.uint8, "r+")
    begin = made.manifest.decoder["embed_tokens.scale"].offset
    data[begin : begin + 4 * 9000].view(np.float32)[4321] = bad
    data.flush()
    cache = decoder(compiled, made)
    found = cache.prefill(0, clip)
    assert np.isfinite(cache.logits).sum() == 8999
    assert np.isfinite(found.logprobs[0]) == (cache.logits[0, 4321] == -np.inf)


@pytest.mark.parametrize("vocab", [1, PIECE + 1])
def test_tokens_that_cannot_be_are_an_error_only_alone(compiled: ctypes.CDLL, tmp_path: Path, vocab: int) -> None:
    """The last token, which has a piece for itself, has minus infinity."""
    made = make_folder(tmp_path, Sizes(layers=1, hidden=32, group=32, heads=(2, 1, 16), ffn=32, vocab=vocab))
    (clip,) = prompts(made.sizes, 5)
    last = prefill(decoder(compiled, made), 0, clip)[0, -1]
    data = np.memmap(tmp_path / "decoder.onnx.data", np.uint8, "r+")
    begin = made.manifest.decoder["embed_tokens.scale"].offset
    data[begin : begin + 4 * vocab].view(np.float32)[-1] *= -np.copysign(np.inf, last)
    data.flush()
    cache = decoder(compiled, made)
    found = cache.prefill(0, clip)
    assert cache.logits[0, -1] == -np.inf
    assert np.isnan(found.logprobs[0]) if vocab == 1 else same_choice(found, cache.logits)


@pytest.mark.parametrize("length", [191, 192, 193, 384, 385])
def test_a_prompt_may_end_at_a_block_and_fill_the_cache(compiled: ctypes.CDLL, length: int, tmp_path: Path) -> None:
    made = make_folder(tmp_path, Sizes(layers=1, hidden=128, ffn=128))
    (clip,) = prompts(made.sizes, length)
    whole, cut = (decoder(compiled, made, capacity=length) for _ in range(2))
    found = prefill(whole, 0, clip)
    prefill(cut, 0, clip[:-1])
    assert np.array_equal(found, step(cut, clip[-1:], [length - 1]))
    assert error(found[0], reference(made, clip)[-1]) < TOLERANCE


@pytest.mark.parametrize("bits", [8, 4])
def test_a_long_prompt_in_blocks_is_one_token_after_the_other(compiled: ctypes.CDLL, bits: int, tmp_path: Path) -> None:
    """Bit for bit; nibbles meet whole numbers in prompts, and their halves in steps."""
    made = make_folder(tmp_path, Sizes(bits=bits, layers=1, hidden=128, ffn=128))
    (clip,) = prompts(made.sizes, 401)
    whole, single = (decoder(compiled, made, capacity=401) for _ in range(2))
    found = prefill(whole, 0, clip)
    for position, one in enumerate(clip):
        last = step(single, one[None], [position])
    assert np.array_equal(found, last)
    assert error(found[0], reference(made, clip)[-1]) < TOLERANCE


@pytest.mark.parametrize("length", [17, 34, 51, 52, 60])
def test_a_prompt_in_several_calls_is_that_of_one(
    compiled: ctypes.CDLL, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt is heard between calls: a prompt of half an hour takes minutes."""
    made = make_folder(tmp_path, Sizes())
    (clip,) = prompts(made.sizes, length)
    whole = prefill(decoder(compiled, made, capacity=60), 0, clip)
    sliced = decoder(compiled, made, rows=2, capacity=60)
    calls: list[int] = []
    monkeypatch.setattr(native_decoder, "PROMPT_SLICE", 17)
    decode = sliced._network.decode

    def counted(cache: native_decoder.Cache, request: native_decoder.Request) -> None:
        calls.append(request.tokens)
        decode(cache, request)

    monkeypatch.setattr(sliced._network, "decode", counted)
    assert np.array_equal(prefill(sliced, 1, clip), whole)
    assert (sum(calls), max(calls), len(calls)) == (length, 17, -(-length // 17))


def test_memory_that_runs_out_is_told(compiled: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_folder(tmp_path, Sizes())
    (clip,) = prompts(made.sizes, 3)
    cache = decoder(compiled, made)
    with monkeypatch.context() as patch:
        patch.setattr(cache._network, "_decode", lambda *_: 1)
        with pytest.raises(MemoryError, match="no memory for the decoder's activations"):
            prefill(cache, 0, clip)
    assert error(prefill(cache, 0, clip)[0], reference(made, clip)[-1]) < TOLERANCE


def test_a_moved_row_goes_on(compiled: ctypes.CDLL, tmp_path: Path) -> None:
    made = make_folder(tmp_path, Sizes())
    one, two = prompts(made.sizes, 17, 20)
    cache, alone = decoder(compiled, made, rows=2), decoder(compiled, made)
    for row, clip in enumerate((one, two)):
        prefill(cache, row, clip)
    prefill(alone, 0, two)
    cache.move(1, 0, len(two))
    assert np.array_equal(step(cache, one[:1], [len(two)]), step(alone, one[:1], [len(two)]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(compiled: ctypes.CDLL, tmp_path: Path, bad: float) -> None:
    made = make_folder(tmp_path, Sizes())
    (clip,) = prompts(made.sizes, 12)
    clip[5, 77] = bad
    assert np.isnan(prefill(decoder(compiled, made), 0, clip)).all()


def test_zeros_and_unfilled_memory_are_no_numbers_of_the_network(compiled: ctypes.CDLL, tmp_path: Path) -> None:
    """A token of zeros has codes of 0 / 0; the cache is full of NaN."""
    made = make_folder(tmp_path, Sizes())
    (clip,) = prompts(made.sizes, 19)
    clip[3:5] = 0
    cache = decoder(compiled, made)
    cache._data[...] = np.nan
    assert error(prefill(cache, 0, clip)[0], reference(made, clip)[-1]) < TOLERANCE


def test_places_that_are_not_there_are_refused(compiled: ctypes.CDLL, tmp_path: Path) -> None:
    made = make_folder(tmp_path, Sizes(layers=1))
    cache = decoder(compiled, made, rows=2, capacity=10)
    (clip,) = prompts(made.sizes, 11)
    for row, tokens in ((0, clip), (2, clip[:3]), (-1, clip[:3]), (0, clip[:3, :5]), (0, clip[:0])):
        with pytest.raises(ValueError):
            prefill(cache, row, tokens)
    for positions in ([10], [-1], [1, 2, 3]):
        with pytest.raises(ValueError):
            step(cache, clip[: len(positions)], positions)
    assert np.isfinite(prefill(cache, 1, clip[:10])).all()


def opened(made: Made, runtime: Runtime = CPU) -> tuple[bool, str]:
    network, reason = open_native(made.folder, made.manifest, runtime)
    return network is not None, reason


def test_who_runs_a_folder_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = make_folder(tmp_path / "int8", Sizes())
    whole = replace(made, manifest=replace(made.manifest, weights="fp32"))
    floats, old = replace(made, manifest=replace(made.manifest, activations="fp32")), replace(made.manifest, decoder={})
    sixteen = make_folder(tmp_path / "16", Sizes(group=16, hidden=48, ffn=48, heads=(3, 1, 16)))
    refused = {
        "the folder's activations are fp32": (floats, CPU),
        "the folder's weights are fp32": (whole, CPU),
        "the folder does not say where its tensors lie: export the model again": (replace(made, manifest=old), CPU),
        "the provider cuda was asked for": (made, Runtime("cuda", 1)),
        r"layers\.0\.self_attn\.qkv has no groups of 128, 64, 32": (sixteen, CPU),
    }
    monkeypatch.setattr(library, "load", lambda: pytest.fail("it is not to be compiled"))
    for why, (folder, runtime) in refused.items():
        monkeypatch.setenv(library.VARIABLE, "auto")
        native, reason = opened(folder, runtime)
        assert not native
        assert re.match(f"the decoder is ONNX Runtime's: {why}", reason)
        monkeypatch.setenv(library.VARIABLE, "on")
        with pytest.raises(OptionError, match=f"QUASR_NATIVE is on, but {why}.*: use auto"):
            opened(folder, runtime)


def test_what_the_variable_says(compiled: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = make_folder(tmp_path, Sizes())
    monkeypatch.setattr(library, "processor", lambda: "flags : fpu sse2")
    assert opened(made) == (
        False,
        "the decoder is ONNX Runtime's: C is unmeasured on this processor (QUASR_NATIVE=on asks for it)",
    )
    monkeypatch.setenv(library.VARIABLE, "on")
    assert opened(made) == (True, "the decoder is compiled C")
    monkeypatch.setenv(library.VARIABLE, "off")
    assert opened(made) == (False, "the decoder is ONNX Runtime's: QUASR_NATIVE=off asks for it")
    monkeypatch.setenv(library.VARIABLE, "yes")
    with pytest.raises(OptionError, match="QUASR_NATIVE is 'yes': use auto, off or on"):
        opened(made)


def test_doctor_s_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "find_compiler", lambda: ["cc"])
    monkeypatch.setattr(library, "processor", lambda: "flags : avx512_vnni")
    assert who_decodes() == "C, where weights are int8 or int4 in groups and activations int8"
    monkeypatch.setattr(library, "processor", lambda: "another")
    assert who_decodes() == "ONNX Runtime: C is unmeasured on this processor (QUASR_NATIVE=on asks for it)"
    monkeypatch.setattr(library, "find_compiler", lambda: None)
    assert who_decodes() == f"ONNX Runtime: {library.NO_COMPILER}"
    monkeypatch.setenv(library.VARIABLE, "off")
    assert who_decodes() == "ONNX Runtime: QUASR_NATIVE=off asks for it"


def test_without_a_compiler_it_is_onnx_runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = make_folder(tmp_path, Sizes())
    monkeypatch.setattr(library, "processor", lambda: "flags : avx512_vnni")
    monkeypatch.setattr(library, "find_compiler", lambda: None)
    native, reason = opened(made)
    assert not native
    assert reason == (
        "the decoder is ONNX Runtime's: there is no C compiler: install gcc or clang, or pip install ziglang"
    )
    monkeypatch.setenv(library.VARIABLE, "on")
    with pytest.raises(OptionError, match="QUASR_NATIVE is on, but there is no C compiler"):
        opened(made)


DAMAGE = [
    {"offset": 1 << 40}, {"offset": -64}, {"offset": 2}, {"shape": (7,)}, {"dtype": "no such"}, {"dtype": "int32"},
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_tensor_that_is_not_there_is_one_line(
    compiled: ctypes.CDLL, damage: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_folder(tmp_path, Sizes())
    name = "layers.1.self_attn.k_norm.weight"
    tensors = {**made.manifest.decoder, name: replace(made.manifest.decoder[name], **damage)}
    monkeypatch.setenv(library.VARIABLE, "on")
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_norm\.weight .*: export the model again"):
        opened(replace(made, manifest=replace(made.manifest, decoder=tensors)))


@pytest.mark.parametrize("shape", [(256, -2, -128), (256, 0, 128), (256, 2), (256,), (), (256, 3, 128), (256, 512, 1)])
def test_codes_of_no_known_form_are_left_to_the_graph(
    shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as groups of -128 columns: scales would be looked for before their place."""
    made = make_folder(tmp_path, Sizes())
    name, tensors = "layers.0.self_attn.qkv", dict(made.manifest.decoder)
    for leaf, size in (("weight", shape), ("scale", (256, *shape[1:2]))):
        tensors[f"{name}.{leaf}"] = replace(tensors[f"{name}.{leaf}"], shape=size)
    monkeypatch.setattr(library, "load", lambda: pytest.fail("it is not to be compiled"))
    monkeypatch.setattr(library, "find_compiler", lambda: ["cc"])
    monkeypatch.setenv(library.VARIABLE, "on")
    with pytest.raises(OptionError, match=r"layers\.0\.self_attn\.qkv has no groups"):
        opened(replace(made, manifest=replace(made.manifest, decoder=tensors)))


@pytest.mark.parametrize("content", [None, b""])
def test_weights_that_cannot_be_mapped_are_one_line(
    compiled: ctypes.CDLL, content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest need not list the file whose tensors it places."""
    made = make_folder(tmp_path, Sizes())
    (tmp_path / "decoder.onnx.data").unlink()
    if content is not None:
        (tmp_path / "decoder.onnx.data").write_bytes(content)
    monkeypatch.setenv(library.VARIABLE, "on")
    with pytest.raises(CheckpointError, match=r"decoder\.onnx\.data cannot be mapped .*: export the model again$"):
        opened(made)


def test_a_config_of_fewer_layers_is_one_line(
    compiled: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_folder(tmp_path, Sizes())
    (tmp_path / "config.json").write_text(json.dumps(Sizes(layers=1).shape().config()))
    monkeypatch.setenv(library.VARIABLE, "on")
    with pytest.raises(CheckpointError, match=r"config\.json is not that of its graphs: export the model again$"):
        opened(made)


def test_a_config_of_endless_layers_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_folder(tmp_path, Sizes())
    config = json.dumps(made.sizes.shape().config()).replace(
        '"num_hidden_layers": 2', '"num_hidden_layers": 10000000000'
    )
    (tmp_path / "config.json").write_text(config)
    monkeypatch.setenv(library.VARIABLE, "on")
    with pytest.raises(OptionError, match=r"layers\.2\.self_attn\.qkv has no groups"):
        opened(made)
