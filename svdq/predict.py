"""What a step of FLUX.1-dev at 1024 x 1024 would take on a card, by count and data sheet alone. A prediction, no measurement.

    predict(card)         {"card", "assumed", "rows", "seconds", ...}: each launch of a step, what limits it, and the sum
    as_markdown(facts)    the same for people

A row takes the longest of four: its bytes at the card's bandwidth, its MMAs at the tensor cores' rate, the instructions of its
main loop at one per cycle and scheduler, and those of them that the units for single floats do, at theirs. All but bytes wait
for the last wave of tiles. Launches come from step_counts.json (tools/count_step.py), rates from data_sheets.py, all else is in
ASSUMED. No number is fitted to a card.

Test: tests/unit/test_predict.py
"""

import json
import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

from .data_sheets import CARDS, FLOATS

COUNTS = Path(__file__).with_name("step_counts.json")

ASSUMED = {
    "memory": (0.85, "share of the data sheet's bandwidth that kernels reach; assumed"),
    "tensor": (0.80, "share of its limit, MMAs or instructions, that a GEMM's main loop reaches; assumed"),
    "attention": (0.75, "share of the tensor cores' rate for 16 bit with fp32 sums that attention reaches; assumed"),
    "gap": (1e-6, "seconds between two launches that a full queue leaves; assumed"),
    "resident": (2, "tiles of 128 x 128 that a multiprocessor works on at once; by the registers of our INT4 and NVFP4 GEMMs"),
    "clock": (None, "boost clock of the data sheet, all the time; a card at its power limit runs slower"),
}


class Gemm(NamedTuple):
    """The main loop of the 4-bit GEMM that serves an architecture.

    unit           of data_sheets.RATES, which it runs on
    per_mma        multiply-adds per MMA and scheduler
    instructions   per MMA; docs/kernels.md, static counts
    floats         those of them that the units for single floats do: FFMA, FMUL and FADD, the same
    scaling        cycles of the tensor cores for the scales of sums, per cycle of the MMA
    """
    variant: str
    unit: str
    per_mma: int
    instructions: float
    floats: float
    scaling: float = 0


GEMMS = {
    "sm_75": Gemm("w4a4_sm75", "int4", 2048, 3.64, 2.12), "sm_80": Gemm("w4a4_diag", "int4", 8192, 9.89, 4.50, 0.5),
    "sm_86": Gemm("w4a4_sm80", "int4", 8192, 11.55, 8.50), "sm_89": Gemm("w4a4_sm80", "int4", 8192, 11.55, 8.50),
    "sm_90": Gemm("w4a8_sm90", "fp8", 65536, 45.88, 32.00), "sm_120": Gemm("nvfp4_sm120", "fp4", 8192, 2.89, 0.00),
}
LEAST = 5e-6        # seconds of a row that has a line of its own
NUNCHAKU = {"sm_80": 17.05, "sm_86": 13.05, "sm_89": 13.05}     # its instructions per MMA, counted with our compiler


@cache
def counts():
    return json.loads(COUNTS.read_text(encoding="utf-8"))


def predict(name, rows=None, instructions=None):
    """The facts of a step on a card of data_sheets.CARDS. Raises KeyError for another.

    rows           launches as step_counts.json has them; None: those of our kernels
    instructions   per MMA of the 4-bit GEMM, of which no more is known; None: those of our kernels
    """
    card = CARDS[name]
    gemm = GEMMS[card.arch]
    gemm = gemm if instructions is None else gemm._replace(instructions=instructions, floats=0, scaling=0)
    done = [_timed(row, card, gemm) for row in (counts()[card.counted] if rows is None else rows)]
    ideal = sum(row["low_rank_macs"] for row in done) / (card.sms * card.clock * 1e9 * card.rates["bf16"])
    seconds = sum(row["seconds"] for row in done)
    return {"prediction": True, "card": name, "data_sheet": card._asdict(), "gemm": gemm._asdict(),
            "assumed": {key: {"value": value, "why": why} for key, (value, why) in ASSUMED.items()}, "rows": done,
            "launches": sum(row["calls"] for row in done), "seconds": seconds,
            "bytes": _bytes(done),
            "low_rank": {"of_step_at_peak": ideal / seconds, "of_step": ideal / ASSUMED["tensor"][0] / seconds}}


def _bytes(rows):
    """Of a step, by the rules of tools/count_step.py."""
    between = [row for row in rows if row["kind"] in ("glue", "quantiser")]
    return {"between": sum(row["activations"] + row["weights"] for row in between),
            "moved": sum(row["activations"] for row in rows), "weights": sum(row["weights"] for row in rows),
            "low_rank": sum(row["low_rank_bytes"] for row in rows)}


def nunchaku_rows(hidden=3072, image=4096, text=512, blocks=57, rank=32):
    """A step by Nunchaku's kernel sequence, in the words of its public sources: norm and modulation are passes of their own,
    single blocks quantise one input twice, the sum of both branches and the gate are passes; norms and rotation of q and k, and
    GELU with the quantiser of fc2, are in the GEMMs. All 57 blocks as single ones, which double ones come near to."""
    tokens = image + text
    unit, codes = 2 * tokens * hidden, 0.5625 * tokens * hidden + 2 * tokens * rank     # 16 bit; codes, scales, low rank

    def row(kind, name, n, activations, k=0, weights=0, low=0):
        return {"kind": kind, "name": name, "shapes": f"{tokens}x{n}", "calls": blocks, "activations": blocks * activations,
                "weights": blocks * weights, "macs": blocks * tokens * n * k,
                "low_rank_macs": blocks * tokens * (n + k) * rank if k else 0, "low_rank_bytes": blocks * low}

    def gemm(name, n, k, activations):
        factors = 2 * rank * (n + k)
        return row("gemm", f"svdq::gemm {name}", n, activations, k, 0.53125 * n * k + factors, factors + 4 * tokens * rank)

    h = hidden
    return [row("glue", "norm", h, 2 * unit), row("glue", "modulate", h, 2 * unit), row("quantiser", "of qkv", h, unit + codes),
            row("quantiser", "of fc1", h, unit + codes), row("quantiser", "of out", h, unit + codes),
            gemm("qkv", 3 * h, h, codes + 3 * unit), gemm("fc1", 4 * h, h, 5 * codes), gemm("out", h, h, codes + unit),
            gemm("fc2", h, 4 * h, 4 * codes + unit), row("glue", "sum", h, 3 * unit), row("glue", "gate", h, 3 * unit),
            row("attention", "attention", h, 4 * unit) | {"macs": blocks * 2 * tokens * tokens * h}]


def bf16(name):
    """The facts of a step of ComfyUI's own layers in 16 bit on a card, however much memory they take."""
    return predict(name, counts()["bf16"])


def linear(name, m, n, k, rank):
    """Seconds of one linear of ours, x [m, k] in 16 bit -> out [m, n], in a launch for its quantiser and one for its GEMM."""
    card, codes = CARDS[name], m * k / 2 + m * k / 16 + 2 * m * rank        # fp32 scales of groups of 64 are a 16th, too
    about = {"calls": 1, "shapes": f"{m}x{k} {m}x{n}"}
    rows = [about | {"kind": "quantiser", "name": "svdq::quant_down", "activations": 2 * m * k + codes, "weights": 2 * k * rank,
                     "macs": 0, "low_rank_macs": m * k * rank},
            about | {"kind": "gemm", "name": "svdq::gemm", "activations": codes + 2 * m * n, "macs": m * n * k,
                     "weights": n * k * (1 / 2 + 1 / 32) + 2 * n * rank, "low_rank_macs": m * n * rank}]
    return sum(_timed(row, card, GEMMS[card.arch])["seconds"] for row in rows)


def _timed(row, card, gemm):
    """A row with the seconds of each bound, of all its calls, and the one that limits."""
    cycles_per_second, calls, rates = card.clock * 1e9, row["calls"], card.rates
    ours = row["name"].startswith(("svdq::gemm", "svdq::mlp"))
    rate = rates[gemm.unit] / (1 + gemm.scaling) if ours else rates["bf16"]
    share = ASSUMED["attention" if row["kind"] == "attention" else "tensor"][0]
    tail = _tail(row, card) if row["kind"] == "gemm" else 1
    bounds = {"bytes": (row["activations"] + row["weights"]) / (card.memory * 1e9 * ASSUMED["memory"][0]),
              "MMA": row["macs"] / (card.sms * rate * cycles_per_second) * tail / share,
              "issue": 0, "floats": 0}
    if ours:                                    # the low-rank up projection follows the main loop on the same tensor cores
        bounds["MMA"] += row["low_rank_macs"] / (card.sms * rates["bf16"] * cycles_per_second) * tail / share
        of_a_scheduler = row["macs"] / gemm.per_mma / (4 * card.sms * cycles_per_second) * tail / share     # MMAs per Hz
        bounds["issue"] = of_a_scheduler * gemm.instructions
        bounds["floats"] = of_a_scheduler * gemm.floats * 32 / FLOATS[card.arch]
    limit = max(bounds, key=bounds.get)
    return row | {"bounds": bounds, "limit": limit, "tail": tail, "seconds": bounds[limit] + calls * ASSUMED["gap"][0]}


def _tail(row, card):
    """How much longer whole waves of tiles take than the work in them; 1 where they fit."""
    *_, m, n = (int(size) for size in row["shapes"].split()[-1].split("x"))
    tiles, slots = math.ceil(m / 128) * math.ceil(n / 128), card.sms * ASSUMED["resident"][0]
    if tiles <= slots // 2:
        return slots / 2 / tiles                # some multiprocessors have nothing to do
    return math.ceil(tiles / slots) * slots / tiles if tiles > slots else slots / tiles


def _shown(rows):
    """The longest first. Those below LEAST, without what is between launches, are one."""
    rows = sorted(rows, key=lambda row: -row["seconds"])
    long, short = [], []
    for row in rows:
        (long if max(row["bounds"].values()) >= LEAST else short).append(row)
    if short:
        rest = {name: sum(row[name] for row in short) for name in ("calls", "activations", "weights", "seconds")}
        bounds = {name: sum(row["bounds"][name] for row in short) for name in short[0]["bounds"]}
        long.append(rest | {"kind": "the rest", "name": "", "shapes": f"{len(short)} kinds of launches", "bounds": bounds,
                            "tail": 1, "limit": max(bounds, key=bounds.get)})
    return long


def in_short(facts):
    kinds = {}
    for row in facts["rows"]:
        kinds[row["kind"]] = kinds.get(row["kind"], 0) + 1000 * row["seconds"]
    return (f"PREDICTION for {facts['card']}, not measured: a step of {1000 * facts['seconds']:.0f} ms, of which "
            + ", ".join(f"{kind} {ms:.0f}" for kind, ms in sorted(kinds.items(), key=lambda each: -each[1])) + ".")


def as_markdown(facts):
    low, nbytes, limits = facts["low_rank"], {name: each / 1e9 for name, each in facts["bytes"].items()}, {}
    for row in facts["rows"]:
        limits[row["limit"]] = limits.get(row["limit"], 0) + 1000 * row["seconds"]
    lines = [f"PREDICTION for {facts['card']}, from counts and its data sheet; nothing was measured. "
             f"{1000 * facts['seconds']:.0f} ms per step in {facts['launches']} launches. Limited by "
             + ", ".join(f"{limit} {ms:.0f} ms" for limit, ms in sorted(limits.items(), key=lambda each: -each[1])) + ".", "",
             f"Bytes: {nbytes['moved']:.1f} GB of activations, {nbytes['between']:.1f} GB of it between GEMMs, and "
             f"{nbytes['weights']:.1f} GB of weights; of both {nbytes['low_rank']:.2f} GB for the low-rank branch.", "",
             "A launch takes the longest of: its MMAs, issue (the main loop's instructions), floats (those of them for single "
             "floats), its bytes. Shapes are those of what it reads and what it writes, of a GEMM as numbers. Waves: how much "
             "longer whole waves of tiles take than the work in them, in the first three.", "",
             "| kind | launch | shapes | calls | GB | MMA ms | issue ms | floats ms | bytes ms | waves | limit | ms |",
             "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in _shown(facts["rows"]):
        bounds = row["bounds"]
        lines.append(f"| {row['kind']} | {row['name']} | {row['shapes']} | {row['calls']} | "
                     f"{(row['activations'] + row['weights']) / 1e9:.2f} | {1000 * bounds['MMA']:.2f} | "
                     f"{1000 * bounds['issue']:.2f} | {1000 * bounds['floats']:.2f} | {1000 * bounds['bytes']:.2f} | "
                     f"x {row['tail']:.2f} | {row['limit']} | {1000 * row['seconds']:.2f} |")
    stock = 1000 * bf16(facts["card"])["seconds"]
    lines += ["", f"The same model of ComfyUI's own layers in 16 bit: {stock:.0f} ms per step.", "",
              f"Low rank: {low['of_step_at_peak']:.1%} of the step at the tensor cores' rate, {low['of_step']:.1%} at the "
                  "share assumed for main loops.", "", "Assumed, for every card alike:", ""]
    return "\n".join([*lines, *(f"- {key}: {each['why']}" + ("" if each["value"] is None else f" ({each['value']})")
                                for key, each in facts["assumed"].items())])
