"""ComfyUI's patch lists -> changes of the low-rank branch.

A patch is what a LoRA node left with the model: (strength, adapter, strength_model, offset, function). ComfyUI has parsed
the file, whatever its key style, and its adapters know their arithmetic. A LoRA is the two factors it consists of. Of any
other adapter ComfyUI computes the exact change of the weight, which is then factored.
"""

import logging
import math
import weakref
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.lora
import comfy.model_management
import comfy.utils
import torch
from comfy.weight_adapter import WeightAdapterBase
from torch.utils.weak import WeakIdKeyDictionary

from ...svdq.errors import LoraError, shown
from ...svdq.families.flux1 import LATENT_FEATURES
from ...svdq.kernels.errors import command
from ...svdq.lora import MOST, MOST_RANK, LowRank, factorise, factorise_with_output_scale, largest, nbytes
from .layer import SVDQLinear

log = logging.getLogger(__name__)

DORA_SCALE = {"lora": 4, "loha": 7, "lokr": 8, "glora": 5, "oft": 3, "boft": 3}     # its place in the tuple of an adapter
# Adapters whose change of the weight is proportional to their strength and does not depend on the weight, unless they have
# a DoRA scale.
LINEAR = ("lora", "loha", "lokr")
WIDEST = 16     # times its columns a LoRA may make of img_in: latents, masks and pictures to copy make it 6 in FLUX.1 Fill
IMG_IN = "diffusion_model.img_in.weight"

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
    refuse_strengths(patches)
    for patch in patches:
        strength, adapter, strength_model, offset, _ = patch
        if strength_model != 1.0 or isinstance(adapter, list):
            raise RuntimeError(f"{key}: a 4-bit SVDQ layer cannot be the target of a model merge, nor the first model of a "
                               "subtraction that a LoRA is to be extracted from. Take the 16-bit model there, or what "
                               f"`{command('dequantize', 'FILE', 'OUT')}` writes, and quantise the result if need be. An SVDQ "
                               "model can be the source of a merge, and the model that is subtracted")
        if strength == 0 and _kind(adapter) != "set":
            continue                    # a hook between its keyframes, say: as if it were not there, bit for bit
        reason = _misfit(adapter, _place(layer, offset)[1])
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


def refuse_numbers(patches, strength):
    """Raise LoraError where these {key: adapter} at this strength would put NaN or Inf into the model."""
    refuse_strengths([(strength,)])
    for key, adapter in patches.items():
        if isinstance(adapter, list) or _kind(adapter) == "model_as_lora":
            continue                            # of a merge: whole models
        with naming(key if isinstance(key, str) else key[0]):
            for tensor in tensors_of(adapter):
                if not tensor.is_floating_point() or tensor.layout is not torch.strided or tensor.is_meta:
                    raise LoraError(f"is {tensor.dtype}, {tensor.layout} and on {tensor.device}, and needs floating point "
                                    "numbers")
            sizes = [abs(strength), *map(abs, _numbers(adapter)), *map(largest, tensors_of(adapter))]
            if not all(map(math.isfinite, sizes)):
                raise LoraError("contains NaN or Inf")
            if math.prod(max(1.0, size) for size in sizes) > MOST:
                raise LoraError(f"has numbers up to {max(sizes):.2g}, which become Inf")


def refuse_strengths(patches):
    for strength, *_ in patches:
        try:
            possible = -MOST <= strength <= MOST    # NaN is not
        except TypeError:                           # no number: of a link, which ComfyUI does not check
            possible = False
        if not possible:
            raise LoraError(f"the strength of a LoRA is {shown(repr(strength), 20)}. Give a number, 1 for the LoRA as it was "
                            "trained")


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
        if strength and not isinstance(adapter, list) and _misfit(adapter, (n, k)) is None:
            rank = adapter.weights[1].shape[0] if _is_plain(adapter) else min(MOST_RANK, n, k)
            ranks.append((row, n, col, k, rank))
    return nbytes(layer.tiles, ranks) if ranks else 0


def say(factored, misfits):
    """Tell the log what was approximated and what was left out."""
    if factored:
        kinds, worst = ", ".join(sorted({one.kind for one in factored})), max(factored, key=lambda one: one.error)
        log.info("SVDQ: %d layers have adapters that are no plain LoRA (%s). Factored at rank %d or less; relative error of "
                 "the change at most %.1e, in %s", len(factored), kinds, MOST_RANK, worst.error, worst.key)
    if misfits:
        log.error("SVDQ: %d adapters of a LoRA do not fit the model and are left out, the first is for %s: %s", len(misfits),
                  misfits[0].key, misfits[0].reason)


def _kind(adapter):
    if isinstance(adapter, WeightAdapterBase):
        return adapter.name
    return adapter[0] if len(adapter) == 2 else "diff"


def _kind_in_words(adapter):
    kind = _kind(adapter)
    return "dora" if kind in DORA_SCALE and adapter.weights[DORA_SCALE[kind]] is not None else kind


def has_effect(adapter):
    """False where a factor or alpha is zero, so that the adapter is."""
    kind = _kind(adapter)
    if kind == "diff":
        return largest(tensors_of(adapter)[0]) > 0
    if kind not in LINEAR or adapter.weights[DORA_SCALE[kind]] is not None:
        return True
    return adapter.weights[2] != 0 and all(largest(tensor) > 0 for tensor in tensors_of(adapter))


def tensors_of(adapter):
    """The tensors of an adapter."""
    values = adapter.weights if isinstance(adapter, WeightAdapterBase) else adapter[-1]
    return [value for value in (values if isinstance(values, (tuple, list)) else [values])
            if isinstance(value, torch.Tensor)]


def _is_plain(adapter):
    """Whether it is up @ down and nothing else. weights: up, down, alpha, mid, dora_scale, reshape"""
    return _kind(adapter) == "lora" and all(weight is None for weight in adapter.weights[3:5])


def _fixed(patch):
    kind = _kind(patch[1])
    return kind == "diff" or kind in LINEAR and patch[1].weights[DORA_SCALE[kind]] is None


def _place(layer, offset):
    """((row, col), (n, k)) of the part of the weight that an offset (dimension, start, length) means."""
    start, shape = [0, 0], [layer.out_features, layer.in_features]
    if offset is not None:
        start[offset[0]], shape[offset[0]] = offset[1], offset[2]
    return tuple(start), tuple(shape)


def _numbers(adapter):
    """Alpha: what an adapter has beside tensors."""
    return [value for value in getattr(adapter, "weights", ()) if isinstance(value, (int, float))]


def _misfit(adapter, shape):
    """Why an adapter is not for a weight of this shape, None if it is. ComfyUI multiplies factors before it compares shapes,
    and two small ones can make more numbers than memory holds."""
    kind, tensors = _kind(adapter), tensors_of(adapter)
    if not tensors or not all(tensor.numel() for tensor in tensors):
        return "it has no numbers"
    if kind == "lora":
        up, down, _, mid, _, reshape = adapter.weights[:6]
        if up.ndim < 2 or down.ndim < 2 or (up.shape[0], down[0].numel()) != shape or (
                up[0].numel() != down.shape[0] if mid is None else mid.numel() != up[0].numel() * down.shape[0]):
            return f"its factors are {list(up.shape)} and {list(down.shape)}, the weight is {list(shape)}"
        if reshape is not None and repr(reshape) != repr(list(shape)):          # 128.0 is no size
            return f"it wants a weight of {shown(reshape)}, which is {list(shape)}"
    elif kind in ("diff", "set"):
        if tuple(tensors[0].shape) != shape:
            return f"it is {list(tensors[0].shape)}, the weight is {list(shape)}"
    elif kind in DORA_SCALE and not _fits(kind, adapter.weights, *shape):
        return f"its factors are {', '.join(str(list(tensor.shape)) for tensor in tensors)}, the weight is {list(shape)}"
    scale = adapter.weights[DORA_SCALE[kind]] if kind in DORA_SCALE else None
    if scale is not None and tuple(scale.shape) not in ((shape[0], 1), (1, shape[1])):
        return f"its DoRA scale is {list(scale.shape)}, the weight is {list(shape)}"
    return None


def _fits(kind, weights, n, k):
    """Whether these factors make a change of [n, k]."""
    if kind == "loha":
        w1_a, w1_b, _, w2_a, w2_b, t1, t2 = weights[:7]
        return _size(w1_a, w1_b, t1) == _size(w2_a, w2_b, t2) == n * k
    if kind == "lokr":
        w1, w2, _, w1_a, w1_b, w2_a, w2_b, t2 = weights[:8]
        return n * k == (_size(w1_a, w1_b) if w1 is None else w1.numel()) * (
            _size(w2_a, w2_b, t2) if w2 is None else w2.numel())
    if kind == "glora":
        a1, a2, b1, b2 = weights[:4]
        return min(factor.ndim for factor in (a1, a2, b1, b2)) > 1 and any(
            (left.shape[0], right[0].numel(), last[0].numel()) == (n, k, k)
            for left, right, last in ((b1, b2, a2), (b2, b1, a1)))
    *_, blocks, rows, columns = weights[0].shape
    rescale = weights[1] if kind == "boft" else None
    return blocks * rows == n and rows == columns and (rescale is None or tuple(rescale.shape) == (n, 1))


def _size(a, b, core=None):
    """The numbers of the product of two factors, around the core of a convolution if there is one; 0 where one is missing."""
    if a is None or b is None or min(a.ndim, b.ndim) < 2:
        return 0
    return a.shape[0] * b.shape[1] if core is None else a.shape[1] * b.shape[1] * core.shape[2:].numel()


def misfits(model, key, earlier, patches):
    """[Misfit] of patches for a weight that ComfyUI merges, after the earlier ones: they may have widened it."""
    return [Misfit(key, reason) for reason in _merged(model, key, [*earlier, *patches])[1][len(earlier):] if reason]


def padded(model, patches, before):
    """The {key: adapter} as they fit a model whose img_in takes more than latents, itself or after the patches before.

    FLUX.1 Fill, Canny and Depth have the features of the latents first: for the others a LoRA of FLUX.1 dev gets zeros. A DoRA,
    which scales what it finds, is for the part of the weight that takes the latents.
    """
    adapter = patches.get(IMG_IN)
    if not isinstance(adapter, WeightAdapterBase) and not (isinstance(adapter, tuple) and _kind(adapter) == "diff"):
        return patches
    n, wide = _merged(model, IMG_IN, before.get(IMG_IN, []))[0]
    if wide <= LATENT_FEATURES or _misfit(adapter, (n, LATENT_FEATURES)) is not None or _misfit(adapter, (n, wide)) is None:
        return patches
    if not _fixed((None, adapter)):
        return {key: other for key, other in patches.items() if key != IMG_IN} | {(IMG_IN, (1, 0, LATENT_FEATURES)): adapter}
    more = 0, wide - LATENT_FEATURES
    if _is_plain(adapter):
        up, down, *rest = adapter.weights[:5]
        down = torch.nn.functional.pad(down.flatten(1), more)           # flat: it may be of a 1 x 1 convolution
        return patches | {IMG_IN: type(adapter)(adapter.loaded_keys, (up, down, *rest, None))}
    delta = _apply([(1.0, adapter, 1.0, None, None)], torch.zeros(n, LATENT_FEATURES), IMG_IN)
    return patches | {IMG_IN: ("diff", (torch.nn.functional.pad(delta, more),))}


def widens(model, patches, before):
    """Whether one of these {key: adapter} makes img_in wider than it is after the patches before."""
    adapter = patches.get(IMG_IN)
    if adapter is None:                                 # always of a text encoder, which has no img_in
        return False
    shape = _merged(model, IMG_IN, before.get(IMG_IN, []))[0]
    return _widened(adapter, shape, shape) != shape


def _merged(model, key, patches):
    """(shape of a weight that ComfyUI merges, why each of the patches does not fit or None)"""
    layer = comfy.utils.get_attr(model, key.rpartition(".")[0])
    if isinstance(layer, SVDQLinear) and key.endswith(".weight"):
        shape = base = layer.out_features, layer.in_features        # not of the weight, which may be loaded widened
    else:
        shape = base = tuple(comfy.utils.get_attr(model, key).shape)
    reasons = []
    for _, adapter, _, offset, _ in patches:
        part = list(_widened(adapter, shape, base))
        if offset is not None:
            part[offset[0]] = offset[2]
        reasons.append("it is of a merge" if isinstance(adapter, list) else _misfit(adapter, tuple(part)))
        if reasons[-1] is None and offset is None:
            shape = tuple(part)
    return shape, reasons


def _widened(adapter, shape, base):
    """The shape of a weight under an adapter: what it asks for, if that is as many rows and more columns."""
    wanted = adapter.weights[5] if isinstance(adapter, WeightAdapterBase) and adapter.name == "lora" else None
    fits = (isinstance(wanted, list) and len(wanted) == len(shape) == 2 and all(isinstance(n, int) for n in wanted)
            and wanted[0] == shape[0] and shape[1] <= wanted[1] <= WIDEST * base[1])
    return tuple(wanted) if fits else shape


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
    results = _factored.setdefault(tensors_of(adapter)[0], {})
    if (key, offset) not in results:
        comfy.model_management.throw_exception_if_processing_interrupted()
        zeros = torch.zeros(shape, device=device)
        delta = _apply([(1.0, adapter, 1.0, None, function)], zeros, key)
        down, up, error = factorise(delta)
        results[key, offset] = down.cpu(), up.cpu(), error
    down, up, error = results[key, offset]
    return LowRank(down, up, row, col, 1.0, float(strength)), Factored(key, _kind_in_words(adapter), len(down), error)


def _apply(patches, weight, key, **rest):
    """ComfyUI's arithmetic, which trusts the shapes of a file."""
    try:
        return comfy.lora.calculate_weight(patches, weight, key, **rest)
    except (torch.OutOfMemoryError, comfy.model_management.InterruptProcessingException):
        raise
    except Exception as error:              # whatever its arithmetic does with a stranger's factors
        raise LoraError(f"cannot be applied: {shown(error, 300)}") from error


def _factor_chain(layer, key, patches, exact, device):
    """(LowRank, output_scale, Factored) of what all patches together change beyond the exact ones: DoRA and its like depend
    on the weight, and on what is applied before them.

    The last two results of a layer are kept, because two branches of a graph alternate. A result holds for the layer, the
    adapters (by identity) and their strengths and offsets it was made for.
    """
    adapters = [tensors_of(adapter)[0] for _, adapter, _, _, _ in patches]
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
    kinds = dict.fromkeys(_kind_in_words(patch[1]) for patch in patches if not _exact(layer, patch))
    return LowRank(down, up), scale, Factored(key, " + ".join(kinds), len(down), error)
