"""Attention with norms and rotation of q and k inside the kernels of their projection, where kernels do that.

Test: tests/hf/inside/checks_attention.py
"""

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from ..kernels.reference import HEAD
from .layer import SVDQLinear


class SVDQFluxAttnProcessor(FluxAttnProcessor):
    """diffusers' own processor of FLUX. Where nothing patches, hooks or trains the layers and norms that a fused one steps
    over, and the kernels that serve do it, q, k and v come normed and rotated."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        streams = [(getattr(attn, "to_qkv", None), attn.norm_q, attn.norm_k, hidden_states)]
        if encoder_hidden_states is not None:
            text = getattr(attn, "to_added_qkv", None), attn.norm_added_q, attn.norm_added_k, encoder_hidden_states
            streams.insert(0, text)
        if image_rotary_emb is None or not all(_fuses(*stream) for stream in streams):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        rotation, start, parts = _rotation(*image_rotary_emb), 0, []
        for layer, query, key, x in streams:
            stop = start + x.shape[1]
            parts.append(layer.qkv(x, query.weight, key.weight, rotation[start:stop], query.eps))
            start = stop
        joint = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        query, key, value = joint.unflatten(-1, (3, -1, HEAD)).unbind(2)
        parallel = getattr(self, "_parallel_config", None)          # diffusers before 0.36 has none
        out = dispatch_attention_fn(query, key, value, attn_mask=attention_mask, backend=self._attention_backend,
                                    **{} if parallel is None else {"parallel_config": parallel})
        out = out.flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return out
        text, image = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], 1)
        return attn.to_out[1](attn.to_out[0](image.contiguous())), attn.to_add_out(text.contiguous())


def _fuses(layer, query, key, x):
    """Whether `layer.qkv` is what calling layer and norms would be."""
    return (isinstance(layer, SVDQLinear) and layer.kernels_norm_and_rotate(x)
            and all(_is_plain_norm(norm, x) for norm in (query, key)) and query.eps == key.eps)


def _is_plain_norm(norm, x):
    return (type(norm) is torch.nn.RMSNorm and norm.weight is not None and norm.weight.dtype == x.dtype
            and norm.weight.device == x.device and not norm._forward_hooks and not norm._forward_pre_hooks
            and "forward" not in norm.__dict__)


def _rotation(cos, sin):
    """diffusers' (cos, sin), each [tokens, 128] with every number twice -> fp32 [tokens, 64, 2, 2], see epilogues.QKV."""
    cos, sin = (part[:, ::2].float() for part in (cos, sin))
    return torch.stack((cos, -sin, sin, cos), -1).unflatten(-1, (2, 2))
