"""Hostile LoRAs, through the pack's own nodes, on tiny models: safetensors, PyTorch's pickles, and LoRAs that are good.

A good one has a right answer, W + strength * alpha / rank * up @ down, computed here from nothing but the file. So a dialect
that is not read, a part that is dropped behind a report that counts it, and a change of the wrong size are faults.
"""

import io
import logging
import os
import pickle
import zipfile
from functools import partial

import comfy.lora
import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from safetensors.torch import save

from svdq_pack.nodes import loras
from svdq_pack.nodes.host.load import load_model
from svdq_pack.nodes.loras import SVDQLoraLoader, SVDQLoraStack
from svdq_pack.tests.comfy.inprocess.adapters import LAYERS
from svdq_pack.tests.comfy.inprocess.support import noise
from svdq_pack.tests.hostile import containers, models
from svdq_pack.tests.hostile.frame import LOADED, REFUSED, Case, Fault, Hostile, data_bytes, node
from svdq_pack.tests.unit.helpers import join, relative, split

LOADER, STACK = node(SVDQLoraLoader), node(SVDQLoraStack)
TOLERANCE = 0.03        # relative error of a change: factors are rounded to 16 bit; DoRA's are found by an SVD, too
SELDOM = 0.03           # share of what loads that runs the network, with the LoRA and without
WIDE = {"dev": 64, "canny": 128, "fill": 384}

# dialect: (of diffusers' names of the parts, else BFL's of the whole layer; name -> prefix; suffixes of up, down, alpha)
KOHYA, PEFT = ("lora_up.weight", "lora_down.weight", "alpha"), ("lora_B.weight", "lora_A.weight", None)
DIALECTS = {
    "kohya": (False, lambda name: f"lora_unet_{name.replace('.', '_')}.", KOHYA),
    "comfy": (False, lambda name: f"diffusion_model.{name}.", PEFT),
    "bfl": (False, lambda name: f"{name}.", PEFT),
    "peft on bfl": (False, lambda name: f"base_model.model.{name}.", PEFT),
    "diffusers": (True, lambda name: f"transformer.{name}.", PEFT),
    "onetrainer": (True, lambda name: f"lora_transformer_{name.replace('.', '_')}.", KOHYA),
    "lycoris": (True, lambda name: f"lycoris_{name.replace('.', '_')}.", KOHYA),
    "kohya on diffusers": (True, lambda name: f"lora_unet_{name.replace('.', '_')}.", KOHYA),
    "kohya on diffusers, trailing _": (True, lambda name: f"lora_unet_{name.replace('.', '_')}_.", KOHYA),
    "unet": (True, lambda name: f"unet.{name}.", PEFT)}
BFL_LAYERS = [layer.name for layer in LAYERS.values()]


class Listener(logging.Handler):
    """What was logged as an error: ComfyUI leaves out what it cannot apply, and says so there alone."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


class Loras(Hostile):
    name, share = "lora", 2

    def __init__(self, folder):
        super().__init__(folder)
        models.folders(folder)
        self.models = {name: load_model(models.write(folder / "diffusion_models" / f"{name}.safetensors", width), torch.float32,
                                        16) for name, width in WIDE.items()}
        self.dense = {name: {key: layer.dense(layer.weight)[0] for key, layer in model.layers().items()}
                      for name, model in self.models.items()}
        self.files = [models.golden(f"lora_model_nvfp4_flux_dev_like_{kind}", folder / "loras" / f"{kind}.safetensors")
                      for kind in ("peft", "kohya_bfl")]
        self.raw = [file.read_bytes() for file in self.files] + [save(self.random_lora(dialect)[0]) for dialect in DIALECTS]
        self.path = folder / "loras" / "svdq-hostile.safetensors"
        self.listener = Listener()
        logging.getLogger().addHandler(self.listener)

    def close(self):
        logging.getLogger().removeHandler(self.listener)

    # ---- good LoRAs

    def random_lora(self, dialect, layers=BFL_LAYERS, width=64, rank=4, seed=0, size=0.02, dora=None):
        """({key: tensor}, {layer: (delta [n, k], DoRA's magnitudes [n] or None)}) at strength 1."""
        by_parts, prefix, (up_name, down_name, alpha_name) = DIALECTS[dialect]
        tensors, deltas = {}, {}
        random = torch.Generator().manual_seed(seed)
        for name in layers:
            layer = next(layer for layer in LAYERS.values() if layer.name == name)
            n, k = self.shape_of(name, width)
            delta, magnitudes = torch.zeros(n, k), torch.zeros(n)
            pieces = layer.rows(n) if by_parts else [(name, slice(0, n))]
            for part, rows in pieces:
                down = torch.randn(rank, k, generator=random) / max(rank, 1) ** 0.5
                up = torch.randn(rows.stop - rows.start, rank, generator=random) * size
                tensors[prefix(part) + up_name], tensors[prefix(part) + down_name] = up, down
                alpha = 1.0
                if alpha_name:
                    tensors[prefix(part) + alpha_name] = torch.tensor(2.0)
                    alpha = 2.0 / max(rank, 1)
                delta[rows] = alpha * up @ down
                if dora:
                    magnitudes[rows] = 0.5 + torch.rand(rows.stop - rows.start, generator=random)
                    one = magnitudes[rows]
                    tensors[prefix(part) + dora] = one if "magnitude" in dora else one[:, None]
            deltas[name] = delta, magnitudes if dora else None
        return tensors, deltas

    def shape_of(self, name, width):
        weight = comfy.utils.get_attr(self.models["dev"].model, f"diffusion_model.{name}")
        return weight.out_features, width if name == "img_in" else weight.in_features

    # ---- cases

    def use(self, chosen, on, expected=None, whole=False, as_stack=False, named=(), stock=False):
        """chosen: [(name, strength)]. expected {layer: delta}; named: what a report has to name. stock: by ComfyUI's node."""
        loras._files.clear()
        model = self.models[on]
        self.listener.lines.clear()
        keys = {key: len(patches) for key, patches in model.patches.items()}
        if as_stack:
            slots = {f"{what}_{i}": value for i, one in enumerate(chosen, 1) for what, value in zip(("lora", "strength"), one)}
            patched, report = STACK.execute(model, **slots).args
        elif stock:
            patched, report = model, ""
            for name, strength in chosen:
                tensors = comfy.utils.load_torch_file(str(self.path.with_name(name)), safe_load=True)
                patched, _ = comfy.sd.load_lora_for_models(patched, None, tensors, strength, 0)
        else:
            patched, report = model, ""
            for name, strength in chosen:
                patched, text = LOADER.execute(patched, name, strength).args
                report += text
        try:
            patched.give_layers_their_patches()
            self.check(patched, report, on, expected, named)
        finally:
            model.give_layers_their_patches()
        if whole:
            self.run_network(model, patched)
        if {key: len(patches) for key, patches in model.patches.items()} != keys or any(
                layer.lora is not None for layer in model.layers().values()):
            raise Fault("the LoRA stays on the model it was not for")

    def check(self, patched, report, on, expected, named):
        layers = patched.layers()
        for key, layer in layers.items():
            if layer.factors is None:
                continue
            for branch in layer.factors.sections.view(layer.lora):
                if any(factor is not None and not factor.isfinite().all() for factor in branch):
                    raise Fault("NaN or Inf in the branch", key)
        plain = {}
        for key, patches in patched.patches.items():
            if key not in layers:
                weight = comfy.utils.get_attr(patched.model, key).float()
                plain[key] = comfy.lora.calculate_weight(patches, weight.clone(), key)
                if not plain[key].isfinite().all():
                    raise Fault("NaN or Inf in a 16-bit weight", key)
        if self.listener.lines:
            raise Fault("the report counts what was left out", self.listener.lines[0])
        for text in named:
            if text.replace(".", "_") not in report.replace(".", "_"):         # kohya's names have no dots
                raise Fault("the report does not name what was left out", report)
        for name, delta in (expected or {}).items():
            key = f"diffusion_model.{name}.weight"
            if key in layers:
                found = layers[key].dense_with_lora(layers[key].weight)[0] - self.dense[on][key]
            else:
                before = comfy.utils.get_attr(patched.model, key).float()
                after = plain.get(key, before)
                found = after.clone()
                found[:, :before.shape[1]] -= before
            if found.shape != delta.shape:
                wide = torch.zeros_like(found)
                wide[:, :delta.shape[1]] = delta
                delta = wide
            if not relative(found, delta) < TOLERANCE:
                raise Fault("the LoRA does something else", f"{name}: {relative(found, delta):.2f} off")

    def run_network(self, model, patched):
        given = models.network_input(model.model.diffusion_model.params.in_channels)
        results = []
        for one in (model, patched, model):
            comfy.model_management.load_models_gpu([one])
            results.append(one.model.diffusion_model(**given))
        if not results[1].isfinite().all():
            raise Fault("the model gives NaN or Inf")
        if not torch.equal(results[0], results[2]):
            raise Fault("without the LoRA the model is not as before")

    def of_bytes(self, rng, raw, outcome=None, strength=None):
        self.path.write_bytes(raw)
        strength = strength or rng.choice((1.0, 0.75, -0.5, 10.0, -10.0, 0.01))
        return Case(partial(self.use, [(self.path.name, strength)], rng.choice(list(WIDE)), whole=rng.random() < SELDOM,
                            as_stack=rng.random() < 0.3), self.path.name, outcome)

    def good(self, rng):
        return rng.choice(self.raw)

    def saved(self, rng, tensors, **options):
        return self.of_bytes(rng, save(tensors), **options)

    def good_lora(self, rng, on=None, dialects=DIALECTS, layers=None, stock=False, **options):
        """Any dialect on any layers, for the width of the latents that dev has, or the model."""
        on = on or rng.choice(list(WIDE))
        layers = layers or rng.sample(BFL_LAYERS, rng.randrange(1, 4))
        dora = options.get("dora")
        options["width"] = options.get("width") or WIDE[on]
        strength = 1.0 if dora else rng.choice((1.0, 0.75, -0.5))
        tensors, deltas = self.random_lora(rng.choice(list(dialects)), layers, seed=rng.randrange(1 << 30), **options)
        self.path.write_bytes(save({key: tensor.contiguous() for key, tensor in tensors.items()}))
        expected = {}
        for name, (delta, magnitudes) in deltas.items():
            if magnitudes is not None:
                key = f"diffusion_model.{name}.weight"
                weight = self.dense[on][key] if key in self.dense[on] else \
                    comfy.utils.get_attr(self.models[on].model, key).float()
                changed = weight + delta
                expected[name] = magnitudes[:, None] * changed / weight.norm(dim=1, keepdim=True) - weight     # ComfyUI's
            else:
                expected[name] = strength * delta
        return Case(partial(self.use, [(self.path.name, strength)], on, expected, stock=stock), self.path.name, LOADED)

    def good_dialect(self, rng):
        """By our node, or by ComfyUI's own."""
        return self.good_lora(rng, stock=rng.random() < 0.5)

    def good_narrow(self, rng):
        """An img_in for the 64 features that the latents have, on a model that has more behind them."""
        return self.good_lora(rng, rng.choice(("canny", "fill")), layers=["img_in", "double_blocks.0.img_mlp.0"], width=64,
                              stock=rng.random() < 0.5)

    def good_dora(self, rng):
        """Under the names of PEFT and of LyCORIS, on layers that are not fused: theirs has one magnitude per part."""
        layers = [rng.choice(("double_blocks.0.img_attn.proj", "double_blocks.0.img_mlp.0", "single_blocks.0.linear2"))]
        name = rng.choice(("lora_magnitude_vector", "lora_magnitude_vector.weight", "dora_scale"))
        return self.good_lora(rng, dialects=("diffusers", "comfy", "bfl") if "magnitude" in name else ("kohya",), dora=name,
                              layers=layers, stock=rng.random() < 0.5)

    def good_old_diffusers(self, rng):
        """attn.processor.to_q_lora.down, as diffusers wrote before PEFT."""
        tensors, expected = {}, {}
        for layer, parts in (("qkv", ("to_q", "to_k", "to_v")), ("proj", ("to_out",))):
            name, deltas = f"double_blocks.0.img_attn.{layer}", []
            n, k = self.shape_of(name, 64)
            for part in parts:
                down, up = (noise(4, k, seed=rng.randrange(1 << 30)),
                            noise(n // len(parts), 4, seed=rng.randrange(1 << 30)) * 0.02)
                prefix = f"transformer_blocks.0.attn.processor.{part}_lora."
                tensors |= {f"{prefix}down.weight": down, f"{prefix}up.weight": up}
                deltas.append(up @ down)
            expected[name] = torch.cat(deltas)
        self.path.write_bytes(save(tensors))
        return Case(partial(self.use, [(self.path.name, 1.0)], "dev", expected), self.path.name, LOADED)

    def chain(self, rng):
        """A control LoRA widens img_in; after it, one for the latents alone and one for the wide model."""
        wide, first = self.random_lora("comfy", ["img_in"], width=128, seed=rng.randrange(1 << 30))
        wide["diffusion_model.img_in.reshape_weight"] = torch.tensor([128, 128])
        width = rng.choice((64, 128))
        then, second = self.random_lora(rng.choice(("comfy", "diffusers", "kohya")), ["img_in"], width=width,
                                        seed=rng.randrange(1 << 30))
        delta = first["img_in"][0]
        delta[:, :width] += second["img_in"][0]
        names = [self.path.with_name(f"svdq-{name}.safetensors") for name in ("control", "hostile")]
        for path, tensors in zip(names, (wide, then)):
            path.write_bytes(save(tensors))
        return Case(partial(self.use, [(path.name, 1.0) for path in names], "dev", {"img_in": delta},
                            as_stack=rng.random() < 0.5),
                    "svdq-", LOADED)

    def empty_pair(self, rng):
        """One pair of rank 0 in a good file: left out, and named."""
        layers = rng.sample(BFL_LAYERS, 2)
        dialect = rng.choice(("comfy", "kohya", "bfl"))
        tensors, deltas = self.random_lora(dialect, layers[:1], width=64, seed=rng.randrange(1 << 30))
        tensors |= self.random_lora(dialect, layers[1:], width=64, rank=0)[0]
        self.path.write_bytes(save(tensors))
        return Case(partial(self.use, [(self.path.name, 1.0)], "dev", {layers[0]: deltas[layers[0]][0]}, named=[layers[1]]),
                    self.path.name, LOADED)

    def odd_dtype(self, rng):
        """Factors of dtypes that no trainer writes."""
        header, data = split(save(self.random_lora(rng.choice(list(DIALECTS)), rng.sample(BFL_LAYERS, 2))[0]))
        dtype = rng.choice(("F4", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64", "BOOL", "I8", "U8", "I32", "I64", "F6_E2M3"))
        bits = {"F4": 4, "F6_E2M3": 6, "C64": 64, "I32": 32, "I64": 64}.get(dtype, 8)
        entries, pieces, end = {}, [], 0
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            count = (entry["data_offsets"][1] - entry["data_offsets"][0]) // 4
            size = count * bits // 8 if len(entry["shape"]) > 1 else 4 * count
            kind = dtype if len(entry["shape"]) > 1 else entry["dtype"]
            entries[name] = {"dtype": kind, "shape": entry["shape"], "data_offsets": [end, end := end + size]}
            pieces.append((b"\x01\0\1\1" * size)[:size])
        return self.of_bytes(rng, join(entries, b"".join(pieces)), outcome=REFUSED)

    def odd_extras(self, rng):
        """What adapters may have beside their factors: alpha, reshape_weight, mid, bias, scales, of odd shapes and sizes."""
        tensors, _ = self.random_lora(rng.choice(("kohya", "comfy", "lycoris")), rng.sample(BFL_LAYERS, 2),
                                      seed=rng.randrange(1 << 30))
        prefix = rng.choice([key for key in tensors if ".lora_" in key])
        prefix = prefix[:prefix.rindex(".lora_")]
        shape = rng.choice(((), (0,), (1,), (2,), (1, 1), (3, 0), (4, 4, 3, 3), (128, 1), (1, 128)))
        value = torch.full(shape, rng.choice((1.0, 0.0, -1.0, 128.0, 1e30, -1e38, 9e-41, 1e9)))
        if rng.random() < 0.4:
            value = rng.choice((torch.tensor([], dtype=torch.int64), torch.tensor(64), torch.tensor([128]),
                                torch.tensor([128, 128, 1]), torch.tensor([-1, 64]), torch.tensor([1 << 40, 64]), value.long()))
        name = rng.choice(("alpha", "reshape_weight", "reshape_weight", "lora_mid.weight", "dora_scale", "lora_B.bias", "diff",
                           "diff_b", "w_norm", "b_norm", "set_weight", "hada_w1_a", "lokr_w1", "oft_blocks", "a1.weight",
                           "lora_magnitude_vector", "bias", "rescale", "oft_diag", "hada_t1", "lokr_t2"))
        tensors[f"{prefix}.{name}"] = value
        return self.saved(rng, tensors)

    def odd_reshape(self, rng):
        """reshape_weight, which says how a control LoRA widens a weight: of other axes, sizes and dtypes."""
        name = rng.choice(("img_in", "double_blocks.0.img_attn.proj"))
        n, k = self.shape_of(name, 64)
        tensors, _ = self.random_lora("comfy", [name], width=rng.choice((k, 2 * k)), seed=rng.randrange(1 << 30))
        sizes = rng.choice((64, [], [128], [n, 2 * k], [n, 2 * k], [n, 2 * k, 1], [n, k], [n, 2 * k + 1], [2 * n, k], [-1, k],
                            [0, 0], [1 << 40, k], [n, 1], [[n], [2 * k]]))
        tensors[f"diffusion_model.{name}.reshape_weight"] = torch.tensor(sizes).to(rng.choice((torch.int64, torch.float32)))
        return self.saved(rng, tensors)

    def odd_factors(self, rng):
        """Of other ranks, axes, sizes; halves of pairs; other adapters' names."""
        tensors, _ = self.random_lora(rng.choice(list(DIALECTS)), rng.sample(BFL_LAYERS, 2), seed=rng.randrange(1 << 30))
        key = rng.choice([key for key in tensors if tensors[key].ndim == 2])
        one = tensors[key]
        other = rng.choice((lambda: one[:, :0], lambda: one[:0], lambda: one[None], lambda: one[..., None, None],
                            lambda: one.flatten(), lambda: one.sum(), lambda: one.t(), lambda: one[:-1], lambda: one[:, :-1],
                            lambda: torch.cat((one, one)), lambda: torch.cat((one, one), 1), lambda: one.half(),
                            lambda: one.bfloat16(), lambda: one.double(), lambda: one.to(torch.float8_e4m3fn), None))
        if other:
            tensors[key] = other().contiguous()
        else:
            del tensors[key]
        return self.saved(rng, tensors)

    def many_empty(self, rng):
        """A small file that would take a minute."""
        count = rng.choice((1000, 19_990, 100_000))
        name = rng.choice((b"%d", b"lora_unet_double_blocks_0_img_attn_proj.x%d",
                           b"lora_unet_double_blocks_%d_img_attn_proj.lora_up.weight"))
        header = b"{" + b",".join(b'"%s":{"dtype":"F32","shape":[0,4],"data_offsets":[0,0]}' % (name % i)
                                  for i in range(count)) + b"}"
        return self.of_bytes(rng, join(header, b""), REFUSED)

    def key_of(self, rng):
        """Keys no loader knows, long, empty, for a page."""
        tensors, _ = self.random_lora(rng.choice(list(DIALECTS)), rng.sample(BFL_LAYERS, 2), seed=rng.randrange(1 << 30))
        for _ in range(rng.choice((1, 1, 3))):
            key = rng.choice(list(tensors))
            odd = rng.choice(containers.ODD_NAMES)
            tensors[rng.choice((odd, odd + key, key + odd, key.replace(".", odd, 1), "lora_te1_" + odd, key[:-3],
                                key.replace("0", rng.choice(("1", "99", "-1", "\u0661"))),
                                "transformer." + key))] = tensors.pop(key)
        return self.saved(rng, tensors)

    @data_bytes
    def numbers(self, rng):
        """Near the ends of fp32."""
        tensors, _ = self.random_lora(rng.choice(list(DIALECTS)), rng.sample(BFL_LAYERS, 2), seed=rng.randrange(1 << 30))
        for key in rng.sample(list(tensors), rng.choice((1, 2))):
            tensors[key] = tensors[key] * rng.choice((1e38, -1e38, 1e20, 1e-38, 1e-44, 0.0, float("nan"), float("inf"), 1e30))
        return self.saved(rng, tensors, strength=rng.choice((1.0, 10.0, -10.0)))

    def trained(self, rng):
        """One step of ComfyUI's own training on the 4-bit model: it works, or it is refused in one sentence."""
        from comfy_extras.nodes_train import TrainLoraNode
        inputs = {one.id: [getattr(one, "default", None)] for one in TrainLoraNode.GET_SCHEMA().inputs}
        inputs |= {"model": [self.models["dev"].clone()], "latents": [{"samples": noise(1, 16, 4, 4)}], "steps": [1],
                   "positive": [[[noise(1, 4, 128), {"pooled_output": noise(1, 64), "guidance": 3.5}]]], "rank": [4],
                   "training_dtype": [rng.choice(("fp32", "none", "bf16"))], "lora_dtype": ["fp32"], "algorithm": ["LoRA"],
                   "gradient_checkpointing": [rng.random() < 0.5]}
        names = {one.id for one in TrainLoraNode.GET_SCHEMA().inputs}

        def train():
            with torch.inference_mode(False), torch.enable_grad():
                result = TrainLoraNode.execute(**{name: value for name, value in inputs.items() if name in names}).args
            trained = next(one for one in result if isinstance(one, dict))
            if not any(tensor.abs().max() > 0 for key, tensor in trained.items() if "up" in key or "lora_B" in key):
                raise Fault("training changes nothing")

        return Case(train)

    mutations = containers.of_files(6) | {
        good_dialect: 16, good_narrow: 6, good_dora: 6, good_old_diffusers: 1, chain: 5, empty_pair: 4,
        odd_dtype: 8, odd_extras: 25, odd_factors: 20, key_of: 15, odd_reshape: 4, numbers: 12, many_empty: 3, trained: 0.2}


class Pickles(Loras):
    """.pt files: what torch.save writes, as a zip or as before 2020, damaged, and what else may be pickled."""
    name, share = "lora_pt", 2

    def __init__(self, folder):
        super().__init__(folder)
        self.content = self.random_lora("kohya", BFL_LAYERS[:3])[0]
        self.zip, self.old = _pickled(self.content), _pickled(self.content, old=True)

    def of_bytes(self, rng, raw, outcome=None):
        path = self.path.with_suffix(rng.choice((".pt", ".pt", ".ckpt", ".bin", ".pth")))
        path.write_bytes(raw)
        return Case(partial(self.use, [(path.name, rng.choice((1.0, -0.5)))], "dev", whole=rng.random() < SELDOM), path.name,
                    outcome)

    def good(self, rng):
        return rng.choice((self.zip, self.old))

    def flipped(self, rng):
        """Bytes of the pickle, before the numbers in an old file, and of the zip's own tables."""
        raw = self.good(rng)
        where = rng.choice((range(0, 3000), range(len(raw) - 2500, len(raw)) if raw is self.zip else range(0, 300)))
        spoilt = bytearray(raw)
        for _ in range(rng.choice((1, 1, 2, 8))):
            spoilt[rng.choice(where)] = rng.choice((0, 0xFF, rng.randrange(256), ord("."), ord("("), ord("R")))
        return self.of_bytes(rng, bytes(spoilt))

    def pickle_in_zip(self, rng):
        """The zip is whole, its pickle is not: flipped, cut, spliced."""
        def change(name, data):
            if not name.endswith("data.pkl"):
                return data
            spoilt = bytearray(data)
            at = rng.randrange(len(data))
            kind = rng.randrange(4)
            if kind == 0:
                del spoilt[at:at + rng.choice((1, 2, 10, len(data)))]
            elif kind == 1:
                spoilt[at:at] = spoilt[rng.randrange(len(data)):][:rng.choice((1, 8, 100))]
            else:
                for _ in range(rng.choice((1, 1, 3))):
                    spoilt[rng.randrange(len(data))] = rng.randrange(256)
            return bytes(spoilt)
        return self.of_bytes(rng, self.rezipped(change, zipfile.ZIP_STORED))

    def entries_of_zip(self, rng):
        """Deflated, missing, doubled, empty, under another name, cut and longer."""
        victim, kind = rng.randrange(8), rng.randrange(6)
        count = iter(range(1000))

        def change(name, data):
            if next(count) != victim:
                return data
            return (None, b"", data[:len(data) // 2], data + data, (f"other/{name}", data), (name.replace("/", "/../"),
                                                                                             data))[kind]
        return self.of_bytes(rng, self.rezipped(change, rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED))))

    def rezipped(self, change, compression):
        made = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(self.zip)) as old, zipfile.ZipFile(made, "w", compression) as new:
            for name in old.namelist():
                changed = change(name, old.read(name))
                if changed is not None:
                    new.writestr(*(changed if isinstance(changed, tuple) else (name, changed)))
        return made.getvalue()

    def cut(self, rng):
        raw = self.good(rng)
        return self.of_bytes(rng, raw[:rng.choice((rng.randrange(len(raw)), rng.randrange(2000), len(raw) - 1))]
                             + rng.choice((b"", b"", bytes(9), raw[:99])))

    def odd_tensors(self, rng):
        """On no device, a view of one number, sparse, of other classes and dtypes."""
        content = dict(self.content)
        for _ in range(rng.choice((1, 1, 2))):
            key = rng.choice(list(self.content))
            content[key] = self.odd_tensor(rng, self.content[key].shape)
        return self.of_bytes(rng, _pickled(content, rng.random() < 0.3))

    def odd_dtype(self, rng):
        """Factors that are no floats."""
        dtype = rng.choice((torch.bool, torch.int64, torch.int32, torch.uint8, torch.complex64, torch.float8_e4m3fnuz))
        content = {key: tensor.ne(0).to(dtype) if tensor.ndim == 2 else tensor for key, tensor in self.content.items()}
        return self.of_bytes(rng, _pickled(content), REFUSED)

    @staticmethod
    def odd_tensor(rng, shape):
        return rng.choice((
            lambda: torch.empty(shape, device="meta"), lambda: torch.zeros(1).expand(rng.choice((10**6, 10**10, 10**12))),
            lambda: torch.zeros(1, 1).expand(128, 10**9), lambda: torch.zeros(shape).to_sparse(),
            lambda: torch.nn.Parameter(torch.ones(shape)), lambda: torch.ones(shape, dtype=torch.complex64),
            lambda: torch.ones(shape, dtype=torch.bool), lambda: torch.ones(shape, dtype=torch.int64),
            lambda: torch.ones(shape).to(torch.float8_e5m2), lambda: torch.ones(shape[::-1]).t(),
            lambda: torch.full(shape, float("nan")), lambda: torch.ones(shape, dtype=torch.float64),
            lambda: torch.quantize_per_tensor(torch.ones(shape), 1.0, 0, torch.qint8),
            lambda: torch.ones(shape).to(torch.float8_e4m3fnuz), lambda: torch.zeros(shape).to_sparse_csr()
            if len(shape) == 2 else torch.ones(0)))()

    def odd_contents(self, rng):
        """No dict, other values, other keys, nested."""
        key = rng.choice(list(self.content))
        odd = rng.choice((None, 1, "x", [], {}, 1.5, b"bytes", float("nan"), [torch.ones(2)], {"a": torch.ones(2)}, (),
                          10**400))
        content = rng.choice((
            lambda: odd, lambda: self.content | {key: odd}, lambda: {"state_dict": odd}, lambda: {"state_dict": self.content},
            lambda: {"state_dict": self.content | {key: odd}}, lambda: {"module": self.content}, lambda: {"x": odd},
            lambda: self.content | {odd if isinstance(odd, (int, float, str, bytes, tuple)) else 7: torch.ones(2)},
            lambda: {1: self.content}, lambda: [self.content], lambda: {"state_dict": {"state_dict": self.content}},
            lambda: self.content | {rng.choice(containers.ODD_NAMES): torch.ones(2)}, lambda: torch.ones(4)))()
        return self.of_bytes(rng, _pickled(content, rng.random() < 0.3))

    def other_pickles(self, rng):
        """Not torch's; code in it must not run."""
        raw = rng.choice((pickle.dumps(_Touch()), pickle.dumps({"a": 1}, 2), pickle.dumps([1] * 9, 5), b"", b"\x80\x02.", b"PK",
                          b"<!DOCTYPE html>", _pickled({"a": _Touch()}), b"\x80\x04" + b"(" * rng.choice((10, 10_000)),
                          self.zip + self.zip, bytes(100), b"\x80\x02]" + b"q\0h\0a" * 1000 + b"."))
        return self.of_bytes(rng, raw)

    @data_bytes
    def numbers_flipped(self, rng):
        """In the zip the numbers have a checksum that torch does not look at."""
        spoilt = bytearray(self.old)
        for _ in range(rng.choice((1, 8))):
            spoilt[rng.randrange(len(spoilt) // 2, len(spoilt))] ^= 1 << rng.randrange(8)
        return self.of_bytes(rng, bytes(spoilt))

    mutations = {flipped: 25, pickle_in_zip: 25, entries_of_zip: 12, cut: 6, odd_tensors: 15, odd_contents: 15,
                 other_pickles: 3, numbers_flipped: 10, odd_dtype: 2}


class _Touch:
    """A pickle that would leave a folder."""

    def __reduce__(self):
        return os.mkdir, ("svdq-fuzz-code-ran",)


def _pickled(content, old=False):
    made = io.BytesIO()
    torch.save(content, made, _use_new_zipfile_serialization=not old)
    return made.getvalue()


CLASSES = (Loras, Pickles)
