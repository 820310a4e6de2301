"""The kernel compiles for GPUs that are not here, down to their machine code.

The interpreter takes programs that the compiler refuses, so this runs in a process without it.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sat_lens.attention import hard_kernel as hard

capability, name, size = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
dtype = getattr(torch, name)
short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[name]
kernel, blocks = hard._average_of_winners, hard.blocks_for(dtype, size)
constants = {
    "SIZE": size, "PADDED": size, "VSIZE": size, "VPADDED": size,
    "QUERIES": blocks.queries, "KEYS": blocks.keys, "LOWEST": -1e30, "UPCAST": False,
    "CAUSAL": True, "VISIBLE": True, "BIAS": True,
}
pointers = {name: "*" + short for name in ("q", "k", "v", "out")}
pointers |= {"bias": "*fp32", "visible": "*i8", "factor": "fp32"}
types = {name: pointers.get(name, "i32") for name in kernel.arg_names}
types |= dict.fromkeys(constants, "constexpr")
source = ASTSource(kernel, types, constexprs=constants)
target = GPUTarget("cuda", capability, 32)
built = triton.compile(source, target=target, options={"num_warps": blocks.warps})
print(len(built.asm["cubin"]), built.metadata.shared, "mma" in built.asm["ptx"])
"""
# What a block may use of an A100's and an H100's shared memory.
MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [64, 128])
def test_it_compiles_and_its_blocks_fit(capability, dtype, size):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    arguments = [sys.executable, "-c", PROGRAM, str(capability), dtype, str(size)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    code_size, shared, on_tensor_cores = done.stdout.split()
    assert int(code_size) > 0
    assert int(shared) <= MOST_SHARED[capability]
    assert on_tensor_cores == str(dtype != "float32")
