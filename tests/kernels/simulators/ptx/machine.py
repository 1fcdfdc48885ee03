"""Who runs when: clusters one after the other, their CTAs together, warps in units of up to four, which is a warpgroup.

A unit executes on arrays of all its lanes. Lanes that branch apart become groups; the group with the lowest pc runs first,
which joins them again at the end of an if or a loop. A collective waits until the warp, or the warpgroup, is complete. A
round gives every unit a turn, until its lanes wait, have polled in vain, or are gone. Copies in the background land when
nothing else moves, or, if the order is a seed, at random. A second round without any event is a deadlock.
"""

import random

import numpy as np

from .memory import CONST, LANES, LIVE, RED_ZONE, Clocks, Fault, Local, Memory, Shared

SHARED_BASE = 1024                   # so that a null pointer is outside
GLOBAL_BASE = 1 << 40                # generic addresses: windows of shared and local memory lie below
WINDOW = {"shared": 1 << 32, "local": 2 << 32}
RANK = 24                            # shared::cluster addresses: 1 + rank of a CTA above this bit, or 0 for the own one
MAX_STEPS = 20_000_000               # of one unit; more is an endless loop
GROUP = 4                            # warps of a unit
REGISTERS = 65536                    # of an SM


def three(size):
    size = (size,) if isinstance(size, int) else tuple(size)
    return size + (1,) * (3 - len(size))


def product(size):
    return size[0] * size[1] * size[2]


def spread(number, size):
    """(x, y, z) of the number-th of `size`."""
    return number % size[0], number // size[0] % size[1], number // (size[0] * size[1])


def _arrays(args):
    """Every array that the arguments will put into memory."""
    for value in args:
        if isinstance(value, np.ndarray):
            yield value
        elif isinstance(value, list):
            yield from _arrays(value)
            yield np.zeros(len(value), np.uint64)


class Launch:
    def __init__(self, kernel, grid, block, shared_bytes, args, order, cluster, fp8_bits):
        self.kernel, self.grid, self.block, self.order = kernel, grid, block, order
        self.random = random.Random(order)
        self.shared_bytes, self.fp8_bits = shared_bytes, fp8_bits
        self.arrays = []
        fixed = kernel.tuning.get("reqnctapercluster")
        self.cluster = three(fixed) if fixed else cluster
        self._check(cluster)
        if len(args) != len(kernel.parameters):
            raise Fault(f"{kernel.name}: got {len(args)} arguments, takes {len(kernel.parameters)}")
        everywhere = [v for v in kernel.module.variables if v[0] in ("global", "const")]
        size = sum(array.nbytes + 3 * RED_ZONE for array in _arrays(args))
        self.memory = Memory("global", GLOBAL_BASE, size + sum(v[2] + 2 * RED_ZONE for v in everywhere) + RED_ZONE)
        self.symbols = {}
        for space, name, size, align, data in everywhere:
            self.symbols[name] = self.memory.claim(size, max(align, 16), LIVE if space == "global" else CONST, data)
        self.parameters = np.zeros(kernel.parameter_bytes, np.uint8)
        for (name, (at, size)), value in zip(kernel.parameters.items(), args, strict=True):
            self.parameters[at:at + size] = np.frombuffer(self._argument(name, value, size), np.uint8)
            self.symbols[name] = at

    def _check(self, cluster):
        name, threads = self.kernel.name, product(self.block)
        most = product(three(self.kernel.tuning.get("maxntid") or self.kernel.tuning.get("reqntid") or 1024))
        if threads % LANES or threads > most:
            raise Fault(f"{name}: block {self.block} is no multiple of {LANES} threads, or more than {most}")
        if product(cluster) > 1 and self.cluster != cluster:
            raise Fault(f"{name}: launched in clusters of {cluster}, but made for {self.cluster}")
        if any(n % c for n, c in zip(self.grid, self.cluster, strict=True)):
            raise Fault(f"{name}: grid {self.grid} is no multiple of the cluster {self.cluster}")

    def _argument(self, name, value, size):
        if isinstance(value, list):
            members = b"".join(self._argument(name, item, 8) for item in value)
            value = np.frombuffer(members, np.uint8) if size == 8 else members.ljust(size, b"\0")
        if isinstance(value, np.ndarray):
            value = self._place(name, value)
        if isinstance(value, bytes):
            raw = value
        elif isinstance(value, float):
            raw = np.array(value, f"f{size}").tobytes()
        else:
            raw = (int(value) & (1 << 8 * size) - 1).to_bytes(size, "little") if size <= 8 else b""
        if len(raw) != size:
            raise Fault(f"{self.kernel.name}: argument {name} has {len(raw)} bytes, needs {size}")
        return raw

    def _place(self, name, array):
        """The address of an array; passed twice, it is the same memory."""
        if not array.flags.c_contiguous:
            raise Fault(f"{self.kernel.name}: argument {name} is not contiguous")
        for other, at in self.arrays:
            if other.ctypes.data == array.ctypes.data and other.nbytes == array.nbytes:
                return GLOBAL_BASE + at
            if np.may_share_memory(other, array):
                raise Fault(f"{self.kernel.name}: argument {name} overlaps with another without being the same")
        address = self.memory.claim(array.nbytes, state=LIVE if array.flags.writeable else CONST,
                                    data=array.reshape(-1).view(np.uint8))
        self.arrays.append((array, address - GLOBAL_BASE))
        return address

    def run(self):
        steps = 0
        clusters = tuple(n // c for n, c in zip(self.grid, self.cluster, strict=True))
        try:
            for number in range(product(clusters)):
                steps += Cluster(self, number, spread(number, clusters)).run()
        finally:
            for array, at in self.arrays:
                if array.flags.writeable:
                    array.reshape(-1).view(np.uint8)[:] = self.memory.bytes[at:at + array.nbytes]
        return steps


class Cluster:
    def __init__(self, launch, number, place):
        self.launch, self.kernel, self.place = launch, launch.kernel, place
        self.events = 0                          # whatever may let another warp go on
        threads, size = product(launch.block), product(launch.cluster)
        self.clocks = Clocks(size, threads)
        launch.memory.cluster = number * size * threads
        self.copies = []                         # Copy, on their way
        self.barrier = ClusterBarrier(self, size * threads)
        self.ctas = [Cta(self, rank, threads) for rank in range(size)]
        self.units = [unit for cta in self.ctas for unit in cta.units]

    def run(self):
        idle = 0
        while True:
            before, order = self.events, list(self.units)
            if self.launch.order == "reverse":
                order.reverse()
            elif self.launch.order != "forward":
                self.launch.random.shuffle(order)
                if self.copies and self.launch.random.random() < 0.5:
                    self._land()
            for unit in order:
                unit.run()
            if all(unit.done for unit in self.units):
                return sum(unit.steps for unit in self.units)
            idle = 0 if self.events != before or self._land() else idle + 1
            if idle == 2:
                self._deadlock()

    def _land(self):
        """Lets copies land until an mbarrier ends its phase; whether there was any."""
        landed = False
        while self.copies:
            landed = True
            order = self.launch.order
            at = {"forward": 0, "reverse": -1}.get(order)
            copy = self.copies.pop(self.launch.random.randrange(len(self.copies)) if at is None else at)
            if copy.land():
                break
        self.events += landed
        return landed

    def cta_at(self, cta, space, address):
        """(CTA, offset) of a shared address. Space None is a generic one."""
        if space is None:
            address -= WINDOW["shared"]
        rank = (address >> RANK) - 1
        if rank >= len(self.ctas) or address < 0:
            raise Fault(f"shared address {address:#x} is outside of the cluster")
        other = self.ctas[rank] if rank >= 0 else cta
        if other is not cta and space in ("shared", "shared::cta"):
            raise Fault(f"address {address:#x} of another CTA in shared::cta")
        if other.left:
            raise Fault(f"shared memory of rank {other.rank}, all of whose threads have exited")
        return other, address & (1 << RANK) - 1

    def _deadlock(self):
        lines = [f"\n    {text}" for unit in self.units for text in unit.places()]
        bars = [f"\n    {bar}" for cta in self.ctas for bar in cta.mbarriers.values() if bar.used]
        raise Fault(f"{self.kernel.name}: deadlock, the warps wait at different places:{''.join(lines + bars)}")


class ClusterBarrier:
    """barrier.cluster: each thread arrives, then waits, in turn."""

    def __init__(self, cluster, threads):
        self.cluster = cluster
        self.arrived, self.may_pass, self.gone = (np.zeros(1 + threads, bool) for _ in range(3))
        self.waiting = []                        # (unit, pc, mask)
        self.clock, self.handed = 0, None

    def arrive(self, who, clock):
        if (self.arrived | self.may_pass)[who].any():
            raise Fault("barrier.cluster.arrive twice with no barrier.cluster.wait between")
        self.clock = np.maximum(self.clock, clock)
        self.arrived[who] = True
        self.complete()

    def wait(self, unit, mask, who):
        """Whether they have to."""
        if self.may_pass[who].all():
            self._pass(unit, who)
            return False
        if not self.arrived[who].all():
            raise Fault("barrier.cluster.wait without barrier.cluster.arrive before it")
        self.waiting.append((unit, unit.pc, mask))
        return True

    def _pass(self, unit, who):
        self.may_pass[who] = False
        unit.clocks.acquire(who, self.handed)

    def complete(self):
        if self.arrived.any() and (self.arrived | self.gone)[1:].all():
            self.cluster.events += 1
            self.handed, self.clock = self.clock, 0
            self.may_pass, self.arrived = self.arrived, np.zeros_like(self.arrived)
            waiting, self.waiting = self.waiting, []
            for unit, pc, mask in waiting:
                self._pass(unit, unit.who[mask])
                unit.go_on(pc, mask)


class Named:
    """A barrier of bar.sync and bar.arrive, 0..15, from the first arrival to the last."""

    def __init__(self, expected):
        self.expected, self.count, self.clock = expected, 0, 0
        self.warps, self.waiting, self.pcs = set(), [], set()


class Cta:
    def __init__(self, cluster, rank, threads):
        launch = cluster.launch
        self.cluster, self.rank, self.threads = cluster, rank, threads
        kernel, inside = launch.kernel, spread(rank, launch.cluster)
        self.place = tuple(p * c + i for p, c, i in zip(cluster.place, launch.cluster, inside, strict=True))
        self.inside = inside
        self.number = self.place[0] + launch.grid[0] * (self.place[1] + launch.grid[1] * self.place[2])
        names = {value for _, value in kernel.constants}
        variables = [v for v in kernel.module.variables + kernel.variables if v[1] in names]
        fixed = [v for v in variables if v[0] == "shared" and v[2]]
        dynamic = [v for v in variables if v[0] == "shared" and not v[2]]        # extern arrays: all are one
        total = sum(v[2] + v[3] + 2 * RED_ZONE for v in fixed) + sum(v[3] for v in dynamic)
        total += SHARED_BASE + launch.shared_bytes + 2 * RED_ZONE
        self.shared = Shared(total, product(launch.cluster) * threads // LANES)
        self.shared.top = SHARED_BASE
        symbols = dict(launch.symbols)
        for _, name, size, align, _ in fixed:
            symbols[name] = self.shared.claim(size, max(align, 16))
        if dynamic:
            start = self.shared.claim(launch.shared_bytes, max(16, *(v[3] for v in dynamic)))
            symbols |= {name: start for _, name, *_ in dynamic}
        self.named, self.mbarriers, self.left = {}, {}, False
        ctas_per_sm = kernel.tuning.get("minnctapersm", [1])[0]
        self.registers = kernel.tuning.get("maxnreg", [min(REGISTERS // (threads * ctas_per_sm) // 8 * 8, 256)])[0]
        self.spare = 0                           # registers per thread, times warps, that setmaxnreg has given back
        local = [v for v in variables if v[0] == "local"]
        warps = threads // LANES
        self.units = [Unit(self, first, min(GROUP, warps - first), symbols, local) for first in range(0, warps, GROUP)]

    def arrive(self, unit, mask, number, count, waits):
        """bar.sync (waits) or bar.arrive; whether these warps have to wait. count None: all threads of the CTA"""
        if not 0 <= number < 16 or (count is not None and (count % LANES or not 0 < count <= self.threads)):
            raise Fault(f"barrier {number} for {count} threads: there are 16, for whole warps of this CTA")
        who, warps = unit.who[mask], set(unit.slot[mask].tolist())
        barrier = self.named.setdefault(number, Named(self.threads if count is None else count))
        if barrier.expected != (self.threads if count is None else count):
            raise Fault(f"barrier {number} for {count} threads, while others arrived at it for {barrier.expected}")
        if barrier.warps & warps:
            raise Fault(f"a warp arrives twice at barrier {number}")
        self.cluster.events += 1
        barrier.warps |= warps
        barrier.pcs.add(unit.pc)
        barrier.count += len(who)
        barrier.clock = np.maximum(barrier.clock, unit.release(who))
        if waits:
            barrier.waiting.append((unit, unit.pc, mask))
        if barrier.count < barrier.expected:
            return waits
        if barrier.count > barrier.expected:
            raise Fault(f"{barrier.count} threads arrive at barrier {number}, which is for {barrier.expected}")
        if count is None and len(barrier.pcs) > 1:
            lines = "; ".join(self.cluster.kernel.code[pc].where() for pc in sorted(barrier.pcs))
            raise Fault(f"the warps wait at different places: {lines}")
        del self.named[number]
        for other, pc, lanes in barrier.waiting:
            self.cluster.clocks.acquire(other.who[lanes], barrier.clock)
            if other is not unit or pc != unit.pc:
                other.go_on(pc, lanes)
            elif (lanes & ~mask).any():
                other.go_on(pc, lanes & ~mask)
        return False

    def leave(self):
        """All threads are gone."""
        name = self.cluster.kernel.name
        for copy in self.cluster.copies:
            if copy.cta is self:
                raise Fault(f"{name}: CTA {self.number} ends with a bulk copy on its way, {copy.where}")
        for bar in self.mbarriers.values():
            if bar.bytes:
                raise Fault(f"{name}: CTA {self.number} ends, but {bar}")
        self.left = True


class Unit:
    def __init__(self, cta, first, warps, symbols, local):
        cluster = cta.cluster
        kernel = cluster.kernel
        self.cta, self.cluster, self.clocks, self.launch = cta, cluster, cluster.clocks, cluster.launch
        self.kernel, self.code = kernel, kernel.code
        self.memory, self.shared = self.launch.memory, cta.shared
        self.lanes, self.warps = LANES * warps, warps
        self.full = np.ones(self.lanes, bool)    # compared by identity: the fast path of a unit that is all together
        self.thread = first * LANES + np.arange(self.lanes)
        self.who = 1 + cta.rank * cta.threads + self.thread
        self.slot = (self.who - 1) // LANES
        self.bit = np.uint32(1) << (self.thread % LANES).astype(np.uint32)
        self.now, self.tick, self.steps = 1, 1, 0        # for other threads; instructions executed; times warps
        self.groups, self.parked, self.waiting = {0: self.full}, {}, {}     # pc -> mask
        self.rested, self.done = set(), False
        self.open, self.committed = [[] for _ in range(warps)], [[] for _ in range(warps)]      # cp.async, per warp
        self.registers = cta.registers
        self.wgmma = None                        # hopper.Wgmma, once there is one
        self.flying = {}                         # id of a register -> how many wgmmas on their way have it
        self.last = [0] * kernel.ids if kernel.in_flight else []      # id -> tick of its last use
        files = {width: np.zeros((count, self.lanes), f"u{width // 8}" if width else bool)
                 for width, count in kernel.rows.items()}
        self.view = {"p": files[0]}
        for width in (16, 32, 64):
            self.view |= {f"{kind}{width // 8}": files[width].view(f"{kind}{width // 8}") for kind in "uif"}
        self.known = [False] * kernel.ids        # registers all lanes have written
        self.partly = {}                         # id -> mask
        symbols = symbols | {name: WINDOW["local"] for _, name, *_ in local}
        for (width, value), slot in kernel.constants.items():
            if isinstance(value, str):
                value = self._special(value) if value[0] == "%" and value not in symbols else symbols.get(value)
                if value is None:
                    continue                     # a name nobody declared: reading it is a Fault
            files[width][slot.row] = value
            self.known[slot.id] = True
        self.local, self.frame = None, sum(v[2] + 2 * RED_ZONE for v in local)
        if local:
            self.local = Local("local", 0, self.frame * self.lanes)
            for _ in range(self.lanes):
                start = self.local.top
                for _, _, size, align, _ in local:
                    self.local.claim(size, align)
                self.local.top = start + self.frame

    def _special(self, name):
        launch, lane = self.launch, self.thread % LANES
        one = np.uint64(1)
        bit = one << lane.astype(np.uint64)
        size = product(launch.cluster)
        values = {"laneid": lane, "warpid": self.thread // LANES, "nwarpid": self.cta.threads // LANES,
                  "lanemask_eq": bit, "lanemask_lt": bit - one, "lanemask_le": 2 * bit - one,
                  "lanemask_gt": 2**32 - 2 * bit, "lanemask_ge": 2**32 - bit,
                  "cluster_ctarank": self.cta.rank, "cluster_nctarank": size, "is_explicit_cluster": size > 1}
        triples = {"tid": spread(self.thread, launch.block), "ntid": launch.block, "ctaid": self.cta.place,
                   "nctaid": launch.grid, "cluster_ctaid": self.cta.inside, "cluster_nctaid": launch.cluster,
                   "clusterid": self.cluster.place,
                   "nclusterid": tuple(n // c for n, c in zip(launch.grid, launch.cluster, strict=True))}
        for key, triple in triples.items():
            values |= {f"{key}.{axis}": n for axis, n in zip("xyz", triple, strict=True)}
        return values.get(name[1:])

    # time

    def release(self, who):
        """What these threads hand on; what they do from now on is not part of it."""
        clock = self.clocks.release(who, self.now)
        self.now += 1
        return clock

    def low(self):
        """Per warp, the time up to which every lane has seen what the others did."""
        who = self.who.reshape(self.warps, LANES)
        return self.clocks.seen[who[:, :, None], who[:, None]].min((1, 2))

    # execution

    def run(self):
        """Until every lane waits, has polled in vain, or is gone."""
        self.rested.clear()
        while not self.done:
            ready = self.groups.keys() - self.rested
            if not ready:
                break
            pc = min(ready)
            mask = self.groups.pop(pc)
            stop = min((other for other in self.groups if other > pc), default=len(self.code))
            try:
                self._straight(pc, mask, stop)
            except Fault as fault:
                raise Fault(f"{self.kernel.name}, {self._names(mask)}, {self.code[self.pc].where()}\n    {fault}") from None
        if not (self.groups or self.waiting or self.done):
            self._leave()

    def _leave(self):
        """No lane is left that could go on."""
        if self.parked:
            places = "; ".join(f"{self._names(m, True)} at {self.code[p].where()}" for p, m in self.parked.items())
            raise Fault(f"{self.kernel.name}: the other lanes never come: {places}")
        name = f"{self.kernel.name}, {self._names(self.full)}"
        if any(mask.any() for warp in range(self.warps) for group in [*self.committed[warp], self.open[warp]]
               for mask, *_ in group):
            raise Fault(f"{name}: ends with a cp.async on its way")
        if self.flying:
            raise Fault(f"{name}: ends with a wgmma on its way")
        self.done = True
        self.cluster.events += 1
        if all(unit.done for unit in self.cta.units):
            self.cta.leave()

    def _straight(self, pc, mask, stop):
        """Runs one group of lanes until it meets another (at `stop`), branches apart, waits or leaves."""
        code, known, last, full = self.code, self.known, self.last, self.full
        warps = self.warps if mask is full else self._count(mask)
        while pc < stop:
            self.pc = pc
            ins = code[pc]
            self.tick += 1
            self.steps += warps
            active, kind = mask, ins.kind
            if ins.guard:
                slot, negated = ins.guard
                active = mask & (self.view["p"][slot.row] ^ negated)
                active = full if active.all() else active
                if not known[slot.id]:
                    self.undefined(slot.id, mask, ins)
            if last and (active is full or active.any()):
                self._used(ins)
            for register in ins.reads:
                if not known[register]:
                    self.undefined(register, active, ins)
            if kind == "plain" or kind == "poll":
                pc += 1
                if active is full or active.any():
                    ready = ins.run(self, active)
                    self._set(ins.writes, active)
                    if kind == "poll" and ready is False:
                        self._join(pc, mask)
                        self.rested.add(pc)
                        return
            elif kind == "branch" or kind == "exit":
                if self.tick > MAX_STEPS:
                    raise Fault("endless loop")
                rest = mask & ~active
                if kind == "branch":
                    if active is full:
                        pc = ins.target          # the whole unit goes there
                        continue
                    if active.any():
                        self._join(ins.target, active)
                elif active.any():
                    self.cluster.events += 1
                    self.cluster.barrier.gone[self.who[active]] = True
                    self.cluster.barrier.complete()
                if rest.any():
                    self._join(pc + 1, rest)
                return
            else:
                if mask is not full:
                    here = self._whole(mask) if kind != "group" else ~full
                    if (here != mask).any():
                        self._park(pc, mask & ~here, kind)
                        if not here.any():
                            return
                        mask, active = here, active & here
                        warps = self._count(mask)
                if not active.any():
                    pc += 1
                    continue
                if active is not full and (active != (self._whole(active) if kind != "group" else ~full)).any():
                    raise Fault(f"{self._names(mask & ~active, True)} do not take part")
                if kind == "group" and self.warps != GROUP:
                    raise Fault("there is no warpgroup of four warps here")
                waits = ins.run(self, active)
                if kind == "barrier" and waits:
                    self.waiting[pc] = active | self.waiting.get(pc, False)
                    if active is not full and (mask & ~active).any():
                        self._join(pc + 1, mask & ~active)
                    return
                if kind == "group" and waits is False:
                    self._join(pc, mask)
                    self.rested.add(pc)
                    return
                self._set(ins.writes, active)
                pc += 1
                if pc in self.groups:            # who waited here goes on with us
                    break
        self._join(pc, mask)

    def _set(self, registers, mask):
        for register in registers:
            if mask is self.full:
                self.known[register] = True
            elif not self.known[register]:
                self.partly_known(register, mask)

    def _count(self, mask):
        return int(mask.reshape(-1, LANES).any(1).sum())

    def _whole(self, mask):
        """The lanes of the warps that are complete in mask."""
        return np.repeat(mask.reshape(-1, LANES).all(1), LANES)

    def by_warp(self, mask):
        """[(warp, its lanes in mask)]"""
        if self.warps == 1:
            return [(0, mask)]
        warp = np.arange(self.lanes) // LANES
        return [(n, mask & (warp == n)) for n in np.unique(warp[mask])]

    def _join(self, pc, mask):
        mask = mask | self.groups[pc] if pc in self.groups else mask
        self.groups[pc] = self.full if mask.all() else mask

    def _park(self, pc, mask, kind):
        """These lanes wait at a collective until the warp or the warpgroup is complete."""
        here = mask | self.parked.pop(pc, False)
        ready = self._whole(here) if kind != "group" else here & here.all()
        if ready.any():
            self._join(pc, ready)
        if (here & ~ready).any():
            self.parked[pc] = here & ~ready

    def go_on(self, pc, mask):
        """What these lanes wait for at pc has come."""
        left = self.waiting.pop(pc) & ~mask
        if left.any():
            self.waiting[pc] = left
        self._join(pc + 1, mask)

    # registers

    def partly_known(self, register, mask):
        mask = mask | self.partly.get(register, False)
        self.partly[register] = mask
        self.known[register] = bool(mask.all())

    def undefined(self, register, mask, ins):
        missing = mask & ~self.partly.get(register, ~self.full)
        if missing.any():
            raise Fault(f"reads a register, operand {ins.reads.index(register)} from the left, "
                        f"that {self._names(missing, True)} never wrote")

    def _used(self, ins):
        if self.flying and not self.flying.keys().isdisjoint(ins.touched):
            raise Fault("uses a register of a wgmma that nobody has waited for")
        for register in ins.touched:
            self.last[register] = self.tick

    def renamed(self, target, origin):
        """A mov. ptxas gives both the same register, so it is not a use; the compiler puts it anywhere."""
        if target in self.flying or origin in self.flying:
            raise Fault("moves a register of a wgmma that nobody has waited for")
        self.last[target] = self.last[origin]

    # memory

    def space(self, name, address, mask):
        """(memory, addresses in it) of the lanes in mask; name None is a generic address."""
        address = address[mask] if mask is not self.full else address
        generic = name is None
        if generic:
            first = int(address[0])
            name = next((s for s, low in WINDOW.items() if low <= first < low + (1 << 32)), "global")
            address = address - WINDOW["shared"] if name == "shared" else address
        if name == "local":
            if self.local is None:
                raise Fault("local memory, but the kernel declares none")
            lanes = np.flatnonzero(mask)
            at = address - WINDOW["local"]
            if ((at < 0) | (at >= self.frame)).any():
                raise Fault(f"local address {int(at[0]):#x} is outside of every array")
            return self.local, at + lanes * self.frame
        if not name.startswith("shared"):
            return self.memory, address
        if not (address >> RANK).any():
            return self.shared, address
        if (address >> RANK != address[0] >> RANK).any():
            raise Fault("one access to shared memory of several CTAs: not known here")
        cta, _ = self.cluster.cta_at(self.cta, "shared::cluster" if generic else name, int(address[0]))
        return cta.shared, address & (1 << RANK) - 1

    # words

    def _names(self, mask, lanes=False):
        """warp 2 of CTA 0; with `lanes`, those of mask within"""
        warps = np.unique(self.thread[mask] // LANES)
        text = _ranges(warps) if len(warps) else "?"
        text = f"warp{'s' if len(warps) > 1 else ''} {text} of CTA {self.cta.number}"
        if not lanes or (self._whole(mask) == mask).all() and self.warps > 1:
            return text
        if self.warps == 1:
            return f"lanes {_ranges(np.flatnonzero(mask))}"
        return f"lanes {_ranges(np.unique(self.thread[mask] % LANES))} of {text}"

    def places(self):
        """Where its lanes are, for a deadlock."""
        for how, masks in (("at", self.groups), ("in part at", self.parked), ("at", self.waiting)):
            for pc, mask in masks.items():
                yield f"{self._names(mask)} {how} {self.code[pc].where()}"
        if self.done:
            yield f"{self._names(self.full)} at the end"


def _ranges(numbers):
    """0-3, 7"""
    edges = np.flatnonzero(np.diff(numbers) > 1)
    starts, ends = numbers[[0, *(edges + 1)]], numbers[[*edges, len(numbers) - 1]]
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in zip(starts, ends, strict=True))
