"""Hostile files of the smaller nodes: calibration, conditioning, and what is compared."""

import contextlib
import io
import json
import math
import struct
import zlib

import torch
from PIL import Image
from safetensors.torch import save

from svdq_pack.nodes.calibration import SVDQCaptureCalibration
from svdq_pack.nodes.compare import SVDQCompare
from svdq_pack.nodes.conditioning import KEY as OPTIONS
from svdq_pack.nodes.conditioning import LARGEST, NUMBERS, OBJECTS, TENSORS, SVDQLoadConditioning, SVDQSaveConditioning
from svdq_pack.nodes.host.load import load_model
from svdq_pack.svdq import compare
from svdq_pack.svdq.quantize.calibration import KEY, Statistics
from svdq_pack.tests.comfy.inprocess.support import noise, sample
from svdq_pack.tests.hostile import containers, models
from svdq_pack.tests.hostile.frame import REFUSED, Case, Fault, Hostile, data_bytes, full_disk, node
from svdq_pack.tests.unit.helpers import join, split

ODD_NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, 10**400, -(10**400), 1.5, 1e308, float("nan"), float("inf"), True, None, "", "1",
               [], [1], {}, {"a": 1})


class Calibrations(Hostile):
    name, share = "calibration", 4

    def __init__(self, folder):
        super().__init__(folder)
        models.folders(folder)
        (folder / "svdq_calibration").mkdir()
        self.model = load_model(models.write(folder / "diffusion_models" / "int4.safetensors"), torch.float32, 16)
        self.path = folder / "svdq_calibration" / "hostile.safetensors"
        models.statistics().save(self.path)
        self.raw = self.path.read_bytes()
        self.path.unlink()

    def good(self, rng):
        return self.raw

    def of_bytes(self, rng, raw):
        self.path.write_bytes(raw)
        disk = rng.random() < 0.1

        def use():
            node(SVDQCaptureCalibration).execute(self.model, "hostile")
            statistics = Statistics.load(self.path, models.SHAPE)
            for layer in statistics.layers.values():
                if not all(values.isfinite().all() for values in vars(layer).values()):
                    raise Fault("NaN or Inf in the statistics")
            if not all(isinstance(value, int) and 0 <= value < 2**63 for value in (statistics.calls, statistics.tokens)):
                raise Fault("counts that are none", f"{statistics.calls!r} {statistics.tokens!r}")
            if not isinstance(statistics.note, str):
                raise Fault("a note that is no text", repr(statistics.note))
            with full_disk() if disk else contextlib.nullcontext():
                statistics.save(self.path.with_name("again.safetensors"))

        return Case(use, "" if disk else self.path.name, makes=("svdq_calibration/again",))

    def description(self, rng):
        header, data = split(self.raw)
        about = json.loads(header["__metadata__"][KEY])
        for _ in range(rng.choice((1, 1, 2))):
            field = rng.choice([*about, *about, "<img src=x onerror=alert(1)>"])
            if rng.random() < 0.2:
                about.pop(field, None)
            else:
                about[field] = rng.choice((*ODD_NUMBERS, *containers.ODD_NAMES, 64, 128, 384, "x" * 5000))
        text = rng.choice((json.dumps(about), json.dumps(about), json.dumps([about]), "[" * 9999, ""))
        header["__metadata__"][KEY] = text
        return self.of_bytes(rng, join(header, data))

    @data_bytes
    def numbers(self, rng):
        header, data = split(self.raw)
        spoilt = bytearray(data)
        for _ in range(rng.choice((1, 3))):
            at = 4 * rng.randrange(len(data) // 4)
            spoilt[at:at + 4] = struct.pack("f", rng.choice((-1.0, -0.0, float("nan"), float("inf"), 3e38, 9e-41, 1e20)))
        return self.of_bytes(rng, join(header, bytes(spoilt)))

    mutations = containers.of_files(4) | {description: 60, numbers: 12}


class Conditionings(Hostile):
    name, share = "conditioning", 4

    def __init__(self, folder):
        super().__init__(folder)
        models.folders(folder)
        self.model = load_model(models.write(folder / "diffusion_models" / "int4.safetensors"), torch.float32, 16)
        self.path = folder / "input" / "hostile.safetensors"
        self.raw = save({"0.cond": noise(1, 4, 8), "0.pooled_output": noise(1, 8), "0.guidance": torch.tensor(3.5),
                         "1.cond": noise(1, 4, 8, seed=1), "1.pooled_output": noise(1, 8, seed=1)})

    # ---- files that are loaded

    def good(self, rng):
        return self.raw

    def of_bytes(self, rng, raw):
        self.path.write_bytes(raw)

        def use():
            SVDQLoadConditioning.fingerprint_inputs(self.path.name)
            loaded = node(SVDQLoadConditioning).execute(self.path.name).args[0]
            _check_conditioning(loaded)

        return Case(use, self.path.name)

    def keys(self, rng):
        """Numbers that are none, missing or huge; a cond without axes; names for a page."""
        tensors = {"0.cond": noise(1, 4, 8), "0.pooled_output": noise(1, 8), "0.guidance": torch.tensor(3.5)}
        for _ in range(rng.choice((1, 1, 2))):
            key = rng.choice(list(tensors))
            index, _, name = key.partition(".")
            other = rng.choice((f"{rng.choice(('1', '00', '-1', '٣', '9' * 5000, '', ' ', '1e3'))}.{name}",
                                f"{index}.{rng.choice(containers.ODD_NAMES)}", rng.choice(containers.ODD_NAMES), name,
                                f"{index}.cond.{name}", f"{index}.cond"))
            tensors[other] = tensors.pop(key)
        if rng.random() < 0.5:
            key = rng.choice(list(tensors))
            tensors[key] = rng.choice((torch.tensor(1.0), torch.zeros(0), torch.zeros(4), torch.ones(2, 2, dtype=torch.int64),
                                       torch.ones(1, 4, 8, dtype=torch.bool), torch.tensor(True), torch.zeros(1, 0, 8),
                                       torch.ones(1, 4, 8).to(torch.float8_e4m3fn), torch.ones(1, 4, 8, dtype=torch.float64)))
        return self.of_bytes(rng, save(tensors))

    def options(self, rng):
        """What samplers and FLUX read, as something else: refused, or sampled without NaN."""
        numbers, tensors = {}, {"cond": noise(1, 4, 128), "pooled_output": noise(1, 64)}
        if rng.random() < 0.2:
            tensors[rng.choice(("cond", "pooled_output"))] *= rng.choice((1e38, 1e7, 1e4))
        for name in rng.sample((*NUMBERS, *OBJECTS, *TENSORS, "default", "prompt_type", "width", "of_another"), 2):
            value = rng.choice((*ODD_NUMBERS, 0.5, 0.5, "x", torch.ones(()), torch.zeros(0), torch.ones(1, 8, 8),
                                torch.ones(1, 8, 8) > 0, torch.ones(1, 8, 8).to(torch.float8_e5m2), torch.ones(1, 8, 8) * 1e38))
            (tensors if isinstance(value, torch.Tensor) else numbers)[name] = value
        if tensors["pooled_output"].shape == (1, 8, 8):         # of another model
            del tensors["pooled_output"]
        self.path.write_bytes(save({f"0.{name}": tensor for name, tensor in tensors.items()},
                                   {OPTIONS: json.dumps([numbers])}))

        def use():
            loaded = node(SVDQLoadConditioning).execute(self.path.name).args[0]
            _check_conditioning(loaded)
            if not sample(self.model, noise(1, 16, 4, 4), steps=1, **loaded[0][1]).isfinite().all():
                raise Fault("NaN or Inf in the result", sorted(loaded[0][1]))

        return Case(use, self.path.name)

    def overwritten(self, rng):
        """In place, once it is loaded: what ComfyUI caches must not change with it."""
        self.path.write_bytes(self.raw)

        def use():
            loaded = node(SVDQLoadConditioning).execute(self.path.name).args[0]
            tensors = [value for cond, options in loaded for value in (cond, *options.values())
                       if isinstance(value, torch.Tensor)]
            before = [tensor.clone() for tensor in tensors]
            with open(self.path, "r+b") as file:
                file.seek(len(self.raw) - 300)
                file.write(bytes(300))
            if not all(map(torch.equal, tensors, before)):
                raise Fault("a loaded conditioning changes with its file")

        return Case(use, self.path.name, touches=("input/hostile.safetensors",))

    # ---- what is saved

    def saved(self, rng, conditioning, prefix="prompt", outcome=None):
        def use():
            node(SVDQSaveConditioning).execute(conditioning, prefix)
            written = [path for path in (self.folder / "output").rglob("*.safetensors")]
            if len(written) != 1:
                raise Fault("not one file is written", [path.name for path in written])
            offered = {f"{path.relative_to(self.folder / 'output').as_posix()} [output]" for path in written}
            options = next(one for one in SVDQLoadConditioning.define_schema().inputs if one.id == "file").options
            if not offered <= set(options):
                raise Fault("saved where Load Conditioning does not look", sorted(offered))
            loaded = node(SVDQLoadConditioning).execute(offered.pop()).args[0]
            _check_conditioning(loaded)
            _require_equal(loaded, conditioning)

        return Case(use, outcome=outcome, makes=("output/",), keeps=("output/conditioning",) if not prefix else ())

    def prefixes(self, rng):
        prefix = rng.choice(("", " ", "a/b", "../x", "/tmp/svdq-fuzz", "a\0b", "x" * 300, "a\nb", "%date%", "*", "CON", "a.b",
                             ".x",
                             "[output]", "a [output]", "<img>", "..", "a//b", "\ud800", "ü", "a\\b", "a:b", "~", "?", "|", "a ",
                             "a.safetensors", "%year%", "x" * 190, "a/../../b", "./a", "a/", "prompt", "日本"))
        return self.saved(rng, _conditioning(), prefix + rng.choice(("", "", "1")))

    def shared(self, rng):
        """Harmless graphs: Combine(a, a), slices, expanded and transposed tensors, empty ones, many entries."""
        (cond, options), = _conditioning()
        conditioning = rng.choice((
            lambda: [[cond, options]] * 2, lambda: [[cond, options], [cond.clone(), options]],
            lambda: [[cond[:, :2], options], [cond[:, 2:], options]], lambda: [[cond.expand(3, -1, -1), options]],
            lambda: [[cond.transpose(1, 2), options]], lambda: [[cond, options | {"pooled_output": None}]],
            lambda: [[cond, options | {"again": options["pooled_output"]}]], lambda: [[cond + i, options] for i in range(12)],
            lambda: [[cond, {}]], lambda: [[cond[:, :0], options]], lambda: [[cond.half(), options]]))()
        return self.saved(rng, conditioning)

    def odd_options(self, rng):
        """Values a file cannot hold, names that are taken."""
        (cond, options), = _conditioning()
        name = rng.choice(("strength", "cond", "", "a.b", *containers.ODD_NAMES, "\ud800", 7, None, "guidance"))
        value = rng.choice((*ODD_NUMBERS, torch.ones(2, dtype=torch.complex64), torch.empty(2, device="meta"),
                            torch.ones(2).to_sparse(), torch.ones(2, dtype=torch.bool), object(), b"x", torch.ones(())))
        conditioning = rng.choice((lambda: [[cond, options | {name: value}]], lambda: [[value, options]], lambda: [],
                                   lambda: [[cond, options | {name: 1.5}]], lambda: [[torch.empty(1, 4, 8, device="meta"),
                                                                                      {}]]))()
        return self.saved(rng, conditioning)

    mutations = containers.of_files(3) | {keys: 30, options: 12, overwritten: 3, prefixes: 15, shared: 10, odd_options: 15}


def _conditioning():
    return [[noise(1, 4, 8), {"pooled_output": noise(1, 8), "guidance": 3.5}]]


def _check_conditioning(loaded):
    for cond, options in loaded:
        if not isinstance(cond, torch.Tensor) or cond.ndim < 2 or not cond.is_floating_point():
            raise Fault("a conditioning without tokens", repr(cond)[:100])
        if not cond.float().abs().max() <= LARGEST:
            raise Fault("numbers that no text encoder gives", repr(cond)[:100])
        if not isinstance(options, dict):
            raise Fault("options that are none")


def _require_equal(loaded, saved):
    if len(loaded) != len(saved):
        raise Fault("other entries than were saved", f"{len(loaded)} of {len(saved)}")
    for (cond, options), (cond_before, before) in zip(loaded, saved):
        options, before = ({name: value for name, value in given.items() if value is not None} for given in (options, before))
        if cond.dtype != cond_before.dtype or not torch.equal(cond, cond_before) or set(options) != set(before):
            raise Fault("another conditioning than was saved", sorted(map(str, options)))
        for name, value in before.items():
            if isinstance(value, torch.Tensor):
                same = isinstance(options[name], torch.Tensor) and torch.equal(options[name], value) or (
                    not value.ndim and options[name] == value.item())
            else:
                same = options[name] == value or value != value
            if not same:
                raise Fault("another option than was saved", name)


class Comparisons(Hostile):
    name, share = "compare", 4

    def __init__(self, folder):
        super().__init__(folder)
        models.folders(folder)
        self.pictures = [torch.rand(1, 16, 16, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
        self.files = []
        for kind in ("png", "jpg", "webp", "bmp"):
            made = io.BytesIO()
            _pil(self.pictures[0]).save(made, {"jpg": "jpeg"}.get(kind, kind))
            self.files.append((f".{kind}", made.getvalue()))
        self.latent = save({"latent_tensor": noise(1, 16, 4, 4), "latent_format_version_0": torch.zeros(0)})
        self.reference, self.other = folder / "reference.png", folder / "other.latent"
        _pil(self.pictures[1]).save(self.reference)
        self.other.write_bytes(save({"latent_tensor": noise(1, 16, 4, 4, seed=1)}))

    def with_file(self, rng, raw, suffix):
        """Beside a good one, as reference or as the other, alone or in folders."""
        path = self.folder / f"hostile{suffix}"
        good = self.other if suffix in compare.LATENTS else self.reference
        if rng.random() < 0.2:
            path = self.folder / "set" / f"hostile{suffix}"
            path.parent.mkdir()
            good = self.folder / "good"
            good.mkdir()
            one = self.other if suffix in compare.LATENTS else self.reference
            (good / f"a{suffix}").write_bytes(one.read_bytes())
        path.write_bytes(raw)
        pair = rng.sample((path if path.parent == self.folder else path.parent, good), 2)

        def use():
            _judge_comparison(**compare.read(*pair))

        return Case(use)

    # ---- latents

    def good(self, rng):
        return self.latent

    def of_bytes(self, rng, raw):
        return self.with_file(rng, raw, rng.choice(compare.LATENTS))

    def latents(self, rng):
        """Of any axes, dtypes, values."""
        shape = rng.choice(((), (1,), (4,), (0,), (1, 16), (1, 16, 4, 4), (1, 16, 4, 4), (1, 16, 4, 4), (2, 16, 4, 4), (0, 16,
                                                                                                                        4, 4),
                            (1, 0, 4, 4), (1, 16, 1, 4, 4)))
        dtype = rng.choice((torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool,
                            torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64))
        value = rng.choice((0.0, 1.0, 1.0, 3e38, float("nan"), float("inf"), 1e-40))
        tensor = (torch.ones(shape) * value).to(dtype) if rng.random() < 0.5 else noise(*shape).to(dtype)
        tensors = {rng.choice(("latent_tensor", "latent_tensor", "latent_tensor", "samples")): tensor}
        if rng.random() < 0.5:
            return self.of_bytes(rng, save(tensors))
        pair = [self.folder / f"{name}.latent" for name in ("one", "two")]
        for path in rng.sample(pair, 2):
            path.write_bytes(save(tensors))
            tensors = {"latent_tensor": rng.choice((tensor, torch.zeros(shape).to(dtype), noise(*shape, seed=2).to(dtype)))}
        return Case(lambda: _judge_comparison(**compare.read(*pair)))

    # ---- pictures

    def picture_header(self, rng):
        suffix, raw = rng.choice(self.files)
        return self.with_file(rng, containers.flip(rng, raw, 0, min(len(raw), 60), rng.choice((1, 1, 2, 5))), suffix)

    @data_bytes
    def picture_data(self, rng):
        suffix, raw = rng.choice(self.files)
        return self.with_file(rng, containers.flip(rng, raw, min(60, len(raw) // 2), len(raw), rng.choice((1, 3))), suffix)

    def picture_cut(self, rng):
        suffix, raw = rng.choice(self.files)
        return self.with_file(rng, raw[:rng.randrange(len(raw))], rng.choice((suffix, suffix, ".png", ".latent")))

    def bomb(self, rng):
        """A small PNG of very many pixels, beside another picture or beside itself, which has its size."""
        size = rng.choice((4000, 12_000, 20_000, 20_000, 60_000, 2**31 - 1, 0))       # 12,000: Pillow takes it
        width, height = size, rng.choice((size, size, 1, 17))
        case = self.with_file(rng, _png(width, height, rng.choice((0, 2, 3, 6)), rng.choice((1, 8))), ".png")
        if width * height > compare.MAX_PIXELS and rng.random() < 0.3:
            path = next(self.folder.rglob("hostile.png"))
            case = Case(lambda: _judge_comparison(**compare.read(path, path)), path.name, REFUSED)
        return case

    def picture_kinds(self, rng):
        """Grey, palettes, alpha, 16 bit, animated, of another size; text chunks."""
        size = rng.choice(((16, 16), (16, 16), (1, 1), (5, 16), (16, 11)))
        mode = rng.choice(("1", "L", "P", "LA", "RGBA", "I;16", "RGB", "RGB", "PA"))
        picture = Image.new(mode, size)
        made = io.BytesIO()
        if mode == "PA":
            Image.new("CMYK", size).save(made, "jpeg")
        else:
            picture.save(made, "png", save_all=mode == "RGB", append_images=[picture] * 3 if mode == "RGB" else [])
        return self.with_file(rng, made.getvalue(), ".png" if mode != "PA" else ".jpg")

    # ---- the node

    def images(self, rng):
        """IMAGE and LATENT inputs as other nodes may make them."""
        def image():
            shape = list(rng.choice(((1, 16, 16, 3), (2, 16, 16, 3), (1, 16, 16, 4), (1, 16, 16, 1), (0, 16, 16, 3), (1, 4, 4,
                                                                                                                      3),
                                     (1, 16, 11, 3), (16, 16, 3), (1, 0, 16, 3), (1, 16, 16, 3), (1, 16, 16, 3), (9, 12, 2000,
                                                                                                                  3))))
            made = torch.rand(shape, generator=torch.Generator().manual_seed(rng.randrange(3)))
            if rng.random() < 0.3:
                made = made * rng.choice((0, 2, -1, 1e30, 3e38, float("nan"), float("inf")))
            return made.to(rng.choice((torch.float32,) * 5 + (torch.float16, torch.bfloat16, torch.float64, torch.uint8)))

        reference = image()
        other = image() if rng.random() < 0.4 else rng.choice((reference.clone(), reference.flip(0), reference * 0.5))
        latents = {}
        for name in ("reference_latent", "quantised_latent"):
            if rng.random() < 0.4:
                samples = rng.choice((noise(len(reference), 16, 2, 2), torch.zeros(len(reference), 16, 2, 2), noise(1, 16, 2,
                                                                                                                    2, 2),
                                      noise(3), torch.tensor(1.0), torch.ones(1, 16, 2, 2, dtype=torch.int64),
                                      torch.ones(1, 4, 2, 2).to(torch.float8_e4m3fn), None, "x"))
                latents[name] = rng.choice(({"samples": samples}, {"samples": samples}, {"samples": samples}, {}))

        def use():
            text, sheet = node(SVDQCompare).execute(reference, other, **latents).args
            if not sheet.isfinite().all() or sheet.ndim != 4 or sheet.shape[-1] != 3:
                raise Fault("a sheet that is no IMAGE", list(sheet.shape))
            _judge_equality(text, {"psnr": (reference, other)} | ({"latent_psnr": tuple(
                one["samples"] for one in latents.values())} if latents else {}))

        return Case(use, outcome=REFUSED if len(latents) == 1 else None, makes=("temp/",))

    mutations = containers.of_files(1) | {latents: 25, picture_header: 15, picture_data: 12, picture_cut: 8, bomb: 4,
                                          picture_kinds: 10, images: 30}


def _judge_comparison(**given):
    facts = compare.compare(**given)
    json.dumps(facts, allow_nan=False)
    text = compare.as_text(facts)
    if "pictures" in given:
        compare.sheet(*given["pictures"])
    _judge_equality(text, {"psnr": given["pictures"]} if "pictures" in given else {"latent_psnr": given["latents"]})


def _judge_equality(text, pairs):
    for metric, (reference, other) in pairs.items():
        line = next(line for line in text.splitlines() if compare.METRICS[metric][0] in line)
        seen = [batch.clamp(0, 1)[..., :3] if metric == "psnr" else batch for batch in (reference, other)]  # as pictures are
        if " equal" in line and not (seen[0] == seen[1]).all():                                             # saved, grey too
            raise Fault("different ones are called equal", line)
        if " nan" in line or " inf" in line:
            raise Fault("a number that is none", line)


def _pil(picture):
    return Image.fromarray((picture[0] * 255).byte().numpy())


def _png(width, height, colour, depth):
    """Rows of zeros, at most 64 MB of them whatever the header says."""
    channels = {0: 1, 2: 3, 3: 1, 6: 4}[colour]
    row = 1 + math.ceil(width * channels * depth / 8)
    data = zlib.compress(bytes(min(row * height, 64 << 20)), 1)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(6)) if colour == 3 else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + chunk(b"IDAT", data) + chunk(b"IEND", b"")


CLASSES = (Calibrations, Conditionings, Comparisons)
