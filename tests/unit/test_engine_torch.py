"""The torch engine on random weights. The independent reference is a loop that recomputes everything for each token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from quasr.audio.mel import log_mel
from quasr.engine.base import ClipRequest
from quasr.engine.device import Placement
from quasr.engine.torch_engine import TorchEngine
from quasr.errors import ModelError, ResourceError
from quasr.model.asr import Qwen3ASR
from quasr.model.config import AudioConfig, ModelConfig, TextConfig
from quasr.text.loops import loop_length

AUDIO = AudioConfig(layers=2, width=16, heads=2, ffn=32, output=24, mel_bins=16, stem_channels=8)
TEXT = TextConfig(vocab_size=61, hidden=24, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48)
CPU = Placement(torch.device("cpu"), torch.float32, ("a test",))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def build(seed: int = 0) -> Qwen3ASR:
    torch.manual_seed(seed)
    model = Qwen3ASR(ModelConfig(AUDIO, TEXT, "hf")).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.4)
    return model


def request(frames: int, budget: int, seed: int) -> ClipRequest:
    rng = np.random.default_rng(seed)
    samples = rng.standard_normal(frames * 160).astype(np.float32)
    prefix = tuple(rng.integers(0, TEXT.vocab_size, 5 + seed).tolist())
    return ClipRequest(samples, prefix, (3, 4), budget)


REQUESTS = [request(f, b, s) for s, (f, b) in enumerate([(50, 40), (433, 7), (100, 25), (901, 40), (51, 1), (267, 33)])]


@torch.inference_mode()
def recompute(model: Qwen3ASR, clip: ClipRequest, stop_ids: set[int]) -> tuple[list[int], list[float], str]:
    """Greedy decoding without any cache: the whole prompt again for every token."""
    audio = model.encode([torch.from_numpy(log_mel(clip.samples, AUDIO.mel_bins))])[0]
    embed = model.decoder.embed_tokens
    x = torch.cat([embed(torch.tensor(clip.prefix)), audio, embed(torch.tensor(clip.suffix))])
    tokens: list[int] = []
    logprobs: list[float] = []
    while len(tokens) < clip.max_new_tokens:
        logits = model.decoder.logits(model.decoder.prefill(x[None], None)[0, -1])
        token = int(logits.argmax())
        if token in stop_ids:
            return tokens, logprobs, "stop"
        tokens.append(token)
        logprobs.append(float(torch.log_softmax(logits, -1)[token]))
        x = torch.cat([x, embed(torch.tensor([token]))])
    return tokens, logprobs, "length"


def test_batch_equals_recomputation_and_single() -> None:
    model = build()
    stop_ids = {7, 20, 33}
    batch = TorchEngine(model, stop_ids, CPU).run(REQUESTS)
    for clip, result in zip(REQUESTS, batch, strict=True):
        tokens, logprobs, reason = recompute(model, clip, stop_ids)
        assert list(result.tokens) == tokens
        assert result.finish_reason == reason
        assert result.logprobs == pytest.approx(logprobs, abs=1e-4)
        assert TorchEngine(model, stop_ids, CPU).run([clip])[0].tokens == result.tokens


def test_every_length_of_finish_is_met() -> None:
    """Stop ids taken from the middle of each free-running output end the rows at different steps."""
    model = build(3)
    free = TorchEngine(model, (), CPU).run(REQUESTS)
    assert {result.finish_reason for result in free} == {"length"}
    assert [len(result.tokens) for result in free] == [clip.max_new_tokens for clip in REQUESTS]
    for stop in {token for result in free for token in result.tokens}:
        for cut, result in zip(TorchEngine(model, {stop}, CPU).run(REQUESTS), free, strict=True):
            ends = result.tokens.index(stop) if stop in result.tokens else len(result.tokens)
            assert cut.tokens == result.tokens[:ends]
            assert cut.finish_reason == ("stop" if stop in result.tokens else "length")


def test_a_loop_ends_its_row_where_it_is_found_and_no_other() -> None:
    model = build()
    long = [replace(clip, max_new_tokens=150) for clip in REQUESTS]
    free = TorchEngine(model, (), CPU).run(long)
    stopped = TorchEngine(model, (), CPU).run([replace(clip, stop_loops=True) for clip in long])
    for all_tokens, result in zip((one.tokens for one in free), stopped, strict=True):
        loops = [end for end in range(1, 151) if loop_length(all_tokens[:end])]
        assert result.tokens == all_tokens[: loops[0] if loops else 150]
        assert result.finish_reason == ("loop" if loops else "length")
    assert "loop" in {result.finish_reason for result in stopped}


def test_empty_batch_info_stats_and_close() -> None:
    model = build()
    engine = TorchEngine(model, {7}, CPU)
    assert engine.run([]) == []
    assert engine.info.weight_bytes == 4 * sum(weight.numel() for weight in model.parameters())
    assert (engine.info.device, engine.info.dtype, engine.info.reasons) == ("cpu", "fp32", ("a test",))
    results = engine.run(REQUESTS[:2])
    assert engine.stats.tokens == sum(len(result.tokens) for result in results)
    assert min(engine.stats.encode_seconds, engine.stats.prefill_seconds, engine.stats.generate_seconds) > 0
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.run(REQUESTS[:1])


def test_nan_is_an_error_and_not_a_transcript() -> None:
    model = build()
    with torch.no_grad():
        model.decoder.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="NaN in fp32"):
        TorchEngine(model, {7}, CPU).run(REQUESTS[:1])


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: x")],
)
def test_out_of_memory_gives_advice(monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    model = build()

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(model, "encode", fail)
    with pytest.raises(ResourceError, match="6 clips of up to 9 s: use a smaller batch"):
        TorchEngine(model, {7}, CPU).run(REQUESTS)


def test_other_runtime_errors_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()

    def fail(*_: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(model, "encode", fail)
    with pytest.raises(RuntimeError, match="something else"):
        TorchEngine(model, {7}, CPU).run(REQUESTS)
