"""The machine code of the Hopper kernels for sm_90a keeps its budget, and one that does not is caught."""

import pytest
from svdq_pack.tests.kernels import test_hopper, toolchain
from svdq_pack.tools import kernel_budgets as budgets

pytestmark = [toolchain.needs_nvcc, toolchain.needs_nvdisasm]


@pytest.mark.parametrize("file, kernels", [("gemm_fp8.cuh", 16), ("quant_fp8.cuh", 16)])
def test_kernels_keep_their_budget(file, kernels):
    rows = budgets.measure(toolchain, file, "sm_90a")
    assert len(rows) == kernels
    complaints = [complaint for counts, budget in rows for complaint in budgets.broken(counts, budget)]
    assert not complaints, "\n".join(complaints)


def complaints_of(right, wrong, mode):
    source = test_hopper.first_shells("gemm_fp8.cuh", mode=mode)
    assert right in source
    built = toolchain.cubin(source.replace(right, wrong), "sm_90a")
    budget = next(b for b in budgets.BUDGETS["gemm_fp8.cuh"] if f"{mode}_w4" in b.kernel)
    return "\n".join(complaint for counts in budgets.parse(toolchain.sass(built.path), built.log, "sm_90a")
                     for complaint in budgets.broken(counts, budget))


def test_too_few_registers_are_caught():
    """With 216 a thread spills, and ptxas says that it runs the wgmmas one after the other."""
    found = complaints_of("px::grow_registers<240>();", "px::grow_registers<176>();", "token")
    assert "bytes spilled" in found and "LDL" in found


def test_serialised_wgmmas_are_caught():
    """A use of the accumulators between the wgmma and its wait."""
    wait = "px::wgmma_wait(sum, a[0], a[1]);"
    found = complaints_of(wait, f"acc[sub][0] += sum[0]; {wait}", "token")
    assert "serialized" in found


def test_slow_weights_are_caught():
    """Weights converted instead of masked."""
    found = complaints_of("acc[sub][8 * i + e] += (MODE", "acc[sub][8 * i + e] += (float)(int)sum[e] + (MODE", "token")
    assert "I2F" in found or "F2I" in found
    assert "instructions per QGMMA" in found
