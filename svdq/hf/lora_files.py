"""LoRA files of every dialect, as diffusers' own loader takes them: PEFT's names, one pair of factors per module.

Factors of a fused q, k, v are cut by rows. What is no pair of factors (LoKr, LoHa, a plain difference) becomes the closest
one, once. A DoRA scales what it finds, so it becomes a pair and a scale of the module's output, see layer.Change; its norm is
that of the changed weight, as in the paper (arXiv 2402.09353) and PEFT.

Test: tests/hf/inside/checks_lora_files.py
"""

import functools
import inspect
import json
import logging
import math
import os
import re
from contextlib import contextmanager
from typing import NamedTuple

import torch
from diffusers.loaders import lora_base, lora_pipeline

from .. import lora_keys
from ..container import NAMES, TensorFile
from ..errors import CheckpointError, LoraError, shown
from ..families import flux1
from ..families.family import swap_halves
from ..lora import MOST, factorise, factorise_with_output_scale, largest
from ..lora_file import read_lora
from ..ways_out import DIFFUSERS, said_in
from . import require
from .layer import SVDQLinear, SVDQRows

log = logging.getLogger(__name__)
PREFIX = "transformer"
MUCH = 0.05             # relative error of a factored change that people should hear of
METADATA = "lora_adapter_metadata"      # in the header of a file that diffusers has saved: PEFT's config

# The end of a key -> which part of an adapter the tensor is. The first that matches counts.
_PARTS = [(re.compile(pattern + r"$"), part) for pattern, part in (
    (r"[._]lora[._](?:A|down)(?:\.(?!weight)[\w-]+)?(?:\.weight)?", "down"),
    (r"[._]lora[._](?:B|up)(?:\.(?!weight|bias)[\w-]+)?(?:\.weight)?", "up"),
    (r"[._]lora[._]B(?:\.(?!weight|bias)[\w-]+)?\.bias", "bias"), (r"\.diff_b", "diff_b"), (r"\.diff", "diff"),
    (r"\.alpha", "alpha"), (r"\.dora_scale", "magnitude"),
    *((rf"\.{part}", part) for kind in ("lokr", "hada") for part in (
        f"{kind}_w1", f"{kind}_w2", f"{kind}_w1_a", f"{kind}_w1_b", f"{kind}_w2_a", f"{kind}_w2_b")))]


class Part(NamedTuple):
    """Rows of an adapter's module, and the module of the model that they are for."""
    module: str
    row: int
    n: int
    k: int
    swapped: bool = False


# ---- from diffusers' doors

def read(model, source, prefix, options):
    """What load_lora_adapter was given -> (state dict under PREFIX, the other arguments for it, {module: output scale}).

    Raises LoraError for what is no LoRA of which something fits.
    """
    tensors, metadata = _fetch(source, options)
    alphas = options.pop("network_alphas", None) or {}
    given = options.pop("metadata", None)
    options = {name: value for name, value in options.items() if name in ("adapter_name", "low_cpu_mem_usage")}
    found, scales = convert(model, tensors | {key: torch.as_tensor(alpha) for key, alpha in alphas.items()},
                            given if given is not None else metadata, prefix)
    # PEFT takes names for the ends of modules': `^` is where a name begins, or proj_out's alpha were every block's, too
    names = [key for key in found if key.endswith(".alpha")]
    options["network_alphas"] = {f"{PREFIX}.^{name.removeprefix(f'{PREFIX}.')}": float(found.pop(name)) for name in names}
    return found, options, scales


def teach():
    """Let pipelines give LoRA files to our models as they are. diffusers' own reading knows part of the dialects, and drops
    what makes a DoRA one; for other models it stays as it is."""
    stock = lora_pipeline.FluxLoraLoaderMixin.load_lora_weights
    if hasattr(stock, "svdq"):
        return

    @functools.wraps(stock)
    def load_lora_weights(self, pretrained_model_name_or_path_or_dict, adapter_name=None, hotswap=False, **options):
        model, source = getattr(self, "transformer", None), pretrained_model_name_or_path_or_dict
        model = getattr(model, "_orig_mod", model)
        if hasattr(model, "svdq_path"):
            source, options = _for_pipeline(self, model, source, options)
        return stock(self, source, adapter_name=adapter_name, hotswap=hotswap, **options)

    load_lora_weights.svdq = True
    lora_pipeline.FluxLoraLoaderMixin.load_lora_weights = load_lora_weights


@said_in(DIFFUSERS)
def _for_pipeline(pipeline, model, source, options):
    require("peft")
    tensors, metadata = _fetch(source, options)
    if lora_keys.style(tensors) == "BFL control":       # widens the model, which diffusers does
        return dict(tensors), options
    found, scales = convert(model, tensors, metadata, PREFIX)
    of_text = {key: tensor for key, tensor in tensors.items() if lora_keys.is_text_encoder(key)}
    if of_text and getattr(pipeline, "text_encoder", None) is not None:
        found |= _text_encoder(pipeline, of_text)
    return found | {f"{PREFIX}.{module}.svdq_lora_scale": scale for module, scale in scales.items()}, options


def _text_encoder(pipeline, tensors):
    """The part for the text encoder, as diffusers reads it."""
    try:
        found, alphas = pipeline.lora_state_dict(tensors, return_alphas=True)[:2]
        return {key: tensor for key, tensor in {**found, **(alphas or {})}.items() if key.startswith("text_encoder.")}
    except Exception as error:                  # of a reader that asserts what it expects
        log.warning("SVDQ: the part of the LoRA for the text encoder is left out: %s: %s", type(error).__name__,
                    shown(error, 200))
        return {}


def _fetch(source, options):
    """({key: tensor}, PEFT's config from the file's header or None) of a path, a name on Hugging Face or a dict. Takes what
    names the file out of `options`."""
    named = {name: options.pop(name, None) for name in ("weight_name", "subfolder", "cache_dir", "force_download", "proxies",
                                                        "local_files_only", "token", "revision", "use_safetensors")}
    if isinstance(source, dict):
        _refuse(source)
        return source, None
    path = os.path.join(os.fspath(source), *filter(None, (named["subfolder"], named["weight_name"])))  # "" would end it in /
    if os.path.isfile(path):
        try:
            return read_lora(path), _metadata(path)
        except LoraError as error:
            raise LoraError(f"{path}: {error}") from error
    if os.path.isabs(path) or path.startswith((".", "~")) or path.endswith(".safetensors") and path.count("/") < 2:
        raise LoraError(f"{shown(path, 300)}: no such file. On Hugging Face, a LoRA is owner/name and weight_name")
    wanted = inspect.signature(lora_base._fetch_state_dict).parameters
    values = named | {"pretrained_model_name_or_path_or_dict": source, "allow_pickle": False, "use_safetensors": True,
                      "user_agent": {"file_type": "attn_procs_weights", "framework": "pytorch"}}
    try:
        found = lora_base._fetch_state_dict(**{name: value for name, value in values.items() if name in wanted})
    except Exception as error:                  # of the hub, the network and the file system
        what = f"{type(error).__name__}: {shown(error, 300)}"
        raise LoraError(f"{shown(source)}: cannot be read as a LoRA ({what}). Give a file, or "
                        "owner/name on Hugging Face with weight_name") from error
    tensors, metadata = found[:2] if isinstance(found, tuple) else (found, None)
    _refuse(tensors)
    return tensors, metadata


def _refuse(tensors):
    if not all(isinstance(key, str) and isinstance(value, (torch.Tensor, float, int)) for key, value in tensors.items()):
        raise LoraError("this is no LoRA: a dictionary of tensors by name is needed")
    why = lora_keys.refusal(tensors, {NAMES.get(value.dtype) for value in tensors.values() if isinstance(value, torch.Tensor)})
    if why:
        raise LoraError(f"this is {why}")
    for key, value in tensors.items():
        if isinstance(value, torch.Tensor) and not math.isfinite(largest(value)):
            raise LoraError(f"{shown(key)} contains NaN or Inf. It came out of a broken training; get the LoRA again")


def _metadata(path):
    if not path.endswith((".safetensors", ".sft")):
        return None
    try:
        return json.loads((TensorFile(path).metadata or {}).get(METADATA, "null"))
    except (ValueError, RecursionError, CheckpointError):
        log.warning("SVDQ: %s in the header of %s cannot be read, so strengths are those of the factors", METADATA,
                    os.path.basename(path))
        return None


@contextmanager
def not_offloaded(pipeline):
    """While a LoRA is loaded, the numbers of the model are in memory; afterwards they are offloaded as before."""
    model, sequential, group = (*lora_base._func_optionally_disable_offloading(pipeline), False)[:3]
    try:
        yield
    finally:
        if model:
            pipeline.enable_model_cpu_offload()
        elif sequential:
            pipeline.enable_sequential_cpu_offload()
        elif group:
            from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
            for component in pipeline.components.values():
                if isinstance(component, torch.nn.Module):
                    _maybe_remove_and_reapply_group_offloading(component)


# ---- names

def names_of(model):
    """{name of a module in a LoRA file: [Part]}, with dots and with underscores for them."""
    linears = {name.removesuffix(".base_layer"): module for name, module in model.named_modules()
               if isinstance(module, torch.nn.Linear) and ".lora_" not in name}
    found = {name: [Part(name, 0, module.out_features, module.in_features)] for name, module in linears.items()}
    for name in list(found):
        parent, _, leaf = name.rpartition(".")
        if leaf in flux1.DIFFUSERS_ROWS:
            found[name] = _stacked(linears, [f"{parent}.{part}" for part in flux1.DIFFUSERS_ROWS[leaf]])
    for theirs, modules, swapped in flux1.bfl_to_diffusers(model.config.num_layers, model.config.num_single_layers):
        if all(module in linears for module in modules):
            found[theirs] = [part._replace(swapped=swapped) for part in _stacked(linears, modules)]
    return found | {name.replace(".", "_"): parts for name, parts in found.items()}


def _stacked(linears, modules):
    parts, row = [], 0
    for module in modules:
        n, k = linears[module].out_features, linears[module].in_features
        parts.append(Part(module, row, n, k))
        row += n
    return parts


def _plain_name(key):
    """A key without what programs put before names, XLabs' names as BFL's."""
    key = lora_keys.unwrapped(key.replace(f"{PREFIX}.^", f"{PREFIX}."))
    stack, *rest = key.removeprefix("diffusion_model.").split(".")
    if len(rest) > 2 and rest[1] == "processor" and rest[2] in flux1.XLABS:
        return ".".join([stack, rest[0], flux1.XLABS[rest[2]], "lora", *rest[3:]])
    return re.sub(r"^(?:diffusion_model\.|transformer\.|lora_unet_|lora_transformer_|lycoris_)", "", key)


def convert(model, tensors, metadata=None, prefix=PREFIX):
    """({PEFT's key under PREFIX: tensor}, {module: output scale}) of a LoRA file's tensors. Raises LoraError.

    metadata   PEFT's config, flat, its names with or without `prefix`
    """
    known, adapters, ignored, scales = names_of(model), {}, [], {}
    for key, tensor in tensors.items():
        if lora_keys.is_text_encoder(key):
            continue
        name = _plain_name(key)
        if name.endswith(".svdq_lora_scale"):           # of a pipeline, which has been here before
            scales[name.removesuffix(".svdq_lora_scale")] = tensor
            continue
        match, part = next(((match, part) for pattern, part in _PARTS if (match := pattern.search(name))), (None, None))
        module = match and name[:match.start()]
        if module in known:
            adapters.setdefault(module, {})[part] = torch.as_tensor(tensor)
        else:
            ignored.append(key)
    ignored += [f"{module}: {', '.join(adapter)}" for module, adapter in adapters.items() if not _is_whole(adapter)]
    adapters = {module: adapter for module, adapter in adapters.items() if _is_whole(adapter)}
    if not adapters:
        some = ", ".join(shown(key, 80) for key in list(tensors)[:3]) or "nothing"
        raise LoraError(f"nothing in this LoRA is for this model: it holds {some}. Get a LoRA for FLUX.1")
    if ignored:
        log.warning("SVDQ: %d tensors of the LoRA are not for this model and are left out, the first is %s", len(ignored),
                    shown(ignored[0]))
    found = {}
    for module, adapter in adapters.items():
        try:
            alpha = adapter.get("alpha", _alpha(metadata, module, adapter, prefix))
            _add(found, scales, model, module, known[module], adapter, alpha)
        except LoraError:
            raise
        except (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError, ValueError, re.error) as error:
            sizes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in adapter.items())
            raise LoraError(f"{module}: its numbers or the LoRA's config do not fit together ({sizes}; {shown(error, 200)}). "
                            "Get the LoRA again") from error
    if any(key.endswith(".lora_B.bias") for key in found):          # PEFT has it of all modules or of none
        for key in [key for key in found if key.endswith(".lora_B.weight")]:
            found.setdefault(key.replace(".weight", ".bias"), found[key].new_zeros(len(found[key])))
    return found, scales


def _is_whole(adapter):
    """Whether all factors are there."""
    def has(factor):
        return factor in adapter or {f"{factor}_a", f"{factor}_b"} <= adapter.keys()

    return {"down", "up"} <= adapter.keys() or "diff" in adapter or any(
        has(f"{kind}_w1") and has(f"{kind}_w2") for kind in ("lokr", "hada"))


def _alpha(metadata, module, adapter, prefix):
    """Alpha of a module in PEFT's config; None where it says nothing."""
    if not isinstance(metadata, dict) or "down" not in adapter:
        return None
    config = {key.removeprefix(f"{prefix}."): value for key, value in metadata.items()}
    patterns = config.get("alpha_pattern") or {}
    alpha = next((value for pattern, value in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", module)),
                 config.get("lora_alpha"))
    if not isinstance(alpha, (int, float)):
        return None
    rank = adapter["down"].shape[0]
    return torch.tensor(alpha * math.sqrt(rank) if config.get("use_rslora") is True else float(alpha))


# ---- numbers

def _add(found, scales, model, name, parts, adapter, alpha):
    """Write one adapter's pairs for the modules that it is of."""
    n, k = sum(part.n for part in parts), parts[0].k
    down, up, factored = *_pair(name, adapter, n, k, alpha), "down" not in adapter
    if alpha is not None and alpha.numel() != 1:
        raise LoraError(f"{name}: its alpha is {list(alpha.shape)}, which is one number. Get the LoRA again")
    magnitude = adapter.get("magnitude")
    if magnitude is not None and tuple(magnitude.shape) not in ((n,), (n, 1), (1, k)):
        raise LoraError(f"{name}: its DoRA scale is {list(magnitude.shape)}, the weight is [{n}, {k}]")
    plain = magnitude is None and not factored
    change = None if magnitude is None else _dora(model, parts, down, up, alpha, magnitude)
    for part in parts:
        rows = slice(part.row, part.row + part.n)
        ours, at = swap_halves(up[rows]) if part.swapped else up[rows], f"{PREFIX}.{part.module}"
        pair = down, ours
        if change is not None:
            pair = _factored(model, part, swap_halves(change[rows]) if part.swapped else change[rows], scales)
        found[f"{at}.lora_A.weight"], found[f"{at}.lora_B.weight"] = (factor.contiguous() for factor in pair)
        # Also where it is the rank: where ranks differ, older diffusers takes the most frequent one for all alphas
        found[f"{at}.alpha"] = alpha.float() if plain and alpha is not None else torch.tensor(float(len(pair[0])))
        if "bias" in adapter or "diff_b" in adapter:
            bias = adapter.get("bias", adapter.get("diff_b"))
            if bias.shape != (n,):
                raise LoraError(f"{name}: its bias is {list(bias.shape)}, the layer has {n} outputs")
            if "bias" not in adapter:               # which is not scaled by alpha, and PEFT's is
                bias = bias.float() * (len(pair[0]) / float(found[f"{at}.alpha"]))
            found[f"{at}.lora_B.bias"] = swap_halves(bias[rows]) if part.swapped else bias[rows]


def _pair(name, adapter, n, k, alpha):
    """(down [r, k], up [n, r]) of an adapter; for what is no pair with its alpha in it."""
    if "down" in adapter:
        down, up = adapter["down"].flatten(1), adapter["up"].flatten(1)
        if min(adapter["down"].ndim, adapter["up"].ndim) < 2 or not down.numel() or (
                down.shape[0], len(up)) != (up.shape[1], n) or down.shape[1] > k:
            raise LoraError(f"{name}: its factors are {list(up.shape)} and {list(down.shape)}, the weight is [{n}, {k}]. This "
                            "LoRA is for another model")
        if down.shape[1] < k:                       # of FLUX.1 dev, whose latents Fill, Canny and Depth have first
            if down.shape[1] != flux1.LATENT_FEATURES:
                raise LoraError(f"{name}: it takes {down.shape[1]} inputs, the layer has {k}. This LoRA is for another model")
            down = torch.nn.functional.pad(down, (0, k - down.shape[1]))
        return down, up
    delta = _delta(name, adapter, n, k, alpha)
    if not math.isfinite(largest(delta)) or largest(delta) > MOST:
        raise LoraError(f"{name}: becomes NaN or Inf. The file is damaged or came out of a broken training; get it again")
    down, up, error = factorise(delta)
    _say_error(name, len(down), error)
    if not len(down):
        return torch.zeros(1, k), torch.zeros(n, 1)
    return down, up


def _delta(name, adapter, n, k, alpha):
    """fp32 [n, k] of an adapter that is no pair."""
    if "diff" in adapter:
        delta = adapter["diff"].float()
    else:
        kind = "lokr" if any(part.startswith("lokr") for part in adapter) else "hada"
        factors, rank = [], None
        for i in (1, 2):
            whole = adapter.get(f"{kind}_w{i}")
            if whole is None:
                left, right = (adapter[f"{kind}_w{i}_{side}"].float() for side in "ab")
                whole, rank = left @ right, len(right)
            factors.append(whole.float())
        if kind == "lokr" and factors[0].numel() * factors[1].numel() != n * k or kind == "hada" and any(
                factor.numel() != n * k for factor in factors):
            raise LoraError(f"{name}: its factors are {', '.join(str(list(factor.shape)) for factor in factors)}, the weight "
                            f"is [{n}, {k}]. This adapter is for another model")
        delta = torch.kron(*(factor.flatten(1) for factor in factors)) if kind == "lokr" else factors[0] * factors[1]
        if alpha is not None and rank is not None:
            delta = delta * (float(alpha) / rank)
    if delta.shape[0] != n or delta.numel() != n * k:
        raise LoraError(f"{name}: is {list(delta.shape)}, the weight is [{n}, {k}]. This adapter is for another model")
    return delta.reshape(n, k)


def _dora(model, parts, down, up, alpha, magnitude):
    """fp32 [n, k]: what a DoRA changes of the weight that the parts make, in the file's order of rows.

    magnitude   [n] or [n, 1], of the rows of the weight, or [1, k], of its columns
    """
    weight = torch.cat([swap_halves(rows) if part.swapped else rows for part in parts for rows in [dense(model, part.module)]])
    changed = weight + up.float() @ down.float() * (1 if alpha is None else float(alpha) / len(down))
    axis, magnitude = int(magnitude.shape[0] == len(weight)), magnitude.float()
    size = changed.norm(dim=axis, keepdim=True) + torch.finfo(torch.float32).eps
    return changed * ((magnitude.view(-1, 1) if axis else magnitude) / size) - weight


def _factored(model, part, change, scales):
    """(down, up) of a change of one module, whose output scale goes into `scales`."""
    if isinstance(model.get_submodule(part.module).weight, torch.nn.Parameter):     # a 16-bit layer has no output scale
        (down, up, error), scale = factorise(change), None
    else:
        down, up, scale, error = factorise_with_output_scale(change, dense(model, part.module))
    if not math.isfinite(error):
        raise LoraError(f"{part.module}: the DoRA becomes NaN or Inf. The file is damaged; get it again")
    _say_error(part.module, len(down), error)
    if scale is not None:
        scales[part.module] = scale.float().cpu()
    return (down, up) if len(down) else (torch.zeros(1, part.k), torch.zeros(part.n, 1))


def _say_error(name, rank, error):
    """Of an adapter that is no plain LoRA, whose rank may be more than what is kept."""
    log.log(logging.WARNING if error > MUCH else logging.INFO,
            "SVDQ: %s is no plain LoRA; factored at rank %d, relative error %.1e", name, rank, error)


def dense(model, name):
    """fp32 [n, k] on the CPU: the weight of a module as numbers, without LoRA."""
    module = model.get_submodule(name)
    module = getattr(module, "base_layer", module)
    layer = module.fused if isinstance(module, SVDQRows) else module
    if not isinstance(layer, SVDQLinear):
        return layer.weight.detach().float().cpu()
    if layer.packed.is_meta:
        raise LoraError(f"{name}: a DoRA needs the numbers of the model, which is offloaded. Load it before offloading is "
                        "enabled, or by the pipeline's load_lora_weights")
    found = layer.dense(layer.packed)[0].cpu()
    return found[module.start:module.start + module.out_features] if isinstance(module, SVDQRows) else found
