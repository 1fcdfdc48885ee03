"""Watch what a FLUX's layers are fed while ComfyUI samples with it, and keep statistics of it in a file.

A forward pre-hook on each linear reads its input and changes nothing, so the pictures stay the same to the bit. It works
whatever the weights are and wherever they lie, as the inputs are computed in 16 bit on the device anyway.
"""

import zlib
from contextlib import contextmanager

import comfy.patcher_extension
import torch

from ...svdq.quantize.calibration import MOST_TOKENS, Collector, LayerStatistics, Statistics, inputs

KEY = "svdq_calibration"


def watch(model, shape, save):
    """A clone of the MODEL that calls save(Statistics of the sampling) after each one. An interrupted one is forgotten."""
    clone, capture = model.clone(), Capture(shape, save)
    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, KEY, capture.sampling)
    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, KEY, capture.call)
    return clone


class Capture:
    def __init__(self, shape, save):
        self.shape, self.save = shape, save
        self.samplings, self.calls, self.collectors = 0, 0, None

    def sampling(self, executor, *args, **kwargs):
        """Wraps one sampling, as an OUTER_SAMPLE wrapper."""
        if self.collectors is not None:                 # another node samples in the middle of it, which is part of it
            return executor(*args, **kwargs)
        self.calls = 0
        self.collectors = {layer: Collector(k, self.samplings) for layer, k in inputs(self.shape).items()}
        try:
            result = executor(*args, **kwargs)
            if self.calls:                              # there may have been nothing to do, at denoise 0 say
                self.save(Statistics.from_collectors(self.shape, self.collectors, self.calls))
                self.samplings += 1
        finally:
            self.collectors = None
        return result

    def call(self, executor, *args, **kwargs):
        """Wraps one call of the network, as a DIFFUSION_MODEL wrapper."""
        if self.collectors is None:
            return executor(*args, **kwargs)
        with self._hooks(executor.class_obj):
            result = executor(*args, **kwargs)
        self.calls += 1
        return result

    @contextmanager
    def _hooks(self, network):
        handles = []
        try:
            for layer, collector in self.collectors.items():
                handles.append(network.get_submodule(layer).register_forward_pre_hook(self._hook(collector)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def _hook(collector):
        def see(module, inputs):
            collector.update(inputs[0].reshape(-1, collector.k))
        return see


def merged(before, after):
    """The Statistics of two captures together, each weighted by the tokens it saw."""
    share = after.tokens / max(1, before.tokens + after.tokens)
    layers = {}
    for layer, old in before.layers.items():
        new = after.layers[layer]
        layers[layer] = LayerStatistics(torch.lerp(old.mean, new.mean, share), torch.lerp(old.square, new.square, share),
                                        torch.maximum(old.max, new.max), _drawn(old.tokens, new.tokens, share, layer))
    return Statistics(before.shape, layers, before.calls + after.calls, before.tokens + after.tokens, after.note)


def _drawn(old, new, share, layer):
    """Tokens of both, in proportion. Each is a fair sample, so a fair sample of each is enough."""
    random = torch.Generator().manual_seed(zlib.crc32(f"{layer} {share}".encode()))
    wanted = min(MOST_TOKENS, len(old) + len(new))
    mine = min(len(new), max(wanted - len(old), round(share * wanted)))
    return torch.cat([tokens[torch.randperm(len(tokens), generator=random)[:count]]
                      for tokens, count in ((old, wanted - mine), (new, mine))])
