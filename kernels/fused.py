"""The CUDA kernels as torch operators: shapes checked once, outputs by torch's allocator, the current stream, no sync.

`svdq::quant_down`, `svdq::gemm_w4a4`, `svdq::awq_gemv` and Hopper's `svdq::quant_fp8` and `svdq::gemm_fp8` are opaque to
torch.compile and free of host reads, so that CUDA graphs capture them. Buffers between them are laid out as the .cuh files
say; nothing else needs to know.

Test: tests/kernels/test_fused.py (shapes, errors, arguments), test_cuda.py, test_emulated.py (the kernels)
"""

import ctypes
from functools import cache

import torch

from . import build
from .errors import BuildError, ShapeError

HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
MAX_RANK = 128              # fused in the kernels; more runs as a 16-bit pair of matmuls
MAX_BATCH = 8               # rows of x a modulation kernel takes
MAX_LAYERS = 80             # layers of one awq_gemv launch: awq_gemv.cuh


def blocks64(tokens):
    """Activation buffers come in blocks of 64 rows."""
    return -(-tokens // 64)


@torch.library.custom_op("svdq::quant_down", mutates_args=())
def quant_down(x: torch.Tensor, smooth: torch.Tensor, proj_down: torch.Tensor | None,
               unsigned: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise activations to int4 and run the low-rank down projection, in one pass over x.

    x          [M, K] bf16 | fp16, last stride 1, K % 64 == 0, 4-byte aligned rows
    smooth     [K] x.dtype       proj_down  [K, R] x.dtype or None, R % 16 == 0, R <= 128      both packed (layout.py)

    qact       [M/64, K/64, 4, 32, 4] int32, ascales [M/64, K/64, 4, 8, 2] fp32, low [M/16, R/16, 32, 8] x.dtype, in the
               order quant_down.cuh describes, M rounded up to 64; rows past M are zero

    Spec: reference.quant_down. Source: SVDQuant, arXiv 2411.05007.
    """
    tokens, k = _check_x("quant_down", x)
    rank = 0 if proj_down is None else proj_down.shape[-1]
    if rank % 16 or rank > MAX_RANK:
        raise ShapeError(f"quant_down: rank {rank}. Fused ranks are multiples of 16 up to {MAX_RANK}.")
    _check("quant_down", x, smooth=(smooth, (k,), x.dtype), proj_down=(proj_down, (k, rank), x.dtype))
    outputs = _quant_down_outputs(x, rank)
    if tokens:
        name = f"quant_down_{HALVES[x.dtype]}_{'u4' if unsigned else 's4'}_{'r32' if rank <= 32 else 'r128'}"
        _launch(x, name, (blocks64(tokens) * 4, 1), 256,
                [x, smooth, proj_down, *outputs, tokens, k, rank, x.stride(0)])
    return outputs


@quant_down.register_fake
def _(x, smooth, proj_down, unsigned):
    return _quant_down_outputs(x, 0 if proj_down is None else proj_down.shape[1])


def _quant_down_outputs(x, rank):
    blocks, groups = blocks64(x.shape[0]), x.shape[1] // 64
    return (x.new_empty(blocks, groups, 4, 32, 4, dtype=torch.int32),
            x.new_empty(blocks, groups, 4, 8, 2, dtype=torch.float32), x.new_empty(blocks * 4, rank // 16, 32, 8))


@torch.library.custom_op("svdq::gemm_w4a4", mutates_args=("out",))
def gemm_w4a4(qact: torch.Tensor, ascales: torch.Tensor, low: torch.Tensor, qweight: torch.Tensor,
              wscales: torch.Tensor, proj_up: torch.Tensor | None, bias: torch.Tensor | None, out: torch.Tensor,
              unsigned: bool, accumulate: bool) -> None:
    """out = qact * qweight + low * proj_up + bias, or out += that.

    qact, ascales, low   from quant_down          qweight [N, K/2] int8, wscales [K/64, N], proj_up [N, R]: packed
    bias [N] plain order or None          out [M, N] bf16 | fp16, N % 128 == 0, last stride 1, 16-byte aligned rows

    Spec: reference.gemm_w4a4. Source: SVDQuant, arXiv 2411.05007.
    """
    n, k = qweight.shape[0], qweight.shape[-1] * 2
    if (out.ndim != 2 or out.dtype not in HALVES or out.shape[1] != n or n % 128 or out.stride(1) != 1
            or out.shape[0] > 1 and out.stride(0) % 8 or out.data_ptr() % 16):
        raise ShapeError(f"gemm_w4a4: out is {list(out.shape)} {out.dtype}, strides {out.stride()}. Needs "
                         f"[tokens, {n}] bf16 or fp16, N a multiple of 128, last stride 1, rows aligned to 16 bytes.")
    tokens, rank, half = out.shape[0], low.shape[1] * 16 if low.ndim == 4 else 0, out.dtype
    if rank and proj_up is None:
        raise ShapeError(f"gemm_w4a4: low has rank {rank} but proj_up is missing.")
    blocks, groups = blocks64(tokens), k // 64
    _check("gemm_w4a4", out, qact=(qact, (blocks, groups, 4, 32, 4), torch.int32),
           ascales=(ascales, (blocks, groups, 4, 8, 2), torch.float32),
           low=(low, (blocks * 4, rank // 16, 32, 8), half),
           qweight=(qweight, (n, groups * 32), torch.int8), wscales=(wscales, (groups, n), half),
           proj_up=(proj_up, (n, rank), half), bias=(bias, (n,), half))
    if tokens:
        name = f"gemm_w4a4_{HALVES[half]}_{'u4' if unsigned else 's4'}"
        _launch(out, name, (n // 128, -(-tokens // 128)), 128,
                [qact, ascales, qweight, wscales, low, proj_up, bias, out, tokens, n, k, rank, out.stride(0),
                 int(accumulate)])


# Hopper: quant_fp8.cuh, gemm_fp8.cuh, operands as hopper.repack makes them

EPILOGUES = {"store": (), "gated": ("residual", "gate"), "gelu": (), "qkv": ("query", "key", "rotation")}  # gemm_fp8::Kind
HEAD = 128                  # channels of an attention head
CLUSTER = 2                 # CTAs that share each token tile of gemm_fp8; 1 is the form without
STAGED = {16384: 216144, 32768: 193584}     # bytes of a tile of codes -> sizeof(gemm_fp8::Shared<BYTES>)


def granules(tokens):
    """Activation buffers come in blocks of 16 rows."""
    return -(-tokens // 16)


def rows16(x):
    """x with rows that quant_fp8 can load, 16 bytes at a time: itself, or a copy."""
    return x if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 else x.clone(
        memory_format=torch.contiguous_format)


@torch.library.custom_op("svdq::quant_fp8", mutates_args=())
def quant_fp8(x: torch.Tensor, inverse: torch.Tensor, proj_down: torch.Tensor | None, unsigned: bool,
              per_group: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise activations to e4m3, one scale per token, or to int4 in e4m3, one per 64 channels; low-rank down beside it.

    x          [M, K] bf16 | fp16, last stride 1, K % 128 == 0, 16-byte aligned rows
    inverse    [K] fp32       proj_down  [K, R] x.dtype or None, R % 16 == 0, R <= 128: both from hopper.repack

    qact       [M/16, K/128, 16, 128] uint8, e4m3 bytes      ascales    [M/16, 4, 4] fp32, per_group: [M/16, K/128, 2, 4, 4]
    low        [M/16, 2, R/8, 8, 8] x.dtype, in the order quant_fp8.cuh describes, M rounded up to 16; rows past M are zero

    Spec: reference.quant_down, precision e4m3, per_group: int4. Source: SVDQuant, arXiv 2411.05007; e4m3 is our own.
    """
    tokens, k = _check_x("quant_fp8", x)
    rank = 0 if proj_down is None else proj_down.shape[-1]
    if k % 128 or x.shape[0] > 1 and x.stride(0) % 8 or x.data_ptr() % 16:
        raise ShapeError(f"quant_fp8: x is {list(x.shape)}, strides {x.stride()}. Needs K a multiple of 128 and rows "
                         "aligned to 16 bytes; call .contiguous().")
    if rank % 16 or rank > MAX_RANK:
        raise ShapeError(f"quant_fp8: rank {rank}. Fused ranks are multiples of 16 up to {MAX_RANK}.")
    _check("quant_fp8", x, inverse=(inverse, (k,), torch.float32), proj_down=(proj_down, (k, rank), x.dtype))
    outputs = _quant_fp8_outputs(x, rank, per_group)
    if tokens:
        name = (f"quant_fp8_{HALVES[x.dtype]}_{'group' if per_group else 'token'}_{'u' if unsigned else 's'}_"
                f"{'r32' if rank <= 32 else 'r128'}")
        _launch(x, name, (granules(tokens), 1), 256, [x, inverse, proj_down, *outputs, tokens, k, rank, x.stride(0)])
    return outputs


@quant_fp8.register_fake
def _(x, inverse, proj_down, unsigned, per_group):
    return _quant_fp8_outputs(x, 0 if proj_down is None else proj_down.shape[1], per_group)


def _quant_fp8_outputs(x, rank, per_group):
    blocks, steps = granules(x.shape[0]), x.shape[1] // 128
    return (x.new_empty(blocks, steps, 16, 128, dtype=torch.uint8),
            x.new_empty((blocks, steps, 2, 4, 4) if per_group else (blocks, 4, 4), dtype=torch.float32),
            x.new_empty(blocks, 2, rank // 8, 8, 8))


@torch.library.custom_op("svdq::gemm_fp8", mutates_args=("out",))
def gemm_fp8(qact: torch.Tensor, ascales: torch.Tensor, low: torch.Tensor, qweight: torch.Tensor, wscales: torch.Tensor,
             proj_up: torch.Tensor | None, bias: torch.Tensor | None, out: torch.Tensor, accumulate: bool,
             cluster: int = CLUSTER, epilogue: str = "store", residual: torch.Tensor | None = None,
             gate: torch.Tensor | None = None, query: torch.Tensor | None = None, key: torch.Tensor | None = None,
             rotation: torch.Tensor | None = None, eps: float = 0.0) -> None:
    """out = epilogue(y), where y = qact * qweight + low * proj_up + bias, with accumulate (store, gated) + out as it was.

    qact, ascales, low   from quant_fp8          qweight, wscales, proj_up   of an FP8Weight
    bias [N] plain order or None          out [M, N] bf16 | fp16, N % 128 == 0, last stride 1, 16-byte aligned rows
    cluster              CTAs that share a token tile: 1 or 2. The result is the same

    epilogue, each with operands of its own and no others:
      store
      gated   residual [M, N] out.dtype, last stride 1, 4-byte aligned rows, may be `out`          gate [N] out.dtype
      gelu
      qkv     query, key [128] out.dtype, rotation [M, 64, 2, 2] fp32, eps           N % 384 == 0

    Spec: reference.gemm_w4a4, gate_residual, gelu_tanh, qk_norm_rope. Source: SVDQuant, arXiv 2411.05007.
    """
    n, half = out.shape[-1], out.dtype
    if (out.ndim != 2 or half not in HALVES or n % 128 or out.stride(1) != 1 or out.shape[0] > 1 and out.stride(0) % 8
            or out.data_ptr() % 16):
        raise ShapeError(f"gemm_fp8: out is {list(out.shape)} {half}, strides {out.stride()}. Needs [tokens, N] bf16 or "
                         "fp16, N a multiple of 128, last stride 1, rows aligned to 16 bytes.")
    if qweight.ndim != 3 or qweight.shape[0] != -(-n // 256) or qweight.shape[2] not in STAGED or cluster not in (1, 2):
        raise ShapeError(f"gemm_fp8: qweight is {list(qweight.shape)}, out {list(out.shape)}, cluster {cluster}. Needs "
                         f"[{-(-n // 256)}, K/128, 16384 or 32768], as hopper.repack makes it, and a cluster of 1 or 2.")
    tokens, steps, rank = out.shape[0], qweight.shape[1], low.shape[2] * 8 if low.ndim == 5 else 0
    if rank and proj_up is None:
        raise ShapeError(f"gemm_fp8: low has rank {rank} but proj_up is missing.")
    operands = {"residual": residual, "gate": gate, "query": query, "key": key, "rotation": rotation}
    given = [name for name, tensor in operands.items() if tensor is not None]
    if given != list(EPILOGUES.get(epilogue, ["?"])):
        raise ShapeError(f"gemm_fp8: epilogue {epilogue} with {', '.join(given) or 'no operands'}. Needs one of "
                         + ", ".join(f"{name} ({', '.join(needs) or 'none'})" for name, needs in EPILOGUES.items()) + ".")
    if accumulate and epilogue in ("gelu", "qkv") or epilogue == "qkv" and n % (3 * HEAD):
        raise ShapeError(f"gemm_fp8: epilogue {epilogue}, accumulate {accumulate}, out {list(out.shape)}. Only store and "
                         f"gated accumulate, and qkv needs N a multiple of {3 * HEAD}.")
    if residual is not None and (residual.shape != out.shape or residual.dtype != half or residual.device != out.device
                                 or residual.stride(1) != 1 or tokens > 1 and residual.stride(0) % 2
                                 or residual.data_ptr() % 4):
        raise ShapeError(f"gemm_fp8: residual is {list(residual.shape)} {residual.dtype} on {residual.device}, strides "
                         f"{residual.stride()}. Needs {list(out.shape)} {half} on {out.device}, last stride 1, rows aligned "
                         "to 4 bytes.")
    blocks, per_group = granules(tokens), ascales.ndim == 5
    _check("gemm_fp8", out, qact=(qact, (blocks, steps, 16, 128), torch.uint8),
           ascales=(ascales, (blocks, steps, 2, 4, 4) if per_group else (blocks, 4, 4), torch.float32),
           low=(low, (blocks, 2, rank // 8, 8, 8), half), qweight=(qweight, tuple(qweight.shape), torch.uint8),
           wscales=(wscales, (qweight.shape[0], steps, 512), torch.float32), proj_up=(proj_up, (n, rank), half),
           bias=(bias, (n,), half), gate=(gate, (n,), half), query=(query, (HEAD,), half), key=(key, (HEAD,), half),
           rotation=(rotation, (tokens, HEAD // 2, 2, 2), torch.float32))
    if tokens:
        tiles = -(-qweight.shape[0] // cluster) * cluster * -(-tokens // 128)
        name = (f"gemm_fp8_{HALVES[half]}_{'group' if per_group else 'token'}_{'w4' if qweight.shape[2] == 16384 else 'w8'}_"
                f"c{cluster}")
        _launch(out, name, (min(tiles, _processors(out.device) // cluster * cluster), 1), 384,
                [qact, ascales, qweight, wscales, low, proj_up, bias, out, tokens, n, steps * 128, rank, out.stride(0),
                 int(accumulate), list(EPILOGUES).index(epilogue), residual, 0 if residual is None else residual.stride(0),
                 gate, query, key, rotation, eps], STAGED[qweight.shape[2]], cluster)


@cache
def _processors(device):
    """CTAs of gemm_fp8 that run at once: one per multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@torch.library.custom_op("svdq::awq_gemv", mutates_args=())
def awq_gemv(x: torch.Tensor, qweights: list[torch.Tensor], wscales: list[torch.Tensor], wzeros: list[torch.Tensor],
             biases: list[torch.Tensor]) -> list[torch.Tensor]:
    """Modulation: [x * W + bias for every layer], one launch for all layers that read the same x.

    x [batch, K] bf16 | fp16 contiguous, batch <= 8; per layer qweight [N/4, K/2] int32, wscales and wzeros [K/64, N]
    x.dtype, bias [N] x.dtype; `biases` may be empty. Returns [batch, N] x.dtype per layer, channels in stored order.

    Spec: reference.awq_gemv. Source: checkpoint-format 5.7, 6.8.
    """
    batch, k = _check_x("awq_gemv", x)
    if batch > MAX_BATCH or len(qweights) > MAX_LAYERS or not x.is_contiguous() or x.data_ptr() % 16:
        raise ShapeError(f"awq_gemv: x is {list(x.shape)}, strides {x.stride()}, for {len(qweights)} layers. Needs a "
                         f"contiguous, 16-byte aligned x of at most {MAX_BATCH} rows and at most {MAX_LAYERS} layers; "
                         "clone x or split the call.")
    if not len(qweights) == len(wscales) == len(wzeros) or len(biases) not in (0, len(qweights)):
        raise ShapeError(f"awq_gemv: got {len(qweights)} qweights, {len(wscales)} wscales, {len(wzeros)} wzeros and "
                         f"{len(biases)} biases. Needs one of each per layer, biases also none at all.")
    outputs = _awq_outputs(x, qweights)
    layers = (_Layer * MAX_LAYERS)()
    for i, (qweight, scales, zeros) in enumerate(zip(qweights, wscales, wzeros)):
        n, bias = qweight.shape[0] * 4, biases[i] if biases else None
        _check("awq_gemv", x, qweight=(qweight, (n // 4, k // 2), torch.int32), wscales=(scales, (k // 64, n), x.dtype),
               wzeros=(zeros, (k // 64, n), x.dtype), bias=(bias, (n,), x.dtype))
        layers[i] = _Layer(*(t if t is None else t.data_ptr() for t in (qweight, scales, zeros, bias, outputs[i])), n)
    if batch and qweights:
        widest = max(output.shape[1] for output in outputs)
        _launch(x, f"awq_gemv_{HALVES[x.dtype]}_{'b1' if batch == 1 else 'b8'}", (-(-widest // 32), len(qweights)), 256,
                [x, layers, batch, k])
    return outputs


@awq_gemv.register_fake
def _(x, qweights, wscales, wzeros, biases):
    return _awq_outputs(x, qweights)


def _awq_outputs(x, qweights):
    return [x.new_empty(x.shape[0], qweight.shape[0] * 4) for qweight in qweights]


class _Layer(ctypes.Structure):
    """awq_gemv::Layer"""
    _fields_ = [(name, ctypes.c_void_p) for name in ("qweight", "wscales", "wzeros", "bias", "out")] + [
        ("N", ctypes.c_uint64)]


def _check_x(who, x):
    if (x.ndim != 2 or x.dtype not in HALVES or x.shape[1] % 64 or x.stride(1) != 1
            or x.shape[0] > 1 and x.stride(0) % 2 or x.data_ptr() % 4):
        raise ShapeError(f"{who}: x is {list(x.shape)} {x.dtype}, strides {x.stride()}. Needs [tokens, K] bf16 or fp16 "
                         "with K a multiple of 64, last stride 1 and rows aligned to 4 bytes; call .contiguous().")
    return x.shape


def _check(who, like, **operands):
    """operands: name -> (tensor or None, shape, dtype), on like's device. A vector of channels may be aligned to 4 bytes."""
    words = ("bias", "gate", "query", "key")
    for name, (tensor, shape, dtype) in operands.items():
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != like.device
                                   or not tensor.is_contiguous() or tensor.data_ptr() % (4 if name in words else 16)):
            raise ShapeError(f"{who}: {name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}, strides "
                             f"{tensor.stride()}. Needs {list(shape)} {dtype} on {like.device}, contiguous, aligned to "
                             "16 bytes.")


def _launch(like, name, grid, block, arguments, shared=0, cluster=1):
    """Launch on the device of `like` and torch's current stream there. Tensors become pointers, None a null pointer.

    shared   bytes of dynamic shared memory       cluster  CTAs, neighbours in x, that run together
    """
    if like.device.type != "cuda":
        raise ShapeError(f"{name}: tensors are on {like.device}. Needs a CUDA GPU; ops.linear runs on any device.")
    values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_void_p(None) if a is None
              else ctypes.c_int(a) if isinstance(a, int) else ctypes.c_float(a) if isinstance(a, float) else a
              for a in arguments]
    with torch.cuda.device(like.device):
        kernels = build.kernels_for(like.device.index)
        if kernels is None:
            raise BuildError(f"{name}: there are no kernels for {like.device}; the log says why.")
        kernels.launch(name, grid, block, values, torch.cuda.current_stream().cuda_stream, shared, cluster)
