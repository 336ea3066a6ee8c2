"""Other programs on the same checkpoint: transformers eager, compiled, and with bitsandbytes."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quasr.bench.subjects import BITSANDBYTES
from quasr.bench.systems import Prompt, check_counts, token_bytes
from quasr.engine.base import EngineInfo
from quasr.engine.device import choose
from quasr.errors import OptionError
from quasr.model.config import read_config
from quasr.quant.recipe import recipe_for
from quasr.quant.store import check_unquantised
from quasr.types import SAMPLE_RATE

transformers: Any = import_module("transformers")
Network, FeatureExtractor = transformers.Qwen3ASRForConditionalGeneration, transformers.Qwen3ASRFeatureExtractor
# Looked up here, because that is what imports them, and importing is not loading.

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from quasr.bench.job import Job
    from quasr.engine.device import Placement


class TransformersSystem:
    """transformers' own network and `generate`, greedy, in the dtype that the device computes best in.

    It reads the -hf layout only: of the original one it would run random weights and not say so.
    """

    def __init__(self, job: Job) -> None:
        folder = Path(job.folder)
        self._config = read_config(folder)
        if self._config.layout != "hf":
            raise OptionError(f"{folder} is in the original layout, which transformers does not read: give an -hf one")
        check_unquantised(folder)
        placement = choose(job.device)
        self._device = placement.device
        self._model = _load(folder, placement, job.system)
        self._model.generation_config = _generation(job, self._device)
        recipe = recipe_for(job.system if job.system in BITSANDBYTES else "auto")
        self.info = EngineInfo(
            name=job.system,
            device=str(self._device),
            dtype=placement.dtype_name,
            weight_bytes=self._model.get_memory_footprint(),
            reasons=placement.reasons,
            scheme=recipe.name,
        )
        self.token_bytes = token_bytes(self._config, recipe, placement.dtype_name)

    def prepare(self, clips: Sequence[NDArray[np.float32]], tokens: int) -> Callable[[], None]:
        """As System says. The mel frames are made here, so that they are not part of what is timed.

        The cache is always sized for the job's tokens, or a call with fewer would be compiled anew.
        """
        inputs = self._inputs(clips)
        length = inputs["input_ids"].shape[1]
        full = length + tokens

        def stop(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((len(ids),), ids.shape[1] >= full, device=ids.device)

        def call() -> None:
            found = self._model.generate(**inputs, stopping_criteria=[stop])
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            check_counts([found.shape[1] - length], tokens)

        return call

    def _inputs(self, clips: Sequence[NDArray[np.float32]]) -> dict[str, torch.Tensor]:
        """All clips are of one length, so that nothing is padded."""
        made = FeatureExtractor()(list(clips), sampling_rate=SAMPLE_RATE, padding="longest", return_attention_mask=True)
        prompt, mask = Prompt.of(self._config), made["attention_mask"]
        audio = [self._config.audio_token_id or 0] * self._config.audio.token_count(int(mask[0].sum()))
        ids = torch.tensor([[*prompt.prefix, *audio, *prompt.suffix]] * len(clips), device=self._device)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "input_features": made["input_features"].to(self._device, self._model.dtype),
            "input_features_mask": mask.to(self._device),
        }


def _load(folder: Path, placement: Placement, name: str) -> Any:
    options: dict[str, Any] = {"dtype": placement.dtype}
    if name in BITSANDBYTES:
        options |= {"quantization_config": _quantisation(name, placement), "device_map": {"": placement.device}}
    model = Network.from_pretrained(folder, **options).eval()
    return model if name in BITSANDBYTES else model.to(placement.device)


def _quantisation(name: str, placement: Placement) -> Any:
    """With the defaults of each method: threshold 6.0, and blocks of 64."""
    if name == "llm-int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=placement.dtype
    )


def _generation(job: Job, device: torch.device) -> Any:
    """Greedy, without stop tokens. transformers compiles the decode step of a static cache by itself on CUDA."""
    config = transformers.GenerationConfig(
        max_new_tokens=job.tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    if job.system == "transformers-compile":
        config.cache_implementation = "static"
        # Compiled for each batch size: a graph for any size would be slower.
        config.compile_config = transformers.CompileConfig(dynamic=False)
        config.compile_config._compile_all_devices = device.type != "cuda"
    return config
