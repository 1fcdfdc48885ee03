"""What sm_90 adds: mbarriers, bulk copies, clusters, setmaxnreg, wgmma. Section numbers are those of the PTX ISA 9."""

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .floats import FP8, multiply_fp8, narrow, wide
from .machine import RANK, WINDOW
from .memory import LANES, Fault
from .text import decodes, same, store

SPACES = ("shared", "shared::cta", "shared::cluster")
MOST_BYTES = 2**20 - 1                   # of the tx-count, either sign (9.7.13.15.2)


# mbarrier (9.7.13.15)

class MBarrier:
    """Arrivals and bytes that the running phase waits for. Phases count from 0.

    The time of its agent is 1 when it is initialised, and 1 + n when n phases are over.
    """

    def __init__(self, unit, cta, at, count, maker):
        self.cta, self.at, self.count, self.pending = cta, at, count, count
        self.phase = self.bytes = 0
        self.maker = maker                               # the thread that initialised it
        self.fenced = False                              # by the maker's fence.mbarrier_init
        self.shown = False                               # to the async proxy, by a fence
        self.used = False
        self.agent = unit.clocks.agent(f"a bulk copy to CTA {cta.number}")
        unit.clocks.seen[maker, self.agent] = 1
        self.clock = 0                                   # of who arrived in this phase
        self.done = np.zeros_like(unit.clocks.view[:, 0])                # and in those that are over

    def __str__(self):
        return (f"mbarrier at shared {self.at:#x} of CTA {self.cta.number}: phase {self.phase} lacks "
                f"{self.pending} arrivals and {self.bytes} bytes")

    def arrive(self, clock, count):
        self.used = True
        if count > self.pending:
            raise Fault(f"{count} arrivals, but {self}")
        self.clock = np.maximum(self.clock, clock)
        self.pending -= count
        return self._complete()

    def expect(self, size):
        self.used = True
        self.bytes += size
        if abs(self.bytes) > MOST_BYTES:
            raise Fault(f"the transaction count is out of range: {self}")

    def receive(self, size):
        """Bytes have come; whether that ends the phase."""
        self.expect(-size)
        return self._complete()

    def _complete(self):
        if self.pending:
            return False
        if self.bytes < 0:
            raise Fault(f"transaction underflow, more bytes came than were expected: {self}")
        if self.bytes:
            return False
        self.phase += 1
        self.pending = self.count
        self.done = np.maximum(self.done, self.clock)
        self.done[0, self.agent] = 1 + self.phase
        self.clock = 0
        self.cta.cluster.events += 1
        return True


def _each(w, mask, space, addresses):
    """(CTA, offset, lanes) of each address that the lanes in mask have."""
    for address in np.unique(addresses[mask]):
        cta, at = w.cluster.cta_at(w.cta, space, int(address))
        if at % 8:
            raise Fault(f"mbarrier at {at:#x} is not aligned to 8")
        yield cta, at, mask & (addresses == address)


def _mbarrier(w, cta, at, who):
    """The one that is there, if these threads can know of it."""
    if at not in cta.mbarriers:
        raise Fault(f"no mbarrier was initialised at shared {at:#x} of CTA {cta.number}")
    bar = cta.mbarriers[at]
    if (w.clocks.seen[who, bar.agent] < 1).any():
        raise Fault(f"use of the mbarrier at shared {at:#x} races: {w.clocks.name(bar.maker)} initialised it "
                    f"with no barrier between")
    return bar


@decodes("mbarrier")
def _(d):
    action = d.flag("init", "inval", "arrive", "test_wait", "try_wait", "expect_tx", "complete_tx")
    expects = action == "arrive" and d.flag("expect_tx")
    relaxed, parity = d.flag("relaxed"), d.flag("parity")
    d.flag("release", "acquire")
    d.flag("cta", "cluster")
    space = d.flag(*SPACES)
    d.need("b64")
    if action in ("init", "inval"):
        return _make(d, space, d.address(), d.read(32) if action == "init" else None)
    if action in ("test_wait", "try_wait"):
        return _wait(d, space, relaxed, parity)
    if action in ("expect_tx", "complete_tx"):
        address, size = d.address(), d.read(32)

        def count(w, mask):
            for cta, at, lanes in _each(w, mask, space, address(w)):
                total = int(w.view["u4"][size][lanes].sum())
                bar = _mbarrier(w, cta, at, w.who[lanes])
                bar.expect(total) if action == "expect_tx" else bar.receive(total)
                w.cluster.events += 1
        return count
    if action != "arrive":
        d.unknown("operation of an mbarrier")
    state, address = d.take(), d.address()
    state = None if state == "_" else d.write(64, state)
    number = d.read(32) if d.operands else None

    def run(w, mask):
        phases = np.zeros(w.lanes, np.uint64)
        for cta, at, lanes in _each(w, mask, space, address(w)):
            who = w.who[lanes]
            bar = _mbarrier(w, cta, at, who)
            if state is not None and cta is not w.cta:
                raise Fault("the mbarrier of another CTA returns no state")
            phases[lanes] = bar.phase
            values = w.view["u4"][number][lanes] if number is not None else np.ones(len(who), int)
            if expects:
                bar.expect(int(values.sum()))
            bar.arrive(0 if relaxed else w.release(who), len(who) if expects else int(values.sum()))
            w.cluster.events += 1
        if state is not None:
            store(w, "u8", state, phases, mask)
    return run


def _make(d, space, address, count):
    """mbarrier.init, or without a count mbarrier.inval."""
    def run(w, mask):
        for cta, at, lanes in _each(w, mask, space, address(w)):
            if cta is not w.cta or lanes.sum() > 1:
                raise Fault("an mbarrier is initialised by one thread of its CTA")
            if count is None:
                _mbarrier(w, cta, at, w.who[lanes])
                cta.shared.free_barrier(w, lanes, at)
                del cta.mbarriers[at]
            else:
                number = int(w.view["u4"][count][lanes][0])
                if not 0 < number < 2**20:
                    raise Fault(f"an mbarrier for {number} arrivals")
                cta.shared.claim_barrier(w, lanes, at)
                cta.mbarriers[at] = MBarrier(w, cta, at, number, int(w.who[lanes][0]))
            w.cluster.events += 1
    return run


def _wait(d, space, relaxed, parity):
    """A poll: false lets other warps go on before the next try. try_wait may take its time, but need not."""
    d.instruction.kind = "poll"
    done, address, phase = d.write(0), d.address(), d.read(32 if parity else 64)
    if d.operands:
        d.take()                                         # how long to wait at most

    def run(w, mask):
        ready = np.zeros(w.lanes, bool)
        for cta, at, lanes in _each(w, mask, space, address(w)):
            if cta is not w.cta:
                raise Fault("waits at the mbarrier of another CTA")
            bar = _mbarrier(w, cta, at, w.who[lanes])
            bar.used = True
            if parity:
                values = w.view["u4"][phase]
                if (values[lanes] > 1).any():
                    raise Fault(f"parity {values[lanes].max()}")
                over = lanes & (values != bar.phase & 1)
            else:
                over = lanes & (w.view["u8"][phase] < bar.phase)
            ready |= over
            if not relaxed and over.any() and bar.phase:
                w.clocks.acquire(w.who[over], bar.done)
        store(w, "p", done, ready, mask)
        return bool(ready[mask].all())
    return run


# cp.async.bulk

@dataclass
class Copy:
    """On its way into the shared memory of a CTA."""
    cta: object
    start: int
    data: np.ndarray
    bar: MBarrier
    phase: int
    where: str

    def land(self):
        if self.bar.phase != self.phase:
            raise Fault(f"{self.where}: transaction underflow, its bytes came after phase {self.phase}, "
                        f"which did not expect them: {self.bar}")
        self.cta.shared.land_bulk(self.start, self.data, self.bar.agent, 2 + self.phase)
        return self.bar.receive(len(self.data))


def bulk(d):
    """cp.async.bulk: global to shared memory, counted by an mbarrier."""
    if d.flag("prefetch"):
        d.mods.clear()
        d.operands.clear()
        return lambda w, mask: None
    space = d.flag("shared::cluster", "shared::cta") or d.unknown("target of a bulk copy")
    d.need("global", "mbarrier::complete_tx::bytes")
    many, hint = d.flag("multicast::cluster"), d.flag("L2::cache_hint")
    to, origin, size, bar = d.address(), d.address(), d.read(32), d.address()
    ranks = d.read(16) if many else None
    if hint:
        d.read(64)

    def run(w, mask):
        targets, sources, bars, sizes = to(w), origin(w), bar(w), w.view["u4"][size]
        for lane in np.flatnonzero(mask):
            one = w.full & (np.arange(w.lanes) == lane)
            count = int(sizes[lane])
            if count % 16 or not count or targets[lane] % 16 or sources[lane] % 16:
                raise Fault(f"bulk copy of {count} bytes from {sources[lane]:#x} to {targets[lane]:#x}: not in 16 bytes")
            data = w.memory.read_bulk(w, one, int(sources[lane]), count)
            cta, start = w.cluster.cta_at(w.cta, space, int(targets[lane]))
            other, at = w.cluster.cta_at(w.cta, space, int(bars[lane]))
            chosen = [cta]
            if many:                                     # the same offsets in each CTA of the mask
                bits = int(w.view["u2"][ranks][lane])
                if not bits or bits >> len(w.cluster.ctas):
                    raise Fault(f"multicast to CTAs {bits:#b} of {len(w.cluster.ctas)}")
                chosen = [w.cluster.ctas[i] for i in range(len(w.cluster.ctas)) if bits >> i & 1]
            elif other is not cta:
                raise Fault("the mbarrier of a bulk copy lies in another CTA than its target")
            for cta in chosen:
                if cta.left:
                    raise Fault(f"multicast to rank {cta.rank}, all of whose threads have exited")
                counter = _mbarrier(w, cta, at, w.who[one])
                if not counter.shown:
                    raise Fault("the mbarrier of the copy was initialised with no fence.mbarrier_init after it")
                counter.used = True
                cta.shared.expect_bulk(w, int(w.who[lane]), start, count)
                w.cluster.copies.append(Copy(cta, start, data, counter, counter.phase,
                                             f"{w.kernel.name}, {d.instruction.where()}"))
        w.cluster.events += 1
    return run


@decodes("createpolicy")
def _(d):
    d.mods.clear()
    row = d.write(64)
    d.operands.clear()
    return lambda w, mask: store(w, "u8", row, np.uint64(1), mask)


# Clusters

def cluster_barrier(d):
    waits = d.flag("arrive", "wait") == "wait"
    relaxed = d.flag("relaxed")
    d.flag("release", "acquire")
    d.flag("aligned")
    d.instruction.kind = "barrier"

    def run(w, mask):
        w.cluster.events += 1
        who = w.who[mask]
        if waits:
            return w.cluster.barrier.wait(w, mask, who)
        w.cluster.barrier.arrive(who, _fenced_mbarriers(w, who) if relaxed else w.release(who))
    return run


def _fenced_mbarriers(w, who):
    """What a relaxed arrival hands on: mbarriers that these threads have initialised and then fenced, no stores."""
    clock = np.zeros_like(w.clocks.view[:, 0])
    for bar in w.cta.mbarriers.values():
        if bar.fenced and bar.maker in who:
            clock[0, bar.agent] = 1
    return clock


@decodes("mapa", "getctarank")
def _(d):
    space, kind = d.flag("shared::cluster"), d.type("u32", "u64")
    if d.name == "mapa":
        width = int(kind[1:])
        to, address, rank = d.write(width), d.read(width), d.read(32)
        view, window = f"u{width // 8}", 0 if space else WINDOW["shared"]

        def run(w, mask):
            value, ranks = w.view[view][address].astype(np.int64) - window, w.view["u4"][rank]
            if (ranks[mask] >= len(w.cluster.ctas)).any():
                raise Fault(f"rank {ranks[mask].max()} of a cluster of {len(w.cluster.ctas)}")
            value = (value & (1 << RANK) - 1) + (ranks.astype(np.int64) + 1 << RANK) + window
            store(w, view, to, value.astype(view), mask)
        return run
    to, address = d.write(32), d.read(32 if space and kind == "u32" else 64)

    def rank_of(w, mask):
        value = w.view["u4" if space and kind == "u32" else "u8"][address].astype(np.int64) >> RANK
        value &= 255
        store(w, "u4", to, np.where(value, value - 1, w.cta.rank).astype(np.uint32), mask)
    return rank_of


# setmaxnreg

@decodes("setmaxnreg")
def _(d):
    """Registers move between warpgroups through a pool of the CTA; `inc` waits until there are enough."""
    d.instruction.kind = "group"
    more = d.flag("inc", "dec") == "inc"
    d.need("sync", "aligned", "u32")
    count = d.number()
    if not {"maxntid", "reqntid", "maxnreg"} & d.kernel.tuning.keys():
        d.unknown("effect: the kernel has no launch bounds")
    if count % 8 or not 24 <= count <= 256:
        raise Fault(f"setmaxnreg {count}: needs a multiple of 8 from 24 to 256")

    def run(w, mask):
        change = count - w.registers
        if change and (change > 0) != more:
            raise Fault(f"setmaxnreg.{'inc' if more else 'dec'} {count}, but the warps have {w.registers} registers")
        if change * w.warps > w.cta.spare:
            return False
        w.cta.spare -= change * w.warps
        w.registers = count
        w.cluster.events += 1
    return run


# wgmma (9.7.15)

@dataclass
class Product:
    """A wgmma on its way."""
    registers: tuple                     # ids of all its registers
    target: tuple                        # ids of the accumulator's
    time: int


class Wgmma:
    """The wgmmas of a warpgroup. `values` holds accumulators that no wait has delivered: target -> (rows, [64, n])."""

    def __init__(self, unit):
        first = unit.thread[0] // LANES
        self.agent = unit.clocks.agent(f"wgmma of warps {first}-{first + 3} of CTA {unit.cta.number}")
        self.time = self.fenced = 0      # wgmmas started; tick of the last wgmma.fence
        self.open, self.groups, self.values = [], [], {}
        self.shapes = {}                 # register -> (shape, tick) of the wgmma that wrote it last

    def check(self, unit, target, fragment, shape):
        """9.7.15.7.1: a fence between any use of its registers and a wgmma, but not between accumulations of one shape."""
        if not self.fenced:
            raise Fault("no wgmma.fence before the first wgmma")
        for register in (*target, *fragment):
            if unit.last[register] > self.fenced:
                raise Fault("a register of this wgmma was used after the last wgmma.fence")
        for register in target:
            other, tick = self.shapes.get(register, (shape, 0))
            if other != shape and tick > self.fenced:
                raise Fault(f"the accumulator was written as {other} and is used as {shape} with no wgmma.fence between")
        if unit.flying:
            flying = {register: product for group in [*self.groups, self.open] for product in group
                      for register in product.registers}
            for register in target:
                if register in flying and flying[register].target != target:
                    raise Fault("the accumulator overlaps with registers of a wgmma that nobody has waited for")
            for register in fragment:
                if register in flying and register in flying[register].target:
                    raise Fault("A is the accumulator of a wgmma that nobody has waited for")

    def start(self, unit, product, rows, value, shape):
        self.values[product.target] = rows, value
        self.open.append(product)
        for register in product.registers:
            unit.flying[register] = unit.flying.get(register, 0) + 1
        for register in product.target:
            self.shapes[register] = shape, unit.tick

    def wait(self, unit, keep):
        while len(self.groups) > keep:
            for product in self.groups.pop(0):
                for register in product.registers:
                    unit.flying[register] -= 1
                    if not unit.flying[register]:
                        del unit.flying[register]
                unit.clocks.seen[unit.who, self.agent] = product.time
                if product.target[0] not in unit.flying:
                    rows, value = self.values.pop(product.target)
                    unit.view["f4"][rows] = _to_registers(value)
                    for register in product.target:
                        unit.known[register] = True


def _to_registers(value):
    """D [64, n] -> [n / 2 registers, 128 lanes]: register 4j + 2h + e of lane 4g + t of warp w is row 16w + 8h + g, column
    8j + 2t + e (9.7.15.5.1.1, figures of D)."""
    columns = value.shape[1] // 8
    return value.reshape(4, 2, 8, columns, 4, 2).transpose(3, 1, 5, 0, 2, 4).reshape(-1, 4 * LANES)


def _from_registers(rows):
    columns = len(rows) // 4
    return rows.reshape(columns, 2, 2, 4, 8, 4).transpose(3, 1, 4, 0, 5, 2).reshape(64, 8 * columns)


def _fragment(words):
    """A [4 registers, 128 lanes] -> bytes [64, 32]: register 2c + h of lane 4g + t of warp w is row 16w + 8h + g, bytes
    16c + 4t to 16c + 4t + 3 of k (9.7.15.5.1.1, figures of A)."""
    parts = np.ascontiguousarray(words).view(np.uint8).reshape(2, 2, 4, 8, 4, 4)
    return parts.transpose(2, 1, 3, 0, 4, 5).reshape(64, 32)


SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}         # descriptor bits 62, 63 -> bytes of a row of the swizzle atom


@lru_cache(maxsize=256)
def _operand(descriptor, rows, major):
    """Places of a matrix operand [rows, 32 bytes of k] in shared memory (9.7.15.5.1.2, canonical layouts).

    K-major: 8 rows of one atom follow each other, and the next 8 are a stride further; without a swizzle an atom is 16 bytes
    of k wide, and the other 16 a leading offset further. MN-major (16-bit only): k takes the place of the rows. The swizzle
    is an XOR of address bits 4.. with bits 7.., counted from where the pattern starts.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    base, width = descriptor >> 49 & 7, SWIZZLES[descriptor >> 62]
    row, byte = np.arange(rows)[:, None], np.arange(32)[None]
    if major == "k":
        if width == 16:
            offset = row // 8 * stride + row % 8 * 16 + byte // 16 * leading + byte % 16
        else:
            offset = row // 8 * stride + row % 8 * width + byte
    else:
        k, byte = byte // 2, row * 2 + byte % 2
        if width == 16:
            offset = byte % 16 + byte // 16 * stride + k % 8 * 16 + k // 8 * leading
        else:
            offset = byte % width + byte // width * leading + k % 8 * width + k // 8 * stride
    address = start + offset
    places = address ^ ((address >> 7) - base & width // 16 - 1) << 4
    places.flags.writeable = False
    return places


@decodes("wgmma")
def _(d):
    d.kernel.in_flight = True
    d.instruction.kind = "group"
    action = d.flag("fence", "commit_group", "wait_group", "mma_async")
    d.need("sync", "aligned")
    if action == "mma_async":
        return _mma_async(d)
    keep = d.number() if action == "wait_group" else 0

    def run(w, mask):
        w.wgmma = w.wgmma or Wgmma(w)
        if action == "fence":
            w.wgmma.fenced = w.tick
        elif action == "commit_group":
            w.wgmma.groups.append(w.wgmma.open)
            w.wgmma.open = []
        else:
            w.wgmma.wait(w, keep)
        w.cluster.events += 1
    return run


def _mma_async(d):
    """d = a b + d or, where scale-d is false, a b; a in registers or shared memory, b in shared memory (9.7.15.5.2)."""
    shape = d.type()
    n = int(re.match(r"m64n(\d+)k\d+$", shape)[1])
    d.type("f32")
    at, bt = d.type(*FP8, "bf16", "f16"), d.type(*FP8, "bf16", "f16")
    if n % 8 or not 8 <= n <= 256 or (at in FP8) != (bt in FP8) or at not in FP8 and at != bt or \
            shape.partition("k")[2] != ("32" if at in FP8 else "16"):
        d.unknown("shape or types")
    target = [d.slot(token, 32) for token in d.tokens()]
    if len(target) != n // 2:
        d.unknown(f"form: {len(target)} registers for {n} columns")
    a, fragment = d.tokens(), []
    if len(a) == 1:
        descriptor = d.read(64, a[0])
    else:
        fragment = [d.slot(token, 32) for token in a]
    other = d.read(64)
    scale = d.predicate()
    signs = [d.number(), d.number()]
    majors = ["mn" if at not in FP8 and d.number() else "k" for _ in range(2 - bool(fragment))]
    major_a, major_b = majors if not fragment else ("k", majors[0])
    rows, parts = [slot.row for slot in target], [slot.row for slot in fragment]
    ids, part_ids = tuple(slot.id for slot in target), tuple(slot.id for slot in fragment)

    def value(codes, kind, sign):
        bits = codes if kind in FP8 else np.ascontiguousarray(codes).view(np.uint16)
        return wide(bits, kind) * sign

    def run(w, mask):
        w.wgmma = w.wgmma or Wgmma(w)
        group = w.wgmma
        adds = same(w.view["p"][scale[0]] ^ scale[1], mask, "scale-d")
        for register in (*part_ids, *(ids if adds and ids not in group.values else ())):
            if not w.known[register]:
                raise Fault("a register of this wgmma was never written")
        group.check(w, ids, part_ids, shape)
        group.time += 1

        def matrix(row, count, major):
            places = _operand(same(w.view["u8"][row], mask, "matrix descriptor"), count, major)
            return w.shared.read_async(w, w.who, group.agent, group.time, places)
        left = _fragment(w.view["u4"][parts]) if fragment else matrix(descriptor, 64, major_a)
        right = matrix(other, n, major_b)
        if not adds:
            before = np.zeros((64, n), np.float32)
        elif ids in group.values:
            before = group.values[ids][1]
        else:
            before = _from_registers(w.view["f4"][rows])
        if at in FP8:
            flips = [np.uint8(0x80 if sign < 0 else 0) for sign in signs]
            total = multiply_fp8(left ^ flips[0], right ^ flips[1], before, (at, bt), w.launch.fp8_bits)
        else:
            total = value(left, at, signs[0]) @ value(right, bt, signs[1]).T + before
            total = narrow(total, "f32").view(np.float32)
        group.start(w, Product(ids + part_ids, ids, group.time), rows, total, shape)
        w.cluster.events += 1
    return run
