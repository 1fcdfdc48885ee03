"""kernels.fused on the CPU: its launches go to the emulator, so that the Python half runs as it would on a GPU."""

import ctypes

import torch

from . import build

FILES = {"quant_down": "quant_down.cuh", "gemm_w4a4": "gemm_w4a4.cuh", "awq_gemv": "awq_gemv.cuh",
         "quant_fp8": "quant_fp8.cuh", "gemm_fp8": "gemm_fp8.cuh"}


def launch(like, name, grid, block, arguments, shared=0, cluster=1):
    """In the place of fused._launch."""
    file = next(file for start, file in FILES.items() if name.startswith(start))
    if file == "awq_gemv.cuh":
        x, layers, batch, k = arguments
        arguments = [x, build.Rows([_row(layer, batch, k, x.dtype) for layer in layers[:grid[1]]]), batch, k]
    if file in ("gemm_w4a4.cuh", "gemm_fp8.cuh"):
        operands, (out, tokens, n, k, rank, stride, accumulate), epilogue = arguments[:7], arguments[7:14], arguments[14:]
        whole = flat(out)
        if epilogue:
            kind, residual, *rest = epilogue
            epilogue = [kind, residual if residual is None else flat(residual), *rest]
        arguments = [*operands, build.InOut(whole) if accumulate or whole is not out else out, tokens, n, k, rank, stride,
                     accumulate, *epilogue]
    if file in ("quant_down.cuh", "quant_fp8.cuh"):
        arguments = [flat(arguments[0]), *arguments[1:]]
    build.load(build.KERNELS / file).launch(name, grid, block, shared, arguments, cluster=cluster)


def flat(rows):
    """The memory from the first to the last element of rows that lie apart; rows that do not, as they are."""
    if rows.is_contiguous():
        return rows
    return torch.as_strided(rows, ((len(rows) - 1) * rows.stride(0) + rows.shape[1],), (1,))


def _row(layer, batch, k, dtype):
    """The tensors behind the addresses of one fused._Layer, in the order of the C++ struct."""
    def tensor(address, dtype, *shape):
        size = torch.Size(shape).numel() * dtype.itemsize
        return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).view(shape)

    n = layer.N
    return (tensor(layer.qweight, torch.int32, n // 4, k // 2), tensor(layer.wscales, dtype, k // 64, n),
            tensor(layer.wzeros, dtype, k // 64, n), tensor(layer.bias, dtype, n) if layer.bias else None,
            build.Out(tensor(layer.out, dtype, batch, n)), n)
