"""Static budgets: what the machine code of each kernel may cost and contain, counted in SASS without a GPU.

    python tools/kernel_budgets.py            every kernel and arch with the instructions of its hot loop, markdown
    python tools/kernel_budgets.py --docs     the counts as docs/kernels.md has them: equal rows are one
    python tools/kernel_budgets.py --write    puts them there

`python` is one with pytest, such as that of .environment. It needs nvcc and nvdisasm, as tests/kernels/toolchain.py finds them.

The hot loop is the innermost loop with the most MMAs: a backward branch and all between it and its label. A kernel without
MMAs is counted as a whole. A change of BUDGETS needs a line in the commit message saying why.

Source: nvdisasm -c, and ptxas -v for spills. Test: tests/kernels/test_budgets.py
"""

import argparse
import collections
import fnmatch
import functools
import itertools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- written by: python tools/kernel_budgets.py --write -->\n", "<!-- end of what is written -->"
ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_120", "sm_120a", "sm_121a")
LOCAL_MEMORY = ("LDL", "STL")             # a spill, or an array indexed at run time


@dataclass(frozen=True)
class Budget:
    """What kernels whose name matches may cost. Instructions are named as in `matches`."""
    kernel: str                       # pattern of the kernel's name
    registers: int
    per_mma: float | None = None      # instructions in the hot loop per `mma`
    mma: str = "IMMA"
    spills: int = 0                   # bytes
    must: tuple = ()                  # in the hot loop
    must_not: tuple = ()              # in the hot loop
    has: tuple = ()                   # anywhere in the kernel
    never: tuple = ()                 # anywhere in the kernel, on top of LOCAL_MEMORY
    calls: tuple = ()                 # patterns of the compiler's own routines that it may call
    archs: tuple = ("sm_80", "sm_86", "sm_89")


SLOW_CONVERSIONS = ("I2F", "F2I", "F2F")          # taken to be slow; not measured
# Calls: rcp_rn_f32_slowpath serves subnormal operands of 1/x. shflsync serves a warp that has diverged, where the compiler
# does not see that it cannot have.
ATOMICS = ("RED", "REDG", "ATOM*")                # their order differs between runs, and so would the sums

DIVISIONS = ("div_rn_noftz_f32_slowpath", "rcp_rn_f32_slowpath")     # by K: rows of one number then have no variance

LATER_THAN_SM75 = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")

# file -> budgets of its kernels
BUDGETS = {
    "gemm_w4a4.cuh": (
        Budget("gemm_w4a4_*", registers=255, per_mma=11.7, mma="IMMA.16864",
               must=("IMMA.16864", "LDGSTS*.128", "LDS.128", "FFMA"), must_not=(*SLOW_CONVERSIONS, "I2FP", "LDG"),
               never=ATOMICS),
    ),
    # Two CTAs per multiprocessor. GELU's tanh and 1/x of the quantiser are one instruction each.
    "mlp_w4a4.cuh": (
        Budget("mlp_w4a4_*", registers=255, per_mma=13.0, mma="IMMA.16864",
               must=("IMMA.16864", "LDGSTS*.128", "LDS.128", "FFMA"), must_not=(*SLOW_CONVERSIONS, "I2FP", "LDG"),
               never=ATOMICS, calls=("rcp_rn_f32_slowpath", "shflsync_*")),
    ),
    "mlp_low.cuh": (
        Budget("mlp_low_*", registers=64, must=("LDG*.128", "STG*.128"), never=ATOMICS,
               archs=("sm_80", "sm_86", "sm_89", "sm_120a", "sm_121a")),
    ),
    "mlp_low_sm75.cuh": (
        Budget("mlp_low_sm75_*", registers=64, must=("LDG*.128", "STG*.128"), never=ATOMICS, archs=("sm_75",)),
    ),
    "quant_down.cuh": (
        Budget("quant_down_*", registers=168, mma="HMMA.16816", must=("HMMA.16816",), never=ATOMICS,
               calls=("rcp_rn_f32_slowpath", "shflsync_*")),
    ),
    # fp16n: three CTAs per multiprocessor, 65536 registers by 384 threads. diag is for sm_80; others build it as well.
    "gemm_w4a4_normal.cuh": (
        Budget("gemm_w4a4_normal_*_fp16n", registers=168, per_mma=11.7, mma="IMMA.16864",
               must=("IMMA.16864", "LDGSTS*.128", "LDS.128", "FFMA", "HFMA2"), must_not=(*SLOW_CONVERSIONS, "I2FP", "LDG"),
               never=ATOMICS),
        Budget("gemm_w4a4_normal_*_diag", registers=255, per_mma=10.0, mma="IMMA.16864",
               must=("IMMA.16864", "HMMA.16816.F32", "LDGSTS*.128", "LDS.128", "FFMA"),
               must_not=(*SLOW_CONVERSIONS, "I2FP", "LDG"), never=ATOMICS),
    ),
    # fp16n: as many CTAs as in its GEMM, where shared memory has room for them.
    "mlp_w4a4_normal.cuh": (
        Budget("mlp_w4a4_normal_*_fp16n", registers=168, per_mma=11.8, mma="IMMA.16864",
               must=("IMMA.16864", "LDGSTS*.128", "LDS.128", "FFMA", "HFMA2"), must_not=(*SLOW_CONVERSIONS, "I2FP", "LDG"),
               never=ATOMICS, calls=("rcp_rn_f32_slowpath", "shflsync_*")),
        Budget("mlp_w4a4_normal_*_diag", registers=255, per_mma=10.0, mma="IMMA.16864",
               must=("IMMA.16864", "HMMA.16816.F32", "LDGSTS*.128", "LDS.128", "FFMA"),
               must_not=(*SLOW_CONVERSIONS, "I2FP", "LDG"), never=ATOMICS, calls=("rcp_rn_f32_slowpath", "shflsync_*")),
    ),
    "quant_down_normal.cuh": (
        Budget("quant_down_normal_*", registers=168, mma="HMMA.16816", must=("HMMA.16816",), never=ATOMICS,
               calls=("rcp_rn_f32_slowpath", "shflsync_*")),
    ),
    # Four IMMA.8832 are one IMMA.16864. LDG: sm_75 has no background copies. F2F: it packs fp16 one by one.
    "gemm_w4a4_sm75.cuh": (
        Budget("gemm_w4a4_sm75_*", registers=255, per_mma=3.75, mma="IMMA.8832", archs=("sm_75",),
               must=("IMMA.8832", "LDG*.128", "STS.128", "LDS*.128", "FFMA"), must_not=SLOW_CONVERSIONS, never=ATOMICS),
    ),
    "mlp_w4a4_sm75.cuh": (
        Budget("mlp_w4a4_sm75_*", registers=255, per_mma=3.8, mma="IMMA.8832", archs=("sm_75",),
               must=("IMMA.8832", "LDG*.128", "STS.128", "LDS*.128", "FFMA"), must_not=SLOW_CONVERSIONS, never=ATOMICS,
               calls=("rcp_rn_f32_slowpath", "shflsync_*")),
    ),
    "quant_down_sm75.cuh": (
        Budget("quant_down_sm75_*", registers=128, mma="HMMA.1688", must=("HMMA.1688",), never=ATOMICS,
               calls=("rcp_rn_f32_slowpath", "shflsync_*"), archs=("sm_75",)),
    ),
    # One CTA of 512 threads fills the registers. Loads of 64 bits: four lanes read a sector of 32 bytes.
    "adaln_int4.cuh": (
        Budget("adaln_int4_*", registers=128, mma="HMMA.16816", must=("HMMA.16816",), has=("LDG*.64", "LDS*.128"),
               never=ATOMICS, calls=DIVISIONS),
    ),
    "adaln_int4_normal.cuh": (
        Budget("adaln_int4_normal_*", registers=128, mma="HMMA.16816", must=("HMMA.16816",), has=("LDG*.64", "LDS*.128"),
               never=ATOMICS, calls=DIVISIONS),
    ),
    "adaln_int4_sm75.cuh": (
        Budget("adaln_int4_sm75_*", registers=128, mma="HMMA.1688", must=("HMMA.1688",), has=("LDG*.64", "LDS*.128"),
               never=ATOMICS, calls=DIVISIONS, archs=("sm_75",)),
    ),
    "awq_gemv.cuh": (
        Budget("awq_gemv_*", registers=128, must=("LDG*.128", "LDS*.128"), never=ATOMICS, calls=("shflsync_*",),
               archs=("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120")),
    ),
    "gemm_int8.cuh": (
        Budget("gemm_int8_*", registers=255, per_mma=8, mma="IMMA.16832", archs=LATER_THAN_SM75[1:],
               must=("IMMA.16832", "LDGSTS*.128", "LDS.128", "I2FP"), must_not=(*SLOW_CONVERSIONS, "LDG"), never=ATOMICS),
        # sm_80 has no I2FP: FADD on sums that start at the bits of a float (ptx.cuh).
        Budget("gemm_int8_*", registers=255, per_mma=8, mma="IMMA.16832", archs=("sm_80",),
               must=("IMMA.16832", "LDGSTS*.128", "LDS.128"), must_not=(*SLOW_CONVERSIONS, "LDG"), never=ATOMICS),
    ),
    "quant_int8.cuh": (
        Budget("quant_int8_*", registers=144, mma="HMMA.16816", must=("HMMA.16816",), never=(*ATOMICS, "F2I"),
               has=("LDG*.128", "STG*.128"), calls=("shflsync_*",), archs=LATER_THAN_SM75),
    ),
    "adaln_int8.cuh": (
        Budget("adaln_int8_*", registers=128, mma="HMMA.16816", must=("HMMA.16816",), has=("LDG*.64", "LDS*.128", "STG*.128"),
               never=ATOMICS, calls=DIVISIONS, archs=LATER_THAN_SM75),
    ),
    # No MMA: instructions are counted per store of 16 bytes, which is 8 weights; a thread makes 4 of 16 bytes read at once.
    # sm_75 rounds by F2F to fp16, and by integers to bf16, for which it has no conversion.
    "dequant.cuh": (
        *(Budget(f"dequant_*_{precision}", registers=48, per_mma=per_store, mma="STG*.128", must=("LDG*.128",),
                 never=(*ATOMICS, *SLOW_CONVERSIONS), archs=("sm_80", "sm_86", "sm_89", "sm_90", "sm_120"))
          for precision, per_store in (("int4", 67), ("nvfp4", 77))),
        *(Budget(f"dequant_{half}_{precision}", registers=64, per_mma=per_store, mma="STG*.128", must=("LDG*.128",),
                 never=(*ATOMICS, "I2F", "F2I"), archs=("sm_75",))
          for half, precision, per_store in (("fp16", "int4", 73), ("fp16", "nvfp4", 84), ("bf16", "int4", 114),
                                             ("bf16", "nvfp4", 125))),
    ),
    # Registers are those at entry; setmaxnreg then gives a consumer 240. Per QGMMA of 64 x 128 x 32: 32 FFMA, GROUP as many
    # FMUL, and what unpacks 4-bit weights.
    "gemm_fp8.cuh": (
        *(Budget(f"gemm_fp8_*_{kind}_c?", registers=168, per_mma=per_mma, mma="QGMMA.64x128x32", archs=("sm_90a",),
                 must=("QGMMA.64x128x32", "FFMA", "LDS.128", "SYNCS"),
                 must_not=(*SLOW_CONVERSIONS, "F2FP", "HMMA", "LDG", "MEMBAR"),
                 has=("UBLKCP", "USETMAXREG", "HGMMA.64x128x16", "STSM*.MT88.4"), never=ATOMICS)
          for kind, per_mma in (("token_w4", 48), ("token_w8", 43), ("group_w4", 85), ("group_w8", 80))),
    ),
    "quant_fp8.cuh": (
        Budget("quant_fp8_*", registers=128, mma="HMMA.16816", must=("HMMA.16816", "LDG*.128"), must_not=SLOW_CONVERSIONS,
               never=ATOMICS, calls=("rcp_rn_f32_slowpath", "shflsync_*", "warpsync_*"), archs=("sm_90a",)),
    ),
    "adaln_fp8.cuh": (
        Budget("adaln_fp8_*", registers=128, mma="HMMA.16816", must=("HMMA.16816",), has=("LDG*.128", "LDS*.128"),
               never=ATOMICS, calls=DIVISIONS, archs=("sm_90a",)),
    ),
    # Two CTAs per multiprocessor: 65536 registers by 256 threads. ptxas puts a NOP behind nearly every OMMA.
    "gemm_nvfp4.cuh": (
        Budget("gemm_nvfp4_*", registers=255, per_mma=3.2, mma="OMMA", archs=("sm_120a", "sm_121a"),
               must=("OMMA.SF.16864", "LDGSTS*.128", "LDS.128"), must_not=("LDG", "FMUL", "FFMA"), never=ATOMICS),
    ),
    "mlp_nvfp4.cuh": (
        Budget("mlp_nvfp4_*", registers=255, per_mma=4, mma="OMMA", archs=("sm_120a", "sm_121a"),
               must=("OMMA.SF.16864", "LDGSTS*.128", "LDS.128"), must_not=("LDG", "FMUL", "FFMA"), never=ATOMICS),
    ),
    "quant_nvfp4.cuh": (
        Budget("quant_nvfp4_*", registers=128, mma="HMMA.16816", archs=("sm_120a", "sm_121a"),
               must=("HMMA.16816", "F2FP.SATFINITE.E2M1"), must_not=SLOW_CONVERSIONS, never=ATOMICS),
    ),
    "adaln_nvfp4.cuh": (
        Budget("adaln_nvfp4_*", registers=128, mma="HMMA.16816", archs=("sm_120a", "sm_121a"), has=("LDG*.64", "LDS*.128"),
               must=("HMMA.16816",), never=ATOMICS, calls=DIVISIONS),
    ),
}


@dataclass
class Counts:
    """What one kernel costs on one arch."""
    name: str
    arch: str
    registers: int
    spills: int
    code: list                        # opcodes of the kernel
    loops: list                       # of (first, last) places
    shared: int = 0
    stack: int = 0
    warnings: tuple = ()              # of ptxas: wgmmas that it runs one after the other

    def hot_loop(self, mma):
        """The opcodes of the innermost loop with the most `mma`s; the whole kernel where no loop has one."""
        def count(loop):
            return sum(matches(op, mma) for op in self.code[loop[0]:loop[1] + 1])

        having = [loop for loop in self.loops if count(loop)]
        inner = [loop for loop in having if not any(other != loop and loop[0] <= other[0] and other[1] <= loop[1]
                                                    for other in having)]
        if not inner:
            return self.code
        first, last = max(inner, key=count)
        return self.code[first:last + 1]

    def per_mma(self, mma):
        """Instructions in the hot loop per `mma`, None without any."""
        loop = self.hot_loop(mma)
        mmas = sum(matches(op, mma) for op in loop)
        return len(loop) / mmas if mmas else None


def matches(op, pattern):
    """LDS matches LDS and LDS.128 but not LDSM; LDG*.128 matches LDG.E.128.CONSTANT."""
    if "*" in pattern:
        return fnmatch.fnmatchcase(op, pattern) or fnmatch.fnmatchcase(op, pattern + ".*")
    return op == pattern or op.startswith(pattern + ".")


def histogram(ops):
    """How often each opcode occurs, without its modifiers but for those that change what it costs."""
    kinds = (re.match(r"(?:IMMA|HMMA|QMMA)\.\d+|(?:LDS|LDG|STG|STS|LDGSTS)(?:\..*?)?\.(?:64|128)\b|\w+", op)[0] for op in ops)
    return collections.Counter(re.sub(r"\.(E|BYPASS|CONSTANT|SYS|STRONG|GPU)\b", "", kind) for kind in kinds)


def parse(sass, log, arch):
    """The kernels of one cubin -> [Counts], sorted by name."""
    resources = _resources(log)
    kernels = []
    for section in re.split(r"^\s*//-+ +", sass, flags=re.M):
        if not section.startswith(".text."):
            continue
        name = section.split()[0].removeprefix(".text.")
        registers = int(re.search(r"SHI_REGISTERS=(\d+)", section)[1]) if "SHI_REGISTERS" in section else 0
        code, labels, branches = [], {}, []
        for line in section.splitlines():
            label = re.match(r"(\.L_\w+):", line)
            instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)(.*)", line)
            if label:
                labels[label[1]] = len(code)
            elif instruction:
                op, operands = instruction.groups()
                target = re.search(r"(\.L_\w+)", operands)
                routine = re.search(r"\$__internal_\d+_\$__cuda_sm\w+?_(\w+)|`\((\w+)\)", operands)
                if target and op.startswith("BRA"):
                    branches.append((len(code), target[1]))
                if op.startswith("CALL"):             # to a label: not a call, a way to leave a loop
                    op = "BRA" if target else f"CALL.{routine[1] or routine[2]}" if routine else "CALL"
                code.append(op)
        # The last branch is the jump to itself that ends every kernel, and what follows are NOPs that fill a cache line.
        loops = sorted({(labels[to], at) for at, to in branches if labels.get(to, at + 1) < at})
        while code and code[-1] in ("NOP", "BRA"):
            code.pop()
        used = resources.get(name, {})
        kernels.append(Counts(name, arch, used.get("registers", registers), used.get("spills", 0), code, loops,
                              used.get("shared", 0), used.get("stack", 0),
                              tuple(re.findall(rf"(wgmma.* serialized .*) (?:for|in) (?:the )?function '{name}'", log))))
    return sorted(kernels, key=lambda counts: counts.name)


def _resources(log):
    """What ptxas -v says of each kernel."""
    found, name = {}, None
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            name = match[1]
            found[name] = {}
        elif name and (match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", line)):
            found[name] |= {"stack": int(match[1]), "spills": int(match[2]) + int(match[3])}
        elif name and (match := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            found[name] |= {"registers": int(match[1]), "shared": int(shared[1]) if shared else 0}
    return found


def broken(counts, budget):
    """What `counts` has against `budget`, one sentence each; empty if it keeps it."""
    loop = counts.hot_loop(budget.mma)
    complaints = []
    if counts.registers > budget.registers:
        complaints.append(f"{counts.registers} registers, at most {budget.registers}")
    if counts.spills > budget.spills:
        complaints.append(f"{counts.spills} bytes spilled, at most {budget.spills}")
    complaints.extend(counts.warnings)
    per_mma = counts.per_mma(budget.mma)
    if None not in (per_mma, budget.per_mma) and per_mma > budget.per_mma:
        complaints.append(f"{per_mma:.2f} instructions per {budget.mma}, at most {budget.per_mma}: "
                          + ", ".join(f"{n} {op}" for op, n in histogram(loop).most_common(12)))
    for pattern in budget.must:
        if not any(matches(op, pattern) for op in loop):
            complaints.append(f"no {pattern} in the hot loop")
    for pattern in budget.has:
        if not any(matches(op, pattern) for op in counts.code):
            complaints.append(f"no {pattern} in the kernel")
    allowed = [f"CALL.{name}" for name in budget.calls]
    calls = [op for op in counts.code if not any(matches(op, name) for name in allowed)]
    for where, patterns, ops in (("the hot loop", budget.must_not, loop), ("the kernel", ("CALL",), calls),
                                 ("the kernel", LOCAL_MEMORY + budget.never, counts.code)):
        for pattern in patterns:
            found = [op for op in ops if matches(op, pattern)]
            if found:
                complaints.append(f"{len(found)} {found[0]} in {where}")
    return [f"{counts.name} {counts.arch}: {complaint}" for complaint in complaints]


def table(rows):
    """Markdown of [(Counts, Budget)]. Without MMAs the mix is of the whole kernel."""
    lines = ["| kernel | arch | registers | spills | shared | loop | MMAs | per MMA | mix, per MMA |",
             "|---|---|---|---|---|---|---|---|---|"]
    for counts, budget in rows:
        loop, per_mma = counts.hot_loop(budget.mma), counts.per_mma(budget.mma)
        mmas = round(len(loop) / per_mma) if per_mma else 0
        mix = ", ".join(f"{n / mmas:.2f} {op}" if mmas else f"{n} {op}" for op, n in histogram(loop).most_common(10))
        ratio = f"{per_mma:.2f}" + (f" of {budget.per_mma}" if budget.per_mma else "") if per_mma else ""
        lines.append(f"| {counts.name} | {counts.arch} | {counts.registers} of {budget.registers} | {counts.spills} | "
                     f"{counts.shared} | {len(loop)} | {mmas} | {ratio} | {mix} |")
    return "\n".join(lines)


@functools.cache
def measure(toolchain, file, arch):
    """[(Counts, Budget)] of one kernel file; a kernel no budget names is an error of BUDGETS."""
    built = toolchain.cubin(toolchain.KERNELS / file, arch)
    rows = []
    for counts in parse(toolchain.sass(built.path), built.log, arch):
        mine = [b for b in BUDGETS[file] if fnmatch.fnmatchcase(counts.name, b.kernel) and arch in b.archs]
        if len(mine) != 1:
            raise KeyError(f"{file}: {len(mine)} budgets for {counts.name} on {arch}")
        rows.append((counts, mine[0]))
    return rows


def measured(toolchain, file):
    """[(Counts, Budget)] of one kernel file on each arch that it has kernels for."""
    return [row for arch in archs(file) for row in measure(toolchain, file, arch)]


def archs(file):
    """Those that the kernels of a file have a budget for."""
    return [arch for arch in ARCHS if any(arch in budget.archs for budget in BUDGETS[file])]


# ---- docs/kernels.md

def section(toolchain):
    """The counts of all kernels as markdown."""
    files = {file: measured(toolchain, file) for file in BUDGETS}
    rows = [row for each in files.values() for row in each]
    kernels = [counts for counts, _ in rows]
    return "\n\n".join([
        f"nvcc {toolchain.version()}. {len(kernels)} kernels, each counted once per arch: "
        f"{sum(counts.spills for counts in kernels)} bytes spilled, {sum(counts.stack for counts in kernels)} bytes of stack, "
        f"{sum(len(counts.warnings) for counts in kernels)} wgmma serialised.",
        *(f"### {file}\n\n{counts_table(each)}" for file, each in files.items()),
        f"### What the hot loops consist of\n\n{loops_table(rows)}"]) + "\n"


def counts_table(rows):
    """Markdown of [(Counts, Budget)] of one file."""
    lines = ["| kernel | arch | registers (budget) | instructions | MMAs among them | per MMA (budget) |",
             "|---|---|---|---|---|---|"]
    for kernels, archs, (registers, most_registers, instructions, mmas, mma, most) in merged(rows, figures):
        ratio = f"{instructions / mmas:.2f}" + (f" ({most})" if most else "") if mmas else "-"
        lines.append(f"| {kernels} | {archs} | {registers} ({most_registers}) | {instructions} | "
                     f"{f'{mmas} {mma}' if mmas else '-'} | {ratio} |")
    return "\n".join(lines)


def figures(counts, budget):
    loop = counts.hot_loop(budget.mma)
    mmas = sum(matches(op, budget.mma) for op in loop)
    return counts.registers, budget.registers, len(loop), mmas, budget.mma, budget.per_mma


def loops_table(rows, most=8):
    """Markdown of what the hot loops of [(Counts, Budget)] consist of, where there is a budget per MMA."""
    lines = ["| kernel | arch | instructions per MMA, the most frequent first |", "|---|---|---|"]
    for kernels, archs, mix in merged([row for row in rows if row[1].per_mma], mix_per_mma):
        lines.append(f"| {kernels} | {archs} | {', '.join(mix[:most])} |")
    return "\n".join(lines)


def mix_per_mma(counts, budget):
    """("4.00 FMUL", ...), the most frequent first."""
    loop = counts.hot_loop(budget.mma)
    mmas = sum(matches(op, budget.mma) for op in loop)
    return tuple(f"{n / mmas:.2f} {op}" for op, n in histogram(loop).most_common())


def merged(rows, figures_of):
    """(kernels, archs, figures) of [(Counts, Budget)]: rows of equal figures are one. Archs are joined first."""
    by_kernel = {}
    for counts, budget in rows:
        by_kernel.setdefault((counts.name, figures_of(counts, budget)), []).append(counts.arch)
    by_figures = {}
    for (name, found), archs in by_kernel.items():
        by_figures.setdefault((", ".join(archs), found), []).append(name)
    return [(joined(names), archs, found) for (archs, found), names in by_figures.items()]


def joined(names):
    """Kernels by one name where they are all of its choices, gemm_{bf16,fp16}_s4; else one after the other."""
    parts = [list(dict.fromkeys(part)) for part in zip(*(name.split("_") for name in names), strict=False)]
    together = "_".join(part[0] if len(part) == 1 else f"{{{','.join(part)}}}" for part in parts)
    return together if {"_".join(choice) for choice in itertools.product(*parts)} == set(names) else ", ".join(names)


def split_docs(text):
    """Text of docs/kernels.md -> what stands before, between and after the marks around the counts."""
    before, begin, rest = text.partition(BEGIN)
    between, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{DOCS} lacks the line {END if begin else BEGIN.strip()}; the counts stand between it and "
                         f"{BEGIN.strip() if begin else END}. Put it back.")
    return before, between, after


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", action="store_true", help="print the counts as docs/kernels.md has them")
    parser.add_argument("--write", action="store_true", help="put them into docs/kernels.md")
    options = parser.parse_args()
    sys.path[0] = str(ROOT / "tests" / "kernels")
    try:
        import toolchain
    except ModuleNotFoundError as missing:
        sys.exit(f"kernel_budgets.py: {missing}. Take a Python that has it, such as the one of .environment, which "
                 "python3 tests/run.py makes.")
    try:
        if options.write:
            before, _, after = split_docs(DOCS.read_text(encoding="utf-8"))
            DOCS.write_text(before + BEGIN + section(toolchain) + END + after, encoding="utf-8")
        elif options.docs:
            print(section(toolchain), end="")
        else:
            print(table([row for file in BUDGETS for row in measured(toolchain, file)]))
    except (ValueError, toolchain.Missing, toolchain.BuildFailed) as error:
        sys.exit(f"kernel_budgets.py: {error}")


if __name__ == "__main__":
    main()
