"""What NVIDIA's data sheets and architecture whitepapers say of cards, and the rates that follow.

    named(text)    the name in CARDS of a card that calls itself so, or None
    limits(card)   teraoperations per second of each unit, dense, and memory GB/s

Test: tests/unit/test_predict.py, test_bench.py
"""

from typing import NamedTuple


class Card(NamedTuple):
    """sms, clock [GHz, boost], memory [GB/s], arch. counted: the card of step_counts.json that has the same plans; row: of
    RATES, where it is not the architecture's."""
    sms: int
    clock: float
    memory: float
    arch: str
    counted: str
    row: str = ""

    @property
    def rates(self):
        return RATES[self.row or self.arch]


CARDS = {
    "2080 Ti": Card(68, 1.545, 616, "sm_75", "RTX 2080 Ti"), "3060": Card(28, 1.777, 360, "sm_86", "RTX 3090"),
    "3090": Card(82, 1.695, 936, "sm_86", "RTX 3090"), "4070": Card(46, 2.475, 504, "sm_89", "RTX 4090"),
    "4090": Card(128, 2.52, 1008, "sm_89", "RTX 4090"), "L20": Card(92, 2.52, 864, "sm_89", "RTX 4090", "L20"),
    "5070 Ti": Card(70, 2.452, 896, "sm_120", "RTX 5090"), "5090": Card(170, 2.407, 1792, "sm_120", "RTX 5090"),
    "A100": Card(108, 1.41, 2039, "sm_80", "A100"), "H200": Card(132, 1.83, 4800, "sm_90", "H200"),
}

# arch -> unit -> multiply-adds that a multiprocessor does in a cycle; bf16 with fp32 sums, fp16 in its place on sm_75. A unit
# that is not there an architecture does not have. L20 has half of its chip's rates, GeForce cards half of that of bf16 alone.
RATES = {
    "sm_75": {"bf16": 256, "int8": 1024, "int4": 2048}, "sm_80": {"bf16": 1024, "int8": 2048, "int4": 4096},
    "sm_86": {"bf16": 256, "int8": 1024, "int4": 2048}, "sm_89": {"bf16": 256, "int8": 1024, "int4": 2048},
    "sm_90": {"bf16": 2048, "int8": 4096, "fp8": 4096}, "sm_120": {"bf16": 256, "int8": 1024, "fp4": 2048},
    "L20": {"bf16": 256, "int8": 512, "int4": 1024},
}
# arch -> multiply-adds of single floats that one of the four schedulers of a multiprocessor starts in a cycle
FLOATS = {"sm_75": 16, "sm_80": 16, "sm_86": 32, "sm_89": 32, "sm_90": 32, "sm_120": 32}


def named(text):
    """The name in CARDS of a card that calls itself so, or None: a laptop's, an NVL or an A100 of 40 GB is another."""
    endings = {name: f" {name}" for name in CARDS} | {"A100": " A100-SXM4-80GB"}
    return next((name for name, ending in endings.items() if text.endswith(ending)), None)


def limits(text):
    """{unit: teraoperations per second, "memory": GB/s} of a card that calls itself so; {} of one that is not in CARDS."""
    if named(text) is None:
        return {}
    card = CARDS[named(text)]
    return {"memory": card.memory} | {unit: 2e-3 * card.sms * card.clock * rate for unit, rate in card.rates.items()}
