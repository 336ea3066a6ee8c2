"""The bundled, trained model through transformers' own network and extractor: the same tokens, the same transcript."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import Qwen3ASRFeatureExtractor, Qwen3ASRForConditionalGeneration

import quasr
from quasr.audio.decode import load as load_audio
from quasr.model.config import read_config
from quasr.text.parse import parse_output
from quasr.text.prompt import build_prompt
from quasr.text.tokenizer import Tokenizer
from quasr.weights.load import load_model
from quasr.weights.save import save_model

if TYPE_CHECKING:
    import numpy as np

torch.set_num_threads(1)

DEMO = Path(quasr.__file__).parent / "demo"
MODEL = DEMO / "model"


def flat_config() -> dict[str, object]:
    """The demo's config.json in the layout that transformers reads."""
    raw = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    thinker = raw["thinker_config"]
    return {
        "architectures": ["Qwen3ASRForConditionalGeneration"],
        "model_type": "qwen3_asr",
        "audio_config": thinker["audio_config"] | {"model_type": "qwen3_asr_encoder"},
        "text_config": thinker["text_config"],
        "audio_token_id": thinker["audio_token_id"],
        "eos_token_id": raw["eos_token_id"],
        "pad_token_id": raw["eos_token_id"][0],
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Qwen3ASRForConditionalGeneration:
    folder = tmp_path_factory.mktemp("demo") / "hf"
    model = load_model(MODEL, read_config(MODEL), torch.float32, torch.device("cpu"))
    save_model(model, folder, flat_config(), layout="hf", dtype=torch.float32)
    return Qwen3ASRForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def transcribed(reference: Qwen3ASRForConditionalGeneration, samples: np.ndarray, language: str | None) -> str:
    """What transformers writes, as text with its language head."""
    tokenizer = Tokenizer.from_folder(MODEL)
    prompt = build_prompt(tokenizer, "", language)
    got = Qwen3ASRFeatureExtractor()(samples, sampling_rate=16_000, padding="longest", return_attention_mask=True)
    mask = got["attention_mask"]
    count = read_config(MODEL).audio.token_count(int(mask.sum()))
    ids = torch.tensor([[*prompt.prefix, *[tokenizer.special.audio_pad] * count, *prompt.suffix]])
    with torch.inference_mode():
        out = reference.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            input_features=got["input_features"],
            input_features_mask=mask,
            max_new_tokens=200,
            do_sample=False,
        )
    return tokenizer.decode(out[0, ids.shape[1] :].tolist())


@pytest.mark.slow
@pytest.mark.parametrize("language", [None, "English"])
@pytest.mark.parametrize(("start", "end"), [(0.0, 5.6), (1.3, 3.4), (0.0, 0.3)])
def test_transformers_reads_the_same_words(
    reference: Qwen3ASRForConditionalGeneration, language: str | None, start: float, end: float
) -> None:
    samples = load_audio(DEMO / "sample.flac")[round(start * 16_000) : round(end * 16_000)]
    expected = parse_output(transcribed(reference, samples, language), language)
    with quasr.load("demo", device="cpu") as transcriber:
        result = transcriber.transcribe((samples, 16_000), language=language)
    assert result.text == expected.text
    assert result.text
