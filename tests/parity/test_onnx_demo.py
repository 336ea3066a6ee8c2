"""The bundled model as an ONNX folder says what torch says, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from onnx_host import Host

import quasr
from quasr.audio.decode import load as load_audio
from quasr.audio.mel import log_mel
from quasr.export.folder import ExportOptions, export_folder
from quasr.model.config import read_config
from quasr.model.decoder import KVCache
from quasr.quant.apply import load_quantising
from quasr.quant.recipe import recipe_for
from quasr.quant.store import save_quantised
from quasr.text.prompt import build_prompt
from quasr.text.tokenizer import Tokenizer
from quasr.weights.load import load_model

if TYPE_CHECKING:
    from quasr.model.asr import Qwen3ASR

torch.set_num_threads(1)

MODEL = Path(quasr.__file__).parent / "demo" / "model"
SAMPLE = MODEL.parent / "sample.flac"
CPU = torch.device("cpu")
MOST = 60

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL.is_dir(), reason="the demo model is not in this checkout"),
]


def clips() -> list[np.ndarray]:
    """The sample whole, and pieces of it that end inside chunks and windows."""
    samples = load_audio(SAMPLE)
    cuts = [(0.0, 5.6), (1.3, 3.4), (0.0, 0.3), (2.0, 5.17), (0.5, 4.0)]
    return [log_mel(samples[round(start * 16_000) : round(end * 16_000)]) for start, end in cuts]


def prompt() -> tuple[list[int], list[int], set[int]]:
    found = build_prompt(Tokenizer.from_folder(MODEL), "", None)
    return list(found.prefix), list(found.suffix), set(read_config(MODEL).eos_token_ids)


@torch.inference_mode()
def torch_tokens(network: Qwen3ASR, mel: np.ndarray) -> list[int]:
    before, after, stops = prompt()
    audio = network.encode([torch.from_numpy(mel)])
    rows, lengths = network.embed_prompts(audio, [torch.tensor(before)], [torch.tensor(after)])
    cache = KVCache.allocate(network.config.text, 1, lengths[0] + MOST, torch.float32, CPU)
    tokens = [int(network.prefill(rows, lengths, cache).argmax())]
    while tokens[-1] not in stops and len(tokens) < MOST:
        filled = lengths[0] + len(tokens) - 1
        logits = network.step(torch.tensor(tokens[-1:]), torch.tensor([filled]), filled, cache)
        tokens.append(int(logits.argmax()))
    return tokens


def onnx_tokens(host: Host, mel: np.ndarray) -> list[int]:
    before, after, stops = prompt()
    row = np.concatenate([host.embed(before), host.encode([mel]), host.embed(after)])
    cache = host.cache(1, len(row) + MOST)
    tokens = [int(host.prefill([row], cache).argmax())]
    while tokens[-1] not in stops and len(tokens) < MOST:
        tokens.append(int(host.step(tokens[-1:], [len(row) + len(tokens) - 1], cache).argmax()))
    return tokens


def test_fp32_says_the_same(tmp_path: Path) -> None:
    export_folder(MODEL, tmp_path / "onnx", ExportOptions("fp32"))
    host, network = Host(tmp_path / "onnx"), load_model(MODEL, read_config(MODEL), torch.float32, CPU)
    for mel in clips():
        assert onnx_tokens(host, mel) == torch_tokens(network, mel)


@pytest.mark.parametrize("compute_type", ["int8", "int4"])
def test_a_quantised_folder_says_the_same(compute_type: str, tmp_path: Path) -> None:
    config, recipe = read_config(MODEL), recipe_for(compute_type)
    network = load_quantising(MODEL, config, recipe, torch.float32, CPU)
    save_quantised(network, recipe, MODEL, tmp_path / "quantised", {})
    export_folder(tmp_path / "quantised", tmp_path / "onnx", ExportOptions(activations="fp32"))
    host = Host(tmp_path / "onnx")
    for mel in clips():
        assert onnx_tokens(host, mel) == torch_tokens(network, mel)
