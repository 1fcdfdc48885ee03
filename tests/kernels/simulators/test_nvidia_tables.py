"""The interpreter's matrix instructions against NVIDIA's own tables of where each element lies, those of CuTe.

Kernels, emulator and interpreter come from one reading of the PTX ISA, and a shared slip would pass every other test. Here
nothing of that reading takes part: nvidia_tables.cu fills registers and shared memory by CuTe's layouts, and the product is
numpy's. All numbers are such that any sum of them is exact, in 13 bits for FP8.
"""

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from svdq_pack.tests.kernels import toolchain
from svdq_pack.tests.kernels.simulators.ptx.interpreter import Module

pytestmark = [toolchain.needs_nvcc, toolchain.needs_cute]

SOURCE = Path(__file__).with_name("nvidia_tables.cu")
TEXTS = {"warp": ("sm_120a", "THEIRS", "OURS"), "warp of sm_75": ("sm_75", "OURS"), "group": ("sm_90a", "GROUP")}
THEIRS = {"m16n8k64_s4_s4": (16, 8, 64), "m16n8k64_u4_s4": (16, 8, 64), "m16n8k32_s8_s8": (16, 8, 32),
          "m8n8k32_s4_s4": (8, 8, 32), "m8n8k32_u4_s4": (8, 8, 32), "m16n8k16_bf16_bf16": (16, 8, 16),
          "m16n8k16_f16_f16": (16, 8, 16), "m16n8k8_f16_f16": (16, 8, 8), "m16n8k64_e2m1_e2m1": (16, 8, 64)}
OURS = {f"{name}_ours": THEIRS[name] for name in ("m16n8k64_s4_s4", "m16n8k64_u4_s4", "m16n8k16_f16_f16", "m16n8k16_bf16_bf16",
                                                  "m16n8k32_s8_s8", "m16n8k64_e2m1_e2m1")}
GROUP = {"m64n128k32_e4m3_e4m3": (64, 128, 128), "m64n128k16_bf16_bf16_r32": (64, 128, 32),
         "m64n128k16_bf16_bf16_r128": (64, 128, 128), "m64n128k16_f16_f16_r32": (64, 128, 32)}
SHAPES = THEIRS | OURS | GROUP
CASES = [(kernel, "group" if kernel in GROUP else "warp") for kernel in SHAPES]
CASES += [(kernel, "warp of sm_75") for kernel in OURS if re.search("4_s4|_f16", kernel)]
FLOATS = {"bf16": torch.bfloat16, "f16": torch.float16, "e4m3": torch.float8_e4m3fn}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@cache
def text(name):
    """PTX of one of TEXTS, or what the compiler said instead."""
    arch, *defines = TEXTS[name]
    try:
        return toolchain.ptx(SOURCE, arch, defines, cute=True)
    except toolchain.BuildFailed as failed:
        return failed


@pytest.fixture
def ptx(request):
    if isinstance(text(request.param), Exception):
        raise text(request.param)
    return text(request.param)


def matrix(kind, rows, columns, seed):
    """Random values, float64, and the bits of each in 16."""
    random = np.random.default_rng(seed)
    if kind in FLOATS:
        values = random.integers(-4, 5, (rows, columns)).astype(np.float64)
        bits = torch.from_numpy(values).to(FLOATS[kind])
        bits = bits.view(torch.uint8 if bits.element_size() == 1 else torch.int16).numpy()
        return values, bits.astype(np.uint16)
    if kind == "e2m1":
        bits = random.integers(0, 16, (rows, columns)).astype(np.uint16)
        return E2M1[bits], bits
    width = int(kind[1:])
    bits = random.integers(0, 1 << width, (rows, columns)).astype(np.uint16)
    return bits - (bits >> width - 1 << width).astype(np.float64) * (kind[0] == "s"), bits


def scales(rows, columns, seed):
    """As matrix, of ue4m3 numbers that 16 columns have in common: a value per column, the bits of each number."""
    values = np.random.default_rng(seed).choice([0.5, 1, 1.5, 2, 3], (rows, columns // 16))
    bits = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return np.repeat(values, 16, 1), bits.astype(np.uint16)


def product(kernel, ptx):
    """What the kernel makes of random matrices, what numpy does, and the words of a wgmma's operands."""
    m, n, k = SHAPES[kernel]
    kinds = kernel.split("_")[1:3]
    (left, a), (right, b) = matrix(kinds[0], m, k, 1), matrix(kinds[1], n, k, 2)
    integers = re.fullmatch("[su][48]", kinds[0])
    c = np.random.default_rng(3).integers(-99, 100, (m, n)).astype(np.int32 if integers else np.float32)
    d, operands = np.full_like(c, 7), np.zeros((8, 2), np.uint64)
    more = [operands] if kernel in GROUP else []
    if kinds[0] == "e2m1":
        (of_left, a_scales), (of_right, b_scales) = scales(m, k, 4), scales(n, k, 5)
        left, right, more = left * of_left, right * of_right, [a_scales, b_scales]
    Module(ptx).launch(kernel, 1, 128 if kernel in GROUP else 32, 0, [a, b, c, d, *more])
    return d, left @ right.T + c, operands


@pytest.mark.parametrize("kernel, ptx", CASES, indirect=["ptx"])
def test_products(kernel, ptx):
    d, expected, operands = product(kernel, ptx)
    np.testing.assert_array_equal(d, expected)
    assert (operands[:, 0] == operands[:, 1]).all() and operands[0].all() == (kernel in GROUP)


@pytest.mark.parametrize("kernel, ptx", CASES, indirect=["ptx"])
def test_exchanged_registers_are_seen(kernel, ptx):
    """The first two of the result, of a and of b, as far as the last instruction has two: the numbers tell them apart."""
    start = ptx.index(f".entry {kernel}(")
    last = re.findall(r"mma[\w.]*sync\.aligned\.\S+ (.*?);", ptx[start + 1:].partition(".entry")[0], re.S)[-1]
    lists = [re.match(r"\{(%\w+)\s*,\s*(%\w+)", operand) for operand in re.findall(r"\{.*?\}", last)[:3]]
    assert lists[0]
    for first, second in [pair.groups() for pair in lists if pair]:
        changed = re.sub(rf"(mma\S*sync.*?)({first})(\s*,\s*)({second})\b", r"\1\4\3\2", ptx[start:])
        assert changed != ptx[start:]
        d, expected, _ = product(kernel, ptx[:start] + changed)
        assert (d != expected).any(), (first, second)


@pytest.mark.parametrize("ptx", ["group"], indirect=True)
def test_stmatrix(ptx):
    c, d = np.random.default_rng(4).permutation(256).astype(np.uint16).reshape(16, 16), np.zeros((16, 16), np.uint16)
    assert "stmatrix.sync.aligned.x4.trans.m8n8" in ptx
    Module(ptx).launch("stmatrix_trans", 1, 32, 0, [c, d])
    np.testing.assert_array_equal(d, c)
