"""diffusers' FLUX blocks with modulation, norms, rotary embedding, GELU, gates and residuals inside the linears' kernels.

A block fuses only where the kernels do all of it, nothing hooks, patches, replaces or trains a module that the fused forward
skips, and the functions and classes it steps over are diffusers' own. Everything else runs the forward of the diffusers that is
installed, with its arguments as they came.

The classes have diffusers' names, by which it finds blocks to compile and not to split.

Test: tests/hf/inside/checks_blocks.py
"""

from dataclasses import replace
from functools import cache

import torch
from diffusers.hooks import _helpers as hooks
from diffusers.models import activations, attention, embeddings, normalization
from diffusers.models.transformers import transformer_flux
from torch.nn import functional

from .. import fused
from ..families import flux1
from ..replaced import has_own, is_of, is_unhooked, none_hooks_all
from . import operators
from .attention import SVDQFluxAttnProcessor, attend, fused_projections
from .layer import SVDQLinear, fusing_layer

UNUSED = {"ip_hidden_states", "ip_adapter_masks"}       # dropped without a word where a processor has no use for them


def fuse(model):
    """Give the blocks of a loaded FLUX our classes and processors. Parameters, names and the state dict stay."""
    _register()
    for stack in flux1.STACKS:
        for block in model.get_submodule(stack):
            block.__class__ = _OURS.get(type(block), type(block))
    model.set_attn_processor(SVDQFluxAttnProcessor())


@cache
def _register():
    """Caches and other hooks of diffusers look classes of blocks and processors up, and take no subclass for its base."""
    processors = {transformer_flux.FluxAttnProcessor: SVDQFluxAttnProcessor}
    for registry, kinds in ((hooks.TransformerBlockRegistry, _OURS), (hooks.AttentionProcessorRegistry, processors)):
        for stock, ours in kinds.items():
            registry.register(ours, replace(registry.get(stock)))


class FluxTransformerBlock(transformer_flux.FluxTransformerBlock):
    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None,
                **unknown):
        streams = [encoder_hidden_states, hidden_states]
        norms = self.norm1_context, self.norm1
        found = None if unknown else _found(self, streams, temb, image_rotary_emb, joint_attention_kwargs)
        parts = [found and _modulation(norm, temb, 6) for norm in norms]    # shift, scale, gate of attention; those of the MLP
        if None in parts:
            return super().forward(hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, temb=temb,
                                   image_rotary_emb=image_rotary_emb, joint_attention_kwargs=joint_attention_kwargs, **unknown)
        projections, ends = found
        _announce()
        joint = projections.qkv(streams, image_rotary_emb, [part for shift, scale, *_ in parts for part in (scale, shift)],
                                [norm.norm.eps for norm in norms])
        attn, start, out = attend(self.attn.processor, joint, None), 0, []
        del joint
        for x, (_, _, gate1, shift, scale, gate2), norm, layers in zip(
                streams, parts, (self.norm2_context, self.norm2), ends):
            stop = start + x.shape[1]
            out.append(operators.stream_end(layers, attn[:, start:stop], x, [gate1, scale, shift, gate2], norm.eps))
            start = stop
        return tuple(out)                   # text, image

    def fused_parts(self, x, tokens, image_rotary_emb):
        """(Projections, [layers of operators.stream_end] of text and image) that do what calling all parts of the block
        would, or None. See attention.fused_projections."""
        projections = _projections(self.attn, x, tokens, image_rotary_emb, has_text=True)
        if projections is None or not _are_plain_dropouts(self.attn.to_out[1]):
            return None
        ends = []
        for norm1, norm2, out, mlp in ((self.norm1_context, self.norm2_context, self.attn.to_add_out, self.ff_context),
                                       (self.norm1, self.norm2, self.attn.to_out[0], self.ff)):
            if not (_is_plain_adaptive(norm1, normalization.AdaLayerNormZero, x) and norm1.emb is None
                    and _is_plain_layer_norm(norm2, x) and _is_plain_mlp(mlp)):
                return None
            ends.append([fusing_layer(module, x) for module in (out, mlp.net[0].proj, mlp.net[2])])
        return (projections, ends) if all(layer is not None for layers in ends for layer in layers) else None


class FluxSingleTransformerBlock(transformer_flux.FluxSingleTransformerBlock):
    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None,
                **unknown):
        streams = [encoder_hidden_states, hidden_states]
        found = None if unknown else _found(self, streams, temb, image_rotary_emb, joint_attention_kwargs)
        parts = found and _modulation(self.norm, temb, 3)
        if parts is None:
            return super().forward(hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, temb=temb,
                                   image_rotary_emb=image_rotary_emb, joint_attention_kwargs=joint_attention_kwargs, **unknown)
        (projections, layers), (shift, scale, gate) = found, parts
        _announce()
        x = _joined(*streams)
        eps = self.norm.norm.eps
        if torch.compiler.is_compiling():               # what kernels make of x is no tensor that a graph could hold
            joint = projections.qkv([x], image_rotary_emb, [scale, shift], [eps])
            out = operators.single_end(layers, attend(self.attn.processor, joint, None), x, [scale, shift, gate], eps)
        else:
            joint, mlp = projections.qkv_and_mlp(layers, x, image_rotary_emb, scale, shift, eps)
            attn = attend(self.attn.processor, joint, None)
            del joint
            out = fused.gated_sum(layers[1].bound(x), attn, mlp, x, gate)
        tokens = encoder_hidden_states.shape[1]
        return out[:, :tokens], out[:, tokens:]

    def fused_parts(self, x, tokens, image_rotary_emb):
        """(Projections, layers of operators.single_end) that do what calling all parts of the block would, or None. See
        attention.fused_projections."""
        projections = _projections(self.attn, x, tokens, image_rotary_emb, has_text=False)
        if projections is None or not (_is_plain_adaptive(self.norm, normalization.AdaLayerNormZeroSingle, x)
                                       and _is_plain(self.act_mlp, torch.nn.GELU) and self.act_mlp.approximate == "tanh"):
            return None
        layers = [fusing_layer(self.proj_mlp, x), fusing_layer(self.proj_out, x, ((0, 0), (0, x.shape[-1])))]
        return (projections, layers) if all(layer is not None for layer in layers) else None


_OURS = {transformer_flux.FluxTransformerBlock: FluxTransformerBlock,
         transformer_flux.FluxSingleTransformerBlock: FluxSingleTransformerBlock}


# ---- whether a block can fuse

def _found(block, streams, temb, image_rotary_emb, joint_attention_kwargs):
    """What block.fused_parts gives, where these are the arguments of an unpatched FLUX; else None."""
    text, image = streams
    if (set(joint_attention_kwargs or ()) - UNUSED or temb.shape != (len(image), image.shape[-1])
            or not all(x.ndim == 3 and len(x) == len(image) and x.dtype == temb.dtype and x.device == temb.device
                       for x in streams)):
        return None
    found = block.fused_parts(image, text.shape[1] + image.shape[1], image_rotary_emb)
    return found if found is not None and _steps_over_diffusers_own() else None


def _projections(attn, x, tokens, image_rotary_emb, has_text):
    """The attention's Projections where calling it is calling our processor, or None."""
    if not _is_plain(attn, transformer_flux.FluxAttention) or type(attn.processor) is not SVDQFluxAttnProcessor:
        return None
    return fused_projections(attn, x, tokens, image_rotary_emb, has_text)


def _is_plain(module, kind):
    return type(module) is kind and is_unhooked(module)


def _is_plain_adaptive(norm, kind, x):
    return _is_plain(norm, kind) and _is_plain_layer_norm(norm.norm, x)


def _is_plain_layer_norm(norm, x):
    return (_is_plain(norm, torch.nn.LayerNorm) and norm.weight is None and norm.bias is None
            and norm.normalized_shape == x.shape[-1:])


def _is_plain_mlp(mlp):
    return (_is_plain(mlp, attention.FeedForward) and len(mlp.net) == 3 and _is_plain(mlp.net[0], activations.GELU)
            and mlp.net[0].approximate == "tanh" and _are_plain_dropouts(mlp.net[1]))


def _are_plain_dropouts(module):
    return _is_plain(module, torch.nn.Dropout) and not (module.training and module.p)


@torch.compiler.assume_constant_result
def _steps_over_diffusers_own():
    return (none_hooks_all() and functional.gelu is torch._C._nn.gelu
            and all(is_of(function, home) for function, home in (
                (transformer_flux.apply_rotary_emb, embeddings), (transformer_flux._get_qkv_projections, transformer_flux),
                (transformer_flux._get_fused_projections, transformer_flux), (functional.layer_norm, functional),
                (functional.rms_norm, functional)))
            and all(has_own(kind, name, _HOMES) for kind, name in _METHODS))


_HOMES = {__name__, SVDQLinear.__module__, SVDQFluxAttnProcessor.__module__, transformer_flux.__name__, activations.__name__,
          attention.__name__, normalization.__name__, "torch.nn.modules.activation", "torch.nn.modules.dropout",
          "torch.nn.modules.normalization"}
_METHODS = [*((kind, "forward") for kind in (
    *_OURS, *_OURS.values(), transformer_flux.FluxAttention, attention.FeedForward, activations.GELU,
    normalization.AdaLayerNormZero, normalization.AdaLayerNormZeroSingle, torch.nn.LayerNorm, torch.nn.RMSNorm, torch.nn.GELU,
    torch.nn.Dropout, SVDQLinear)), (activations.GELU, "gelu"), (transformer_flux.FluxAttnProcessor, "__call__"),
    (SVDQFluxAttnProcessor, "__call__")]


@torch.compiler.assume_constant_result
def _announce():
    fused.announce()


# ---- the steps of a block

def _modulation(norm, temb, parts):
    """The parts [B, 1, K] of what an adaptive norm makes of temb [B, K]. Its linear is called as any module is; None where one
    that is hooked gives something else."""
    made = norm.linear(norm.silu(temb))
    if made.shape != (len(temb), parts * temb.shape[1]) or made.dtype != temb.dtype:
        return None
    return made.unsqueeze(1).chunk(parts, -1)


def _joined(text, image):
    """[B, text | image tokens, K]. A single block gives both as parts of one tensor, and the next takes it without a copy."""
    start, tokens = text.shape[1], text.shape[1] + image.shape[1]
    if (not torch.compiler.is_compiling() and text.untyped_storage().data_ptr() == image.untyped_storage().data_ptr()
            and text.stride() == image.stride() == (tokens * text.shape[2], text.shape[2], 1)
            and image.storage_offset() == text.storage_offset() + start * text.shape[2]):
        return text.as_strided((len(text), tokens, text.shape[2]), text.stride())
    return torch.cat([text, image], 1)
