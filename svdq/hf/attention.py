"""Attention with norms and rotation of q and k inside the kernels of their projection, where kernels do that.

Test: tests/hf/inside/checks_attention.py
"""

import torch
from diffusers.models.transformers import transformer_flux

from .. import fused
from ..kernels.reference import HEAD
from ..layer import run_together
from ..replaced import is_unhooked
from . import operators
from .layer import fusing_layer


class SVDQFluxAttnProcessor(transformer_flux.FluxAttnProcessor):
    """diffusers' own processor of FLUX. Where nothing patches, hooks or trains the layers and norms that a fused one steps
    over, and the kernels that serve do it, q, k and v come normed and rotated."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        streams = [hidden_states] if encoder_hidden_states is None else [encoder_hidden_states, hidden_states]
        alike = all(x.dtype == hidden_states.dtype and x.device == hidden_states.device for x in streams)
        projections = fused_projections(attn, hidden_states, sum(x.shape[1] for x in streams), image_rotary_emb,
                                        encoder_hidden_states is not None) if alike else None
        if projections is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        out = attend(self, projections.qkv(streams, image_rotary_emb), attention_mask)
        if encoder_hidden_states is None:
            return out
        text, image = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], 1)
        return attn.to_out[1](attn.to_out[0](image.contiguous())), attn.to_add_out(text.contiguous())


class Projections:
    """The layers and norms that make q, k and v of the streams of an attention, text first.

    layers   [SVDQLinear]
    norms    [RMSNorm of q, RMSNorm of k, ...] of each stream
    """

    def __init__(self, layers, norms):
        self.layers, self.norms = layers, norms

    def qkv(self, streams, image_rotary_emb, modulation=(), eps=()):
        """q, k, v of all streams, see operators.joint_qkv; eps: of the LayerNorms where there is modulation."""
        return operators.joint_qkv(self.layers, streams, list(modulation), [norm.weight for norm in self.norms],
                                   rotation(*image_rotary_emb), [*(norm.eps for norm in self.norms[::2]), *eps])

    def qkv_and_mlp(self, layers, x, image_rotary_emb, scale, shift, eps):
        """(q, k, v of one stream, [layer.Hidden of GELU of the MLP] of each item), of x normed and modulated, which both
        share. layers: of operators.single_end. Not for torch.compile."""
        (projection,), (first, last), (query, key) = self.layers, (layer.bound(x) for layer in layers), self.norms
        qkv = x.new_empty(*x.shape[:-1], projection.out_features)
        mlp = fused.hidden(last, (0, x.shape[-1]), x)
        normed = fused.modulated(x, scale, shift, eps)
        rotations = rotation(*image_rotary_emb).expand(len(x), -1, -1, -1, -1)
        run_together([(projection.bound(x), fused.qkv_jobs(normed, qkv, query.weight, key.weight, rotations, query.eps)),
                      (first, fused.gelu_jobs(0, normed, mlp))])
        return qkv, mlp


def fused_projections(attn, x, tokens, image_rotary_emb, has_text):
    """The Projections that do what calling the layers and norms of an attention would, or None.

    x        of a stream, for its width, dtype and device        tokens   of all streams
    has_text  whether the text is a stream of its own
    """
    if not isinstance(image_rotary_emb, (tuple, list)) or not all(
            part.shape == (tokens, HEAD) and part.device == x.device for part in image_rotary_emb):
        return None
    streams = [(getattr(attn, "to_qkv", None), attn.norm_q, attn.norm_k)]
    if has_text:
        streams.insert(0, (getattr(attn, "to_added_qkv", None), attn.norm_added_q, attn.norm_added_k))
    layers, norms = [], []
    for layer, query, key in streams:
        layer = fusing_layer(layer, x)
        if layer is None or not is_plain_norm(query, x) or not is_plain_norm(key, x) or query.eps != key.eps:
            return None
        layers.append(layer)
        norms += [query, key]
    return Projections(layers, norms)


def is_plain_norm(norm, x):
    return (type(norm) is torch.nn.RMSNorm and is_unhooked(norm) and norm.normalized_shape == (HEAD,) and norm.eps is not None
            and norm.weight is not None and norm.weight.dtype == x.dtype and norm.weight.device == x.device)


def attend(processor, joint, mask):
    """Attention [B, tokens, heads * 128] as a processor of FLUX has it, of q, k, v [B, tokens, 3 * heads * 128]."""
    query, key, value = joint.unflatten(-1, (3, -1, HEAD)).unbind(2)
    out = transformer_flux.dispatch_attention_fn(query, key, value, attn_mask=mask, backend=processor._attention_backend,
                                                 parallel_config=processor._parallel_config)
    return out.flatten(2, 3).to(query.dtype)


def rotation(cos, sin):
    """diffusers' (cos, sin), each [tokens, 128] with every number twice -> fp32 [tokens, 64, 2, 2], see epilogues.QKV.

    All blocks of a step get the same two: what is made of them is kept on cos, as long as both are what they were. A graph that
    is captured makes its own, since it is replayed with other numbers in them.
    """
    if torch.compiler.is_compiling() or cos.is_cuda and torch.cuda.is_current_stream_capturing():
        return _rotation(cos, sin)
    versions = [0 if part.is_inference() else part._version for part in (cos, sin)]
    kept = getattr(cos, "svdq_rotation", None)
    if kept is None or kept[0] is not sin or kept[1] != versions:
        kept = cos.svdq_rotation = sin, versions, _rotation(cos, sin)
    return kept[2]


def _rotation(cos, sin):
    cos, sin = (part[:, ::2].float() for part in (cos, sin))
    return torch.stack((cos, -sin, sin, cos), -1).unflatten(-1, (2, 2))
