from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from weights_samples import HF, ORIGINAL, SIZES

from quasr.errors import CheckpointError, ModelError, ModelNotFoundError, UnsupportedModelError
from quasr.model.config import AudioConfig, parse_config, read_config

if TYPE_CHECKING:
    from pathlib import Path

# The published sizes of Qwen3-ASR-0.6B.
AUDIO_06B = AudioConfig(layers=18, width=896, heads=14, ffn=3584, output=1024)


def write(folder: Path, config: Any, name: str = "config.json") -> Path:
    (folder / name).write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def changed(part: str, **entries: Any) -> dict[str, Any]:
    return {**HF, part: {**SIZES[part], **entries}}


def test_both_layouts_give_the_same_sizes() -> None:
    one, two = parse_config(ORIGINAL), parse_config(HF)
    assert (one.layout, two.layout) == ("original", "hf")
    assert (one.audio, one.text) == (two.audio, two.text)
    assert (one.audio.layers, one.audio.width, one.audio.output) == (2, 16, 20)
    assert (one.text.heads, one.text.kv_heads, one.text.head_dim, one.text.vocab_size) == (4, 2, 8, 32)


@pytest.mark.parametrize(
    ("frames", "tokens"),
    # From the report: 13 tokens a second; the rest of a chunk is halved three times, rounding up.
    [(1, 1), (2, 1), (8, 1), (9, 2), (50, 7), (99, 13), (100, 13), (101, 14), (799, 104), (801, 105), (6170, 802)],
)
def test_token_count(frames: int, tokens: int) -> None:
    assert AUDIO_06B.token_count(frames) == tokens


def test_derived_sizes() -> None:
    assert (AUDIO_06B.chunk_tokens, AUDIO_06B.window_chunks, AUDIO_06B.stem_features) == (13, 8, 7680)


def test_stop_ids_and_audio_token(tmp_path: Path) -> None:
    write(tmp_path, {**HF, "audio_token_id": 7})
    write(tmp_path, {"eos_token_id": [1, 2]}, "generation_config.json")
    config = read_config(tmp_path)
    assert (config.audio_token_id, config.eos_token_ids) == (7, (1, 2))
    assert read_config(write(tmp_path, {**HF, "eos_token_id": 5})).eos_token_ids == (5,)


def test_rope_theta_in_either_place() -> None:
    assert parse_config(changed("text_config", rope_theta=5e5)).text.rope_theta == 5e5
    assert parse_config(changed("text_config", rope_parameters={"rope_theta": 2e6})).text.rope_theta == 2e6
    assert parse_config(HF).text.rope_theta == 1e6


def test_the_longest_audio_is_known_only_where_the_checkpoint_says_it() -> None:
    for layout in (HF, ORIGINAL):
        assert parse_config(layout).max_audio_seconds is None
        assert parse_config({**layout, "max_audio_seconds": 32}).max_audio_seconds == 32.0


@pytest.mark.parametrize("kind", [None, "whisper", "qwen3_omni"])
def test_other_architectures(tmp_path: Path, kind: str | None) -> None:
    with pytest.raises(UnsupportedModelError, match="qwen3_asr"):
        read_config(write(tmp_path, {**HF, "model_type": kind}))


def test_no_folder_and_no_config(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        read_config(tmp_path / "none")
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        {"model_type": "qwen3_asr"},
        {"model_type": "qwen3_asr", "thinker_config": {}},
        changed("text_config", vocab_size=0),
        changed("text_config", rms_norm_eps=float("nan")),
        changed("text_config", rope_theta=-1),
        changed("text_config", rope_parameters=[1]),
        changed("text_config", vocab_size=float("inf")),
        changed("text_config", num_key_value_heads=3),
        changed("text_config", head_dim=7),
        changed("text_config", hidden_size=21),
        changed("text_config", hidden_size="wide"),
        changed("text_config", num_hidden_layers=None),
        changed("audio_config", encoder_layers=-1),
        changed("audio_config", d_model=18, encoder_attention_heads=4),
        changed("audio_config", n_window=0),
        changed("audio_config", n_window_infer=850),
        changed("audio_config", encoder_attention_heads=0),
        {**HF, "max_audio_seconds": 0},
        {**HF, "max_audio_seconds": "long"},
        {**HF, "max_audio_seconds": float("nan")},
    ],
)
def test_configs_that_make_no_sense(tmp_path: Path, config: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_config(write(tmp_path, config))
    assert "\n" not in str(caught.value)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
KEYS = [*HF, *(key for part in ("audio_config", "text_config") for key in SIZES[part]), "rope_scaling", "n_window"]


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    key=st.sampled_from([*KEYS, "eos_token_id", "audio_token_id", "thinker_config", "dtype", "max_audio_seconds"]),
    value=ANYTHING,
)
def test_any_value_anywhere_is_read_or_refused(tmp_path: Path, key: str, value: Any) -> None:
    config = {name: dict(part) if isinstance(part, dict) else part for name, part in HF.items()}
    homes = [
        part for part in ("audio_config", "text_config") if key in SIZES[part] or key in ("rope_scaling", "n_window")
    ]
    for home in homes:
        config[home][key] = value
    if not homes:
        config[key] = value
    try:
        got = read_config(write(tmp_path, config))
    except ModelError as error:
        message = str(error)
    else:
        assert got.text.heads % got.text.kv_heads == 0
        return
    assert "\n" not in message
