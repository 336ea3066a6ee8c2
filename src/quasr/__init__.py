"""quasr: Qwen3-ASR in little memory. Public names load on first use, so `import quasr` is quick."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quasr.errors import QuasrError
    from quasr.pipeline.service import ServiceResult, SpeechService
    from quasr.pipeline.transcriber import Transcriber, load
    from quasr.types import Notice, Segment, Timings, TranscribeOptions, Transcript, Word

__version__ = "0.1.0"

_HOMES = {
    "Notice": "quasr.types",
    "QuasrError": "quasr.errors",
    "Segment": "quasr.types",
    "ServiceResult": "quasr.pipeline.service",
    "SpeechService": "quasr.pipeline.service",
    "Timings": "quasr.types",
    "TranscribeOptions": "quasr.types",
    "Transcriber": "quasr.pipeline.transcriber",
    "Transcript": "quasr.types",
    "Word": "quasr.types",
    "load": "quasr.pipeline.transcriber",
}

__all__ = [
    "Notice",
    "QuasrError",
    "Segment",
    "ServiceResult",
    "SpeechService",
    "Timings",
    "TranscribeOptions",
    "Transcriber",
    "Transcript",
    "Word",
    "__version__",
    "load",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'quasr' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
