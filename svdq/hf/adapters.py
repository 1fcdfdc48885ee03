"""LoRA in diffusers: PEFT keeps the truth (factors, strengths, which is active), the low-rank branch of our layers follows it.

PEFT puts its own module around each layer that it adapts. Ours take its class over: their forward is the layer's alone, and
every change of strength or state has the layer write its branch anew before it computes again.

Test: tests/hf/inside/checks_lora.py
"""

from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch.nn.functional import pad

from ..errors import LoraError
from ..lora import LowRank
from .layer import Change, SVDQLinear, SVDQRows


class SVDQLora(lora.Linear):
    """PEFT's LoRA around one of our layers.

    owner    the SVDQLinear that has the bytes
    taken    {adapter: (state of its factors, down, up)}: copies on the CPU, which are there when PEFT's are offloaded
    away     whether the model is offloaded: PEFT's numbers are then anything between two calls
    scales   {adapter: fp32 [n]}, see layer.Change: of DoRAs
    loaded   names of adapters that were loaded, which are in the branch; those that were added to be trained are beside it,
             as anybody may write their numbers at any time
    fused    [layer.Change] that are in the owner's `merged` by this module
    """
    follows_svdq = True

    @property
    def owner(self):
        return self.base_layer if isinstance(self.base_layer, SVDQLinear) else self.base_layer.fused

    def forward(self, x, *args, adapter_names=None, **kwargs):
        if adapter_names is not None or args or kwargs:
            raise LoraError("another LoRA for each item of a batch (adapter_names) cannot be computed in 4 bit. Call the model "
                            "once per LoRA")
        return self.base_layer(x)

    # ---- for the layer

    @property
    def working(self):
        """Names of the adapters that change the output now and are not fused."""
        if self.disable_adapters or self.merged:        # PEFT, too, computes none beside one that is fused
            return []
        return [name for name in self.active_adapters if name in self.lora_A]

    @property
    def training_now(self):
        """Names of the adapters that a forward with gradients has to compute beside the layer."""
        return frozenset(name for name in self.working
                         if self.lora_A[name].weight.requires_grad or self.lora_B[name].weight.requires_grad)

    @property
    def unreachable(self):
        """Whether numbers are missing, because PEFT is in the middle of loading or because they are offloaded."""
        return any(self.lora_A[name].weight.is_meta and name not in self.taken for name in self.working if name in self.loaded)

    def changes(self, row, training):
        """[layer.Change] of all adapters in the branch; row is where this module's rows begin, training names that are not."""
        return [self.change(name, row) for name in self.working if name in self.loaded and name not in training
                and self.scaling[name]]                     # at strength 0 as if it were not there

    def change(self, name, row):
        down, up = self.factors(name)
        return Change(LowRank(down, up, row=row, strength=float(self.scaling[name])), self.scales.get(name))

    def factors(self, name):
        """(down [r, k], up [n, r]) on the CPU, the same objects as long as their numbers are the same."""
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        state = None if down.is_meta or self.away else self.state(name)
        if down.is_meta and name not in self.taken:
            raise LoraError(f"the numbers of the LoRA {name} are offloaded. Load it with the pipeline's load_lora_weights, or "
                            "before offloading is enabled")
        if name not in self.taken or state is not None and self.taken[name][0] != state:
            self.taken[name] = state, down.detach().to("cpu", copy=True), up.detach().to("cpu", copy=True)
        return self.taken[name][1:]

    def state(self, name):
        """Another value where somebody has written other factors; not where offloading has moved them."""
        return [(id(weight), 0 if weight.is_inference() else weight._version)
                for weight in (self.lora_A[name].weight, self.lora_B[name].weight)]

    @property
    def written(self):
        """Whether factors have changed since they were taken."""
        return not self.away and any(self.taken[name][0] not in (None, self.state(name)) for name in self.working
                                     if name in self.taken and not self.lora_A[name].weight.is_meta)

    def added_beside(self, x, y, row, training):
        """y with what is not in the branch: adapters in training, and biases of adapters. row is where ours begin in y."""
        for name in self.working:
            if name not in self.loaded or name in training:
                down, up = self.lora_A[name], self.lora_B[name]
                more = up(down(self.lora_dropout[name](x.to(down.weight.dtype)))) * self.scaling[name]
            elif self.lora_bias.get(name):
                more = self.lora_B[name].bias * self.scaling[name]
            else:
                continue
            after = y.shape[-1] - row - self.out_features
            more = more.to(y.dtype)
            y = y + (more if row == after == 0 else pad(more, (row, after)))
        return y

    # ---- PEFT's own methods, after which the branch is no longer what they say

    def merge(self, safe_merge=False, adapter_names=None):
        """Fuse: the change stays in the layer, whatever becomes of the adapter. The 4-bit numbers stay as they are."""
        for name in check_adapters_to_merge(self, adapter_names) or []:
            if name in self.lora_A:
                if self.lora_bias.get(name):
                    raise LoraError(f"the LoRA {name} has biases, which cannot be fused. Use it unfused")
                self.fused.append(self.change(name, self.row))
                self.owner.merged.append(self.fused[-1])
                self.merged_adapters.append(name)
        self.owner.stale = True

    def unmerge(self):
        self.owner.merged = [change for change in self.owner.merged if not any(change is fused for fused in self.fused)]
        self.fused.clear()
        self.merged_adapters.clear()
        self.owner.stale = True

    @property
    def row(self):
        return self.base_layer.start if isinstance(self.base_layer, SVDQRows) else 0


def _then_stale(name):
    def method(self, *args, **kwargs):
        result = getattr(super(SVDQLora, self), name)(*args, **kwargs)
        self.owner.stale = True
        for kept in (self.taken, self.scales):
            for gone in kept.keys() - self.lora_A.keys():
                del kept[gone]
        return result

    method.__name__ = name
    return method


for _name in ("set_adapter", "enable_adapters", "set_scale", "scale_layer", "unscale_layer", "delete_adapter", "update_layer"):
    setattr(SVDQLora, _name, _then_stale(_name))


def is_offloaded(model):
    """Whether accelerate or diffusers keeps the model's numbers elsewhere between two calls."""
    return any(parameter.is_meta for parameter in model.parameters()) or any(
        "group_offloading" in getattr(getattr(module, "_diffusers_hook", None), "hooks", ()) for module in model.modules())


def ours(model):
    """[SVDQLinear] of a model."""
    return [module for module in model.modules() if isinstance(module, SVDQLinear)]


def follow(model, fresh=None):
    """Take over PEFT's modules around our layers, and write all branches that are not what PEFT says; of a model that is
    offloaded the next call of each layer does, when its bytes are there.

    fresh   the name of an adapter whose numbers PEFT has just loaded, or written anew where nobody can tell
    """
    away = is_offloaded(model)
    for module in model.modules():
        if type(module) is lora.Linear and isinstance(module.base_layer, (SVDQLinear, SVDQRows)):
            module.__class__ = SVDQLora
            module.taken, module.scales, module.loaded, module.fused, module.away = {}, {}, set(), [], False
            module.owner.adapters.append((module, module.row))
            module.owner.stale = True
        if isinstance(module, SVDQLora):
            if fresh in module.lora_A:
                module.loaded.add(fresh)
                module.taken.pop(fresh, None)
                module.factors(fresh)
                module.owner.stale = True
            module.away = away
    for layer in ours(model):
        if layer.stale and not away:
            layer.adopt()


def forget(model):
    """PEFT's modules are gone from the model; what was fused stays."""
    present = {id(module) for module in model.modules()}
    for layer in ours(model):
        kept = [(wrapper, row) for wrapper, row in layer.adapters if id(wrapper) in present]
        layer.stale, layer.adapters = layer.stale or len(kept) < len(layer.adapters), kept
    follow(model)


def foreign(model):
    """PEFT's modules around our layers that are no plain LoRA, which are computed beside them."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer) and not isinstance(module, SVDQLora)
            and isinstance(module.get_base_layer(), (SVDQLinear, SVDQRows))]


def scale_outputs(model, name, scales):
    """Give the adapter of a name its DoRA's output scales: {module: fp32 [n]}, and take those away that one before it had."""
    for module, wrapper in model.named_modules():
        if isinstance(wrapper, SVDQLora) and (module in scales or name in wrapper.scales):
            wrapper.scales.pop(name, None)
            if module in scales:
                wrapper.scales[name] = scales[module]
            wrapper.owner.stale = True
    follow(model)


PLAIN_STARTS = (True, False, "gaussian")      # of factors; others take them out of the weights


def refuse_config(config):
    """Raise LoraError for an adapter that asks for the numbers of a weight, which ours has in 4 bit only."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in ("LORA", "LOKR", "LOHA"):
        raise LoraError(f"an adapter of type {kind} changes weights as numbers, and these are 4-bit. Use LoRA, LoKr or LoHa")
    if kind == "LORA" and (config.use_dora or config.init_lora_weights not in PLAIN_STARTS):
        what = "DoRA" if config.use_dora else f"init_lora_weights={config.init_lora_weights!r}"
        raise LoraError(f"{what} computes with weights as numbers while it trains, and these are 4-bit. Train a plain LoRA, or "
                        "train on the 16-bit model; the file can be loaded here")
