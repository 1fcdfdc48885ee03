"""What must hold of every variant with CUDA kernels, read off the registry, so of the next too; on a GPU, of those in torch.

Results element by element, bugs and barriers are in the file of each family.
"""

import importlib
import re
import threading
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from svdq_pack.svdq.kernels import build, check, ops, registry
from svdq_pack.svdq.kernels.build import CUDA
from svdq_pack.svdq.kernels.check import STEP
from svdq_pack.svdq.kernels.errors import BuildError
from svdq_pack.svdq.kernels.variant import FLOATS, HALVES, Target
from svdq_pack.tests.kernels.executors import TextLibrary, on
from svdq_pack.tests.kernels.families import mutations
from svdq_pack.tests.kernels.families.layers import BF16, ENDINGS, epilogue_of
from svdq_pack.tools import kernel_budgets

WITH_KERNELS = [variant for variant in registry.VARIANTS if isinstance(variant.library, build.Library)]
LIBRARIES = list(dict.fromkeys(variant.library for variant in WITH_KERNELS))
# One for those that differ in where they serve only: the one that runs on most GPUs.
DIFFERENT = list({(variant.prepare, variant.product): variant for variant in WITH_KERNELS}.values())
EACH = pytest.mark.parametrize("variant", DIFFERENT, ids=lambda variant: variant.name)
GPU_SLACK = 1e-4


# Every kernel has tests

def family(library):
    """The test file of a library."""
    name = f"test_{library.name}"
    who = " and ".join(variant.name for variant in WITH_KERNELS if variant.library is library)
    if not (Path(__file__).parent / f"{name}.py").is_file():
        pytest.fail(f"{who}: kernels without tests. Add tests/kernels/families/{name}.py: VARIANT, launch_every_kernel(), and "
                    "what test_w4a4_sm80.py has: results against float64, barriers taken out, planted bugs.")
    return importlib.import_module(f"svdq_pack.tests.kernels.families.{name}")


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_has_a_family(library):
    assert family(library).VARIANT.library is library


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_kernel_names(library, launches):
    """Those that the registry lists are those in the files, and the operators can ask for every one and no other."""
    for file, names in library.sources.items():
        defined = re.findall(rf"^{file.removesuffix('.cuh').upper()}\((\w+)", (CUDA / file).read_text(), re.M)
        assert sorted(defined) == sorted(names)
    family(library).launch_every_kernel()
    assert {launch.name for launch in launches} == set(library.kernels)


# Of the GPUs whose machine code is counted. What is not specific to a generation is the same on 12.1 as on 12.0.
CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1))
MACHINE_CODE = sorted({(file, library.arch(capability)) for capability in CAPABILITIES
                       for library in registry.libraries(Target("cuda", capability)) for file in library.sources
                       if library.specific or capability != (12, 1)})


def test_machine_code_has_a_budget():
    """On each GPU where the registry may choose it, and on no other."""
    budgeted = {(file, arch) for file in kernel_budgets.BUDGETS for arch in kernel_budgets.archs(file)}
    missing = [f"{file} for {arch}" for file, arch in MACHINE_CODE if (file, arch) not in budgeted]
    assert not missing, f"no budget in BUDGETS of tools/kernel_budgets.py for {', '.join(missing)}"
    assert budgeted == set(MACHINE_CODE), "BUDGETS of tools/kernel_budgets.py has what no variant lists"


# Results, by the figures of check.py

@EACH
@on(emulator=True, gpu=True)
def test_self_test_passes(executor, variant):
    assert check.small(variant, executor.device) == []
    for dtype in variant.dtypes:                    # and it was this variant's kernels that ran, all files in each dtype
        for file in variant.library.sources:
            assert any(name.startswith(f"{Path(file).stem}_{HALVES[dtype]}") for name in executor.launched)
    assert set(executor.launched) <= set(variant.library.kernels)


def random_layer(executor, variant, n, k, rank=32):
    """(weight in the file's order, bias) on the CPU, and (weight as the variant reads it, bias) where the kernels run."""
    weight, bias = check.random_weight(check.kinds_of(variant)[0], half(variant), n, k, rank)
    there = executor.put(weight)
    return weight, bias, there if variant.layout is None else variant.layout.pack(there), executor.put(bias)


def half(variant):
    """A dtype that it takes."""
    return variant.dtypes[0]


def rows(variant, tokens):
    return tokens if variant.max_rows is None else min(tokens, variant.max_rows)


@EACH
@pytest.mark.parametrize("accumulate", [False, True])
@on("tokens, rank", emulator=[(0, 32), (1, 0), (65, 144), (130, 48)], gpu=[(0, 32), (1, 0), (65, 144), (130, 48), (4608, 144)])
def test_linear(executor, variant, tokens, rank, accumulate):
    """No tokens, no branch, a branch too wide to fuse; x whose rows no kernel can load; out a part of a wider tensor."""
    tokens = rows(variant, tokens)
    weight, bias, packed, there = random_layer(executor, variant, 128, 256, rank)
    x = torch.randn(tokens, 257, generator=torch.Generator().manual_seed(1)).to(half(variant))
    wide = executor.put(torch.ones(tokens, 144, dtype=half(variant)))
    variant.run(executor.put(x)[:, 1:], packed, wide[:, 8:136], there, accumulate)
    want = accumulate + check.wanted(variant, x[:, 1:], weight, bias).double()
    wide = wide.cpu()
    assert (wide[:, 8:136].double() - want).norm() <= check.LIMIT * want.norm()
    assert (wide[:, :8] == 1).all() and (wide[:, 136:] == 1).all() and bool(executor.launched) == bool(tokens)


@EACH
@on("tokens, rank, ending", emulator=[(0, 16, "gelu"), (21, 144, "gated"), *((21, 16, ending) for ending in ENDINGS)],
    gpu=[(tokens, rank, ending) for tokens, rank in ((0, 16), (21, 144), (21, 16)) for ending in ENDINGS])
def test_epilogues(executor, variant, tokens, rank, ending):
    """Into one batch item's image rows of a joint buffer; the rest stays. A branch too wide to fuse comes before it."""
    tokens, n, accumulate = rows(variant, tokens), 384, ending.endswith("+=")
    weight, _, packed, bias = random_layer(executor, variant, n, 128, rank)
    x = executor.put(check.random_x(tokens, 128, half(variant)))
    epilogue = executor.put(epilogue_of(ending, tokens, n, half(variant)))
    joint = executor.put(torch.ones(2, tokens + 5, n, dtype=half(variant)))
    out, plain = joint[1, 5:], executor.put(torch.ones(tokens, n, dtype=half(variant)))
    variant.run(x, packed, plain, bias, accumulate)
    variant.run(x, packed, out, bias, accumulate, epilogue)
    want = epilogue.of(plain)
    assert (out.float() - want).norm() <= 4 * STEP[half(variant)] * want.norm()
    assert (joint[0] == 1).all() and (joint[1, :5] == 1).all() and bool(executor.launched) == bool(tokens)


@EACH
@on(emulator=True, gpu=True)
def test_residual_may_be_out(executor, variant):
    """Within a wider tensor, read before it is written."""
    tokens, n = rows(variant, 21), 384
    _, _, packed, bias = random_layer(executor, variant, n, 128, 16)
    x = executor.put(check.random_x(tokens, 128, half(variant)))
    wide = executor.put(torch.randn(tokens, n + 8, generator=torch.Generator().manual_seed(2)).to(half(variant)))
    kept, out, gated = wide.clone(), wide[:, :n], executor.put(epilogue_of("gated", tokens, n, half(variant)))
    want = torch.zeros_like(kept[:, :n])
    for residual, to in ((kept[:, :n].contiguous(), want), (out, out)):
        variant.run(x, packed, to, bias, False, type(gated)(residual, gated.gate))
    assert torch.equal(out, want) and torch.equal(wide[:, n:], kept[:, n:])


# Among other operators, in graphs, on streams

def callee(executor, variant, device=None, n=384, k=512, tokens=65):
    """f(x) with the variant's operators and ordinary torch around them, and its x."""
    _, _, packed, bias = random_layer(executor, variant, n, k)
    packed, bias = (check.moved(packed, device), bias.to(device)) if device else (packed, bias)

    def f(x):
        out = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
        x = x * 2                   # new memory: awq_gemv's `prepare` only aligns, by addresses that torch.compile cannot see
        variant.product(x if packed.precision == "awq" else variant.prepare(x, packed), packed, out, bias, False)
        return out + 1
    return f, check.random_x(rows(variant, tokens), k, half(variant)).to(device or executor.device)


@EACH
@on(emulator=True)
def test_traces_as_its_operators(executor, variant):
    f, x = callee(executor, variant, k=128)
    graph = make_fx(f, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    called = [str(node.target) for node in graph.graph.nodes if "svdq" in str(node.target)]
    assert called == [f"svdq.{Path(file).stem}.default" for file in variant.library.sources
                      if not file.startswith(("adaln", "mlp"))]


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@on(gpu=True)
def test_compiles_without_a_break(executor, mode):
    """All that this GPU can run, in one function."""
    target = executor.target
    callees = [callee(executor, variant, k=128) for variant in DIFFERENT if target.capability is None
               or variant.device[1] <= target.capability <= variant.device[2]]
    torch._dynamo.reset()

    def f(*xs):
        return [g(x) for (g, _), x in zip(callees, xs, strict=True)]

    xs = [x for _, x in callees]
    want, compiled = f(*xs), torch.compile(f, fullgraph=True, **executor.compiler(mode))
    for _ in range(3):                  # the third of "reduce-overhead" replays a graph
        assert all(map(torch.equal, compiled(*xs), want))


@EACH
@on("n, k, tokens, runs", gpu=[(3072, 3072, 257, 100)], rehearsal=[(128, 128, 20, 2)])
def test_runs_are_identical(executor, variant, n, k, tokens, runs):
    _, _, packed, bias = random_layer(executor, variant, n, k)
    x = executor.put(check.random_x(rows(variant, tokens), k, half(variant)))
    results = []
    for _ in range(runs):
        prepared, out = variant.prepare(x, packed), torch.empty(len(x), n, dtype=x.dtype, device=x.device)
        variant.product(prepared, packed, out, bias, False)
        results.append((*(prepared if isinstance(prepared, tuple) else (prepared,)), out))
        assert all(map(torch.equal, results[-1], results[0]))


@EACH
@on(gpu=True)
def test_streams_and_threads(executor, variant):
    """The current stream orders the kernels behind what made x; a fresh thread has no CUDA context yet."""
    f, there = callee(executor, variant)
    x, want, stream, got = there.cpu(), f(there), torch.cuda.Stream(), []
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        out = f(x.pin_memory().to(executor.device, non_blocking=True))
    stream.synchronize()
    assert torch.equal(out, want)
    thread = threading.Thread(target=lambda: got.append(f(x.to(executor.device))))
    thread.start()
    thread.join()
    assert torch.equal(got[0], want)


@EACH
@on(gpu=True)
def test_graph_capture(executor, variant):
    f, x = callee(executor, variant)
    other = x.flip(0)
    want = f(x), f(other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = f(x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want[0])
    x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want[1]) and not torch.equal(*want)


@pytest.mark.parametrize("variant", {variant.library: variant for variant in reversed(DIFFERENT)}.values(),
                         ids=lambda variant: variant.name)
@on("route", gpu=("cpp_extension", "nvrtc"))
def test_both_routes(executor, variant, route, monkeypatch, tmp_path):
    """Each by itself, from an empty cache, and to the same bits. What a machine lacks is the reason to skip."""
    f, x = callee(executor, variant)
    want, library = f(x), variant.library
    used = {file: tuple(name for name in kernels if name in executor.launched) for file, kernels in library.sources.items()}
    part = TextLibrary(library.name, {file: names for file, names in used.items() if names}, library.specific,
                       {file: mutations.only(file, f"(?:{'|'.join(names)})") for file, names in used.items() if names})
    make = {"cpp_extension": build.build_extension, "nvrtc": build.build_cubins}[route]
    arch = library.arch(executor.target.capability)
    try:
        path = make(part, arch, tmp_path)
    except BuildError as error:
        pytest.skip(str(error))
    kernels = build.Built(part, arch, route, path, 0.0, ()).load(x.device.index)
    monkeypatch.setitem(build._kernels, (library, x.device.index), kernels)
    assert torch.equal(f(x), want)


@EACH
@on(gpu=True)
def test_second_gpu(executor, variant):
    if len(executor.devices) < 2:
        pytest.skip("no second GPU")
    (f, x), (g, y) = (callee(executor, variant, device) for device in executor.devices[:2])
    with torch.cuda.device(0):
        assert torch.equal(g(y).cpu(), f(x).cpu())


# Through the dispatch, as a model calls it

@pytest.mark.parametrize("variant", WITH_KERNELS, ids=lambda variant: variant.name)
@on(gpu=True)
def test_serves(executor, variant):
    for kind in check.kinds_of(variant):
        dtype = half(variant)
        weight, bias = check.random_weight(kind, dtype, 384, 512)
        x = check.random_x(rows(variant, 33), 512, dtype, weight.unsigned)
        with registry.using(variant.name):
            packed = registry.pack(executor.put(weight), dtype, variant.act_bits)
            plan, out = registry.plan(packed, executor.target, dtype, variant.act_bits), executor.put(x.new_zeros(len(x), 384))
            ops.linear(executor.put(x), packed, out, executor.put(bias), act_bits=variant.act_bits)
        assert plan.for_rows(len(x)).variant is variant and not plan.unpack
        checks = check.check_linear(variant, x, weight, bias, out.cpu())
        assert all(each.passed for each in checks), checks


# Those in plain torch

@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", check.KINDS)
@on("name", gpu=("weight_only", "reference"))
def test_torch_on_gpu_equals_cpu(executor, name, kind, dtype):
    weight, _ = check.random_weight(kind, BF16, 384, 512)
    x = check.random_x(17, 512, dtype, weight.unsigned)
    there, (cpu, first, again) = executor.put(weight), (
        torch.zeros(17, 384, dtype=dtype, device=device) for device in ("cpu", executor.device, executor.device))
    with registry.using(name):
        ops.linear(x, weight, cpu)
        ops.linear(executor.put(x), there, first)
        ops.linear(executor.put(x), there, again)
    assert torch.equal(first, again)
    # 16 bit: both round, in another order; the reference may flip a code of one activation
    assert check.relative(first.cpu(), cpu) < {torch.float32: 1e-5 if name == "weight_only" else 5e-3}.get(dtype, 1e-2)
