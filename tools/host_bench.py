#!/usr/bin/env python3
"""What the pack costs inside ComfyUI on this machine, each figure beside its baseline of the same run. Kernels on a GPU are
timed by `python svdq bench` instead.

    python3 tools/host_bench.py [import] [load] [blocks] [step] [lora] [forward] [t5] [--keep FILE] [--small] [--tokens N]

import  time for ComfyUI to import the pack, beside its import of torch and its own nodes
load    a FLUX.1-dev-sized INT4 file (6.8 GB, made from random numbers): seconds and peak memory of loading it, beside
        safetensors alone reading the same bytes into new tensors. Three times in turn, each in its own process, file in
        the page cache; then the ratio of each pair. With --small 9 of the 57 blocks (1.2 GB), for where 6.8 do not stay there
blocks  one double and one single block of FLUX.1 size: SVDQ layers beside dense ones, in the dtype that the loader picks
step    one step of the same file at 512 x 512, once, and again
lora    a rank-32 LoRA on every layer of the same file, by ComfyUI's own LoRA node: to attach it, to change its strength, to
        remove it, and 50 times all three; beside dequantising, adding and requantising each layer once

forward a layer's forward without the product: what Python and torch take around the kernels, beside a 16-bit F.linear of
        256 x 256 with ComfyUI's casting around it
t5      one layer of ComfyUI's T5-XXL for a prompt of 256 tokens, its weights 4-bit as in awq-int4-flux.1-t5xxl, in fp16, and in
        fp32, which is what it computes in

Without names it runs all. Needs 7 GB of disk and 16 GB of memory for `load`, `step` and `lora`. Prints one JSON object per row.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import types
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "workflows"))
REPEATS, ROUNDS = 5, 3
BENCHES = ["import", "load", "blocks", "step", "lora", "forward", "t5"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *BENCHES], metavar="NAME")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="where to make the big file, and leave it")
    parser.add_argument("--small", action="store_true", help="make the big file of 3 + 6 blocks instead of 19 + 38")
    parser.add_argument("--tokens", type=int, default=1280, help="image and text tokens together; 512 x 512 has 1024 + 256")
    parser.add_argument("--inside", help=argparse.SUPPRESS)         # one measurement, in a process of its own
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(INSIDE[options.inside](options)), flush=True)
        return
    from headless import environment
    env = environment.find() or environment.make()

    def row(measurement, *arguments):
        command = [str(env.python), str(Path(__file__).resolve()), "--inside", measurement, *map(str, arguments)]
        done = subprocess.run(command, env=os.environ | {"COMFYUI_DIR": str(env.comfy)}, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"host_bench.py: {measurement} failed with exit code {done.returncode}")
        found = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps({"bench": measurement} | found), flush=True)
        return found

    names = options.names or BENCHES
    print(json.dumps({"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                      "date": time.strftime("%Y-%m-%d")}))
    if "import" in names:
        row("import")
    if {"load", "step", "lora"} & set(names):
        with tempfile.TemporaryDirectory(dir=ROOT) as folder:
            path = options.keep or Path(folder, "svdq-int4_r32-bench.safetensors")
            if not path.exists():
                row("make_file", "--keep", path, *["--small"] * options.small)
            if "load" in names:
                row("read_safetensors", "--keep", path)         # brings the file into the page cache
                pairs = [[row(name, "--keep", path)["s"] for name in ("read_safetensors", "load_svdq")] for _ in range(ROUNDS)]
                print(json.dumps({"load_over_safetensors": [round(ours / theirs, 2) for theirs, ours in pairs]}), flush=True)
            for name in ("step", "lora"):
                if name in names:
                    row(name, "--keep", path)
    if "blocks" in names:
        row("blocks", "--tokens", options.tokens)
    if "forward" in names:
        row("forward")
    if "t5" in names:
        row("t5")


def the_pack():
    """The pack as a package, without its root __init__."""
    pack = types.ModuleType("svdq_pack")
    pack.__path__ = [str(ROOT)]
    sys.modules["svdq_pack"] = pack


def comfy_imported():
    """ComfyUI in this process, on the CPU, and the pack beside it."""
    import torch

    comfy = os.environ["COMFYUI_DIR"]
    sys.argv = sys.argv[:1]
    sys.path.insert(0, comfy)
    from headless import comfy_main, maker
    if maker.vision_cannot_load().exists():
        sys.modules["operators"] = comfy_main.declare_operators()       # anything that keeps it alive will do
    import comfy.cli_args
    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    the_pack()


def bench_import(options):
    start = time.perf_counter()
    comfy_imported()
    import nodes  # noqa: F401, I001   ComfyUI's own, and its server: both are loaded before any pack
    import server  # noqa: F401
    own = time.perf_counter() - start
    start = time.perf_counter()
    import svdq_pack.nodes  # noqa: F401
    return {"comfyui_and_torch_s": round(own, 2), "pack_s": round(time.perf_counter() - start, 3)}


def flux_dev(depth=19, depth_single=38):
    from svdq_pack.svdq.families import flux1
    return flux1.Shape(hidden=3072, depth=depth, depth_single=depth_single, in_features=64, context_dim=4096, vec_dim=768,
                       guidance=True)


def make_file(options):
    """A FLUX.1-dev-sized INT4 checkpoint of random codes, scales near those of a real one."""
    the_pack()
    import torch

    from svdq_pack.svdq.checkpoint import metadata_for
    from svdq_pack.svdq.container import NAMES, TensorInfo, write_tensors

    shape = flux_dev(*((3, 6) if options.small else ()))

    def tensors():
        for slot in shape.slots():
            yield from random_slot(slot, 32).items()
        for name, size in shape.plain():
            yield name, torch.full(size, float(".norm_" in name), dtype=torch.bfloat16)

    with torch.device("meta"):
        specs = {name: TensorInfo(NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors()}
    start = time.perf_counter()
    write_tensors(options.keep, specs, metadata_for(shape, "int4", 32), tensors())
    return {"bytes": options.keep.stat().st_size, "tensors": len(specs), "s": round(time.perf_counter() - start, 1)}


def random_slot(slot, rank):
    import torch

    from svdq_pack.svdq.format import slot_tensors
    from svdq_pack.svdq.kernels.weights import AWQWeight, W4A4Weight

    def half(*size):
        return torch.full(size, 0.01, dtype=torch.bfloat16)

    if slot.kind == "awq":
        codes = torch.empty(slot.n // 4, slot.k // 2, dtype=torch.int32)
        weight = AWQWeight(codes, half(slot.k // 64, slot.n), half(slot.k // 64, slot.n))
    else:
        codes = torch.empty(slot.n, slot.k // 2, dtype=torch.int8)
        weight = W4A4Weight("int4", slot.unsigned("int4"), codes, half(slot.k // 64, slot.n), half(slot.k), half(slot.k, rank),
                            half(slot.n, rank))
    if not codes.is_meta:
        codes.view(torch.uint8).random_()
    return slot_tensors(slot, weight, torch.zeros(slot.n))


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read_safetensors(options):
    """The floor: every tensor of the file copied into memory of its own, nothing else."""
    import torch  # noqa: F401   which the library imports otherwise, while the clock runs
    from safetensors import safe_open

    before, start = peak_bytes(), (time.perf_counter(), time.process_time())
    with safe_open(str(options.keep), framework="pt") as file:
        kept = [file.get_tensor(name).clone() for name in file.keys()]
    return memory(options, before, start) | {"tensors": len(kept)}


def load_svdq(options):
    comfy_imported()
    import torch

    from svdq_pack.nodes.host.load import load_model

    before, start = peak_bytes(), (time.perf_counter(), time.process_time())
    patcher = load_model(str(options.keep), torch.bfloat16)         # the file's own: nothing is converted
    return memory(options, before, start) | {"model_bytes": patcher.model_size()}


def memory(options, before, start):
    seconds, cpu = (clock() - at for clock, at in zip((time.perf_counter, time.process_time), start))
    size = options.keep.stat().st_size
    grown = peak_bytes() - before
    return {"s": round(seconds, 2), "cpu_s": round(cpu, 2), "gb_per_s": round(size / seconds / 1e9, 2), "file_bytes": size,
            "peak_rss_growth_bytes": grown, "peak_over_file": round(grown / size, 3)}


def blocks(options):
    """Median seconds of one forward pass of each block, in turn with our layers and with dense ones of the same values, in the
    dtype that the loader picks."""
    comfy_imported()
    import comfy.model_management as management
    import comfy.ops
    import torch
    from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock

    from svdq_pack.nodes.host.layer import SVDQOps

    shape, dtype = flux_dev(), management.unet_dtype(torch.device("cpu"), 6 << 30)
    text = min(512, options.tokens // 5)
    image, vec = torch.randn(1, options.tokens - text, 3072, dtype=dtype), torch.randn(1, 3072, dtype=dtype)
    txt = torch.randn(1, text, 3072, dtype=dtype)
    pe = torch.eye(2).expand(1, 1, options.tokens, 64, 2, 2)
    heads = dict(hidden_size=3072, num_heads=24, mlp_ratio=4.0, dtype=dtype)
    threads = range(1, torch.get_num_threads() + 1)
    result = {"tokens": options.tokens, "dtype": str(dtype).removeprefix("torch.")}
    for name, kind, call in (
            ("double", DoubleStreamBlock, lambda block: block(img=image, txt=txt, vec=vec, pe=pe)),
            ("single", SingleStreamBlock, lambda block: block(torch.cat((txt, image), 1), vec=vec, pe=pe))):
        extra, made = {"qkv_bias": True} if name == "double" else {}, {}
        for label, operations in (("svdq", SVDQOps), ("dense", comfy.ops.manual_cast)):
            made[label] = kind(**heads, **extra, operations=operations)
            kept = block_state(shape, f"{name}_blocks.0.", made[label], dtype if label == "dense" else None)
            made[label].load_state_dict(kept, strict=False)
        for count in threads:
            torch.set_num_threads(count)
            with torch.inference_mode():
                seconds = medians({label: partial(call, block) for label, block in made.items()})
            result |= {f"{name}_{label}_{count}_threads_s": round(value, 3) for label, value in seconds.items()}
            result[f"{name}_{count}_threads_svdq_over_dense"] = round(seconds["svdq"] / seconds["dense"], 2)
    return result


def step(options):
    """Seconds of one step of the big file at 512 x 512 with 256 tokens of text, the first and the second."""
    comfy_imported()
    import torch

    from svdq_pack.nodes.host.load import load_model

    model = load_model(str(options.keep), say=print).model.diffusion_model
    x, context = torch.randn(1, 16, 64, 64), torch.randn(1, 256, 4096)
    result = {"tokens": 1280, "threads": torch.get_num_threads(), "dtype": str(model.dtype).removeprefix("torch.")}
    with torch.inference_mode():
        for name in ("first", "second"):
            start = time.perf_counter(), time.process_time()
            model(x.to(model.dtype), torch.ones(1), context.to(model.dtype), torch.randn(1, 768).to(model.dtype),
                  guidance=torch.ones(1))
            result |= {f"{name}_s": round(time.perf_counter() - start[0], 1), f"{name}_cpu_s":
                       round(time.process_time() - start[1], 1)}
    return result


def t5(options):
    """Median seconds of one layer, the kinds of weights in turn."""
    comfy_imported()
    import comfy.ops
    import torch
    from comfy.ldm.modules.attention import optimized_attention_for_device
    from comfy.text_encoders.t5 import T5Block

    from svdq_pack.nodes.host.layer import SVDQOps
    from svdq_pack.svdq.format import Tile, pack_tiles
    from svdq_pack.svdq.kernels.weights import AWQ128Weight
    from svdq_pack.svdq.text_encoder import T5XXL

    packed = {}
    for module, (n, k) in T5XXL.linears().items():
        name = module.removeprefix("encoder.block.0.")
        if name != module:
            scales = torch.rand(k // 128, n).half() / k ** 0.5
            codes = torch.randint(-32768, 32768, (n // 4, k), dtype=torch.int16)
            tiles = pack_tiles([Tile(0, 0, AWQ128Weight(codes, scales, -7 * scales))])
            description = torch.frombuffer(bytearray(tiles.description(), "utf-8"), dtype=torch.uint8)
            packed |= {f"{name}.weight": tiles.stored, f"{name}.svdq": description}
    x, attention = torch.randn(1, 256, T5XXL.d_model), optimized_attention_for_device(torch.device("cpu"), small_input=True)
    blocks = {}
    for label, operations, dtype in (("svdq", SVDQOps, torch.float16), ("fp16", comfy.ops.manual_cast, torch.float16),
                                     ("fp32", comfy.ops.manual_cast, torch.float32)):
        blocks[label] = T5Block(T5XXL.d_model, T5XXL.d_model, T5XXL.d_ff, "gelu_pytorch_tanh", True, T5XXL.num_heads, False,
                                dtype, "cpu", operations)
        for parameter in blocks[label].parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    blocks["svdq"].load_state_dict(packed, strict=False)
    result = {"tokens": 256, "threads": torch.get_num_threads()}
    with torch.inference_mode():
        for label, block in blocks.items():
            result[f"{label}_s"] = round(median(partial(block, x, optimized_attention=attention)), 3)
    return result | {f"svdq_over_{label}": round(result["svdq_s"] / result[f"{label}_s"], 2) for label in ("fp16", "fp32")}


def forward(options):
    """Microseconds of CPU time of one forward, medians, whose product does nothing."""
    comfy_imported()
    from dataclasses import replace

    import comfy.ops
    import torch

    from svdq_pack.nodes.host.layer import SVDQLinear
    from svdq_pack.svdq.format import Tile, pack_tiles
    from svdq_pack.svdq.kernels import check, registry

    registry.VARIANTS = tuple(replace(variant, prepare=lambda x, weight: x, product=lambda *_: None, max_rank=None)
                              for variant in registry.VARIANTS)
    torch.set_num_threads(1)
    size = 256

    def microseconds(run):
        times = []
        for _ in range(15):
            start = time.process_time()
            for _ in range(100):
                run()
            times.append(time.process_time() - start)
        return round(sorted(times)[len(times) // 2] * 1e4, 1)

    def layer(kind, *heights):
        tiles = [Tile(sum(heights[:i]), 0, check.random_weight(kind, torch.bfloat16, n, size)[0])
                 for i, n in enumerate(heights)]
        packed = pack_tiles(tiles)
        made = SVDQLinear(size, sum(heights))
        made.load_state_dict({"weight": packed.stored, "bias": torch.zeros(sum(heights)),
                              "svdq": torch.frombuffer(bytearray(packed.description(), "utf-8"), dtype=torch.uint8)})
        return made

    layers = {"one tile": layer("int4", size), "two tiles": layer("int4", 3 * size, 4 * size),
              "modulation": layer("awq", 6 * size)}
    dense = comfy.ops.manual_cast.Linear(size, size, dtype=torch.bfloat16)
    result = {}
    with torch.inference_mode():
        for name, this in layers.items():
            x = torch.zeros(*((1, size) if name == "modulation" else (1, 2, size)), dtype=torch.bfloat16)
            bias = this.bias.to(x.dtype)
            result[f"{name}, with ComfyUI's casting"] = microseconds(partial(this, x))
            result[f"{name}, ours alone"] = microseconds(partial(this.forward_packed, x, this.weight, bias))
        result["F.linear, with ComfyUI's casting"] = microseconds(partial(dense, torch.zeros(1, 2, size, dtype=torch.bfloat16)))
    return result


def block_state(shape, prefix, block, dense):
    """Random weights for one block: packed as our loader packs them, or the same numbers dense in this dtype."""
    import torch

    from svdq_pack.svdq.families.family import by_layer
    from svdq_pack.svdq.format import Tile, pack_tiles, read_slot
    from svdq_pack.svdq.kernels import weights

    torch.manual_seed(0)
    state = {name: torch.ones_like(value) for name, value in block.state_dict().items() if "norm" in name}
    for layer in by_layer(place for place in shape.comfy_places() if place.layer.startswith(prefix)):
        tiles = []
        for place in layer.places:
            weight, _ = read_slot(place.slot, "int4", random_slot(place.slot, 32))
            tiles.append(Tile(place.row, place.col, weight))
        name, rows = layer.name.removeprefix(prefix), layer.n
        if dense:
            full = torch.zeros(rows, layer.k, dtype=dense)
            for tile in tiles:
                n, k = tile.weight.shape
                full[tile.row:tile.row + n, tile.col:tile.col + k] = weights.dequantize(tile.weight)[0]
            state[f"{name}.weight"] = full
        else:
            packed = pack_tiles(tiles)
            state[f"{name}.weight"] = packed.stored
            state[f"{name}.svdq"] = torch.frombuffer(bytearray(packed.description(), "utf-8"), dtype=torch.uint8)
        state[f"{name}.bias"] = torch.zeros(rows, dtype=torch.bfloat16)
    return state


def lora(options):
    """Seconds of each step as a user sees them: the LoRA node, then the loading that precedes sampling."""
    comfy_imported()
    import comfy.model_management as management
    import folder_paths
    import torch
    from safetensors.torch import save_file

    from nodes import LoraLoaderModelOnly
    from svdq_pack.nodes.host.load import load_model

    path = Path(options.keep).with_name("bench-lora.safetensors")
    folder_paths.add_model_folder_path("loras", str(path.parent))
    times, node = {}, LoraLoaderModelOnly()

    def timed(name, call):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.setdefault(name, []).append(time.perf_counter() - start)
        return result

    def attach(step, strength):
        changed = timed(f"{step}_node", lambda: node.load_lora_model_only(patcher, path.name, strength)[0])
        timed(f"{step}_load", lambda: management.load_models_gpu([changed]))

    with torch.inference_mode():
        patcher = load_model(str(options.keep))
        management.load_models_gpu([patcher])
        factors = {}
        for key, layer in patcher.layers().items():
            for name, size in (("lora_A", (32, layer.in_features)), ("lora_B", (layer.out_features, 32))):
                factors[f"{key.removesuffix('weight')}{name}.weight"] = torch.randn(size, dtype=torch.bfloat16) * 0.01
        save_file(factors, path)
        try:
            attach("first", 1.0)                    # the file is read
            memory = []
            for _ in range(50):
                attach("strength", 0.5)
                timed("remove", lambda: management.load_models_gpu([patcher]))
                attach("attach", 1.0)
                memory.append(resident_bytes())
        finally:
            path.unlink()
        added = sum(layer.lora.nbytes for layer in patcher.layers().values())
        kinds, requantise = {}, 0.0
        for key, layer in patcher.layers().items():
            kinds.setdefault((layer.out_features, layer.in_features, len(layer.description["tiles"])), []).append(key)
        for keys in kinds.values():                 # one layer of each shape stands for all of it
            layer, prefix = patcher.layers()[keys[0]], keys[0].removesuffix("weight")
            up, down = (factors[f"{prefix}{name}.weight"].to(layer.weight.device) for name in ("lora_B", "lora_A"))
            requantise += len(keys) * timed_once(partial(requantised, layer, up, down))
    seconds = {f"{name}_s": round(sorted(values)[len(values) // 2], 3) for name, values in times.items()}
    return {"layers": len(patcher.layers()), "factors_bytes": added, **seconds,
            "strength_load_max_s": round(max(times["strength_load"]), 3), "attach_load_max_s":
            round(max(times["attach_load"]), 3), "requantise_s": round(requantise, 1),
            "resident_after_10_cycles": memory[9], "resident_after_50_cycles": memory[49]}


def requantised(layer, up, down):
    """The baseline: dequantise a layer, add the change, quantise it again, each group of 64 to its own largest value."""
    import torch

    from svdq_pack.svdq.kernels import layout

    dense, _ = layer.dense(layer.weight)
    dense.addmm_(up.float(), down.float())
    groups = dense.view(len(dense), -1, 64)
    scales = groups.abs().amax(-1, keepdim=True) / 7
    codes = (groups / scales).round_().nan_to_num_().to(torch.int8).view_as(dense)
    return layout.pack_codes(codes), layout.pack_scales(scales[..., 0].bfloat16())


def timed_once(call):
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def median(call):
    return medians({"": call})[""]


def medians(calls):
    """{name: median seconds} of calls that take turns."""
    times = {name: [] for name in calls}
    for _ in range(1 + REPEATS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: sorted(seconds[1:])[REPEATS // 2] for name, seconds in times.items()}


INSIDE = {"import": bench_import, "make_file": make_file, "read_safetensors": read_safetensors, "load_svdq": load_svdq,
          "blocks": blocks, "step": step, "lora": lora, "forward": forward, "t5": t5}

if __name__ == "__main__":
    main()
