"""ComfyUI's patch lists -> changes of the low-rank branch.

A patch is what a LoRA node left with the model: (strength, adapter, strength_model, offset, function). ComfyUI has parsed
the file, whatever its key style, and its adapters know their arithmetic. A LoRA is the two factors it consists of. Of any
other adapter ComfyUI computes the exact change of the weight, which is then factored.
"""

import logging
import weakref
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.lora
import comfy.model_management
import torch
from comfy.weight_adapter import WeightAdapterBase
from torch.utils.weak import WeakIdKeyDictionary

from ...svdq.errors import LoraError, shown
from ...svdq.lora import MOST_RANK, LowRank, factorise, factorise_with_output_scale, nbytes

log = logging.getLogger(__name__)

# Adapters whose change of the weight is proportional to their strength and does not depend on the weight, unless they have
# a DoRA scale, which is at this place in their tuple.
DORA_SCALE = {"lora": 4, "loha": 7, "lokr": 8}

_factored = WeakIdKeyDictionary()       # a tensor of an adapter -> {(key, offset): result}. Gone when the LoRA is


@dataclass(frozen=True)
class Factored:
    """An adapter that is not low-rank as it comes, and how well its factors stand for it."""
    key: str
    kind: str
    rank: int
    error: float            # relative, of the change of the weight


@dataclass(frozen=True)
class Misfit:
    """A patch that is not for a layer of this shape. It is left out, as ComfyUI leaves it out of its own layers."""
    key: str
    reason: str


def changes(layer, key, patches, device):
    """What a layer's patches are in its low-rank branch: (changes, output_scale, [Factored], [Misfit]).

    changes, output_scale   see svdq.lora.LoraFactors
    device                  where to factor

    Raises LoraError on NaN and Inf, RuntimeError where a merge node wants to change the base weight.
    """
    fitting, misfits = [], []
    for patch in patches:
        strength, adapter, strength_model, offset, _ = patch
        if strength_model != 1.0 or isinstance(adapter, list):
            raise RuntimeError(f"{key}: a 4-bit SVDQ layer cannot be the target of a model merge. Merge the 16-bit models "
                               "first, then quantise the result. An SVDQ model can be the source of a merge")
        if strength == 0 and _kind(adapter) != "set":
            continue                    # a hook between its keyframes, say: as if it were not there, bit for bit
        reason = _misfit(adapter, *_place(layer, offset))
        if reason is None:
            fitting.append(patch)
        else:
            misfits.append(Misfit(key, reason))
    exact = [_exact(layer, patch) for patch in fitting]
    if all(exact):
        return exact, None, [], misfits
    with naming(key):
        if all(map(_fixed, fitting)):
            parts = [(change, None) if change else _factor(layer, key, patch, device)
                     for change, patch in zip(exact, fitting)]
            return [change for change, _ in parts], None, [factored for _, factored in parts if factored], misfits
        exact = [change for change in exact if change]
        rest, scale, factored = _factor_chain(layer, key, fitting, exact, device)
        return exact + [rest], scale, [factored], misfits


@contextmanager
def naming(key):
    """Complete what svdq.lora says of bad factors."""
    try:
        yield
    except LoraError as error:
        raise LoraError(f"{key}: the LoRA {error}. The file is damaged or came out of a broken training; get it "
                        "again, or leave it out") from None


def planned_bytes(layer, patches):
    """How many bytes the branch of a layer takes with these patches, at most."""
    ranks = []
    for strength, adapter, _, offset, _ in patches:
        (row, col), (n, k) = _place(layer, offset)
        if strength and not isinstance(adapter, list) and _misfit(adapter, (row, col), (n, k)) is None:
            rank = adapter.weights[1].shape[0] if _is_plain(adapter) else min(MOST_RANK, n, k)
            ranks.append((row, n, col, k, rank))
    return nbytes(layer.tiles, ranks) if ranks else 0


def say(factored, misfits):
    """Tell the log what was approximated and what was left out."""
    if factored:
        kinds, worst = ", ".join(sorted({one.kind for one in factored})), max(factored, key=lambda one: one.error)
        log.info("SVDQ: %d layers have adapters that are not LoRA (%s). Factored at rank %d or less; relative error of the "
                 "change at most %.1e, in %s", len(factored), kinds, MOST_RANK, worst.error, worst.key)
    if misfits:
        log.error("SVDQ: a LoRA does not fit %d layers and is left out there, the first is %s: %s. It was made for another "
                  "model", len(misfits), misfits[0].key, misfits[0].reason)


def _kind(adapter):
    if isinstance(adapter, WeightAdapterBase):
        return adapter.name
    return adapter[0] if len(adapter) == 2 else "diff"


def _tensors(adapter):
    values = adapter.weights if isinstance(adapter, WeightAdapterBase) else adapter[-1]
    return [value for value in (values if isinstance(values, (tuple, list)) else [values])
            if isinstance(value, torch.Tensor)]


def _is_plain(adapter):
    """Whether it is up @ down and nothing else. weights: up, down, alpha, mid, dora_scale, reshape"""
    return _kind(adapter) == "lora" and all(weight is None for weight in adapter.weights[3:5])


def _fixed(patch):
    kind = _kind(patch[1])
    return kind == "diff" or kind in DORA_SCALE and patch[1].weights[DORA_SCALE[kind]] is None


def _place(layer, offset):
    """((row, col), (n, k)) of the part of the weight that an offset (dimension, start, length) means."""
    start, shape = [0, 0], [layer.out_features, layer.in_features]
    if offset is not None:
        start[offset[0]], shape[offset[0]] = offset[1], offset[2]
    return tuple(start), tuple(shape)


def _misfit(adapter, start, shape):
    if _kind(adapter) == "lora":
        up, down, reshape = adapter.weights[0], adapter.weights[1], adapter.weights[5]
        if up.ndim < 2 or down.ndim < 2 or not up.numel() or not down.numel() or (
                (up.shape[0], down[0].numel()) != shape or up[0].numel() != down.shape[0] and adapter.weights[3] is None):
            return f"its factors are {list(up.shape)} and {list(down.shape)}, the weight is {list(shape)}"
        if reshape is not None and tuple(reshape) != shape:
            return f"it wants a weight of {list(reshape)}, which is {list(shape)}"
    return None


def _exact(layer, patch):
    """The LowRank a plain LoRA is, or None for anything else."""
    strength, adapter, _, offset, function = patch
    if not _is_plain(adapter) or function is not None:
        return None
    up, down, alpha = adapter.weights[:3]
    (row, col), _ = _place(layer, offset)
    flat = (factor if factor.ndim == 2 else factor.flatten(1) for factor in (down, up))     # LoRAs of 1 x 1 convolutions
    return LowRank(*flat, row, col, 1.0 if alpha is None else alpha / down.shape[0], float(strength))


def _factor(layer, key, patch, device):
    """(LowRank, Factored) of an adapter by itself, at strength 1 and for all strengths."""
    strength, adapter, _, offset, function = patch
    (row, col), shape = _place(layer, offset)
    results = _factored.setdefault(_tensors(adapter)[0], {})
    if (key, offset) not in results:
        comfy.model_management.throw_exception_if_processing_interrupted()
        zeros = torch.zeros(shape, device=device)
        delta = _apply([(1.0, adapter, 1.0, None, function)], zeros, key)
        down, up, error = factorise(delta)
        results[key, offset] = down.cpu(), up.cpu(), error
    down, up, error = results[key, offset]
    return LowRank(down, up, row, col, 1.0, float(strength)), Factored(key, _kind(adapter), len(down), error)


def _apply(patches, weight, key, **rest):
    """ComfyUI's arithmetic, which trusts the shapes of a file."""
    try:
        return comfy.lora.calculate_weight(patches, weight, key, **rest)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, AttributeError, TypeError) as error:
        raise LoraError(f"cannot be applied: {shown(error, 300)}") from error


def _factor_chain(layer, key, patches, exact, device):
    """(LowRank, output_scale, Factored) of what all patches together change beyond the exact ones: DoRA and its like depend
    on the weight, and on what is applied before them.

    The last two results of a layer are kept, because two branches of a graph alternate. A result holds for the layer, the
    adapters (by identity) and their strengths and offsets it was made for.
    """
    adapters = [_tensors(adapter)[0] for _, adapter, _, _, _ in patches]
    first = next(tensor for tensor, patch in zip(adapters, patches) if not _fixed(patch))
    settings = [(strength, offset) for strength, _, _, offset, _ in patches]
    kept = _factored.setdefault(first, {}).setdefault(key, [])
    result = next((result for made_for, made_at, result in kept if made_at == settings
                   and all(then() is now for then, now in zip(made_for, (layer, *adapters)))), None)
    if result is None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        weight = layer.dense(layer.weight.to(device))[0]
        delta = _apply(patches, weight.clone(), key, original_weights={key: [(weight, None)]}) - weight
        for change in exact:
            part = delta[change.row:change.row + len(change.up), change.col:change.col + change.down.shape[1]]
            part -= change.strength * change.scale * (change.up.to(delta) @ change.down.to(delta))
        down, up, scale, error = factorise_with_output_scale(delta, weight)
        result = down.cpu(), up.cpu(), None if scale is None else scale.cpu(), error
        kept.insert(0, ([weakref.ref(owner) for owner in (layer, *adapters)], settings, result))
        del kept[2:]
    down, up, scale, error = result
    kinds = dict.fromkeys(_kind(patch[1]) for patch in patches if not _exact(layer, patch))
    return LowRank(down, up), scale, Factored(key, " + ".join(kinds), len(down), error)
