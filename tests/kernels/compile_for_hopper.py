"""Compiles loops of the kernels for compute capability 9.0 and prints Triton's intermediate code of each as JSON.

A process of its own, because where tests run Triton interprets kernels. With an argument loops do not wait for their
products.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quasr.kernels import triton_product, triton_prompt

SETTLE = len(sys.argv) == 1
DTYPES = {"fp16": tl.float16, "bf16": tl.bfloat16}


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int) -> str:
    """Pointers are aligned, as torch's are, and so are the sizes of matrices: else loads are not pipelined."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    even = {name for name in names if signature[name].startswith("*") or name in {"n", "k"}}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in even}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(
        ASTSource(kernel, signature, fixed, aligned), target=GPUTarget("cuda", 90, 32), options=options
    )
    return str(made.asm["ttgir"])


def product(dtype: str, bits: int, group: int, mode: int, kind: tuple[str, int]) -> str:
    """A product with a tile of `triton_product.TILES`, in one part."""
    weights, shape = kind
    rows, columns, _, warps, stages = triton_product.TILES["codes", shape][weights]
    pointer = f"*{dtype}"
    types = {
        **dict.fromkeys(("scale", "out", "places", "totals"), pointer),
        **dict.fromkeys(("m", "n", "k", "steps"), "i32"),
        "x": pointer if bits == 8 else "*i32",
        "weight": "*i8" if bits == 8 else "*u8",
        "parts": "*fp32",
        "counters": "*i32",
    }
    per = 2 if bits == 4 else 1
    constants: dict[str, Any] = {
        "BITS": bits,
        "GROUP": group // per,
        "SCALED": group == 0,
        "MODE": mode,
        "SPLITS": 1,
        "BN": rows,
        "BM": triton_product.LINES[shape],
        "BK": min(columns, group or columns) // per,
        "TYPE": DTYPES[dtype],
        "PRECISION": "tf32",
        "EVEN": True,
        "PACKED": True,
        "SETTLE": SETTLE,
        "PDL": True,
        "AHEAD": 1,
    }
    return compiled(triton_product.product, types, constants, warps, stages)


def attention(dtype: str) -> str:
    types = {
        **dict.fromkeys(("q", "keys", "values", "out"), f"*{dtype}"),
        **dict.fromkeys(("starts", "begins"), "*i64"),
        "scale": "fp32",
        "positions": "i32",
        "prompts": "i32",
    }
    constants = {
        "HEADS": 16,
        "KV": 8,
        "SIZE": 128,
        "GP": 2,
        "DP": 128,
        "BM": triton_prompt.QUERIES,
        "BN": triton_prompt.KEYS,
        "PP": triton_prompt.PROMPTS,
        "PRECISION": "tf32",
        "SETTLE": SETTLE,
    }
    return compiled(triton_prompt.attention, types, constants, 8, 2)


def main() -> None:
    plain, gate, head = 0, 2, 3
    found = {
        "product of codes": product("bf16", 8, 0, plain, ("plain", 256)),
        "product of nibbles": product("bf16", 4, 128, plain, ("plain", 64)),
        "head": product("bf16", 8, 0, head, ("head", 64)),
        "gate and up": product("fp16", 8, 0, gate, ("gate", 256)),
        "attention of prompts": attention("bf16"),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
