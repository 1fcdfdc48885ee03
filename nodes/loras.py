"""Load LoRAs as ComfyUI's own nodes do, refuse those that would do nothing or harm, and say what the others change."""

import logging
import os
from collections import Counter

import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..svdq import lora_keys
from ..svdq.errors import LoraError, shown
from ..svdq.families import flux1
from ..svdq.format import view_layer
from ..svdq.kernels.errors import printable
from ..svdq.kernels.launch import MAX_RANK
from ..svdq.kernels.weights import AWQWeight
from ..svdq.lora import appended_rank
from ..svdq.lora_file import read_lora
from . import demo
from .host import adapters, lora
from .host.patcher import SVDQPatcher
from .prompt_server import show

log = logging.getLogger(__name__)

FOLDER, NONE = "loras", "None"
SLOTS = 5               # of the stack
SHOWN = 20              # keys that a line of the report has room for
KEPT = 2 << 30          # bytes of LoRA files in memory; one has 20 to 700 MB
KINDS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA", "oft": "OFT", "boft": "BOFT"}

_files = {}             # _stamp of a file -> its tensors, the one used last at the end


class SVDQLoraLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            category="svdq/loaders", node_id="SVDQLoraLoader", display_name="SVDQ LoRA Loader",
            search_aliases=["nunchaku lora", "svdquant lora", "4bit lora", "4-bit lora", "load svdq lora", "load lora",
                            "apply lora", "flux lora"],
            description="Applies a LoRA to an SVDQ FLUX model, as 'Load LoRA (Model)' does, and reports what it changes. A "
                        "LoRA that does not fit is an error that says why.",
            inputs=[io.Model.Input("model"),
                    io.Combo.Input("lora_name", options=_names(),
                                   tooltip="A file of models/loras, in any key style."),
                    _strength("strength", "How strongly to apply it. 0 leaves the model as it is, negative values invert.")],
            outputs=_outputs(), hidden=[io.Hidden.unique_id])

    @classmethod
    def fingerprint_inputs(cls, lora_name, **rest):
        """A file that was replaced under the same name is loaded again."""
        return _stamp(lora_name)

    @classmethod
    def execute(cls, model, lora_name, strength=1.0):
        return _execute(cls, model, [(lora_name, strength)])


class SVDQLoraStack(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        slots = []
        for i in range(1, SLOTS + 1):
            slots += [io.Combo.Input(f"lora_{i}", options=[NONE, *_names()], default=NONE,
                                     optional=True, tooltip=f"A file of models/loras, in any key style. {NONE} skips it."),
                      _strength(f"strength_{i}", f"How strongly to apply lora_{i}. 0 skips it.", optional=True)]
        return io.Schema(
            category="svdq/loaders", node_id="SVDQLoraStack", display_name="SVDQ LoRA Stack",
            search_aliases=["lora stack", "multiple loras", "lora stacker", "several loras"],
            description="Applies several LoRAs to an SVDQ FLUX model, one after the other, and reports what each changes. "
                        "Stacks and other LoRA nodes can follow one another.",
            inputs=[io.Model.Input("model"), *slots], outputs=_outputs(), hidden=[io.Hidden.unique_id])

    @classmethod
    def fingerprint_inputs(cls, model=None, **slots):
        return [_stamp(name) for name, _ in _chosen(slots)]

    @classmethod
    def execute(cls, model, **slots):
        return _execute(cls, model, _chosen(slots))


def _strength(name, tooltip, **options):
    return io.Float.Input(name, default=1.0, min=-10.0, max=10.0, step=0.01, tooltip=tooltip, **options)


def _outputs():
    return [io.Model.Output(tooltip="The MODEL with the LoRA, for a sampler or another LoRA node."),
            io.String.Output(display_name="report", tooltip="What the LoRA changes, in words.")]


def _chosen(slots):
    """[(name, strength)] of the slots in use."""
    loras = [(slots.get(f"lora_{i}", NONE), slots.get(f"strength_{i}", 1.0)) for i in range(1, SLOTS + 1)]
    return [(name, strength) for name, strength in loras if name != NONE]


def _execute(node, model, loras):
    if not isinstance(model, SVDQPatcher):
        raise LoraError("the MODEL is no SVDQ model but an ordinary one. Use 'Load LoRA (Model)' (LoraLoaderModelOnly), or "
                        "connect 'SVDQ Loader'")
    report = []
    for name, strength in loras:
        try:
            lora.refuse_strengths([(strength,)])
            model, facts = _attach(model, _tensors(name), strength) if strength else (model, ["at strength 0: not applied"])
        except LoraError as error:
            raise LoraError(f"{shown(name)}: {error}") from error
        report += [f"{printable(name)}, strength {strength:g}", *(f"  {line}" for line in facts)]
    text = show("\n".join(report) or "no LoRA chosen", node)
    return io.NodeOutput(model, text, ui={"text": (text,)})


# ---- files

def _names():
    """The user's LoRAs, then the demo's."""
    found = folder_paths.get_filename_list(FOLDER)
    return [*found, *(name for name in demo.files(FOLDER) if name not in found)]


def _stamp(name):
    path = None
    if isinstance(name, str):                                                       # linked, it may be anything
        path = folder_paths.get_full_path(FOLDER, name) or demo.files(FOLDER).get(name)
    if path is None:
        raise LoraError(f"no such file in models/{FOLDER}. Press R to refresh the list, or put the file there")
    try:
        stat = os.stat(path)
    except OSError as error:
        raise LoraError(f"cannot be read: {shown(error)}. Press R to refresh the list, or put the file there") from error
    return path, stat.st_size, stat.st_mtime_ns


def _tensors(name):
    """{key: tensor} of a file. Another strength gets the very same tensors: what was made of them before is still good."""
    stamp = _stamp(name)
    _files[stamp] = _files.pop(stamp, None) or read_lora(stamp[0])
    while len(_files) > 1 and sum(size for _, size, _ in _files) > KEPT:
        del _files[next(iter(_files))]
    return _files[stamp]


# ---- one LoRA

def _attach(model, tensors, strength):
    """(the MODEL with a LoRA, lines about it). Raises LoraError where ComfyUI would log and go on without it."""
    style, parsed = lora_keys.style(tensors), adapters.parse(tensors, model.model)
    patched = model.clone()
    taken = patched.add_patches(parsed.adapters, strength)
    added = {key: patches[len(model.patches.get(key, ())):] for key, patches in patched.patches.items()}
    added = {key: patches for key, patches in added.items() if patches}
    if not added:
        if parsed.empty:
            raise LoraError(f"its adapters are of rank 0, without numbers: {_some(parsed.empty)}. The file was made smaller by "
                            "a broken program; get it again")
        if parsed.half:
            raise LoraError(f"its pairs are half, the other factors are missing: {_some(parsed.half)}. The file is incomplete; "
                            "get it again")
        some = ", ".join(shown(key) for key in sorted(tensors)[:2]) or "nothing"
        raise LoraError(f"none of its {len(tensors)} keys is for a layer of the model. Its key style is {style}, for instance "
                        f"{some}; the model is {_in_words(model)}. Get this LoRA for FLUX.1, with diffusers/PEFT, kohya, "
                        "OneTrainer, LyCORIS, XLabs or BFL keys")
    layers = {key if isinstance(key, str) else key[0] for key in taken}
    absent = sorted({key if isinstance(key, str) else key[0] for key in parsed.adapters} - layers)
    return patched, [*_key_facts(style, parsed, added, absent), *_padding(parsed, added),
                     *_layer_facts(model, patched, added)]


def _kind(adapter):
    if isinstance(adapter, tuple):
        return adapter[0]                               # "diff" or "set", of a weight or a bias
    if adapter.name in lora.DORA_SCALE and adapter.weights[lora.DORA_SCALE[adapter.name]] is not None:
        return "DoRA"
    return "LoCon" if adapter.name == "lora" and adapter.weights[3] is not None else KINDS.get(adapter.name, adapter.name)


def _key_facts(style, parsed, added, absent):
    kinds = Counter(_kind(adapter) for patches in added.values() for _, adapter, *_ in patches)
    encoder = [key for key in parsed.left if lora_keys.is_text_encoder(key)]
    left = [key for key in parsed.left if not lora_keys.is_text_encoder(key)]
    yield f"key style     {style}"
    yield f"adapters      {', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}"
    yield f"keys          {sum(map(len, parsed.keys.values()))} matched, {len(left)} not"
    if left:
        yield f"not matched   {_named(left)}"
    if parsed.half:
        yield f"half a pair   {len(parsed.half)} keys left out, their other factor is missing: {_named(parsed.half)}"
    if parsed.empty:
        yield f"rank 0        {len(parsed.empty)} keys left out, their adapters have no numbers: {_named(parsed.empty)}"
    if parsed.twice:
        yield f"twice         {len(parsed.twice)} keys left out, others are for the same weights: {_named(parsed.twice)}"
    if absent:
        yield f"absent        {len(absent)} weights this model does not have, the first is {_short(min(absent))}"
    if encoder:
        yield (f"text encoder  {len(encoder)} keys left out: this node loads the part for the model. 'Load LoRA' "
               "(LoraLoader) loads both")


def _padding(parsed, added):
    """The host makes LoRAs of img_in as wide as it is."""
    given, (_, used, _, part, _) = parsed.adapters.get(lora.IMG_IN), added.get(lora.IMG_IN, [(0, None, 1, None, None)])[-1]
    if part is not None:
        yield f"img_in        applied to the first {part[2]} inputs: it knows no control picture and no mask"
    elif used is not None and used is not given:
        *_, wide = lora.tensors_of(used)[-1].shape if isinstance(used, tuple) else used.weights[1].shape
        yield (f"img_in        padded with zeros from {lora.LATENT_FEATURES} to {wide} inputs: it knows no control picture and "
               "no mask")


def _some(keys):
    return f"{', '.join(shown(key) for key in keys[:3])}{', ...' if len(keys) > 3 else ''}"


def _named(keys):
    """As many as a report has room for; the log has the rest."""
    if len(keys) > SHOWN:
        log.info("SVDQ: keys left out, all %d: %s", len(keys), ", ".join(shown(key) for key in keys))
    return f"{', '.join(shown(key) for key in keys[:SHOWN])}{', ... (the log has all)' if len(keys) > SHOWN else ''}"


def _layer_facts(model, patched, added):
    """From the host, which says what it will make of the patches, and keeps what it factors for when it does."""
    quantised, progress = patched.layers(), comfy.utils.ProgressBar(len(added))
    ranks, factored, misfits = [], [], []
    for key, patches in added.items():
        layer, earlier = quantised.get(key), model.patches.get(key, [])
        if layer is None:
            misfits += lora.misfits(patched.model, key, earlier, patches)
        else:
            changes, _, found, wrong = lora.changes(layer, key, earlier + patches, patched.load_device)
            if wrong and earlier:                       # maybe those of the LoRAs before, which come first
                wrong = wrong[len(lora.changes(layer, key, earlier, patched.load_device)[3]):]
            misfits += wrong
            own = sum(_kind(adapter) != "LoRA" for _, adapter, *_ in patches)
            factored += found[-own:] if own else []
            ranks.append(max(_ranks(tile, changes) for tile in view_layer(layer.weight, layer.description)))
        progress.update(1)
    if misfits:
        keys = {misfit.key for misfit in misfits}
        raise LoraError(f"it does not fit {len(keys)} of its {len(added)} weights, the first is "
                        f"{_short(misfits[0].key)}: {misfits[0].reason}. It was made for a FLUX of another width or another "
                        f"model, or is damaged; the model is {_in_words(model)}. Get the LoRA made for it")
    idle = [key for key, patches in added.items() if not any(lora.has_effect(adapter) for _, adapter, *_ in patches)]
    idle += [one.key for one in factored if not one.rank and one.key not in idle]
    if len(idle) == len(added):
        raise LoraError(f"it would change nothing: its {len(idle)} adapters, or their alphas, are zero, the first for "
                        f"{_short(idle[0])}. The file may have been saved before training began; get it again")
    modules = {key.rpartition(".")[0] for key in added}
    in_4_bit = sum(f"{module}.weight" in quantised for module in modules)
    yield f"layers        {in_4_bit} in 4 bit, {len(modules) - in_4_bit} in 16 bit"
    if ranks:
        groups = Counter((base, rank) for rank, base, _ in sorted(ranks))
        few = [f"{base} + {rank} on {count}" for (base, rank), count in groups.items()]
        if len(few) > 4:
            added_to = {base: [rank for rank, other, _ in ranks if other == base] for base, _ in sorted(groups)}
            few = [f"{base} + {_span(some)} on {len(some)}" for base, some in added_to.items()]
        yield f"rank          {', '.join(few)} layers: of the model's file + of all LoRAs so far"
    over = [over for *_, over in ranks if over]
    if over:
        yield f"beyond {MAX_RANK}    up to {max(over)} on {len(over)} layers: 16-bit matmuls beside the fused kernels"
    good = [one for one in factored if one.rank]
    if good:
        worst, all_ranks = max(good, key=lambda one: one.error), [one.rank for one in good]
        yield (f"factored      {len(good)} adapters that are no LoRA, at rank {_span(all_ranks)}; "
               f"relative error of the change at most {worst.error:.1e}, in {_short(worst.key)}")
    if idle:
        yield f"no effect     {len(idle)} adapters, which are zero, the first for {_short(idle[0])}"


def _span(numbers):
    return f"{min(numbers)} to {max(numbers)}" if min(numbers) < max(numbers) else f"{numbers[0]}"


def _ranks(tile, changes):
    """(rank LoRAs add to a tile, rank of its file, what of both does not fit the fused kernels)"""
    rank = appended_rank(tile, changes)
    if isinstance(tile.weight, AWQWeight):              # has no branch and is not in these kernels
        return rank, 0, 0
    return rank, tile.weight.rank, max(0, rank - max(0, MAX_RANK - tile.weight.rank))


def _short(key):
    return key.removeprefix("diffusion_model.").removesuffix(".weight")


def _in_words(model):
    return flux1.Shape.from_comfy(model.model.model_config.unet_config).in_words()
