"""PTX text -> kernels: lists of instructions, each with the closure that executes it.

Decoders, registered by `decodes`, take the operands of an instruction from a Decoder and return run(unit, mask).
"""

import re
from dataclasses import dataclass, field

import numpy as np

from .memory import LANES, Fault


@dataclass(frozen=True)
class Slot:
    """A row of a register file: `width` bits (0: predicate) times the lanes. `id` counts over all files."""
    width: int
    row: int
    id: int


@dataclass
class Instruction:
    """kind  plain, branch, exit
    warp        a collective of a warp: each warp waits until all its lanes are here
    group       a collective of a warpgroup, likewise. run may return False: not yet
    barrier     of whole warps. run returns whether they wait
    poll        plain; where run returns False, other warps have a turn first
    """
    line: int
    text: str
    guard: tuple | None = None       # (predicate slot, negated)
    kind: str = "plain"
    run: object = None               # run(unit, mask)
    reads: list = field(default_factory=list)
    writes: list = field(default_factory=list)
    touched: tuple = ()              # both
    target: object = None            # of a branch: its label, then its place

    def where(self):
        return f"line {self.line}: {self.text if len(self.text) < 120 else self.text[:117] + '...'}"


WIDTHS = {"pred": 0, "b8": 16, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16, "b32": 32, "u32": 32, "s32": 32,
          "f32": 32, "f16x2": 32, "bf16x2": 32, "b64": 64, "u64": 64, "s64": 64, "f64": 64}
SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
SPECIAL = re.compile(r"%(?:(?:tid|ntid|ctaid|nctaid|clusterid|nclusterid|cluster_ctaid|cluster_nctaid)\.[xyz]|"
                     r"cluster_ctarank|cluster_nctarank|is_explicit_cluster|laneid|warpid|nwarpid|"
                     r"lanemask_(?:lt|le|gt|ge|eq))$")
NUMBER = re.compile(r"[+-]?(?:0[xX][0-9a-fA-F]+|\d+)[uU]?$")
REAL = re.compile(r"0([fF][0-9a-fA-F]{8}|[dD][0-9a-fA-F]{16})$")
VARIABLE = re.compile(r"\.(shared|global|const|local)\b(?:\s*\.align\s+(\d+))?(?:\s*\.\w+)*?\s*\.([busf])(8|16|32|64)\s+"
                      r"([\w$%.]+)((?:\[\d*\])*)\s*(?:=\s*(.*))?$", re.S)
DEBUG_LINE = re.compile(r'\.loc(?:[ \t]+\d+){3}(?:[ \t]*,[ \t]*function_name[^,\n;]+,[ \t]*inlined_at(?:[ \t]+\d+){3})?|'
                        r'\.file[ \t]+\d+[ \t]+"[^"\n]*"(?:[ \t]*,[ \t]*\d+)*')
PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[busf](8|16|32|64)\s+"
                       r"(?:\.ptr\s*(?:\.(?:const|global|local|shared)\s*)?(?:\.align\s+\d+\s+)?)?"
                       r"([\w$]+)(?:\[(\d+)\])?")
TUNING = re.compile(r"\.(maxntid|reqntid|maxnreg|minnctapersm|reqnctapercluster)\s+([\d, ]+)")

DECODERS = {}


def decodes(*names):
    def register(decoder):
        for name in names:
            DECODERS[name] = decoder
        return decoder
    return register


class Text:
    """All variables and kernels of one PTX text."""

    def __init__(self, text):
        self.variables = []          # (space, name, size, align, bytes or None) outside of the kernels
        self.kernels = {}            # name -> Kernel, or what it will be made of
        text = DEBUG_LINE.sub("", text)      # they end with no `;`. First, since a file's name may hold // or /*
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
                name, parameters, tuning = re.search(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?(.*)", head, re.S).groups()
                body, line = text[end + 1:close], text.count("\n", 0, end) + 1
                self.kernels[name] = name, parameters or "", tuning, body, line
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


def _closing(text, at):
    depth = 0
    for brace in re.compile(r"[{}]").finditer(text, at):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return brace.start()
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


class Kernel:
    """One entry: its instructions as closures over register rows. Constants, too, are rows, filled at launch."""

    def __init__(self, module, name, parameters, tuning, body, line):
        self.module, self.name = module, name
        self.tuning = {key: [int(n) for n in value.split(",")] for key, value in TUNING.findall(tuning)}
        self.rows = dict.fromkeys((0, 16, 32, 64), 0)
        self.ids = 0
        self.constants = {}          # (width, bits | name) -> Slot
        self.variables = []          # shared and local, as in Text
        self.parameters = {}         # name -> (offset, size)
        self.code = []
        self.in_flight = False       # is there a wgmma, whose registers have to be watched
        at = 0
        for align, bits, parameter, count in PARAMETER.findall(parameters):
            size, align = SIZES[bits] * int(count or 1), int(align or SIZES[bits])
            at = -(-at // align) * align
            self.parameters[parameter] = (at, size)
            at += size
        self.parameter_bytes = at
        self._body(body, line)

    def _body(self, body, line):
        scopes, at, here, seen = [{}], 0, line, 0
        piece = re.compile(r"\s*(?:([{}])|([\w$]+):(?!:)|([^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)", re.S)
        while found := piece.match(body, at):
            brace, label, text = found.groups()
            start = found.start(found.lastindex)
            here, seen = here + body.count("\n", seen, start), start
            at = found.end()
            if brace == "{":
                scopes.append({})
            elif brace == "}":
                scopes.pop()
            elif label:
                scopes[-1][label + ":"] = len(self.code)         # of its block: inline asm may bring the same one twice
            else:
                self._statement(" ".join(text.split()), here, scopes)
        if body[at:].strip():
            raise Fault(f"{self.name}: cannot parse PTX at line {line + body.count(chr(10), 0, at)}: {body[at:at + 80]!r}")
        self.code.append(Instruction(line + body.count("\n"), "end", kind="exit"))
        for ins in self.code:
            if ins.kind == "branch":
                name, scopes = ins.target
                ins.target = next((scope[name + ":"] for scope in reversed(scopes) if name + ":" in scope), None)
                if ins.target is None:
                    raise Fault(f"{self.name} {ins.where()}: unknown label")

    def _statement(self, text, line, scopes):
        if text.startswith(".reg"):
            _, kind, names = re.match(r"\.(reg)\s+\.(\w+)\s+(.*)", text).groups()
            for name in names.split(","):
                prefix, count = re.match(r"\s*([\w$%]+)(?:<(\d+)>)?", name).groups()
                for each in [prefix] if count is None else [f"{prefix}{i}" for i in range(int(count))]:
                    scopes[-1][each] = self._slot(WIDTHS[kind])
        elif re.match(r"\.pragma\b", text):
            pass
        elif text.startswith("."):
            variable = VARIABLE.search(text)
            if not variable:
                raise Fault(f"{self.name} line {line}: {text}: unknown directive")
            self.variables.append(_variable(variable))
        elif text:
            self.code.append(Decoder(self, text, line, scopes).instruction)

    def _slot(self, width):
        self.rows[width] += 1
        self.ids += 1
        return Slot(width, self.rows[width] - 1, self.ids - 1)

    def constant(self, width, value):
        if (width, value) not in self.constants:
            self.constants[width, value] = self._slot(width)
        return self.constants[width, value]


class Decoder:
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
        ins.touched = (*ins.reads, *ins.writes)

    def unknown(self, what):
        raise Fault(f"{self.kernel.name} {self.instruction.where()}: unknown {what}")

    # modifiers

    def flag(self, *names):
        """The first of these modifiers that is there, or None."""
        for name in names:
            if name in self.mods:
                self.mods.remove(name)
                return name

    def need(self, *names):
        """All of these modifiers must be there."""
        for name in names:
            if not self.flag(name):
                self.unknown(f"form: .{name} is missing")

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

    def number(self):
        """The next operand, an immediate."""
        bits = _bits(self.take(), 64)
        if bits is None:
            self.unknown("form: needs a number")
        return bits - (1 << 64) if bits >> 63 else bits

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
        """[a + offset] -> a function of a unit: int64 [lanes]"""
        token = self.take()
        match = re.match(r"\[\s*([\w$%.]+)\s*(?:([+-])\s*(-?(?:0x)?[0-9a-fA-F]+))?\s*\]$", token)
        if not match:
            self.unknown(f"address {token}")
        base, sign, offset = match.groups()
        offset = int(offset, 0) * (-1 if sign == "-" else 1) if offset else 0
        row, width = self.read_any(64, base)
        view = f"u{width // 8}"
        return lambda unit: unit.view[view][row].astype(np.int64) + offset


def _split(operands):
    """At commas outside of braces and brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(operands):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and not depth:
            parts.append(operands[start:i].strip())
            start = i + 1
    return [*parts, operands[start:].strip()] if operands.strip() else []


def store(unit, view, row, value, mask):
    """A result into a register of the lanes in mask."""
    if mask is unit.full:
        unit.view[view][row] = value
    else:
        np.copyto(unit.view[view][row], value, where=mask, casting="unsafe")


def same(values, mask, what):
    """The one value that all these lanes have."""
    values = values[mask]
    if (values != values[0]).any():
        raise Fault(f"lanes give different values for one {what}")
    return int(values[0])
