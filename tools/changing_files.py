#!/usr/bin/env python3
"""A model, a LoRA and a conditioning file that are cut or written over while ComfyUI loads and uses them.

    python3 tools/changing_files.py [--times 200] [--stock-lora]

Each time one of the three files of the demo is cut, emptied, or written over in place with another sound file of the same
size, at a random moment of: load the model, the LoRA and the conditioning through our nodes, sample two steps. Right is one
error of ours, or the latent that the file gives as it was or as it is now, bit for bit. Everything runs in a process of its
own; one that ends with a signal is counted and started again. --stock-lora loads the LoRA by ComfyUI's own node, which maps it.

Prints the counts; the exit code is 1 when one was wrong.
"""

import argparse
import collections
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = {"model": "svdq-int4_r16-demo.safetensors", "lora": "svdq-demo-sticker.safetensors", "cond": "prompt.safetensors"}
CHANGES = ("cut", "empty", "write over")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--stock-lora", action="store_true")
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)       # the first time of a process
    options = parser.parse_args()
    if options.inside is not None:
        return inside(options)
    if "COMFYUI_DIR" not in os.environ:
        sys.path.insert(0, str(ROOT / "workflows"))
        from headless import environment
        comfy = environment.find() or environment.make()
        os.environ["COMFYUI_DIR"], python = str(comfy.comfy), str(comfy.python)
    else:
        python = sys.executable
    counts, first = collections.Counter(), 0
    while first < options.times:                    # the next time after those that have said how they ended
        command = [python, __file__, *sys.argv[1:], "--inside", str(first)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"SVDQ_COMFYUI":
                                                                                                 os.environ["COMFYUI_DIR"]})
        for line in process.stdout:
            if line.startswith("{"):
                first, outcome = json.loads(line)["next"], json.loads(line)["outcome"]
                counts[outcome] += 1
        if process.wait() > 0:
            return process.returncode               # no signal: the script itself has failed
        if process.returncode:
            counts[f"wrong: the process ended with signal {-process.returncode}"] += 1
            first += 1
    for outcome, count in sorted(counts.items()):
        print(f"{count:5} {outcome}")
    return int(any(outcome.startswith("wrong") for outcome in counts))


def inside(options):
    """Time after time, a line of JSON each."""
    pack = types.ModuleType("svdq_pack")
    pack.__path__ = [str(ROOT)]
    sys.modules["svdq_pack"] = pack
    sys.argv = sys.argv[:1]
    sys.path.pop(0)                                 # this folder
    from svdq_pack.tests.comfy.inprocess import support  # noqa: F401   ComfyUI, on the CPU
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder), options.stock_lora)
        for i in range(options.inside, options.times):
            print(json.dumps({"outcome": runner.time(i), "next": i + 1}), flush=True)


class Runner:
    def __init__(self, folder, stock_lora):
        import folder_paths
        import torch

        from nodes import LoraLoaderModelOnly
        from svdq_pack.nodes import demo, loaders, loras
        from svdq_pack.nodes.conditioning import SVDQLoadConditioning
        from svdq_pack.svdq.errors import PackError
        from svdq_pack.tests.comfy.inprocess import support

        self.torch, self.support, self.error = torch, support, PackError
        self.paths = {kind: folder / name for kind, name in FILES.items()}
        self.originals, self.others = {}, {}
        for kind, sub in (("model", "diffusion_models"), ("lora", "loras")):
            folder_paths.add_model_folder_path(sub, str(folder), is_default=True)
            self.originals[kind] = (demo.MODELS / sub / FILES[kind]).read_bytes()
        folder_paths.set_input_directory(str(folder))
        self.originals["cond"] = self._conditioning()
        self.load_model, self.load_cond = loaders.SVDQModelLoader.execute, SVDQLoadConditioning.execute
        if stock_lora:
            # A new node each time: one that is kept keeps its file
            self.load_lora = lambda *given: LoraLoaderModelOnly().load_lora_model_only(*given)
        else:
            self.load_lora = lambda *given: loras.SVDQLoraLoader.execute(*given).result
        with torch.no_grad():
            for kind, raw in self.originals.items():
                self.paths[kind].write_bytes(raw)
            for kind, raw in self.originals.items():
                self.others[kind] = changed(raw)
            self.right = {kind: [self.latent()] for kind in FILES}
            for kind in FILES:
                self.paths[kind].write_bytes(self.others[kind])
                self.right[kind].append(self.latent())
                assert not torch.equal(*self.right[kind]), f"the other {kind} changes nothing"
                self.restore(kind)
            start = time.perf_counter()
            self.latent()
            self.seconds = time.perf_counter() - start

    def _conditioning(self):
        from safetensors.torch import save

        from svdq_pack.svdq.demo import encode
        cond, pooled = encode("a red star left of a blue ring on a yellow background")
        return save({"0.cond": cond, "0.pooled_output": pooled})

    def restore(self, kind):
        """The file as it was, of another time each time, so that nobody keeps what came of it before."""
        new = self.paths[kind].with_suffix(".new")
        new.write_bytes(self.originals[kind])
        self.restored = getattr(self, "restored", 0) + 1
        os.utime(new, (self.restored, self.restored))
        os.replace(new, self.paths[kind])

    def latent(self):
        model = self.load_model(FILES["model"], "auto", "16").result[0]
        model = self.load_lora(model, FILES["lora"], 1.0)[0]
        cond = self.load_cond(FILES["cond"]).result[0]
        return self.sample(model, cond)

    def sample(self, model, cond):
        support = self.support
        with self.torch.random.fork_rng():
            return support.comfy.sample.sample(
                model, support.noise(1, 16, 20, 20), 2, 1.0, "euler", "simple", cond, cond, self.torch.zeros(1, 16, 20, 20),
                seed=1, disable_pbar=True)

    def time(self, seed):
        rng = random.Random(seed)
        kind, change = rng.choice(list(FILES)), rng.choice(CHANGES)
        self.restore(kind)
        delay = rng.uniform(0, self.seconds * rng.choice((0.05, 0.3, 1)))
        writer = threading.Thread(target=self.change, args=(rng, self.paths[kind], self.others[kind], change, delay))
        writer.start()
        try:
            with self.torch.no_grad():
                latent = self.latent()
            outcome = "the right latent" if any(self.torch.equal(latent, one) for one in self.right[kind]) else (
                "wrong: another latent")
        except self.error as error:
            outcome = "one error of ours"
            if not str(error).isprintable() or FILES[kind] not in str(error):
                outcome = f"wrong: {error}"
        except Exception as error:                      # whatever it is, it is none of ours
            outcome = f"wrong: {type(error).__name__}"
        writer.join()
        self.restore(kind)
        return f"{outcome} ({kind}, {change})"

    @staticmethod
    def change(rng, path, other, change, delay):
        time.sleep(delay)
        if change == "write over":
            with path.open("r+b") as file:
                file.write(other)
        else:
            os.truncate(path, 0 if change == "empty" else rng.randrange(len(other)))


def changed(raw):
    """Another sound file of the same size: matrices of floats have the other sign."""
    end, made = 8 + int.from_bytes(raw[:8], "little"), bytearray(raw)
    for name, entry in json.loads(raw[8:end]).items():
        size = {"BF16": 2, "F16": 2, "F32": 4}.get(entry.get("dtype"))
        if size and len(entry["shape"]) > 1 and not name.endswith(("wscales", "wzeros", "down.weight", "lora_A.weight")):
            start, stop = (end + at for at in entry["data_offsets"])
            made[start + size - 1:stop:size] = bytes(byte ^ 0x80 for byte in made[start + size - 1:stop:size])
    return bytes(made)


if __name__ == "__main__":
    sys.exit(main())
