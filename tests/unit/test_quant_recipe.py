from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from quant_samples import CONFIG, UNTIED
from torch import nn

from quasr.errors import OptionError
from quasr.model.asr import Qwen3ASR
from quasr.model.config import AudioConfig, ModelConfig, TextConfig
from quasr.quant.recipe import COMPUTE_TYPES, NO_RECIPE, Recipe, layers, other_parameters, recipe_for
from quasr.quant.scheme import parse

LARGE = ModelConfig(
    AudioConfig(24, 1024, 16, 4096, 2048), TextConfig(151_936, 2048, 28, 16, 8, 128, 6144), "original"
)  # fmt: skip
"""Qwen3-ASR-1.7B."""


@pytest.mark.parametrize("config", [CONFIG, UNTIED, LARGE])
def test_layers_are_those_of_the_network(config: ModelConfig) -> None:
    with torch.device("meta"):
        modules = dict(Qwen3ASR(config).named_modules())
    listed = {layer.name: (layer.kind, layer.rows, layer.columns, layer.bias) for layer in layers(config)}
    truth = {}
    for name, module in modules.items():
        if isinstance(module, nn.Linear) and not name.startswith(("encoder.stem", "encoder.linear_")):
            bias = 0 if module.bias is None else len(module.bias)
            truth[name] = ("linear", module.out_features, module.in_features, bias)
        elif isinstance(module, nn.Embedding):
            truth[name] = ("embedding", module.num_embeddings, module.embedding_dim, 0)
    assert listed == truth


@pytest.mark.parametrize("config", [CONFIG, UNTIED, LARGE])
def test_every_parameter_is_counted_once(config: ModelConfig) -> None:
    with torch.device("meta"):
        truth = sum(weight.numel() for weight in Qwen3ASR(config).parameters())
    assert sum(layer.rows * layer.columns for layer in layers(config)) + other_parameters(config) == truth
    assert NO_RECIPE.weight_bytes(config) == 2 * truth


def test_int8_quantises_all_and_shares_the_embedding() -> None:
    schemes = recipe_for("int8").assign(CONFIG)
    assert set(schemes) == {layer.name for layer in layers(CONFIG)}
    assert set(schemes.values()) == {parse("int8")}
    assert "decoder.lm_head" in recipe_for("int8").assign(UNTIED)


def test_int4_keeps_encoder_and_embedding_at_eight_bits() -> None:
    schemes = recipe_for("int4-g64").assign(UNTIED)
    by_room: dict[str, set[str]] = {}
    for name, scheme in schemes.items():
        room = "layers" if name.startswith("decoder.layers.") else name.split(".layers.")[0]
        by_room.setdefault(room, set()).add(str(scheme))
    assert by_room == {
        "encoder": {"int8"},
        "layers": {"int4-g64"},
        "decoder.embed_tokens": {"int8"},
        "decoder.lm_head": {"int8"},
    }


def test_bitsandbytes_recipes_leave_the_embedding_alone() -> None:
    for name, decoder in (("llm-int8", "llm-int8"), ("nf4", "nf4")):
        schemes = recipe_for(name).assign(UNTIED)
        assert "decoder.embed_tokens" not in schemes
        assert "decoder.lm_head" not in schemes
        assert str(schemes["decoder.layers.1.mlp.up_proj"]) == decoder
        assert schemes["encoder.layers.0.fc1"].bits == 8


def test_sizes_of_the_large_model() -> None:
    gigabytes = {name: recipe_for(name).weight_bytes(LARGE) / 1e9 for name in ("bf16", "int8", "int4")}
    assert gigabytes["bf16"] == pytest.approx(4.08, abs=0.005)
    assert gigabytes["int8"] == pytest.approx(2.06, abs=0.005)
    assert gigabytes["int4"] == pytest.approx(1.37, abs=0.005)


def test_the_first_rule_that_matches_counts() -> None:
    recipe = recipe_for("int4", rules=["decoder.layers.0.*=int8", "*.o_proj=none", "decoder.layers.*.mlp.*=int4-g32"])
    schemes = recipe.assign(CONFIG)
    assert str(schemes["decoder.layers.0.self_attn.o_proj"]) == "int8"
    assert "decoder.layers.1.self_attn.o_proj" not in schemes
    assert str(schemes["decoder.layers.1.mlp.up_proj"]) == "int4-g32"
    assert str(schemes["decoder.layers.1.self_attn.q_proj"]) == "int4-g128"
    assert recipe.name == "int4-g128 with rules"


def test_the_table_adds_up() -> None:
    recipe = recipe_for("int4", rules=["decoder.layers.0.*=int8"])
    rows = recipe.table(CONFIG)
    assert [row.pattern for row in rows] == [
        "decoder.layers.0.*",
        "encoder.layers.*",
        "decoder.layers.*",
        "decoder.*",
        "stem, projector, norms, biases",
    ]
    assert [row.layers for row in rows] == [7, 12, 7, 1, 0]
    assert sum(row.parameters for row in rows) * 2 == NO_RECIPE.weight_bytes(CONFIG)
    assert recipe_for("nf4").table(CONFIG)[2].pattern == "(no rule)"


def test_json_and_back() -> None:
    recipe = recipe_for("llm-int8", 4.25, ["decoder.layers.0.*=int4-g64"])
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_dtypes_quantise_nothing() -> None:
    for name in ("auto", "bf16", "fp16", "fp32"):
        assert recipe_for(name) == NO_RECIPE
        assert name in COMPUTE_TYPES


@pytest.mark.parametrize(
    ("compute_type", "threshold", "rules", "message"),
    [
        ("int9", None, [], "did you mean"),
        ("int8", 6.0, [], "goes with llm-int8"),
        ("llm-int8", -1.0, [], "0 or more"),
        ("int8", None, ["decoder.layers.0.*"], "PATTERN=SCHEME"),
        ("int8", None, ["=int8"], "PATTERN=SCHEME"),
        ("int8", None, ["*=int5"], "unknown scheme"),
    ],
)
def test_wrong_wishes(compute_type: str, threshold: float | None, rules: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        recipe_for(compute_type, threshold, rules)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("encoder.layers.0.*=int4", "below 8 bits the audio encoder breaks"),
        ("encoder.*=nf4", "below 8 bits"),
        ("encoder.linear_1=int8", "fits no layer"),
        ("encoder.stem.*=int8", "fits no layer"),
        ("decoder.embed_tokens=int4", "int8 or none"),
        ("*=int8-g64", "decoder.embed_tokens cannot be int8-g64"),
    ],
)
def test_rules_that_cannot_be(rule: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        recipe_for("int8", rules=[rule]).assign(CONFIG)


def test_groups_that_do_not_divide_name_the_layer_and_what_does() -> None:
    odd = replace(CONFIG, text=replace(CONFIG.text, ffn=96))
    with pytest.raises(OptionError, match=r"decoder\.layers\.0\.mlp\.down_proj has 96 .* groups of 128 .* takes 32"):
        recipe_for("int4").assign(odd)
