"""What a step of FLUX.1-dev at 1024 x 1024 would take on a card, by count and data sheet alone. A prediction, no measurement.

    predict(card)         {"card", "assumed", "rows", "seconds", ...}: each launch of a step, what limits it, and the sum
    as_markdown(facts)    the same for people

A row takes the longest of three: its bytes at the card's bandwidth, its MMAs at the tensor cores' rate, and the instructions
of its main loop at one per cycle and scheduler. MMAs and instructions wait for the last wave of tiles. Launches come from
step_counts.json (tools/count_step.py), rates from CARDS, all else is in ASSUMED. No number is fitted to a card.

Test: tests/unit/test_predict.py
"""

import json
import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

COUNTS = Path(__file__).with_name("step_counts.json")

ASSUMED = {
    "memory": (0.85, "share of the data sheet's bandwidth that kernels reach; assumed"),
    "tensor": (0.80, "share of its limit, MMAs or instructions, that a GEMM's main loop reaches; assumed"),
    "attention": (0.75, "share of the tensor cores' rate for 16 bit with fp32 sums that attention reaches; assumed"),
    "gap": (1e-6, "seconds between two launches that a full queue leaves; assumed"),
    "resident": (2, "tiles of 128 x 128 that a multiprocessor works on at once; by the registers of our INT4 and NVFP4 GEMMs"),
    "clock": (None, "boost clock of the data sheet, all the time; a card at its power limit runs slower"),
}


class Card(NamedTuple):
    """sms, clock [GHz, boost], memory [GB/s]: NVIDIA's data sheets and architecture whitepapers. counted: the card of
    step_counts.json with the same plans."""
    sms: int
    clock: float
    memory: float
    arch: str
    counted: str


CARDS = {
    "2080 Ti": Card(68, 1.545, 616, "sm_75", "RTX 2080 Ti"), "3060": Card(28, 1.777, 360, "sm_86", "RTX 3090"),
    "3090": Card(82, 1.695, 936, "sm_86", "RTX 3090"), "4070": Card(46, 2.475, 504, "sm_89", "RTX 4090"),
    "4090": Card(128, 2.52, 1008, "sm_89", "RTX 4090"), "5070 Ti": Card(70, 2.452, 896, "sm_120", "RTX 5090"),
    "5090": Card(170, 2.407, 1792, "sm_120", "RTX 5090"), "A100": Card(108, 1.41, 2039, "sm_80", "A100"),
    "H200": Card(132, 1.83, 4800, "sm_90", "H200"),
}


class Unit(NamedTuple):
    """Of one multiprocessor: multiply-adds a cycle in 16 bit with fp32 sums, and of the unit that our GEMM runs on; then the
    GEMM's multiply-adds per MMA and scheduler, and instructions per MMA (docs/kernels.md, static counts). scaling: cycles of
    the tensor cores for the scales of sums, per cycle of the MMA."""
    half: int
    gemm: int
    per_mma: int
    instructions: float
    scaling: float = 0


UNITS = {
    "sm_75": Unit(256, 2048, 2048, 3.64), "sm_80": Unit(1024, 4096, 8192, 9.89, 0.5), "sm_86": Unit(256, 2048, 8192, 11.55),
    "sm_89": Unit(256, 2048, 8192, 11.55), "sm_90": Unit(2048, 4096, 65536, 45.88), "sm_120": Unit(256, 2048, 8192, 2.89),
}
NUNCHAKU = {"sm_80": 17.05, "sm_86": 13.05, "sm_89": 13.05}     # its instructions per MMA, counted with our compiler


@cache
def counts():
    return json.loads(COUNTS.read_text(encoding="utf-8"))


def predict(name, rows=None, instructions=None):
    """The facts of a step on a card of CARDS. Raises KeyError for another.

    rows           launches as step_counts.json has them; None: those of our kernels
    instructions   per MMA of the 4-bit GEMM; None: those of our kernels
    """
    card = CARDS[name]
    unit = UNITS[card.arch]
    unit = unit if instructions is None else unit._replace(instructions=instructions, scaling=0)
    done = [_timed(row, card, unit) for row in (counts()[card.counted] if rows is None else rows)]
    ideal = sum(row["low_rank_macs"] for row in done) / (card.sms * card.clock * 1e9 * unit.half)
    seconds = sum(row["seconds"] for row in done)
    return {"prediction": True, "card": name, "data_sheet": card._asdict(), "unit": unit._asdict(),
            "assumed": {key: {"value": value, "why": why} for key, (value, why) in ASSUMED.items()}, "rows": done,
            "launches": sum(row["calls"] for row in done), "seconds": seconds,
            "low_rank": {"of_step_at_peak": ideal / seconds, "of_step": ideal / ASSUMED["tensor"][0] / seconds}}


def nunchaku_rows(hidden=3072, image=4096, text=512, blocks=57, rank=32):
    """A step by Nunchaku's kernel sequence, in the words of its public sources: norm and modulation are passes of their own,
    single blocks quantise one input twice, the sum of both branches and the gate are passes; norms and rotation of q and k, and
    GELU with the quantiser of fc2, are in the GEMMs. All 57 blocks as single ones, which double ones come near to."""
    tokens = image + text
    unit, codes = 2 * tokens * hidden, 0.5625 * tokens * hidden + 2 * tokens * rank     # 16 bit; codes, scales, low rank

    def row(kind, name, n, activations, k=0, weights=0):
        return {"kind": kind, "name": name, "shapes": f"{tokens}x{n}", "calls": blocks, "activations": blocks * activations,
                "weights": blocks * weights, "macs": blocks * tokens * n * k, "low_rank_macs": blocks * tokens * (n + k) * rank}

    def gemm(name, n, k, activations):
        return row("gemm", f"svdq::gemm {name}", n, activations, k, 0.53125 * n * k + 2 * rank * (n + k))

    h = hidden
    return [row("glue", "norm", h, 2 * unit), row("glue", "modulate", h, 2 * unit), row("quantiser", "of qkv", h, unit + codes),
            row("quantiser", "of fc1", h, unit + codes), row("quantiser", "of out", h, unit + codes),
            gemm("qkv", 3 * h, h, codes + 3 * unit), gemm("fc1", 4 * h, h, 5 * codes), gemm("out", h, h, codes + unit),
            gemm("fc2", h, 4 * h, 4 * codes + unit), row("glue", "sum", h, 3 * unit), row("glue", "gate", h, 3 * unit),
            row("attention", "attention", h, 4 * unit) | {"macs": blocks * 2 * tokens * tokens * h}]


def _timed(row, card, unit):
    """A row with the seconds of each bound, of all its calls, and the one that limits."""
    cycles_per_second, calls = card.clock * 1e9, row["calls"]
    ours = row["name"].startswith(("svdq::gemm", "svdq::mlp"))
    rate = unit.gemm / (1 + unit.scaling) if ours else unit.half
    share = ASSUMED["attention" if row["kind"] == "attention" else "tensor"][0]
    tail = _tail(row, card) if row["kind"] == "gemm" else 1
    bounds = {"bytes": (row["activations"] + row["weights"]) / (card.memory * 1e9 * ASSUMED["memory"][0]),
              "MMA": row["macs"] / (card.sms * rate * cycles_per_second) * tail / share,
              "issue": row["macs"] / unit.per_mma * unit.instructions / (4 * card.sms * cycles_per_second) * tail / share
              if ours else 0}
    if ours:                                    # the low-rank up projection follows the main loop on the same tensor cores
        bounds["MMA"] += row["low_rank_macs"] / (card.sms * unit.half * cycles_per_second) * tail / share
    limit = max(bounds, key=bounds.get)
    return row | {"bounds": bounds, "limit": limit, "tail": tail, "seconds": bounds[limit] + calls * ASSUMED["gap"][0]}


def _tail(row, card):
    """How much longer whole waves of tiles take than the work in them; 1 where they fit."""
    *_, m, n = (int(size) for size in row["shapes"].split()[-1].split("x"))
    tiles, slots = math.ceil(m / 128) * math.ceil(n / 128), card.sms * ASSUMED["resident"][0]
    if tiles <= slots // 2:
        return slots / 2 / tiles                # some multiprocessors have nothing to do
    return math.ceil(tiles / slots) * slots / tiles if tiles > slots else slots / tiles


def named(card):
    """The name in CARDS of a card that calls itself so, or None: a laptop's or an NVL is another."""
    return next((name for name in CARDS if card.endswith(f"RTX {name}") or card.endswith(f" {name}")
                 or name == "A100" and card.endswith("A100-SXM4-80GB")), None)


def in_short(facts):
    kinds = {}
    for row in facts["rows"]:
        kinds[row["kind"]] = kinds.get(row["kind"], 0) + 1000 * row["seconds"]
    return (f"PREDICTION for {facts['card']}, not measured: a step of {1000 * facts['seconds']:.0f} ms, of which "
            + ", ".join(f"{kind} {ms:.0f}" for kind, ms in sorted(kinds.items(), key=lambda each: -each[1])) + ".")


def as_markdown(facts):
    low = facts["low_rank"]
    lines = [f"PREDICTION for {facts['card']}, from counts and its data sheet; nothing was measured. "
             f"{1000 * facts['seconds']:.0f} ms per step in {facts['launches']} launches.", "",
             "| kind | launch | shapes | calls | GB | MMA ms | issue ms | bytes ms | waves | limit | ms |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in sorted(facts["rows"], key=lambda row: -row["seconds"]):
        bounds = row["bounds"]
        lines.append(f"| {row['kind']} | {row['name']} | {row['shapes']} | {row['calls']} | "
                     f"{(row['activations'] + row['weights']) / 1e9:.2f} | {1000 * bounds['MMA']:.2f} | "
                     f"{1000 * bounds['issue']:.2f} | {1000 * bounds['bytes']:.2f} | x {row['tail']:.2f} | {row['limit']} | "
                     f"{1000 * row['seconds']:.2f} |")
    lines += ["", f"Low rank: {low['of_step_at_peak']:.1%} of the step at the tensor cores' rate, {low['of_step']:.1%} at the "
                  "share assumed for main loops.", "", "Assumed, for every card alike:", ""]
    return "\n".join([*lines, *(f"- {key}: {each['why']}" + ("" if each["value"] is None else f" ({each['value']})")
                                for key, each in facts["assumed"].items())])
