"""Arguments that several commands share, and the loading of a model from them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from quasr.cli.terminal import megabytes, note

if TYPE_CHECKING:
    from quasr.pipeline.transcriber import Transcriber

ModelOption = Annotated[str, typer.Option("--model", "-m", help="'demo', a checkpoint folder, or a hub id.")]
LanguageOption = Annotated[
    str | None, typer.Option("--language", help="Spoken language, as a name or an ISO code. Default: detected.")
]
ContextOption = Annotated[str, typer.Option("--context", help="Text that helps: names, terms, what came before.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, bf16, fp16 or fp32.")]
ComputeTypeOption = Annotated[
    str, typer.Option("--compute-type", help="auto, bf16, fp16, fp32, int8, int4, int4-g64, llm-int8, nf4, ...")
]
MemoryOption = Annotated[
    str | None, typer.Option("--memory", help="Budget such as 4GB: precision, clips and batches are chosen to fit.")
]
OffloadOption = Annotated[
    int, typer.Option("--offload", min=0, help="Decoder layers to keep in main memory: less on the GPU, slower.")
]
ThresholdOption = Annotated[
    float | None, typer.Option("--threshold", help="Of llm-int8: activations this large stay in 16 bits; 0: none.")
]
HubOption = Annotated[str, typer.Option("--hub", help="huggingface or modelscope.")]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Use only what is already downloaded.")]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", min=1, help="Pieces of audio decoded together.")]
MaxNewTokensOption = Annotated[
    int | None, typer.Option("--max-new-tokens", min=1, help="Token budget of a piece. Default: from its length.")
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="On the CPU. Default: one for each physical core.")
]
EngineOption = Annotated[
    str, typer.Option("--engine", help="auto, torch, or onnx (ONNX Runtime; a checkpoint is converted once).")
]
ProviderOption = Annotated[str, typer.Option("--provider", help="Of ONNX Runtime: auto (cpu), cpu, cuda, tensorrt.")]


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """Which model to load, from where, on to what."""

    model: str
    device: str
    dtype: str
    hub: str
    revision: str | None
    offline: bool
    compute_type: str = "auto"
    threshold: float | None = None
    memory: str | None = None
    batch_size: int | None = None
    offload: int = 0
    engine: str = "auto"
    provider: str = "auto"
    threads: int | None = None

    def load(self) -> Transcriber:
        """Loads it, and says on standard error what runs where."""
        from quasr.pipeline.transcriber import load
        from quasr.weights.hub import HubOptions

        started = time.perf_counter()
        hub = HubOptions(hub=self.hub, revision=self.revision, offline=self.offline)
        transcriber = load(
            self.model,
            device=self.device,
            dtype=self.dtype,
            compute_type=self.compute_type,
            threshold=self.threshold,
            memory=self.memory,
            batch_size=self.batch_size,
            offload=self.offload,
            engine=self.engine,
            provider=self.provider,
            threads=self.threads,
            hub=hub,
        )
        info = transcriber.info
        precision = info.dtype if info.scheme == "none" else f"{info.scheme} in {info.dtype}"
        note(
            f"{self.model}: {info.name} on {info.device}, {precision}, {megabytes(info.weight_bytes)} of weights, "
            f"loaded in {time.perf_counter() - started:.1f} s"
        )
        if self.memory or self.offload:
            note("; ".join(info.reasons))
        return transcriber
