"""From torch tensors to a kernel's launch: what the operators of variants/ share.

Operators are opaque to torch.compile and free of host reads, so that CUDA graphs capture them: shapes are checked once,
outputs come from torch's allocator, launches go to its current stream and nothing waits for them.

Test: tests/kernels/test_launch.py
"""

import ctypes
from functools import cache
from typing import NamedTuple

import torch

from . import build
from .epilogues import KINDS
from .errors import BuildError, ShapeError
from .reference import HEAD
from .rows import is_aligned
from .variant import HALVES

MAX_RANK = 128              # of a low-rank branch inside kernels, a multiple of 16; more runs as a 16-bit pair of matmuls


class Updated(NamedTuple):
    """An argument that the kernel reads before it writes, for whoever watches the launch."""
    tensor: torch.Tensor


class Written(NamedTuple):
    """What the kernel writes, in a struct of Structs."""
    tensor: torch.Tensor


class Structs(NamedTuple):
    """An argument by value: `count` structs of pointers and 64-bit numbers, of which those past `rows` are zeros.

    rows    the fields of each, in the kernel's order: tensors (Written ones, too), None or int
    """
    rows: list
    count: int


def check_x(who, x, k, size):
    """(tokens, K) of an activation for a kernel: K a multiple of `k`, rows aligned to `size` bytes. Raises ShapeError."""
    if x.ndim != 2 or x.dtype not in HALVES or x.shape[1] % k or not is_aligned(x, size):
        raise ShapeError(f"{who}: x is {list(x.shape)} {x.dtype}, strides {x.stride()}. Needs [tokens, K] bf16 or fp16 "
                         f"with K a multiple of {k}, last stride 1 and rows aligned to {size} bytes; call .contiguous().")
    return x.shape


def check_rank(who, rank):
    if rank % 16 or rank > MAX_RANK:
        raise ShapeError(f"{who}: rank {rank}. Fused ranks are multiples of 16 up to {MAX_RANK}.")


def check_out(who, out, n):
    """An output [tokens, N] of a product, stored 16 bytes at a time. Raises ShapeError."""
    if out.ndim != 2 or out.dtype not in HALVES or out.shape[1] != n or n % 128 or not is_aligned(out, 16):
        raise ShapeError(f"{who}: out is {list(out.shape)} {out.dtype}, strides {out.stride()}. Needs [tokens, {n}] bf16 or "
                         "fp16, N a multiple of 128, last stride 1, rows aligned to 16 bytes.")


def check(who, like, size=16, **operands):
    """operands: name -> (tensor or None, shape, dtype): contiguous, aligned to `size` bytes, on like's device."""
    for name, (tensor, shape, dtype) in operands.items():
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != like.device
                                   or not tensor.is_contiguous() or tensor.data_ptr() % size):
            raise ShapeError(f"{who}: {name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}, strides "
                             f"{tensor.stride()}. Needs {list(shape)} {dtype} on {like.device}, contiguous, aligned to "
                             f"{size} bytes.")


def epilogue_arguments(who, out, accumulate, epilogue, residual, gate, query, key, rotation, eps):
    """What a GEMM of `out` [tokens, N] takes last, see epilogue.cuh. Raises ShapeError.

    epilogue, each with operands of its own and no others:
      store
      gated   residual [tokens, N] out.dtype, last stride 1, rows aligned to 16 bytes, may be `out`         gate [N] out.dtype
      gelu
      qkv     query, key [128] out.dtype, rotation [tokens, 64, 2, 2] fp32, eps                     N a multiple of 384
    """
    (tokens, n), half = out.shape, out.dtype
    operands = {"residual": residual, "gate": gate, "query": query, "key": key, "rotation": rotation}
    given = [name for name, tensor in operands.items() if tensor is not None]
    if given != list(KINDS.get(epilogue, ["?"])):
        raise ShapeError(f"{who}: epilogue {epilogue} with {', '.join(given) or 'no operands'}. Needs one of "
                         + ", ".join(f"{name} ({', '.join(needs) or 'none'})" for name, needs in KINDS.items()) + ".")
    if accumulate and epilogue in ("gelu", "qkv") or epilogue == "qkv" and n % (3 * HEAD):
        raise ShapeError(f"{who}: epilogue {epilogue}, accumulate {accumulate}, out {list(out.shape)}. Only store and "
                         f"gated accumulate, and qkv needs N a multiple of {3 * HEAD}.")
    if residual is not None and (residual.shape != out.shape or residual.dtype != half or residual.device != out.device
                                 or not is_aligned(residual, 16)):
        raise ShapeError(f"{who}: residual is {list(residual.shape)} {residual.dtype} on {residual.device}, strides "
                         f"{residual.stride()}. Needs {list(out.shape)} {half} on {out.device}, last stride 1, rows aligned "
                         "to 16 bytes.")
    check(who, out, rotation=(rotation, (tokens, HEAD // 2, 2, 2), torch.float32))
    check(who, out, 4, gate=(gate, (n,), half), query=(query, (HEAD,), half), key=(key, (HEAD,), half))
    return [list(KINDS).index(epilogue), residual, 0 if residual is None else residual.stride(0), gate, query, key, rotation,
            eps]


@cache
def shared_memory(device):
    """Bytes of shared memory of a multiprocessor of a device. Where nothing real is launched: what those of RTX 30 to 50 have,
    the least but for RTX 20's; so by a torch that does not say."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    least = (64 if getattr(properties, "major", 8) < 8 else 100) << 10
    return getattr(properties, "shared_memory_per_multiprocessor", least)


def runs_twice(device, shared):
    """Whether two CTAs with so many bytes of shared memory run at once on a multiprocessor; one hides no waiting."""
    return 2 * (shared + 1024) <= shared_memory(device)


@cache
def processors(device):
    """Multiprocessors of a device: how many CTAs of a persistent kernel run at once. 2 where nothing real is launched."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def launch(library, like, name, grid, block, arguments, shared=0, cluster=1):
    """Launch a kernel of a library on the device of `like` and torch's current stream there.

    arguments   tensors become pointers (Updated ones too), None a null pointer, int and float those of C, Structs an array
    shared      bytes of dynamic shared memory       cluster  CTAs, neighbours in x, that run together

    Raises ShapeError off CUDA, BuildError where there are no kernels, RuntimeError with the driver's words.
    """
    if like.device.type != "cuda":
        raise ShapeError(f"{name}: tensors are on {like.device}. Needs a CUDA GPU; ops.linear runs on any device.")
    values = [_value(argument) for argument in arguments]
    with torch.cuda.device(like.device):
        kernels = build.kernels_for(library, like.device.index)
        if kernels is None:
            raise BuildError(f"{name}: there are no kernels {library.name} for {like.device}; the log says why.")
        kernels.launch(name, grid, block, values, torch.cuda.current_stream().cuda_stream, shared, cluster)


def _value(argument):
    if isinstance(argument, Structs):
        words = [field if isinstance(field, int) else _value(field).value or 0 for row in argument.rows for field in row]
        return (ctypes.c_uint64 * (argument.count * len(argument.rows[0])))(*words)
    if isinstance(argument, (Updated, Written)):
        argument = argument.tensor
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return {int: ctypes.c_int, float: ctypes.c_float}[type(argument)](argument)
