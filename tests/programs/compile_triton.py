"""Compiles the Triton kernels for compute capability 9.0, which needs no GPU, and says what they take of it.

usage: compile_triton.py [--tiles first|all] [--dtypes bfloat16] [--levels 3] [--widths 64]
Prints a JSON object a line for each kernel and tile: bytes of shared memory, registers and bytes of stack (spilled
registers) a thread, and whether Hopper's matrix instruction is used. `TRITON_INTERPRET` must not be set.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


# The module by itself: the package takes longer to import than a kernel to compile.
sys.path.insert(0, str(Path(__file__).parents[2] / "modeling"))
import triton_hkt


SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
INTEGERS = {"B", "H", "T", "length"}
POINTERS = {
    "weights": "*fp32",
    "lse": "*fp32",
    "delta": "*fp32",
    "exact_delta": "*fp32",
    "padding": "*u8",
    "seed": "*i64",
}
POINTERS |= {"partials": "*fp32", "products": "*fp32"}


def compile_kernel(kernel, dtype, constants, num_warps=4, num_stages=2):
    """The compiled kernel; whatever is no constant and has no type of its own is a tensor of `dtype`."""
    signature, fixed, aligned = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], fixed[name] = "constexpr", constants[name]
        elif name in INTEGERS:
            signature[name] = "i32"
        elif name == "dropout_p":
            signature[name] = "fp32"
        else:
            is_partial = re.fullmatch(r"d[qk]\d", name)
            signature[name] = "*fp32" if is_partial else POINTERS.get(name, f"*{SHORT[dtype]}")
            aligned[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=fixed, attrs=aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def resources(compiled):
    usage = {"shared": compiled.metadata.shared, "wgmma": "wgmma.mma_async" in compiled.asm["ptx"]}
    reader = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([reader, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return {**usage, "registers": int(registers), "stack": int(stack)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiles", choices=["first", "all"], default="all")
    parser.add_argument("--dtypes", nargs="+", choices=list(SHORT), default=["bfloat16"])
    parser.add_argument("--levels", type=int, nargs="+", default=[3])
    parser.add_argument("--widths", type=int, nargs="+", default=[64])
    options = parser.parse_args()
    for dtype, num_levels, width in itertools.product(options.dtypes, options.levels, options.widths):
        sizes = {"P": width, "BLOCK_P": max(16, triton.next_power_of_2(width)), "TOKEN_MAJOR": True}
        small = {**sizes, "L": num_levels, "LEVEL": num_levels - 1, "PARTIALS": 2, "PRODUCTS": True, "BLOCK": 64}
        for kernel in (triton_hkt._delta_kernel, triton_hkt._finish_kernel):
            compile_kernel(kernel, dtype, small)
        flags = {"L": num_levels, "CAUSAL": True, "PADDED": False, "DROPOUT": False, "PRECISION": "tf32x3"}
        for name, kernel in triton_hkt.KERNELS.items():
            tiles = triton_hkt.tiles(name, num_levels, sizes["BLOCK_P"], 4 if dtype == "float32" else 2)
            for tile in tiles[:1] if options.tiles == "first" else tiles:
                constants = {**sizes, **flags, **tile, "HELD": triton_hkt.held_phases(name, num_levels)}
                compiled = compile_kernel(kernel, dtype, constants, tile["num_warps"], tile["num_stages"])
                case = {"kernel": name, "dtype": dtype, "levels": num_levels, "width": width, **tile}
                print(json.dumps({**case, **resources(compiled)}), flush=True)


if __name__ == "__main__":
    main()
