"""Hostile names and numbers: whatever a user may type into a node or a command, and files that lie about what they are."""

import contextlib
import io
import json
import os
import re
import shutil

import comfy.sd
import folder_paths
import torch
from safetensors.torch import load, save

from svdq_pack.nodes.calibration import SVDQCaptureCalibration
from svdq_pack.nodes.conditioning import SVDQLoadConditioning
from svdq_pack.nodes.host.load import load_model
from svdq_pack.nodes.info import SVDQInfo
from svdq_pack.nodes.loaders import SVDQHubLoader, SVDQModelLoader
from svdq_pack.nodes.loras import SVDQLoraLoader, SVDQLoraStack
from svdq_pack.nodes.quantize import NONE, SVDQQuantize
from svdq_pack.svdq import cli
from svdq_pack.svdq.errors import LoraError, PackError
from svdq_pack.svdq.kernels import ops
from svdq_pack.svdq.kernels.weights import dequantize
from svdq_pack.svdq.quantize import run
from svdq_pack.tests.comfy.inprocess.support import noise, sample
from svdq_pack.tests.hostile import models, work
from svdq_pack.tests.hostile.frame import REFUSED, Case, Fault, Hostile, data_bytes, node, printable

ODD = ("", " ", ".", "..", "/", "a/b", "../up", "/etc/passwd", "a\0b", "\0", "x" * 225, "x" * 300, "x" * 1000, "ü" * 130,
       "a\nb", "\x1b[2J", "\u202e", "*", "?", "[a]", "a*b", "CON", "nul.txt", "a.", "a ", " a", ".hidden", "a\\b", "C:x",
       "C:\\x", "a|b", '"', "<img src=x onerror=alert(1)>", "[[x|javascript:y]]", "\ud800", os.fsdecode(b"\xff\xfe"), "~",
       "$HOME", "%s", "{precision}", "{x}", "{0.__class__}", "-", "--help", "a//b", "./a", "a/../b", "日本", "😀", "None",
       "folder", "a.safetensors.safetensors", "pipe", "loop", "zero", "cut", "flux")
UNSAFE = re.compile(r'[*?\[\]<>|":\\\x00-\x1f\x7f]|^(con|nul|prn|aux)(\.|$)|^\s|\s$|[. ]$|.{221}', re.I)
DAMAGED = ("damaged", "cut short", "download it again", "get it again", "Get it again", "not complete")


class Names(Hostile):
    name, share = "names", 2

    def __init__(self, folder):
        super().__init__(folder)
        models.folders(folder)
        for name in ("quantise_w4a4", "quantise_awq", "smoothing"):
            setattr(run, name, work.remembered(getattr(run, name), values=False))      # names matter here, numbers not
        (folder / "svdq_calibration").mkdir()
        self.raw = models.write(folder / "diffusion_models" / "int4.safetensors").read_bytes()
        self.model = load_model(folder / "diffusion_models" / "int4.safetensors", torch.float32, 16)
        self.dense = models.write_dense(folder / "diffusion_models" / "flux.safetensors", folder)
        self.stock = comfy.sd.load_diffusion_model(str(self.dense))
        models.statistics().save(folder / "svdq_calibration" / "flux.safetensors")
        for precision in ("int4", "nvfp4"):                 # once, so that no case takes so long
            run.quantize(self.dense, folder / "made.safetensors", precision, 16)
            (folder / "made.safetensors").unlink()
        self.lora = models.golden("lora_model_nvfp4_flux_dev_like_peft", folder / "loras" / "peft.safetensors").read_bytes()
        (folder / "diffusion_models" / ".other.safetensors.abc.part").write_text("precious")
        (folder / "diffusion_models" / "taken.json").write_text("precious")
        (folder / "output" / "mine.json").write_text("precious")

    def of_node(self, rng, consume, **more):
        """What a node writes has a name that every system takes."""
        self.surroundings(rng)
        before = set(self.folder.rglob("*"))

        def use():
            consume()
            unsafe = next((path for path in set(self.folder.rglob("*")) - before if UNSAFE.search(path.stem)), None)
            if unsafe:
                raise Fault("a file whose name not every system takes", unsafe.name)

        return Case(use, **more)

    def surroundings(self, rng):
        """What else may be there: pipes, loops, endless devices, in every folder a name may lead to."""
        if rng.random() < 0.3:
            for below in ("diffusion_models", "loras", "input", "svdq_calibration"):
                for suffix in ("", ".safetensors"):
                    os.mkfifo(self.folder / below / f"pipe{suffix}")
                    os.symlink(f"loop{suffix}", self.folder / below / f"loop{suffix}")
                    os.symlink("/dev/zero", self.folder / below / f"zero{suffix}")
                (self.folder / below / "folder.safetensors").mkdir()

    def text(self, rng, suffixes=("", "", ".safetensors")):
        name = rng.choice(ODD)
        if rng.random() < 0.3:
            at = rng.randrange(len(name) + 1)
            name = name[:at] + rng.choice(ODD) + name[at:]
        return name + rng.choice(suffixes)

    # ---- nodes

    def model_names(self, rng):
        name, kind = self.text(rng), rng.choice((SVDQInfo, SVDQModelLoader))

        def use():
            kind.fingerprint_inputs(name)
            node(kind).execute(name)

        return self.of_node(rng, use)

    def lora_names(self, rng):
        name = self.text(rng, ("", ".safetensors", ".pt"))
        slots = {"lora_name": name} if rng.random() < 0.5 else {"lora_2": name}
        kind = SVDQLoraLoader if "lora_name" in slots else SVDQLoraStack

        def use():
            kind.fingerprint_inputs(**slots)
            node(kind).execute(self.model, **slots)

        return self.of_node(rng, use)

    def conditioning_names(self, rng):
        name = self.text(rng, ("", ".safetensors", " [output]", ".safetensors [input]", " [temp]"))

        def use():
            SVDQLoadConditioning.fingerprint_inputs(name)
            node(SVDQLoadConditioning).execute(name)

        return self.of_node(rng, use)

    def capture_names(self, rng):
        """The file is written after sampling, and its name is sent to the page."""
        name, samples = self.text(rng), rng.random() < 0.1

        def use():
            watched = node(SVDQCaptureCalibration).execute(self.stock, name).args[0]
            if samples:
                sample(watched, noise(1, 16, 4, 4), steps=1)

        return self.of_node(rng, use, makes=("svdq_calibration/",), touches=("svdq_calibration/flux.safetensors",))

    def quantize_names(self, rng):
        filename = rng.choice((self.text(rng), self.text(rng), "taken", "new", "sub/new"))
        precision, calibration = rng.choice(("int4", "nvfp4")), rng.choice((NONE, NONE, "flux.safetensors", self.text(rng)))

        def use():
            SVDQQuantize.fingerprint_inputs(calibration)
            name, *_ = node(SVDQQuantize).execute(self.stock, precision, 16, calibration, filename).args
            if folder_paths.get_full_path("diffusion_models", name) is None:
                raise Fault("a model nobody finds", name)

        return self.of_node(rng, use, makes=("diffusion_models/", "temp/"))

    def hub_names(self, rng):
        repo, filename = rng.choice(("a/b", self.text(rng))), rng.choice(("int4.safetensors", self.text(rng), ""))
        revision = rng.choice(("main", "main", self.text(rng)))

        def use():
            try:
                node(SVDQHubLoader).execute(repo, filename, revision)
            except PackError as error:
                if "cannot be reached" in str(error) and set(filename) & set('*?[]<>|":\\'):
                    raise Fault("asks for a name that not every system takes", printable(filename)) from error
                raise

        return self.of_node(rng, use, makes=("diffusion_models/.cache",), keeps=("diffusion_models/.cache",))

    def good_files(self, rng):
        """A good file under an odd name is good: nobody may say that it is damaged."""
        kind = rng.choice(("diffusion_models", "loras"))
        stem = rng.choice([name for name in ODD if name.strip(". ") and not set("/\0\ud800") & set(name)
                           and len(os.fsencode(name)) < 200])
        name = f"{stem}.safetensors"
        path = self.folder / kind / name
        if path.exists():
            path = path.with_name(name := f"another {name}")
        path.write_bytes(self.raw if kind == "diffusion_models" else self.lora)

        def use():
            try:
                if kind == "loras":
                    node(SVDQLoraLoader).execute(self.model, name)
                else:
                    node(rng.choice((SVDQInfo, SVDQInfo, SVDQModelLoader))).execute(name)
            except Exception as error:
                if any(word in str(error) for word in DAMAGED):
                    raise Fault("a good file is called damaged", printable(error)[:200]) from error
                raise

        return Case(use)

    # ---- commands

    def commands(self, rng):
        """Exit code 0 or 1, and lines for a terminal."""
        def path():
            return str(self.folder / rng.choice(("diffusion_models", "output", "input"))) + "/" + self.text(
                rng, ("", ".safetensors", ".safetensors", ".safetensors.index.json", ".png", ".latent"))

        command = rng.choice(("info", "merge", "dequantize", "compare", "quantize"))
        arguments = [command, path()] if command == "info" else [command, path(), path()]
        if command == "dequantize" and rng.random() < 0.5:
            arguments[1] = str(self.folder / "diffusion_models" / "int4.safetensors")
        if command == "quantize" and rng.random() < 0.5:
            arguments[1] = str(self.dense)
            arguments += ["--rank", rng.choice(("16", "16", "1600000"))]
        return self.of_command(rng, arguments)

    def of_command(self, rng, arguments):
        self.surroundings(rng)
        return Case(lambda: _command(arguments), makes=("output/", "input/", "diffusion_models/", "up"))

    def index(self, rng):
        """Of a model in parts: any JSON, or none, or a pipe."""
        folder = self.folder / "output" / "parts"
        folder.mkdir()
        path = folder / "model.safetensors.index.json"
        shutil.copy(self.dense, folder / "part.safetensors")
        part = rng.choice(("part.safetensors", "../parts/part.safetensors", "/dev/zero", "", "a\0b", 7, None, [], "x" * 300,
                           ".", "\ud800",
                           "pipe", "\x1b[2J"))
        text = json.dumps({"weight_map": rng.choice(({"a": part}, {"a": part}, {"a": "part.safetensors", "b": part}, {}, [],
                                                     None, "x", 7,
                                                     {"a": {"b": part}}))})
        content = rng.choice((text, text, text, text[:rng.randrange(len(text))], "[" * 100_000, "null", "[]", "\xff",
                              "9" * 5000,
                              json.dumps({"weight_map": {str(i): "x" * 999 for i in range(2000)}})))
        rng.choice((lambda: path.write_text(content, encoding="latin-1"), lambda: path.write_text(content, encoding="latin-1"),
                    lambda: path.write_bytes(content.encode("utf-16", "surrogatepass")), lambda: os.mkfifo(path), path.mkdir,
                    lambda: path.symlink_to(path.name), lambda: path.symlink_to("/dev/zero")))()
        if rng.random() < 0.1:
            os.mkfifo(folder / "pipe")
        return self.of_command(rng, ["quantize", str(rng.choice((path, folder))),
                                     str(self.folder / "output" / "new.safetensors"),
                                     "--rank", "16"])

    mutations = {model_names: 20, lora_names: 20, conditioning_names: 15, capture_names: 10, quantize_names: 8, hub_names: 10,
                 good_files: 8, commands: 20, index: 12}


def _command(arguments):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = cli.main(arguments)
        except SystemExit as error:
            code = error.code
    text = said.getvalue()
    if not text.replace("\n", "").isprintable():
        raise Fault("control characters on the terminal", printable(text)[:300])
    if code == 1:
        raise LoraError(text.strip()[:1000] or "nothing said") if text.strip() else Fault("fails without a word")
    if code not in (0, 2):
        raise Fault(f"exit code {code}")


class Numbers(Hostile):
    name, share = "numbers", 1

    def __init__(self, folder):
        super().__init__(folder)
        models.folders(folder)
        names = {"int4": {}, "nvfp4": {"precision": "nvfp4", "in_features": 64}}
        self.raw = [models.write(folder / "diffusion_models" / f"{name}.safetensors", **options).read_bytes()
                    for name, options in names.items()]
        self.path = folder / "diffusion_models" / "hostile.safetensors"
        self.model = load_model(folder / "diffusion_models" / "int4.safetensors", torch.float32, 16)
        models.golden("lora_model_nvfp4_flux_dev_like_peft", folder / "loras" / "peft.safetensors")

    def strengths(self, rng):
        """ComfyUI holds widgets to their range, NaN apart, but not what another node gives."""
        def strength():
            return rng.choice((float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 1e300, 1e-300, 10**400, True, 0, -0.0,
                               10.0, -10.0, 1e5, 3e4, 0.5, 1.0, 1.0, -1.0))

        stack, slots = rng.random() < 0.5, {}
        for i in range(1, rng.choice((2, 3, 4))):
            slots |= {f"lora_{i}": rng.choice(("peft.safetensors", "None")), f"strength_{i}": strength()}
        alone = strength()

        def use():
            if stack:
                patched = node(SVDQLoraStack).execute(self.model, **slots).args[0]
            else:
                patched = node(SVDQLoraLoader).execute(self.model, "peft.safetensors", alone).args[0]
            try:
                patched.give_layers_their_patches()
                self.run_network(patched)
            finally:
                self.model.give_layers_their_patches()

        return Case(use)

    def run_network(self, patched):
        """As it is, on the CPU; 16-bit layers are patched only where ComfyUI loads, which the LoRA class has done."""
        with torch.no_grad():
            if not patched.model.diffusion_model(**models.network_input()).isfinite().all():
                raise Fault("NaN or Inf in the result")

    @data_bytes
    def ends_of_types(self, rng):
        """One number of a checkpoint at the end of its type: refused, or a model without NaN."""
        tensors = load(rng.choice(self.raw))
        kind = rng.choice(("smooth", "wscales", "wtscale", "wcscales", "lora_down", "lora_up", "bias", "wzeros", "weight"))
        name = rng.choice([name for name in tensors if name.endswith(f".{kind}")] or ["proj_out.weight"])
        values = tensors[name].reshape(-1)
        value = rng.choice((9e-41, 1e-38, 3e38, -3e38, 1e30, 1e20, 0.0, -1.0, 6e4, 448.0, 1e-10))
        at = slice(None) if rng.random() < 0.2 else rng.randrange(len(values))
        values[at] = torch.tensor(value).to(values.dtype)
        self.path.write_bytes(save(tensors))

        def use():
            model = load_model(self.path, torch.float32, rng.choice((16, None)))
            self.run_network(model)

        return Case(use, self.path.name)

    def linears(self, rng):
        """The operator: any strides, sizes, dtypes, out that is x, act_bits that there are not."""
        layer = self.model.layers()[f"diffusion_model.single_blocks.0.{rng.choice(('linear2', 'modulation.lin'))}.weight"]
        weight = layer.views(layer.weight).tiles[0].weight
        n, k = weight.shape
        rows = rng.choice((0, 1, 5, 16))
        x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rng.randrange(9)))
        x = (x, x.t().contiguous().t(), x[:, :-1], x.half(), x.double(), x[None], x[:1].expand(rows, -1),
             x[..., 0])[rng.randrange(8)]
        act_bits = rng.choice((16, 16, None, 4, 8, 5, 0, -4, 1000, "4", True))
        out = (torch.empty(rows, n, dtype=x.dtype), torch.empty(n, rows, dtype=x.dtype).t(),
               torch.empty(rows, n + 1, dtype=x.dtype),
               torch.empty(1, n, dtype=x.dtype).expand(rows, -1), x if n == k else torch.empty(rows, n).double(),
               torch.empty(rows, 2 * n, dtype=x.dtype)[:, ::2])[rng.randrange(6)]
        before = x.clone().float()

        def use():
            ops.linear(x, weight, out, act_bits=act_bits)
            if act_bits not in (None, 4, 8, 16) or act_bits is True:
                raise Fault("takes act_bits that there are not", repr(act_bits))
            dense, shift = dequantize(weight)
            wanted = before @ dense.float().t() + shift
            if act_bits == 16 and wanted.numel() and not (out.float() - wanted).norm() < 0.02 * wanted.norm():
                raise Fault("a wrong result")

        return Case(use)

    def ranks(self, rng):
        """Of the quantiser: refused before any work."""
        rank, seed = rng.choice((0, -16, 17, 48, 1 << 40, 64, 33, -1, True)), rng.choice((0, -1, 1 << 70))
        device = rng.choice(("cpu", "cuda:99", "", "gpu", "meta", "\x1b[2J", "cuda:x"))
        precision = rng.choice(("int4", "int4", "nvfp4", "INT4", "", "\x1b[2J"))

        def use():
            run.quantize(self.dense_source(), self.folder / "new.safetensors", precision, rank, device=device, seed=seed)

        return Case(use, outcome=REFUSED, keeps=("new.safetensors.svdq-work",))

    def dense_source(self):
        class Source:
            name, shape, fingerprint = "flux", models.SHAPE, "1"

            def layer(self, name):
                raise Fault("work begins")

        return Source()

    mutations = {strengths: 55, ends_of_types: 20, linears: 15, ranks: 15}


CLASSES = (Names, Numbers)
