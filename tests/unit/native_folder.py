"""Random decoders as an ONNX folder's data file and manifest, and the plain formula over their dequantised weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from quasr.bench.shape import Shape
from quasr.export.manifest import EmbeddingTable, GraphFacts, Manifest, Tensor
from quasr.model.config import read_config

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    Array = NDArray[Any]

EPS = 1e-6


@dataclass(frozen=True)
class Sizes:
    """Of a decoder. `head_group` 0: a table by rows."""

    bits: int = 8
    group: int = 128
    head_group: int = 0
    layers: int = 2
    hidden: int = 256
    heads: tuple[int, int, int] = (4, 2, 32)
    ffn: int = 384
    vocab: int = 203

    def shape(self) -> Shape:
        query_heads, kv_heads, head_dim = self.heads
        return Shape(
            1, 16, 1, 16, self.layers, self.hidden, query_heads, kv_heads, head_dim, self.ffn, self.vocab,
            special=(0, 1, 2),
        )  # fmt: skip


@dataclass
class Made:
    """A folder, and its weights in float64 by the manifest's names."""

    folder: Path
    sizes: Sizes
    manifest: Manifest
    weights: dict[str, Array] = field(default_factory=dict)


class _Writer:
    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.data = rng, bytearray()
        self.tensors: dict[str, Tensor] = {}
        self.weights: dict[str, Array] = {}

    def add(self, name: str, array: Array) -> None:
        self.data += bytes(-len(self.data) % 64)
        self.tensors[name] = Tensor(len(self.data), array.shape, array.dtype.name)
        self.data += array.tobytes()

    def norm(self, name: str, size: int) -> None:
        numbers = self.rng.uniform(0.5, 1.5, size).astype(np.float32)
        self.add(f"{name}.weight", numbers)
        self.weights[name] = numbers.astype(np.float64)

    def matrix(self, name: str, size: tuple[int, int], bits: int, group: int) -> None:
        """Codes of every value; scales such that products of normal numbers are near 1."""
        rows, columns = size
        zero = 1 << (bits - 1)
        codes = self.rng.integers(0, 2 * zero, size)
        scale = self.rng.uniform(0.5, 1.5, (rows, columns // group)).astype(np.float32)
        scale = (scale * (1.7 / zero / columns**0.5)).astype(np.float32)
        self.weights[name] = (codes - zero) * np.repeat(scale.astype(np.float64), group, axis=1)
        packed = codes[:, 0::2] | codes[:, 1::2] << 4 if bits == 4 else codes
        self.add(f"{name}.weight", packed.astype(np.uint8).reshape(rows, columns // group, -1))
        self.add(f"{name}.scale", scale)

    def table(self, name: str, size: tuple[int, int]) -> None:
        codes = self.rng.integers(-128, 128, size)
        scale = self.rng.uniform(0.5, 1.5, size[0]).astype(np.float32) / np.float32(75 * size[1] ** 0.5)
        self.weights[name] = codes * scale.astype(np.float64)[:, None]
        self.add(f"{name}.weight", codes.astype(np.int8))
        self.add(f"{name}.scale", scale)


def make_folder(folder: Path, sizes: Sizes, seed: int = 0) -> Made:
    """Writes config.json and decoder.onnx.data; the manifest is given and not written."""
    writer = _Writer(np.random.default_rng(seed))
    heads, kv_heads, dim = sizes.heads
    for index in range(sizes.layers):
        name = f"layers.{index}"
        for part, size in (
            ("self_attn.qkv", ((heads + 2 * kv_heads) * dim, sizes.hidden)),
            ("self_attn.o_proj", (sizes.hidden, heads * dim)),
            ("mlp.gate_up", (2 * sizes.ffn, sizes.hidden)),
            ("mlp.down_proj", (sizes.hidden, sizes.ffn)),
        ):
            writer.matrix(f"{name}.{part}", size, sizes.bits, sizes.group)
        for part in ("input_layernorm", "post_attention_layernorm"):
            writer.norm(f"{name}.{part}", sizes.hidden)
        for part in ("self_attn.q_norm", "self_attn.k_norm"):
            writer.norm(f"{name}.{part}", dim)
    writer.norm("norm", sizes.hidden)
    if sizes.head_group:
        writer.matrix("embed_tokens", (sizes.vocab, sizes.hidden), 8, sizes.head_group)
    else:
        writer.table("embed_tokens", (sizes.vocab, sizes.hidden))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(sizes.shape().config()))
    (folder / "decoder.onnx.data").write_bytes(writer.data)
    facts = GraphFacts(sizes.layers, kv_heads, dim, sizes.hidden, sizes.vocab, 1000, 128, 100, 13, 104)
    table = EmbeddingTable("decoder.onnx.data", 0, (sizes.vocab, sizes.hidden), "int8")
    manifest = Manifest(f"int{sizes.bits}", sizes.group, "int8", facts, table, {}, {}, "test", writer.tensors)
    return Made(folder, sizes, manifest, writer.weights)


def reference(made: Made, embeddings: Array) -> Array:
    """(tokens, hidden) of one clip -> logits after each, (tokens, vocab), in float64."""
    config, weights = read_config(made.folder).text, made.weights
    tokens, dim = len(embeddings), config.head_dim
    x = embeddings.astype(np.float64)
    for index in range(config.layers):
        name = f"layers.{index}"
        qkv = _rms(x, weights[f"{name}.input_layernorm"]) @ weights[f"{name}.self_attn.qkv"].T
        q, k, v = np.split(qkv, np.cumsum([config.heads * dim, config.kv_heads * dim]), axis=1)
        q = _rotate(_rms(q.reshape(tokens, -1, dim), weights[f"{name}.self_attn.q_norm"]), config.rope_theta)
        k = _rotate(_rms(k.reshape(tokens, -1, dim), weights[f"{name}.self_attn.k_norm"]), config.rope_theta)
        attended = _attend(
            q, *(np.repeat(part, config.heads // config.kv_heads, axis=1) for part in (k, v.reshape(k.shape)))
        )
        x = x + attended.reshape(tokens, -1) @ weights[f"{name}.self_attn.o_proj"].T
        gate_up = _rms(x, weights[f"{name}.post_attention_layernorm"]) @ weights[f"{name}.mlp.gate_up"].T
        gate, up = np.split(gate_up, 2, axis=1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[f"{name}.mlp.down_proj"].T
    return _rms(x, weights["norm"]) @ weights["embed_tokens"].T


def _rms(x: Array, weight: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight


def _rotate(x: Array, theta: float) -> Array:
    """(tokens, heads, dim), positions from 0 on; pairs are half a head apart."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] / theta ** (np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


def _attend(q: Array, k: Array, v: Array) -> Array:
    scores = np.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weight / weight.sum(-1, keepdims=True), v)
