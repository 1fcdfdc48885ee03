"""Which path serves the layers of a model and why no better one, in words: nobody should have to guess why it is as fast as it
is."""

import logging
import platform

import torch

from .errors import first
from .kernels import registry
from .kernels.errors import RangeError
from .kernels.variant import HALVES, Target, cpu_multiplies, short
from .kernels.weights import example

log = logging.getLogger(__name__)
_said = set()
X86 = "x86_64", "amd64"         # where that was measured


def plan_for(precision, device, dtype, act_bits):
    """The registry.Plan of a model's layers of this precision, in the order that its kernels want."""
    return registry.plan(example(precision, dtype), Target.of(device), dtype, act_bits, repack=True)


def announce(precision, device, dtype, act_bits, plan=None):
    """Tell the log, once per kind of model, and return it for people: "fused kernels ... on RTX 4090". A warning where no
    kernels serve.

    plan   that of layers as they lie, where it is known; None: as they would best lie
    """
    plan, target, weight = plan or plan_for(precision, device, dtype, act_bits), Target.of(device), example(precision, dtype)
    why = plan.shortfall(weight, target)
    if why and act_bits == 16 and plan_for(precision, device, dtype, None).shortfall(weight, target) is None:
        why = "act_bits is 16 and every faster kernel here rounds activations"
    text = f"SVDQ: {precision} layers run on {device} in {dtype} as {plan}"
    if text not in _said:
        _said.add(text)
        log.log(logging.INFO if why is None else logging.WARNING, text)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else target.name
    name = name.removeprefix("NVIDIA ").removeprefix("GeForce ")
    words = f"weight-only on {name}: {drawback(target.type)}, because {why}"
    if why is None:
        words = f"{plan.how} on {name}{unmet(plan, target, act_bits)}"
    return words + slow_dtype(device, dtype)


def unmet(plan, target, act_bits):
    """Why kernels that round no activation serve where some were to be rounded; nothing else."""
    if plan.variant.act_bits < 16 or act_bits == 16:
        return ""
    better = [f"not {variant.name}, which {why}" for variant, why in plan.declined if variant.made_for(target)]
    return "".join(f"; {text}" for text in better or [f"nothing here rounds activations to {act_bits} bits"] * bool(act_bits))


class Cast:
    """The layers of a file on their way into a compute dtype, and those whose numbers it has not: they stay in the file's.

    A dtype of 32 bit asks for nothing: what computes in it reads 16-bit scales.
    """

    def __init__(self, file, device, dtype, act_bits):
        self.file, self.device, self.dtype, self.act_bits, self.stayed = file, device, dtype, act_bits, {}

    def __call__(self, name, tiles):
        """Cast the format.PackedTiles of a layer in their places."""
        if self.dtype in HALVES:
            try:
                tiles.cast(self.dtype)
            except RangeError as error:
                self.stayed[name] = tiles[0].weight.precision, tiles[0].weight.dtype, str(error)

    def told(self):
        """Words for what stayed and serves otherwise than the rest, "" where nothing does. One warning in the log names it."""
        target, slower, layers = Target.of(self.device), {}, []
        for name, (precision, half, why) in self.stayed.items():
            now, wanted = (registry.plan(example(precision, dtype), target, self.dtype, self.act_bits, repack=True)
                           for dtype in (half, self.dtype))
            if now.variant is not wanted.variant:
                slower[now.how] = wanted.how
                layers.append(f"{name} ({why})")
        if not layers:
            return ""
        dtype, slow = short(self.dtype), " or ".join(slower)
        log.warning("SVDQ: %s: %s has not all numbers of these layers, which stay as they are and run as %s, not as %s: %s",
                    self.file, dtype, slow, " or ".join(slower.values()), ", ".join(first(layers, 5)))
        return f"; {len(layers)} of its layers as {slow}, because {dtype} has not all their numbers"


def drawback(kind):
    """What it costs that no kernels serve on a kind of device, in words."""
    return ("slower than with kernels, and pictures differ a little from theirs" if kind == "cpu" else
            "slower than a 16-bit model")


def slow_dtype(device, dtype):
    """A warning, where torch multiplies 16-bit numbers several times slower than fp32 ones."""
    if device.type != "cpu" or dtype not in HALVES or cpu_multiplies(dtype) or platform.machine().lower() not in X86:
        return ""
    return f". In {short(dtype)} this CPU computes everything else several times slower than in float32"
