"""4-bit linears on a CPU, by C++ that chooses among instruction sets as it runs (cpu/cpu.cpp). It reads the file's order.

    w4a8_cpu    INT4: activations in 8 bits, one scale per token and 64 channels, low-rank branch in the same two functions
    exact_cpu   INT4, NVFP4, AWQ: no activation rounded. Up to 8 rows are multiplied as the weight is read; for more, parts of
                it are written as numbers, for the library's product

Products of exact_cpu are in fp32, also of 16-bit x, unless the CPU multiplies bf16 itself: elsewhere torch's 16-bit product is
several times slower than its fp32 one.

Test: tests/kernels/families/test_cpu.py
"""

import ctypes
import functools

import torch

from .. import build, launch
from ..build import CPULibrary
from ..errors import BuildError, ShapeError
from ..layout import GROUP
from ..rows import is_aligned
from ..variant import FLOATS, HALVES, Variant, cpu_multiplies
from ..weights import AWQWeight, W4A4Weight, scratch

LIBRARY = CPULibrary("cpu", "cpu.cpp")
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}        # numbers.hpp: Kind
PRECISIONS = {"int4": 0, "nvfp4": 1, "awq": 2}                         # numbers.hpp: Precision
CODE_ORDER = 0, 2, 4, 6, 1, 3, 5, 7                                     # order.hpp
FEW = 8                                                                 # rows that gemv takes: exact.hpp, ROWS
# Numbers of a weight that are written before they are multiplied: few, which caches hold, but each time x is read, too
AT_LEAST, PER_TOKEN, AT_MOST = 3 << 19, 1 << 13, 24 << 20


# ---- the jobs of numbers.hpp

def _job(name, **kinds):
    """A struct of numbers.hpp: 8 bytes for each field."""
    return type(name, (ctypes.Structure,), {"_fields_": list(kinds.items())})


_NUMBER, _POINTER = ctypes.c_int64, ctypes.c_void_p
Quantise = _job("Quantise", threads=_NUMBER, tokens=_NUMBER, k=_NUMBER, rank=_NUMBER, x_kind=_NUMBER, x=_POINTER,
                x_stride=_NUMBER, half=_NUMBER, smooth=_POINTER, down=_POINTER, shifted=_NUMBER, codes=_POINTER,
                scales=_POINTER, sums=_POINTER, low=_POINTER)
Product = _job("Product", threads=_NUMBER, tokens=_NUMBER, n=_NUMBER, k=_NUMBER, rank=_NUMBER, codes=_POINTER, scales=_POINTER,
               sums=_POINTER, low=_POINTER, qweight=_POINTER, half=_NUMBER, wscales=_POINTER, up=_POINTER, kind=_NUMBER,
               bias=_POINTER, out=_POINTER, out_stride=_NUMBER, accumulate=_NUMBER)
Dequantise = _job("Dequantise", threads=_NUMBER, n=_NUMBER, k=_NUMBER, start=_NUMBER, stop=_NUMBER, precision=_NUMBER,
                  qweight=_POINTER, half=_NUMBER, wscales=_POINTER, wzeros=_POINTER, wcscales=_POINTER, wtscale=ctypes.c_double,
                  kind=_NUMBER, out=_POINTER)
Gemv = _job("Gemv", weight=Dequantise, tokens=_NUMBER, x=_POINTER, out=_POINTER)
Factor = _job("Factor", threads=_NUMBER, rows=_NUMBER, rank=_NUMBER, half=_NUMBER, factor=_POINTER, out=_POINTER,
              row_step=_NUMBER, rank_step=_NUMBER, stride=_NUMBER)


def call(function, job, body=None):
    """Run a function of the library on this CPU. Raises BuildError where there is no library, MemoryError."""
    kernels = build.kernels_for(LIBRARY, None)
    if kernels is None:
        raise BuildError(f"{function}: there are no kernels {LIBRARY.name} for this CPU; the log says why.")
    kernels.call(function, job, body)


def _operator(name, **settings):
    """torch.library.custom_op for whoever traces; a real tensor goes straight to the function, as the dispatcher takes longer
    than a small layer. Raises RuntimeError for an x that wants gradients, of which there are none."""
    def wrap(function):
        operator = torch.library.custom_op(name, **settings)(function)

        def run(x, *arguments):
            if torch.compiler.is_compiling() or type(x) is not torch.Tensor:
                return operator(x, *arguments)
            if x.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(f"{name}: x wants gradients, and this kernel has none. Use the layer, which has them, or "
                                   "torch.no_grad().")
            return function(x, *arguments)

        run.register_fake = operator.register_fake
        run.operator = operator
        return functools.update_wrapper(run, function)
    return wrap


def _at(tensor):
    return None if tensor is None else tensor.data_ptr()


def _check(who, name, rows, k, **operands):
    """rows [tokens, K] on the CPU with last stride 1, operands contiguous there: name -> (tensor or None, shape, dtype)."""
    if (rows.device.type != "cpu" or rows.ndim != 2 or rows.dtype not in KINDS or rows.shape[1] != k
            or not is_aligned(rows, rows.element_size())):
        raise ShapeError(f"{who}: {name} is {list(rows.shape)} {rows.dtype} on {rows.device}, strides {rows.stride()}. Needs "
                         f"[tokens, {k}] fp32, bf16 or fp16 on the CPU with last stride 1; call .contiguous().")
    launch.check(who, rows, 1, **operands)


# ---- activations in 8 bits

@_operator("svdq::quantise_cpu", mutates_args=())
def quantise_cpu(x: torch.Tensor, smooth: torch.Tensor, proj_down: torch.Tensor | None,
                 unsigned: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise activations to int8, one scale per token and 64 channels; low-rank down beside it.

    x          [M, K] fp32 | bf16 | fp16, last stride 1, K % 64 == 0
    smooth     [K] bf16 | fp16       proj_down  [K, R] of its dtype or None, R % 16 == 0       both packed (layout.py)

    codes      [M, K] int8, of every 8 those of channels 0 2 4 6 1 3 5 7       scales  [M, K/64] fp32
    sums       [M, K/64] int32, -8 times the sum of a group's codes            low     [M, R] fp32

    Spec: reference.quant_down, precision int8_group. Source: SVDQuant, arXiv 2411.05007; 8 bits per group are our own.
    """
    k, rank = smooth.shape[0], 0 if proj_down is None else proj_down.shape[-1]
    _check("quantise_cpu", "x", x, k, smooth=(smooth, (k,), smooth.dtype), proj_down=(proj_down, (k, rank), smooth.dtype))
    if k % GROUP["int4"] or rank % 16 or smooth.dtype not in HALVES:
        raise ShapeError(f"quantise_cpu: K is {k}, the rank {rank}, smooth {smooth.dtype}. Needs K % 64 == 0, a rank that is a "
                         "multiple of 16, smooth in bf16 or fp16.")
    outputs = codes, scales, sums, low = quantised_outputs(x, rank)
    call("quantise", Quantise(torch.get_num_threads(), len(x), k, rank, KINDS[x.dtype], _at(x), x.stride(0),
                              KINDS[smooth.dtype], _at(smooth), _at(proj_down), unsigned, *map(_at, outputs)))
    return outputs


@quantise_cpu.register_fake
def _(x, smooth, proj_down, unsigned):
    return quantised_outputs(x, 0 if proj_down is None else proj_down.shape[-1])


def quantised_outputs(x, rank):
    tokens, k = x.shape
    groups = k // GROUP["int4"]
    return (x.new_empty(tokens, k, dtype=torch.int8), x.new_empty(tokens, groups, dtype=torch.float32),
            x.new_empty(tokens, groups, dtype=torch.int32), x.new_empty(tokens, rank, dtype=torch.float32))


@_operator("svdq::product_cpu", mutates_args=("out",))
def product_cpu(codes: torch.Tensor, scales: torch.Tensor, sums: torch.Tensor, low: torch.Tensor, qweight: torch.Tensor,
                wscales: torch.Tensor, proj_up: torch.Tensor | None, bias: torch.Tensor | None, out: torch.Tensor,
                accumulate: bool) -> None:
    """out = codes * qweight + low * proj_up + bias, or out += that.

    codes, scales, sums, low   from quantise_cpu       qweight [N, K/2] int8, wscales [K/64, N], proj_up [N, R]: packed
    bias [N] out.dtype or None          out [M, N] fp32 | bf16 | fp16, N % 128 == 0, last stride 1

    Spec: reference.gemm_w4a4. Source: SVDQuant, arXiv 2411.05007.
    """
    (tokens, k), n, rank, half = codes.shape, qweight.shape[0], low.shape[1], wscales.dtype
    groups = k // GROUP["int4"]
    _check("product_cpu", "out", out, n, codes=(codes, (tokens, k), torch.int8),
           scales=(scales, (tokens, groups), torch.float32), sums=(sums, (tokens, groups), torch.int32),
           low=(low, (tokens, rank), torch.float32), qweight=(qweight, (n, k // 2), torch.int8),
           wscales=(wscales, (groups, n), half), proj_up=(proj_up, (n, rank), half), bias=(bias, (n,), out.dtype))
    if n % 128 or half not in HALVES or len(out) != tokens or rank and proj_up is None:
        raise ShapeError(f"product_cpu: out is {list(out.shape)}, codes {list(codes.shape)}, wscales {half}, the rank {rank}. "
                         "Needs N % 128 == 0, as many rows of out as of codes, scales in bf16 or fp16, and proj_up for a rank.")
    call("product", Product(torch.get_num_threads(), tokens, n, k, rank, _at(codes), _at(scales), _at(sums), _at(low),
                            _at(qweight), KINDS[half], _at(wscales), _at(proj_up), KINDS[out.dtype], _at(bias), _at(out),
                            out.stride(0), accumulate))


def quantised(x, weight):
    """(codes, scales, sums, low), see quantise_cpu."""
    return quantise_cpu(x, weight.smooth, weight.proj_down, weight.unsigned)


def product(prepared, weight, out, bias, accumulate, epilogue=None):
    product_cpu(*prepared, weight.qweight, weight.wscales, weight.proj_up, None if bias is None else bias.contiguous(), out,
                accumulate)


def decode(prepared, weight):
    """(codes fp32 [M, K], scales [M, K/64], low [M, R]) in plain order."""
    codes, scales, _, low = prepared
    return codes.unflatten(1, (-1, 8))[..., torch.tensor(CODE_ORDER, device="cpu").argsort()].flatten(1).float(), scales, low


# ---- exact

@_operator("svdq::exact_cpu", mutates_args=("out",))
def exact_cpu(x: torch.Tensor, qweight: torch.Tensor, wscales: torch.Tensor, wzeros: torch.Tensor | None,
              smooth: torch.Tensor | None, wcscales: torch.Tensor | None, proj_down: torch.Tensor | None,
              proj_up: torch.Tensor | None, wtscale: float, precision: str, unsigned: bool, bias: torch.Tensor | None,
              out: torch.Tensor, accumulate: bool) -> None:
    """out = weight(x) + bias, or out += that, with activations as they are.

    x          [M, K] fp32 | bf16 | fp16, any strides          out [M, N] x.dtype, any strides
    qweight, wscales, wzeros       of an AWQWeight (smooth None), else with the others of a W4A4Weight, as these say
    bias       [N] x.dtype or None

    All are computed in fp32, whatever x is, or in bf16 where x is and the CPU multiplies that.

    Spec: reference.linear_weight_only, reference.awq_gemv. Source: SVDQuant, arXiv 2411.05007.
    """
    weight = AWQWeight(qweight, wscales, wzeros) if smooth is None else W4A4Weight(
        precision, unsigned, qweight, wscales, smooth, proj_down, proj_up, wcscales, wtscale)
    _check_exact(weight, x, bias, out)
    n, k = weight.shape
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 and cpu_multiplies(x.dtype) else torch.float32
    y = out if out.dtype == dtype else torch.empty(out.shape, dtype=dtype, device=out.device)
    if not accumulate:
        y.zero_() if bias is None else y.copy_(bias)
    else:
        y = y if y is out else y.copy_(out)
        y += 0 if bias is None else bias
    if not len(x):
        return
    x = x.to(dtype)
    if weight.rank:
        low = x.new_zeros(len(x), weight.rank)              # an addmm_, unlike @, is left alone by autocast
        y.addmm_(low.addmm_(x, plain_factor(proj_down, True).to(dtype)), plain_factor(proj_up, False).to(dtype))
    z = weight.smoothed(x)
    if len(x) <= FEW:
        y += few_rows(weight, z.float().contiguous())
    else:
        step = max(min(max(AT_LEAST, PER_TOKEN * len(x)), AT_MOST) // k // 128, 1) * 128
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            y[:, rows].addmm_(z, numbers(weight, rows.start, rows.stop, dtype).t())
    if y is not out:
        out.copy_(y.clamp(-65504.0, 65504.0) if out.dtype == torch.float16 else y)


def _check_exact(weight, x, bias, out):
    """Raises ShapeError for what C would read or write wrongly."""
    (n, k), half, rank = weight.shape, weight.dtype, weight.rank
    if (x.ndim != 2 or tuple(out.shape) != (len(x), n) or x.shape[1] != k or x.dtype not in KINDS or out.dtype != x.dtype
            or n % 128 or k % 128 or half not in HALVES or rank % 16):
        raise ShapeError(f"exact_cpu: x is {list(x.shape)} {x.dtype}, out {list(out.shape)} {out.dtype}, the weight [{n}, {k}] "
                         f"{half} of rank {rank}. Needs x [tokens, {k}] fp32, bf16 or fp16, out [tokens, {n}] of its dtype, N "
                         "and K multiples of 128, scales in bf16 or fp16, a rank that is a multiple of 16.")
    if weight.precision == "awq":
        scales = (k // 64, n), half
        fields = {"qweight": ((n // 4, k // 2), torch.int32), "wscales": scales, "wzeros": scales}
    else:
        scales = (k // GROUP[weight.precision], n), half if weight.precision == "int4" else torch.float8_e4m3fn
        fields = {"qweight": ((n, k // 2), torch.int8), "wscales": scales, "smooth": ((k,), half), "wcscales": ((n,), half),
                  "proj_down": ((k, rank), half), "proj_up": ((n, rank), half)}
    launch.check("exact_cpu", x, 1, bias=(bias, (n,), x.dtype),
                 **{field: (tensor, *fields[field]) for field, tensor in weight.tensors().items()})


@exact_cpu.register_fake
def _(*arguments):
    return None


def numbers(weight, start, stop, dtype):
    """Rows [start, stop) of a weight as numbers, multiples of 16, in memory that this thread's next call writes over."""
    out = scratch(weight.qweight, (stop - start, weight.shape[1]), dtype)
    call("dequantise", _dequantising(weight, start, stop, out))
    return out


def few_rows(weight, x):
    """x [1..8, K] fp32 contiguous times the 4-bit part of a weight -> [tokens, N] fp32."""
    n = weight.shape[0]
    out = x.new_empty(len(x), n)
    call("gemv", Gemv(_dequantising(weight, 0, n), len(x), _at(x), _at(out)))
    return out


def _dequantising(weight, start, stop, out=None):
    n, k = weight.shape
    zeros, wcscales = getattr(weight, "wzeros", None), getattr(weight, "wcscales", None)
    return Dequantise(torch.get_num_threads(), n, k, start, stop, PRECISIONS[weight.precision], _at(weight.qweight),
                      KINDS[weight.dtype], _at(weight.wscales), _at(zeros), _at(wcscales), getattr(weight, "wtscale", 1.0),
                      0 if out is None else KINDS[out.dtype], _at(out))


def plain_factor(factor, is_down):
    """A packed factor as fp32: proj_down -> [K, R], proj_up -> its transpose [R, N]."""
    rows, rank = factor.shape
    out = factor.new_empty((rows, rank) if is_down else (rank, rows), dtype=torch.float32)
    steps = (16 * rank, 16, rank) if is_down else (16, 16 * rows, rows)
    call("factor", Factor(torch.get_num_threads(), rows, rank, KINDS[factor.dtype], _at(factor), _at(out), *steps))
    return out


def exact_product(x, weight, out, bias, accumulate, epilogue=None):
    smooth, zeros, wcscales = (getattr(weight, name, None) for name in ("smooth", "wzeros", "wcscales"))
    scales, zeros = weight.wscales.contiguous(), None if zeros is None else zeros.contiguous()      # a part of an AWQWeight's
    exact_cpu(x, weight.qweight, scales, zeros, smooth, wcscales, weight.proj_down, weight.proj_up,
              getattr(weight, "wtscale", 1.0), weight.precision, weight.unsigned, None if bias is None else bias.contiguous(),
              out, accumulate)


VARIANTS = (
    Variant("w4a8_cpu", "fused kernels, 4-bit weights, 8-bit activations", quantised, product, activations="int8_group",
            device=("cpu",), dtypes=FLOATS, library=LIBRARY, preference=20, decode=decode, row_bytes=4),
    Variant("exact_cpu", "4-bit weights, exact activations", lambda x, weight: x, exact_product,
            precisions=("int4", "nvfp4", "awq"), device=("cpu",), library=LIBRARY, preference=10))
