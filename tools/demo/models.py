"""The three networks of the demo, in plain torch, as small as they can be trained on a CPU."""

import torch
from torch import nn
from torch.nn import functional as F

HEAD_DIM = 128
AXES = (16, 56, 56)             # channels of a head that turn with the index, the row and the column of a token


class Flux(nn.Module):
    """FLUX.1 without guidance, under the names of its checkpoints. ComfyUI's own works in place, which autograd refuses.

    hidden, depth, depth_single   as in families.flux1.Shape       context_dim, vec_dim   of a text token, of the pooled text
    """
    def __init__(self, hidden, depth, depth_single, context_dim, vec_dim, channels=16):
        super().__init__()
        patch = channels * 4
        self.img_in, self.txt_in = nn.Linear(patch, hidden), nn.Linear(context_dim, hidden)
        self.time_in, self.vector_in = Embedder(256, hidden), Embedder(vec_dim, hidden)
        self.double_blocks = nn.ModuleList(DoubleBlock(hidden) for _ in range(depth))
        self.single_blocks = nn.ModuleList(SingleBlock(hidden) for _ in range(depth_single))
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(hidden, patch)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                zero = name.endswith(("lin", "adaLN_modulation.1", "final_layer.linear"))       # blocks begin as identities
                nn.init.zeros_(layer.weight) if zero else nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.time_in.in_layer.weight, std=0.02)

    def forward(self, x, sigma, context, pooled):
        """The flow, noise - picture, at x. x [B, 16, H, W], H and W even; sigma [B]; context [B, T, C]; pooled [B, V]."""
        rows, cols = x.shape[2] // 2, x.shape[3] // 2
        img = self.img_in(F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2))
        txt = self.txt_in(context)
        vec = F.silu(self.time_in(waves(sigma)) + self.vector_in(pooled))
        turn = rotation(txt.shape[1], rows, cols, x.device)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, turn)
        both = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            both = block(both, vec, turn)
        shift, scale = self.final_layer.adaLN_modulation[1](vec)[:, None].chunk(2, -1)
        out = self.final_layer.linear(modulated(both[:, txt.shape[1]:], shift, scale))
        return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, (rows, cols)), 2)


class Embedder(nn.Module):
    def __init__(self, into, out):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(into, out), nn.Linear(out, out)

    def forward(self, x):
        return self.out_layer(F.silu(self.in_layer(x)))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(HEAD_DIM))

    def forward(self, x):
        return F.rms_norm(x.float(), (HEAD_DIM,), self.scale, 1e-6)


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.query_norm, self.key_norm = Scale(), Scale()


class Stream(nn.Module):
    """What the picture and the text each have in a double block; DoubleBlock names the parts."""
    def __init__(self, hidden):
        super().__init__()
        self.mod, self.attn, self.mlp = nn.Module(), nn.Module(), mlp(hidden)
        self.mod.lin = nn.Linear(hidden, 6 * hidden)
        self.attn.qkv, self.attn.proj, self.attn.norm = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden), Norms()


def mlp(hidden):
    return nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(approximate="tanh"), nn.Linear(4 * hidden, hidden))


class DoubleBlock(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        for name in ("img", "txt"):
            for part, module in Stream(hidden).named_children():
                setattr(self, f"{name}_{part}", module)

    def forward(self, img, txt, vec, turn):
        streams, qkv = {"txt": txt, "img": img}, {}
        mods = {name: getattr(self, f"{name}_mod").lin(vec)[:, None].chunk(6, -1) for name in streams}
        for name, x in streams.items():
            attn, (shift, scale, *_) = getattr(self, f"{name}_attn"), mods[name]
            qkv[name] = heads(attn.qkv(modulated(x, shift, scale)), attn.norm)
        mixed = attention([torch.cat(parts, 2) for parts in zip(qkv["txt"], qkv["img"])], turn)
        mixed = dict(zip(streams, mixed.split([txt.shape[1], img.shape[1]], 1)))
        for name, x in streams.items():
            _, _, gate, shift2, scale2, gate2 = mods[name]
            x = x + gate * getattr(self, f"{name}_attn").proj(mixed[name])
            streams[name] = x + gate2 * getattr(self, f"{name}_mlp")(modulated(x, shift2, scale2))
        return streams["img"], streams["txt"]


class SingleBlock(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(hidden, 7 * hidden), nn.Linear(5 * hidden, hidden)
        self.norm, self.modulation = Norms(), nn.Module()
        self.modulation.lin = nn.Linear(hidden, 3 * hidden)

    def forward(self, x, vec, turn):
        shift, scale, gate = self.modulation.lin(vec)[:, None].chunk(3, -1)
        qkv, up = self.linear1(modulated(x, shift, scale)).split([3 * x.shape[2], 4 * x.shape[2]], -1)
        mixed = attention(heads(qkv, self.norm), turn)
        return x + gate * self.linear2(torch.cat((mixed, F.gelu(up, approximate="tanh")), -1))


def modulated(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def heads(qkv, norms):
    q, k, v = qkv.unflatten(2, (3, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4)
    return norms.query_norm(q).to(v.dtype), norms.key_norm(k).to(v.dtype), v


def attention(qkv, turn):
    q, k, v = qkv
    return F.scaled_dot_product_attention(turned(q, turn), turned(k, turn), v).transpose(1, 2).flatten(2)


def turned(x, turn):
    cos, sin, swap = turn
    return (x * cos + (x @ swap.to(x.dtype)) * sin).to(x.dtype)


def rotation(text, rows, cols, device):
    """(cos, sin [text + rows * cols, HEAD_DIM], matrix that takes a pair (a, b) to (-b, a)): text stands at the origin."""
    at = torch.zeros(text + rows * cols, 3)
    at[text:, 1], at[text:, 2] = torch.arange(rows).repeat_interleave(cols), torch.arange(cols).repeat(rows)
    angles = torch.cat([at[:, i, None].double() * 10000.0 ** (-torch.arange(0, n, 2).double() / n)
                        for i, n in enumerate(AXES)], 1)
    angles = angles.repeat_interleave(2, 1)
    swap = torch.zeros(HEAD_DIM, HEAD_DIM)
    even = torch.arange(0, HEAD_DIM, 2)
    swap[even + 1, even], swap[even, even + 1] = -1, 1      # a product, because strides of two are slow
    return angles.cos().float().to(device), angles.sin().float().to(device), swap.to(device)


def waves(sigma):
    angles = 1000 * sigma.float()[:, None] * 10000.0 ** (-torch.arange(128, device=sigma.device) / 128)
    return torch.cat((angles.cos(), angles.sin()), 1)


class Autoencoder(nn.Module):
    """TAESD for 16 latent channels, with fewer features inside; `widened` gives it the shape that ComfyUI knows."""
    FULL = 64

    def __init__(self, features=24):
        super().__init__()
        f, self.features = features, features

        def blocks(count):
            return [ConvBlock(f) for _ in range(count)]

        def halve():
            return nn.Conv2d(f, f, 3, 2, 1, bias=False)

        def double():
            return [nn.Upsample(scale_factor=2), nn.Conv2d(f, f, 3, 1, 1, bias=False)]

        self.taesd_encoder = nn.Sequential(nn.Conv2d(3, f, 3, 1, 1), *blocks(1), halve(), *blocks(3), halve(), *blocks(3),
                                           halve(), *blocks(3), nn.Conv2d(f, 16, 3, 1, 1))
        self.taesd_decoder = nn.Sequential(Clamp(), nn.Conv2d(16, f, 3, 1, 1), nn.ReLU(), *blocks(3), *double(), *blocks(3),
                                           *double(), *blocks(3), *double(), *blocks(1), nn.Conv2d(f, 3, 3, 1, 1))
        self._begin_with_colours()

    @torch.no_grad()
    def _begin_with_colours(self):
        """The first three features are red, green and blue all the way, as blurred as 1/8 of the size makes them: trained
        from noise, the network learns edges first and mixes up colours for long."""
        blur = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16
        for conv in (layer for part in (self.taesd_encoder, self.taesd_decoder) for layer in part
                     if isinstance(layer, nn.Conv2d)):
            conv.weight[:3].zero_()
            same = conv.weight.shape[0] == conv.weight.shape[1]
            for i in range(3):
                conv.weight[i, i] = blur if same else torch.zeros(3, 3)
                conv.weight[i, i, 1, 1] += 0 if same else 1
            if conv.bias is not None:
                conv.bias[:3].zero_()
        into, out = self.taesd_encoder[-1], self.taesd_decoder[1]
        into.weight[:3] *= 4
        into.bias[:3] = -2
        out.weight[:3] /= 4
        out.bias[:3] = 0.5

    def widened(self):
        """State dict with FULL features: the further ones are always zero, so pictures are the same."""
        tensors = {}
        for name, value in self.state_dict().items():
            shape = [self.FULL if n == self.features else n for n in value.shape]
            tensors[name] = value.new_zeros(shape)
            tensors[name][tuple(slice(n) for n in value.shape)] = value
        return tensors


class ConvBlock(nn.Module):
    def __init__(self, features):
        super().__init__()
        conv = [nn.Conv2d(features, features, 3, 1, 1) for _ in range(3)]
        nn.init.zeros_(conv[2].weight)          # begins as the identity, so that a deep stack trains without norms
        self.conv = nn.Sequential(conv[0], nn.ReLU(), conv[1], nn.ReLU(), conv[2])

    def forward(self, x):
        return F.relu(x + self.conv(x))


class Clamp(nn.Module):
    def forward(self, x):
        return torch.tanh(x / 3) * 3


class Judge(nn.Module):
    """A classifier: from a picture [B, 3, H, W] in 0..1 to logits {label: [B, options]}."""
    def __init__(self, options):
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        self.body = nn.Sequential(*(part for a, b in zip(widths, widths[1:]) for part in (
            nn.Conv2d(a, b, 5 if a == 3 else 3, 2, 2 if a == 3 else 1), nn.GroupNorm(8, b), nn.ReLU())))
        self.mix = nn.Sequential(nn.Conv2d(128, 128, 3, 2, 1), nn.GroupNorm(8, 128), nn.ReLU(), nn.Flatten(),
                                 nn.Linear(128 * 25, 256), nn.ReLU(), nn.Dropout(0.2))
        self.heads = nn.ModuleDict({name: nn.Linear(256, count) for name, count in options.items()})

    def forward(self, x):
        features = self.mix(self.body(x - 0.5))
        return {name: head(features) for name, head in self.heads.items()}
