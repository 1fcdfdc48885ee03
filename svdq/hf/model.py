"""SVDQFluxTransformer2DModel: diffusers' own FLUX transformer with the layers of an SVDQ file in it.

Modules, names, forward, offloading, attention and caches are diffusers'. What would go wrong there without a word, because it
takes packed bytes for numbers, is done here in its place or refused.

Test: tests/hf
"""

import functools
import inspect
import json
import logging
import math
from collections import OrderedDict

import torch
from diffusers import FluxTransformer2DModel, ModelMixin
from diffusers.loaders import peft as diffusers_peft
from diffusers.utils import get_adapter_name, scale_lora_layers, unscale_lora_layers

from ..checkpoint import Checkpoint
from ..errors import CheckpointError, LoraError
from ..families import flux1
from ..format import view_layer
from ..kernels.errors import command, printable
from ..kernels.variant import ACT_BITS, FLOATS
from ..serving import Cast, plan_for
from ..ways_out import DIFFUSERS, said_in
from . import blocks, lora_files, require, saving, source
from .layer import SVDQLinear, SVDQRows, repacked

__all__ = ["ModelMixin", "SVDQFluxTransformer2DModel"]
log = logging.getLogger(__name__)

# What pipelines hand to every model they load, and this one has no use for: its files are safetensors, read as they lie.
_UNUSED = {"use_safetensors", "low_cpu_mem_usage", "disable_mmap", "max_memory", "offload_folder", "offload_state_dict",
           "use_flashpack", "variant", "quantization_config", "force_download", "proxies"}
_ARGUMENTS = list(inspect.signature(FluxTransformer2DModel.forward).parameters)[1:]


class SVDQFluxTransformer2DModel(FluxTransformer2DModel):
    """A 4-bit SVDQ FLUX.1 for every pipeline of diffusers that takes a FluxTransformer2DModel."""

    __module__ = __package__.rpartition(".")[0]     # where saved pipelines say that their transformer is from
    _tp_plan = None

    @classmethod
    @said_in(DIFFUSERS)
    def from_pretrained(cls, pretrained_model_name_or_path, *, filename=None, subfolder=None, torch_dtype=None, dtype=None,
                        act_bits=None, device=None, device_map=None, revision="main", cache_dir=None,
                        local_files_only=False, token=None, **unused):
        """The model of an SVDQ file.

        pretrained_model_name_or_path      a file; a folder with one SVDQ file, or with the two of a legacy model; on Hugging
                     Face owner/name or owner/name/FILE.safetensors. What is here goes before what is there
        filename     the file in a folder or repository with several; none: the one for this GPU
        subfolder    of that folder or repository
        dtype        torch.bfloat16 (none), float16 or float32: of what is not 4-bit, and of computing. torch_dtype: the same.
                     A pipeline that loads its parts without saying one has all in float32
        act_bits     4, 8, 16: the bits that activations are rounded to, None: the fastest, see kernels.registry.plan
        device       where to; with one, bytes are brought into the order of its kernels here. device_map: the same, as
                     pipelines call it
        revision, cache_dir, local_files_only, token      as huggingface_hub has them

        Raises CheckpointError for what is no such model, TypeError and ValueError for other arguments.
        """
        for name, value in unused.items():
            if name not in _UNUSED:
                raise TypeError(f"from_pretrained: {name!r} is no argument of {cls.__name__}")
            if name in ("quantization_config", "variant") and value is not None:
                raise ValueError(f"from_pretrained: {name} is {value!r}, and an SVDQ file is quantised as it is. Leave it out")
        if act_bits not in (None, *ACT_BITS):
            raise ValueError(f"from_pretrained: act_bits is {act_bits!r}. Needs 4, 8, 16 (never rounded) or None, the fastest")
        given = device is not None or device_map is not None
        if None not in (dtype, torch_dtype) and dtype != torch_dtype:
            raise ValueError(f"from_pretrained: dtype is {dtype}, torch_dtype {torch_dtype}. Give one of them")
        dtype = _dtype(torch_dtype if dtype is None else dtype, torch.float32 if unused else torch.bfloat16)
        device = _device(device, device_map)
        path = source.find(pretrained_model_name_or_path, filename=filename, subfolder=subfolder, revision=revision,
                           cache_dir=cache_dir, local_files_only=local_files_only, token=token, device=device, dtype=dtype,
                           act_bits=act_bits)
        checkpoint = Checkpoint(path).require()
        for notice in checkpoint.notices:
            log.warning("SVDQ: %s: %s", printable(checkpoint.path.name), notice)
        with torch.device("meta"):
            model = cls(**checkpoint.shape.diffusers_config())
        model._fill(checkpoint, dtype, act_bits, device, packs=given)
        model.svdq_path = checkpoint.path
        return model.eval()

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path_or_dict, **options):
        """See from_pretrained."""
        return cls.from_pretrained(pretrained_model_link_or_path_or_dict, **options)

    def _fill(self, checkpoint, dtype, act_bits, device, packs):
        """Put the checkpoint's layers and tensors in the places of those that are on the meta device.

        packs   whether to bring bytes into the order of the device's kernels now, because the model is to stay there
        """
        packs = packs and plan_for(checkpoint.precision, device, dtype, act_bits).variant.layout is not None
        cast = Cast(printable(checkpoint.path.name), device, dtype, act_bits)
        for name, tiles, bias in checkpoint.layers(checkpoint.shape.diffusers_places()):
            cast(name, tiles)
            stored, text = tiles.stored.to(device), tiles.description(act_bits=act_bits)
            if packs:
                stored, text = repacked(view_layer(stored, json.loads(text)), dtype, act_bits)
            layer = SVDQLinear(max(tile.col + tile.k for tile in tiles), max(tile.row + tile.n for tile in tiles),
                               stored, bias.to(device, dtype), text)
            parent = self.get_submodule(name.rpartition(".")[0])
            parent._modules[name.rpartition(".")[2]] = layer
            names = flux1.DIFFUSERS_ROWS.get(name.rpartition(".")[2])
            if names:
                layer.parts = parent, names
                n = layer.out_features // len(names)
                for i, part in enumerate(names):
                    parent._modules[part] = SVDQRows(layer, i * n, n)
                parent.fused_projections = True
        for name, tensor in checkpoint.plain(checkpoint.shape.diffusers_plain()):
            module, _, leaf = name.rpartition(".")
            self.get_submodule(module)._parameters[leaf] = torch.nn.Parameter(tensor.to(device, dtype), requires_grad=False)
        cast.told()
        empty = [name for name, parameter in self.named_parameters() if parameter.is_meta]
        if empty:
            raise CheckpointError(f"{checkpoint.path}: this diffusers' FLUX has {len(empty)} tensors that the file has not, "
                                  f"the first is {empty[0]}. Update this pack, or report it with the version of diffusers")
        for stack in flux1.STACKS:
            self.get_submodule(stack).register_state_dict_pre_hook(_refuse_blocks_alone)
        blocks.fuse(self)

    # ---- what takes packed bytes for numbers

    def state_dict(self, *args, **kwargs):
        """As of any model; its bytes are `packed`. Asked for the weight of a 4-bit layer, it answers with a tensor of its
        shape: diffusers looks there for shapes."""
        found = super().state_dict(*args, **kwargs)
        return found if args or "destination" in kwargs else _StateDict.of(found, self)

    def load_state_dict(self, *args, **kwargs):
        result = super().load_state_dict(*args, **kwargs)
        for layer in self.modules():
            if isinstance(layer, SVDQLinear):
                layer.empty_branch()
                for wrapper, _ in layer.adapters:
                    wrapper.taken.clear()
        if getattr(self, "peft_config", None):
            _adapters().follow(self)
        return result

    def requires_grad_(self, requires_grad=True):
        """Of what can have gradients: bytes cannot."""
        for parameter in self.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(requires_grad)
        return self

    def fuse_qkv_projections(self):
        """Nothing: q, k and v are one layer in the file already."""

    def unfuse_qkv_projections(self):
        """Nothing: the fused layer has the bytes of the others."""

    def enable_layerwise_casting(self, *args, skip_modules_classes=None, **kwargs):
        """Of the layers that are 16-bit; those in 4 bit stay as they are."""
        super().enable_layerwise_casting(*args, skip_modules_classes=(*(skip_modules_classes or ()), SVDQLinear, SVDQRows),
                                         **kwargs)

    def save_pretrained(self, save_directory, is_main_process=True, save_function=None, safe_serialization=True, variant=None,
                        max_shard_size=None, push_to_hub=False, **kwargs):
        """config.json and one SVDQ file as published, which this class, ComfyUI and every reader of the format take. LoRAs
        that were fused are in its low-rank branches. Raises LoraError for those that are loaded and not fused, ValueError for
        another form."""
        if save_function is not None or not safe_serialization or variant is not None or push_to_hub:
            raise ValueError("save_pretrained: an SVDQ model is saved as one safetensors file. Leave save_function, "
                             "safe_serialization, variant and push_to_hub out; upload the folder afterwards")
        if is_main_process:
            saving.save(self, save_directory)

    # ---- LoRA

    @functools.wraps(FluxTransformer2DModel.forward)
    def forward(self, *args, **kwargs):
        kwargs |= zip(_ARGUMENTS, args)
        given = kwargs.get("joint_attention_kwargs") or {}
        scale = given.get("scale", 1.0)
        if scale == 1.0 or not getattr(self, "peft_config", None):
            return super().forward(**kwargs)
        if not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise LoraError(f"the scale in joint_attention_kwargs is {scale!r}. Give a number, 1 for LoRAs as they are set")
        kwargs["joint_attention_kwargs"] = {name: value for name, value in given.items() if name != "scale"}
        try:
            _call_and_follow(self, scale_lora_layers, scale)
            return super().forward(**kwargs)
        finally:
            _call_and_follow(self, unscale_lora_layers, scale)

    @said_in(DIFFUSERS)
    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict, prefix="transformer", hotswap=False, **kwargs):
        """As diffusers has it, for LoRA files of every dialect, exact in the low-rank branch. Raises LoraError for a file of
        which nothing fits."""
        adapters = _adapters()
        pipeline = kwargs.pop("_pipeline", None)
        state_dict, options, scales = lora_files.read(self, pretrained_model_name_or_path_or_dict, prefix, kwargs)
        options["adapter_name"] = options.get("adapter_name") or get_adapter_name(self)
        if hotswap:                         # PEFT swaps the tensors themselves: the caller's would be the adapter's before
            state_dict = {key: tensor.clone() for key, tensor in state_dict.items()}
        with lora_files.not_offloaded(pipeline):
            known = options["adapter_name"] in getattr(self, "peft_config", {})
            try:
                super().load_lora_adapter(state_dict, prefix="transformer", hotswap=hotswap, **options)
                adapters.follow(self, fresh=options["adapter_name"])
                adapters.scale_outputs(self, options["adapter_name"], scales)
            except BaseException:
                if not known and options["adapter_name"] in getattr(self, "peft_config", {}):
                    self.delete_adapters(options["adapter_name"])               # nothing of it stays
                raise

    def add_adapter(self, adapter_config, adapter_name="default"):
        adapters = _adapters()
        adapters.refuse_config(adapter_config)
        before = self._hf_peft_config_loaded
        try:
            super().add_adapter(adapter_config, adapter_name)
        except BaseException:
            self._hf_peft_config_loaded = before        # diffusers has said it is there before it was
            raise
        adapters.follow(self)

    def fuse_lora(self, *args, **kwargs):
        adapters = _adapters()
        if adapters.foreign(self):
            raise LoraError("a LoKr or LoHa that was added for training cannot be fused into 4-bit layers. Save it and load "
                            "its file, which can")
        super().fuse_lora(*args, **kwargs)
        adapters.follow(self)

    def save_lora_adapter(self, save_directory, adapter_name=None, **kwargs):
        name = adapter_name or get_adapter_name(self)
        if any(name in getattr(module, "scales", ()) for module in self.modules()):
            raise LoraError(f"{name} is a DoRA, of which its own file has more than what would be saved here. Keep that file")
        super().save_lora_adapter(save_directory, *(() if adapter_name is None else (adapter_name,)), **kwargs)

    def unload_lora(self):
        super().unload_lora()
        _adapters().forget(self)


def _then_follow(name):
    """diffusers' method of a name, after which branches are what PEFT says now."""
    stock = getattr(FluxTransformer2DModel, name)

    def method(self, *args, **kwargs):
        result = stock(self, *args, **kwargs)
        _adapters().follow(self)
        return result

    method.__name__, method.__doc__ = name, stock.__doc__
    return method


for _name in ("set_adapters", "set_adapter", "enable_lora", "disable_lora", "enable_adapters", "disable_adapters",
              "delete_adapters", "unfuse_lora"):
    setattr(SVDQFluxTransformer2DModel, _name, _then_follow(_name))
lora_files.teach()
_scale = diffusers_peft._SET_ADAPTER_SCALE_FN_MAPPING
_scale.setdefault(SVDQFluxTransformer2DModel.__name__, _scale[FluxTransformer2DModel.__name__])


@torch.compiler.disable          # branches are written, which no graph can hold
def _call_and_follow(model, change, scale):
    """Change strengths for a call: here and not in diffusers' decorator, so that compiled blocks find branches written."""
    change(model, scale)
    _adapters().follow(model)


def _adapters():
    """The module that imports PEFT, which models without LoRA do without."""
    require("peft")
    from . import adapters

    return adapters


class _StateDict(OrderedDict):
    """A state dict that answers for weights which are not in it. What is saved of it is an ordinary one."""

    @classmethod
    def of(cls, found, model):
        new = cls(found)
        new._metadata, new.model = getattr(found, "_metadata", None), model
        return new

    def __missing__(self, name):
        module, _, leaf = name.rpartition(".")
        try:
            found = self.model.get_submodule(module)
        except AttributeError:
            raise KeyError(name) from None
        if leaf != "weight" or not isinstance(getattr(found, "base_layer", found), (SVDQLinear, SVDQRows)):
            raise KeyError(name)
        return getattr(found, "base_layer", found).weight

    def __reduce__(self):
        return OrderedDict, (list(self.items()),)


def _refuse_blocks_alone(blocks, prefix, keep_vars):
    """A state dict of the blocks without the model: whoever takes it for another model, as ControlNets do when they start from
    a transformer, finds no name of his in it and goes on with random numbers."""
    if prefix == "":
        raise CheckpointError("the blocks of a 4-bit SVDQ model hold packed bytes, which no other model can start from. Take "
                              f"the 16-bit model, or what `{command('dequantize', 'FILE', 'OUT')}` writes, for that")


def _dtype(dtype, default):
    named = {str(one).removeprefix("torch."): one for one in FLOATS} | {"auto": default}
    dtype = default if dtype is None else named.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype not in FLOATS:
        raise ValueError(f"from_pretrained: dtype is {dtype!r}. Needs one of {', '.join(map(str, FLOATS))}")
    return dtype


def _device(device, device_map):
    """The torch.device that either means; the CPU for neither."""
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    given = device if device is not None else device_map
    try:
        return torch.device("cpu" if given is None else given)
    except (RuntimeError, TypeError):
        raise ValueError(f"from_pretrained: device is {given!r}. Needs one device, such as 'cuda' or 'cuda:1': an SVDQ model "
                         "is small enough for one. To offload it, use the pipeline's enable_*_offload") from None
