"""Modulations in one launch are those that modules make one by one, to the bit, wherever their bytes lie."""

import copy
import pickle
import shutil
import weakref

import pytest
import torch

from svdq_pack.nodes.host import blocks
from svdq_pack.nodes.host.layer import Borrowed, SVDQLinear
from svdq_pack.nodes.host.modulations import Modulations
from svdq_pack.svdq.kernels.errors import ShapeError
from svdq_pack.svdq.kernels.variants import awq_gemv
from svdq_pack.tests.comfy.inprocess.support import noise, pretend_gpu, with_lora

import comfy.model_management   # noqa: E402, comes from the tree that support has chosen
import comfy.ops                # noqa: E402

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
CPU, DTYPE = torch.device("cpu"), torch.bfloat16
DOUBLE, SINGLE = 2, 3
COUNT = 2 * DOUBLE + SINGLE             # modulations of a step


@pytest.fixture
def model(make_model):
    return make_model(depth=DOUBLE, depth_single=SINGLE)


@pytest.fixture
def fused(monkeypatch):
    """The kernels launched, as on an RTX 40, whose blocks fuse."""
    monkeypatch.setattr(SVDQLinear, "kernels_do_epilogues", lambda layer, x: True)
    return pretend_gpu(monkeypatch, (8, 9))


@pytest.fixture
def batches(monkeypatch):
    """How many layers each launch was for."""
    sizes, original = [], awq_gemv.awq_gemv
    monkeypatch.setattr(awq_gemv, "awq_gemv", lambda x, *tensors: sizes.append(len(tensors[0])) or original(x, *tensors))
    return sizes


@pytest.fixture
def one_by_one(monkeypatch):
    """one_by_one(run): what it returns where each module is called."""
    def alone(run):
        with monkeypatch.context() as patch:
            patch.setattr(Modulations, "of", lambda self, block, vec, _: [module(vec) for module in block.modulation_modules])
            return run()
    return alone


def modules(network):
    return [module for block in (*network.double_blocks, *network.single_blocks) for module in block.modulation_modules]


def run(patcher, **options):
    """The network's output for inputs of one picture, loaded as before sampling."""
    comfy.model_management.load_models_gpu([patcher])
    network = patcher.model.diffusion_model
    params = network.params
    given = {"x": noise(1, 16, 6, 8), "context": noise(1, 5, params.context_in_dim, seed=1),
             "y": noise(1, params.vec_in_dim, seed=2), "timestep": torch.tensor([0.6]), "guidance": torch.tensor([3.5])}
    return network(**{name: value.to(DTYPE) for name, value in given.items()}, transformer_options=options)


def lora_of(layers):
    """A kohya file of rank 4 for these layers of a model."""
    return {f"lora_unet_{name.replace('.', '_')}.lora_{half}.weight": 0.1 * noise(*shape, seed=len(name))
            for name, layer in layers.items() for half, shape in (("down", (4, layer.in_features)),
                                                                  ("up", (layer.out_features, 4)))}


@pytest.mark.parametrize("lora", [False, True])
def test_two_launches_of_a_step(lora, model, fused, batches, one_by_one):
    patcher = model.load(DTYPE, None)
    if lora:
        network = patcher.model.diffusion_model
        without, patcher = run(patcher), with_lora(patcher, lora_of({
            "double_blocks.1.txt_mod.lin": network.double_blocks[1].txt_mod.lin,
            "single_blocks.2.modulation.lin": network.single_blocks[2].modulation.lin}))
    batches.clear()
    expected = one_by_one(lambda: run(patcher))
    assert batches == [1] * COUNT
    batches.clear()
    assert torch.equal(run(patcher), expected)
    assert batches == [2, COUNT - 2]                            # a double block's two, then all others
    assert not lora or not torch.equal(expected, without)
    shared = patcher.model.diffusion_model.double_blocks[0].modulations
    assert not shared._made and shared._vec is None             # nothing stays behind


def test_patched_blocks_get_their_own(model, fused, batches, one_by_one):
    """What stands in the place of a block may change the vector where it lies."""
    patcher = model.load(DTYPE, None)

    def louder(args, extra):
        args["vec"].mul_(1.5)
        return extra["original_block"](args)

    patch = {"patches_replace": {"dit": {("single_block", 0): louder}}}
    plain, changed = run(patcher), one_by_one(lambda: run(patcher, **patch))
    batches.clear()
    assert torch.equal(run(patcher, **patch), changed) and not torch.equal(changed, plain)
    assert batches == [2] * DOUBLE + [1] * SINGLE


@pytest.mark.parametrize("hooked", range(COUNT))
def test_a_hook_gets_its_call(hooked, model, fused, batches, one_by_one):
    patcher = model.load(DTYPE, None)
    plain = run(patcher)
    module, calls = modules(patcher.model.diffusion_model)[hooked], []
    handle = module.lin.register_forward_hook(lambda *given: calls.append(hooked) or 1.5 * given[-1])
    expected = one_by_one(lambda: run(patcher))
    assert calls == [hooked] and not torch.equal(expected, plain)
    batches.clear()
    assert torch.equal(run(patcher), expected) and calls == [hooked] * 2
    assert len(batches) <= 4 and sum(batches) == COUNT
    handle.remove()
    assert torch.equal(run(patcher), plain)


@pytest.mark.parametrize("where", range(DOUBLE + SINGLE))
@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward"])
def test_a_hooked_block_may_change_the_vector(how, where, model, fused, batches, one_by_one):
    """Where it lies: what was made ahead is not used afterwards."""
    patcher = model.load(DTYPE, None)
    network = patcher.model.diffusion_model
    plain, block = run(patcher), (*network.double_blocks, *network.single_blocks)[where]

    def louder(module, args, given, *out):
        given["vec"].mul_(1.5)

    if how == "forward":
        original, block.forward = block.forward, lambda *args, **given: louder(block, args, given) or original(*args, **given)
    elif how == "hook":
        block.register_forward_hook(louder, with_kwargs=True)
    else:
        block.register_forward_pre_hook(louder, with_kwargs=True)
    expected = one_by_one(lambda: run(patcher))
    batches.clear()
    assert torch.equal(run(patcher), expected) and not torch.equal(expected, plain)
    assert sum(batches) == COUNT and len(batches) <= 4
    assert not block.modulations._made


def test_while_a_graph_is_captured(model, fused, batches, monkeypatch):
    """A graph is replayed with other numbers in the same vector: all that it needs of it is in it."""
    class OnGPU(torch.Tensor):
        is_cuda = True

    network = model.load(DTYPE, None).model.diffusion_model
    shared, all_blocks = network.double_blocks[0].modulations, (*network.double_blocks, *network.single_blocks)
    vec = noise(1, network.params.hidden_size).to(DTYPE).as_subclass(OnGPU)
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    for block in all_blocks[:2]:
        shared.of(block, vec, True)
    batches.clear()
    capturing = True
    for block in all_blocks[:3]:
        shared.of(block, vec, True)
    assert batches == [1] * 5
    vec.mul_(2)
    capturing = False
    assert torch.equal(shared.of(all_blocks[2], vec, True)[0][0].shift, all_blocks[2].modulation(vec)[0].shift)


def test_new_vector_new_modulations(model, fused):
    """A step's are not the next one's; who asks twice gets the same; a module out of line gets its own."""
    network = model.load(DTYPE, None).model.diffusion_model
    shared, order = network.double_blocks[0].modulations, [*network.double_blocks, *network.single_blocks]
    first, second = (noise(1, network.params.hidden_size, seed=seed).to(DTYPE) for seed in (1, 2))

    def check(asked, vec):
        for made, module in zip(shared.of(asked, vec, True), asked.modulation_modules, strict=True):
            for ours, own in zip(made, module(vec), strict=True):
                assert (ours is own is None) or all(torch.equal(getattr(ours, name), getattr(own, name))
                                                    for name in ("shift", "scale", "gate"))

    for vec in (first, second, second[:, None]):
        check(order[0], vec)
        check(order[0], vec)
        check(order[1], vec)
        check(order[3], vec)
    check(model.load(DTYPE, None).model.diffusion_model.double_blocks[0], second[:, None])
    check(order[-1], second)


def test_streamed_layers(model, fused, batches, one_by_one, monkeypatch):
    """Of layers that pass through one buffer each is done with before the next one comes."""
    patcher = model.load(DTYPE, None)
    expected = one_by_one(lambda: run(patcher))
    order = [module.lin for module in modules(patcher.model.diffusion_model)]
    streamed, original, held = {order[i] for i in (1, 3, 4)}, SVDQLinear.borrow, []
    buffer = torch.zeros(max(layer.weight.numel() for layer in order), dtype=torch.uint8)

    def borrow(layer, device, dtype):
        got = original(layer, device, dtype)
        if layer in order:
            held.append(layer)
            got = got._replace(release=lambda: held.remove(layer))
        if layer in streamed:
            buffer.fill_(255)
            weight = buffer[:layer.weight.numel()]
            return got._replace(weight=weight.copy_(layer.weight), kept=False)
        return got

    monkeypatch.setattr(SVDQLinear, "borrow", borrow)
    batches.clear()
    assert torch.equal(run(patcher), expected)
    assert batches == [2, 2, 1, COUNT - 5] and not held


@pytest.mark.parametrize("streams", [0, 2])
def test_copies_are_not_all_there_at_once(streams, model, fused, batches, one_by_one, monkeypatch):
    """Of a model that is not on the GPU, whether ComfyUI streams or copies."""
    patcher, copies = model.load(DTYPE, None), weakref.WeakSet()
    expected, most = one_by_one(lambda: run(patcher)), []
    order, original = [module.lin for module in modules(patcher.model.diffusion_model)], comfy.ops.cast_bias_weight

    def cast(layer, *given, **more):
        weight, bias, offload = original(layer, *given, **more)
        if layer not in order:
            return weight, bias, offload
        weight = weight.clone()
        copies.add(weight)
        most.append(len(copies))
        return weight, bias, ("a stream", weight, bias) if streams else None

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", cast)
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", lambda *given: None)
    batches.clear()
    assert torch.equal(run(patcher), expected)
    assert max(most) <= 2 and batches == [1] * COUNT           # the next one comes before the last one's name is free


def test_an_error_gives_back_what_is_held(model, fused, monkeypatch):
    network = model.load(DTYPE, None).model.diffusion_model
    held, original = [], SVDQLinear.borrow

    def borrow(layer, *given):
        if len(held) == 3:
            raise RuntimeError("no memory")
        held.append(layer)
        return original(layer, *given)._replace(release=lambda: held.remove(layer))

    monkeypatch.setattr(SVDQLinear, "borrow", borrow)
    some, x = [module.lin for module in modules(network)][:4], noise(1, network.params.hidden_size).to(DTYPE)
    with pytest.raises(RuntimeError, match="no memory"):
        SVDQLinear.forward_all(some, x)
    assert not held
    with pytest.raises(ShapeError):
        SVDQLinear.forward_all(some[:2], x[:, 1:])
    assert not held


@pytest.mark.parametrize("given, kept", [
    ((None, "weight", "bias"), True),                           # where it rests
    (("a stream", "weight", "bias"), False),                    # in a stream's buffer
    (("a stream", CPU, None), True), ((None, CPU, None), True),     # in a bar, with room, come now or before
    (("a stream", None, None), False),                          # in a bar that has no room
    ((None, None, None), False), (None, False), (None, True)])  # a copy in memory of its own, or where it rests
def test_what_is_kept(given, kept, model, monkeypatch):
    layer = modules(model.load(DTYPE, None).model.diffusion_model)[0].lin
    rests = given is None and kept or given == (None, "weight", "bias")
    weight = layer.weight if rests else layer.weight.clone()
    offload = given and tuple({"weight": layer.weight, "bias": layer.bias}.get(each, each) if isinstance(each, str) else each
                              for each in given)
    back = []
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", lambda s, **options: (weight, s.bias, offload))
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", lambda *given: back.append(given))
    got = layer.borrow(CPU, DTYPE)
    assert isinstance(got, Borrowed) and got.kept is kept and got.weight is weight
    got.release()
    assert len(back) == 1 and back[0][0] is layer and back[0][-1] is offload


def test_copies_are_of_one_block(model):
    network = model.load(DTYPE, None).model.diffusion_model
    block = network.single_blocks[0]
    assert block.modulations is network.double_blocks[0].modulations and block.modulations.blocks == [
        *network.double_blocks, *network.single_blocks]
    for copied in (copy.copy(block.modulations), copy.deepcopy(block).modulations,
                   pickle.loads(pickle.dumps(block.modulations))):
        assert copied.blocks == [] and copied.is_plain is blocks._has_plain_modulations


def test_blocks_die_with_their_model(model):
    """Nobody that a block has holds on to other blocks."""
    network = model.load(DTYPE, None).model.diffusion_model
    shared, gone = network.double_blocks[0].modulations, weakref.ref(network.single_blocks[1])
    del network.single_blocks[1]
    assert gone() is None and len(shared.blocks) == DOUBLE + SINGLE - 1
