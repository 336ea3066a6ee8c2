"""Turns the parts that train.py saved into the checkpoint folder that the package ships."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer

from quasr.model.asr import Qwen3ASR
from quasr.model.config import parse_config
from quasr.weights.save import save_model
from train import Recipe, architecture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", type=Path, nargs="+", help="the .pt files of one run")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--window-frames", type=int, default=100)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
    ids = {token: number for token, number in tokenizer.get_vocab().items() if token.startswith("<|")}
    config = architecture(tokenizer.get_vocab_size(), ids, Recipe(window_frames=arguments.window_frames))
    network = Qwen3ASR(parse_config(config)).to(torch.bfloat16)
    state = {}
    for part in arguments.parts:
        state.update(torch.load(part, weights_only=True))
    network.load_state_dict(state)
    save_model(network, arguments.output, config)
    shutil.copyfile(arguments.tokenizer, arguments.output / "tokenizer.json")


if __name__ == "__main__":
    main()
