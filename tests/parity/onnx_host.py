"""What the host does around the graphs of an ONNX folder, as docs/onnx.md says it, in plain numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from quasr.export.manifest import read_manifest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

SLICE = 3
"""Chunks that go through the stem at once: odd, so that clips are cut in the middle of windows."""


def halve_up(size: int) -> int:
    """ceil(size / 2) three times."""
    return -(-size // 8)


class Host:
    """The three graphs of `folder`, on one thread."""

    def __init__(self, folder: Path) -> None:
        self.manifest = read_manifest(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._sessions = {
            name: onnxruntime.InferenceSession(folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
            for name in ("stem", "encoder", "decoder")
        }
        self._data = np.memmap(folder / self.manifest.embedding.file, mode="r", dtype=np.uint8)

    def embed(self, tokens: Sequence[int]) -> Floats:
        """(tokens,) -> (tokens, hidden)."""
        table = self.manifest.embedding
        if table.dtype == "uint4":
            pairs = self._array(table.offset, (table.shape[0], table.shape[1] // 2), "uint8")[list(tokens)]
            rows = np.empty((len(pairs), table.shape[1]), np.uint8)
            rows[:, ::2], rows[:, 1::2] = pairs % 16, pairs // 16
        else:
            rows = self._array(table.offset, table.shape, table.dtype)[list(tokens)]
        if table.dtype == "float32":
            return rows
        scale = self._array(table.scale_offset, table.scale_shape, "float32")[list(tokens)]
        wide = (rows.astype(np.float32) - table.zero_point).reshape(len(rows), -1, table.group)
        return (wide * scale[:, :, None]).reshape(len(rows), -1)

    def encode(self, mels: Sequence[Floats]) -> Floats:
        """Clips of (mel_bins, frames) -> the vectors of all, one clip after the other."""
        tokens = [self._stem(mel) for mel in mels]
        lengths = [length for clip in tokens for length in self._windows(len(clip))]
        inputs = {"tokens": np.concatenate(tokens), "window_lengths": np.array(lengths, dtype=np.int64)}
        return self._sessions["encoder"].run(None, inputs)[0]

    def cache(self, batch: int, capacity: int) -> list[Floats]:
        """Keys and values of every layer, taking turns; not zeros, because what is not filled may be anything."""
        facts = self.manifest.graph
        shape = (batch, facts.kv_heads, capacity, facts.head_dim)
        return [np.full(shape, 3.0, dtype=np.float32) for _ in range(2 * facts.layers)]

    def prefill(self, rows: Sequence[Floats], cache: Sequence[Floats]) -> Floats:
        """Prompts (tokens, hidden), ragged -> logits (batch, vocab)."""
        longest = max(len(row) for row in rows)
        padded = np.stack([np.pad(row, ((0, longest - len(row)), (0, 0)), constant_values=9.0) for row in rows])
        ends = [len(row) - 1 for row in rows]
        return self._decode(padded, ends, longest, ends, cache)

    def step(self, tokens: Sequence[int], lengths: Sequence[int], cache: Sequence[Floats]) -> Floats:
        """One token a row, behind `lengths` others -> logits (batch, vocab)."""
        return self._decode(self.embed(tokens)[:, None], lengths, max(lengths) + 1, [0] * len(tokens), cache)

    def _stem(self, mel: Floats) -> Floats:
        facts, frames = self.manifest.graph, mel.shape[1]
        padded = np.pad(mel, ((0, 0), (0, -frames % facts.chunk_frames)))
        chunks = padded.reshape(len(mel), -1, facts.chunk_frames).transpose(1, 0, 2)
        parts = [
            self._sessions["stem"].run(None, {"mel": np.ascontiguousarray(chunks[start : start + SLICE])})[0]
            for start in range(0, len(chunks), SLICE)
        ]
        full, rest = divmod(frames, facts.chunk_frames)
        tokens = np.concatenate(parts)
        return tokens.reshape(-1, tokens.shape[-1])[: full * facts.chunk_tokens + halve_up(rest)]

    def _windows(self, tokens: int) -> list[int]:
        full, rest = divmod(tokens, self.manifest.graph.window_tokens)
        return [self.manifest.graph.window_tokens] * full + [rest] * (rest > 0)

    def _decode(
        self, embeddings: Floats, seqlens: Sequence[int], total: int, last: Sequence[int], cache: Sequence[Floats]
    ) -> Floats:
        """With the past and the present in the same memory."""
        session = self._sessions["decoder"]
        binding = session.io_binding()
        binding.bind_cpu_input("embeddings", np.ascontiguousarray(embeddings))
        binding.bind_cpu_input("seqlens_k", np.array(seqlens, dtype=np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array(total, dtype=np.int32))
        binding.bind_cpu_input("last", np.array(last, dtype=np.int64))
        for number, array in enumerate(cache):
            name = f"{('key', 'value')[number % 2]}_{number // 2}"
            where: tuple[Any, ...] = ("cpu", 0, np.float32, array.shape, array.ctypes.data)
            binding.bind_input(f"past_{name}", *where)
            binding.bind_output(f"present_{name}", *where)
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        names = [output.name for output in session.get_outputs()]
        return binding.get_outputs()[names.index("logits")].numpy()

    def _array(self, offset: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        kind = np.dtype(dtype)
        size = int(np.prod(shape)) * kind.itemsize
        return self._data[offset : offset + size].view(kind).reshape(shape)
