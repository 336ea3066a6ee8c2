"""ONNX folders of random networks through ONNX Runtime, against the same network in torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from checkpoints import TINY, Shape, audio_sizes, random_model, text_sizes, write_hf, write_original
from onnx_host import Host
from torch import nn

from quasr.export.folder import ExportOptions, export_folder
from quasr.model.config import read_config
from quasr.model.decoder import KVCache, rope_angles
from quasr.quant.apply import load_quantising
from quasr.quant.linear import quantise_int4, quantise_int8
from quasr.quant.recipe import recipe_for
from quasr.quant.store import load_network, save_quantised
from quasr.weights.load import load_model

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from quasr.model.asr import Qwen3ASR

torch.set_num_threads(1)

EVEN = Shape("even", audio_sizes(2, 128, 4, 256, 8), text_sizes(2, 128, (4, 2, 32), 256, 203))
"""Sizes that groups of 128 divide, but for `conv_out`: 128 columns."""

ODD_WIDTHS = Shape("odd", audio_sizes(3, 60, 5, 104, 12), text_sizes(3, 40, (6, 2, 16), 72, 203))
"""Heads of 16: GroupQueryAttention wants multiples of that."""

CPU = torch.device("cpu")
FRAMES = (837, 100, 5)
LENGTHS = (21, 9, 1)
ROTARY_OPS = ("Range", "Unsqueeze", "Mul", "Cos", "Sin")


def checkpoint(folder: Path, shape: Shape, *, original: bool = False) -> Path:
    (write_original if original else write_hf)(random_model(shape), folder)
    return folder


def untied(folder: Path) -> Path:
    """A checkpoint with a head of its own."""
    model = random_model(replace(EVEN, text={**EVEN.text, "tie_word_embeddings": False}))
    model.config.tie_word_embeddings = False
    # A seed of its own: what 8 bits cost depends on the weights, and two of 16 seeds go beyond 0.06, by 0.001.
    head = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(5))
    model.lm_head.weight = nn.Parameter(head * 0.1)
    write_hf(model, folder)
    assert not read_config(folder).text.tied_head
    return folder


def torch_network(folder: Path) -> Qwen3ASR:
    return load_model(folder, read_config(folder), torch.float32, CPU)


def mels(bins: int) -> list[NDArray[np.float32]]:
    generator = np.random.default_rng(1)
    return [generator.standard_normal((bins, frames)).astype(np.float32) for frames in FRAMES]


def relative(found: NDArray[np.float32], truth: torch.Tensor) -> float:
    """|found - truth| / |truth|."""
    wide = truth.double().numpy()
    return float(np.linalg.norm(found - wide) / np.linalg.norm(wide))


def audio_error(host: Host, network: Qwen3ASR) -> float:
    clips = mels(network.config.audio.mel_bins)
    truth = torch.cat(network.encode([torch.from_numpy(clip) for clip in clips]))
    found = host.encode(clips)
    assert found.shape == truth.shape
    return relative(found, truth)


def decoder_errors(host: Host, network: Qwen3ASR, steps: int = 3) -> list[float]:
    """Of the prompt's logits and of a few steps', a ragged batch; both are fed with torch's own tokens."""
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randn(length, network.config.text.hidden, generator=generator) for length in LENGTHS]
    capacity = max(LENGTHS) + steps
    theirs = KVCache.allocate(network.config.text, len(rows), capacity, torch.float32, CPU)
    ours = host.cache(len(rows), capacity)
    logits = network.prefill(nn.utils.rnn.pad_sequence(rows, batch_first=True), LENGTHS, theirs)
    errors = [relative(host.prefill([row.numpy() for row in rows], ours), logits)]
    for number in range(steps):
        tokens, lengths = logits.argmax(-1), torch.tensor(LENGTHS) + number
        logits = network.step(tokens, lengths, int(lengths.max()), theirs)
        errors.append(relative(host.step(tokens.tolist(), lengths.tolist(), ours), logits))
    return errors


@pytest.mark.parametrize(
    ("shape", "original"), [(TINY, False), (ODD_WIDTHS, True), (EVEN, False)], ids=["tiny", "odd", "even"]
)
def test_fp32_computes_what_torch_computes(shape: Shape, original: bool, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", shape, original=original)
    export_folder(source, tmp_path / "onnx", ExportOptions("fp32"))
    with torch.inference_mode():
        network, host = torch_network(source), Host(tmp_path / "onnx")
        assert audio_error(host, network) < 1e-4
        assert max(decoder_errors(host, network)) < 1e-4


def dequantised(network: Qwen3ASR, weights: str, group: int | None, head: str = "int8") -> Qwen3ASR:
    """The network with every matrix rounded by the definition: code x scale, in groups or by outputs.

    By outputs: the encoder, all with group 0, and the head without a group, unless it has 4 bits.
    """
    heads = ("decoder.embed_tokens",) if network.config.text.tied_head else ("decoder.lm_head",)
    with torch.no_grad():
        for name, layer in network.named_modules():
            if not isinstance(layer, nn.Linear | nn.Embedding | nn.Conv2d) or name.endswith("conv2d1"):
                continue
            rows = layer.weight.float().flatten(1)
            columns = rows.shape[1]
            largest = next((size for size in (128, 64, 32, 16) if columns % size == 0), columns)
            by_4_bits = weights == "int4" and (name.startswith("decoder.layers") or (head == "int4" and name in heads))
            whole = group is None and ".layers." not in name and not by_4_bits
            size = columns if group == 0 or name.startswith("encoder.") or whole else group or largest
            quantise = quantise_int4 if by_4_bits else quantise_int8
            codes, scale = quantise(rows, size)
            rounded = codes.float().unflatten(1, (-1, size)) * scale[..., None]
            layer.weight.copy_(rounded.view(layer.weight.shape))
    return network


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("even") / "source", EVEN)


@pytest.mark.parametrize(
    ("weights", "group"), [("int8", None), ("int8", 32), ("int8", 0), ("int4", None), ("int4", 64)]
)
def test_quantised_weights_are_the_rounded_ones(even: Path, weights: str, group: int | None, tmp_path: Path) -> None:
    export_folder(even, tmp_path / "onnx", ExportOptions(weights, group, "fp32"))
    with torch.inference_mode():
        network, host = dequantised(torch_network(even), weights, group), Host(tmp_path / "onnx")
        assert audio_error(host, network) < 1e-4
        assert max(decoder_errors(host, network)) < 1e-4
        tokens = [0, 7, 202]
        assert relative(host.embed(tokens), network.decoder.embed_tokens(torch.tensor(tokens))) < 1e-6


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_head_of_4_bits_is_the_rounded_one(even: Path, group: int | None, tied: bool, tmp_path: Path) -> None:
    """It is the token table too, unless the network has one of its own, which stays in 8 bits."""
    source = even if tied else untied(tmp_path / "source")
    manifest = export_folder(source, tmp_path / "onnx", ExportOptions("int4", group, "fp32", "int4"))
    assert (manifest.embedding.dtype == "uint4") == tied
    with torch.inference_mode():
        network, host = dequantised(torch_network(source), "int4", group, "int4"), Host(tmp_path / "onnx")
        assert max(decoder_errors(host, network)) < 1e-4
        tokens = [0, 7, 202]
        assert relative(host.embed(tokens), network.decoder.embed_tokens(torch.tensor(tokens))) < 1e-6


@pytest.mark.parametrize(("weights", "group"), [("int8", None), ("int8", 0), ("int4", None)])
def test_8_bit_activations_cost_little(even: Path, weights: str, group: int | None, tmp_path: Path) -> None:
    export_folder(even, tmp_path / "onnx", ExportOptions(weights, group))
    with torch.inference_mode():
        network, host = dequantised(torch_network(even), weights, group), Host(tmp_path / "onnx")
        assert audio_error(host, network) < 0.03
        assert max(decoder_errors(host, network)) < 0.06


@pytest.mark.parametrize(("compute_type", "weights"), [("int8", "int8"), ("int4-g64", "int4"), ("int8-g32", "int8")])
def test_a_quantised_folder_keeps_its_codes(even: Path, compute_type: str, weights: str, tmp_path: Path) -> None:
    recipe, config = recipe_for(compute_type), read_config(even)
    network = load_quantising(even, config, recipe, torch.bfloat16, CPU)
    save_quantised(network, recipe, even, tmp_path / "quantised", {})
    manifest = export_folder(tmp_path / "quantised", tmp_path / "onnx", ExportOptions(activations="fp32"))
    assert manifest.weights == weights
    config = read_config(tmp_path / "quantised")
    with torch.inference_mode():
        saved, _ = load_network(tmp_path / "quantised", config, recipe, torch.float32, CPU)
        host = Host(tmp_path / "onnx")
        assert audio_error(host, saved) < 1e-4
        assert max(decoder_errors(host, saved)) < 1e-4


def test_a_quantised_folder_can_be_written_in_fp32(even: Path, tmp_path: Path) -> None:
    recipe, config = recipe_for("int4-g32"), read_config(even)
    save_quantised(load_quantising(even, config, recipe, torch.float32, CPU), recipe, even, tmp_path / "quantised", {})
    export_folder(tmp_path / "quantised", tmp_path / "onnx", ExportOptions("fp32"))
    with torch.inference_mode():
        saved, _ = load_network(tmp_path / "quantised", config, recipe, torch.float32, CPU)
        host = Host(tmp_path / "onnx")
        assert audio_error(host, saved) < 1e-4
        assert max(decoder_errors(host, saved)) < 1e-4


@pytest.mark.parametrize(
    ("options", "most"), [(ExportOptions("fp32"), 1e-4), (ExportOptions("int8", 0), 0.06)], ids=["fp32", "rows"]
)
def test_an_untied_head_is_a_matrix_of_its_own(options: ExportOptions, most: float, tmp_path: Path) -> None:
    untied(tmp_path / "source")
    export_folder(tmp_path / "source", tmp_path / "onnx", options)
    with torch.inference_mode():
        network = torch_network(tmp_path / "source")
        network = dequantised(network, "int8", 0) if options.weights == "int8" else network
        errors = decoder_errors(Host(tmp_path / "onnx"), network)
    assert max(errors) < most


def test_a_token_of_zeros_has_a_scale_too(even: Path, tmp_path: Path) -> None:
    """Its codes are 0 / 0 before they are rounded."""
    export_folder(even, tmp_path / "onnx", ExportOptions("int8", 0))
    host, row = Host(tmp_path / "onnx"), np.random.default_rng(6).standard_normal((9, 128)).astype(np.float32)
    row[[0, 5]] = 0
    logits = host.prefill([row], host.cache(1, 9))
    with torch.inference_mode():
        network = dequantised(torch_network(even), "int8", 0)
        cache = KVCache.allocate(network.config.text, 1, 9, torch.float32, CPU)
        truth = network.prefill(torch.from_numpy(row)[None], [9], cache)
    assert relative(logits, truth) < 0.06


@pytest.mark.parametrize("group", [None, 0])
def test_a_row_is_the_same_alone_and_in_a_batch(even: Path, group: int | None, tmp_path: Path) -> None:
    export_folder(even, tmp_path / "onnx", ExportOptions("int8", group))
    host, generator = Host(tmp_path / "onnx"), np.random.default_rng(4)
    rows = [generator.standard_normal((length, 128)).astype(np.float32) for length in LENGTHS]
    cache, single = host.cache(3, 24), host.cache(3, 24)
    together = host.prefill(rows, cache)
    alone = [host.prefill([row], [array[n : n + 1] for array in single])[0] for n, row in enumerate(rows)]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-4)
    again = host.step([5, 6, 7], LENGTHS, cache)
    np.testing.assert_allclose(again, host.step([5, 6, 7], LENGTHS, single), atol=1e-4)


def test_100_seconds_of_audio(even: Path, tmp_path: Path) -> None:
    export_folder(even, tmp_path / "onnx", ExportOptions("fp32"))
    mel = np.random.default_rng(5).standard_normal((128, 10_037)).astype(np.float32)
    with torch.inference_mode():
        truth = torch_network(even).encode([torch.from_numpy(mel)])[0]
        found = Host(tmp_path / "onnx").encode([mel])
    assert found.shape == (1305, 128)
    assert relative(found, truth) < 1e-4


def test_rotary_tables_are_torchs_to_the_last_position(even: Path, tmp_path: Path) -> None:
    """ONNX Runtime computes them when it loads the graph, of angles up to 32,767."""
    positions = export_folder(even, tmp_path / "onnx", ExportOptions("fp32")).graph.positions
    graph = onnx.load(str(tmp_path / "onnx" / "decoder.onnx"), load_external_data=False).graph
    names = next(list(node.input[7:9]) for node in graph.node if node.op_type == "GroupQueryAttention")
    outputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (positions, 16)) for name in names]
    nodes = list(graph.node)[: 1 + max(index for index, node in enumerate(graph.node) if node.output[0] in names)]
    nodes = [node for node in nodes if node.op_type in ROTARY_OPS and "last" not in node.input]
    constants = [tensor for tensor in graph.initializer if tensor.name.startswith("constant_")]
    alone = onnx.helper.make_graph(nodes, "rotary", [], outputs, constants)
    model = onnx.helper.make_model(alone, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for found, truth in zip(session.run(names, {}), rope_angles(torch.arange(positions), 32, 1e6), strict=True):
        np.testing.assert_allclose(found, truth[:, :16], atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "group", "blocks", "rows"),
    [("fp32", None, 0, 0), ("int8", None, 8, 1), ("int8", 64, 9, 0), ("int8", 0, 0, 9), ("int4", None, 8, 1)],
)
def test_onnx_accepts_the_graphs(
    even: Path, weights: str, group: int | None, blocks: int, rows: int, tmp_path: Path
) -> None:
    """`blocks` and `rows` of the decoder's matrices, 4 in each layer and the head, have a scale for that."""
    export_folder(even, tmp_path / "onnx", ExportOptions(weights, group))
    for name in ("stem", "encoder", "decoder"):
        onnx.checker.check_model(str(tmp_path / "onnx" / f"{name}.onnx"), full_check=True)
    decoder = onnx.load(str(tmp_path / "onnx" / "decoder.onnx"), load_external_data=False)
    inputs = {value.name for value in decoder.graph.input}
    assert inputs >= {"embeddings", "last", "seqlens_k", "total_sequence_length", "past_key_1", "past_value_1"}
    operators = [node.op_type for node in decoder.graph.node]
    assert operators.count("GroupQueryAttention") == 2
    assert operators.count("MatMulNBits") == blocks
    assert operators.count("MatMulIntegerToFloat") == rows
