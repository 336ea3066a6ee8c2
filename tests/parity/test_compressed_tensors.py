"""Exported folders in transformers: the same weights, prompts and greedy tokens as our own dequantised reference."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from checkpoints import WIDE, Shape, audio_sizes, random_model, text_sizes, write_hf
from safetensors.torch import load_file
from test_network import ask_quasr, ask_transformers
from transformers import AutoModelForMultimodalLM, AutoProcessor

import quasr
from quasr.audio.decode import load as load_audio
from quasr.errors import CheckpointError, OptionError
from quasr.model.config import read_config
from quasr.quant.apply import load_quantising
from quasr.quant.compressed_tensors import export_recipe, save_compressed_tensors
from quasr.quant.linear import Int4Linear
from quasr.quant.recipe import recipe_for
from quasr.quant.store import save_quantised
from quasr.quant.vocabulary import Keep, choose_tokens, prune, pruned_files
from quasr.text.prompt import build_prompt
from quasr.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from quasr.model.asr import Qwen3ASR

pytest.importorskip("compressed_tensors", reason="the compressed-tensors package is not installed")
torch.set_num_threads(1)

DEMO = Path(str(files("quasr"))) / "demo" / "model"
PUBLIC = Path(__file__).resolve().parents[2] / "../shared/speech/public"
CPU = torch.device("cpu")
SMALL = Shape("small", audio_sizes(1, 64, 2, 64, 8), text_sizes(2, 128, (4, 2, 32), 256, 300))
NEW_TOKENS = 40
needs_demo = pytest.mark.skipif(not DEMO.is_dir(), reason="the demo model is not in this checkout")


def make(source: Path, compute_type: str, dtype: torch.dtype, rules: tuple[str, ...] = ()) -> Qwen3ASR:
    return load_quantising(source, read_config(source), export_recipe(compute_type, rules), dtype, CPU)


def random_checkpoint(shape: Shape, folder: Path) -> Path:
    """In the -hf layout; with a tokenizer, which no one asks."""
    write_hf(random_model(shape), folder)
    shutil.copyfile(DEMO / "tokenizer.json", folder / "tokenizer.json")
    return folder


@needs_demo
@pytest.mark.parametrize("shape", [SMALL, pytest.param(WIDE, marks=pytest.mark.slow)], ids=lambda shape: shape.name)
def test_random_weights_say_the_same(shape: Shape, tmp_path: Path) -> None:
    """WIDE has the heads and widths of the 0.6B model. Stored in bf16, computed in fp32."""
    source = random_checkpoint(shape, tmp_path / "source")
    model = make(source, "int4-g64", torch.bfloat16)
    save_compressed_tensors(model, source, tmp_path / "out")
    theirs, report = AutoModelForMultimodalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    got = ask_quasr(model.float(), [1, 2, 4])
    for clip, mine in zip([1, 2, 4], got, strict=True):
        truth = ask_transformers(theirs, clip)
        torch.testing.assert_close(mine.logits, truth.logits, rtol=0, atol=1e-4)
        assert mine.tokens == truth.tokens


@needs_demo
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_weights_are_decompressed_bit_by_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    source = random_checkpoint(SMALL, tmp_path / "source")
    model = make(source, "int4-g32", dtype)
    save_compressed_tensors(model, source, tmp_path / "out")
    theirs = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    theirs(input_ids=torch.tensor([[3, 4]]))
    for name, layer in model.decoder.layers.named_modules():
        if isinstance(layer, Int4Linear):
            weight = theirs.model.language_model.layers.get_submodule(name).weight
            assert torch.equal(weight, layer.dequantize())


@needs_demo
def test_what_is_in_the_file(tmp_path: Path) -> None:
    """The words, spelled out by hand: code + 8 in four bits each, the first lowest."""
    source = random_checkpoint(SMALL, tmp_path / "source")
    model = make(source, "int4-g64", torch.bfloat16, ("decoder.layers.1.mlp.*=none",))
    save_compressed_tensors(model, source, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    base = "model.language_model.layers.0.mlp.down_proj"
    codes = model.decoder.layers[0].mlp.down_proj.codes()
    word = sum((int(code) + 8) << 4 * place for place, code in enumerate(codes[5, 8:16]))
    assert int(stored[f"{base}.weight_packed"][5, 1]) & 0xFFFFFFFF == word
    assert stored[f"{base}.weight_scale"].shape == (128, 4)
    assert stored[f"{base}.weight_scale"].dtype == torch.bfloat16
    assert stored[f"{base}.weight_shape"].tolist() == [128, 256]
    assert f"{base}.weight" not in stored
    assert "lm_head.weight" not in stored
    scheme = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert scheme["config_groups"]["group_0"]["targets"] == ["Linear"]
    packed = {name.removesuffix(".weight_packed") for name in stored if name.endswith("_packed")}
    plain = {
        name for name, _ in random_model(SMALL).named_modules() if f"{name}.weight" in stored and "norm" not in name
    }
    linears = {name for name, layer in random_model(SMALL).named_modules() if isinstance(layer, torch.nn.Linear)}
    assert set(scheme["ignore"]) == linears - packed
    assert "model.language_model.layers.1.mlp.down_proj" in plain & set(scheme["ignore"])


def demo_clips(subset: str, count: int) -> list[np.ndarray]:
    manifest = PUBLIC / "manifest.jsonl"
    if not manifest.is_file():
        pytest.skip("the test speech is not beside the repository")
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    found = sorted((row for row in rows if row["subset"] == subset), key=lambda row: row["seconds"])
    return [load_audio(PUBLIC / row["path"]) for row in found[:count]]


@needs_demo
@pytest.mark.slow
@pytest.mark.parametrize(
    ("pruned", "language"), [(False, None), (True, "Chinese")], ids=["whole vocabulary", "pruned to zh"]
)
def test_the_demo_model_says_the_same(pruned: bool, language: str | None, tmp_path: Path) -> None:
    """Through transformers' own processor and `generate`, beside `quasr.load` of our folder of the same codes."""
    model, tokenizer, texts = make(DEMO, "int4-g64", torch.bfloat16), Tokenizer.from_folder(DEMO), {}
    if pruned:
        pruning = choose_tokens(tokenizer, DEMO, model.config.text.vocab_size, Keep(("zh",)))
        prune(model, pruning)
        texts = pruned_files(tokenizer, DEMO, pruning)
    save_compressed_tensors(model, DEMO, tmp_path / "out", texts)
    save_quantised(model, export_recipe("int4-g64"), DEMO, tmp_path / "own", {}, texts)
    theirs = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    with quasr.load(tmp_path / "own", device="cpu", dtype="fp32") as own:
        for samples in demo_clips("zh_words" if pruned else "ljspeech", 3):
            inputs = processor.apply_transcription_request(audio=samples, language=language)
            ids = theirs.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
            said = processor.decode(ids[0, inputs["input_ids"].shape[1] :], return_format="transcription_only")
            mine = own.transcribe((samples, 16_000), language=language, max_new_tokens=NEW_TOKENS)
            assert mine.text
            assert mine.text == said


@needs_demo
@pytest.mark.parametrize("language", [None, "English"])
def test_the_processor_makes_our_prompt(language: str | None, tmp_path: Path) -> None:
    save_compressed_tensors(make(DEMO, "int4", torch.bfloat16), DEMO, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    samples = np.zeros(16_000, np.float32)
    ids = processor.apply_transcription_request(audio=samples, language=language, prompt="names")["input_ids"][0]
    tokenizer = Tokenizer.from_folder(DEMO)
    prompt = build_prompt(tokenizer, "names", language)
    assert ids.tolist() == [*prompt.prefix, *[tokenizer.special.audio_pad] * 13, *prompt.suffix]


@pytest.mark.parametrize(
    ("compute_type", "rules", "message"),
    [
        ("int8", (), "are written in int4"),
        ("nf4", (), "are written in int4"),
        ("int4", ("decoder.layers.0.*=int8",), "a rule can say int4-g128 or none"),
    ],
)
def test_what_the_format_does_not_hold(compute_type: str, rules: tuple[str, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        export_recipe(compute_type, rules)


@needs_demo
def test_other_networks_and_folders_are_refused(tmp_path: Path) -> None:
    source = random_checkpoint(SMALL, tmp_path / "source")
    whole = load_quantising(source, read_config(source), recipe_for("int4-g64"), torch.bfloat16, CPU)
    with pytest.raises(OptionError, match="the rest in 16 bits"):
        save_compressed_tensors(whole, source, tmp_path / "out")
    with pytest.raises(OptionError, match="already exists"):
        save_compressed_tensors(make(source, "int4-g64", torch.bfloat16), source, source)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@needs_demo
def test_what_a_checkpoint_says_of_languages_and_lengths_stays(tmp_path: Path) -> None:
    save_compressed_tensors(make(DEMO, "int4", torch.bfloat16), DEMO, tmp_path / "out")
    was, now = read_config(DEMO), read_config(tmp_path / "out")
    assert (now.layout, now.languages, now.max_audio_seconds) == ("hf", ("English", "Chinese"), was.max_audio_seconds)
    assert was.max_audio_seconds is not None


@needs_demo
def test_quasr_says_that_it_does_not_read_the_export(tmp_path: Path) -> None:
    save_compressed_tensors(make(DEMO, "int4", torch.bfloat16), DEMO, tmp_path / "out")
    with pytest.raises(CheckpointError, match="compressed-tensors"):
        quasr.load(tmp_path / "out", device="cpu")
