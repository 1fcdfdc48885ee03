"""kernels.launch on the CPU: launches go to the emulator, so that the Python half runs as it would on a GPU.

    monkeypatch.setattr(kernels.launch, "launch", launcher.launch)
"""

import ctypes

import torch
from svdq_pack.kernels.launch import Updated

from . import build


def launch(library, like, name, grid, block, arguments, shared=0, cluster=1):
    """In the place of kernels.launch.launch. Matrices whose rows lie apart keep what lies between them."""
    arguments = [_argument(argument, grid, arguments) for argument in arguments]
    build.load(library.source_of(name)).launch(name, grid, block, shared, arguments, cluster=cluster)


def _argument(argument, grid, arguments):
    if isinstance(argument, Updated):
        return build.InOut(flat(argument.tensor))
    if isinstance(argument, ctypes.Array):                      # awq_gemv's layers
        x, layers, batch, k = arguments
        return build.Rows([_row(layer, batch, k, x.dtype) for layer in layers[:grid[1]]])
    if isinstance(argument, torch.Tensor) and not argument.is_contiguous():
        return build.InOut(flat(argument))
    return argument


def flat(rows):
    """The memory from the first to the last element of rows that lie apart; rows that do not, as they are."""
    if rows.is_contiguous():
        return rows
    return torch.as_strided(rows, ((len(rows) - 1) * rows.stride(0) + rows.shape[1],), (1,))


def _row(layer, batch, k, dtype):
    """The tensors behind the addresses of one awq_gemv.Layer, in the order of the C++ struct."""
    def tensor(address, dtype, *shape):
        size = torch.Size(shape).numel() * dtype.itemsize
        return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).view(shape)

    n = layer.N
    return (tensor(layer.qweight, torch.int32, n // 4, k // 2), tensor(layer.wscales, dtype, k // 64, n),
            tensor(layer.wzeros, dtype, k // 64, n), tensor(layer.bias, dtype, n) if layer.bias else None,
            build.Out(tensor(layer.out, dtype, batch, n)), n)
