"""What every parameter of the network is called in a checkpoint, as prefix rules. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quasr.model.config import Layout

PREFIXES: dict[Layout, tuple[tuple[str, str], ...]] = {
    "original": (
        ("encoder.stem.", "thinker.audio_tower."),
        ("encoder.linear_1.", "thinker.audio_tower.proj1."),
        ("encoder.linear_2.", "thinker.audio_tower.proj2."),
        ("encoder.", "thinker.audio_tower."),
        ("decoder.lm_head.", "thinker.lm_head."),
        ("decoder.", "thinker.model."),
    ),
    "hf": (
        ("encoder.stem.", "model.audio_tower."),
        ("encoder.linear_1.", "model.multi_modal_projector.linear_1."),
        ("encoder.linear_2.", "model.multi_modal_projector.linear_2."),
        ("encoder.", "model.audio_tower."),
        ("decoder.lm_head.", "lm_head."),
        ("decoder.", "model.language_model."),
    ),
}
"""(prefix here, prefix there), the first that fits counts. `original`: Qwen/Qwen3-ASR-*; `hf`: Qwen/Qwen3-ASR-*-hf."""

HEAD = "decoder.lm_head.weight"
EMBEDDING = "decoder.embed_tokens.weight"


def checkpoint_name(parameter: str, layout: Layout) -> str:
    """The checkpoint's name of one parameter of `Qwen3ASR`. Raises KeyError for a name that no rule covers."""
    for here, there in PREFIXES[layout]:
        if parameter.startswith(here):
            return there + parameter.removeprefix(here)
    raise KeyError(parameter)


def name_table(parameters: Iterable[str], layout: Layout) -> dict[str, str]:
    """Parameter name -> checkpoint name."""
    return {name: checkpoint_name(name, layout) for name in parameters}


def other_layout(layout: Layout) -> Layout:
    """The layout that `layout` is not."""
    return "hf" if layout == "original" else "original"
