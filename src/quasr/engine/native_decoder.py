"""The decoder in C (quasr.native) over an ONNX folder's own data file, which is mapped and never copied.

It serves folders whose layers are in int8 or int4 groups and whose activations may be rounded: those meet the codes as
16-bit numbers. All else, and every other processor than those it was measured on, is ONNX Runtime's.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from quasr.engine.file_map import map_file
from quasr.engine.onnx_decoder import Choice
from quasr.errors import CheckpointError, OptionError, QuasrError
from quasr.export.manifest import AGAIN
from quasr.model.config import read_config
from quasr.native import library

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import DTypeLike, NDArray

    from quasr.engine.onnx_session import Runtime
    from quasr.export.manifest import Manifest
    from quasr.model.config import TextConfig

    Codes = NDArray[np.uint8]
    Floats = NDArray[np.float32]
    Places = NDArray[np.int32]

DATA = "decoder.onnx.data"

LANES = 16
"""Positions of a block of keys, and what head sizes are multiples of."""

LINE = 64
"""Bytes of a cache line."""

SPANS = (128, 64, 32)
"""Columns that may share a scale of activations, the fastest first."""

KINDS = {8: 0, 4: 1}
"""Bits of unsigned codes, and how decoder.c calls them."""

SIGNED = 2
"""int8 by rows, in decoder.c."""

HALVED_ROWS = 32768
"""Tokens of a vocabulary from which on the codes of a head of int8 by rows are kept in halves, of which a step reads
the upper ones and few of the lower. Below, a head is a small part of a step. What was mapped of it is given back."""

HALF_BYTES = 2

PROMPT_SLICE = 960
"""Tokens of a prompt that one call takes, five blocks of decoder.c: between calls an interrupt is heard."""

MEASURED = "avx512_vnni"
"""What the processors have on which this was found to be faster than ONNX Runtime."""


class Matrix(Structure):
    _fields_ = (
        ("codes", c_void_p), ("scales", c_void_p), ("rows", c_int64), ("columns", c_int64), ("group", c_int64),
        ("span", c_int64), ("kind", c_int64),
    )  # fmt: skip


class Layer(Structure):
    _fields_ = (
        ("qkv", Matrix), ("o", Matrix), ("gate_up", Matrix), ("down", Matrix), ("input_norm", c_void_p),
        ("q_norm", c_void_p), ("k_norm", c_void_p), ("post_norm", c_void_p),
    )  # fmt: skip


class Network(Structure):
    _fields_ = (
        ("layers", c_int64), ("hidden", c_int64), ("heads", c_int64), ("kv_heads", c_int64), ("head_dim", c_int64),
        ("ffn", c_int64), ("layer", POINTER(Layer)), ("norm", c_void_p), ("head", Matrix), ("coarse", Matrix),
        ("fine", c_void_p), ("eps", c_double),
    )  # fmt: skip


class Cache(Structure):
    _fields_ = (
        ("keys", c_void_p), ("values", c_void_p), ("cosines", c_void_p), ("sines", c_void_p), ("rows", c_int64),
        ("capacity", c_int64),
    )  # fmt: skip


class Request(Structure):
    _fields_ = (
        ("embeddings", c_void_p), ("rows", c_void_p), ("positions", c_void_p), ("wanted", c_void_p),
        ("logits", c_void_p), ("totals", c_void_p), ("likeliest", c_void_p), ("tokens", c_int64), ("outputs", c_int64),
    )  # fmt: skip


def open_native(folder: Path, manifest: Manifest, runtime: Runtime) -> tuple[NativeNetwork | None, str]:
    """The decoder of `folder` in C, or None where ONNX Runtime is to run it, and why.

    Raises OptionError where QUASR_NATIVE is unknown or asks for what cannot run, CheckpointError for a folder whose
    tensors are not where its manifest says.
    """
    wish = library.wish()
    if wish == "off":
        return None, f"the decoder is ONNX Runtime's: {library.VARIABLE}=off asks for it"
    lack = _lack(manifest, read_config(folder).text, runtime)
    lack = lack or _machine_lack(wish)
    if lack is None:
        try:
            compiled = library.load()
        except QuasrError as error:
            lack = str(error)
        else:
            network = NativeNetwork(compiled, folder, manifest, runtime.threads)
            how = " (of its head, the upper half of each code first)" if network.halved else ""
            return network, f"the decoder is compiled C{how}"
    if wish == "on":
        raise OptionError(f"{library.VARIABLE} is on, but {lack}: use auto")
    return None, f"the decoder is ONNX Runtime's: {lack}"


def who_decodes() -> str:
    """What runs the decoder of ONNX folders on this machine, in one line, without compiling anything.

    Raises OptionError where QUASR_NATIVE is unknown.
    """
    wish = library.wish()
    if wish == "off":
        return f"ONNX Runtime: {library.VARIABLE}=off asks for it"
    lack = _machine_lack(wish)
    return f"ONNX Runtime: {lack}" if lack else "C, where weights are int8 or int4 in groups and activations int8"


def _machine_lack(wish: str) -> str | None:
    """Why C is not for this machine, or None."""
    if library.find_compiler() is None:
        return library.no_compiler()
    if wish == "auto" and MEASURED not in library.processor():
        return f"C is unmeasured on this processor ({library.VARIABLE}=on asks for it)"
    return None


def _lack(manifest: Manifest, config: TextConfig, runtime: Runtime) -> str | None:
    """Why C cannot run this folder, or None."""
    if runtime.provider != "cpu":
        return f"the provider {runtime.provider} was asked for"
    if manifest.weights == "fp32":
        return "the folder's weights are fp32"
    if manifest.activations != "int8":
        return f"the folder's activations are {manifest.activations}"
    if not manifest.decoder:
        return f"the folder does not say where its tensors lie: {AGAIN}"
    if config.head_dim % LANES:
        return f"its heads have {config.head_dim} numbers, no multiple of {LANES}"
    odd = next((name for name, size in _sizes(config) if _form(manifest, name, size) is None), None)
    return odd and f"{odd} has no groups of {', '.join(map(str, SPANS))}, or another multiple of {SPANS[-1]}"


@dataclass(frozen=True, slots=True)
class Form:
    """How decoder.c calls a matrix's codes, and how many columns share a scale of weights and of activations."""

    kind: int
    group: int
    span: int


def _sizes(config: TextConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """Every matrix's name and (rows, columns). One after the other: a damaged config may tell of any number."""
    queries, pairs = config.heads * config.head_dim, config.kv_heads * config.head_dim
    one_layer = {
        "self_attn.qkv": (queries + 2 * pairs, config.hidden),
        "self_attn.o_proj": (config.hidden, queries),
        "mlp.gate_up": (2 * config.ffn, config.hidden),
        "mlp.down_proj": (config.hidden, config.ffn),
    }
    for index in range(config.layers):
        yield from ((f"layers.{index}.{name}", size) for name, size in one_layer.items())
    yield "embed_tokens" if config.tied_head else "lm_head", (config.vocab_size, config.hidden)


def _form(manifest: Manifest, name: str, size: tuple[int, int]) -> Form | None:
    """None for what decoder.c does not read, such as matrices by rows, which lie on their side, but for the table."""
    weight, scale = (manifest.decoder.get(f"{name}.{leaf}") for leaf in ("weight", "scale"))
    rows, columns = size
    if weight is None or scale is None:
        return None
    if (name, weight.dtype, weight.shape, scale.shape) == ("embed_tokens", "int8", size, (rows,)):
        kind, group = SIGNED, columns
    elif weight.dtype == "uint8" and len(weight.shape) == 3 and scale.shape == (rows, weight.shape[1]):
        groups, width = weight.shape[1:]
        if groups < 1 or columns % groups:
            return None
        group = columns // groups
        kind = KINDS.get(8 * width // group, -1)
    else:
        return None
    span = next((span for span in SPANS if group % span == 0), None)
    return None if span is None or kind < 0 else Form(kind, group, span)


def _check_facts(folder: Path, manifest: Manifest, config: TextConfig) -> None:
    """Raises CheckpointError where config.json, which this decoder goes by, is not that of the folder's graphs."""
    facts = manifest.graph
    graph = (facts.layers, facts.kv_heads, facts.head_dim, facts.hidden, facts.vocab)
    if graph != (config.layers, config.kv_heads, config.head_dim, config.hidden, config.vocab_size):
        raise CheckpointError(f"{folder}'s config.json is not that of its graphs: {AGAIN}")


class NativeNetwork:
    """The weights, mapped, and a description of them for decoder.c. Raises CheckpointError as `open_native`."""

    def __init__(self, compiled: ctypes.CDLL, folder: Path, manifest: Manifest, threads: int) -> None:
        self.facts, self.threads = manifest.graph, threads
        self.config = read_config(folder).text
        self.stored = np.dtype(np.float16 if compiled.quasr_stored_bytes() == HALF_BYTES else np.float32)
        self._manifest, self._file = manifest, map_file(folder / DATA, whole=True)
        self._data = np.frombuffer(self._file, np.uint8)
        _check_facts(folder, manifest, self.config)
        self._sizes = dict(_sizes(self.config))
        self._layers = (Layer * self.config.layers)(*map(self._layer, range(self.config.layers)))
        head = self._matrix("embed_tokens" if self.config.tied_head else "lm_head")
        self._halves = self._halve(compiled, head)
        self._network = self._describe(head)
        self._decode = compiled.quasr_decode
        self._decode.argtypes = (POINTER(Network), POINTER(Cache), POINTER(Request), c_int64)

    def cache(self, rows: int, capacity: int) -> NativeDecoder:
        """Room for `rows` clips of at most `capacity` positions."""
        return NativeDecoder(self, rows, capacity)

    def decode(self, cache: Cache, request: Request) -> None:
        """Runs the request's tokens, whose places are checked. Raises MemoryError."""
        if self._decode(self._network, cache, request, self.threads):
            raise MemoryError("no memory for the decoder's activations")

    @property
    def halved(self) -> bool:
        """Whether the head's codes are kept in halves."""
        return self._halves is not None

    def _describe(self, head: Matrix) -> Network:
        config = self.config
        sizes = (config.layers, config.hidden, config.heads, config.kv_heads, config.head_dim, config.ffn)
        coarse, fine = Matrix(), None
        if self._halves is not None:
            codes, fine, scales = (part.ctypes.data for part in self._halves)
            coarse = Matrix(codes, scales, head.rows, head.columns, head.group, head.span, KINDS[4])
        norm = self._place("norm.weight", (config.hidden,))
        return Network(*sizes, self._layers, norm, head, coarse, fine, config.rms_eps)

    def _halve(self, compiled: ctypes.CDLL, head: Matrix) -> tuple[Codes, Codes, Floats] | None:
        """The upper and lower halves of the head's codes and the scales of the upper ones, where that pays."""
        if head.kind != SIGNED or head.span != SPANS[0] or head.rows < HALVED_ROWS:
            return None
        size = head.rows * head.columns
        upper, lower = (aligned(size // 2, np.uint8) for _ in range(2))
        compiled.quasr_halves.argtypes = (c_void_p, c_int64, c_void_p, c_void_p)
        if compiled.quasr_halves(head.codes, size, upper.ctypes.data, lower.ctypes.data):
            return None
        offset = head.codes - int(self._data.ctypes.data)
        begin, end = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE, (offset + size) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            self._file.madvise(mmap.MADV_DONTNEED, begin, end - begin)
        scales = np.ctypeslib.as_array(ctypes.cast(head.scales, POINTER(ctypes.c_float)), (head.rows,))
        return upper, lower, scales * np.float32(16)

    def _layer(self, index: int) -> Layer:
        name, config = f"layers.{index}", self.config
        parts = ("self_attn.qkv", "self_attn.o_proj", "mlp.gate_up", "mlp.down_proj")
        matrices = (self._matrix(f"{name}.{part}") for part in parts)
        norms = {
            "input_layernorm": config.hidden,
            "self_attn.q_norm": config.head_dim,
            "self_attn.k_norm": config.head_dim,
            "post_attention_layernorm": config.hidden,
        }
        return Layer(*matrices, *(self._place(f"{name}.{norm}.weight", (size,)) for norm, size in norms.items()))

    def _matrix(self, name: str) -> Matrix:
        size = rows, columns = self._sizes[name]
        form = _form(self._manifest, name, size)
        assert form is not None, "the caller looked"
        bits = next((bits for bits, kind in KINDS.items() if kind == form.kind), 8)
        codes = np.int8 if form.kind == SIGNED else np.uint8
        weight = self._place(f"{name}.weight", (rows, columns * bits // 8), codes)
        scale = self._place(f"{name}.scale", (rows, columns // form.group))
        return Matrix(weight, scale, rows, columns, form.group, form.span, form.kind)

    def _place(self, name: str, shape: tuple[int, ...], dtype: type[np.generic] = np.float32) -> int:
        """The address of a tensor of so many numbers."""
        tensor = self._manifest.decoder.get(name)
        size, width = math.prod(shape), np.dtype(dtype).itemsize
        if tensor is None or math.prod(tensor.shape) != size or tensor.dtype != np.dtype(dtype).name:
            raise CheckpointError(f"{name} is not in the folder as its config.json says: {AGAIN}")
        if tensor.offset < 0 or tensor.offset % width or tensor.offset + size * width > len(self._data):
            raise CheckpointError(f"{name} does not lie inside {DATA}: {AGAIN}")
        return int(self._data.ctypes.data) + tensor.offset


class NativeDecoder:
    """Keys and values of `rows` clips, and the network over them: as `quasr.engine.onnx_decoder.DecoderGraph`.

    Both are 16-bit floats where the processor turns those into 32 bits. Keys lie in blocks of LANES positions, so that
    the scores of a block are sums of whole vectors.
    """

    def __init__(self, network: NativeNetwork, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self._network, config = network, network.config
        room = -(-capacity // LANES) * LANES
        shape = (2, config.layers, rows, config.kv_heads, room * config.head_dim)
        self._data: NDArray[Any] = aligned(math.prod(shape), network.stored).reshape(shape)
        self._turns = np.stack(_turns(config, room))
        self.logits: Floats = np.empty((0, config.vocab_size), np.float32)
        """Of the last call, (rows, vocab), valid until the next."""
        self._logits: Floats = np.empty((rows, config.vocab_size), np.float32)
        self._totals: Floats = np.empty(rows, np.float32)
        self._likeliest = np.empty(rows, np.int32)
        self._first_rows = np.arange(rows, dtype=np.int32)
        parts = (*self._data, *self._turns)
        self._cache = Cache(*(part.ctypes.data for part in parts), rows, room)

    def prefill(self, row: int, embeddings: Floats) -> Choice:
        """A prompt (tokens, hidden) into row `row` -> the one token after its last position."""
        count = len(embeddings)
        self._check(0 <= row < self.rows and 0 < count <= self.capacity)
        for start in range(0, count, PROMPT_SLICE):
            part = embeddings[start : start + PROMPT_SLICE]
            end = start + len(part)
            wanted = np.arange(len(part) - 1, len(part), dtype=np.int32)[: end == count]
            places = np.full(len(part), row, np.int32), np.arange(start, end, dtype=np.int32), wanted
            self._run(part, places, row)
        return self._choice(slice(row, row + 1))

    def step(self, embeddings: Floats, positions: Sequence[int]) -> Choice:
        """The next token of the first rows, from this one's (rows, hidden) and the positions filled before it."""
        count = len(positions)
        self._check(0 < count <= self.rows and min(positions) >= 0 and max(positions) < self.capacity)
        rows = self._first_rows[:count]
        self._run(embeddings, (rows, np.array(positions, np.int32), rows), 0)
        return self._choice(slice(count))

    def move(self, source: int, target: int, filled: int) -> None:
        """Gives the place of row `target` to row `source`, of which `filled` positions are in use."""
        used = -(-filled // LANES) * LANES * self._network.config.head_dim
        self._data[:, :, target, :, :used] = self._data[:, :, source, :, :used]

    def _choice(self, rows: slice) -> Choice:
        self.logits = self._logits[rows]
        return Choice(self._likeliest[rows], -np.log(self._totals[rows]))

    def _check(self, fits: bool) -> None:
        if not fits:
            raise ValueError(f"there are {self.rows} rows of {self.capacity} positions")

    def _run(self, embeddings: Floats, places: tuple[Places, Places, Places], first: int) -> None:
        """Tokens at these rows and positions. What follows those `wanted`, the last, goes into rows from `first` on."""
        x, (rows, _, wanted) = np.ascontiguousarray(embeddings, np.float32), places
        if x.shape != (len(rows), self._network.config.hidden):
            raise ValueError(f"{len(rows)} tokens and embeddings of {x.shape}")
        found = (self._logits[first:], self._totals[first:], self._likeliest[first:])
        addresses = (part.ctypes.data for part in (x, *places, *found))
        self._network.decode(self._cache, Request(*addresses, len(rows), len(wanted)))


def aligned(count: int, dtype: DTypeLike) -> NDArray[Any]:
    """Room for so many numbers from the start of a cache line on, which vectors of them then do not straddle."""
    size = count * np.dtype(dtype).itemsize
    memory = np.empty(size + LINE, np.uint8)
    first = -memory.ctypes.data % LINE
    return memory[first : first + size].view(dtype)


def _turns(config: TextConfig, positions: int) -> tuple[Floats, Floats]:
    """Cosines and sines, (positions, head_dim / 2), as `quasr.model.decoder.rope_angles` makes them."""
    halves = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    rates = np.float32(1) / np.float32(config.rope_theta) ** halves
    angles = np.arange(positions, dtype=np.float32)[:, None] * rates
    return np.cos(angles), np.sin(angles)
