"""ComfyUI's FLUX blocks with modulation, norms, rotary embedding, GELU, gates and residuals inside the linears' kernels.

A block fuses only where the kernels do all of it, no hook, patch or replacement sits on a module that the fused forward skips,
and the functions and classes it steps over are ComfyUI's own. Everything else runs the block's own forward of the ComfyUI that
is installed, with its arguments as they came. A LayerNorm that is not ComfyUI's own, or has a hook, runs by itself and costs
its layer the modulation in the kernel, nothing else.

Test: tests/comfy/inprocess/checks_blocks.py
"""

import comfy.ops
import torch
from comfy.ldm.flux import layers, math
from torch.nn import functional

from ...svdq import fused
from ...svdq.kernels.reference import HEAD
from ...svdq.replaced import has_own, is_of, is_unhooked, none_hooks_all
from .layer import SVDQLinear, SVDQOps
from .modulations import Modulations

PATCHES = {"attn1_patch", "attn1_output_patch"}         # they want q and k without rotary embedding, or the attention


def fuse(model):
    """Give the blocks of a loaded FLUX our classes. Parameters, names and the state dict stay."""
    blocks = [block for block in (*model.double_blocks, *model.single_blocks) if type(block) in _OURS]
    for block in blocks:
        block.__class__ = _OURS[type(block)]
    modulations = Modulations(blocks, _has_plain_modulations)
    for block in blocks:
        block.modulations = modulations


class FusedDouble(layers.DoubleStreamBlock):
    modulation_modules = property(lambda self: [self.img_mod, self.txt_mod])

    def forward(self, img, txt, vec, pe, attn_mask=None, modulation_dims_img=None, modulation_dims_txt=None,
                transformer_options={}, **unknown):         # noqa: B006, ComfyUI's own default
        mods = None
        if not unknown and modulation_dims_img is None and modulation_dims_txt is None:
            mods = _modulations_to_fuse(self, [txt, img], vec, pe, transformer_options)
        if mods is None:
            return super().forward(
                img=img, txt=txt, vec=vec, pe=pe, attn_mask=attn_mask, modulation_dims_img=modulation_dims_img,
                modulation_dims_txt=modulation_dims_txt, transformer_options=transformer_options, **unknown)
        (img_mod1, img_mod2), (txt_mod1, txt_mod2) = mods
        tokens = txt.shape[1]
        joint = _joint_qkv(self, (self.txt_norm1, txt, txt_mod1.scale, txt_mod1.shift),
                           (self.img_norm1, img, img_mod1.scale, img_mod1.shift), pe)
        attn = _attention(joint, self.num_heads, attn_mask, transformer_options)
        del joint
        _add_gated(self.img_attn.proj, attn[:, tokens:], img, img_mod1.gate)
        _add_gated(self.txt_attn.proj, attn[:, :tokens], txt, txt_mod1.gate)
        _add_mlps((self.img_mlp, self.img_norm2, img, img_mod2), (self.txt_mlp, self.txt_norm2, txt, txt_mod2))
        return img, _clamped(txt)

    def _has_unhooked_parts(self, txt, img):
        return self.hidden_size == HEAD * self.num_heads and all(
            _is_unhooked_norm(attn.norm)
            and _is_unhooked(mlp, torch.nn.Sequential) and len(mlp) == 3 and _is_unhooked_gelu(mlp[1])
            and all(_is_unhooked_linear(layer, x, [(0, 0)]) for layer in (attn.qkv, attn.proj, mlp[0], mlp[2]))
            for x, attn, mlp in ((txt, self.txt_attn, self.txt_mlp), (img, self.img_attn, self.img_mlp)))


class FusedSingle(layers.SingleStreamBlock):
    modulation_modules = property(lambda self: [self.modulation])

    def forward(self, x, vec, pe, attn_mask=None, modulation_dims=None, transformer_options={},             # noqa: B006
                **unknown):
        mods = None
        if not unknown and modulation_dims is None:
            mods = _modulations_to_fuse(self, [x], vec, pe, transformer_options)
        if mods is None:
            return super().forward(x=x, vec=vec, pe=pe, attn_mask=attn_mask, modulation_dims=modulation_dims,
                                   transformer_options=transformer_options, **unknown)
        (mod, _), = mods
        qkv, mlp = _qkv_and_mlp(self, x, mod.scale, mod.shift, pe)
        attn = _attention(qkv, self.num_heads, attn_mask, transformer_options)
        del qkv
        return _clamped(_gated_sum(self.linear2, attn, mlp, x, mod.gate))

    def _has_unhooked_parts(self, x):
        return (self.hidden_size == HEAD * self.num_heads and _is_unhooked_norm(self.norm)
                and _is_unhooked_gelu(self.mlp_act) and self.mlp_hidden_dim_first == self.mlp_hidden_dim
                and _is_unhooked_linear(self.linear1, x, [(0, 0), (3 * self.hidden_size, 0)])
                and _is_unhooked_linear(self.linear2, x, [(0, 0), (0, self.hidden_size)]))


_OURS = {layers.DoubleStreamBlock: FusedDouble, layers.SingleStreamBlock: FusedSingle}


# ---- whether a block can fuse

@torch.compiler.disable         # Dynamo would guard on every hook of every layer
def _modulations_to_fuse(block, streams, vec, pe, transformer_options):
    """The block's modulations, where it can fuse with them; else None. Those of a hooked module may be anything. Where a patch
    stands in the place of a block, nothing is computed ahead: it may change vec where it lies."""
    if not _can_fuse(block._has_unhooked_parts, streams, vec, pe, transformer_options):
        return None
    ahead, x = not transformer_options.get("patches_replace", {}).get("dit"), streams[0]
    mods = block.modulations.of(block, vec, ahead)
    parts = [part for both in mods for mod in both if mod is not None for part in (mod.shift, mod.scale, mod.gate)]
    if not all(part.shape == (len(x), 1, x.shape[-1]) and part.dtype == x.dtype and part.device == x.device for part in parts):
        return None
    fused.announce()
    return mods


def _can_fuse(has_unhooked_parts, streams, vec, pe, transformer_options):
    """Whether these are the arguments of an unpatched FLUX, and the block's has_unhooked_parts(*streams)."""
    batch, tokens = streams[0].shape[0], sum(x.shape[1] for x in streams)
    return (isinstance(vec, torch.Tensor) and vec.shape[:-1] in ((batch,), (batch, 1))      # a tuple: modulated elsewhere
            and isinstance(pe, torch.Tensor) and pe.dtype == torch.float32 and pe.device == vec.device
            and pe.is_contiguous() and pe.shape in ((n, 1, tokens, HEAD // 2, 2, 2) for n in (1, batch))
            and all(x.ndim == 3 and len(x) == batch and x.is_contiguous() and x.dtype == vec.dtype and x.device == vec.device
                    for x in streams)
            and _steps_over_comfyuis_own() and not PATCHES & transformer_options.get("patches", {}).keys()
            and has_unhooked_parts(*streams))


def _is_unhooked_linear(layer, x, places):
    """Whether `run_tiles` does what calling the layer would, with fused epilogues, for tiles that begin at these (row, col)."""
    return _is_unhooked(layer, SVDQLinear) and layer.quantised and layer.fuses(x, places)


def _is_unhooked_norm(norm):
    return (_is_unhooked(norm, layers.QKNorm) and norm.query_norm.eps == norm.key_norm.eps
            and all(_is_unhooked(part, SVDQOps.RMSNorm) for part in (norm.query_norm, norm.key_norm)))


def _is_plain_layer_norm(norm, x):
    """Whether a Modulated does what calling the norm and apply_mod would. If not, the norm runs by itself."""
    return (_is_unhooked(norm, SVDQOps.LayerNorm) and norm.weight is None and norm.bias is None
            and norm.normalized_shape == x.shape[-1:] and is_of(functional.layer_norm, functional))


def _has_plain_modulations(block):
    """Whether Modulations computes what calling the block's modules would, and nobody sees the vector meanwhile."""
    return is_unhooked(block) and all(map(_is_plain_modulation, block.modulation_modules))


def _is_plain_modulation(module):
    return (_is_unhooked(module, layers.Modulation) and _is_unhooked(module.lin, SVDQLinear) and module.lin.quantised
            and is_of(functional.silu, functional))


def _is_unhooked_gelu(module):
    return _is_unhooked(module, torch.nn.GELU) and module.approximate == "tanh"


def _is_unhooked(module, kind):
    """Whether calling the module runs the forward of its class, which nobody has replaced, and nothing else."""
    return (type(module) is kind and _has_own_forward(kind) and is_unhooked(module)
            and not getattr(module, "weight_function", None) and not getattr(module, "bias_function", None))


def _steps_over_comfyuis_own():
    return (all(is_of(function, home) for function, home in (
                (layers.attention, math), (math.attention, math), (math.apply_rope, math), (layers.apply_mod, layers),
                *_what_apply_rope_calls(), (functional.rms_norm, functional)))
            and functional.gelu is torch._C._nn.gelu
            and none_hooks_all()
            and all(_has_own_forward(kind) for kind in (*_OURS, *_OURS.values())))


def _what_apply_rope_calls():
    """[(function, the module it is of)]: of comfy-kitchen where it is installed, which old versions hold by another name."""
    kitchen = getattr(getattr(comfy, "quant_ops", None), "ck", None)
    of_kitchen = [getattr(kitchen, name, None) for name in ("apply_rope", "apply_rope1")]
    of_kitchen += [getattr(math, name, None) for name in ("q_apply_rope", "q_apply_rope1")]
    return [(math.apply_rope1, math), *((function, kitchen) for function in of_kitchen if function is not None)]


def _has_own_forward(kind):
    """Whether a class is of a module that blocks are made of, and its forward was written in the file of its class."""
    if kind is SVDQLinear:
        return kind.forward is _LINEAR_FORWARD      # wrapped by us, and nobody replaces it before we are imported
    return kind.__module__ in _HOMES and all(has_own(kind, name, _HOMES) for name in _FORWARDS if hasattr(kind, name))


_FORWARDS = ("forward", "forward_comfy_cast_weights")           # the second is what the first of a norm of ComfyUI calls
_LINEAR_FORWARD = SVDQLinear.forward
_HOMES = {__name__, layers.__name__, comfy.ops.__name__, "torch.nn.modules.container", "torch.nn.modules.activation",
          "torch.nn.modules.normalization"}


# ---- the steps of a block. A gate and a rotation are those of one batch item, so products with them are one per item

def _modulated(norm, x, scale, shift):
    """[the modulated x of each picture [tokens, K]], a Modulated where the norm is ComfyUI's own, alone and without numbers.

    x [B, tokens, K]; scale, shift [B, 1, K]
    """
    if _is_plain_layer_norm(norm, x):
        return fused.modulated(x, scale, shift, norm.eps)
    return list(layers.apply_mod(norm(x), 1 + scale, shift).to(x.dtype))


@torch.compiler.disable
def _joint_qkv(block, txt, img, pe):
    """q, k and v of both streams [B, text | image tokens, 3 * heads * 128], written where attention reads them.

    txt, img   (norm, x, scale, shift), see _modulated
    """
    tokens, pictures = txt[1].shape[1], img[1]
    joint = pictures.new_empty(len(pictures), tokens + pictures.shape[1], 3 * block.hidden_size)
    SVDQLinear.run_together([
        (attn.qkv, _qkv_jobs(attn.norm, _modulated(*given), joint[:, part], pe[:, 0, part]))
        for attn, given, part in ((block.img_attn, img, slice(tokens, None)), (block.txt_attn, txt, slice(tokens)))])
    return joint


def _qkv_jobs(norm, x, out, pe):
    """x of each picture -> out [B, tokens, 3 * heads * 128], q and k normed and rotated by pe [B | 1, tokens, 64, 2, 2]."""
    query, key = (_weight(part, out) for part in (norm.query_norm, norm.key_norm))
    eps = torch.finfo(torch.float32).eps if norm.query_norm.eps is None else norm.query_norm.eps     # as torch has it
    return fused.qkv_jobs(x, out, query, key, pe.expand(len(x), -1, -1, -1, -1), eps)


def _weight(norm, x):
    """A norm's weight where x is. What ComfyUI streams in lies in a buffer that the next layer may get, hence the copy."""
    weight, bias, stream = comfy.ops.cast_bias_weight(norm, x, offloadable=True)
    kept = weight if weight is norm.weight else weight.clone()
    comfy.ops.uncast_bias_weight(norm, weight, bias, stream)
    return kept


@torch.compiler.disable
def _qkv_and_mlp(block, x, scale, shift, pe):
    """The two row tiles of linear1, which share a picture's input: q, k, v [B, tokens, 3 * heads * 128], and for each picture
    the layer.Hidden of the rest."""
    qkv = x.new_empty(*x.shape[:-1], 3 * block.hidden_size)
    mlp = fused.hidden(block.linear2, (0, block.hidden_size), x)
    modulated = _modulated(block.pre_norm, x, scale, shift)
    block.linear1.run_tiles([*_qkv_jobs(block.norm, modulated, qkv, pe[:, 0]), *fused.gelu_jobs(1, modulated, mlp)])
    return qkv, mlp


def _attention(joint, heads, mask, transformer_options):
    """ComfyUI's, with all that may be hooked into it; q and k are rotated already."""
    q, k, v = joint.unflatten(-1, (3, heads, HEAD)).permute(2, 0, 3, 1, 4)
    return layers.attention(q, k, v, pe=None, mask=mask, transformer_options=transformer_options).to(joint.dtype)


@torch.compiler.disable
def _add_gated(layer, x, residual, gate):
    """residual += gate * layer(x), in place as in ComfyUI's blocks."""
    fused.gated(layer, x, residual, residual, gate)


@torch.compiler.disable
def _add_mlps(*streams):
    """x += gate * mlp(x, normed and modulated) of each stream (mlp, norm, x, layers.ModulationOut)."""
    fused.add_mlps(SVDQLinear.run_together, *(
        (mlp[0], mlp[2], _modulated(norm, x, mod.scale, mod.shift), x, mod.gate) for mlp, norm, x, mod in streams))


_gated_sum = torch.compiler.disable(fused.gated_sum)


def _clamped(x):
    """What ComfyUI does at the end of a block."""
    return torch.nan_to_num(x, nan=0.0, posinf=65504, neginf=-65504) if x.dtype == torch.float16 else x
