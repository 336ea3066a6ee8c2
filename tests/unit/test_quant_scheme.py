from __future__ import annotations

import subprocess
import sys

import pytest

from quasr.errors import OptionError
from quasr.quant.scheme import GROUPS, NAMES, Scheme, llm_int8, parse


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("none", Scheme("none", 16)),
        ("int8", Scheme("int8", 8, 0)),
        ("int8-g128", Scheme("int8", 8, 128)),
        ("int4", Scheme("int4", 4, 128)),
        ("int4-g64", Scheme("int4", 4, 64)),
        ("llm-int8", Scheme("llm-int8", 8, 0, 6.0)),
        ("llm-int8:4.5", Scheme("llm-int8", 8, 0, 4.5)),
        ("nf4", Scheme("nf4", 4, 64)),
    ],
)
def test_names(name: str, scheme: Scheme) -> None:
    assert parse(name) == scheme


@pytest.mark.parametrize("name", [*NAMES, "llm-int8:0.0", "llm-int8:1e-06"])
def test_a_scheme_is_its_own_name(name: str) -> None:
    assert parse(str(parse(name))) == parse(name)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("int9", "did you mean int8"),
        ("in4-g64", "int4-g64"),
        ("q5_k_m", "there are none, int8, int8-g128"),
        ("", "there are none"),
        ("int4-g48", "128, 64, 32"),
        ("nf4-g64", "int8 and int4 take the groups"),
        ("int8:6.0", "unknown scheme"),
        ("int4-g999999999999", "unknown scheme"),
        ("llm-int8:six", "no number"),
        ("llm-int8:nan", "0 or more"),
        ("llm-int8:-1", "0 or more"),
    ],
)
def test_wrong_names_get_advice(name: str, advice: str) -> None:
    with pytest.raises(OptionError, match=advice):
        parse(name)


def test_the_threshold_is_a_float() -> None:
    assert isinstance(llm_int8(6).threshold, float)
    assert str(llm_int8(6)) == "llm-int8"


def test_bytes_of_a_weight_worked_out_by_hand() -> None:
    rows, columns = 6144, 2048
    assert parse("none").bytes(rows, columns, 2) == 25_165_824
    assert parse("int8").bytes(rows, columns, 2) == 12_582_912 + 6144 * 2
    assert parse("int8-g64").bytes(rows, columns, 2) == 12_582_912 + 6144 * 32 * 2
    assert parse("int4").bytes(rows, columns, 2) == 6_291_456 + 6144 * 16 * 2
    assert parse("int4-g32").bytes(rows, columns, 4) == 6_291_456 + 6144 * 64 * 4
    assert parse("llm-int8").bytes(rows, columns, 2) == 12_582_912 + 6144 * 4 + 1
    assert parse("nf4").bytes(rows, columns, 2) == 6_291_456 + 6144 * 32 * 4


@pytest.mark.parametrize("group", GROUPS)
def test_which_rows_divide(group: int) -> None:
    assert parse(f"int4-g{group}").fits(3 * group)
    assert not parse(f"int4-g{group}").fits(3 * group + 16)
    assert parse("int8").fits(7)


def test_schemes_and_recipes_need_no_torch() -> None:
    code = "import sys, quasr.quant.scheme, quasr.quant.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
