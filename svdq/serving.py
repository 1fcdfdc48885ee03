"""Which path serves the layers of a model and why no better one, in words: nobody should have to guess why it is as fast as it
is."""

import logging

import torch

from .kernels import registry
from .kernels.variant import Target
from .kernels.weights import example

log = logging.getLogger(__name__)
_said = set()


def plan_for(precision, device, dtype, act_bits):
    """The registry.Plan of a model's layers of this precision, in the order that its kernels want."""
    return registry.plan(example(precision, dtype), Target.of(device), dtype, act_bits, repack=True)


def announce(precision, device, dtype, act_bits, plan=None):
    """Tell the log, once per kind of model, and return it for people: "fused kernels ... on RTX 4090". A warning where no
    kernels serve.

    plan   that of layers as they lie, where it is known; None: as they would best lie
    """
    plan, target = plan or plan_for(precision, device, dtype, act_bits), Target.of(device)
    why = plan.shortfall(example(precision, dtype), target)
    text = f"SVDQ: {precision} layers run on {device} in {dtype} as {plan}"
    if text not in _said:
        _said.add(text)
        log.log(logging.INFO if why is None else logging.WARNING, text)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else target.name
    name = name.removeprefix("NVIDIA ").removeprefix("GeForce ")
    return f"{plan.how} on {name}" if why is None else f"weight-only on {name}: slower than a 16-bit model, because {why}"
