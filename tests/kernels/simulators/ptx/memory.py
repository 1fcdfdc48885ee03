"""Memory that knows of every byte whether it may be read, who wrote it last, and who read it: so races are seen whatever
the order in which warps happen to run.

Order is kept by vector clocks. An agent is a thread of the cluster, an mbarrier on behalf of the copies it counts, or a
warpgroup's wgmmas; each has a time of its own. Row t of Clocks.seen says up to which time of every agent all it did came
before what thread t does now. Whoever releases (a barrier, an arrival) hands on its row, whoever acquires takes the larger
of both. Clocks.fenced is the same for what a proxy fence has made visible to the async proxy (PTX ISA 9.7.15.4): copies and
wgmma see what threads store only through it.
"""

import numpy as np

LANES = 32
RED_ZONE = 256                       # bytes between two variables or arrays
FOREVER = 2**31 - 1
ASYNC_AGENTS = 128                   # per CTA: mbarriers and warpgroups


class Fault(Exception):
    """The kernel did something that is wrong or unknown; says where."""


class Clocks:
    """Of the threads of a cluster. Agent 0 is nobody: the host, at time 0, or another cluster, at any other time."""

    def __init__(self, ctas, threads):
        count = ctas * threads
        self.threads, self.count = threads, count
        self.view = np.zeros((2, 1 + count, 1 + count + ctas * ASYNC_AGENTS), np.int32)
        self.seen, self.fenced = self.view
        own = np.arange(1, count + 1)
        self.seen[own, own] = FOREVER                    # a thread sees what it does itself
        self.names = []                                  # of the agents that are no threads

    def agent(self, name):
        self.names.append(name)
        column = self.count + len(self.names)
        if column >= self.view.shape[2]:
            raise Fault(f"more than {ASYNC_AGENTS} mbarriers and warpgroups in a CTA")
        return column

    def release(self, who, now):
        """What these threads hand on: [2, agents]."""
        clocks = self.view[:, who]
        clocks[0, np.arange(len(who)), who] = now
        return clocks.max(1)

    def acquire(self, who, clock):
        self.view[:, who] = np.maximum(self.view[:, who], clock[:, None])

    def meet(self, who, now):
        """bar.warp.sync of the warps that `who` is made of."""
        shape = (2, -1, LANES, self.view.shape[2])
        clocks = self.view[:, who]
        clocks[0, np.arange(len(who)), who] = now
        clocks = np.broadcast_to(clocks.reshape(shape).max(2, keepdims=True), clocks.reshape(shape).shape)
        self.view[:, who] = clocks.reshape(2, len(who), -1)
        self.seen[who, who] = FOREVER

    def fence(self, who, now):
        clocks = self.seen[who]
        clocks[np.arange(len(who)), who] = now
        self.fenced[who] = np.maximum(self.fenced[who], clocks)

    def of_async(self, who):
        """[agents]: what the async proxy sees of everyone on behalf of all these threads."""
        row = self.seen[who].min(0)
        row[:self.count + 1] = self.fenced[who, :self.count + 1].min(0)
        return row

    def name(self, agent):
        if agent > self.count:
            return self.names[agent - self.count - 1]
        rank, thread = divmod(int(agent) - 1, self.threads)
        return f"thread {thread}" + (f" of rank {rank}" if self.count > self.threads else "") if agent else "another CTA"


OUTSIDE, EMPTY, COPYING, BARRIER, CONST, LIVE = range(6)     # state of a byte; from CONST on it can be read


class Memory:
    """Bytes with a state each, and who wrote them when. Whoever accesses it is a unit of warps and a mask of its lanes."""

    def __init__(self, name, base, size):
        self.name, self.base, self.top = name, base, 0
        self.bytes, self.state = np.zeros(size, np.uint8), np.full(size, OUTSIDE, np.uint8)
        self.writer, self.written = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self.touched = False
        self.cluster = 0                                 # added to the number of a writer, if clusters share this memory

    def claim(self, size, align=256, state=EMPTY, data=None):
        """The address of `size` new bytes, with a red zone behind them."""
        start = -(-self.top // align) * align
        self.top = start + size + RED_ZONE
        self.state[start:start + size] = state
        if data is not None:
            self.bytes[start:start + size] = data
        return self.base + start

    def places(self, address, size, align):
        at = address.astype(np.int64) - self.base
        if (at % align).any():
            raise Fault(f"address {address[(at % align) > 0][0]:#x} is not aligned to {align}")
        outside = (at < 0) | (at + size > len(self.bytes))
        if outside.any():
            raise Fault(f"{self.name} address {address[outside][0]:#x} is outside of every array")
        return at[:, None] + np.arange(size)

    def _refuse(self, at, bad, verb):
        first = at[bad][0]
        why = {OUTSIDE: "is outside of every array", EMPTY: "was never written", CONST: "is read-only",
               COPYING: "is the target of a copy that nobody has waited for",
               BARRIER: "belongs to an mbarrier"}[int(self.state[first])]
        raise Fault(f"{verb} of {self.name} byte {self.base + first:#x}, which {why}")

    def _raced(self, clocks, at, bad, verb, other, did="wrote"):
        raise Fault(f"{verb} of {self.name} byte {self.base + at[bad][0]:#x} races: "
                    f"{clocks.name(other)} {did} it with no barrier between")

    def _writers(self, at):
        return np.maximum(self.writer[at] - self.cluster, 0) if self.cluster else self.writer[at]

    def readable(self, at, verb="read"):
        state = self.state[at]
        if state.min() < CONST:
            self._refuse(at, state < CONST, verb)

    def _see(self, unit, who, at, verb):
        """The last writes must lie before what these threads do."""
        writer = self._writers(at)
        races = unit.clocks.seen[who, writer] < self.written[at]
        if races.any():
            self._raced(unit.clocks, at, races, verb, writer[races][0])

    def see_async(self, unit, who, at, verb):
        """The same for the async proxy on behalf of all of `who`."""
        writer, clocks = self._writers(at), unit.clocks
        bad = clocks.of_async(who)[writer] < self.written[at]
        if bad.any():
            hidden = bad & (clocks.seen[who].min(0)[writer] < self.written[at])
            if hidden.any():
                self._raced(clocks, at, hidden, verb, writer[hidden][0])
            raise Fault(f"{verb} of {self.name} byte {self.base + at[bad][0]:#x}, which {clocks.name(writer[bad][0])} "
                        f"stored with no fence.proxy.async between")

    def read(self, unit, mask, address, size, align):
        """[lanes of mask, size] uint8"""
        at = self.places(address, size, align)
        self.readable(at)
        if self.touched:
            self._see(unit, unit.who[mask][:, None], at, "read")
            self._reading(unit, mask, at)
        return self.bytes[at]

    def read_bulk(self, unit, mask, address, size):
        """What a bulk copy reads on behalf of one lane."""
        start = address - self.base
        if start < 0 or start + size > len(self.bytes):
            raise Fault(f"{self.name} address {address:#x} is outside of every array")
        at = np.arange(start, start + size)
        self.readable(at, "bulk read")
        if self.touched:
            self.see_async(unit, unit.who[mask], at, "bulk read")
        return self.bytes[at]

    def write(self, unit, mask, address, data, align):
        at = self.places(address, data.shape[1], align)
        self.writable(unit, unit.who[mask][:, None], at)
        self.land(unit, mask, at, data)

    def writable(self, unit, who, at):
        state = self.state[at]
        bad = (state != LIVE) & (state != EMPTY)
        if bad.any():
            self._refuse(at, bad, "write")
        self._see(unit, who, at, "write")

    def land(self, unit, mask, at, data):
        """Stores what writable has allowed."""
        self.touched = True
        who = unit.who[mask][:, None] + self.cluster
        self.bytes[at] = data
        self.state[at] = LIVE
        self.writer[at] = who
        self.written[at] = unit.now
        other = self.writer[at]
        clash = other != who
        if clash.any():                                  # two lanes of this very instruction
            if (self.bytes[at] != data).any():
                raise Fault(f"two lanes write different values to {self.name} byte {self.base + at[clash][0]:#x}")
            apart = clash & ((other - 1 - self.cluster) // LANES != (who - 1 - self.cluster) // LANES)
            if apart.any():
                self._raced(unit.clocks, at, apart, "write", other[apart][0] - self.cluster)

    def _reading(self, unit, mask, at):
        pass


class Local(Memory):
    """Each lane has a part of its own: nothing can race."""

    def _see(self, unit, who, at, verb):
        pass


class Shared(Memory):
    """Of one CTA. Also knows who read a byte, so that a write too early is seen, and takes copies in the background.

    Reads of a warp: the latest time, and a bit for each lane that may have read then; of a warpgroup's wgmmas: the time.
    """

    def __init__(self, size, warps):
        super().__init__("shared", 0, size)
        self.when, self.lanes = np.zeros((warps, size), np.int32), np.zeros((warps, size), np.uint32)
        self.latest = np.zeros(warps, np.int32)          # of `when`, per warp
        self.by_wgmma = {}                               # agent -> times
        self.touched = True

    def _reading(self, unit, mask, at):
        slot, bit, now = unit.slot[mask][:, None], unit.bit[mask][:, None], unit.now
        when, lanes = self.when[slot, at], self.lanes[slot, at]
        others = (lanes & ~bit) != 0
        if others.any():                                 # an earlier read is forgotten once every lane has seen it
            others &= when > unit.low()[slot - unit.slot[0]]
        self.when[slot, at] = now
        self.lanes[slot, at] = np.where(others, lanes | bit, bit)
        lost = (self.lanes[slot, at] & bit) == 0         # several lanes at one byte
        if lost.any():
            active = np.zeros(len(self.latest), np.uint32)
            np.bitwise_or.at(active, slot, bit)
            several = np.broadcast_to(slot, at.shape)[lost]
            self.lanes[several, at[lost]] = active[several]
        self.latest[unit.slot[mask]] = now

    def writable(self, unit, who, at):
        super().writable(unit, who, at)
        self._unread(unit, who, at)

    def _unread(self, unit, who, at):
        """Whoever read these bytes must lie before what these threads do. who: [threads, 1]"""
        clocks, me = unit.clocks, who[:, 0]
        for slot in np.flatnonzero(self.latest):
            threads = slice(1 + slot * LANES, 1 + (slot + 1) * LANES)
            seen = clocks.seen[me, threads]
            if seen.min() >= self.latest[slot]:
                continue
            when = self.when[slot, at]
            late = when > seen.min(1, keepdims=True)
            if late.any():
                readers = self.lanes[slot, at][late][:, None] >> np.arange(LANES, dtype=np.uint32) & 1
                row = np.broadcast_to(np.arange(len(me))[:, None], at.shape)[late]
                races = (readers == 1) & (seen[row] < when[late][:, None])
                if races.any():
                    place, lane = np.argwhere(races)[0]
                    self._raced(clocks, at[late], [place], "write", threads.start + lane, "read")
        for agent, times in self.by_wgmma.items():
            races = times[at] > clocks.seen[me, agent][:, None]
            if races.any():
                self._raced(clocks, at, races, "write", agent, "may still read")

    def read_async(self, unit, who, agent, time, at):
        """wgmma reads these bytes on behalf of a warpgroup; `agent` has seen to it by `time`."""
        if at.max() >= len(self.bytes) or at.min() < 0:
            raise Fault(f"an operand of wgmma reaches to shared address {at.max():#x}, which is outside of every array")
        self.readable(at, "wgmma read")
        self.see_async(unit, who, at, "wgmma read")
        self.by_wgmma.setdefault(agent, np.zeros(len(self.bytes), np.int32))[at] = time
        return self.bytes[at]

    def expect(self, unit, who, at):
        """A copy starts: nobody may touch these bytes until it lands."""
        self.writable(unit, who, at)
        self.state[at] = COPYING
        return at

    def expect_bulk(self, unit, who, start, size):
        """The same for a bulk copy, which writes through the async proxy. who: the thread that starts it"""
        if start < 0 or start + size > len(self.bytes):
            raise Fault(f"shared address {start:#x} is outside of every array")
        at = np.arange(start, start + size)[None]
        state = self.state[at]
        bad = (state != LIVE) & (state != EMPTY)
        if bad.any():
            self._refuse(at, bad, "bulk write")
        self.see_async(unit, np.array([who]), at, "bulk write")
        self._unread(unit, np.array([[who]]), at)
        self.state[at] = COPYING

    def land_bulk(self, start, data, agent, time):
        at = slice(start, start + len(data))
        self.bytes[at], self.state[at] = data, LIVE
        self.writer[at], self.written[at] = agent, time

    def claim_barrier(self, unit, lanes, at):
        places = self.places(np.array([at]), 8, 8)
        self.writable(unit, unit.who[lanes][:, None], places)
        self.land(unit, lanes, places, np.zeros((1, 8), np.uint8))
        self.state[places] = BARRIER

    def free_barrier(self, unit, lanes, at):
        self.state[at:at + 8] = EMPTY
        self.writer[at:at + 8], self.written[at:at + 8] = unit.who[lanes][0], unit.now
