"""What a warp does together: shuffles, votes, mma.sync, matrices to and from shared memory, cp.async, barriers, fences.

A unit runs several warps at once: arrays of lanes are [warps, 32] here.
"""

import re

import numpy as np

from . import blackwell, hopper
from .floats import narrow, wide
from .memory import LANES, Fault
from .text import decodes, same, store


@decodes("cp")
def _(d):
    d.need("async")
    if d.flag("bulk"):
        return hopper.bulk(d)
    order = d.flag("commit_group", "wait_group", "wait_all")
    if order:
        d.instruction.kind = "warp"
        keep = d.number() if order == "wait_group" else 0

        def run(w, mask):
            for warp, _ in w.by_warp(mask):
                if order != "wait_group":
                    w.committed[warp].append(w.open[warp])
                    w.open[warp] = []
                while order != "commit_group" and len(w.committed[warp]) > keep:
                    for lanes, at, data in w.committed[warp].pop(0):
                        w.shared.land(w, lanes, at, data)
        return run
    d.flag("ca", "cg")
    d.flag("shared", "shared::cta") or d.unknown("space")
    d.need("global")
    d.flag("L2::128B", "L2::64B", "L2::256B")
    to, origin, size = d.address(), d.address(), d.number()
    valid = d.read(32) if d.operands else None
    if size not in (4, 8, 16):
        d.unknown("size of a copy")

    def start(w, mask):
        count = w.view["u4"][valid] if valid is not None else np.full(w.lanes, size)
        if (count[mask] > size).any():
            raise Fault(f"source size {count[mask].max()} is above {size}")
        data = np.zeros((w.lanes, size), np.uint8)
        for n in np.unique(count[mask]):
            lanes = mask & (count == n)
            if n:
                data[lanes, :n] = w.memory.read(w, lanes, origin(w)[lanes], int(n), min(int(n), size))
        for warp, lanes in w.by_warp(mask):
            at = w.shared.places(to(w)[lanes], size, size)
            w.open[warp].append((lanes, w.shared.expect(w, w.who[lanes][:, None], at), data[lanes]))
    return start


@decodes("bar", "barrier")
def _(d):
    if d.flag("warp"):
        d.need("sync")
        whole(d)
        d.instruction.kind = "warp"

        def meet(w, mask):
            w.clocks.meet(w.who[mask], w.now)
            w.now += 1
        return meet
    if d.flag("cluster"):
        return hopper.cluster_barrier(d)
    d.flag("cta")
    waits = d.flag("sync", "arrive") == "sync"
    d.flag("aligned")
    d.instruction.kind = "barrier"
    number, count = d.read(32), d.read(32) if d.operands else None
    if not waits and count is None:
        d.unknown("form: bar.arrive needs a number of threads")

    def run(w, mask):
        values = [same(w.view["u4"][row], mask, "barrier") if row is not None else None for row in (number, count)]
        return w.cta.arrive(w, mask, *values, waits)
    return run


@decodes("fence")
def _(d):
    proxy, init = d.flag("proxy"), d.flag("mbarrier_init")
    if proxy and not d.flag("async"):
        d.unknown("proxy")
    d.mods.clear()

    def run(w, mask):
        who = w.who[mask]
        if proxy:
            w.clocks.fence(who, w.now)
            w.now += 1
        if proxy or init:
            for bar in w.cta.mbarriers.values():
                bar.shown |= bool((w.clocks.seen[who, bar.agent] >= 1).any())
                bar.fenced |= bool(init) and bar.maker in who
    return run


# Collectives of lanes

def whole(d):
    """A collective's mask of lanes: only all of them."""
    token = d.operands.pop()
    slot = d.slot(token, 32)
    if slot in (d.kernel.constant(32, 0xFFFFFFFF),):
        return None
    d.instruction.reads.append(slot.id)
    return slot.row


def check_whole(w, row, mask):
    if row is not None and (w.view["u4"][row][mask] != 0xFFFFFFFF).any():
        raise Fault("a collective over part of the warp")


def by_lane(row):
    return row.reshape(-1, LANES)


@decodes("shfl")
def _(d):
    d.need("sync")
    mode = d.flag("bfly", "idx", "up", "down")
    d.type("b32")
    members = whole(d)
    d.instruction.kind = "warp"
    to, _, valid = d.take().partition("|")
    to, valid = d.write(32, to.strip()), d.write(0, valid.strip()) if valid else None
    a, b, c = d.read(32), d.read(32), d.read(32)

    def run(w, mask):
        check_whole(w, members, mask)
        lane = np.arange(LANES)
        by, control = by_lane(w.view["u4"][b].astype(int)) & 31, by_lane(w.view["u4"][c].astype(int))
        clamp, segment = control & 31, control >> 8 & 31
        top, low = lane & segment | clamp & ~segment, lane & segment
        source = {"bfly": lane ^ by, "idx": low | by & ~segment, "up": lane - by, "down": lane + by}[mode]
        fits = source >= top if mode == "up" else source <= top
        source = np.where(fits, source, lane)
        store(w, "u4", to, np.take_along_axis(by_lane(w.view["u4"][a]), source, 1).ravel(), mask)
        if valid is not None:
            store(w, "p", valid, fits.ravel(), mask)
    return run


@decodes("vote")
def _(d):
    d.need("sync")
    mode = d.flag("all", "any", "uni", "ballot")
    d.type("b32" if mode == "ballot" else "pred")
    members = whole(d)
    d.instruction.kind = "warp"
    to, (source, negated) = d.write(32 if mode == "ballot" else 0), d.predicate()

    def run(w, mask):
        check_whole(w, members, mask)
        votes = by_lane(w.view["p"][source] ^ negated)
        if mode == "ballot":
            value = (votes.astype(np.uint32) << np.arange(LANES, dtype=np.uint32)).sum(1, dtype=np.uint32)
        else:
            value = votes.any(1) if mode == "any" else votes.all(1) | (mode == "uni") & ~votes.any(1)
        store(w, "u4" if mode == "ballot" else "p", to, np.repeat(value, LANES), mask)
    return run


@decodes("redux")
def _(d):
    d.need("sync")
    operation = d.flag("add", "min", "max", "and", "or", "xor")
    view = "i4" if d.type("u32", "s32", "b32") == "s32" else "u4"
    members = whole(d)
    d.instruction.kind = "warp"
    to, source = d.write(32), d.read(32)
    function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
                "xor": np.bitwise_xor}[operation]

    def run(w, mask):
        check_whole(w, members, mask)
        store(w, view, to, np.repeat(function.reduce(by_lane(w.view[view][source]), 1), LANES), mask)
    return run


@decodes("elect")
def _(d):
    d.need("sync")
    members = whole(d)
    d.instruction.kind = "warp"
    leader, _, chosen = d.take().partition("|")
    leader = d.write(32, leader.strip()) if leader.strip() != "_" else None
    chosen = d.write(0, chosen.strip())

    def run(w, mask):
        check_whole(w, members, mask)
        store(w, "p", chosen, w.thread % LANES == 0, mask)
        if leader is not None:
            store(w, "u4", leader, np.zeros(w.lanes, np.uint32), mask)
    return run


# Matrices

MMA_BITS = {"s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "f16": 16}


def _elements(words, kind):
    """[words, lanes] -> [words, lanes, elements in a word], float64."""
    bits = MMA_BITS[kind]
    codes = words[..., None] >> np.arange(0, 32, bits, dtype=np.uint32) & (1 << bits) - 1
    if bits == 16:
        return wide(np.ascontiguousarray(codes.astype(np.uint16)), kind)
    codes = codes.astype(np.int64)
    return (codes - (codes >> bits - 1 << bits) if kind[0] == "s" else codes).astype(np.float64)


@decodes("mma")
def _(d):
    """d = a b + c. Lane 4g + t; the words of A run over rows (g, g + 8), then over halves of k; those of B over halves of k.

    In float64: integer sums are exact, so is each product of two 16-bit floats.
    """
    if d.flag("block_scale"):
        return blackwell.mma_scaled(d)
    d.need("sync")
    d.flag("aligned")
    m, n, k = map(int, re.match(r"m(\d+)n(\d+)k(\d+)$", d.type()).groups())
    d.need("row", "col")
    result, at, bt, ct = d.type("f32", "s32"), d.type(*MMA_BITS), d.type(*MMA_BITS), d.type("f32", "s32")
    d.instruction.kind = "warp"
    to, a, b, c = [[d.write(32, t) for t in d.tokens()]] + [[d.read(32, t) for t in d.tokens()] for _ in range(3)]
    rows, halves = m // 8, len(b)
    if n != 8 or result != ct or len(a) != rows * halves or k != halves * 4 * 32 // MMA_BITS[at] or len(c) != 2 * rows:
        d.unknown("mma")
    view = "f4" if ct == "f32" else "i4"

    def run(w, mask):
        left = _elements(w.view["u4"][a], at).reshape(halves, rows, w.warps, 8, 4, -1)
        left = left.transpose(2, 1, 3, 0, 4, 5).reshape(w.warps, m, k)
        right = _elements(w.view["u4"][b], bt).reshape(halves, w.warps, 8, 4, -1)
        right = right.transpose(1, 0, 3, 4, 2).reshape(w.warps, k, 8)
        product = (left @ right).reshape(w.warps, rows, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(2 * rows, w.lanes)
        product += w.view[view][c]
        value = narrow(product, "f32") if ct == "f32" else product.astype(np.int64).astype(np.uint32)
        for row, lanes in zip(to, value, strict=True):
            store(w, "u4", row, lanes, mask)
    return run


@decodes("ldmatrix", "stmatrix")
def _(d):
    """1, 2 or 4 matrices of 8 x 8 16-bit values. Lane 8i + r has the address of row r of matrix i; word i of lane 4g + t
    holds row g, columns 2t and 2t + 1 of matrix i; .trans: of its transpose."""
    d.need("sync", "aligned", "m8n8", "b16")
    count, transposed = int(d.type("x1", "x2", "x4")[1:]), d.flag("trans")
    space = d.flag("shared", "shared::cta")
    d.instruction.kind = "warp"
    if d.name == "ldmatrix":
        rows, address = [d.write(32, t) for t in d.tokens()], d.address()
    else:
        address, rows = d.address(), [d.read(32, t) for t in d.tokens()]
    if len(rows) != count:
        d.unknown("number of matrices")

    def lanes_with_address(w, mask):
        return mask if mask is w.full and count == 4 else mask & (w.thread % LANES < 8 * count)

    def load(w, mask):
        lanes = lanes_with_address(w, mask)
        memory, at = w.space(space, address(w), lanes)
        data = np.zeros((w.lanes, 8), np.uint16)
        data[lanes] = memory.read(w, lanes, at, 16, 16).view(np.uint16)
        data = data.reshape(w.warps, 4, 8, 8)[:, :count]
        data = data.swapaxes(2, 3) if transposed else data
        words = np.ascontiguousarray(data).reshape(w.warps, count, LANES, 2).view(np.uint32)[..., 0]
        for i, row in enumerate(rows):
            store(w, "u4", row, words[:, i].ravel(), mask)

    def save(w, mask):
        words = np.stack([w.view["u4"][row] for row in rows]).reshape(count, w.warps, LANES)
        data = np.ascontiguousarray(words.swapaxes(0, 1)).view(np.uint16).reshape(w.warps, count, 8, 8)
        data = data.swapaxes(2, 3) if transposed else data
        padded = np.zeros((w.warps, 4, 8, 8), np.uint16)
        padded[:, :count] = data
        lanes = lanes_with_address(w, mask)
        memory, at = w.space(space, address(w), lanes)
        memory.write(w, lanes, at, padded.reshape(w.lanes, 8)[lanes].view(np.uint8), 16)
        w.cluster.events += 1
    return load if d.name == "ldmatrix" else save
