"""A complete checkpoint with random weights, small enough to make in a test: network, config and tokenizer files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from quasr.model.asr import Qwen3ASR
from quasr.model.config import parse_config
from quasr.weights.save import save_model

if TYPE_CHECKING:
    from pathlib import Path

    from quasr.model.config import Layout

SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>",
)  # fmt: skip
ASR_TEXT = "<asr_text>"
CORPUS = ["language English system user assistant the cat sat on the mat and one two three four five"] * 4


def make_checkpoint(folder: Path, layout: Layout) -> Path:
    """Writes the checkpoint into `folder`, with the tokenizer files that the layout usually has."""
    tokenizer = _tokenizer()
    config = _config(tokenizer, layout)
    folder.mkdir(parents=True)
    save_model(_network(config, tokenizer), folder, config, layout)
    if layout == "hf":
        tokenizer.save(str(folder / "tokenizer.json"))
    else:
        _save_parts(tokenizer, folder)
    return folder


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.add_tokens([ASR_TEXT])
    return tokenizer


def _save_parts(tokenizer: Tokenizer, folder: Path) -> None:
    """vocab.json, merges.txt, and the added tokens in tokenizer_config.json."""
    model = json.loads(tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = "\n".join(pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    added = {
        str(tokenizer.token_to_id(text)): {"content": text, "special": text != ASR_TEXT}
        for text in (*SPECIALS, ASR_TEXT)
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}), encoding="utf-8")


def _config(tokenizer: Tokenizer, layout: Layout) -> dict[str, Any]:
    audio = {
        "encoder_layers": 2, "d_model": 32, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "output_dim": 48,
        "downsample_hidden_size": 8,
    }  # fmt: skip
    text = {
        "vocab_size": tokenizer.get_vocab_size(), "hidden_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96,
    }  # fmt: skip
    body = {"audio_config": audio, "text_config": text, "audio_token_id": tokenizer.token_to_id("<|audio_pad|>")}
    return {"model_type": "qwen3_asr", **(body if layout == "hf" else {"thinker_config": body})}


def _network(config: dict[str, Any], tokenizer: Tokenizer) -> Qwen3ASR:
    """Weights that keep activations near 1, and a head that hardly ever says anything but ASCII.

    Random signs in the final norm, or the newest token would repeat.
    """
    network = Qwen3ASR(parse_config(config))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1:
                weight.copy_(noise * 1.3 / weight[0].numel() ** 0.5)
            elif name.endswith("bias"):
                weight.copy_(noise * 0.1)
            elif name == "decoder.norm.weight":
                weight.copy_(noise.sign())
        for index in range(tokenizer.get_vocab_size()):
            if not tokenizer.decode([index]).strip().isalnum() or not tokenizer.decode([index]).isascii():
                network.decoder.embed_tokens.weight[index] *= 0.1
    return network
