"""What the CPU emulator knows of Hopper: instructions against numpy and torch, and each kind of fault against a kernel that
has it. CASES run on a GPU as well, where they are compared to the emulator bit for bit.
"""

import shutil

import numpy as np
import pytest
import torch

from svdq_pack.svdq.kernels import launch
from svdq_pack.svdq.kernels.variants import w4a8_sm90
from svdq_pack.tests.kernels.executors import TextLibrary, on
from svdq_pack.tests.kernels.simulators.emulator import build
from svdq_pack.tests.kernels.simulators.emulator.build import KernelFault
from svdq_pack.tests.kernels.simulators.test_emulator import HARD, LANES, ORDERS, faulty, kernel, words

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
VARIANT = w4a8_sm90.VARIANTS[0]             # whose GPUs have these instructions
SHARED = "extern __shared__ __align__(1024) u8 memory[];\n"
# Before wgmma reads what threads have stored.
FENCE = '\n#if PX_DEVICE\nasm volatile("fence.proxy.async.shared::cta;" ::: "memory");\n#endif\n'


# Instructions: name -> (parameters, body, arguments of which the last is the result, block, shared bytes, cluster)

def e4m3_case():
    random = np.random.default_rng(0)
    x = np.concatenate([np.array(HARD, np.float32), np.arange(-600, 600, 7, dtype=np.float32) / 2,
                        random.standard_normal(1500).astype(np.float32) * np.exp2(random.integers(-12, 11, 1500))])
    x = np.resize(x, 2 * 256 * 4).astype(np.float32)
    body = """for (int i = thread; i < n; i += 256) y[i] = px::pack_e4m3(x[2 * i], x[2 * i + 1]);"""
    return "const float* x, int n, u16* y", body, [x, 1024, np.zeros(1024, np.uint16)], 256, 0, 1


def wgmma_case(kind, groups=1):
    """d = a b + a b once more, in one warpgroup or two, of random bytes that are numbers."""
    random = np.random.default_rng(1)
    if kind == "e4m3":
        pattern = random.integers(0, 256, (64 + 128, 32), dtype=np.uint8)
        pattern[(pattern & 0x7f) == 0x7f] = 0
        call = "px::wgmma_e4m3<{}>(d, a, b + 2 * n);"
        operand = "px::operand(memory, 16, 1024, true)"
    else:
        dtype = torch.bfloat16 if kind == "bf16" else torch.float16
        pattern = torch.randn(64 + 128, 16, generator=torch.Generator().manual_seed(2)).to(dtype).view(torch.uint8).numpy()
        call = f"px::wgmma_half<{kind.upper()}>(d, a, b);"
        operand = "px::operand(memory, 128, 256, false)"
    a, b = pattern[:64], pattern[64:]
    fragments = np.zeros((4, 8, 4, 4, 4), np.uint8)                                         # warp g t register byte
    for warp in range(4):
        for g, t in LANES:
            for register in range(4):
                row, at = 16 * warp + g + 8 * (register % 2), 16 * (register // 2) + 4 * t
                fragments[warp, g, t, register] = a[row, at:at + 4]
    if kind == "e4m3":
        tile = random.integers(0, 0x7f, (128, 8, 16), dtype=np.uint8)                       # other columns of the same tile
        for n in range(128):
            for chunk in range(2):
                tile[n, (2 * 1 + chunk) ^ (n % 8)] = b[n, 16 * chunk:16 * chunk + 16]       # k32 step 1
    else:
        tile = b.reshape(16, 8, 2, 16).transpose(0, 2, 1, 3)                                # 8 rows, 8 of k, row, 16 bytes
    body = SHARED + f"""
        for (int i = thread; i < (int)({tile.size} / 4); i += blockDim.x) ((u32*)memory)[i] = tile[i];
        {FENCE}
        px::barrier();
        float d[64];
        for (int i = 0; i < 64; i++) d[i] = 0.25f * i;
        const words4 a = ((const words4*)x)[thread % 128];
        const u64 b = {operand};
        px::wgmma_fence();
        {call.format("false")}
        {call.format("true")}
        px::wgmma_commit();
        px::wgmma_wait(d, a, a);
        for (int i = 0; i < 64; i++) y[thread * 64 + i] = d[i];"""
    return ("const u32* x, const u32* tile, int n, float* y", body,
            [fragments.view(np.uint32).reshape(-1), np.ascontiguousarray(tile).view(np.uint32).reshape(-1), 1,
             np.zeros((groups, 4, 8, 4, 64), np.float32)], 128 * groups, 1024 + tile.size, 1)


def transpose_case():
    x = np.random.default_rng(3).integers(0, 1 << 32, (32, 4), dtype=np.uint32)
    body = SHARED + """
        u16* rows = (u16*)memory;                               // 32 rows of 8 values with 16 bytes between
        px::store_transposed(rows + thread * 16, ((const words4*)x)[thread]);
        px::warp_barrier();
        for (int i = 0; i < 8; i++) y[thread * 8 + i] = rows[thread * 16 + i];"""
    return "const u32* x, u16* y", body, [x, np.zeros((32, 8), np.uint16)], 32, 1024, 1


def rotate_case():
    x = np.random.default_rng(4).integers(0, 1 << 32, 32, dtype=np.uint32)
    return "const u32* x, u32* y", "y[thread] = px::rotate_right(x[thread], 4);", [x, words(32)], 32, 0, 1


RING = SHARED + """
    u64* full = (u64*)(memory + 4096), *empty = full + 2;       // two stages of 1 KiB: thread 64 copies, two warps sum
    if (thread == 0) {
        for (int i = 0; i < 2; i++) { px::mbarrier_init(full + i, 1); px::mbarrier_init(empty + i, 2); }
        px::mbarrier_fence();
    }
    px::barrier();
    if (thread == 64) {
        for (int i = 0; i < n; i++) {
            px::mbarrier_wait(empty + i % 2, i / 2 % 2 ^ 1);
            px::mbarrier_expect(full + i % 2, 1024);
            for (int half = 0; half < 2; half++)
                px::bulk_copy(memory + i % 2 * 1024 + half * 512, x + i * 256 + half * 128, 512, full + i % 2);
        }
    } else if (thread < 64) {
        u32 sum = 0;
        for (int i = 0; i < n; i++) {
            px::mbarrier_wait(full + i % 2, i / 2 % 2);
            for (int j = 0; j < 4; j++)
                sum += (i + 1) * ((const u32*)(memory + i % 2 * 1024))[j * 64 + (thread ^ 33)];
            px::warp_barrier();
            if (thread % 32 == 0)
                px::mbarrier_arrive(empty + i % 2);
        }
        y[thread] = sum;
    }"""


def ring_case():
    x = np.random.default_rng(5).integers(0, 1 << 20, (7, 256), dtype=np.uint32)
    return "const u32* x, int n, u32* y", RING, [x, 7, words(64)], 96, 8192, 1


PAIR = SHARED + """
    u64 *full = (u64*)(memory + 2048), *free = full + 1;        // each CTA fetches half of each KiB for both, 3 times
    const u32 rank = px::cluster_rank();
    if (thread == 0) {
        px::mbarrier_init(full, 1);
        px::mbarrier_init(free, 2);
        px::mbarrier_fence();
    }
    px::cluster_barrier();
    u32 sum = 0;
    for (int i = 0; i < n; i++) {
        if (thread == 0) {
            px::mbarrier_wait(free, i % 2 ^ 1);
            px::mbarrier_expect(full, 1024);
            px::bulk_copy_to(3, memory + rank * 512, x + i * 256 + rank * 128, 512, full);
        }
        px::mbarrier_wait(full, i % 2);
        for (int j = 0; j < 8; j++)
            sum += (i + 1) * ((const u32*)memory)[j * 32 + thread];
        px::warp_barrier();
        if (thread < 2)
            px::mbarrier_arrive_at(free, thread);
        px::warp_barrier();
    }
    y[blockIdx.x * 32 + thread] = sum + rank;
    px::cluster_barrier();"""


def pair_case():
    x = np.random.default_rng(6).integers(0, 1 << 20, (3, 256), dtype=np.uint32)
    return "const u32* x, int n, u32* y", PAIR, [x, 3, words(2, 32)], 32, 4096, 2


GROUPS = """
    __shared__ u32 s[128];
    s[thread] = x[thread];
    px::barrier_of(1 + thread / 64, 64);
    y[thread] = s[thread ^ 63];"""


def groups_case():
    return "const u32* x, u32* y", GROUPS, [np.arange(128, dtype=np.uint32) * 7, words(128)], 128, 0, 1


CASES = {"pack_e4m3": e4m3_case, "wgmma e4m3": lambda: wgmma_case("e4m3"), "wgmma bf16": lambda: wgmma_case("bf16"),
         "wgmma fp16": lambda: wgmma_case("fp16"), "two warpgroups": lambda: wgmma_case("e4m3", 2),
         "store_transposed": transpose_case, "rotate_right": rotate_case, "ring": ring_case, "pair": pair_case,
         "barrier_of": groups_case}


def text_of(parameters, body):
    return (f'#include "ptx.cuh"\nextern "C" __global__ void k({parameters}) {{\n'
            f"    const int thread = threadIdx.x;\n{body}\n}}\n")


def emulate(case, order="forward", **more):
    """The result of a case, by name or as its function gives it."""
    parameters, body, arguments, block, shared, cluster = CASES[case]() if isinstance(case, str) else case
    build.load(text_of(parameters, body)).launch("k", cluster, block, shared, arguments, order, cluster=cluster, **more)
    return arguments[-1]


@pytest.mark.parametrize("case", CASES)
@on(gpu=True)
def test_instruction_on_a_gpu(executor, case, tmp_path):
    """Bit for bit, but for sums of 16-bit floats; sums of e4m3 as the emulator cuts them to 13 bits."""
    parameters, body, arguments, block, shared, cluster = CASES[case]()
    library = TextLibrary("instruction", {"k.cuh": ("k",)}, True, {"k.cuh": text_of(parameters, body)})
    executor.build(library, tmp_path)
    given = [a if isinstance(a, int) else executor.put(torch.from_numpy(a.view("int8").copy())) for a in arguments]
    with executor.set(fp8_bits=13):
        launch.launch(library, given[-1], "k", (cluster, 1), block, given, shared, cluster)
    got, want = given[-1].cpu().numpy().view(arguments[-1].dtype), emulate(case, fp8_bits=13)
    if "16" in case:
        torch.testing.assert_close(torch.from_numpy(got), torch.from_numpy(want), rtol=1e-5, atol=1e-4)
    else:
        assert (got.view("uint8") == want.view("uint8")).all()


def test_pack_e4m3():
    x, got = e4m3_case()[2][0], emulate("pack_e4m3").view(np.uint8)
    want = torch.from_numpy(x).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    wrong = (got != want) & ~(np.isnan(x) & (got & 0x7f == 0x7f))
    assert not wrong.any(), (x[wrong][:5], got[wrong][:5], want[wrong][:5])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", ["wgmma e4m3", "wgmma bf16", "wgmma fp16", "two warpgroups"])
def test_wgmma(case, order):
    """Row 16w + g + 8 (i / 2 % 2), column 8 (i / 4) + 2t + i % 2 of d, of a b + a b."""
    arguments = CASES[case]()[2]
    kind = case.split()[1] if case != "two warpgroups" else "e4m3"
    dtype = {"e4m3": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp16": torch.float16}[kind]

    def numbers(raw):
        return torch.from_numpy(np.ascontiguousarray(raw)).view(dtype).double().numpy()

    fragments = arguments[0].view(np.uint8).reshape(4, 8, 4, 2, 2, 4)                       # warp g t k-half row-half byte
    a = numbers(fragments.transpose(0, 4, 1, 3, 2, 5).reshape(64, 32))
    if kind == "e4m3":
        tile = arguments[1].view(np.uint8).reshape(128, 8, 16)
        row = np.arange(128)
        b = numbers(np.stack([tile[row, (2 + chunk) ^ row % 8] for chunk in range(2)], 1).reshape(128, 32))
    else:
        b = numbers(arguments[1].view(np.uint8).reshape(16, 2, 8, 16).transpose(0, 2, 1, 3).reshape(128, 32))
    start = 0 if kind == "e4m3" else 1                                                      # wgmma_half always adds
    fresh = CASES[case]()
    got = emulate(fresh, order).reshape(-1, 4, 8, 4, 16, 2, 2)                              # group warp g t n8 half column
    got = got.transpose(0, 1, 5, 2, 4, 3, 6).reshape(-1, 64, 128)
    before = 0.25 * np.arange(64).reshape(1, 1, 1, 16, 1, 2, 2)
    before = np.broadcast_to(before.transpose(0, 1, 5, 2, 3, 4, 6), (4, 1, 2, 8, 16, 4, 2)).reshape(64, 128)
    want = 2 * a @ b.T + start * before
    for each in got:
        np.testing.assert_allclose(each, want, rtol=3e-7, atol=1e-5 * np.abs(want).max())


def test_store_transposed():
    x = transpose_case()[2][0]
    got = emulate("store_transposed")                                                       # [matrix, column][row]
    pairs = np.stack([x & 0xffff, x >> 16], -1).reshape(8, 4, 4, 2)                         # row, column / 2, matrix, % 2
    np.testing.assert_array_equal(got.reshape(4, 8, 8), pairs.transpose(2, 1, 3, 0).reshape(4, 8, 8))


def test_rotate_right():
    x = rotate_case()[2][0]
    np.testing.assert_array_equal(emulate("rotate_right"), x >> 4 | x << 28)


@pytest.mark.parametrize("order", [*ORDERS, *range(3, 8)])
def test_ring(order):
    x = ring_case()[2][0]
    per_thread = (x.reshape(7, 4, 64) * np.arange(1, 8).reshape(7, 1, 1)).sum((0, 1)).astype(np.uint32)
    np.testing.assert_array_equal(emulate("ring", order), per_thread[np.arange(64) ^ 33])


@pytest.mark.parametrize("order", [*ORDERS, *range(3, 8)])
def test_pair(order):
    x = pair_case()[2][0]
    sums = (x.reshape(3, 8, 32) * np.arange(1, 4).reshape(3, 1, 1)).sum((0, 1)).astype(np.uint32)
    np.testing.assert_array_equal(emulate("pair", order), np.stack([sums, sums + 1]))


@pytest.mark.parametrize("order", ORDERS)
def test_barrier_of(order):
    np.testing.assert_array_equal(emulate("barrier_of", order), 7 * (np.arange(128) ^ 63))


def test_sums_are_cut_where_asked():
    """14 bits between the largest product and another: the smaller is lost to a sum that keeps 13, and to no other."""
    parameters, body, arguments, *rest = wgmma_case("e4m3")
    a, tile = np.zeros((4, 8, 4, 4, 4), np.uint8), np.zeros((128, 8, 16), np.uint8)
    one, small = 0x38, 0x04                                                                 # 1, and 2^-7, a subnormal
    a[0, 0, 0, 0, :2] = one, small
    tile[0, 2, :2] = one, small
    case = (parameters, body.replace("px::wgmma_e4m3<true>(d, a, b + 2 * n);", ""), [a.view(np.uint32).reshape(-1),
            tile.view(np.uint32).reshape(-1), *arguments[2:]], *rest)
    assert emulate(case)[0, 0, 0, 0, 0] == 1 + 2.0**-14
    assert emulate(case, fp8_bits=14)[0, 0, 0, 0, 0] == 1 + 2.0**-14
    assert emulate(case, fp8_bits=13)[0, 0, 0, 0, 0] == 1


# Faults

@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("right, wrong, message", [
    ("px::mbarrier_wait(full + i % 2, i / 2 % 2);", "", "has not landed|nobody has written|race"),
    ("px::mbarrier_wait(empty + i % 2, i / 2 % 2 ^ 1);", "", "race|too often"),
    ("px::warp_barrier();", "", "race"),
    ("px::mbarrier_arrive(empty + i % 2);", ";", "stuck"),
    ("px::mbarrier_init(empty + i, 2)", "px::mbarrier_init(empty + i, 1)", "race|too often"),
    ("px::mbarrier_init(empty + i, 2)", "px::mbarrier_init(empty + i, 3)", "stuck"),
    ("px::mbarrier_fence();", "", "no mbarrier_fence has shown"),
    ("px::barrier();", "", "is no mbarrier|race: uses"),
    ("expect(full + i % 2, 1024)", "expect(full + i % 2, 1040)", "stuck|too often"),
    ("expect(full + i % 2, 1024)", "expect(full + i % 2, 512)", "has not landed|race|too often|ends with a bulk copy|stuck"),
    ("512, full", "528, full", "has not landed|across the end|race"),
    ("x + i * 256", "x + i * 256 + 1", "no multiple of 16"),
    ("x + i * 256", "x + 256 + i * 256", "across the end|outside every buffer|no global memory"),
    ("memory + i % 2 * 1024 + half", "(u8*)x + i % 2 * 1024 + half", "not 512 bytes of shared memory"),
    ("i / 2 % 2 ^ 1", "i / 2 % 2", "stuck"),
])
def test_ring_faults(right, wrong, message, order):
    parameters, body, arguments, *rest = ring_case()
    assert right in body
    with pytest.raises(KernelFault, match=message):
        emulate((parameters, body.replace(right, wrong), arguments, *rest), order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("right, wrong, message", [
    ("px::cluster_barrier();\n    u32 sum", "px::barrier();\n    u32 sum", "is no mbarrier|race: uses"),
    ("+ rank;\n    px::cluster_barrier();", "+ rank;", "that has ended|bulk copy on its way|$"),
    ("px::mbarrier_wait(free, i % 2 ^ 1);", "", "race|too often|has not landed"),
    ("if (thread < 2)", "if (thread < 1)", "stuck|too often"),
    ("px::bulk_copy_to(3,", "px::bulk_copy_to(1,", "stuck|too often"),
    ("px::bulk_copy_to(3,", "px::bulk_copy_to(7,", "no counterpart"),
])
def test_pair_faults(right, wrong, message, order):
    parameters, body, arguments, *rest = pair_case()
    assert right in body
    source = (parameters, body.replace(right, wrong), arguments, *rest)
    if message.endswith("$"):                                   # only some orders let one CTA end before the other arrives
        with pytest.raises(KernelFault, match=message.removesuffix("|$")):
            for seed in [*ORDERS, *range(20)]:
                emulate(source, seed)
    else:
        with pytest.raises(KernelFault, match=message):
            emulate(source, order)


@pytest.mark.parametrize("right, wrong, message", [
    ("px::wgmma_fence();", "", "without a wgmma_fence"),
    ("px::wgmma_commit();", "", "were not committed"),
    ("px::wgmma_wait(d, a, a);", "", "reads an accumulator of a wgmma on its way|ends with a wgmma"),
    ("px::wgmma_commit();", "px::wgmma_commit(); d[3] = 1;", "writes an accumulator of a wgmma on its way"),
    ("px::barrier();", "", "race|nobody has written"),
    ("px::wgmma_commit();", "px::wgmma_commit(); ((u32*)memory)[thread] = 0;", "race"),
    ("px::operand(memory, 16", "px::operand(memory + (thread % 2) * 1024, 16", "different operands"),
    ("px::operand(memory, 16", "px::operand(memory + (thread / 32 % 2) * 1024, 16", "multiply different things"),
    ("px::operand(memory, 16, 1024, true)", "px::operand(memory, 16, 16384, true)", "outside of it|nobody has written"),
    ("px::operand(memory, 16, 1024, true)", "px::operand(memory, 16, 1024, true) | 1ull << 63", "layout 3"),
    ("px::operand(memory,", "px::operand(y,", "no dynamic shared memory"),
])
def test_wgmma_faults(right, wrong, message):
    parameters, body, arguments, *rest = wgmma_case("e4m3")
    assert right in body
    with pytest.raises(KernelFault, match=message):
        emulate((parameters, body.replace(right, wrong), arguments, *rest))


@pytest.mark.parametrize("order", ORDERS)
def test_barrier_of_faults(order):
    parameters, body, arguments, *rest = groups_case()
    line = "px::barrier_of(1 + thread / 64, 64);"
    for wrong, message in (("", "race|nobody has written"), ("px::barrier_of(1 + thread / 64, 96);", "stuck"),
                           ("px::barrier_of(1 + thread / 64, 32);", "race|nobody has written"),
                           ("px::barrier_of(16, 64);", "Numbers are 1 to 15"), ("px::barrier_of(1, 48);", "come in warps")):
        with pytest.raises(KernelFault, match=message):
            emulate((parameters, body.replace(line, wrong), arguments, *rest), order)


def test_mbarrier_faults():
    start = SHARED + "u64* b = (u64*)memory; if (thread == 0) px::mbarrier_init(b, 1);\npx::barrier();\n"
    for body, message in (("px::mbarrier_arrive(b + 1);", "is no mbarrier"),
                          ("if (thread == 0) px::mbarrier_init(b, 1);", "already"),
                          ("px::mbarrier_wait(b, 0);", "stuck")):
        faulty(message, kernel(start + body), 1, 32, [words(1), words(1), 0], 1024)
