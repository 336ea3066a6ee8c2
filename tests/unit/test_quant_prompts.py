"""Taught clips: where the language's head belongs, what the decoder is given, which positions count."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
import torch
from quant_samples import CONFIG, network
from taught_clips import taught_clips

from quasr.engine.base import ClipRequest, ClipResult, token_budget
from quasr.errors import AudioDecodeError
from quasr.quant.prompts import embed, position_weights, read_clips, teach, transcribe
from quasr.text.prompt import build_prompt

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from quasr.engine.base import Engine
    from quasr.text.tokenizer import Tokenizer

TAG, END = 7, 9


class Spelling:
    """Stands for a tokenizer: a character is its code."""

    special = SimpleNamespace(im_start=8, im_end=END, audio_start=10, audio_end=11, asr_text=TAG)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class Parrot:
    """An engine that answers with the clip's count of 10 ms frames, and never stops at odd ones."""

    def __init__(self) -> None:
        self.batches: list[list[ClipRequest]] = []

    def run(self, requests: Sequence[ClipRequest]) -> list[ClipResult]:
        self.batches.append(list(requests))
        frames = [len(request.samples) // 160 for request in requests]
        return [ClipResult((count,), (0.0,), "length" if count % 2 else "stop") for count in frames]


TOKENIZER = cast("Tokenizer", Spelling())


def clips_of(*frames: int) -> list[np.ndarray]:
    return [np.zeros(count * 160, np.float32) for count in frames]


def test_answers_come_in_the_order_of_the_clips_and_end_where_the_engine_stopped() -> None:
    engine, done = Parrot(), list[int]()
    answers = transcribe(cast("Engine", engine), TOKENIZER, clips_of(60, 300, 121), batch=2, progress=done.append)
    assert answers == [(60, END), (300, END), (121,)]
    assert [[len(request.samples) // 160 for request in batch] for batch in engine.batches] == [[300, 121], [60]]
    assert done == [2, 3]
    prompt = build_prompt(TOKENIZER)
    first = engine.batches[0][0]
    assert (first.prefix, first.suffix, first.max_new_tokens) == (prompt.prefix, prompt.suffix, token_budget(3.0))


def test_a_forced_language_moves_the_head_of_the_answer_into_the_prompt() -> None:
    answer = (*b"language English", TAG, *b"hi", END)
    free, forced = teach(TOKENIZER, clips_of(60, 60), 16, [answer, answer])
    assert free.prompt == build_prompt(TOKENIZER)
    assert free.answer == answer
    assert forced.prompt == build_prompt(TOKENIZER, language="English")
    assert forced.answer == (*b"hi", END)


def test_no_language_is_forced_where_none_was_found_or_none_is_wanted() -> None:
    answers = [(*b"what", END), (*b"no tag", END), (*b"language None", TAG, END)]
    assert [clip.answer for clip in teach(TOKENIZER, clips_of(60, 60, 60), 16, answers)] == answers
    tagged = [(TAG, 1), (TAG, 2)]
    assert [clip.answer for clip in teach(TOKENIZER, clips_of(60, 60), 16, tagged, forced_every=0)] == tagged


def test_clips_without_an_answer_are_left_out() -> None:
    clips = teach(TOKENIZER, clips_of(60, 70, 80), 16, [(), (5, TAG), (3, END)])
    assert [clip.mel.shape[1] for clip in clips] == [80]


def test_decoder_inputs_are_prompt_audio_and_the_answer_but_its_last_token() -> None:
    model, clip = network(), taught_clips(1)[0]
    with torch.no_grad():
        found = embed(model, clip)
        audio = model.encode([torch.from_numpy(clip.mel)])[0]
        table = model.decoder.embed_tokens.weight
    before, after = list(clip.prompt.prefix), list(clip.prompt.suffix + clip.answer[:-1])
    assert torch.equal(found[0], torch.cat([table[before], audio, table[after]]))


def test_only_positions_that_predict_the_answer_weigh_more() -> None:
    clip = taught_clips(1)[0]
    tokens = len(clip.prompt.prefix) + CONFIG.audio.token_count(clip.mel.shape[1])
    tokens += len(clip.prompt.suffix) + len(clip.answer) - 1
    weights = position_weights(clip, tokens, 4.0)
    assert weights.tolist() == [1.0] * (tokens - len(clip.answer)) + [4.0] * len(clip.answer)


def test_a_file_that_is_no_audio_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.wav"
    path.write_bytes(b"no audio at all")
    with pytest.raises(AudioDecodeError, match=r"broken\.wav"):
        list(read_clips([path]))
