"""Where the demo's tokens in a batch of 64 clips differ from those of each clip alone, and by how little.

    python tests/gpu/batch_ties.py FOLDER

FOLDER: recordings of up to 30 s each. For every precision: how many clips differ, and of each of them the first token
that does, with the logits of both choices in fp32, of the same weights, after the same tokens. A number of 16 bits
that is as large as such a logit is known no better than to `step`: choices that are closer than a few steps are ties.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quasr.audio.decode import load
from quasr.engine.base import ClipRequest, ClipResult, token_budget
from quasr.engine.device import Placement
from quasr.engine.fast_engine import FastEngine
from quasr.engine.prompts import prompt_length
from quasr.engine.torch_engine import TorchEngine
from quasr.model.config import read_config
from quasr.model.decoder import KVCache
from quasr.quant.recipe import recipe_for
from quasr.quant.store import load_network
from quasr.text.prompt import build_prompt
from quasr.text.tokenizer import Tokenizer
from quasr.weights.hub import DEMO_FOLDER

if TYPE_CHECKING:
    from quasr.model.asr import Qwen3ASR

BATCH = 64
PRECISIONS = (
    ("auto", torch.float32),
    ("auto", torch.bfloat16),
    ("int8", torch.bfloat16),
    ("int4", torch.bfloat16),
    ("int8", torch.float16),
)
DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
CONFIG = read_config(DEMO_FOLDER)


def main() -> None:
    requests, stops = requests_of(sorted(Path(sys.argv[1]).iterdir()))
    print(f"{DEVICE}, torch {torch.__version__}, {len(requests)} clips")
    for compute_type, dtype in PRECISIONS:
        engine = FastEngine(network(compute_type, dtype), stops, Placement(DEVICE, dtype), compute_type)
        alone = [engine.run([one])[0] for one in requests]
        together = [one for begin in range(0, len(requests), BATCH) for one in engine.run(requests[begin:][:BATCH])]
        engine.close()
        pairs = list(zip(requests, alone, together, strict=True))
        differing = [pair for pair in pairs if pair[1].tokens != pair[2].tokens]
        print(f"{compute_type} in {dtype}: {len(differing)} clips differ", flush=True)
        exact = network(compute_type, torch.float32)
        for request, one, other in differing:
            print("  ", tie(exact, request, one, other, stops, dtype), flush=True)


def requests_of(paths: list[Path]) -> tuple[list[ClipRequest], tuple[int, ...]]:
    tokenizer = Tokenizer.from_folder(DEMO_FOLDER)
    prompt, stops = build_prompt(tokenizer), (*CONFIG.eos_token_ids, tokenizer.special.im_end)
    clips = [load(path) for path in paths]
    return [ClipRequest(x, prompt.prefix, prompt.suffix, token_budget(len(x) / 16_000), True) for x in clips], stops


def network(compute_type: str, dtype: torch.dtype) -> Qwen3ASR:
    return load_network(DEMO_FOLDER, CONFIG, recipe_for(compute_type), dtype, DEVICE)[0]


def tie(
    exact: Qwen3ASR,
    request: ClipRequest,
    alone: ClipResult,
    together: ClipResult,
    stops: tuple[int, ...],
    dtype: torch.dtype,
) -> str:
    """The first token that differs. Where one of them has ended there, it chose a stop token."""
    place = next((i for i, (a, b) in enumerate(zip(alone.tokens, together.tokens, strict=False)) if a != b), None)
    place = min(len(alone.tokens), len(together.tokens)) if place is None else place
    values = logits(exact, replace(request, suffix=(*request.suffix, *alone.tokens[:place])))
    ends = max(stops, key=lambda token: float(values[token]))
    chosen = [one.tokens[place] if place < len(one.tokens) else ends for one in (alone, together)]
    first, second = (float(values[token]) for token in chosen)
    ranks = [int((values > values[token]).sum()) + 1 for token in chosen]
    step = max(abs(first), abs(second)) * torch.finfo(dtype).eps
    return (
        f"token {place}: logits {first:.3f} alone, {second:.3f} together (places {ranks[0]} and {ranks[1]}), apart "
        f"{abs(first - second):.4f} = {abs(first - second) / step:.2f} steps of {step:.4f}"
    )


def logits(exact: Qwen3ASR, request: ClipRequest) -> torch.Tensor:
    """(vocabulary,) after the whole prompt, in fp32."""
    plain = TorchEngine(exact, (), Placement(DEVICE, torch.float32))
    with torch.inference_mode():
        embeddings, lengths = plain._embed([request])
        positions = prompt_length(CONFIG.audio, request)
        cache = KVCache.allocate(CONFIG.text, 1, positions, embeddings.dtype, DEVICE)
        return exact.prefill(embeddings, lengths, cache)[0].float()


if __name__ == "__main__":
    main()
