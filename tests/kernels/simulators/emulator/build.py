"""Runs CUDA kernels on the CPU and reports what a GPU would do silently.

    module = build.load(KERNELS / "gemm_w4a4.cuh")                      a path, or the text of a kernel file
    module.launch("gemm_w4a4_bf16_s4", (2, 1), 128, 0, [qact, ..., out, M, N], order="reverse")

g++ compiles the file with emu.hpp before it and emu.cpp beside it. Arguments are CPU tensors or arrays for pointers, None
for a null pointer, numbers for the rest. Each buffer is copied to a place between red zones and, if written, copied back.
A `const` pointer may only be read; memory behind another one may not be read before it is written, unless InOut.

Raises KernelFault with kernel, block, thread, file and line for: an access outside every buffer, across a buffer's end,
misaligned, or to read-only memory; a shared or output byte read before it is written; a byte read or written while a
cp.async to it is on its way; two threads, one of them writing, at a byte with no barrier or collective of their warp
between; a barrier or collective that some threads do not reach or reach on another line; an end with copies on their way;
a byte read or written while a bulk copy to it is on its way, or after it by a thread that did not wait for its mbarrier; too
many arrivals; an accumulator used while a wgmma works on it, a wgmma without fence or commit, or not the same in all warps;
an index outside an array, a shift beyond the word, a division by zero, a float outside the integer's range.

`order` is that of threads and blocks: "forward", "reverse", or a number that seeds a shuffle. No result may depend on it.
"""

import ctypes
import functools
import hashlib
import os
import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[3]
KERNELS = ROOT / "svdq" / "kernels" / "cuda"
CACHE = ROOT / "build" / "emulator"         # ignored by git

COMMON = ["g++", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]    # the same floats on every host
RUNTIME = [*COMMON, "-O3", "-c"]
PREPROCESS = [*COMMON, "-E", "-include", str(HERE / "emu.hpp"), "-I", str(KERNELS)]
KERNEL = [*COMMON, "-O2", "-g1", "-c", "-fno-gnu-unique", "-fno-strict-aliasing", "-Wno-unknown-pragmas",
          # every access calls us; nothing that would make several accesses one, or two lines' barriers
          "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0",
          "-fno-tree-vectorize", "-fno-tree-loop-distribute-patterns", "-fno-tree-tail-merge", "-fno-crossjumping",
          "-fsanitize=alignment,bounds,shift-exponent,integer-divide-by-zero,float-cast-overflow",
          "-ftrivial-auto-var-init=pattern",        # a register read before it is written is garbage, each time the same
          "-fno-optimize-sibling-calls"]            # return addresses name the caller
RED_ZONE = 1 << 20                          # bytes; never touched, so they cost address space only


class KernelFault(Exception):
    """A kernel did what it must not; the text says where and what."""


@dataclass
class InOut:
    """A buffer the kernel may read and write."""
    buffer: object


@dataclass
class Out:
    """A buffer to be written, as a field of Rows. As an argument of its own a non-const pointer needs no mark."""
    buffer: object


@dataclass
class Rows:
    """An array of structs of pointers and 64-bit integers, one tuple per element: in memory, or passed by value."""
    rows: list


def load(source):
    """A kernel file or its text, compiled and loaded. Compiled only once for the same text, flags and emulator."""
    if not isinstance(source, Path):
        return _load(_kept(str(source).encode(), ".cuh"))
    return _load(source)


@functools.cache
def _load(path):
    text = _run([*PREPROCESS, "-x", "c++", str(path)])
    text = re.sub(r"__launch_bounds__\s*\([^)]*\)", "", text)
    shells = dict(re.findall(r'extern\s+"C"\s+__global__\s+void\s+(\w+)\s*\(([^)]*)\)', text))
    text = re.sub(r"extern\s+__shared__\s+(?:alignas\s*\(\w+\)\s*)?([\w:\s]+?)\s*(\w+)\s*\[\s*\]\s*;",
                  r"\1* const \2 = (\1*)emu::dynamic_shared();", text)
    text = re.sub(r"__shared__((?:\s*alignas\s*\(\w+\))?)", r"\1 static __attribute__((used))", text)
    text = text.replace("__global__", "__attribute__((noinline))")
    text += '\n# 1 "launcher"\n' + "".join(
        f"""
        extern "C" __attribute__((visibility("default"))) void emu_letters_{name}(char* to) {{ emu::letters({name}, to); }}
        extern "C" __attribute__((visibility("default"))) void emu_call_{name}(void** all) {{ emu::call({name}, all); }}"""
        for name in shells)
    runtime = _made([*RUNTIME, "-I", str(HERE)], (HERE / "emu.cpp").read_text() + (HERE / "emu.hpp").read_text(), ".o",
                    HERE / "emu.cpp")
    unit = _made([*KERNEL, "-x", "c++-cpp-output"], text, ".o", "-")
    library = _made(["g++", "-shared", "-Wl,-Bsymbolic"], f"{runtime}{unit}", ".so", unit, runtime)
    # the statics of a kernel that are not constant are its __shared__ arrays
    arrays = set(re.findall(r" \.(?:bss|data)\S*\s.*\s(_ZZ\S+)", _run(["objdump", "-t", str(unit)])))
    return Module(path, library, {name: _names(parameters) for name, parameters in shells.items()}, arrays)


class Module:
    """The kernels of one file."""

    def __init__(self, path, library, kernels, arrays):
        self.path, self.library, self.kernels = path, library, kernels
        self._lib = ctypes.CDLL(str(library))
        for name, result in [("emu_module", ctypes.c_void_p), ("emu_dynamic_shared", ctypes.c_void_p),
                             ("emu_dynamic_limit", ctypes.c_size_t), ("emu_launch", ctypes.c_char_p)]:
            getattr(self._lib, name).restype = result
        self._base = self._lib.emu_module()
        self._sites, self._known = {}, {}
        self._site = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(
            lambda place: self._sites.setdefault(self._frames(place), len(self._sites)))
        self._statics = []                          # __shared__ arrays: (name, address, size)
        for line in _run(["nm", "-S", "--defined-only", str(library)]).splitlines():
            address, *size, _, name = line.split()
            if name in arrays:
                self._statics.append((_local_name(name), self._base + int(address, 16), int(size[0], 16)))

    def launch(self, name, grid, block, shared_bytes, args, order="forward", cluster=1, fp8_bits=0):
        """Runs the kernel over the whole grid. grid and block are numbers or tuples of up to three.

        cluster   CTAs, neighbours in x, that run together
        fp8_bits  of a sum of fp8 products below its largest one; 0 keeps all. Hopper is said to keep 13
        """
        grid, block = _three(grid), _three(block)
        threads = block[0] * block[1] * block[2]
        if name not in self.kernels:
            raise ValueError(f"launch: {self.path.name} has no kernel {name}, but {', '.join(self.kernels) or 'none'}")
        if not 1 <= threads * cluster <= 1024:
            raise ValueError(f"launch {name}: got {threads} threads. A block has 1 to 1024, a cluster here no more")
        if shared_bytes > self._lib.emu_dynamic_limit():
            raise ValueError(f"launch {name}: got {shared_bytes} bytes of dynamic shared memory; no GPU has as much")
        letters = ctypes.create_string_buffer(1024)
        getattr(self._lib, f"emu_letters_{name}")(letters)
        letters = letters.value.decode().split()
        if len(letters) != len(args):
            raise ValueError(f"launch {name}: got {len(args)} arguments. Needs {', '.join(self.kernels[name])}")

        memory = _Memory()
        values = [memory.value(letter, parameter, arg) for letter, parameter, arg in zip(letters, self.kernels[name], args)]
        memory.place()
        cells = [ctypes.create_string_buffer(_packed(letter, value), max(int(letter[1:]), 8))
                 for letter, value in zip(letters, values)]
        pointers = (ctypes.c_void_p * max(len(cells), 1))(*map(ctypes.addressof, cells))

        shared = [*self._statics, *(("dynamic shared memory", self._lib.emu_dynamic_shared(cta), shared_bytes)
                                    for cta in range(cluster))]
        self._lib.emu_clear()
        for _, address, size in shared:
            self._lib.emu_space(ctypes.c_void_p(address), ctypes.c_size_t(size), True, True, False)
        for buffer in memory.buffers:
            self._lib.emu_space(ctypes.c_void_p(buffer.address), ctypes.c_size_t(buffer.size), False, buffer.writable,
                                buffer.initialised)
        mode = {"forward": 0, "reverse": 1}.get(order, 2)
        seed = ctypes.c_uint64(order if mode == 2 else 0)
        report = self._lib.emu_launch(getattr(self._lib, f"emu_call_{name}"), pointers, (ctypes.c_uint * 3)(*grid),
                                      (ctypes.c_uint * 3)(*block), cluster, fp8_bits, mode, seed, self._site)
        if report:
            text = re.sub(r"@p(\w+)@", lambda match: self._place(int(match[1], 16)), report.decode())
            text = re.sub(r"@a(\w+)@", lambda match: _address(int(match[1], 16), shared, memory.buffers), text)
            raise KernelFault(f"{name}, {text}")
        memory.copy_back()

    def _place(self, address):
        """file:line of the call before this return address; behind it, in brackets, where that was inlined."""
        own = [frame for frame in self._frames(address) if not frame.startswith(("ptx.cuh", "emu.hpp", "launcher", "?"))]
        frames = list(dict.fromkeys(own or self._frames(address)))
        return frames[0] + (f" (from {', '.join(frames[1:])})" if frames[1:] else "")

    def _frames(self, address):
        if address not in self._known:
            lines = _run(["addr2line", "-i", "-s", "-e", str(self.library), hex(address - self._base - 1)]).splitlines()
            self._known[address] = tuple(line.split(" ")[0] for line in lines)
        return self._known[address]


class _Memory:
    """The buffers of one launch: collected, placed between red zones, copied back."""

    def __init__(self):
        self.buffers = []

    def value(self, letter, name, arg):
        """What to pass for an argument; for pointers a function, which knows once the buffers are placed."""
        if letter[0] == "s":
            return self._table(name, arg.rows)
        if letter[0] not in "pr":
            return arg
        if arg is None:
            return 0
        if isinstance(arg, Rows):
            table = self._table(name, arg.rows)
            pointer = self._pointer(name, np.zeros((len(arg.rows), len(arg.rows[0])), np.uint64), False)
            self.buffers[-1].content = table
            return pointer
        return self._pointer(name, arg, letter[0] == "p")

    def _table(self, name, rows):
        fields = [(field or 0) if field is None or isinstance(field, int) else self._pointer(f"{name}[{i}].{j}", field, False)
                  for i, row in enumerate(rows) for j, field in enumerate(row)]
        return lambda: struct.pack(f"{len(fields)}Q", *(field() if callable(field) else field for field in fields))

    def _pointer(self, name, arg, writable):
        marked = isinstance(arg, (InOut, Out))
        writable |= marked
        initialised = not writable or isinstance(arg, InOut)
        array = arg.buffer if marked else arg
        if isinstance(array, np.ndarray):
            start, size, whole = array.ctypes.data, array.nbytes, array.flags.c_contiguous
        else:
            start, size, whole = array.data_ptr(), array.numel() * array.element_size(), array.is_contiguous()
        if not whole:
            raise ValueError(f"launch: {name} is not contiguous; pass what it is a view of, and the stride")
        for other in self.buffers:
            if other.source == start and other.size == size and size:       # an output over an input
                other.writable |= writable
                other.initialised |= initialised
                return lambda: other.address
            if start < other.source + other.size and other.source < start + size:
                raise ValueError(f"launch: {name} overlaps {other.name}")
        self.buffers.append(buffer := _Buffer(name, array, start, size, writable, initialised))
        return lambda: buffer.address

    def place(self):
        total = sum(_round_up(buffer.size) + RED_ZONE for buffer in self.buffers) + RED_ZONE + 256
        self.arena = np.empty(total, np.uint8)
        at = _round_up(self.arena.ctypes.data) + RED_ZONE
        for buffer in self.buffers:
            buffer.address = at
            at += _round_up(buffer.size) + RED_ZONE
        for buffer in self.buffers:
            ctypes.memmove(buffer.address, buffer.content() if buffer.content else buffer.source, buffer.size)

    def copy_back(self):
        for buffer in self.buffers:
            if buffer.writable:
                ctypes.memmove(buffer.source, buffer.address, buffer.size)


@dataclass
class _Buffer:
    name: str
    array: object
    source: int
    size: int
    writable: bool
    initialised: bool
    content: object = None                  # a function that gives its bytes, if they depend on the places of others
    address: int = 0

    def element(self, offset):
        """'x[4, 17], bfloat16 [257, 3072]'"""
        width = self.size // max(np.prod(self.array.shape, dtype=int), 1)
        index = np.unravel_index(offset // width, self.array.shape)
        kind = str(self.array.dtype).removeprefix("torch.")
        return f"{self.name}[{', '.join(map(str, index))}], {kind} {list(self.array.shape)},"


def _address(address, shared, buffers):
    for name, start, size in shared:
        if start <= address < start + size:
            return f"{name} + {address - start} bytes of shared memory"
    for buffer in buffers:
        if buffer.address <= address < buffer.address + buffer.size:
            return buffer.element(address - buffer.address)
    places = [*shared, *((buffer.name, buffer.address, buffer.size) for buffer in buffers)]
    distance, name, offset, size = min((max(start - address, address - start - size), name, address - start, size)
                                       for name, start, size in places)
    return f"byte {offset} of {name}, which has {size}," if distance < RED_ZONE // 2 else hex(address)


def _packed(letter, value):
    """The bytes of an argument."""
    value = value() if callable(value) else value
    if isinstance(value, bytes):
        if len(value) > int(letter[1:]):
            raise ValueError(f"launch: got {len(value)} bytes for a struct of {letter[1:]}")
        return value
    return struct.pack("Q" if letter[0] in "pr" else letter[0], value)


def _names(parameters):
    return [re.search(r"(\w+)\s*$", parameter)[1] for parameter in parameters.split(",")] if parameters.strip() else []


def _local_name(mangled):
    """_ZZ4funcE4name -> name: the last length-prefixed word."""
    for match in re.finditer(r"E(?=(\d+)([A-Za-z_]\w*))", mangled):
        if len(match[2]) >= int(match[1]) and re.fullmatch(r"(_\d+)?", match[2][int(match[1]):]):
            return match[2][:int(match[1])]
    return mangled


def _three(size):
    return (*((size,) if isinstance(size, int) else size), 1, 1)[:3]


def _round_up(size):
    return -(-size // 256) * 256


def _kept(content, suffix):
    """A file of the cache with this content."""
    path = CACHE / (hashlib.sha256(content).hexdigest()[:16] + suffix)
    if not path.is_file():
        _replace(path, lambda temporary: temporary.write_bytes(content))
    return path


def _made(command, content, suffix, *inputs):
    """The compiler's output for inputs that `content` stands for, or is if "-" is among them; from the cache if there."""
    key = hashlib.sha256("\0".join([_compiler(), *command, content]).encode()).hexdigest()[:16]
    path = CACHE / (key + suffix)
    if not path.is_file():
        _replace(path, lambda temporary: _run([*command, *map(str, inputs), "-o", str(temporary)], content))
    return path


def _replace(path, write):
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:      # two test runs may build at once
        write(Path(folder) / path.name)
        os.replace(Path(folder) / path.name, path)


@functools.cache
def _compiler():
    return _run(["g++", "--version"])


def _run(command, text=""):
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout
