"""Runs the PTX that nvcc made of a CUDA kernel, on numpy: the kernels' own instructions, inline asm included, without a GPU.

    Module(ptx_text).launch(kernel, grid, block, shared_bytes, args, order="forward", cluster=1, fp8_bits=13)
        -> warp instructions executed

    args      one per parameter: int, float, or a numpy array, which becomes a pointer. Arrays are changed in place; one
              whose flags.writeable is off must not be stored to. A list is a struct of 8-byte members, arrays and integers;
              where the parameter is a pointer, a pointer to it. Members that are left out are zero.
    order     of the warps: "forward", "reverse", or a seed that shuffles them, and when copies land, again and again
    cluster   CTAs of a cluster, where the kernel does not say
    fp8_bits  fraction bits that Hopper's FP8 wgmma keeps of each product and of the sum; None: an exact sum, rounded once

A Fault, with the line of PTX, is raised for
    a read of a register or of shared or local memory that nothing has written
    an access outside of the arrays, between two shared variables, or not aligned to its own size
    shared memory that a copy on its way will write: cp.async lands when the copying lane waits for its group, a bulk copy
      before the phase of its mbarrier ends
    two threads on the same bytes, one of them writing, with no barrier, mbarrier or (in a warp) bar.warp.sync between; a
      thread and a copy or a wgmma likewise, whatever the order in which they happen to run
    a thread's store that a copy or wgmma meets with no fence.proxy.async between; an mbarrier that was not fenced
    a register of a wgmma used before its wait, or between wgmma.fence and the wgmma
    global bytes which another cluster has written
    a collective that part of the warp or warpgroup does not reach, and any other deadlock
    arrivals and bytes that an mbarrier did not expect, shared memory of a CTA that is gone, copies that outlive their CTA
    an instruction or modifier not known here
On purpose stricter than the hardware, which runs these where the kernel is otherwise right: a shuffle whose register some
lane has not written, though no lane reads that one; two warps that store one value to the same place; a bar.sync without a
count that warps meet at different lines; a parity above 1; a bulk copy whose mbarrier was shown by bar.sync with no fence.
A kernel of ours needs none of them, and a slip often begins as one.
Not modelled: time, caches, fences between threads, the rounding inside a mma of 16-bit floats (sums are float64, rounded
once), approximate functions (correctly rounded here), scopes. Races over global memory are seen only where the write comes
first. Not known: tensor copies, bulk copies out of shared memory, atomics.

    text.py  PTX to instructions      machine.py  who runs when      memory.py  who sees what
    floats.py  numbers                plain.py, warp.py, hopper.py, blackwell.py  instructions of a lane, of a warp, of
                                      sm_90, of sm_120

Test: tests/kernels/simulators/test_ptx_interpreter.py, test_ptx_hopper.py, test_blackwell.py
"""

import numpy as np

from . import hopper, plain, warp  # noqa: F401  they register their instructions
from .machine import Launch, three
from .memory import Fault  # noqa: F401
from .text import Text


class Module(Text):
    """All kernels of one PTX text."""

    def launch(self, kernel, grid, block, shared_bytes, args, order="forward", cluster=1, fp8_bits=13):
        with np.errstate(all="ignore"):
            return Launch(self.kernel(kernel), three(grid), three(block), shared_bytes, args, order, three(cluster),
                          fp8_bits).run()
