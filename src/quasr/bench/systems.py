"""What can be measured: our engine in some precision, or a peer; each runs clips to a given number of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from quasr.engine.base import ClipRequest
from quasr.engine.device import DTYPES, choose
from quasr.engine.plan import DTYPE_BYTES
from quasr.errors import ModelError
from quasr.model.config import read_config
from quasr.pipeline.engines import Source, torch_engine
from quasr.pipeline.planning import stored_recipe
from quasr.quant.recipe import EMBEDDING, HEAD, layers, recipe_for
from quasr.quant.scheme import NONE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from quasr.bench.job import Job
    from quasr.engine.base import Engine, EngineInfo
    from quasr.model.config import ModelConfig
    from quasr.quant.recipe import Recipe

PREFIX, SUFFIX = 9, 6
"""Positions of the prompt before and after the audio, without context and with the language detected."""


class System(Protocol):
    """A loaded model. `token_bytes`: bytes of the weights that one decode step reads."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def token_bytes(self) -> int: ...

    def prepare(self, clips: Sequence[NDArray[np.float32]], tokens: int) -> Callable[[], None]:
        """What is timed: one call that decodes `tokens` new tokens of every clip, done when it returns.

        It raises ModelError where there are more or fewer.
        """
        ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """Ids around the audio. They are no text: weights are read all the same, and stop tokens do not count."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    @classmethod
    def of(cls, config: ModelConfig) -> Prompt:
        """Small ids, which every vocabulary has, and none of which is an audio position."""
        ids = [number for number in range(1, PREFIX + SUFFIX + 2) if number != config.audio_token_id]
        return cls(tuple(ids[:PREFIX]), tuple(ids[PREFIX : PREFIX + SUFFIX]))


class QuasrSystem:
    """Our engine on a folder, in the precision that the job names."""

    def __init__(self, job: Job) -> None:
        folder = Path(job.folder)
        config = read_config(folder)
        recipe = recipe_for(job.system)
        self._engine = _engine(job, folder, config, recipe)
        self._prompt = Prompt.of(config)
        self.token_bytes = token_bytes(config, stored_recipe(folder) or recipe, self.info.dtype)

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    def prepare(self, clips: Sequence[NDArray[np.float32]], tokens: int) -> Callable[[], None]:
        """As System says. Making the mel frames is part of what is timed."""
        prefix, suffix = self._prompt.prefix, self._prompt.suffix
        requests = [ClipRequest(samples, prefix, suffix, tokens) for samples in clips]

        def call() -> None:
            check_counts([len(result.tokens) for result in self._engine.run(requests)], tokens)

        return call


def _engine(job: Job, folder: Path, config: ModelConfig, recipe: Recipe) -> Engine:
    """The engine that `load` makes, but nothing stops it before its budget."""
    placement = choose(job.device, job.system if job.system in DTYPES else "auto")
    return torch_engine(Source(folder, config, frozenset()), placement, recipe)


def check_counts(counts: Sequence[int], tokens: int) -> None:
    """Raises ModelError where a clip did not get exactly `tokens`: its time would be of other work."""
    wrong = [count for count in counts if count != tokens]
    if wrong:
        raise ModelError(f"{wrong[0]} tokens were decoded where {tokens} were asked for: the times cannot be compared")


def token_bytes(config: ModelConfig, recipe: Recipe, dtype: str) -> int:
    """Bytes of weights that one decode step reads: the decoder's linears and the head, with their scales.

    The norms and the cache are left out: of 1.7B they are 0.03 % and, at 500 positions, 3 % of 16-bit weights.
    """
    schemes = recipe.assign(config)
    head = EMBEDDING if config.text.tied_head else HEAD
    read = (layer for layer in layers(config) if layer.name.startswith("decoder.layers.") or layer.name == head)
    return sum(schemes.get(layer.name, NONE).bytes(layer.rows, layer.columns, DTYPE_BYTES[dtype]) for layer in read)
