"""Trains the demo model's byte-level BPE and writes tokenizer.json with Qwen3-ASR's special tokens."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from corpus import chinese_sentences, english_sentences, spoken

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FRAME = ["language English", "language Chinese", "language None", "system\n", "user\n", "assistant\n"]
"""Said in every prompt or answer, so worth one token a word; weighted to make sure of that."""

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>")


def train(text_folder: Path, vocab_size: int) -> Tokenizer:
    """Cased and spoken English, and Mandarin characters; every byte is in the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    english = english_sentences(text_folder)
    # Single characters: Mandarin words as units would take the vocabulary that English needs.
    chinese = [" ".join(line) for line in chinese_sentences(text_folder)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL) - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=12,
        show_progress=False,
    )
    tokenizer.train_from_iterator([*english, *map(spoken, english), *chinese, *FRAME * 20_000], trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROL])
    tokenizer.add_tokens([AddedToken("<asr_text>", special=False, normalized=False)])
    return tokenizer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text_folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--vocab-size", type=int, default=1792)
    arguments = parser.parse_args()
    train(arguments.text_folder, arguments.vocab_size).save(str(arguments.output), pretty=False)
