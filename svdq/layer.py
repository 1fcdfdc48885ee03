"""A linear whose weight is packed bytes, whatever program it lives in.

A layer is a list of tiles, rectangles of the logical weight, whose packed tensors all lie in one byte tensor; LoRAs lie in a
second one. Hosts move, pin, count and stream exactly these two and the bias.

    PackedLinear   what the bytes mean, and computing with them; the bytes are given with each call
    BoundLinear    it and the bytes of now, for what several layers do together
    SVDQLayer      the module around it: it has the bytes and takes LoRAs. A host subclasses it and says where they come from

Test: tests/unit/test_layer.py
"""

from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import NamedTuple

import torch

from .format import Tile, view_layer
from .kernels import epilogues, registry
from .kernels.errors import ShapeError
from .kernels.prologues import Modulated, plain
from .kernels.variant import Target
from .kernels.weights import dequantize, input_gradient, matmul_branch
from .lora import LoraFactors, LoraSections


class TileViews(NamedTuple):
    """What of a layer lies in its bytes, as views of them.

    tiles     [format.Tile], LoRAs in the branches of their weights
    pairs     [(down, up)] beside each tile: LoRA rank that does not fit into its branch; (None, None) where there is none
    scale     fp32 [out_features] for the output, and `constant` to add to it, see LoraSections.view_scale; None without
    """
    tiles: list
    pairs: list
    scale: torch.Tensor | None = None
    constant: torch.Tensor | None = None


class KeptViews:
    """TileViews, and what they were made for. A byte tensor that is saved or sent goes without them."""

    def __init__(self, state, views):
        self.state, self.views = state, views

    def __reduce__(self):
        return type(None), ()


class StoredLora(NamedTuple):
    """The LoRAs of a layer where x is.

    sections   what lies where in `bytes`
    bytes      uint8 [bytes]
    kept       whether these bytes live as long as the layer's own: views of a copy must not outlive the call
    """
    sections: LoraSections
    bytes: torch.Tensor
    kept: bool = True


class Hidden:
    """GELU of one tile's product on its way to a tile of another layer: as that one's kernel takes it where the first one's
    makes it, else as numbers. In the place of `out` in one job of run_tiles and of `x` in another.

    shape        [tokens, channels]
    following    (registry.Plan, Weight) of the tile that it goes to, or None where nobody can say; until it is filled
    to           a host's own: (its layer, place of the tile)
    """

    def __init__(self, shape, like, following=None):
        self.shape, self.dtype, self.device, self.following = shape, like.dtype, like.device, following
        self.tensor = self.prepared = self.to = None

    def __len__(self):
        return self.shape[0]

    def fill(self, plan, x, weight, bias, prepared):
        """From the product of an x, or of what was prepared of it, which is what Plan.run takes."""
        (variant, unpack), following, self.following = _serving(plan, len(x)), self.following, None
        if following is not None and not unpack and _serving(following[0], len(x)) == (variant, False):
            self.prepared, prepared = variant.fed(x, weight, bias, following[1], prepared)
        if self.prepared is None:
            self.tensor = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            plan.run(x, weight, self.tensor, bias, False, epilogues.Gelu(), prepared)


def _serving(plan, rows):
    """(Variant, whether it needs the file's order restored) for x of so many rows."""
    plan = plan.for_rows(rows)
    return plan.variant, plan.unpack


class PackedLinear:
    """What a layer's bytes mean, and the linear they are. It holds no tensor and belongs to no host.

    description   what `format.PackedTiles` says of the bytes, parsed

    `packed` is the byte tensor and `lora` a StoredLora or None, both where x is. A bias has x's dtype.
    """

    def __init__(self, in_features, out_features, description):
        self.in_features, self.out_features, self.description = in_features, out_features, description
        self._plans, self._tiles, self._rows = {}, None, None

    def __getstate__(self):
        """What is saved, sent or copied asks for its plans anew."""
        return self.__dict__ | {"_plans": {}, "_tiles": None}

    def rows(self, start, stop):
        """The linear of output channels [start, stop), multiples of 128, of the same bytes. For layers of one tile."""
        part = copy(self)
        part.out_features, part._plans, part._tiles, part._rows = stop - start, {}, None, (start, stop)
        return part

    @property
    def act_bits(self):
        return self.description.get("act_bits")

    @property
    def tiles(self):
        """The tiles without their numbers, for whoever asks for shapes."""
        if self._tiles is None:
            self._tiles = self._cut(view_layer(torch.empty(self.nbytes, dtype=torch.uint8, device="meta"), self.description))
        return self._tiles

    def _cut(self, tiles):
        if self._rows is None:
            return tiles
        tile, = tiles
        return [Tile(0, 0, tile.weight.cut(*self._rows))]

    @property
    def nbytes(self):
        """The bytes that the tiles reach to."""
        sections = (value for entry in self.description["tiles"] for value in entry.values()
                    if isinstance(value, dict) and "at" in value)
        return max(section["at"] + torch.Size(section["shape"]).numel() * getattr(torch, section["dtype"]).itemsize
                   for section in sections)

    def views(self, packed, lora=None):
        """The TileViews in these bytes, which are the layer's own or a copy of them.

        They are kept on the byte tensor itself: they live as long as it does, so that a host which frees or streams the bytes
        frees the views with them, and are made anew where its memory or the LoRAs have changed.
        """
        if self._rows is not None or lora is not None and not lora.kept:
            return self._make_views(packed, lora)
        state = packed.data_ptr(), self.description, *((None, None) if lora is None else (lora.sections, lora.bytes.data_ptr()))
        kept = getattr(packed, "svdq_views", None)
        if kept is None or kept.state != state:
            with torch.inference_mode(False), torch.no_grad():
                kept = packed.svdq_views = KeptViews(state, self._make_views(packed.detach(), lora))
        return kept.views

    def _make_views(self, packed, lora):
        tiles = view_layer(packed, self.description)
        if lora is None:
            return TileViews(self._cut(tiles), [(None, None)] * len(tiles))
        branches = lora.sections.view(lora.bytes)
        tiles = [tile if branch.proj_down is None else
                 replace(tile, weight=tile.weight.with_branch(branch.proj_down, branch.proj_up))
                 for tile, branch in zip(tiles, branches)]
        pairs, scales = [(branch.down, branch.up) for branch in branches], lora.sections.view_scale(lora.bytes)
        if self._rows is not None:
            part = slice(*self._rows)
            pairs = [(down, up if up is None else up[part]) for down, up in pairs]
            scales = [scale if scale is None else scale[part] for scale in scales]
        return TileViews(self._cut(tiles), pairs, *scales)

    # ---- computing

    def plans(self, device, dtype):
        """[registry.Plan] of the tiles for x of this dtype on this device, asked for once."""
        asked = device, dtype, registry.requested()
        if asked not in self._plans:
            target = Target.of(device)
            self._plans[asked] = [registry.plan(tile.weight, target, dtype, self.act_bits) for tile in self.tiles]
        return self._plans[asked]

    def kernels_do_epilogues(self, device, dtype):
        """Whether the variants that serve x of this dtype there do every epilogue before they store: elsewhere it costs what
        torch's would."""
        return all(plan.variant.epilogues >= epilogues.ALL for plan in self.plans(device, dtype))

    def forward(self, x, packed, bias, lora=None):
        """The layer of x [..., in_features]. Raises ShapeError."""
        if x.shape[-1] != self.in_features:
            raise ShapeError(f"layer: x is {list(x.shape)}. The layer has {self.in_features} inputs, so x must be "
                             f"[..., {self.in_features}]. Check which layer this x belongs to.")
        flat = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        out = flat.new_empty(flat.shape[0], self.out_features)
        views = self.views(packed, lora)
        jobs = [(0, flat, out, None)] if len(views.tiles) == 1 else [
            (i, flat if tile.k == self.in_features else flat.narrow(1, tile.col, tile.k),
             out if tile.n == self.out_features else out.narrow(1, tile.row, tile.n), None)
            for i, tile in enumerate(views.tiles)]
        _run([(self, views, bias if views.scale is None else None, jobs)])
        if views.scale is not None:             # which is not for the bias
            out.mul_(views.scale).add_(views.constant if bias is None else views.constant + bias)
        return out if flat is x else out.view(*x.shape[:-1], self.out_features)

    def run_tiles(self, jobs, packed, bias, lora=None):
        """Products of single tiles, in this order.

        jobs   [(index of the tile, x [tokens, its columns], out [tokens, its rows], epilogue)], see kernels.ops.linear. Jobs
               with the same Modulated object for x share what is made of it. A Hidden in the place of out is filled, with GELU
               in any case; in the place of x it is taken. No x is written to by another job, but for a Hidden

        Where LoRAs fit in the branch (LoraSections.fits_in_branch): an epilogue is the last to touch out.
        """
        run_together([(BoundLinear(self, packed, bias, lora), jobs)])

    def hidden(self, place, rows, like, packed=None, lora=None):
        """A Hidden of so many rows for the tile at (row, col), in dtype and on the device of `like`, where packed and lora are,
        too. Without packed it takes numbers."""
        tile = self.tiles[self._at(place)]
        return Hidden((rows, tile.k), like, None if packed is None else self.following(place, like, packed, lora))

    def following(self, place, like, packed, lora=None):
        """What a Hidden knows of the tile at (row, col), see there."""
        i = self._at(place)
        return self.plans(like.device, like.dtype)[i], self.views(packed, lora).tiles[i].weight

    def _at(self, place):
        return next(i for i, tile in enumerate(self.tiles) if (tile.row, tile.col) == place)

    def problem(self, jobs):
        """What is wrong with jobs of run_tiles and what they need, or None."""
        for i, x, out, epilogue in jobs:
            problem = x.problem() if isinstance(x, Modulated) else None
            if problem:
                return f"the operands of Modulated do not fit: {problem}"
            problem = None if epilogue is None or isinstance(out, Hidden) else epilogue.problem(out, self.tiles[i].col > 0)
            if problem:
                return f"the epilogue {type(epilogue).__name__} does not fit out {list(out.shape)}: {problem}"
        return None

    def input_gradient(self, dy, packed, lora=None):
        """dy W [..., in_features] of dy [..., out_features], in dy's dtype: W with the LoRAs of now, exact activations."""
        flat = dy.reshape(-1, self.out_features)
        dx = torch.zeros(len(flat), self.in_features, device=dy.device)
        views = self.views(packed, lora)
        if views.scale is not None:
            flat = flat * views.scale.to(flat.dtype)
        for tile, (down, up) in zip(views.tiles, views.pairs):
            part = flat.narrow(1, tile.row, tile.n)
            into = dx.narrow(1, tile.col, tile.k)
            into += input_gradient(tile.weight, part)
            if down is not None:
                into += part @ up.to(part.dtype) @ down.to(part.dtype)
        return dx.to(dy.dtype).view(*dy.shape[:-1], self.in_features)

    # ---- as numbers

    def dense(self, packed, lora=None):
        """(W fp32 [out, in], bias fp32 [out] the shift adds) equivalent to these bytes with unquantised activations."""
        views = self.views(packed, lora)
        dense = torch.zeros(self.out_features, self.in_features, device=packed.device)
        shift = torch.zeros(self.out_features, device=packed.device)
        for tile, (down, up) in zip(views.tiles, views.pairs):
            part, extra = dequantize(tile.weight)
            rows, cols = (slice(at, at + size) for at, size in zip((tile.row, tile.col), part.shape))
            dense[rows, cols] = part if down is None else part.addmm_(up.float(), down.float())
            shift[rows] += extra
        if views.scale is not None:
            dense *= views.scale[:, None]
        return dense, shift


def forward_all(x, layers):
    """[layer(x)] of layers that read one x [..., in_features]: in one launch those whose variant has one for several.

    layers   [(PackedLinear, packed, bias, lora)], see PackedLinear.forward
    """
    flat, outs, together = x.reshape(-1, x.shape[-1]), [None] * len(layers), {}
    for place, (linear, packed, bias, lora) in enumerate(layers):
        plan, *others = linear.plans(x.device, x.dtype)
        plan, views = plan.for_rows(len(flat)), linear.views(packed, lora)
        if (others or plan.unpack or plan.variant.products is None or bias is None or views.scale is not None
                or linear.in_features != x.shape[-1]):
            outs[place] = linear.forward(x, packed, bias, lora)
        else:
            together.setdefault(plan.variant, []).append((place, views.tiles[0].weight, bias, views.pairs[0]))
    for variant, some in together.items():
        places, weights, biases, pairs = zip(*some)
        for place, out, (down, up) in zip(places, variant.products(flat, weights, biases), pairs):
            if down is not None:
                matmul_branch(flat, down, up, out)
            outs[place] = out.view(*x.shape[:-1], out.shape[-1])
    return outs


class BoundLinear(NamedTuple):
    """A PackedLinear with the tensors that it computes with now, see there."""
    linear: PackedLinear
    packed: torch.Tensor
    bias: torch.Tensor | None
    lora: StoredLora | None = None

    def run_tiles(self, jobs):
        """See PackedLinear.run_tiles."""
        run_together([(self, jobs)])

    def hidden(self, place, rows, like):
        """See PackedLinear.hidden."""
        return self.linear.hidden(place, rows, like, self.packed, self.lora)

    def following(self, place, like):
        """See PackedLinear.following."""
        return self.linear.following(place, like, self.packed, self.lora)


def run_together(parts):
    """Jobs of several layers, as PackedLinear.run_tiles has those of one. First, in as few launches as can be, comes what
    kernels make of their inputs.

    parts   [(BoundLinear, jobs)]
    """
    for layer, jobs in parts:
        problem = layer.linear.problem(jobs)
        if problem:
            raise ShapeError(f"layer: {problem}")
    _run([(layer.linear, layer.linear.views(layer.packed, layer.lora), layer.bias, jobs) for layer, jobs in parts])


def _run(parts):
    """parts   [(PackedLinear, TileViews, bias, jobs)], all jobs on one device, of x of one dtype"""
    x = parts[0][3][0][1]
    every = [(linear.plans(x.device, x.dtype)[job[0]], views, bias, job) for linear, views, bias, jobs in parts for job in jobs]
    inputs = registry.shared_inputs([(plan, x, views.tiles[i].weight) for plan, views, _, (i, x, _, _) in every])
    for (plan, views, bias, (i, _, out, epilogue)), (x, prepared) in zip(every, inputs):
        tile, (down, up) = views.tiles[i], views.pairs[i]
        adds = tile.col > 0                     # to what the tiles left of it made of these rows; the first brings the bias
        part = None if adds or bias is None else bias if tile.n == len(bias) else bias.narrow(0, tile.row, tile.n)
        if isinstance(x, Hidden):
            x, prepared = x if x.tensor is None else x.tensor, x.prepared
        if isinstance(out, Hidden):
            out.fill(plan, x, tile.weight, part, prepared)
        else:
            plan.run(x, tile.weight, out, part, adds, epilogue, prepared)
        if down is not None:
            matmul_branch(plain(x), down, up, out)


class _Differentiable(torch.autograd.Function):
    """A layer's forward, and the gradients of x and bias. The weights have none."""

    @staticmethod
    def forward(ctx, x, packed, bias, layer):
        ctx.layer = layer
        return layer.forward_packed(x, packed, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        of_x, _, of_bias, _ = ctx.needs_input_grad
        return ctx.layer.input_gradient(dy) if of_x else None, None, dy.flatten(0, -2).sum(0) if of_bias else None, None


class SVDQLayer(torch.nn.Linear):
    """The part of a quantised linear module that is no host's.

    linear    PackedLinear; None on a layer that is not quantised
    factors   svdq.lora.LoraFactors of the LoRAs in `lora`, or None
    bias      parameter or None
    lora      uint8 parameter: the bytes of the LoRAs, or None

    A subclass has the bytes in `packed`, an attribute or a property.
    """

    def __init__(self, in_features, out_features):
        torch.nn.Module.__init__(self)          # allocates nothing: a 12B model is built in a moment
        self.in_features, self.out_features = in_features, out_features
        for name in ("bias", "lora"):
            self.register_parameter(name, None)
        self.linear = self.factors = self._parked = None

    # ---- where a host has a say

    def keep_lora(self, stored):
        """What stands in `lora` for a byte tensor."""
        return torch.nn.Parameter(stored, requires_grad=False)

    def lora_on(self, device):
        """The byte tensor of the LoRAs on a device."""
        return self.lora.to(device)

    @contextmanager
    def borrowed(self, device):
        """The byte tensor on a device, for the length of a block."""
        yield self.packed.to(device)

    # ---- what is in the bytes

    @property
    def quantised(self):
        return self.linear is not None

    def describe(self, description):
        """Take the description of new bytes, or None for a layer that is not quantised."""
        self.linear = None if description is None else PackedLinear(self.in_features, self.out_features, description)

    @property
    def description(self):
        return self.linear and self.linear.description

    @property
    def act_bits(self):
        return self.linear.act_bits

    @property
    def tiles(self):
        """See PackedLinear.tiles."""
        return self.linear.tiles

    def stored_lora(self, device):
        """The LoRAs on a device: a StoredLora or None."""
        if self.factors is None:
            return None
        if self.lora.device == device:
            return StoredLora(self.factors.sections, self.lora)
        return StoredLora(self.factors.sections, self.lora_on(device), kept=False)

    def views(self, packed):
        """The TileViews in these bytes with the LoRAs of now."""
        return self.linear.views(packed, self.stored_lora(packed.device))

    def forget_views(self):
        """Let go of the views: the bytes are about to move."""
        if self.packed is not None:
            self.packed.__dict__.pop("svdq_views", None)

    def _apply(self, fn, recurse=True):
        self.forget_views()
        return super()._apply(fn, recurse)

    # ---- computing

    def plans(self, device, dtype):
        """See PackedLinear.plans."""
        return self.linear.plans(device, dtype)

    def fuses(self, x, places):
        """Whether `run_tiles_packed` does what a forward does, with any epilogue in its kernels, for tiles at [(row, col)]."""
        return (not torch.is_grad_enabled() and self.lora_fits_in_branch
                and [(tile.row, tile.col) for tile in self.tiles] == places and self.kernels_do_epilogues(x))

    def kernels_do_epilogues(self, x):
        """See PackedLinear.kernels_do_epilogues."""
        return self.linear.kernels_do_epilogues(x.device, x.dtype)

    @property
    def lora_fits_in_branch(self):
        """Whether LoRAs leave nothing to do after the kernels."""
        return self.factors is None or self.factors.sections.fits_in_branch

    def hidden(self, place, rows, like):
        """See PackedLinear.hidden. Where the bytes of the layer are elsewhere it takes numbers."""
        here = self.packed.device == like.device
        return self.linear.hidden(place, rows, like, *((self.packed, self.stored_lora(like.device)) if here else ()))

    def forward_packed(self, x, packed, bias):
        """The layer of x [..., in_features]; packed and bias where x is, bias in x's dtype. Raises ShapeError."""
        return self.linear.forward(x, packed, bias, self.stored_lora(packed.device))

    def forward_for_training(self, x, packed, bias):
        """forward_packed with gradients of x and bias, which are cast as autocast wants them where it is on. Activations are
        rounded on the way forward alone, and nothing is kept for the way back: it asks for the bytes again."""
        if torch.is_autocast_enabled(x.device.type):
            half = torch.get_autocast_dtype(x.device.type)
            x, bias = x.to(half), None if bias is None else bias.to(half)
        with torch.autocast(x.device.type, enabled=False):
            return _Differentiable.apply(x, packed, bias, self)

    def input_gradient(self, dy):
        """See PackedLinear.input_gradient."""
        with self.borrowed(dy.device) as packed, torch.autocast(dy.device.type, enabled=False):
            return self.linear.input_gradient(dy, packed, self.stored_lora(packed.device))

    def run_tiles_packed(self, jobs, packed, bias):
        """Products of single tiles, see PackedLinear.run_tiles, for layers whose `lora_fits_in_branch`."""
        self.linear.run_tiles(jobs, packed, bias, self.stored_lora(packed.device))

    # ---- as numbers

    def dense(self, packed):
        """PackedLinear.dense without LoRA."""
        return PackedLinear(self.in_features, self.out_features, self.description).dense(packed.detach())

    def dense_with_lora(self, packed):
        """PackedLinear.dense with the LoRAs of now in W."""
        return self.linear.dense(packed, self.stored_lora(packed.device))

    @property
    def shifted(self):
        """Whether a tile shifts its activations, which adds a constant to the output."""
        return self.quantised and any(tile.weight.unsigned for tile in self.tiles)

    # ---- LoRA

    def uses_lora(self, changes=(), output_scale=None):
        """Whether these LoRAs, with their strengths of now, and no others are in the low-rank branch."""
        if self.factors is None:
            return not changes and output_scale is None and self._parked is None
        return self.factors.output_scale is output_scale and self.factors.same(changes)

    def use_lora(self, changes=(), output_scale=None):
        """Put these LoRAs into the low-rank branch instead of those that are there. changes, output_scale: see LoraFactors.

        Where only strengths differ from the last time, only what depends on them is written.
        """
        factors, stored = (self.factors, self.lora) if self._parked is None else self._parked
        self.factors = self.lora = self._parked = None
        self.forget_views()
        if not changes and output_scale is None:
            return
        with torch.inference_mode(False):       # so that strengths can be written in and out of a host's inference mode
            if factors is None or factors.output_scale is not output_scale or not factors.rescale(stored, changes):
                tiles = view_layer(self.packed, self.description)
                factors = LoraFactors(tiles, changes, output_scale)
                stored = self.keep_lora(factors.store(tiles))
        self.factors, self.lora = factors, stored

    def park_lora(self):
        """Compute without LoRA from now on, but keep the factors at hand: the next use_lora may want them."""
        if self.factors is not None:
            self._parked = self.factors, self.lora
            self.factors = self.lora = None
            self.forget_views()
