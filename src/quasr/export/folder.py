"""From a checkpoint to an ONNX folder, which appears whole or not at all."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version as installed_version
from typing import TYPE_CHECKING

from quasr.errors import OptionError
from quasr.export.collect import Collected, Wanted, collect
from quasr.export.datafile import DataFile
from quasr.export.decoder import build_decoder
from quasr.export.encoder import build_encoder
from quasr.export.linear import TABLE
from quasr.export.manifest import (
    MANIFEST_FILE,
    NIBBLE_ZERO_POINT,
    EmbeddingTable,
    File,
    GraphFacts,
    Manifest,
    Tensor,
    is_onnx_folder,
)
from quasr.export.stem import build_stem
from quasr.model.config import read_config, read_json
from quasr.quant.recipe import EMBEDDING
from quasr.quant.store import check_output, copy_others, source_record
from quasr.weights.record import digest
from quasr.weights.save import fresh_folder, write_json

if TYPE_CHECKING:
    from pathlib import Path

    from quasr.export.layers import Activations
    from quasr.model.config import ModelConfig

GRAPHS = ("stem", "encoder", "decoder")

MAX_POSITIONS = 32_768
"""Length of the rotary tables unless the config says less: 40 minutes of audio."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """`weights` fp32, int8, int4 or None for what the source has, int8 if it is not quantised; `group` 128, 64, 32,
    WHOLE_ROW (int8 only) or None for what the source has, or the largest that fits, with a head that has a scale a
    row; `activations` are those that meet quantised weights; `head` int8 or int4, of int4 weights, None for what the
    source has, int8 if it is not quantised.
    """

    weights: str | None = None
    group: int | None = None
    activations: Activations = "int8"
    head: str | None = None


def export_folder(source: Path, output: Path, options: ExportOptions) -> Manifest:
    """Writes the checkpoint `source`, of 16 bits or quantised by quasr in int8 or int4, as the ONNX folder `output`.

    Raises OptionError for an output that exists and for what does not fit, CheckpointError for a damaged source,
    ResourceError where the disk is full or may not be written.
    """
    if is_onnx_folder(source):
        raise OptionError(f"{source} is an ONNX folder already: give the checkpoint that it was made of")
    check_output(output)
    config = read_config(source)
    with fresh_folder(output) as fresh:
        copy_others(source, fresh)
        manifest = _write(source, config, options, fresh)
        write_json(fresh / MANIFEST_FILE, manifest.to_json())
    return manifest


def _write(source: Path, config: ModelConfig, options: ExportOptions, fresh: Path) -> Manifest:
    positions = _positions(source)
    with ExitStack() as stack:
        data = {name: stack.enter_context(DataFile(fresh / f"{name}.onnx.data")) for name in GRAPHS}
        collected = collect(source, config, Wanted(options.weights, options.group, options.head), data)
        graphs = {
            "stem": build_stem(config.audio, collected, options.activations, data["stem"]),
            "encoder": build_encoder(config.audio, collected, options.activations),
            "decoder": build_decoder(config.text, collected, options.activations, positions),
        }
    for name, graph in graphs.items():
        graph.save(fresh / f"{name}.onnx")
    written = [f"{name}.onnx{ending}" for name in GRAPHS for ending in ("", ".data")]
    return Manifest(
        weights=collected.weights,
        group=collected.linears["decoder.layers.0.mlp.gate_up"].format.group,
        activations=options.activations,
        graph=_facts(config, positions),
        embedding=_embedding(collected),
        files={name: File(**asdict(digest(fresh / name))) for name in written},
        source=source_record(source),
        quasr=installed_version("quasr"),
        decoder=_tensors(collected),
    )


def _tensors(collected: Collected) -> dict[str, Tensor]:
    """Where the decoder's tensors lie, matrices as NAME.weight and NAME.scale, without the room's own name."""
    places = dict(collected.tensors)
    for name, found in collected.linears.items():
        places[f"{name}.weight"] = found.weight
        if found.scale is not None:
            places[f"{name}.scale"] = found.scale
    room = "decoder."
    return {
        name.removeprefix(room): Tensor(place.offset, place.shape, place.dtype.name)
        for name, place in places.items()
        if name.startswith(room)
    }


def _positions(source: Path) -> int:
    raw = read_json(source / "config.json")
    text = raw.get("thinker_config", raw)["text_config"]
    return min(int(text.get("max_position_embeddings", MAX_POSITIONS)), MAX_POSITIONS)


def _facts(config: ModelConfig, positions: int) -> GraphFacts:
    audio, text = config.audio, config.text
    return GraphFacts(
        layers=text.layers,
        kv_heads=text.kv_heads,
        head_dim=text.head_dim,
        hidden=text.hidden,
        vocab=text.vocab_size,
        positions=positions,
        mel_bins=audio.mel_bins,
        chunk_frames=audio.chunk_frames,
        chunk_tokens=audio.chunk_tokens,
        window_tokens=audio.window_chunks * audio.chunk_tokens,
    )


def _embedding(collected: Collected) -> EmbeddingTable:
    found = collected.linears[EMBEDDING]
    table = EmbeddingTable(found.weight.file, found.weight.offset, (found.rows, found.columns), "float32")
    if found.scale is None:
        return table
    scaled = replace(table, scale_offset=found.scale.offset, scale_shape=(found.rows, found.scale.shape[-1]))
    if found.format == TABLE:
        return replace(scaled, dtype="int8", group=found.columns, scale_shape=(found.rows, 1), zero_point=0)
    if found.format.bits == 4:
        return replace(scaled, dtype="uint4", group=found.format.group, zero_point=NIBBLE_ZERO_POINT)
    return replace(scaled, dtype="uint8", group=found.format.group)
