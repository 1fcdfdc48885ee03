"""LoRA through ComfyUI's own nodes, over HTTP, in the newest and in the oldest ComfyUI.

Most tests look at the network's very output. FLUX predicts v, and one Euler step from sigma 0.5 to 0 makes x - 0.5 v of x:
v follows from the latent files that go in and come out, as exactly as fp32 holds it. 'auto' computes in fp32 on a CPU.
"""

import contextlib
import itertools
import re
import urllib.parse

import numpy
import pytest
import torch
from safetensors.torch import load, load_file, save_file

from svdq_pack.workflows.headless.client import Failed

STRENGTH = 0.75                                 # that of the golden result
SIGMA, ONE_STEP = 0.5, "0.5, 0"
SCALE, SHIFT = 0.3611, 0.1159                   # a latent file holds x / SCALE + SHIFT

# Relative L2.
GOLDEN = 2e-5                                   # golden results of another CPU: see GOLDEN of inprocess/support.py
EXACT = 2e-6                                    # the same in fp32, in another order of operations: at most 7.4e-7 measured
# Of what a LoRA adds to v. The golden result has strength times down rounded to bf16, in the layers ComfyUI merges too;
# rounding nothing leads 2.1e-3 away from it, rounding in SVDQ layers alone 1.9e-3.
DELTA = 2e-3
DELTA_BFLOAT16 = 6e-3                           # and merging into layers kept in bf16 rounds their weights: 4.0e-3

SECOND = {                                      # a LoRA beside the golden one: layer -> (rank, out, in)
    "transformer_blocks.0.attn.to_q": (8, 128, 128),
    "transformer_blocks.0.attn.add_v_proj": (8, 128, 128),
    "transformer_blocks.0.attn.to_out.0": (4, 128, 128),
    "transformer_blocks.0.ff.net.0.proj": (16, 512, 128),
    "transformer_blocks.0.norm1_context.linear": (4, 768, 128),
    "single_transformer_blocks.0.attn.to_v": (4, 128, 128),
    "single_transformer_blocks.0.proj_mlp": (8, 512, 128),
    "single_transformer_blocks.0.proj_out": (4, 128, 640),
    "x_embedder": (4, 128, 64),
}


@pytest.fixture(scope="module")
def files(base, golden):
    """The golden input, and LoRAs good and bad, in the folders of the servers."""
    io, loras = golden("model_nvfp4_flux_dev_like.io"), base / "models" / "loras"
    # The sampler multiplies a latent without noise by 1 - sigma.
    latent = io["input.latent"].double() / (1 - SIGMA) / SCALE + SHIFT
    save_file({"latent_tensor": latent.float(), "latent_format_version_0": torch.tensor([])},
              base / "input" / "golden.latent")
    save_file({"0.cond": io["input.txt"], "0.pooled_output": io["input.y"], "0.guidance": io["input.guidance"][0]},
              base / "input" / "golden.safetensors")
    save_file(random_lora(SECOND), loras / "second.safetensors")
    save_file(random_lora({layer: (rank, 2 * n, 2 * k) for layer, (rank, n, k) in SECOND.items()}),
              loras / "wider-model.safetensors")
    rounded = load_file(loras / "peft.safetensors")
    for name in rounded:
        if ".lora_A." in name:
            rounded[name] = (STRENGTH * rounded[name].float()).bfloat16()
    save_file(rounded, loras / "rounded.safetensors")
    nan = random_lora(SECOND)
    nan["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"][0, 0] = float("nan")
    save_file(nan, loras / "nan.safetensors")
    other = {f"lora_unet_down_blocks_0_attentions_0_{layer}.lora_{way}.weight": torch.ones(shape)
             for layer in ("proj_in", "proj_out") for way, shape in (("down", (4, 320)), ("up", (320, 4)))}
    save_file(other, loras / "other-family.safetensors")
    whole = (loras / "peft.safetensors").read_bytes()
    (loras / "truncated.safetensors").write_bytes(whole[:len(whole) // 2])
    text_encoders = base / "models" / "text_encoders"
    text_encoders.mkdir(exist_ok=True)
    save_file({"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(3072, 768, dtype=torch.bfloat16)},
              text_encoders / "clip-l.safetensors")     # the rest stays uninitialised; nothing is encoded


def random_lora(layers):
    random, tensors = torch.Generator().manual_seed(4), {}
    for layer, (rank, n, k) in layers.items():
        tensors[f"transformer.{layer}.lora_A.weight"] = (torch.randn(rank, k, generator=random) / k ** 0.5).bfloat16()
        tensors[f"transformer.{layer}.lora_B.weight"] = (torch.randn(n, rank, generator=random) * 0.3).bfloat16()
    return tensors


@pytest.fixture(scope="module", params=["newest", "oldest"])
def server(request, files, servers):
    """In place of the fixture of all other files, which is the newest."""
    return servers(request.param)


class Prompt:
    """A graph in the making. Its methods add nodes and return the link to what they put out."""

    seeds = itertools.count()

    def __init__(self, server):
        self.server, self.nodes = server, {}

    def add(self, kind, **inputs):
        name = str(len(self.nodes) + 1)
        self.nodes[name] = {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}
        return [name, 0]

    def model(self, compute_dtype="auto"):
        return self.add("SVDQModelLoader", model_name="nvfp4.safetensors", compute_dtype=compute_dtype)

    def lora(self, model, *loras):
        for name, strength in loras:
            model = self.add("LoraLoaderModelOnly", model=model, lora_name=f"{name}.safetensors", strength_model=strength)
        return model

    def scheduled(self, name, *frames):
        """The golden prompt with a LoRA hook of (strength, start percent) keyframes."""
        keyframes = None
        for strength, start in frames:
            before = {"prev_hook_kf": keyframes} if keyframes else {}
            keyframes = self.add("CreateHookKeyframe", strength_mult=strength, start_percent=start, **before)
        hooks = self.add("CreateHookLoraModelOnly", lora_name=f"{name}.safetensors", strength_model=1.0)
        return self.add("ConditioningSetProperties", cond_NEW=self.conditioning(), strength=1.0, set_cond_area="default",
                        hooks=self.add("SetHookKeyframes", hooks=hooks, hook_kf=keyframes))

    def conditioning(self):
        return self.add("SVDQLoadConditioning", file="golden.safetensors")

    def sample(self, model, sigmas=ONE_STEP, conditioning=None, latent=None):
        """Euler without noise. The seed only keeps ComfyUI from taking the result of an earlier prompt."""
        conditioning = conditioning or self.conditioning()
        return self.add("SamplerCustom", model=model, add_noise=False, noise_seed=next(self.seeds), cfg=1.0,
                        positive=conditioning, negative=conditioning,
                        sampler=self.add("KSamplerSelect", sampler_name="euler"),
                        sigmas=self.add("ManualSigmas", sigmas=sigmas),
                        latent_image=latent or self.add("LoadLatent", latent="golden.latent"))

    def run(self, *latents):
        """What these links hold, as saved."""
        saved, executed = [self.add("SaveLatent", samples=link, filename_prefix="lora")[0] for link in latents], set()
        self.server.run(self.nodes, lambda kind, data: executed.add(data["node"]) if kind == "executing" else None)
        assert {name for name, node in self.nodes.items() if node["class_type"] == "SamplerCustom"} <= executed
        files = [self.server.outputs()[name]["latents"][0] for name in saved]
        return [load(self.server.get(f"/view?{urllib.parse.urlencode(file)}"))["latent_tensor"] for file in files]


@pytest.fixture
def prompt(server):
    return lambda: Prompt(server)


@pytest.fixture
def sampled(prompt):
    """sampled(*branches) -> a latent for each branch, a list of (LoRA, strength); all in one graph, from one loader."""
    def run(*branches, **options):
        made = prompt()
        model = made.model(**options)
        return made.run(*[made.sample(made.lora(model, *loras)) for loras in branches])
    return run


@pytest.fixture
def stock(prompt):
    """The same with ComfyUI's own FLUX of the dequantised weights."""
    def run(*branches):
        made = prompt()
        model = made.add("UNETLoader", unet_name="nvfp4-dense.safetensors", weight_dtype="default")
        return made.run(*[made.sample(made.lora(model, *loras)) for loras in branches])
    return run


@pytest.fixture
def v(golden):
    """v(latent) -> the network's output that led to it."""
    x = golden("model_nvfp4_flux_dev_like.io")["input.latent"].double()
    return lambda latent: (x - (latent.double() - SHIFT) * SCALE) / SIGMA


@pytest.fixture
def golden_v(golden):
    """Golden network output (plain, with the LoRA)."""
    return [golden(file)["weight_only.out_latent"].double()
            for file in ("model_nvfp4_flux_dev_like.io", "lora_model_nvfp4_flux_dev_like_expected")]


@pytest.fixture
def report(record_property):
    def report(**figures):
        for name, figure in figures.items():
            record_property(name, f"{figure:.2e}")
        print(*(f"{name} {figure:.2e}" for name, figure in figures.items()))
    return report


def distance(actual, expected):
    """Relative L2."""
    return ((actual - expected).norm() / expected.norm()).item()


# ---- what it computes

def check_delta(latents, v, golden_v, report, tolerance):
    """The float64 reference on a model without and with the golden LoRA, and on what the LoRA adds."""
    plain, changed = map(v, latents)
    without, with_it = map(distance, (plain, changed), golden_v)
    delta = distance(changed - plain, golden_v[1] - golden_v[0])
    report(without=without, with_it=with_it, delta=delta)
    assert without <= GOLDEN and delta <= tolerance


@pytest.mark.parametrize("name", ["peft", "kohya_bfl"])
def test_delta(name, sampled, v, golden_v, report):
    check_delta(sampled([], [(name, STRENGTH)]), v, golden_v, report, DELTA)


def test_delta_of_rounded_factors(sampled, v, golden_v, report):
    """A LoRA that holds what the golden result was computed from: nothing is left to round."""
    check_delta(sampled([], [("rounded", 1.0)]), v, golden_v, report, GOLDEN)


def test_delta_in_bfloat16(sampled, v, golden_v, report):
    """Unquantised layers in bf16, as on most GPUs; the arithmetic of ComfyUI on a CPU stays fp32."""
    check_delta(sampled([], [("peft", STRENGTH)], compute_dtype="bfloat16"), v, golden_v, report, DELTA_BFLOAT16)


def test_two_loras_in_both_orders(sampled, stock, v, report):
    """They agree with each other, and with ComfyUI's own FLUX."""
    first, second = ("peft", STRENGTH), ("second", 0.5)
    dense, with_first, with_both = map(v, stock([], [first], [first, second]))
    plain, one_way, other_way = map(v, sampled([], [first, second], [second, first]))
    delta, orders = distance(one_way - plain, with_both - dense), distance(one_way, other_way)
    report(delta=delta, orders=orders, second_lora=distance(with_both, with_first))
    assert orders <= EXACT and delta <= DELTA
    assert distance(with_both, with_first) > 0.1            # the second does something


def test_strengths_in_a_row(sampled, stock, v, report):
    """Each as ComfyUI's own FLUX has it; coming back to the first is bitwise."""
    dense, *references = map(v, stock([], *([("peft", strength)] for strength in (STRENGTH, -0.5))))
    plain, first, second, third = [sampled(loras)[0] for loras in
                                   ([], *([("peft", strength)] for strength in (STRENGTH, -0.5, STRENGTH)))]
    errors = [distance(v(latent) - v(plain), reference - dense) for latent, reference in zip((first, second), references)]
    report(first=errors[0], second=errors[1])
    assert max(errors) <= DELTA
    assert torch.equal(first, third)


def test_loader_with_clip(prompt, sampled):
    """'Load LoRA', which has a text encoder too, does to the model what 'Load LoRA (Model)' does."""
    made = prompt()
    clip = made.add("CLIPLoader", clip_name="clip-l.safetensors", type="stable_diffusion")
    lora = made.add("LoraLoader", model=made.model(), clip=clip, lora_name="peft.safetensors", strength_model=STRENGTH,
                    strength_clip=STRENGTH)
    assert torch.equal(*made.run(made.sample(lora)), *sampled([("peft", STRENGTH)]))


# ---- what it leaves alone

def test_removed_and_strength_zero(sampled):
    """Bit for bit the model without LoRA, whatever ran before."""
    plain, = sampled([])
    for between in ([("peft", STRENGTH)], [("second", 1.0), ("kohya_bfl", -0.5)]):
        assert not torch.equal(sampled(between)[0], plain)
        assert torch.equal(sampled([("peft", 0.0)])[0], plain)
        assert torch.equal(sampled([])[0], plain)


def test_branches(sampled, stock, v, report):
    """Branches of one graph with LoRAs of their own: each as if it were alone, in every order."""
    branches = [[], [("peft", STRENGTH)], [("second", 1.0)]]
    dense, *references = map(v, stock(*branches))
    alone = [sampled(branch)[0] for branch in branches]
    errors = [distance(v(latent) - v(alone[0]), reference - dense) for latent, reference in zip(alone[1:], references)]
    report(first=errors[0], second=errors[1])
    assert max(errors) <= DELTA
    for order in itertools.permutations(range(3)):
        for index, latent in zip(order, sampled(*(branches[index] for index in order))):
            assert torch.equal(latent, alone[index]), (order, index)


def test_scheduled_strength(prompt, sampled, report):
    """A LoRA hook that changes its strength at half the steps: what two samplers with constant strengths do in turn."""
    steps, start, end = "0.8, 0.6, 0.4, 0.2, 0", "0.8, 0.6, 0.4", "0.4, 0.2, 0"       # 75 % is sigma 0.51
    plain, = sampled([])
    made = prompt()
    model = made.model()
    strong, weak = (made.lora(model, ("peft", strength)) for strength in (STRENGTH, -0.5))
    in_turn, all_strong, all_weak, none = made.run(
        made.sample(weak, end, latent=made.sample(strong, start)),
        *[made.sample(which, steps) for which in (strong, weak, model)])
    made = prompt()
    model = made.model()
    scheduled, at_zero = made.run(
        made.sample(model, steps, made.scheduled("peft", (STRENGTH, 0.0), (-0.5, 0.75))),
        made.sample(model, steps, made.scheduled("peft", (0.0, 0.0))))
    error = distance(scheduled, in_turn)
    others = [distance(scheduled, other) for other in (all_strong, all_weak, none)]
    report(error=error, nearest_constant=min(others))
    assert error <= EXACT and min(others) > 1e-2
    assert torch.equal(at_zero, none)
    assert torch.equal(sampled([])[0], plain)


# ---- when things go wrong

@pytest.fixture
def unharmed(sampled):
    """with unharmed() as plain: the model, bare and with a good LoRA, computes the same before and after, bit for bit."""
    @contextlib.contextmanager
    def check():
        before = sampled([], [("peft", STRENGTH)])
        yield before[0]
        assert all(map(torch.equal, before, sampled([], [("peft", STRENGTH)])))
    return check


@pytest.fixture
def log(server):
    """log() -> what the server has said since the test began."""
    begin = server.process.log.stat().st_size
    return lambda: server.process.log.read_bytes()[begin:].decode()


def test_truncated_file(sampled, unharmed):
    with unharmed(), pytest.raises(Failed, match=r"LoraLoaderModelOnly\) failed: .*SafetensorError.*incomplete metadata"):
        sampled([("truncated", 1.0)])


def test_lora_of_another_family(sampled, unharmed, log):
    """None of its keys matches: as with any model, the log names them and nothing changes."""
    with unharmed() as plain:
        assert torch.equal(sampled([("other-family", 1.0)])[0], plain)
    assert "lora key not loaded: lora_unet_down_blocks_0" in log()


def test_lora_of_a_wider_model(sampled, v, unharmed, log):
    """Its keys match and its shapes do not: as with any model, the log says so and nothing changes."""
    with unharmed() as plain:
        assert distance(v(sampled([("wider-model", 1.0)])[0]), v(plain)) <= EXACT
    assert re.search("adapters of a LoRA do not fit .*double_blocks", log())


def test_nan_in_a_lora(sampled, unharmed):
    with unharmed(), pytest.raises(Failed, match="qkv.weight: the LoRA contains NaN or Inf.*get it again"):
        sampled([("nan", 1.0)])


# ---- the picture

def test_picture(run, graph):
    """A LoRA changes it, in both spellings alike; removed or at strength 0 it leaves the picture as it was."""
    def picture(name, strength):
        made = graph("nvfp4.safetensors", seed=9, model=["20", 0])
        made["20"] = {"class_type": "LoraLoaderModelOnly", "_meta": {"title": "LoRA"},
                      "inputs": {"model": ["1", 0], "lora_name": f"{name}.safetensors", "strength_model": strength}}
        return pixels(run(made))

    def pixels(images):
        return numpy.asarray(images[0]).astype(int)

    plain = pixels(run(graph("nvfp4.safetensors", seed=9)))
    peft, kohya = picture("peft", STRENGTH), picture("kohya_bfl", STRENGTH)
    assert abs(peft - plain).max() > 10
    assert abs(peft - kohya).max() <= 1
    assert (picture("peft", 0.0) == plain).all()
    assert (pixels(run(graph("nvfp4.safetensors", seed=9, filename_prefix="again"))) == plain).all()
