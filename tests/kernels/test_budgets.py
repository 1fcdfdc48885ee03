"""The machine code of every kernel keeps its budget, and one that does not is caught; docs/kernels.md has what is counted."""

import difflib
import re

import pytest

from svdq_pack.tests.kernels import toolchain
from svdq_pack.tests.kernels.families import mutations
from svdq_pack.tests.kernels.families.test_every_variant import LIBRARIES, MACHINE_CODE
from svdq_pack.tools import kernel_budgets as budgets

pytestmark = [toolchain.needs_nvcc, toolchain.needs_nvdisasm]


@pytest.mark.parametrize("file, arch", MACHINE_CODE)
def test_kernels_keep_their_budget(file, arch):
    library = next(library for library in LIBRARIES if file in library.sources)
    rows = budgets.measure(toolchain, file, arch)
    assert sorted(counts.name for counts, _ in rows) == sorted(library.sources[file])
    complaints = [complaint for counts, budget in rows for complaint in budgets.broken(counts, budget)]
    assert not complaints, "\n".join(complaints)


def test_docs_have_these_counts():
    """What nvcc makes of a kernel depends on its version, so only the one the docs were counted with can say."""
    _, documented, _ = budgets.split_docs(budgets.DOCS.read_text(encoding="utf-8"))
    version = re.match(r"nvcc ([\d.]*\d)", documented)
    if version and version[1] != toolchain.version():
        pytest.skip(f"{budgets.DOCS.name} was counted with nvcc {version[1]}, this is {toolchain.version()}")
    counted = budgets.section(toolchain)
    changes = difflib.unified_diff(documented.splitlines(), counted.splitlines(), "docs/kernels.md", "counted",
                                   n=0, lineterm="")
    assert documented == counted, "\n".join([*changes, "If that is meant, run: python tools/kernel_budgets.py --write"])


def test_docs_without_marks_are_refused():
    assert budgets.split_docs(f"a\n{budgets.BEGIN}b\n{budgets.END}\nc") == ("a\n", "b\n", "\nc")
    for text in ("a", budgets.BEGIN, budgets.END, budgets.END + budgets.BEGIN):
        with pytest.raises(ValueError, match="lacks the line <!-- .*Put it back"):
            budgets.split_docs(text)


def test_names_of_kernels_are_joined_where_all_choices_are_there():
    assert budgets.joined(["gemm_a_x", "gemm_a_y", "gemm_b_x", "gemm_b_y"]) == "gemm_{a,b}_{x,y}"
    assert budgets.joined(["gemm_a_x", "gemm_b_y"]) == "gemm_a_x, gemm_b_y"
    assert budgets.joined(["gemm_a", "gemm_a_x"]) == "gemm_a, gemm_a_x"
    assert budgets.joined(["gemm"]) == "gemm"


def counts_of(source, arch="sm_86"):
    built = toolchain.cubin(source, arch)
    kernel, = budgets.parse(toolchain.sass(built.path), built.log, arch)
    return kernel


def complaints_of(source, **budget):
    return "\n".join(budgets.broken(counts_of(source), budgets.Budget("*", **{"registers": 255, **budget})))


GOOD = """extern "C" __global__ void good(float* x, int n) {
    for (int i = threadIdx.x; i < n; i += 32) x[i] *= 2;
}"""


def test_a_good_kernel_passes():
    assert complaints_of(GOOD, never=budgets.ATOMICS) == ""


def test_spills_are_caught():
    source = """extern "C" __global__ void __launch_bounds__(1024, 2) spills(float* x, int n) {
        float v[64];
        #pragma unroll
        for (int i = 0; i < 64; i++) v[i] = x[i * n];
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < 64; i++) x[i * n + 1] = v[i] * v[(i * 7 + 3) % 64];
    }"""
    found = complaints_of(source)
    assert "bytes spilled" in found and "STL" in found and "LDL" in found


def test_an_array_indexed_at_run_time_is_caught():
    source = """extern "C" __global__ void indexed(int* x, int n) {
        int v[16];
        for (int i = 0; i < 16; i++) v[i] = x[i];
        for (int i = 0; i < n; i++) v[x[i] & 15] += i;
        for (int i = 0; i < 16; i++) x[i] = v[i];
    }"""
    found = complaints_of(source)
    assert "LDL in the kernel" in found and "spilled" not in found


def test_atomics_are_caught():
    source = """extern "C" __global__ void adds(float* x) { atomicAdd(x, 1.0f); }"""
    assert "RED" in complaints_of(source, never=budgets.ATOMICS)
    source = """extern "C" __global__ void takes(int* x) { x[threadIdx.x] = atomicAdd(x, 1); }"""
    assert "ATOM" in complaints_of(source, never=budgets.ATOMICS)


def test_a_call_is_caught():
    source = """extern "C" __global__ void divides(float* x) { x[0] = x[1] / x[2]; }"""         # div.rn has a slow path
    assert "CALL.div_rn" in complaints_of(source)
    assert complaints_of(source, calls=("div_rn_*",)) == ""
    assert "CALL" not in complaints_of(source.replace("x[1] / x[2]", "__fdividef(x[1], x[2])"))


def test_registers_and_missing_instructions_are_caught():
    assert "registers, at most 2" in complaints_of(GOOD, registers=2)
    assert "no LDS.128 in the hot loop" in complaints_of(GOOD, must=("LDS.128",))


LOOPS = """#include "ptx.cuh"
extern "C" __global__ void loops(const words4* a, float* out, int n) {
    int sum[4], none[4] = {0, 0, 0, 0};
    float c[4] = {0, 0, 0, 0};
    for (int j = 0; j < n; j++) {
        #pragma unroll 1
        for (int i = 0; i < n; i++) {                   // the hot loop: 2 IMMA
            const words4 x = a[i * 32 + threadIdx.x];
            for (int half = 0; half < 2; half++) {
                px::mma_i4<false>(sum, x, half ? x.x : x.z, x.y, none);
                for (int e = 0; e < 4; e++) c[e] += (float)sum[e];
            }
        }
        #pragma unroll 1
        for (int i = 0; i < n; i++) {                   // 1 IMMA
            const words4 x = a[i * 32 + threadIdx.x + 7];
            px::mma_i4<true>(sum, x, x.x, x.y, none);
            for (int e = 0; e < 4; e++) c[e] *= (float)sum[e];
        }
    }
    for (int e = 0; e < 4; e++) out[threadIdx.x * 4 + e] = c[e];
}"""


def test_the_hot_loop_is_the_inner_one_with_most_mmas():
    counts = counts_of(LOOPS)
    mix = budgets.histogram(counts.hot_loop("IMMA.16864"))
    assert mix["IMMA.16864"] == 2 and mix["I2FP"] == 8 and mix["LDG.128"] == 1
    assert sum(budgets.matches(op, "IMMA") for op in counts.code) == 3
    assert 12 < counts.per_mma("IMMA.16864") < 25
    assert "8 I2FP.F32.S32 in the hot loop" in complaints_of(LOOPS, mma="IMMA.16864", must_not=("I2FP",))
    assert "per IMMA.16864, at most 2" in complaints_of(LOOPS, mma="IMMA.16864", per_mma=2)


def test_emulated_mma_is_caught_on_hopper():
    """There the compiler turns a 4-bit MMA into a call of 189 instructions."""
    built = toolchain.cubin(LOOPS, "sm_90")
    kernel = next(k for k in budgets.parse(toolchain.sass(built.path), built.log, "sm_90") if k.name == "loops")
    found = "\n".join(budgets.broken(kernel, budgets.Budget("*", registers=255, must=("IMMA.16864",))))
    assert "no IMMA.16864" in found and "CALL" in found


@pytest.mark.parametrize("op, pattern, expected", [
    ("LDS.128", "LDS", True), ("LDS.U.128", "LDS*.128", True), ("LDSM.16.M88", "LDS", False), ("LDS.64", "LDS.128", False),
    ("LDGSTS.E.BYPASS.128", "LDG", False), ("LDGSTS.E.BYPASS.128", "LDGSTS*.128", True),
    ("LDG.E.128.CONSTANT", "LDG*.128", True), ("I2FP.F32.S32", "I2F", False), ("I2F.S8", "I2F", True),
    ("REDUX.SUM", "RED", False), ("ATOMG.E.ADD", "ATOM*", True),
])
def test_names_of_instructions(op, pattern, expected):
    assert budgets.matches(op, pattern) == expected


# Mutations of the Hopper kernel

def complaints_of_gemm_fp8(right, wrong):
    text = mutations.only("gemm_fp8.cuh", "gemm_fp8_bf16_token_w4_c1", mutations.planted("gemm_fp8.cuh", right, wrong))
    built = toolchain.cubin(text, "sm_90a")
    budget = next(b for b in budgets.BUDGETS["gemm_fp8.cuh"] if "token_w4" in b.kernel)
    return "\n".join(complaint for counts in budgets.parse(toolchain.sass(built.path), built.log, "sm_90a")
                     for complaint in budgets.broken(counts, budget))


def test_too_few_registers_are_caught():
    """With 216 a thread spills, and ptxas says that it runs the wgmmas one after the other."""
    found = complaints_of_gemm_fp8("px::grow_registers<240>();", "px::grow_registers<176>();")
    assert "bytes spilled" in found and "LDL" in found


def test_serialised_wgmmas_are_caught():
    """A use of the accumulators between the wgmma and its wait."""
    wait = "px::wgmma_wait(sum, a[0], a[1]);"
    assert "serialized" in complaints_of_gemm_fp8(wait, f"acc[sub][0] += sum[0]; {wait}")


def test_slow_weights_are_caught():
    """Weights converted instead of masked."""
    right = "acc[sub][8 * i + e] += (MODE"
    found = complaints_of_gemm_fp8(right, right.replace("(MODE", "(float)(int)sum[e] + (MODE"))
    assert "I2F" in found or "F2I" in found
    assert "instructions per QGMMA" in found
