"""Runs the PTX that nvcc made of a CUDA kernel, on numpy: the kernels' own instructions, inline asm included, without a GPU.

    Module(ptx_text).launch(kernel, grid, block, shared_bytes, args, order="forward") -> warp instructions executed

    args    one per parameter: int, float, or a numpy array, which becomes a pointer. Arrays are changed in place; one whose
            flags.writeable is off must not be stored to. A list is a struct of 8-byte members, arrays and integers; where
            the parameter is a pointer, a pointer to it. Members that are left out are zero.
    order   of the warps between two barriers: "forward", "reverse", or a seed for a new shuffle after each barrier

CTAs run one after the other, warps one at a time, a warp on arrays of 32 lanes. Lanes that branch apart become groups; the
group with the lowest pc runs first, which joins them again at the end of an if or a loop. A collective instruction (mma,
shfl, bar ...) waits until the whole warp is there.

A Fault, with the line of PTX, is raised for
    a read of a register or of shared or local memory that nothing has written
    an access outside of the arrays, between two shared variables, or not aligned to its own size
    shared memory that a cp.async on its way will write: those bytes land when the copying lane waits for their group
    two lanes on the same bytes, one of them writing, with no barrier between (bar.sync; in one warp also bar.warp.sync)
    global bytes which another CTA has written
    a collective that part of the warp does not reach, a barrier that part of the CTA does not reach
    an instruction or modifier not known here
Not modelled: time, caches, fences, the rounding inside a float mma (sums are float64, rounded once), approximate functions
(correctly rounded here). Races over global memory are seen only where the write comes first.

Test: tests/kernels/test_ptx_interpreter.py
"""

import random
import re
from dataclasses import dataclass, field

import numpy as np

LANES = 32
FULL = np.ones(LANES, bool)          # compared by identity: the fast path of a warp that is all together
SHARED_BASE = 1024                   # so that a null pointer is outside
RED_ZONE = 256                       # bytes between two variables or arrays
GLOBAL_BASE = 1 << 40                # generic addresses: windows of shared and local memory lie below
WINDOW = {"shared": 1 << 32, "local": 2 << 32}
MAX_STEPS = 20_000_000               # of one warp; more is an endless loop


class Fault(Exception):
    """The kernel did something that is wrong or unknown; says where."""


# Memory

OUTSIDE, EMPTY, COPYING, CONST, LIVE = range(5)     # state of a byte; from CONST on it can be read


class Memory:
    """Bytes with a state each, and who wrote them when.

    `who` is a lane's number: cta << 12 | warp << 6 | lane. `now` is a warp's time: CTA barriers << 20 | its own barriers.
    """

    def __init__(self, name, base, size):
        self.name, self.base, self.top = name, base, 0
        self.bytes, self.state = np.zeros(size, np.uint8), np.full(size, OUTSIDE, np.uint8)
        self.writer, self.written = np.full(size, -1), np.zeros(size, np.int64)
        self.touched = False

    def claim(self, size, align=256, state=EMPTY, data=None):
        """The address of `size` new bytes, with a red zone behind them."""
        start = -(-self.top // align) * align
        self.top = start + size + RED_ZONE
        self.state[start:start + size] = state
        if data is not None:
            self.bytes[start:start + size] = data
        return self.base + start

    def _places(self, address, size, align):
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
               COPYING: "is the target of a cp.async that nobody has waited for"}[int(self.state[first])]
        raise Fault(f"{verb} of {self.name} byte {self.base + first:#x}, which {why}")

    def _raced(self, at, bad, verb, other):
        raise Fault(f"{verb} of {self.name} byte {self.base + at[bad][0]:#x} races: "
                    f"{_who(other[bad][0])} wrote or read it with no barrier between")

    def _unordered(self, who, when, warp, me):
        """Where `who` at `when` is neither `me` nor before `me` by a barrier."""
        mine = who >> 6 == me >> 6
        before = np.where(mine, when < warp.now, (who >> 12 == me >> 12) & (when >> 20 < warp.now >> 20))
        return (who >= 0) & (who != me) & ~before

    def read(self, warp, mask, address, size, align):
        """[lanes of mask, size] uint8"""
        at = self._places(address, size, align)
        state = self.state[at]
        if state.min() < CONST:
            self._refuse(at, state < CONST, "read")
        if self.touched:
            writer = self.writer[at]
            if (writer >= 0).any():
                races = self._unordered(writer, self.written[at], warp, warp.who[mask][:, None])
                if races.any():
                    self._raced(at, races, "read", writer)
            self._reading(warp, mask, at)
        return self.bytes[at]

    def write(self, warp, mask, address, data, align):
        at = self._places(address, data.shape[1], align)
        self._writable(warp, mask, at)
        self._land(warp, mask, at, data)
        lost = self.bytes[at] != data
        if lost.any():
            raise Fault(f"two lanes write different values to {self.name} byte {self.base + at[lost][0]:#x}")

    def _writable(self, warp, mask, at):
        state = self.state[at]
        bad = (state != LIVE) & (state != EMPTY)
        if bad.any():
            self._refuse(at, bad, "write")
        writer = self.writer[at]
        races = self._unordered(writer, self.written[at], warp, warp.who[mask][:, None])
        if races.any():
            self._raced(at, races, "write", writer)

    def _land(self, warp, mask, at, data):
        self.touched = True
        self.bytes[at] = data
        self.state[at] = LIVE
        self.writer[at] = warp.who[mask][:, None]
        self.written[at] = warp.now

    def _reading(self, warp, mask, at):
        pass


class Shared(Memory):
    """Of one CTA. Also knows who read a byte, so that a write too early is seen, and takes cp.async."""

    MANY, CROWD = 32, 63 << 6          # as lane: several of the warp; as warp: several of the CTA

    def __init__(self, size):
        super().__init__("shared", 0, size)
        self.reader, self.seen = np.full(size, -1), np.zeros(size, np.int64)
        self.touched = True

    def _reading(self, warp, mask, at):
        me, reader, seen = warp.who[mask][:, None], self.reader[at], self.seen[at]
        stale = (reader < 0) | (seen >> 20 < warp.now >> 20)
        mine = reader >> 6 == me >> 6
        alone = stale | mine & ((seen < warp.now) | (reader == me))
        many = me >> 6 << 6 | self.MANY
        marks = np.where(alone, me, np.where(mine, many, me >> 12 << 12 | self.CROWD))
        self.reader[at] = marks
        self.seen[at] = warp.now
        shared_by_lanes = (self.reader[at] != marks) & alone
        if shared_by_lanes.any():
            self.reader[at[shared_by_lanes]] = int(warp.who[0]) >> 6 << 6 | self.MANY

    def _writable(self, warp, mask, at):
        super()._writable(warp, mask, at)
        reader = self.reader[at]
        races = self._unordered(reader, self.seen[at], warp, warp.who[mask][:, None])
        if races.any():
            self._raced(at, races, "write", reader)

    def expect(self, warp, mask, address, size):
        """A cp.async starts: nobody may touch these bytes until it lands."""
        at = self._places(address, size, size)
        self._writable(warp, mask, at)
        self.state[at] = COPYING
        return at

    def deliver(self, warp, mask, at, data):
        self._land(warp, mask, at, data)


def _who(number):
    warp, lane = number >> 6 & 63, number & 63
    return f"thread {warp * LANES + lane} of CTA {number >> 12}" if lane < LANES and warp < 63 else "several threads"


# Parsing

@dataclass(frozen=True)
class Slot:
    """A row of a register file: `width` bits (0: predicate) times 32 lanes. `id` counts over all files."""
    width: int
    row: int
    id: int


@dataclass
class Instruction:
    line: int
    text: str
    guard: tuple | None = None       # (predicate slot, negated)
    kind: str = "plain"              # or branch, exit, barrier, collective
    run: object = None               # run(warp, mask)
    reads: list = field(default_factory=list)
    writes: list = field(default_factory=list)
    target: object = None            # of a branch: its label, then its place

    def where(self):
        return f"line {self.line}: {self.text}"


WIDTHS = {"pred": 0, "b8": 16, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16, "b32": 32, "u32": 32, "s32": 32,
          "f32": 32, "f16x2": 32, "bf16x2": 32, "b64": 64, "u64": 64, "s64": 64, "f64": 64}
SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
SPECIAL = re.compile(r"%(?:(?:tid|ntid|ctaid|nctaid)\.[xyz]|laneid|warpid|lanemask_(?:lt|le|gt|ge|eq))$")
NUMBER = re.compile(r"[+-]?(?:0[xX][0-9a-fA-F]+|\d+)[uU]?$")
REAL = re.compile(r"0([fF][0-9a-fA-F]{8}|[dD][0-9a-fA-F]{16})$")
VARIABLE = re.compile(r"\.(shared|global|const|local)\b(?:\s*\.align\s+(\d+))?(?:\s*\.\w+)*?\s*\.([busf])(8|16|32|64)\s+"
                      r"([\w$%.]+)((?:\[\d*\])*)\s*(?:=\s*(.*))?$", re.S)


class Module:
    """All kernels of one PTX text."""

    def __init__(self, text):
        self.variables = []          # (space, name, size, align, bytes or None) outside of the kernels
        self.kernels = {}            # name -> Kernel, or what it will be made of
        text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
        text = re.sub(r"//[^\n]*", "", text)
        self._parse(text)

    def _parse(self, text):
        at = 0
        heading = re.compile(r"\s*(?:\.(?:version|target|address_size)[^\n]*\n)*", re.S)
        at = heading.match(text).end()
        while at < len(text):
            ends = [i for i in (text.find(";", at), text.find("{", at)) if i >= 0]
            if not ends:
                break
            end = min(ends)
            head = text[at:end].strip()
            if ".entry" in head:
                close = _closing(text, end)
                name, parameters = re.search(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?", head, re.S).groups()
                body, line = text[end + 1:close], text.count("\n", 0, end) + 1
                self.kernels[name] = name, parameters or "", body, line
                at = close + 1
                continue
            if text[end] == "{":     # an initialiser, or a device function that nothing here can call
                close = _closing(text, end)
                if "=" not in head:
                    at = close + 1
                    continue
                end = text.find(";", close)
                head = text[at:end].strip()
            variable = VARIABLE.search(head)
            if variable:
                self.variables.append(_variable(variable))
            at = end + 1

    def kernel(self, name):
        """Decoded on first use."""
        if isinstance(self.kernels[name], tuple):
            self.kernels[name] = Kernel(self, *self.kernels[name])
        return self.kernels[name]

    def launch(self, kernel, grid, block, shared_bytes, args, order="forward"):
        with np.errstate(all="ignore"):
            return _Launch(self.kernel(kernel), _three(grid), _three(block), shared_bytes, args, order).run()


def _closing(text, at):
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if not depth:
            return i
    raise Fault("PTX ends within a block")


def _variable(match):
    space, align, kind, bits, name, dims, values = match.groups()
    size = SIZES[bits]
    count = np.prod([int(n or 0) for n in re.findall(r"\[(\d*)\]", dims)], dtype=int) if dims else 1
    data = None
    if values:
        numbers = [_bits(n.strip(), size * 8) for n in values.strip("{} \n").replace("{", "").replace("}", "").split(",")]
        data = np.zeros(int(count) * size, np.uint8)
        raw = b"".join(n.to_bytes(size, "little") for n in numbers)
        data[:len(raw)] = np.frombuffer(raw, np.uint8)
    return space, name, int(count) * size, int(align or size), data


def _bits(token, width):
    """The bits of an immediate, or None."""
    if REAL.match(token):
        bits = int(token[2:], 16)
        if token[1] in "fF" and width == 64:
            return int(np.array(bits, np.uint32).view(np.float32).astype(np.float64).view(np.uint64))
        return bits
    if NUMBER.match(token):
        return int(token.rstrip("uU"), 0) & (1 << max(width, 1)) - 1
    return None


def _arrays(args):
    """Every array that the arguments will put into memory."""
    for value in args:
        if isinstance(value, np.ndarray):
            yield value
        elif isinstance(value, list):
            yield from _arrays(value)
            yield np.zeros(len(value), np.uint64)


def _three(size):
    size = (size,) if isinstance(size, int) else tuple(size)
    return size + (1,) * (3 - len(size))


class Kernel:
    """One entry: its instructions as closures over register rows. Constants, too, are rows, filled at launch."""

    def __init__(self, module, name, parameters, body, line):
        self.module, self.name = module, name
        self.rows = dict.fromkeys((0, 16, 32, 64), 0)
        self.ids = 0
        self.constants = {}          # (width, bits | name) -> Slot
        self.variables = []          # shared and local, as in Module
        self.parameters = {}         # name -> (offset, size)
        self.labels, self.code = {}, []
        at = 0
        for align, bits, parameter, count in re.findall(
                r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[busf](8|16|32|64)\s+(?:\.ptr\s*(?:\.\w+\s*)*(?:\.align\s+\d+\s+)?)?"
                r"([\w$]+)(?:\[(\d+)\])?", parameters):
            size, align = SIZES[bits] * int(count or 1), int(align or SIZES[bits])
            at = -(-at // align) * align
            self.parameters[parameter] = (at, size)
            at += size
        self.parameter_bytes = at
        self._body(body, line)

    def _body(self, body, line):
        scopes, at = [{}], 0
        piece = re.compile(r"\s*(?:([{}])|([\w$]+):(?!:)|([^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)", re.S)
        while found := piece.match(body, at):
            brace, label, text = found.groups()
            here = line + body.count("\n", 0, max(found.start(i) for i in (1, 2, 3)))
            at = found.end()
            if brace == "{":
                scopes.append({})
            elif brace == "}":
                scopes.pop()
            elif label:
                self.labels[label] = len(self.code)
            else:
                self._statement(" ".join(text.split()), here, scopes)
        if body[at:].strip():
            raise Fault(f"{self.name}: cannot parse PTX at line {line + body.count(chr(10), 0, at)}: {body[at:at + 80]!r}")
        self.code.append(Instruction(line + body.count("\n"), "end", kind="exit"))
        for ins in self.code:
            if ins.kind == "branch":
                ins.target = self.labels[ins.target]

    def _statement(self, text, line, scopes):
        if text.startswith(".reg"):
            _, kind, names = re.match(r"\.(reg)\s+\.(\w+)\s+(.*)", text).groups()
            for name in names.split(","):
                prefix, count = re.match(r"\s*([\w$%]+)(?:<(\d+)>)?", name).groups()
                for each in [prefix] if count is None else [f"{prefix}{i}" for i in range(int(count))]:
                    scopes[-1][each] = self._slot(WIDTHS[kind])
        elif re.match(r"\.(loc|pragma|file)\b", text):
            pass
        elif text.startswith("."):
            variable = VARIABLE.search(text)
            if not variable:
                raise Fault(f"{self.name} line {line}: {text}: unknown directive")
            self.variables.append(_variable(variable))
        elif text:
            self.code.append(_Decoder(self, text, line, scopes).instruction)

    def _slot(self, width):
        self.rows[width] += 1
        self.ids += 1
        return Slot(width, self.rows[width] - 1, self.ids - 1)

    def constant(self, width, value):
        if (width, value) not in self.constants:
            self.constants[width, value] = self._slot(width)
        return self.constants[width, value]


class _Decoder:
    """One statement. Decoders take operands from the left and modifiers by name; whatever is left over is unknown."""

    def __init__(self, kernel, text, line, scopes):
        self.kernel, self.scopes = kernel, scopes
        self.instruction = ins = Instruction(line, text)
        guard, name, operands = re.match(r"(?:@(!?[\w$%]+)\s+)?([\w.:]+)\s*(.*)$", text).groups()
        if guard:
            slot = self.slot(guard.lstrip("!"), 0)
            ins.guard = (slot, guard[0] == "!")
            ins.reads.append(slot.id)
        self.name, *self.mods = name.split(".")
        self.operands = _split(operands)
        if self.name not in DECODERS:
            self.unknown("opcode")
        ins.run = DECODERS[self.name](self)
        if self.mods or self.operands:
            self.unknown("modifier " + ".".join(self.mods) if self.mods else f"operand {self.operands[0]}")

    def unknown(self, what):
        raise Fault(f"{self.kernel.name} {self.instruction.where()}: unknown {what}")

    # modifiers

    def flag(self, *names):
        """The first of these modifiers that is there, or None."""
        for name in names:
            if name in self.mods:
                self.mods.remove(name)
                return name

    def type(self, *known):
        """The next modifier, a type."""
        if not self.mods or (known and self.mods[0] not in known):
            self.unknown("type")
        return self.mods.pop(0)

    # operands

    def slot(self, token, width):
        """The row of a register or, with `width`, of a constant."""
        for scope in reversed(self.scopes):
            if token in scope:
                return scope[token]
        bits = _bits(token, width)
        if bits is None and not SPECIAL.match(token) and not re.match(r"[\w$%.]+$", token):
            self.unknown(f"operand {token}")
        if bits is None and token in ("WARP_SZ",):
            bits = LANES
        return self.kernel.constant(width, token if bits is None else bits)

    def take(self):
        if not self.operands:
            self.unknown("form: operands are missing")
        return self.operands.pop(0)

    def read(self, width, token=None):
        """The row of the next operand, `width` bits wide."""
        slot = self.slot(token or self.take(), width)
        if slot.width != width:
            self.unknown(f"operand width {slot.width}, needs {width}")
        self.instruction.reads.append(slot.id)
        return slot.row

    def read_any(self, width, token=None):
        """As read, for the instructions whose registers may be wider than their type: -> (row, register width)"""
        slot = self.slot(token or self.take(), width)
        self.instruction.reads.append(slot.id)
        return slot.row, slot.width

    def write(self, width, token=None):
        slot = self.slot(token or self.take(), width)
        if slot.width != width:
            self.unknown(f"result width {slot.width}, needs {width}")
        self.instruction.writes.append(slot.id)
        return slot.row

    def write_any(self, token=None):
        slot = self.slot(token or self.take(), 32)
        self.instruction.writes.append(slot.id)
        return slot.row, slot.width

    def predicate(self, token=None):
        """(row, negated)"""
        token = token or self.take()
        return self.read(0, token.lstrip("!")), token[0] == "!"

    def tokens(self):
        """The next operand as a list: {a, b} or a alone."""
        token = self.take()
        return [t.strip() for t in token[1:-1].split(",")] if token[0] == "{" else [token]

    def address(self):
        """[a + offset] -> a function of a warp: uint64 [32]"""
        token = self.take()
        match = re.match(r"\[\s*([\w$%.]+)\s*(?:([+-])\s*(-?(?:0x)?[0-9a-fA-F]+))?\s*\]$", token)
        if not match:
            self.unknown(f"address {token}")
        base, sign, offset = match.groups()
        offset = int(offset, 0) * (-1 if sign == "-" else 1) if offset else 0
        row, width = self.read_any(64, base)
        view = f"u{width // 8}"
        return lambda warp: warp.view[view][row].astype(np.int64) + offset


def _split(operands):
    """At commas outside of braces and brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(operands):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and not depth:
            parts.append(operands[start:i].strip())
            start = i + 1
    return [*parts, operands[start:].strip()] if operands.strip() else []


# Execution

class _Launch:
    def __init__(self, kernel, grid, block, shared_bytes, args, order):
        self.kernel, self.grid, self.block, self.order = kernel, grid, block, order
        self.random = random.Random(order)
        self.shared_bytes = shared_bytes
        self.arrays = []
        if block[0] * block[1] * block[2] % LANES:
            raise Fault(f"{kernel.name}: block {block} is no multiple of {LANES} threads")
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
        try:
            for number in range(self.grid[0] * self.grid[1] * self.grid[2]):
                steps += self._cta(number)
        finally:
            for array, at in self.arrays:
                if array.flags.writeable:
                    array.reshape(-1).view(np.uint8)[:] = self.memory.bytes[at:at + array.nbytes]
        return steps

    def _cta(self, number):
        kernel = self.kernel
        variables = kernel.module.variables + kernel.variables
        fixed = [v for v in variables if v[0] == "shared"]
        total = sum(v[2] + v[3] + 2 * RED_ZONE for v in fixed) + SHARED_BASE + self.shared_bytes + 2 * RED_ZONE
        self.shared = Shared(total)
        self.shared.top = SHARED_BASE
        symbols = dict(self.symbols)
        for _, name, size, align, _ in sorted(fixed, key=lambda v: v[2] == 0):   # the extern array has no size: last
            symbols[name] = self.shared.claim(size or self.shared_bytes, max(align, 16))
        local = [v for v in variables if v[0] == "local"]
        frame = sum(v[2] + 2 * RED_ZONE for v in local)
        for _, name, *_ in local:
            symbols[name] = WINDOW["local"]
        threads = self.block[0] * self.block[1] * self.block[2]
        warps = [_Warp(self, number, w, symbols, local, frame) for w in range(threads // LANES)]
        epoch = 0
        while True:
            order = list(warps)
            if self.order == "reverse":
                order.reverse()
            elif self.order != "forward":
                self.random.shuffle(order)
            for warp in order:
                warp.now = epoch << 20
                warp.run()
            at = {warp.barrier for warp in warps}
            if at == {None}:
                return sum(warp.steps for warp in warps)
            if len(at) > 1:
                lines = [kernel.code[a].where() if a is not None else "the end" for a in sorted(at, key=lambda a: a or 0)]
                raise Fault(f"{kernel.name}: the warps of CTA {number} wait at different places: {'; '.join(lines)}")
            epoch += 1


class _Warp:
    def __init__(self, launch, cta, number, symbols, local, frame):
        kernel = launch.kernel
        self.kernel, self.code, self.launch = kernel, kernel.code, launch
        self.memory, self.shared = launch.memory, launch.shared
        self.who = cta << 12 | number << 6 | np.arange(LANES)
        self.now = self.steps = 0
        self.groups, self.parked = {0: FULL}, {}
        self.barrier = None
        self.open, self.committed = [], []      # cp.async: [(mask, places, bytes)], and groups of them
        files = {width: np.zeros((count, LANES), f"u{width // 8}" if width else bool) for width, count in kernel.rows.items()}
        self.view = {"p": files[0]}
        for width in (16, 32, 64):
            self.view |= {f"{kind}{width // 8}": files[width].view(f"{kind}{width // 8}") for kind in "uif"}
        self.known = [False] * kernel.ids       # registers all lanes have written
        self.partly = {}                        # id -> mask
        for (width, value), slot in kernel.constants.items():
            if isinstance(value, str):
                value = self._special(value, cta, number) if value[0] == "%" and value not in symbols else symbols.get(value)
                if value is None:
                    continue                    # a name nobody declared: reading it is a Fault
            files[width][slot.row] = value
            self.known[slot.id] = True
        self.local = None
        if local:
            self.frame = frame
            self.local = Memory("local", 0, frame * LANES)
            for _ in range(LANES):
                start = self.local.top
                for _, _, size, align, _ in local:
                    self.local.claim(size, align)
                self.local.top = start + frame

    def _special(self, name, cta, warp):
        thread = warp * LANES + np.arange(LANES)
        (x, y, _), lane = self.launch.block, np.arange(LANES)
        one = np.uint64(1)
        bit = one << lane.astype(np.uint64)
        grid = self.launch.grid
        values = {"laneid": lane, "warpid": warp, "lanemask_eq": bit, "lanemask_lt": bit - one,
                  "lanemask_le": 2 * bit - one, "lanemask_gt": 2**32 - 2 * bit, "lanemask_ge": 2**32 - bit,
                  "tid.x": thread % x, "tid.y": thread // x % y, "tid.z": thread // (x * y),
                  "ctaid.x": cta % grid[0], "ctaid.y": cta // grid[0] % grid[1], "ctaid.z": cta // (grid[0] * grid[1])}
        for i, axis in enumerate("xyz"):
            values["ntid." + axis], values["nctaid." + axis] = self.launch.block[i], grid[i]
        return values.get(name[1:])

    def run(self):
        """Until the next barrier of the CTA, whose place `barrier` then holds, or the end: None."""
        if self.barrier is not None:
            self.groups = {self.barrier + 1: FULL}
            self.barrier = None
        while self.groups:
            pc = min(self.groups)
            mask = self.groups.pop(pc)
            stop = min(self.groups, default=len(self.code))
            try:
                self._straight(pc, mask, stop)
            except Fault as fault:
                raise Fault(f"{self.kernel.name}, warp {(self.who[0] >> 6) & 63} of CTA {self.who[0] >> 12}, "
                            f"{self.code[self.pc].where()}\n    {fault}") from None
            if self.barrier is not None:
                return
        if self.parked:
            places = "; ".join(f"lanes {_lanes_text(m)} at {self.code[p].where()}" for p, m in self.parked.items())
            raise Fault(f"{self.kernel.name}, warp {(self.who[0] >> 6) & 63}: the other lanes never come: {places}")
        if any(mask.any() for group in [*self.committed, self.open] for mask, *_ in group):
            raise Fault(f"{self.kernel.name}, warp {(self.who[0] >> 6) & 63}: ends with a cp.async on its way")

    def _straight(self, pc, mask, stop):
        """Runs one group of lanes until it meets another (at `stop`), branches apart or leaves."""
        code, known = self.code, self.known
        while pc < stop:
            self.pc = pc
            ins = code[pc]
            self.steps += 1
            for register in ins.reads:
                if not known[register]:
                    self._undefined(register, mask, ins)
            active, kind = mask, ins.kind
            if ins.guard:
                slot, negated = ins.guard
                active = mask & (self.view["p"][slot.row] ^ negated)
                active = FULL if active.all() else active
            if kind == "plain":
                if active is FULL or active.any():
                    ins.run(self, active)
                    for register in ins.writes:
                        if active is FULL:
                            known[register] = True
                        elif not known[register]:
                            self._partly(register, active)
                pc += 1
            elif kind == "collective" or kind == "barrier":
                if mask is not FULL:
                    self._park(pc, mask)
                    return
                if active is FULL:
                    if kind == "barrier":
                        self.barrier = pc
                        return
                    ins.run(self, FULL)
                    for register in ins.writes:
                        known[register] = True
                elif active.any():
                    raise Fault(f"lanes {_lanes_text(~active)} do not take part")
                pc += 1
            else:
                if self.steps > MAX_STEPS:
                    raise Fault("endless loop")
                rest = mask & ~active
                if kind == "branch":
                    if active is FULL:
                        pc = ins.target         # the whole warp goes there
                        continue
                    if active.any():
                        self._join(ins.target, active)
                if rest.any():
                    self._join(pc + 1, rest)
                return
        self._join(pc, mask)

    def _join(self, pc, mask):
        mask = mask | self.groups[pc] if pc in self.groups else mask
        self.groups[pc] = FULL if mask.all() else mask

    def _park(self, pc, mask):
        """These lanes wait at a collective until the warp is complete."""
        here = mask | self.parked.pop(pc, False)
        if here.all():
            self._join(pc, FULL)
        else:
            self.parked[pc] = here

    def _partly(self, register, mask):
        mask = mask | self.partly.get(register, False)
        self.partly[register] = mask
        self.known[register] = bool(mask.all())

    def _undefined(self, register, mask, ins):
        missing = mask & ~self.partly.get(register, ~FULL)
        if missing.any():
            raise Fault(f"reads a register, operand {ins.reads.index(register)} from the left, "
                        f"that lanes {_lanes_text(missing)} never wrote")

    def space(self, name, address, mask):
        """(memory, addresses in it) of the lanes in mask; name None is a generic address."""
        address = address[mask] if mask is not FULL else address
        if name is None:
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
        return (self.shared if name == "shared" else self.memory), address


def _lanes_text(mask):
    """0-3, 7"""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(int), [0])))).reshape(-1, 2)
    return ", ".join(f"{a}-{b - 1}" if b - a > 1 else str(a) for a, b in edges)


# Numbers: float64 holds every fp32 and smaller, and sums of two with one rounding to odd, after which another to fp32, bf16
# or fp16 is as if there had been only one.

def _odd(rounded, error):
    """float64 `rounded`, where exact is rounded + error: the odd one of the two neighbours if not exact."""
    bits = rounded.view(np.int64)
    step = np.where((error > 0) == (rounded > 0), 1, -1)
    nudge = (error != 0) & (bits & 1 == 0) & np.isfinite(rounded)
    # from 0 a step would change the sign; a sum of two that rounds to 0 is exact, so there is none
    return np.where(nudge, bits + step, bits).view(np.float64)


def _sum(a, b):
    """a + b in float64, rounded to odd."""
    s = a + b
    t = s - a
    error = (a - (s - t)) + (b - t)
    return _odd(s, np.where(np.isfinite(error), error, 0))


def _wide(bits, kind):
    """Bits of a float type -> float64."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view({"f16": np.float16, "f32": np.float32, "f64": np.float64}[kind]).astype(np.float64)


def _narrow(value, kind):
    """float64 -> bits of a float type, nearest even. NaN becomes the one NaN that the hardware makes."""
    if kind == "f64":
        return value.view(np.uint64)
    if kind == "f32":
        return np.where(np.isnan(value), np.uint32(0x7FFFFFFF), value.astype(np.float32).view(np.uint32))
    if kind == "f16":
        return np.where(np.isnan(value), np.uint16(0x7FFF), value.astype(np.float16).view(np.uint16))
    if kind == "bf16":
        single = value.astype(np.float32)
        bits = single.view(np.uint32).astype(np.int64)
        short = value - single.astype(np.float64)                # to odd first, as in _odd
        finite = np.isfinite(single)
        nudge = finite & (short != 0) & (bits & 1 == 0)
        bits = np.where(nudge, bits + np.where(np.abs(value) > np.abs(single), 1, -1), bits)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        rounded = np.where(finite, rounded, bits >> 16)
        return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)
    raise Fault(f"no conversion to {kind}")


def _flush(x):
    """Subnormal fp32 becomes a zero of its sign."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


# Decoders: each takes the operands of its instruction and returns what executes it.

DECODERS = {}


def decodes(*names):
    def register(decoder):
        for name in names:
            DECODERS[name] = decoder
        return decoder
    return register


def _store(warp, view, row, value, mask):
    if mask is FULL:
        warp.view[view][row] = value
    else:
        np.copyto(warp.view[view][row], value, where=mask, casting="unsafe")


def _apply(d, result, function, *sources):
    """d = function(a, b, ...) lane by lane, on the views of the register files named by `result` and `sources`."""
    def width(view):
        return 0 if view == "p" else 8 * int(view[1])

    to = d.write(width(result))
    rows = [(view, d.read(width(view))) for view in sources]
    if len(rows) == 2:
        (va, a), (vb, b) = rows
        return lambda w, mask: _store(w, result, to, function(w.view[va][a], w.view[vb][b]), mask)
    return lambda w, mask: _store(w, result, to, function(*[w.view[v][r] for v, r in rows]), mask)


def _view(kind):
    """The register view of a PTX type: s32 -> i4."""
    letter = {"s": "i", "u": "u", "b": "u", "f": "f"}[kind[0]]
    return letter + str(SIZES[kind[1:]])


HALVES = ("f16", "bf16", "f16x2", "bf16x2")


def _halves(d, kind, function, count):
    """An operation on 16-bit floats, one or two in a register, in float64."""
    view, kind = ("u4", kind[:-2]) if kind.endswith("x2") else ("u2", kind)

    def compute(*sources):
        values = [_wide(np.ascontiguousarray(s).view(np.uint16), kind) for s in sources]
        return _narrow(function(*values), kind).view(f"u{view[1]}")
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
        value = function(*map(_flush, sources)) if ftz else function(*sources)
        value = _flush(value) if ftz else value
        return np.where(np.isnan(value), 0, np.clip(value, 0, 1)) if sat else value
    return _apply(d, _view(kind), compute, *[_view(kind)] * count)


def _is_float(d):
    return d.mods[-1] in ("f32", "f64", *HALVES)


@decodes("add", "sub")
def _(d):
    function, exact = (np.add, _sum) if d.name == "add" else (np.subtract, lambda a, b: _sum(a, -b))
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
        value = _sum(a * b, c)          # the product of two 24-bit significands is exact in float64
        return np.where(value > 0, value, np.where(np.isnan(value), value, 0.0)) if relu else value
    if kind in HALVES:
        if ftz or sat:
            d.unknown("modifier of 16-bit fma")
        return _halves(d, kind, exact, 3)

    def compute(a, b, c):
        a, b, c = map(_flush, (a, b, c)) if ftz else (a, b, c)
        value = exact(a.astype(np.float64), b.astype(np.float64), c.astype(np.float64)).astype(np.float32)
        value = _flush(value) if ftz else value
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
        _store(w, view, to, rest if d.name == "rem" else (dividend - rest) // divisor, mask)
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
        return _apply(d, _view(kind), (lambda a: _flush(function(a))) if ftz else function, _view(kind))
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
    kind = d.type("u32", "s32", "b32", "u64", "s64")
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
        start, length = start.astype(np.uint64) & 255, length.astype(np.uint64) & 255
        mask = ((np.uint64(1) << np.minimum(length, 32)) - np.uint64(1)) << np.minimum(start, 32)
        return (b & ~mask | (a.astype(np.uint64) << np.minimum(start, 32)) & mask).astype(np.uint32)
    if d.name == "bfe":
        return _apply(d, view, extract, view, "u4", "u4")
    return _apply(d, "u4", insert, "u4", "u4", "u4", "u4") if kind == "b32" else d.unknown("type")


@decodes("prmt")
def _(d):
    d.type("b32")

    def compute(a, b, selector):
        bytes_ = np.stack((a, b), 1).view(np.uint8).reshape(LANES, 8)
        result = np.zeros((LANES, 4), np.uint8)
        for i in range(4):
            pick = selector >> 4 * i & 15
            byte = bytes_[np.arange(LANES), pick & 7]
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
    view, prepare = _view(kind), _flush if ftz else lambda a: a
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
            _store(w, "p", row, bit, mask)
    return run


@decodes("selp")
def _(d):
    width = WIDTHS[d.type()]
    view = f"u{width // 8}"
    to, a, b, (p, negated) = d.write(width), d.read(width), d.read(width), d.predicate()
    return lambda w, mask: _store(w, view, to, np.where(w.view["p"][p] ^ negated, w.view[view][a], w.view[view][b]), mask)


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
            parts = w.view[f"u{width // 8}"][row].view(view).reshape(LANES, -1)
            for i, row_ in enumerate(rows):
                if row_ is not None:
                    _store(w, view, row_, parts[:, i], mask)
        return run
    part = width // len(source)
    view = f"u{part // 8}"
    rows, row = [d.read(part, t) for t in source], d.write(width, to[0])
    return lambda w, mask: _store(w, f"u{width // 8}", row, np.stack([w.view[view][r] for r in rows], 1)
                                  .view(f"u{width // 8}")[:, 0], mask)


def _move(d, width, to, source):
    """A compiler may move what it has not set, so an unwritten register spreads here instead of faulting."""
    view = f"u{width // 8}" if width else "p"
    row, old = d.write(width, to), d.read(width, source)
    target, origin = d.instruction.writes.pop(), d.instruction.reads.pop()

    def run(w, mask):
        _store(w, view, row, w.view[view][old], mask)
        if w.known[origin]:
            if mask is FULL:
                w.known[target] = True
            elif not w.known[target]:
                w._partly(target, mask)
        else:
            had = FULL if w.known[target] else w.partly.get(target, ~FULL)
            w.partly[target] = np.where(mask, w.partly.get(origin, ~FULL), had)
            w.known[target] = bool(w.partly[target].all())
    return run


@decodes("cvta")
def _(d):
    """Generic addresses of shared and local memory lie in windows, those of global memory are themselves."""
    back = d.flag("to")
    space, kind = d.flag("global", "shared", "local", "const", "param"), d.type("u64", "u32")
    offset = WINDOW["shared"] if space == "shared" else 0      # the addresses of local memory are generic already
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
    if rounding in ("rz", "rm", "rp") or relu or finite:
        d.unknown("rounding")
    if to in ("f16x2", "bf16x2") and origin == "f32":
        row, high, low = d.write(32), d.read(32), d.read(32)

        def run(w, mask):
            both = np.stack((w.view["f4"][low], w.view["f4"][high]), 1)
            both = _flush(both) if ftz else both
            _store(w, "u4", row, _narrow(both.astype(np.float64), to[:-2]).view(np.uint32)[:, 0], mask)
        return run
    if to not in (*INTEGERS, "f16", "bf16", "f32", "f64") or origin not in (*INTEGERS, "f16", "bf16", "f32", "f64"):
        d.unknown("conversion")
    row, width = d.write_any()
    old, old_width = d.read_any(WIDTHS.get(origin, 16))
    convert = _conversion(to, origin, rounding, ftz, sat)

    def run(w, mask):
        value = convert(w.view[f"u{old_width // 8}"][old])
        extended = value.astype(f"{value.dtype.kind}{width // 8}") if value.dtype.kind != "f" else value
        _store(w, f"{'i' if to[0] == 's' else 'u'}{width // 8}", row, extended, mask)
    return run


def _conversion(to, origin, rounding, ftz, sat):
    """From the bits of a register to a number of type `to`; floats as bits."""
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}.get(rounding)

    def source(bits):
        if origin in INTEGERS:
            return bits.astype(_view(origin)) if len(bits) else bits
        value = _wide(bits.astype(np.uint16) if origin in ("f16", "bf16") else bits, origin)
        return _flush(value.astype(np.float32)).astype(np.float64) if ftz and origin == "f32" else value

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
        out = _narrow(value, to)
        return _flush(out.view(np.float32)).view(np.uint32) if ftz and to == "f32" else out
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
    space = d.flag("global", "shared", "local", "param", "const")
    d.flag("cta")
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
            w.view[f"{values.dtype.kind}{width // 8}"][row, slice(None) if mask is FULL else mask] = value
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
    return run


@decodes("cp")
def _(d):
    if d.mods[:1] != ["async"]:
        d.unknown("copy")
    d.mods.pop(0)
    order = d.flag("commit_group", "wait_group", "wait_all")
    if order:
        d.instruction.kind = "collective"
        keep = int(d.take(), 0) if order == "wait_group" else 0
        if order == "commit_group":
            return lambda w, mask: (w.committed.append(w.open), setattr(w, "open", []))

        def wait(w, mask):
            if order == "wait_all":
                w.committed.append(w.open)
                w.open = []
            while len(w.committed) > keep:
                for lanes, at, data in w.committed.pop(0):
                    w.shared.deliver(w, lanes, at, data)
        return wait
    d.flag("ca", "cg")
    d.mods.remove("shared")
    d.mods.remove("global")
    d.flag("L2::128B", "L2::64B", "L2::256B")
    to, origin, size = d.address(), d.address(), int(d.take(), 0)
    valid = d.read(32) if d.operands else None
    if size not in (4, 8, 16):
        d.unknown("size of a copy")

    def run(w, mask):
        count = w.view["u4"][valid] if valid is not None else np.full(LANES, size)
        if (count[mask] > size).any():
            raise Fault(f"source size {count[mask].max()} is above {size}")
        data = np.zeros((LANES, size), np.uint8)
        for n in np.unique(count[mask]):
            lanes = mask & (count == n)
            if n:
                data[lanes, :n] = w.memory.read(w, lanes, origin(w)[lanes], int(n), min(int(n), size))
        w.open.append((mask, w.shared.expect(w, mask, to(w)[mask], size), data[mask]))
    return run


@decodes("bar", "barrier")
def _(d):
    if d.flag("warp"):
        d.mods.remove("sync")
        _whole(d)
        d.instruction.kind = "collective"
        return lambda w, mask: setattr(w, "now", w.now + 1)
    d.flag("cta")
    d.mods.remove("sync")
    d.flag("aligned")
    if d.take() != "0" or d.operands:
        d.unknown("barrier: only 0, for the whole CTA")
    d.instruction.kind = "barrier"


def _whole(d):
    """A collective's mask of lanes: only all of them."""
    token = d.operands.pop()
    slot = d.slot(token, 32)
    if slot in (d.kernel.constant(32, 0xFFFFFFFF),):
        return None
    d.instruction.reads.append(slot.id)
    return slot.row


def _check_mask(w, row):
    if row is not None and (w.view["u4"][row] != 0xFFFFFFFF).any():
        raise Fault("a collective over part of the warp")


@decodes("shfl")
def _(d):
    d.mods.remove("sync")
    mode = d.flag("bfly", "idx", "up", "down")
    d.type("b32")
    members = _whole(d)
    d.instruction.kind = "collective"
    to, _, valid = d.take().partition("|")
    to, valid = d.write(32, to.strip()), d.write(0, valid.strip()) if valid else None
    a, b, c = d.read(32), d.read(32), d.read(32)

    def run(w, mask):
        _check_mask(w, members)
        lane = np.arange(LANES)
        by, control = w.view["u4"][b].astype(int) & 31, w.view["u4"][c].astype(int)
        clamp, segment = control & 31, control >> 8 & 31
        top, low = lane & segment | clamp & ~segment, lane & segment
        source = {"bfly": lane ^ by, "idx": low | by & ~segment, "up": lane - by, "down": lane + by}[mode]
        fits = source >= top if mode == "up" else source <= top
        source = np.where(fits, source, lane)
        w.view["u4"][to] = w.view["u4"][a][source]
        if valid is not None:
            w.view["p"][valid] = fits
    return run


MMA_BITS = {"s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "f16": 16}


def _elements(words, kind):
    """[words, 32 lanes] -> [words, 32, elements in a word], float64."""
    bits = MMA_BITS[kind]
    codes = words[..., None] >> np.arange(0, 32, bits, dtype=np.uint32) & (1 << bits) - 1
    if bits == 16:
        return _wide(np.ascontiguousarray(codes.astype(np.uint16)), kind)
    codes = codes.astype(np.int64)
    return (codes - (codes >> bits - 1 << bits) if kind[0] == "s" else codes).astype(np.float64)


@decodes("mma")
def _(d):
    """d = a b + c. Lane 4g + t; the words of A run over rows (g, g + 8), then over halves of k; those of B over halves of k.

    In float64: integer sums are exact, so is each product of two 16-bit floats.
    """
    d.mods.remove("sync")
    d.flag("aligned")
    m, n, k = map(int, re.match(r"m(\d+)n(\d+)k(\d+)$", d.type()).groups())
    d.mods.remove("row")
    d.mods.remove("col")
    result, at, bt, ct = d.type("f32", "s32"), d.type(*MMA_BITS), d.type(*MMA_BITS), d.type("f32", "s32")
    d.instruction.kind = "collective"
    to, a, b, c = [[d.write(32, t) for t in d.tokens()]] + [[d.read(32, t) for t in d.tokens()] for _ in range(3)]
    rows, halves = m // 8, len(b)
    if n != 8 or result != ct or len(a) != rows * halves or k != halves * 4 * 32 // MMA_BITS[at] or len(c) != 2 * rows:
        d.unknown("mma")
    view = "f4" if ct == "f32" else "i4"

    def run(w, mask):
        left = _elements(w.view["u4"][a], at).reshape(halves, rows, 8, 4, -1).transpose(1, 2, 0, 3, 4).reshape(m, k)
        right = _elements(w.view["u4"][b], bt).reshape(halves, 8, 4, -1).transpose(0, 2, 3, 1).reshape(k, 8)
        product = (left @ right).reshape(rows, 8, 4, 2).transpose(0, 3, 1, 2).reshape(2 * rows, LANES)
        product += w.view[view][c]
        w.view["u4"][to] = _narrow(product, "f32") if ct == "f32" else product.astype(np.int64).astype(np.uint32)
    return run


@decodes("bra")
def _(d):
    d.flag("uni")
    d.instruction.kind, d.instruction.target = "branch", d.take()


@decodes("ret", "exit")
def _(d):
    d.instruction.kind = "exit"


@decodes("membar", "fence", "griddepcontrol", "prefetch")
def _(d):
    d.mods.clear()
    d.operands.clear()
    return lambda w, mask: None
