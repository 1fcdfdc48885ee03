"""Constants of the product stand in one place. Those that C++ has to repeat are tied to it here, and so are those that say the
same number with another meaning."""

import ast
import collections
import ctypes
import operator
import re
from pathlib import Path

import pytest
import torch

from svdq_pack.svdq import bench, cli
from svdq_pack.svdq.kernels import adaln, build, check, epilogues, launch, layout, reference, registry, w4a4
from svdq_pack.svdq.kernels.prologues import Modulated
from svdq_pack.svdq.kernels.variant import HALVES
from svdq_pack.svdq.kernels.variants import awq_gemv, cpu, w4a8_int8, w4a8_sm90
from svdq_pack.svdq.kernels.weights import example
from svdq_pack.svdq.quantize import rounding
from svdq_pack.tests.kernels import toolchain
from svdq_pack.tests.kernels.families.mutations import whole

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = tuple(dict.fromkeys(variant.library for variant in registry.VARIANTS
                                if isinstance(variant.library, build.Library)))
FILES = sorted(file for library in LIBRARIES for file in library.sources)
BF16 = torch.bfloat16
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.floordiv}


def text_of(file):
    """Of a .cuh file with what it shares with others."""
    return build.CPU.joinpath(file).read_text() if file.endswith("pp") else whole(file)


def value(text, names):
    """Of a constant's expression: numbers, names, and + - * / of whole numbers between them."""
    def of(node):
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](of(node.left), of(node.right))
        return names[node.id] if isinstance(node, ast.Name) else ast.literal_eval(node)

    return of(ast.parse(text.strip(), mode="eval").body)


def constants(file):
    """{name: value} of the constexpr lines of a .cuh file's namespace."""
    found = {}
    for line in re.findall(r"^(?:\[\[maybe_unused\]\] )?constexpr (?:int|float|u32) (.*?);", text_of(file), re.M):
        for name, text in re.findall(r"(\w+) = ([^,]+)", line):
            found[name] = value(re.sub(r"(?<=[\d.])f\b", "", text), found)
    return found


def shells(file):
    """[(name of a kernel, its parameters)]: the lines that stamp kernels out."""
    lines = re.findall(r"^[A-Z]\w+\((\w+), (.*)\)$", text_of(file), re.M)
    return [(name, parameters.split(", ")) for name, parameters in lines]


def enum(file, name):
    return re.search(rf"enum {name} (?:: \w+ )?{{ (.*?) }}", text_of(file))[1].lower().split(", ")


def struct(file, name):
    """[(name, type)] of a struct's fields, as C++ has them: "int64_t", "void*"."""
    body = re.sub(r"//.*", "", re.search(rf"struct {name} {{(.*?)\n}};", text_of(file), re.S)[1])
    lines = [re.fullmatch(r"(?:const )?([\w]+\*?) ([\w, ]+)", line.strip()) for line in body.split(";") if line.strip()]
    return [(field, kind) for kind, fields in (line.groups() for line in lines) for field in fields.split(", ")]


def product_files():
    return [path for folder in ("svdq", "nodes") for path in sorted((ROOT / folder).rglob("*.py"))]


def assigned():
    """(file, name, source text of the value) of every constant of a module."""
    for path in product_files():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    pairs = [(target, node.value)]
                    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                        pairs = zip(target.elts, node.value.elts)
                    for name, value in pairs:
                        if isinstance(name, ast.Name) and name.id.isupper():
                            yield str(path.relative_to(ROOT)), name.id, ast.unparse(value)


# Once in Python

# name -> why two files may have a constant of this name and value
APART = {"KEY": "of metadata in a file; of a wrapper around a model", "VERSION": "of two things",
         "MOST_RANK": "of a LoRA that is factored; of a quantised layer's branch", "SUFFIX": "of two kinds of files",
         "RANKS": "in the names of libraries' kernels",
         "FORMAT": "of two kinds of files", "FLOATS": "of x; of weights that are quantised"}


def test_no_constant_stands_twice():
    places = collections.defaultdict(list)
    for path, name, value in assigned():
        places[name, value].append(path)
    twice = {name: paths for (name, _), paths in places.items() if len(paths) > 1}
    assert twice.keys() <= APART.keys(), {name: paths for name, paths in twice.items() if name not in APART}
    assert len(places) > 100


@pytest.mark.parametrize("value", [reference.SHIFT, reference.E4M3_MAX])
def test_numbers_of_the_format_stand_in_one_file(value):
    """Where another file needs one, it takes it from there."""
    found = {str(path.relative_to(ROOT)) for path in product_files() for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.value == value}
    assert found == {"svdq/kernels/reference.py"}


def test_every_head_is_the_same():
    heads = {(path, value) for path, name, value in assigned() if re.fullmatch(r"HEAD(_DIM)?", name) and value.isdigit()}
    assert ("svdq/kernels/reference.py", str(reference.HEAD)) in heads
    assert {value for _, value in heads} == {str(reference.HEAD)}


# In Python and C++

SHIFTING = ("quant_down.cuh", "quant_down_normal.cuh", "quant_down_sm75.cuh", "quant_fp8.cuh")


# which have the code of SHIFTING by including it
ADALN = ("adaln_int4.cuh", "adaln_int4_normal.cuh", "adaln_int4_sm75.cuh", "adaln_fp8.cuh", "mlp_w4a4.cuh",
         "mlp_w4a4_normal.cuh", "mlp_w4a4_sm75.cuh")


@pytest.mark.parametrize("file", [*SHIFTING, *ADALN])
def test_shift(file):
    numbers = re.findall(r"\b0\.17\d*", text_of(file))
    assert len(numbers) >= 1 + (file in SHIFTING) and {float(number) for number in numbers} == {reference.SHIFT}    # says, does
    assert not [other for other in FILES if other not in SHIFTING + ADALN and "0.17" in text_of(other)]


def test_e4m3():
    assert reference.E4M3_MAX == torch.finfo(torch.float8_e4m3fn).max
    assert re.findall(r"1\.0f / (4\d\d\.0)f", text_of("quant_fp8.cuh")) == [str(reference.E4M3_MAX)]
    values = torch.arange(16, dtype=torch.uint8).view(torch.float8_e4m3fn).float()      # gemm_fp8 reads codes as such bytes
    assert torch.equal(values * w4a8_sm90.SCALE, torch.arange(16.0))
    assert f"fp32 * {w4a8_sm90.SCALE:.0f}:" in text_of("gemm_fp8.cuh")


def test_head():
    assert constants("gemm_fp8.cuh")["HEAD"] == reference.HEAD
    out, rotation = torch.zeros(2, 3 * reference.HEAD), torch.zeros(2, reference.HEAD // 2, 2, 2)
    norm = torch.ones(reference.HEAD)
    assert epilogues.QKV(norm, norm, rotation).problem(out, False) is None


def test_group():
    """One MMA step of the int4 kernels spans a group; Hopper's stages hold two."""
    group = layout.GROUP["int4"]
    for file in (*SHIFTING, "gemm_w4a4.cuh", "gemm_w4a4_normal.cuh", "gemm_w4a4_sm75.cuh", "gemm_fp8.cuh", "gemm_int8.cuh"):
        assert set(re.findall(r"g: (\d+) consecutive k", text_of(file))) == {str(group)}, file
    assert constants("gemm_fp8.cuh")["DEPTH"] == constants("quant_fp8.cuh")["DEPTH"] == 2 * group == w4a8_sm90.TILE_K
    x = torch.zeros(3, 256, dtype=BF16)
    assert w4a4.quant_down_outputs(x, 16)[1].shape[1] == 256 // group
    assert w4a8_sm90.quant_fp8_outputs(x, 16, True)[1].shape[1:3].numel() == 256 // group
    assert example("int4").wscales.shape[0] == layout.TILE_N // group


def test_group_of_modulations():
    assert layout.TILE_N // example("awq").wscales.shape[0] == rounding.AWQ_GROUP
    assert set(re.findall(r"K % (\d+) == 0", text_of("awq_gemv.cuh"))) == {str(rounding.AWQ_GROUP)}
    assert set(re.findall(r"\[K/(\d+)[,\]]", text_of("awq_gemv.cuh"))) == {str(rounding.AWQ_GROUP)}


def test_tiles():
    assert {constants(file)["TILE"] for file in ("gemm_w4a4.cuh", "gemm_w4a4_normal.cuh", "gemm_w4a4_sm75.cuh",
                                                 "gemm_int8.cuh")} == {layout.TILE_N}
    fp8 = constants("gemm_fp8.cuh")
    assert (fp8["FEATURES"], fp8["DEPTH"]) == (w4a8_sm90.TILE_N, w4a8_sm90.TILE_K) and w4a8_sm90.TILE_N % layout.TILE_N == 0
    nibbles, bytes_ = w4a8_sm90.STAGED
    assert 2 * nibbles == bytes_ == w4a8_sm90.TILE_N * w4a8_sm90.TILE_K


@pytest.mark.parametrize("file", SHIFTING)
def test_largest_rank(file):
    """In the names of kernels, in tiles of RANK_ALIGN, and what the operators let pass."""
    ranks = {int(name.rpartition("_r")[2]): int(parameters[-1]) for name, parameters in shells(file)}
    assert all(rank == layout.RANK_ALIGN * tiles for rank, tiles in ranks.items())
    assert max(ranks) == launch.MAX_RANK and {f"r{rank}" for rank in ranks} == set(w4a4.RANKS.values())
    assert w4a8_sm90.RANKS == w4a8_int8.RANKS == w4a4.RANKS
    launch.check_rank("test", launch.MAX_RANK)
    assert all(variant.max_rank == launch.MAX_RANK for variant in registry.VARIANTS
               if isinstance(variant.library, build.Library) and variant.decode)


def test_largest_rank_of_bench(monkeypatch, capsys):
    monkeypatch.setattr(bench, "missing", lambda: "no GPU")
    assert cli.main(["bench", "--rank", str(launch.MAX_RANK)]) == 2 and "no GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["bench", "--rank", str(launch.MAX_RANK + layout.RANK_ALIGN)])


def test_modulations_of_one_launch():
    """The structs that hold them, 8 bytes a field, and x, batch and K, fit into the 4 KiB of arguments that every GPU takes."""
    assert constants("awq_gemv.cuh")["MAX_LAYERS"] == awq_gemv.MAX_LAYERS
    fields = re.findall(r"(\w+);", re.search(r"struct Layer {(.*?)};", text_of("awq_gemv.cuh"), re.S)[1])
    assert awq_gemv.MAX_LAYERS * 8 * len(fields) + 16 <= 4096
    assert max(int(parameters[-1]) for _, parameters in shells("awq_gemv.cuh")) == awq_gemv.MAX_BATCH
    assert [variant.max_rows for variant in awq_gemv.VARIANTS] == [awq_gemv.MAX_BATCH]


def test_shared_memory():
    """STAGED against sizeof(Shared<BYTES>), field by field."""
    text, c = text_of("gemm_fp8.cuh"), constants("gemm_fp8.cuh")
    stage = {wide: int(size) for wide, size in re.findall(r"sizeof\(Stage<(\w+)>\) == (\d+)", text)}
    stages = dict(zip(("true", "false"), map(int, re.search(r"STAGES = BYTES \? (\d+) : (\d+);", text).groups())))
    out = c["CONSUMERS"] * max(2 * c["TOKENS"] * c["ROW"], 4 * c["TOKEN_BLOCK"] * c["WIDE"])
    for wide, size in zip(("false", "true"), w4a8_sm90.STAGED.values()):
        assert stages[wide] * (stage[wide] + 2 * 8) + out == size <= 227 << 10


def test_kinds_of_epilogues():
    assert list(epilogues.KINDS) == enum("epilogue.cuh", "Kind")
    operands = {kind.__name__.lower(): kind.__dataclass_fields__ for kind in epilogues.ALL}
    assert operands.keys() == epilogues.KINDS.keys() - {"store"}
    for name, fields in operands.items():
        tensors = [field for field, about in fields.items() if about.type is torch.Tensor]
        assert tuple(tensors) == epilogues.KINDS[name]
    for file in ("gemm_fp8.cuh", "quant_fp8.cuh", "adaln_fp8.cuh"):
        assert enum(file, "Mode") == list(w4a8_sm90.MODES.values())


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("adaln")])
def test_widest_row(file):
    """What 16 warps hold."""
    numbers = constants(file)
    assert numbers["WARPS"] * numbers["MOST"] * layout.GROUP["int4"] == adaln.WIDEST
    assert set(re.findall(r"K <= (\d+)", text_of(file))) == {str(adaln.WIDEST)}


@pytest.fixture(scope="module")
def launched():
    """{name of a kernel: threads of its launch} for one launch of each file's first forms."""
    blocks = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "launch", lambda library, like, name, grid, block, *rest: blocks.setdefault(name, block))
        for variant in registry.VARIANTS:
            if isinstance(variant.library, build.Library):
                kind = check.kinds_of(variant)[0]
                dtype = variant.dtypes[0]
                weight, bias = check.random_weight(kind, dtype, 128, 128, 16)
                weight = weight if variant.layout is None else variant.layout.pack(weight)
                variant.run(torch.zeros(3, 128, dtype=dtype), weight, torch.zeros(3, 128, dtype=dtype), bias)
                x = torch.zeros(3, 128, dtype=dtype)
                variant.prepared([(Modulated(x, x, x), weight)])
                if variant.feeds is not None:
                    variant.feeds(variant.prepare(x, weight), weight, bias, weight, 3)
    return blocks


@pytest.mark.parametrize("file", FILES)
def test_threads(file, launched):
    bounds, = set(re.findall(r"__launch_bounds__\(([^,)]*)", text_of(file)))
    threads = value(re.sub(r"\w+::", "", bounds), constants(file))
    blocks = {block for name, block in launched.items() if name in dict(shells(file))}
    assert blocks == {threads}


# In Python and the C++ of a CPU

@pytest.mark.parametrize("job", [cpu.Quantise, cpu.Product, cpu.Dequantise, cpu.Gemv, cpu.Factor], ids=lambda job: job.__name__)
def test_jobs_of_a_cpu(job):
    """Field by field, in this order, 8 bytes each."""
    twins = {"int64_t": ctypes.c_int64, "Kind": ctypes.c_int64, "Precision": ctypes.c_int64, "double": ctypes.c_double,
             "Dequantise": cpu.Dequantise}
    fields = struct("numbers.hpp", job.__name__)
    assert [(name, twins.get(kind, ctypes.c_void_p)) for name, kind in fields] == job._fields_
    assert {kind for _, kind in fields} - twins.keys() <= {"void*", "int8_t*", "uint8_t*", "int32_t*", "float*"}
    assert ctypes.sizeof(job) == sum(ctypes.sizeof(kind) for _, kind in job._fields_)
    assert job is cpu.Gemv or ctypes.sizeof(job) == 8 * len(fields)


def test_jobs_of_a_cpu_are_all_here():
    structs = re.findall(r"^struct (\w+)", text_of("numbers.hpp"), re.M)
    assert [getattr(cpu, name).__name__ for name in structs] == structs and len(structs) == 5
    functions = dict(re.findall(r"^API int svdq_(\w+)\(int body, const (\w+)\* job\)", text_of("cpu.cpp"), re.M))
    assert sorted(functions.values()) == sorted(structs) and all(name.capitalize() == job for name, job in functions.items())
    called = re.findall(r"\bcall\(\"(\w+)\",", Path(cpu.__file__).read_text())
    assert set(called) == functions.keys()


def test_enums_of_a_cpu():
    kinds, shorts = enum("numbers.hpp", "Kind"), {torch.float32: "fp32"} | HALVES
    assert {shorts[dtype]: number for dtype, number in cpu.KINDS.items()} == {
        name: number for number, name in enumerate(kinds) if name != "e4m3"}       # which Python never passes
    assert enum("numbers.hpp", "Precision") == list(cpu.PRECISIONS)
    assert list(cpu.PRECISIONS.values()) == [*range(len(cpu.PRECISIONS))]


def static(file, name):
    """The value of a `static const` of a file of cpu/."""
    return re.search(rf"^static const \w+ [^;]*?\b{name}(?:\[\d+\])? = ([^;{{,]+|{{[^}}]*}})[,;]", text_of(file), re.M)[1]


def test_numbers_of_a_cpu():
    assert float(static("numbers.hpp", "SHIFT").rstrip("f")) == reference.SHIFT
    assert [file.name for file in build.CPU.iterdir() if "0.17" in file.read_text()] == ["numbers.hpp"]
    assert float(static("numbers.hpp", "LARGEST_FP16").rstrip("f")) == torch.finfo(torch.float16).max
    assert (int(static("order.hpp", "GROUP")), int(static("order.hpp", "PANEL"))) == (layout.GROUP["int4"], layout.RANK_ALIGN)
    assert int(static("order.hpp", "BLOCK")) == layout.GROUP["int4"] * layout.RANK_ALIGN // 2
    assert tuple(map(int, static("order.hpp", "CODE_ORDER").strip("{}").split(","))) == cpu.CODE_ORDER
    assert int(static("exact.hpp", "ROWS")) == cpu.FEW
    assert re.findall(r"/ (\d+\.0)f;", text_of("w4a8.hpp")) == [str(float(torch.iinfo(torch.int8).max))]


@toolchain.needs_nvcc
def test_numbers_of_the_driver():
    """What build.py passes by number, as cuda.h has it."""
    home = next(Path(line.partition("=")[2]).parent for line in toolchain._dryrun().splitlines()
                if line.startswith("#$ _HERE_="))
    header = next(iter(home.rglob("include/cuda.h")), None)
    if header is None:
        pytest.skip("no cuda.h beside nvcc")
    text = header.read_text(errors="replace")
    numbers = [int(re.search(rf"\b{name}\s*=\s*(\d+)", text)[1]) for name in (
        "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES", "CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION")]
    assert numbers == [build.MAX_DYNAMIC_SHARED, build.CLUSTER_DIMENSION]
