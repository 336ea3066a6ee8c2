"""What `quasr quantize` writes: where, in which format, with which part of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quasr.cli.terminal import megabytes, note, result
from quasr.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from quasr.model.asr import Qwen3ASR
    from quasr.model.config import ModelConfig
    from quasr.quant.recipe import Recipe
    from quasr.quant.vocabulary import Keep, Pruning
    from quasr.text.tokenizer import Tokenizer

FORMATS = ("quasr", "compressed-tensors")
"""quasr: loads here without conversion. compressed-tensors: for transformers and other programs."""


@dataclass(frozen=True, slots=True)
class Target:
    """`keep`: what the vocabulary must still say; None for all of it."""

    folder: Path
    format: str
    keep: Keep | None

    def recipe(self, compute_type: str, threshold: float | None, rules: Sequence[str]) -> Recipe:
        """What the format makes of a compute type. Raises OptionError for what it cannot hold."""
        from quasr.quant.recipe import recipe_for

        if self.format not in FORMATS:
            raise OptionError(f"unknown format {self.format[:40]!r}: there is {', '.join(FORMATS)}")
        recipe = recipe_for(compute_type, threshold, rules)
        if self.format == "quasr":
            return recipe
        from quasr.quant.compressed_tensors import export_recipe

        return export_recipe(compute_type, rules)

    def vocabulary(self, source: Path, config: ModelConfig) -> Vocabulary | None:
        """The tokens that stay, chosen before the work begins; None for all."""
        if self.keep is None:
            return None
        from quasr.quant.vocabulary import choose_tokens
        from quasr.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_folder(source)
        pruning = choose_tokens(tokenizer, source, config.text.vocab_size, self.keep)
        note(f"{len(pruning.ids):,} of {pruning.rows:,} tokens stay")
        return Vocabulary(source, tokenizer, pruning)

    def save(
        self, network: Qwen3ASR, recipe: Recipe, source: Path, metadata: Mapping[str, Any], files: Mapping[str, str]
    ) -> None:
        """Writes the folder, whole or not at all. Raises OptionError, ResourceError."""
        if self.format == "quasr":
            from quasr.quant.store import save_quantised

            save_quantised(network, recipe, source, self.folder, metadata, files)
            return
        from quasr.quant.compressed_tensors import save_compressed_tensors

        save_compressed_tensors(network, source, self.folder, files)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of the checkpoint `source` that stay."""

    source: Path
    tokenizer: Tokenizer
    pruning: Pruning

    def apply(self, network: Qwen3ASR) -> dict[str, str]:
        """Takes the rows out of a network, says what that saves, and returns the files of the new vocabulary."""
        from quasr.quant.vocabulary import head_milliseconds, prune, pruned_files

        before, slower = _bytes(network), head_milliseconds(network)
        prune(network, self.pruning)
        faster = head_milliseconds(network)
        device = network.decoder.norm.weight.device
        result(
            f"vocabulary: {megabytes(before - _bytes(network))} less; the head takes {faster:.1f} ms a token here "
            f"({device}) instead of {slower:.1f}"
        )
        return pruned_files(self.tokenizer, self.source, self.pruning)


def _bytes(network: Qwen3ASR) -> int:
    return sum(tensor.nbytes for tensor in network.state_dict().values())
