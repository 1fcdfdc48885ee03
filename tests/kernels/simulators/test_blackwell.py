"""What sm_120a adds, in both simulators: element by element after the tables of the PTX ISA, and what they notice."""

import shutil

import numpy as np
import pytest
import torch

from svdq_pack.svdq.kernels import layout, reference
from svdq_pack.tests.kernels import toolchain
from svdq_pack.tests.kernels.simulators.emulator import build
from svdq_pack.tests.kernels.simulators.ptx import interpreter

LANES = [(lane // 4, lane % 4) for lane in range(32)]
FAULTS = build.KernelFault, interpreter.Fault


def in_emulator(source, *args):
    build.load(source).launch("k", 1, 32, 0, list(args), "forward")


def in_interpreter(source, *args, edit=lambda ptx: ptx):
    interpreter.Module(edit(toolchain.ptx(source, "sm_120a"))).launch("k", 1, 32, 0, list(args))


both = pytest.mark.parametrize("run", [
    pytest.param(in_emulator, marks=pytest.mark.skipif(not shutil.which("g++"), reason="no g++"), id="emulator"),
    pytest.param(in_interpreter, marks=toolchain.needs_nvcc, id="interpreter")])


def source(parameters, body):
    return f'#include "ptx.cuh"\nextern "C" __global__ void k({parameters}) {{\n    const int lane = threadIdx.x;\n{body}\n}}\n'


MMA = source("const u32* x, const float* c, float* d", "".join(f"""
    {{
        const u32* from = x + lane * 8;
        float sum[4];
        for (int i = 0; i < 4; i++)
            sum[i] = c[lane * 4 + i];
        px::mma_nvfp4<{pair}, {quarter}>(sum, words4{{from[0], from[1], from[2], from[3]}}, from[4], from[5], from[6], from[7]);
        for (int i = 0; i < 4; i++)
            d[{(pair * 4 + quarter) * 128} + lane * 4 + i] = sum[i];
    }}""" for pair in range(2) for quarter in range(4)))


def operands(seed, pair=None, quarter=None):
    """(a [16, 64], b [64, 8], scales of both [16, 4], [4, 8]: codes; words of the lanes [32, 8]). Lanes that are not selected
    have scales that are NaN; without a selection every lane gives others, which come as [2][16, 4] and [4][4, 8]."""
    random = np.random.default_rng(seed)
    a, b = random.integers(0, 16, (16, 64)), random.integers(0, 16, (64, 8))
    scale_a, scale_b = random.integers(0, 0x7f, (2, 16, 4)), random.integers(0, 0x7f, (4, 4, 8))
    words = np.zeros((32, 8), np.uint32)
    for lane, (g, t) in enumerate(LANES):
        for i in range(32):                                     # a_i, b_i of m16n8k64
            code = a[g + (8 if 8 <= i % 16 else 0), 8 * t + i % 8 + (32 if i >= 16 else 0)]
            words[lane, i // 8] |= np.uint32(int(code) << 4 * (i % 8))
        for i in range(16):
            code = b[8 * t + i % 8 + (32 if i >= 8 else 0), g]
            words[lane, 4 + i // 8] |= np.uint32(int(code) << 4 * (i % 8))
        row, column = scale_a[t // 2, g + t % 2 * 8], scale_b[t, :, g]
        row = row if pair in (None, t // 2) else np.full(4, 0x7f)
        column = column if quarter in (None, t) else np.full(4, 0x7f)
        for i in range(4):
            words[lane, 6] |= np.uint32(int(row[i]) << 8 * i)
            words[lane, 7] |= np.uint32(int(column[i]) << 8 * i)
    return a, b, scale_a, scale_b, words


def ue4m3(codes):
    return torch.tensor(codes.astype(np.uint8)).view(torch.float8_e4m3fn).double().numpy()


def e2m1(codes):
    return layout.e2m1(torch.tensor(codes.astype(np.uint8))).double().numpy()


def expected(a, b, scale_a, scale_b, c):
    a, b = e2m1(a) * ue4m3(scale_a).repeat(16, 1), e2m1(b) * ue4m3(scale_b).repeat(16, 0)
    return a @ b + c, np.abs(a) @ np.abs(b) + np.abs(c)


def fragments_of_c(c):
    return np.array([[c[g + i // 2 * 8, 2 * t + i % 2] for i in range(4)] for g, t in LANES], np.float32)


@both
def test_mma(run):
    """Every selection of lanes for the scales; each lane holds other ones."""
    a, b, scale_a, scale_b, words = operands(0)
    c = np.random.default_rng(1).standard_normal((16, 8)).astype(np.float32) * 100
    d = np.zeros((8, 32, 4), np.float32)
    run(MMA, words, fragments_of_c(c), d)
    for pair in range(2):
        for quarter in range(4):
            want, size = expected(a, b, scale_a[pair], scale_b[quarter], c)
            got = d[pair * 4 + quarter]
            assert (np.abs(got - fragments_of_c(want)) <= 2.0**-23 * fragments_of_c(size)).all(), (pair, quarter)


@both
def test_mma_reads_the_scales_of_selected_lanes_only(run):
    for pair, quarter in ((0, 0), (1, 2), (0, 3)):
        a, b, scale_a, scale_b, words = operands(2, pair, quarter)
        d = np.zeros((8, 32, 4), np.float32)
        run(MMA, words, np.zeros((32, 4), np.float32), d)
        want, _ = expected(a, b, scale_a[pair], scale_b[quarter], 0)
        np.testing.assert_allclose(d[pair * 4 + quarter], fragments_of_c(want), rtol=1e-5, atol=1e-3 * np.abs(want).max())
        others = [i for i in range(8) if i // 4 != pair or i % 4 != quarter]
        assert np.isnan(d[others]).all()


@both
def test_scale_of_one_block_is_nan(run):
    a, b, scale_a, scale_b, words = operands(3)
    words[4 * 5 + 1, 6] |= 0x7f << 16                            # pair 0, row 13, its third block
    d = np.zeros((8, 32, 4), np.float32)
    run(MMA, words, np.zeros((32, 4), np.float32), d)
    rows = np.isnan(d[:4])
    assert rows[:, 4 * 5:4 * 6, 2:].all() and rows.sum() == 4 * 8
    assert not np.isnan(d[4:]).any()


@both
def test_scales_have_no_sign(run):
    *_, words = operands(4)
    words[7, 7] |= 0x80
    with pytest.raises(FAULTS, match="ue4m3 has none"):
        run(MMA, words, np.zeros((32, 4), np.float32), np.zeros((8, 32, 4), np.float32))


@toolchain.needs_nvcc
@pytest.mark.parametrize("edit", [
    lambda ptx: ptx.replace(".m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X",
                            ".kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64.row.col"),
    lambda ptx: ptx.replace("{0,2}", "{%one, %two}").replace(".reg .b64", ".reg .b16 %one, %two; mov.u16 %one, 0; "
                                                             "mov.u16 %two, 2; .reg .b64", 1)])
def test_other_spellings(edit):
    """The modifiers' other order, which assemblers take too, and selectors in registers."""
    a, b, scale_a, scale_b, words = operands(5)
    d, again = np.zeros((2, 8, 32, 4), np.float32)
    c = np.zeros((32, 4), np.float32)
    ptx = toolchain.ptx(MMA, "sm_120a").replace("{0, ", "{0,")
    assert edit(ptx) != ptx
    in_interpreter(MMA, words, c, d)
    in_interpreter(MMA, words, c, again, edit=lambda text: edit(text.replace("{0, ", "{0,")))
    np.testing.assert_array_equal(d, again)


@toolchain.needs_nvcc
@pytest.mark.parametrize("selector", ["{1,2}", "{0,4}"])
def test_selectors_that_are_none(selector):
    *_, words = operands(6)
    with pytest.raises(interpreter.Fault, match="selectors"):
        in_interpreter(MMA, words, np.zeros((32, 4), np.float32), np.zeros((8, 32, 4), np.float32),
                       edit=lambda ptx: ptx.replace("{0, ", "{0,").replace("{0,2}", selector, 1))


@both
def test_pack_e2m1(run):
    """Every tie, its neighbours, both signs, what is too large, and random values."""
    ties = np.array([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 448, 3e38, np.inf, 1e-40], np.float32)
    near = np.concatenate([ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(0))])
    x = np.concatenate([near, -near, np.random.default_rng(0).standard_normal(256 - 2 * len(near)).astype(np.float32) * 3])
    codes = np.zeros(32, np.uint32)
    text = source("const float* x, u32* y", """
        float eight[8];
        for (int i = 0; i < 8; i++)
            eight[i] = x[lane * 8 + i];
        y[lane] = px::pack_e2m1(eight);""")
    run(text, x.reshape(32, 8), codes)
    got = (codes[:, None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15).ravel()
    np.testing.assert_array_equal(got, reference.to_e2m1(torch.tensor(x)).numpy())
    x[:] = np.nan
    run(text, x.reshape(32, 8), codes)
    assert (codes == 0x77777777).all()
