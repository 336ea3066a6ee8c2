"""Export for other programs: compressed-tensors, `pack-quantized`, the decoder's linears in symmetric 4 bits.

Names and config are those of the -hf layout; encoder, projector and embedding stay in 16 bits, a tied head is not
stored. transformers reads the folder with the compressed-tensors package. It follows what vLLM's loader documents
(`weight_packed`, `weight_scale`, `weight_shape`); that was not run.

`weight_packed` is int32 (out, in / 8): eight codes + 8 in each, the lowest bits first, which on a little-endian machine
are the bytes of `Int4Linear.weight`.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from quasr.errors import OptionError
from quasr.model.config import read_json
from quasr.quant.linear import Int4Linear
from quasr.quant.recipe import Recipe, parse_rule
from quasr.quant.scheme import parse
from quasr.quant.store import check_output, copy_others
from quasr.text.tokenizer import Tokenizer
from quasr.weights.layout import checkpoint_name
from quasr.weights.load import SINGLE_FILE
from quasr.weights.save import fresh_folder, write_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from quasr.model.asr import Qwen3ASR
    from quasr.model.config import AudioConfig, TextConfig

PROCESSOR_FILE = "processor_config.json"
ORIGINAL_ONLY = ("preprocessor_config.json", "chat_template.json")
"""Files of the original layout that transformers' processor would misread."""

CHAT_TEMPLATE = """\
{%- macro spoken(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- else -%}
    {%- for part in content -%}
      {{- '<|audio_start|><|audio_pad|><|audio_end|>' if part.type == 'audio' else part.text -}}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{{- '<|im_start|>system\\n' -}}
{%- for message in messages if message.role == 'system' -%}{{- spoken(message.content) -}}{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- for message in messages if message.role != 'system' -%}
  {{- '<|im_start|>' + message.role + '\\n' + spoken(message.content) + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""The prompt of `quasr.text.prompt`: the context as system message, the audio as the user's."""


def export_recipe(compute_type: str, rules: Sequence[str] = ()) -> Recipe:
    """Four bits in the decoder's layers and nothing else; rules may leave some of those alone with `=none`.

    Raises OptionError for anything but int4.
    """
    scheme = parse(compute_type)
    if scheme.kind != "int4":
        raise OptionError(
            f"compressed-tensors folders are written in int4, int4-g64 or int4-g32, not in {compute_type}"
        )
    front = tuple(map(parse_rule, rules))
    if any(other.kind != "none" and other != scheme for _, other in front):
        raise OptionError(f"in a compressed-tensors folder a rule can say {scheme} or none: it has one scheme")
    return Recipe(f"{scheme} decoder", (*front, ("decoder.layers.*", scheme)))


def save_compressed_tensors(
    model: Qwen3ASR,
    source_folder: Path,
    output: Path,
    files: Mapping[str, str] | None = None,
) -> None:
    """Writes a network made by `export_recipe` as `output`, whole or not at all.

    Tokenizer and other files come from `source_folder`, except those in `files` (name -> text); a processor for
    transformers joins them where the source has none.
    Raises OptionError for an output that exists or a network in other schemes, ResourceError for the disk.
    """
    check_output(output)
    group = _group(model)
    with fresh_folder(output) as fresh:
        save_file(_tensors(model), fresh / SINGLE_FILE, metadata={"format": "pt"})
        copy_others(source_folder, fresh)
        for name, text in (files or {}).items():
            (fresh / name).write_text(text, encoding="utf-8")
        raw = read_json(fresh / "config.json")
        tokenizer = Tokenizer.from_folder(fresh)
        write_json(
            fresh / "config.json", _config(model, tokenizer, raw) | {"quantization_config": _scheme(model, group)}
        )
        if not (fresh / PROCESSOR_FILE).is_file():
            _write_processor(fresh, tokenizer, model.config.audio)
        shutil.copymode(fresh / "config.json", fresh / SINGLE_FILE)


def _group(model: Qwen3ASR) -> int:
    """The one group size of all 4-bit layers."""
    layers = dict(model.decoder.layers.named_modules())
    groups = {layer.group for layer in layers.values() if isinstance(layer, Int4Linear)}
    others = [layer for layer in model.modules() if not isinstance(layer, Int4Linear)]
    whole = all(tensor.is_floating_point() for layer in others for tensor in layer.buffers(recurse=False))
    if len(groups) != 1 or not whole:
        raise OptionError("a compressed-tensors folder holds 4-bit linears of one group size, the rest in 16 bits")
    return groups.pop()


def _tensors(model: Qwen3ASR) -> dict[str, Tensor]:
    packed = {name: layer for name, layer in model.named_modules() if isinstance(layer, Int4Linear)}
    tensors = {}
    for name, tensor in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        if path not in packed:
            tensors[checkpoint_name(name, "hf")] = tensor.detach().cpu().contiguous()
        elif leaf == "weight":
            tensors |= _packed(checkpoint_name(name, "hf"), packed[path])
    return tensors


def _packed(name: str, layer: Int4Linear) -> dict[str, Tensor]:
    return {
        f"{name}_packed": layer.weight.cpu().contiguous().view(torch.int32),
        f"{name}_scale": layer.scale.cpu().contiguous(),
        f"{name}_shape": torch.tensor([layer.out_features, layer.in_features]),
    }


def _scheme(model: Qwen3ASR, group: int) -> dict[str, Any]:
    """What config.json says of the quantisation: every linear but those that are listed."""
    plain = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    ignore = [checkpoint_name(f"{name}.weight", "hf").removesuffix(".weight") for name in plain]
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": sorted({*ignore, "lm_head"}),
    }


def _config(model: Qwen3ASR, tokenizer: Tokenizer, raw: dict[str, Any]) -> dict[str, Any]:
    """config.json of the -hf layout; a source that has it keeps its own entries."""
    dtype = str(model.decoder.norm.weight.dtype).removeprefix("torch.")
    if "thinker_config" not in raw:
        return raw | {"dtype": dtype}
    special, text = tokenizer.special, model.config.text
    stated: dict[str, Any] = {name: raw[name] for name in ("support_languages", "max_audio_seconds") if name in raw}
    return {
        "architectures": ["Qwen3ASRForConditionalGeneration"],
        "model_type": "qwen3_asr",
        "audio_config": _audio_config(model.config.audio),
        "text_config": _text_config(text, raw["thinker_config"]["text_config"]),
        "audio_token_id": special.audio_pad,
        "eos_token_id": [special.endoftext, special.im_end],
        "pad_token_id": special.endoftext,
        "tie_word_embeddings": text.tied_head,
        "dtype": dtype,
        **stated,
    }


def _audio_config(config: AudioConfig) -> dict[str, Any]:
    return {
        "model_type": "qwen3_asr_encoder",
        "encoder_layers": config.layers,
        "d_model": config.width,
        "encoder_attention_heads": config.heads,
        "encoder_ffn_dim": config.ffn,
        "output_dim": config.output,
        "num_mel_bins": config.mel_bins,
        "downsample_hidden_size": config.stem_channels,
        "n_window": config.chunk_frames // 2,
        "n_window_infer": config.window_frames,
        "max_position_embeddings": config.chunk_tokens,
    }


def _text_config(config: TextConfig, raw: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn,
        "rms_norm_eps": config.rms_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": int(raw.get("max_position_embeddings", 65536)),
        "tie_word_embeddings": config.tied_head,
    }


def _write_processor(folder: Path, tokenizer: Tokenizer, config: AudioConfig) -> None:
    """Tokenizer, feature extractor and chat template as transformers' Qwen3ASRProcessor wants them."""
    for name in ORIGINAL_ONLY:
        (folder / name).unlink(missing_ok=True)
    write_json(folder / "tokenizer.json", tokenizer.to_json())
    path = folder / "tokenizer_config.json"
    tokens = {
        "tokenizer_class": "Qwen2Tokenizer",
        "processor_class": "Qwen3ASRProcessor",
        "audio_token": "<|audio_pad|>",
        "audio_bos_token": "<|audio_start|>",
        "audio_eos_token": "<|audio_end|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    write_json(path, (read_json(path) if path.is_file() else {}) | tokens)
    extractor = {
        "feature_extractor_type": "Qwen3ASRFeatureExtractor",
        "feature_size": config.mel_bins,
        "n_window": config.chunk_frames // 2,
        "return_attention_mask": True,
    }
    write_json(folder / PROCESSOR_FILE, {"processor_class": "Qwen3ASRProcessor", "feature_extractor": extractor})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
