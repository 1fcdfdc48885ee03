"""The contract of a variant: one implementation of a 4-bit linear, where it can run, and why it cannot elsewhere.

Each file of variants/ holds a tuple VARIANTS of these and nothing else needs to know of it: the registry, and through it
dispatch, trust, doctor, bench, install, budgets and the kernel tests, read that tuple.

    prepared = variant.prepare(x, weight)           the input, quantised: layers that share x and `smooth` can share it
    variant.product(prepared, weight, out, bias, accumulate, epilogue)

`modulates` stands in the place of prepare where x is normalised and modulated first. All take any number of tokens, 0
included, and any weight whose N and K are multiples of 128, with a branch or without (proj_down None). x has one of
`dtypes`; scales and factors are 16 bit even where x is fp32. bias has x's dtype. out holds anything, NaN included, unless
accumulate. With `decode`, prepare returns a tuple of tensors; without it, a self-test compares the whole only. Preferences
so far: 0 the last resort, 5 a kernel that only unpacks, 10 kernels for any GPU, 20 those for one kind, 30 those of 8-bit
activations on Hopper.

Test: tests/unit/test_variant.py
"""

import platform
import re
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch

from .epilogues import Gated, rounded
from .prologues import Modulated
from .rows import aligned, is_aligned
from .weights import PRECISIONS, AWQWeight, W4A4Weight

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}        # as kernels name them
# how activations are rounded -> to how many bits
ROUNDED_TO = {None: 16, "int4": 4, "nvfp4": 4, "e4m3": 8, "int8": 8, "int8_group": 8}
ACT_BITS = (4, 8, 16)
LATER = (99, 0)         # the highest compute capability of a variant that later GPUs run, too


# Names of the GPUs of sm_75 that are a TU116 or TU117, which have no tensor cores, and only a name tells. Their instructions
# run there all the same, at 1.2 T/s on a GTX 1660 SUPER where an RTX 2060 has 61 (tracel-ai/cubecl, pull request 1588).
WITHOUT_TENSOR_CORES = re.compile(r"\b(GTX 16\d\d|MX[45]50|T\d{3,4}|CMP 30HX)\b")


class Target(NamedTuple):
    """Where a linear is to run. A CUDA device without an index is hypothetical: nobody asks whether its kernels work."""
    type: str                           # as torch calls it; "rocm" for what torch calls cuda on another maker's GPU
    capability: tuple | None = None     # compute capability of a CUDA device
    index: int | None = None
    lacking: str = ""                   # the name of a CUDA device whose kind has tensor cores and which has none

    @classmethod
    def of(cls, device):
        """The Target of a torch.device. A CUDA device without an index is the current one."""
        device = torch.device(device)
        if device.type != "cuda":
            return cls(device.type)
        index = torch.cuda.current_device() if device.index is None else device.index
        if torch.version.hip:
            return cls("rocm", None, index)
        capability = tuple(torch.cuda.get_device_capability(index))
        return cls.gpu(capability, index, torch.cuda.get_device_name(index) if capability == (7, 5) else "")

    @classmethod
    def gpu(cls, capability, index, name):
        """The Target of a CUDA device that calls itself by this name."""
        return cls("cuda", capability, index, name if capability == (7, 5) and WITHOUT_TENSOR_CORES.search(name) else "")

    @property
    def name(self):
        """As people write it: "cuda:0", "cpu"."""
        return self.type if self.index is None else f"{'cuda' if self.type == 'rocm' else self.type}:{self.index}"


def sm(capability):
    return f"sm_{capability[0]}{capability[1]}"


@dataclass(frozen=True, eq=False)
class Variant:
    """One implementation. Every rule is data, so that messages can quote it.

    name         short, unique but for rows that differ in precision or activations
    how          one clause for people
    prepare      (x [tokens, K], weight) -> what `product` takes in x's place
    product      (prepared, weight, out [tokens, N], bias [N] | None, accumulate, epilogue | None): out = epilogue(y), y being
                 weight(x) + bias, with accumulate + out as it was
    precisions   of the weights it takes: "int4", "nvfp4", "awq"
    activations  what `prepare` rounds them to, a precision of reference.quant_down; None: never
    layout       the class of Weight it reads, which packs one from the file's order; None: it reads the file's order
    device       None: any; else (type,) or ("cuda", lowest, highest compute capability)
    tensor_cores whether it is of no use without them
    dtypes       of x
    library      build.Library of the CUDA kernels it launches, build.CPULibrary of its functions, or None
    same_dtype   whether scales and factors must be of x's dtype; hosts cast them on loading (weights.cast)
    row_bytes    alignment in bytes that rows of x, out and residual need, with last stride 1; 1: any strides
    max_rank     rank of the branch that `product` computes; a larger branch runs beside it. None: any rank
    max_rows     most rows of x, or None
    epilogues    classes of epilogues that `product` does before it stores
    modulates    [(prologues.Modulated, weight)] -> [what `product` takes, or None where its kernel cannot], from one read of
                 each x, in fewer launches than there are. None: it never can
    feeds        (prepared, weight, bias, following weight, tokens) -> what `product` takes for the following weight of GELU of
                 this product, which then is in no memory; or None where its kernel cannot. None: it never can
    products     (x, [weight], [bias]) -> [out [tokens, N]]: what `product` makes of one x for each layer, in one launch. None:
                 it has no such kernel
    preference   of the variants that could serve, the one with the highest does
    rivals       name of a group of variants that do the same job on the same GPUs: which of them serves there is timed
                 (tuner.py), not told by `preference`. None: no group
    on_request   never chosen by itself: `registry.using(name)` asks for it
    last_resort  serves without a self-test, so that there is always one that does
    weight_only  multiplies 16-bit numbers that it makes of the codes each time: slower than a 16-bit model, on a GPU
    sum_error    how far the sums of its product may be off beside one rounding of out, relative to their norm
    unit         of bench's data sheets, which its product runs on; None: the one of its activations
    decode       (prepared, weight) -> (values of the codes, fp32 [rows, K], scales [rows] or [rows, groups], low [rows, R]):
                 what `prepare` made, in plain order, rows past the tokens included, for checks of either half by itself
    """
    name: str
    how: str
    prepare: object
    product: object
    precisions: tuple = ("int4",)
    activations: str | None = None
    layout: type | None = None
    device: tuple | None = None
    tensor_cores: bool = False
    dtypes: tuple = FLOATS
    library: object = None
    same_dtype: bool = False
    row_bytes: int = 1
    max_rank: int | None = None
    max_rows: int | None = None
    epilogues: frozenset = frozenset()
    modulates: object = None
    feeds: object = None
    products: object = None
    preference: int = 0
    rivals: str | None = None
    on_request: bool = False
    last_resort: bool = False
    weight_only: bool = False
    sum_error: float = 0.0
    unit: str | None = None
    decode: object = None

    def __post_init__(self):
        """Raises TypeError or ValueError for a row that nobody could use: its file is then left out, and no other."""
        for field, kind in (("name", str), ("how", str), ("precisions", tuple), ("dtypes", tuple), ("epilogues", frozenset),
                            ("preference", int), ("row_bytes", int)):
            if not isinstance(getattr(self, field), kind):
                raise TypeError(f"{field} is {getattr(self, field)!r}, needs {kind.__name__}")
        if not set(self.precisions) <= set(PRECISIONS) or self.activations not in ROUNDED_TO:
            raise ValueError(f"precisions {self.precisions}, activations {self.activations!r}. Needs some of {PRECISIONS} and "
                             f"one of {tuple(ROUNDED_TO)}")
        if self.rivals is not None and (not isinstance(self.rivals, str) or not self.rivals.isidentifier()):
            raise ValueError(f"rivals is {self.rivals!r}, needs a name, which stands in a file's, or None")
        if self.device is not None and (not isinstance(self.device, tuple) or len(self.device) not in (1, 3)):
            raise TypeError(f'device is {self.device!r}, needs (type,), ("cuda", lowest, highest) or None')

    def __deepcopy__(self, memo):           # hosts copy whole models; a variant is known by its identity
        return self

    @property
    def act_bits(self):
        """The bits of an activation after `prepare`: 4, 8, or 16 where none is rounded."""
        return ROUNDED_TO[self.activations]

    def reads(self, weight):
        """Whether it takes a weight as it lies."""
        return isinstance(weight, self.layout or (W4A4Weight, AWQWeight))

    def meant_for(self, target):
        """Whether a target is of its kind at all: no CPU runs CUDA kernels, so nobody there wants to read about them."""
        return self.device is None or self.device[0] == target.type

    def made_for(self, target):
        """Whether it is meant_for a target, and for GPUs of its compute capability."""
        if not self.meant_for(target) or self.device is None or len(self.device) == 1:
            return self.meant_for(target)
        return target.capability is not None and self.device[1] <= target.capability <= self.device[2]

    def declines(self, target, dtype, weight, act_bits=None):
        """Why it cannot serve x of this dtype there, rules only, or None. `weight` may lie in any order."""
        if weight.precision not in self.precisions:
            return f"takes {' and '.join(self.precisions)} weights, not {weight.precision}"
        if self.device and self.device[0] != target.type:
            return f"needs a {self.device[0]} device"
        if not self.made_for(target):
            _, lowest, highest = self.device
            made_for = f"{sm(lowest)} and later" if highest >= LATER else f"{sm(lowest)} to {sm(highest)}"
            return f"is made for {made_for}, and this GPU is {sm(target.capability) if target.capability else 'unknown'}"
        if self.tensor_cores and target.lacking:
            return f"needs tensor cores, which {target.lacking} lacks"
        if dtype not in self.dtypes:
            return f"takes {', '.join(map(short, self.dtypes))}, not {short(dtype)}"
        if self.same_dtype and weight.dtype != dtype:
            return f"needs scales of the compute dtype {short(dtype)}, the file has {short(weight.dtype)}"
        if act_bits is not None and self.act_bits not in (act_bits, 16):
            return f"rounds activations to {self.act_bits} bits, not {act_bits}"
        return None

    def prepared(self, jobs):
        """[what `product` takes in the place of x, or None where no kernel makes it] of [(Modulated x, weight)]."""
        places = [] if self.modulates is None else [i for i, (_, weight) in enumerate(jobs) if not self._is_beside(weight)]
        made = dict(zip(places, self.modulates([jobs[i] for i in places]))) if places else {}
        return [made.get(i) for i in range(len(jobs))]

    def prepared_for(self, x, weight):
        """What `product` takes for x and a weight whose branch it fuses; None for others."""
        return None if self._is_beside(weight) else self.prepare(aligned(x, self.row_bytes), weight)

    def fed(self, x, weight, bias, following, prepared=None):
        """(what `product` takes for a following weight of GELU of weight(x) + bias, or None where no kernel makes it; what it
        takes for this weight, for `run` then, or None).

        prepared   as in `run`; without, x is no Modulated
        """
        if self.feeds is None:
            return None, prepared
        taken = self.prepared_for(x, weight) if prepared is None else prepared
        return None if taken is None else self.feeds(taken, weight, bias, following, len(x)), taken

    def _is_beside(self, weight):
        """Whether the branch of a weight is too wide for `product` and runs beside it."""
        return self.max_rank is not None and weight.rank > self.max_rank

    def run(self, x, weight, out, bias=None, accumulate=False, epilogue=None, prepared=None):
        """out = epilogue(weight(x) + bias (+ out as it was)), ops.linear's contract, for a weight that the variant reads.

        prepared   what `self.prepared` made for this weight of a Modulated x, or `fed` of another product, or None

        What `product` leaves is done here: rows of x or out that it cannot load, a branch wider than it fuses, an epilogue
        that it does not do, a modulation that no quantiser does.
        """
        if isinstance(x, Modulated) and prepared is None:
            prepared, = self.prepared([(x, weight)])
            x = x.of() if prepared is None else x
        beside = self._is_beside(weight)
        if epilogue is not None and (beside or type(epilogue) not in self.epilogues
                                     or accumulate and not epilogue.accumulates):
            apart = isinstance(epilogue, Gated) and not accumulate      # out may be the residual, which is read last
            y = torch.empty_like(out) if apart else out
            self.run(x, weight, y, bias, accumulate, prepared=prepared)
            out.copy_(rounded(epilogue.of(y), out.dtype))
            return
        if self.row_bytes > 1:
            if not is_aligned(out, self.row_bytes):
                fresh = torch.empty(out.shape, dtype=out.dtype, device=out.device)
                self.run(x, weight, fresh.copy_(out) if accumulate else fresh, bias, accumulate, epilogue, prepared)
                out.copy_(fresh)
                return
            if isinstance(epilogue, Gated):
                epilogue = replace(epilogue, residual=aligned(epilogue.residual, self.row_bytes))
            x = aligned(x, self.row_bytes) if prepared is None else x
        inside = weight.with_branch(None, None) if beside else weight
        self.product(self.prepare(x, inside) if prepared is None else prepared, inside, out, bias, accumulate, epilogue)
        if beside:
            weight.add_branch(x, out)


@cache
def cpu_multiplies(dtype):
    """Whether this CPU has instructions for products of a 16-bit dtype: without, torch is several times slower than in fp32."""
    if dtype == torch.bfloat16 and platform.machine().lower() in ("x86_64", "amd64"):       # where oneDNN counts emulation, too
        return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    ask = getattr(torch.ops.mkldnn, f"_is_mkldnn_{HALVES[dtype]}_supported", None)      # None: a torch without oneDNN
    return ask is not None and bool(ask())


def usual_dtype(target):
    """The 16-bit dtype that hosts compute in there: bf16, which GPUs have since sm_80, else fp16."""
    return torch.float16 if target.type == "cuda" and target.capability and target.capability < (8, 0) else torch.bfloat16


def short(dtype):
    return str(dtype).removeprefix("torch.")
