"""Where the rows of a matrix lie in memory: what kernels load 16 bytes at a time must begin at multiples of that."""

import torch


def row_blocks(tokens, size):
    """Activation buffers come in blocks of `size` rows."""
    return -(-tokens // size)


def is_aligned(rows, size):
    """Whether the last stride is 1 and every row begins at a multiple of `size` bytes; size 1 takes any strides."""
    return size == 1 or rows.stride(1) == 1 and not rows.data_ptr() % size and (
        rows.shape[0] < 2 or not rows.stride(0) * rows.element_size() % size)


def aligned(rows, size):
    """The matrix itself where it is_aligned, else a copy that is."""
    return rows if is_aligned(rows, size) else rows.clone(memory_format=torch.contiguous_format)


def overlaps_itself(rows):
    """Whether two numbers of a matrix share memory. Rows that only interleave count as sharing."""
    reach = 0
    for stride, size in sorted(zip(rows.stride(), rows.shape)):
        if size > 1 and stride <= reach:
            return rows.numel() > 0
        reach += stride * (size - 1)
    return False


def overlaps(a, b):
    """Whether two matrices share memory. Columns of one wider matrix that do not meet are apart; matrices of other strides
    that only interleave count as sharing."""
    if not a.numel() or not b.numel() or a.device != b.device or a.device.type == "meta":
        return False
    if a.device.type not in ("cpu", "cuda"):            # where addresses are handles
        return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    size = a.element_size()
    (a_start, a_end), (b_start, b_end) = (
        (t.data_ptr(), t.data_ptr() + size * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride())))) for t in (a, b))
    if a_end <= b_start or b_end <= a_start:
        return False
    row = a.stride(0) * size
    if a.stride() != b.stride() or a.stride(1) != 1 or row < size * (a.shape[1] + b.shape[1]):
        return True
    gap = (b_start - a_start) % row             # from a column of a to the next of b, in a row of both
    return gap < size * a.shape[1] or row - gap < size * b.shape[1]
