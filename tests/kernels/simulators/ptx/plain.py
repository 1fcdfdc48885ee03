"""What a lane does by itself: arithmetic, conversions, loads and stores, branches."""

import numpy as np

from .blackwell import cvt_e2m1
from .floats import FP8, HALVES, add, flush, narrow, wide
from .machine import WINDOW
from .memory import Fault
from .text import SIZES, WIDTHS, decodes, store


def _apply(d, result, function, *sources):
    """d = function(a, b, ...) lane by lane, on the views of the register files named by `result` and `sources`."""
    def width(view):
        return 0 if view == "p" else 8 * int(view[1])

    to = d.write(width(result))
    rows = [(view, d.read(width(view))) for view in sources]
    if len(rows) == 2:
        (va, a), (vb, b) = rows
        return lambda w, mask: store(w, result, to, function(w.view[va][a], w.view[vb][b]), mask)
    return lambda w, mask: store(w, result, to, function(*[w.view[v][r] for v, r in rows]), mask)


def _view(kind):
    """The register view of a PTX type: s32 -> i4."""
    letter = {"s": "i", "u": "u", "b": "u", "f": "f"}[kind[0]]
    return letter + str(SIZES[kind[1:]])


def _halves(d, kind, function, count):
    """An operation on 16-bit floats, one or two in a register, in float64."""
    view, kind = ("u4", kind[:-2]) if kind.endswith("x2") else ("u2", kind)

    def compute(*sources):
        values = [wide(np.ascontiguousarray(s).view(np.uint16), kind) for s in sources]
        return narrow(function(*values), kind).view(f"u{view[1]}")
    return _apply(d, view, compute, *[view] * count)


def _float(d, function, count, exact=None):
    """f32 by a float32 function, or 16-bit floats by the float64 one in `exact`."""
    ftz, sat = d.flag("ftz"), d.flag("sat")
    d.flag("rn")
    kind = d.type("f32", "f64", *HALVES)
    if kind in HALVES:
        if ftz or sat:
            d.unknown("modifier of 16-bit arithmetic")
        return _halves(d, kind, exact or function, count)

    def compute(*sources):
        value = function(*map(flush, sources)) if ftz else function(*sources)
        value = flush(value) if ftz else value
        return np.where(np.isnan(value), 0, np.clip(value, 0, 1)) if sat else value
    return _apply(d, _view(kind), compute, *[_view(kind)] * count)


def _is_float(d):
    return d.mods[-1] in ("f32", "f64", *HALVES)


@decodes("add", "sub")
def _(d):
    function, exact = (np.add, add) if d.name == "add" else (np.subtract, lambda a, b: add(a, -b))
    if _is_float(d):
        return _float(d, function, 2, exact)
    view = _view(d.type("s16", "u16", "s32", "u32", "s64", "u64"))
    return _apply(d, view.replace("i", "u"), function, *[view.replace("i", "u")] * 2)


@decodes("mul", "mad")
def _(d):
    if _is_float(d):
        if d.name == "mad":
            d.unknown("type: fma is the name for floats")
        return _float(d, np.multiply, 2)
    part, kind = d.flag("lo", "hi", "wide"), d.type("s16", "u16", "s32", "u32", "s64", "u64")
    view = _view(kind)
    size = int(view[1])
    wide = f"{view[0]}{2 * size}"
    unsigned = f"u{2 * size if part == 'wide' else size}"
    if part == "hi" and size == 8:
        def product(a, b):
            return (a.astype(object) * b.astype(object) >> 64).astype(a.dtype).view(np.uint64)
    elif part == "hi":
        def product(a, b):
            return (a.astype(wide) * b.astype(wide) >> 8 * size).astype(view).view(unsigned)
    elif part == "wide":
        def product(a, b):
            return (a.astype(wide) * b.astype(wide)).view(unsigned)
    elif part == "lo":
        def product(a, b):
            return a.view(unsigned) * b.view(unsigned)
    else:
        d.unknown("multiplication")
    if d.name == "mul":
        return _apply(d, unsigned, product, view, view)
    return _apply(d, unsigned, lambda a, b, c: product(a, b) + c, view, view, unsigned)


@decodes("fma")
def _(d):
    ftz, sat = d.flag("ftz"), d.flag("sat")
    relu = d.flag("relu")
    d.mods.remove("rn")
    kind = d.type("f32", *HALVES)

    def exact(a, b, c):
        value = add(a * b, c)          # the product of two 24-bit significands is exact in float64
        return np.where(value > 0, value, np.where(np.isnan(value), value, 0.0)) if relu else value
    if kind in HALVES:
        if ftz or sat:
            d.unknown("modifier of 16-bit fma")
        return _halves(d, kind, exact, 3)

    def compute(a, b, c):
        a, b, c = map(flush, (a, b, c)) if ftz else (a, b, c)
        value = exact(a.astype(np.float64), b.astype(np.float64), c.astype(np.float64)).astype(np.float32)
        value = flush(value) if ftz else value
        return np.where(np.isnan(value), 0, np.clip(value, 0, 1)) if sat else value
    return _apply(d, "f4", compute, "f4", "f4", "f4")


@decodes("div", "rem")
def _(d):
    if _is_float(d):
        d.flag("full", "approx")
        return _float(d, np.divide, 2)
    view = _view(d.type("s16", "u16", "s32", "u32", "s64", "u64"))
    to, a, b = (get(8 * int(view[1])) for get in (d.write, d.read, d.read))

    def run(w, mask):
        dividend, divisor = w.view[view][a], np.where(mask, w.view[view][b], 1)
        if (divisor == 0).any():
            raise Fault("integer division by zero")
        rest = np.fmod(dividend, divisor)                  # towards zero, as C
        store(w, view, to, rest if d.name == "rem" else (dividend - rest) // divisor, mask)
    return run


def _extreme(first, nan):
    """min or max of floats: +0 is above -0, and a number wins over NaN unless `nan`."""
    pick = np.fmin if first == "min" else np.fmax

    def function(a, b):
        value = pick(a, b)
        sign = np.signbit(a) | np.signbit(b) if first == "min" else np.signbit(a) & np.signbit(b)
        value = np.where((a == 0) & (b == 0), np.where(sign, -0.0, 0.0).astype(value.dtype), value)
        return np.where(np.isnan(a) | np.isnan(b), np.nan, value).astype(value.dtype) if nan else value
    return function


@decodes("min", "max")
def _(d):
    nan = d.flag("NaN")
    if _is_float(d):
        return _float(d, _extreme(d.name, nan), 2)
    view = _view(d.type("s16", "u16", "s32", "u32", "s64", "u64"))
    return _apply(d, view, np.minimum if d.name == "min" else np.maximum, view, view)


@decodes("abs", "neg")
def _(d):
    function = np.abs if d.name == "abs" else np.negative
    if _is_float(d):
        ftz = d.flag("ftz")
        kind = d.type("f32", "f64", *HALVES)
        if kind in HALVES:                            # of the bits: NaN keeps its own
            view, one = ("u4", 0x80008000) if kind.endswith("x2") else ("u2", 0x8000)
            clear = np.dtype(view).type(~one & (0xFFFFFFFF if view == "u4" else 0xFFFF))
            change = (lambda a: a & clear) if d.name == "abs" else (lambda a: a ^ np.dtype(view).type(one))
            return _apply(d, view, change, view)
        return _apply(d, _view(kind), (lambda a: flush(function(a))) if ftz else function, _view(kind))
    view = _view(d.type("s16", "s32", "s64"))
    return _apply(d, view, function, view)


def _unary(function):
    """A float32 function, computed in float64 and rounded once."""
    return lambda a: function(a.astype(np.float64)).astype(np.float32)


@decodes("ex2", "lg2", "rcp", "sqrt", "rsqrt", "tanh", "sin", "cos")
def _(d):
    d.flag("approx")
    functions = {"ex2": np.exp2, "lg2": np.log2, "rcp": lambda a: 1 / a, "sqrt": np.sqrt, "tanh": np.tanh,
                 "rsqrt": lambda a: 1 / np.sqrt(a), "sin": np.sin, "cos": np.cos}
    return _float(d, _unary(functions[d.name]), 1, functions[d.name])


@decodes("and", "or", "xor", "not")
def _(d):
    kind = d.type("pred", "b16", "b32", "b64")
    view = "p" if kind == "pred" else _view(kind)
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}[d.name]
    return _apply(d, view, function, *[view] * (1 if d.name == "not" else 2))


@decodes("lop3")
def _(d):
    d.type("b32")
    table = int(d.operands.pop(), 0)

    def compute(a, b, c):
        result = np.zeros_like(a)
        for i in range(8):
            if table >> i & 1:
                result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return result
    return _apply(d, "u4", compute, "u4", "u4", "u4")


@decodes("shl", "shr")
def _(d):
    view = _view(d.type("b16", "b32", "b64", "s16", "s32", "s64", "u16", "u32", "u64"))
    bits, left = 8 * int(view[1]), d.name == "shl"

    def compute(a, n):                                # counts past the width are clamped to it
        over = n >= bits
        n = np.where(over, bits - 1, n).astype(a.dtype)
        value = a << n if left else a >> n
        return np.where(over & (view[0] == "u"), 0, value)
    return _apply(d, view, compute, view, "u4")


@decodes("shf")
def _(d):
    direction, mode = d.flag("l", "r"), d.flag("wrap", "clamp")
    d.type("b32")

    def compute(low, high, n):
        n = (n & 31 if mode == "wrap" else np.minimum(n, 32)).astype(np.uint64)
        both = high.astype(np.uint64) << np.uint64(32) | low
        return both << n >> np.uint64(32) if direction == "l" else both >> n
    return _apply(d, "u4", lambda *s: (compute(*s) & np.uint64(0xFFFFFFFF)).astype(np.uint32), "u4", "u4", "u4")


@decodes("bfe", "bfi")
def _(d):
    kind = d.type("u32", "s32", "b32", "u64", "s64", "b64")
    view = _view(kind)
    bits = 8 * int(view[1])

    def extract(a, start, length):
        a, start, length = a.astype(object), start.astype(int) & 255, length.astype(int) & 255
        out = []
        for value, s, n in zip(a, start, length, strict=True):
            value &= (1 << bits) - 1
            sign = value >> min(s + n - 1, bits - 1) & 1 if n and view[0] == "i" else 0
            taken = min(n, max(bits - s, 0))
            field_ = value >> s & (1 << taken) - 1
            out.append(field_ - (sign << taken))
        return np.array(out, object).astype(view)

    def insert(a, b, start, length):
        start, length = (np.minimum(x & 255, bits).astype(np.uint64) for x in (start, length))
        ones, full = np.uint64(2**64 - 1), np.uint64(64)
        mask = np.where(length == 0, np.uint64(0), ones >> full - np.maximum(length, np.uint64(1)))
        mask, moved = (np.where(start < full, x.astype(np.uint64) << np.minimum(start, full - np.uint64(1)), np.uint64(0))
                       for x in (mask, a))
        return (b & ~mask | moved & mask).astype(view)
    if d.name == "bfe":
        return _apply(d, view, extract, view, "u4", "u4")
    return _apply(d, view, insert, view, view, "u4", "u4") if kind[0] == "b" else d.unknown("type")


@decodes("prmt")
def _(d):
    d.type("b32")

    def compute(a, b, selector):
        bytes_, lane = np.stack((a, b), 1).view(np.uint8).reshape(-1, 8), np.arange(len(a))
        result = np.zeros((len(a), 4), np.uint8)
        for i in range(4):
            pick = selector >> 4 * i & 15
            byte = bytes_[lane, pick & 7]
            result[:, i] = np.where(pick & 8, np.where(byte & 128, 255, 0), byte)     # bit 3 spreads the sign
        return result.view(np.uint32)[:, 0]
    return _apply(d, "u4", compute, "u4", "u4", "u4")


COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
           "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}


@decodes("setp")
def _(d):
    name = d.mods.pop(0)
    combine = d.flag("and", "or", "xor")
    ftz = d.flag("ftz")
    kind = d.type()
    if name in COMPARE:
        def compare(a, b):
            both = ~(np.isnan(a) | np.isnan(b)) if kind[0] == "f" else True    # ne too is false for NaN
            return COMPARE[name](a, b) & both
    elif name in ("num", "nan"):
        def compare(a, b):
            return (np.isnan(a) | np.isnan(b)) ^ (name == "num")
    elif name[:-1] in COMPARE and name[-1] == "u":
        def compare(a, b):
            return COMPARE[name[:-1]](a, b) | np.isnan(a) | np.isnan(b)
    else:
        d.unknown("comparison")
    if kind in HALVES:
        d.unknown("type")
    view, prepare = _view(kind), flush if ftz else lambda a: a
    width = 8 * int(view[1])
    to, _, also = d.take().partition("|")
    to, also = d.write(0, to.strip()), d.write(0, also.strip()) if also else None
    a, b = d.read(width), d.read(width)
    third = d.predicate() if combine else None
    combined = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(combine)

    def run(w, mask):
        value = compare(prepare(w.view[view][a]), prepare(w.view[view][b]))
        values = [(to, value)] if also is None else [(to, value), (also, ~value)]
        for row, bit in values:
            if third:
                bit = combined(bit, w.view["p"][third[0]] ^ third[1])
            store(w, "p", row, bit, mask)
    return run


@decodes("selp")
def _(d):
    width = WIDTHS[d.type()]
    view = f"u{width // 8}"
    to, a, b, (p, negated) = d.write(width), d.read(width), d.read(width), d.predicate()
    return lambda w, mask: store(w, view, to, np.where(w.view["p"][p] ^ negated, w.view[view][a], w.view[view][b]), mask)


@decodes("mov")
def _(d):
    kind = d.type()
    width = WIDTHS[kind]
    to, source = d.tokens(), d.tokens()
    if len(to) == len(source) == 1:
        return _move(d, width, to[0], source[0])
    if len(to) > 1:                                  # unpack, low part first
        part = width // len(to)
        row, view = d.read(width, source[0]), f"u{part // 8}"
        rows = [None if t == "_" else d.write(part, t) for t in to]

        def run(w, mask):
            parts = w.view[f"u{width // 8}"][row].view(view).reshape(w.lanes, -1)
            for i, row_ in enumerate(rows):
                if row_ is not None:
                    store(w, view, row_, parts[:, i], mask)
        return run
    part = width // len(source)
    view = f"u{part // 8}"
    rows, row = [d.read(max(part, 16), t) for t in source], d.write(width, to[0])       # a byte lies in 16 bits
    return lambda w, mask: store(w, f"u{width // 8}", row, np.stack([w.view[f"u{max(part, 16) // 8}"][r].astype(view)
                                                                     for r in rows], 1)
                                  .view(f"u{width // 8}")[:, 0], mask)


def _move(d, width, to, source):
    """A compiler may move what it has not set, so an unwritten register spreads here instead of faulting."""
    view = f"u{width // 8}" if width else "p"
    row, old = d.write(width, to), d.read(width, source)
    target, origin = d.instruction.writes.pop(), d.instruction.reads.pop()

    def run(w, mask):
        if w.last:
            w.renamed(target, origin)
        store(w, view, row, w.view[view][old], mask)
        if w.known[origin]:
            if mask is w.full:
                w.known[target] = True
            elif not w.known[target]:
                w.partly_known(target, mask)
        else:
            had = w.full if w.known[target] else w.partly.get(target, ~w.full)
            w.partly[target] = np.where(mask, w.partly.get(origin, ~w.full), had)
            w.known[target] = bool(w.partly[target].all())
    return run


@decodes("cvta")
def _(d):
    """Generic addresses of shared and local memory lie in windows, those of global memory are themselves."""
    back = d.flag("to")
    space = d.flag("global", "shared", "shared::cta", "shared::cluster", "local", "const", "param")
    kind = d.type("u64", "u32")
    offset = WINDOW["shared"] if space.startswith("shared") else 0     # the addresses of local memory are generic already
    view = _view(kind)
    change = np.dtype(view).type(offset)
    return _apply(d, view, (lambda a: a - change) if back else (lambda a: a + change), view)


INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")


@decodes("cvt")
def _(d):
    if d.flag("pack"):
        return _cvt_pack(d)
    rounding = d.flag("rni", "rzi", "rmi", "rpi", "rn", "rz", "rm", "rp")
    ftz, sat, finite, relu = d.flag("ftz"), d.flag("sat"), d.flag("satfinite"), d.flag("relu")
    to, origin = d.type(), d.type()
    if finite and to == "e2m1x2" and rounding == "rn" and not relu:
        return cvt_e2m1(d, origin)
    if rounding in ("rz", "rm", "rp") or relu or finite and to[:-2] not in FP8:
        d.unknown("rounding")
    if to[:-2] in FP8:
        return _to_fp8(d, to[:-2], origin)
    if origin[:-2] in FP8 and to == "f16x2":
        row, pair = d.write(32), d.read(16)
        return lambda w, mask: store(w, "u4", row, narrow(wide(w.view["u2"][pair].view(np.uint8), origin[:-2]), "f16")
                                     .view(np.uint32), mask)
    if to in ("f16x2", "bf16x2") and origin == "f32":
        row, high, low = d.write(32), d.read(32), d.read(32)

        def run(w, mask):
            both = np.stack((w.view["f4"][low], w.view["f4"][high]), 1)
            both = flush(both) if ftz else both
            store(w, "u4", row, narrow(both.astype(np.float64), to[:-2]).view(np.uint32)[:, 0], mask)
        return run
    if to not in (*INTEGERS, "f16", "bf16", "f32", "f64") or origin not in (*INTEGERS, "f16", "bf16", "f32", "f64"):
        d.unknown("conversion")
    row, width = d.write_any()
    old, old_width = d.read_any(WIDTHS.get(origin, 16))
    convert = _conversion(to, origin, rounding, ftz, sat)

    def run(w, mask):
        value = convert(w.view[f"u{old_width // 8}"][old])
        extended = value.astype(f"{value.dtype.kind}{width // 8}") if value.dtype.kind != "f" else value
        store(w, f"{'i' if to[0] == 's' else 'u'}{width // 8}", row, extended, mask)
    return run


def _to_fp8(d, to, origin):
    """cvt.rn.satfinite.e4m3x2.f32 d, high, low; or from a pair of fp16."""
    row, view = d.write(16), {"f32": "f4", "f16x2": "u4"}.get(origin) or d.unknown("conversion")
    rows = [d.read(32) for _ in range(2 if origin == "f32" else 1)]

    def run(w, mask):
        values = w.view[view][rows[::-1]].T if origin == "f32" else w.view["u4"][rows[0]].view(np.float16).reshape(-1, 2)
        store(w, "u2", row, narrow(np.ascontiguousarray(values, np.float64), to).view(np.uint16)[:, 0], mask)
    return run


def _conversion(to, origin, rounding, ftz, sat):
    """From the bits of a register to a number of type `to`; floats as bits."""
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}.get(rounding)

    def source(bits):
        if origin in INTEGERS:
            return bits.astype(_view(origin)) if len(bits) else bits
        value = wide(bits.astype(np.uint16) if origin in ("f16", "bf16") else bits, origin)
        return flush(value.astype(np.float32)).astype(np.float64) if ftz and origin == "f32" else value

    def convert(bits):
        value = source(bits)
        if to in INTEGERS:
            info = np.iinfo(_view(to))
            if origin in INTEGERS:
                if sat:
                    low = max(info.min, np.iinfo(value.dtype).min)
                    value = np.clip(value, low, min(info.max, np.iinfo(value.dtype).max))
                return value.astype(_view(to))
            value = whole(value)
            limits = np.where(value >= info.max, info.max, np.where(value <= info.min, info.min, 0)).astype(_view(to))
            inside = (value < info.max) & (value > info.min)
            return np.where(inside, np.where(inside, value, 0).astype(_view(to)), limits)      # NaN: 0
        if origin in INTEGERS and to == "f32":
            return value.astype(np.float32).view(np.uint32)
        value = value.astype(np.float64)
        value = whole(value) if whole else value
        if sat:
            value = np.where(np.isnan(value), 0, np.clip(value, 0, 1))
        out = narrow(value, to)
        return flush(out.view(np.float32)).view(np.uint32) if ftz and to == "f32" else out
    return convert


def _cvt_pack(d):
    """d = clamp(a), clamp(b) at the bottom, the rest of c shifted up: cvt.pack.sat.{s4,u4,s8,u8}.s32.b32"""
    d.mods.remove("sat")
    to, _ = d.type("s2", "u2", "s4", "u4", "s8", "u8", "s16", "u16"), d.type("s32")
    bits = int(to[1:])
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if to[0] == "s" else (0, (1 << bits) - 1)
    third = d.type("b32") if d.mods else None

    def compute(a, b, c=None):
        upper, lower = (np.clip(x.astype(np.int64), low, high) & (1 << bits) - 1 for x in (a, b))
        rest = c.astype(np.int64) << 2 * bits if c is not None else 0
        return (rest | upper << bits | lower).astype(np.uint64).astype(np.uint32)
    return _apply(d, "u4", compute, "i4", "i4", *(["u4"] if third else []))


CACHES = ("volatile", "relaxed", "weak", "ca", "cg", "cs", "cv", "lu", "wb", "wt", "nc", "gpu", "cta", "sys",
          "L1::no_allocate", "L1::evict_last", "L1::evict_first", "L2::128B", "L2::256B", "L2::64B", "L2::evict_first")


def _access(d):
    while d.flag(*CACHES):
        pass
    space = d.flag("global", "shared", "shared::cta", "shared::cluster", "local", "param", "const")
    vector = d.flag("v2", "v4", "v8")
    kind = d.type()
    return space, int(vector[1:]) if vector else 1, kind, SIZES[kind.lstrip("busf")]


@decodes("ld", "ldu")
def _(d):
    space, count, kind, size = _access(d)
    to = [d.write_any(t) for t in d.tokens()]
    address = d.address()
    if len(to) != count:
        d.unknown("vector")

    def run(w, mask):
        if space == "param":
            at = address(w)[mask, None] + np.arange(count * size)
            if at.max() >= len(w.launch.parameters):
                raise Fault("beyond the parameters")
            data = w.launch.parameters[at]
        else:
            memory, at = w.space(None if space is None else "global" if space == "const" else space, address(w), mask)
            data = memory.read(w, mask, at, count * size, count * size)
        values = data.view(f"{'i' if kind[0] == 's' else 'u'}{size}")
        for i, (row, width) in enumerate(to):
            value = values[:, i].astype(f"{values.dtype.kind}{width // 8}")
            w.view[f"{values.dtype.kind}{width // 8}"][row, slice(None) if mask is w.full else mask] = value
    return run


@decodes("st")
def _(d):
    space, count, kind, size = _access(d)
    address = d.address()
    rows = [d.read_any(8 * size, t) for t in d.tokens()]
    if len(rows) != count:
        d.unknown("vector")

    def run(w, mask):
        memory, at = w.space(space, address(w), mask)
        values = np.stack([w.view[f"u{width // 8}"][row].astype(f"u{size}") for row, width in rows], 1)
        memory.write(w, mask, at, np.ascontiguousarray(values[mask]).view(np.uint8), count * size)
        w.cluster.events += 1
    return run


@decodes("bra")
def _(d):
    d.flag("uni")
    d.instruction.kind, d.instruction.target = "branch", (d.take(), list(d.scopes))


@decodes("ret", "exit")
def _(d):
    d.instruction.kind = "exit"


@decodes("trap")
def _(d):
    def run(w, mask):
        raise Fault("trap")
    return run


@decodes("membar", "griddepcontrol", "prefetch", "nanosleep")
def _(d):
    d.mods.clear()
    d.operands.clear()
    return lambda w, mask: None
