"""The ONNX engine with the decoder in C, on folders that were exported. The reference: the same codes in fp32."""

from __future__ import annotations

import json
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from quant_samples import CONFIG, checkpoint

from quasr.audio.decode import load
from quasr.engine.base import ClipRequest
from quasr.engine.native_decoder import NativeNetwork, open_native
from quasr.engine.onnx_engine import OnnxEngine
from quasr.engine.onnx_session import Runtime
from quasr.errors import ModelError, QuasrError
from quasr.export.folder import ExportOptions, export_folder
from quasr.export.manifest import read_manifest
from quasr.native import library
from quasr.text.prompt import build_prompt
from quasr.text.tokenizer import Tokenizer
from quasr.weights.hub import DEMO_FOLDER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quasr.engine.base import ClipResult

torch.set_num_threads(1)
ONE = Runtime("cpu", 1)
SPEECH = Path(__file__).resolve().parents[2] / "../shared/speech/public"


@pytest.fixture(autouse=True)
def wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        library.load()
    except QuasrError as error:
        pytest.skip(f"the decoder in C cannot be built here: {error}")
    monkeypatch.setenv(library.VARIABLE, "on")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return exported(checkpoint(tmp_path_factory.mktemp("models") / "sixteen"), "int8")


def exported(source: Path, weights: str) -> dict[str, Path]:
    """The same codes with fp32 and with int8 activations."""
    found = {kind: source.with_name(f"{weights}-{kind}") for kind in ("fp32", "int8")}
    export_folder(source, found["fp32"], ExportOptions(weights, None, "fp32"))
    export_folder(source, found["int8"], ExportOptions(weights, None, "int8"))
    return found


def clip(frames: int, budget: int, seed: int) -> ClipRequest:
    rng = np.random.default_rng(seed)
    samples = rng.standard_normal(frames * 160 + seed).astype(np.float32)
    return ClipRequest(samples, tuple(rng.integers(0, CONFIG.text.vocab_size, 5 + seed).tolist()), (3, 4), budget)


SIZES = [(50, 40), (433, 7), (100, 25), (901, 40), (20, 1), (267, 33), (800, 12), (799, 3), (1650, 5), (10, 9)]
CLIPS = [clip(*size, seed) for seed, size in enumerate(SIZES)]


def both(folders: dict[str, Path], stops: set[int], clips: Sequence[ClipRequest]) -> list[list[ClipResult]]:
    """With the decoder in fp32 and in C, the audio half in fp32 for both."""
    engine = engine_in_fp32(folders, stops)
    expected = engine.run(clips)
    engine._network, _ = open_native(folders["int8"], read_manifest(folders["int8"]), ONE)
    engine._graph = None
    assert isinstance(engine._network, NativeNetwork)
    return [expected, engine.run(clips)]


def engine_in_fp32(folders: dict[str, Path], stops: set[int]) -> OnnxEngine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(library.VARIABLE, "off")
        return OnnxEngine(folders["fp32"], stops, ONE)


def equal(expected: Sequence[ClipResult], found: Sequence[ClipResult]) -> float:
    """The share of tokens that are there in the other too, in the same order."""
    pairs = [(a.tokens, b.tokens) for a, b in zip(expected, found, strict=True)]
    same = sum(match.size for a, b in pairs for match in SequenceMatcher(None, a, b, False).get_matching_blocks())
    return same / sum(len(a) for a, _ in pairs)


def test_it_says_what_the_same_codes_say_in_fp32(folders: dict[str, Path]) -> None:
    expected, found = both(folders, set(), CLIPS)
    assert equal(expected, found) >= 0.995
    for a, b in zip(expected, found, strict=True):
        if a.tokens == b.tokens:
            assert np.allclose(a.logprobs, b.logprobs, atol=5e-3)


def test_a_whole_folder_alone_as_in_a_batch(folders: dict[str, Path]) -> None:
    engine = OnnxEngine(folders["int8"], (), ONE, ("a test",))
    assert engine.info.reasons[-2:] == (
        "the decoder is compiled C",
        "int8 activations where weights are int8, 16-bit ones in the decoder",
    )
    together = engine.run(CLIPS)
    assert [engine.run([one])[0] for one in CLIPS] == together


def test_clips_that_stop_leave_their_rows_to_others(folders: dict[str, Path]) -> None:
    free = OnnxEngine(folders["int8"], (), ONE).run(CLIPS)
    stops = {result.tokens[len(result.tokens) // 2] for result in free[:4]}
    for result, whole in zip(OnnxEngine(folders["int8"], stops, ONE).run(CLIPS), free, strict=True):
        ends = [index for index, token in enumerate(whole.tokens) if token in stops]
        assert result.tokens == whole.tokens[: ends[0] if ends else None]


def test_nan_is_an_error_and_the_engine_lives(folders: dict[str, Path]) -> None:
    engine = OnnxEngine(folders["int8"], (), ONE)
    before = engine.run(CLIPS[:1])
    with pytest.raises(ModelError, match="NaN"):
        engine.run([replace(CLIPS[0], samples=np.full(16_000, np.nan, np.float32))])
    assert engine.run(CLIPS[:1]) == before


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_speech_in_the_demo(tmp_path: Path, weights: str) -> None:
    """Every twentieth clip of real speech."""
    if not SPEECH.is_dir():
        pytest.skip("the test speech is not beside this checkout")
    rows = [json.loads(line) for line in (SPEECH / "manifest.jsonl").read_text(encoding="utf-8").splitlines()][::20]
    tokenizer = Tokenizer.from_folder(DEMO_FOLDER)
    prompt = build_prompt(tokenizer)
    clips = [ClipRequest(load(SPEECH / row["path"]), prompt.prefix, prompt.suffix, 200) for row in rows]
    source = tmp_path / "demo"
    source.symlink_to(DEMO_FOLDER, target_is_directory=True)
    expected, found = both(exported(source, weights), {tokenizer.special.im_end}, clips)
    assert equal(expected, found) >= 0.995
