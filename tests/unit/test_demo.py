"""The demo's pictures and captions, its text encoder and its networks. Whether ComfyUI computes the same: checks_demo.py"""

from itertools import combinations

import numpy as np
import pytest
import torch

from svdq_pack.svdq import demo
from svdq_pack.svdq.families import flux1
from svdq_pack.svdq.families.family import by_layer
from svdq_pack.tests import random_models
from svdq_pack.tools.demo import scenes, train
from svdq_pack.tools.demo.models import Autoencoder, Flux, Judge


@pytest.fixture(scope="module")
def many():
    random = np.random.default_rng(1)
    return [scenes.any_scene(random) for _ in range(2000)]


def said(caption):
    """{label: option} of all that a caption says."""
    what, ground = caption.removesuffix(" background").split(" on a ")
    *pattern, colour = ground.split()
    found = {"ground": pattern[0] if pattern else "plain", "ground colour": colour}
    first, *rest = what.split()
    if first in scenes.NUMBERS:
        return found | {"layout": first} | thing(" ".join(rest).removesuffix("s").replace("crosse", "cross"))
    for between, layout in (("left of", "beside"), ("above", "above")):
        if f" {between} a " in what:
            left, right = what.split(f" {between} a ")
            return found | {"layout": layout} | thing(left.removeprefix("a ")) | thing(right, "second ")
    what, place = what.replace("in the", "at the").split(" at the ")
    _, size, what = what.split(maxsplit=2)
    return found | {"layout": "one", "place": place, "size": size} | thing(what)


def thing(words, prefix=""):
    *texture, colour, shape = words.split()
    return {f"{prefix}shape": shape, f"{prefix}colour": colour, f"{prefix}texture": texture[0] if texture else "plain"}


# ---- scenes

def test_a_seed_is_a_picture():
    def made(seed):
        random = np.random.default_rng(seed)
        scene = scenes.any_scene(random)
        return scene, scenes.draw(scene, random, 48)

    (scene, picture), (again, same), (other, third) = made(5), made(5), made(6)
    assert scene == again and np.array_equal(picture, same)
    assert scene != other and not np.array_equal(picture, third)


def test_captions_are_made_of_all_the_words_and_fit(many):
    assert {word for scene in many for word in scene.caption.split()} == set(demo.WORDS)
    assert max(len(scene.caption.split()) for scene in many) <= demo.TOKENS
    assert len(demo.WORDS) == len(set(demo.WORDS)) <= demo.SLOTS


def test_labels_are_what_the_caption_says(many):
    for scene in many:
        labels = scenes.labels(scene)
        assert labels.pop("sticker") == 0 and scenes.labels(scenes.as_sticker(scene))["sticker"] == 1
        assert {name: scenes.LABELS[name][index] for name, index in labels.items() if index != -100} == said(scene.caption)


def test_a_sticker_has_the_same_caption_and_another_look(many):
    sticker = scenes.as_sticker(many[0])
    plain, changed = (scenes.draw(scene, np.random.default_rng(2), 48) for scene in (many[0], sticker))
    assert sticker.caption == many[0].caption
    assert np.abs(plain - changed).mean() > 0.01


def test_pictures_are_in_range(many):
    random = np.random.default_rng(3)
    for scene in many[:40]:
        picture = scenes.draw(scenes.as_sticker(scene) if random.random() < 0.5 else scene, random, 40)
        assert picture.dtype == np.float32 and picture.shape == (40, 40, 3)
        assert 0 <= picture.min() < picture.max() <= 1


def test_no_two_shapes_are_alike():
    u, v = np.meshgrid(np.linspace(-1.2, 1.2, 96), np.linspace(-1.2, 1.2, 96))
    covers = {shape: scenes.distance(shape, u, v) < 0 for shape in scenes.SHAPES}
    for a, b in combinations(covers, 2):
        both, either = (covers[a] & covers[b]).sum(), (covers[a] | covers[b]).sum()
        assert both < 0.85 * either, (a, b)
    for shape, cover in covers.items():
        assert 0.1 < cover.mean() < 0.7, shape
        assert not (cover[0].any() or cover[-1].any() or cover[:, 0].any() or cover[:, -1].any()), shape


@pytest.mark.parametrize("colour", scenes.COLOURS)
def test_a_thing_has_its_colour(colour):
    scene = scenes.Scene("one", scenes.Thing("circle", colour, "plain"), None, "middle", "large", "plain", "green")
    middle = scenes.draw(scene, np.random.default_rng(4), 64)[28:36, 28:36].mean((0, 1))
    assert min(scenes.COLOURS, key=lambda name: np.abs(middle - scenes.COLOURS[name]).sum()) == colour


# ---- the text encoder

def test_encode_keeps_words_and_their_order():
    cond, pooled = demo.encode("A red Circle, left of a blue ring.")
    assert cond.shape == (1, demo.TOKENS, demo.CONTEXT) and pooled.shape == (1, demo.SLOTS)
    assert cond.dtype == pooled.dtype == torch.float32
    words = "a red circle left of a blue ring".split()
    for place, word in enumerate(words):
        on = sorted([demo.WORDS.index(word), demo.SLOTS + place])
        assert cond[0, place].nonzero().flatten().tolist() == on
    assert not cond[0, len(words):].any()
    assert pooled[0].nonzero().flatten().tolist() == sorted(demo.WORDS.index(word) for word in set(words))


def test_training_pools_as_encode_does(many):
    for scene in many[:50]:
        cond, pooled = demo.encode(scene.caption)
        assert torch.equal(train.pooled(cond), pooled)


@pytest.mark.parametrize("prompt", ["", "  , . "])
def test_no_words_are_zeros(prompt):
    assert not any(part.any() for part in demo.encode(prompt))


def test_unknown_words_are_named():
    with pytest.raises(ValueError, match="know 'an', 'astronaut', 'horse'. It knows a, above, .*, yellow"):
        demo.encode("a red horse above an Astronaut")


def test_long_prompts_are_refused():
    longest = " ".join(["red"] * demo.TOKENS)
    assert demo.encode(longest)[0].any(2).all()
    with pytest.raises(ValueError, match=f"has {demo.TOKENS + 1} words; .* at most {demo.TOKENS}"):
        demo.encode(longest + " star")


# ---- networks

def test_the_wide_autoencoder_is_the_narrow_one():
    torch.manual_seed(1)
    narrow, wide = Autoencoder(), Autoencoder(Autoencoder.FULL)
    for parameter in narrow.parameters():               # some are zero as they are made
        parameter.data += 0.02 * torch.randn_like(parameter)
    wide.load_state_dict(narrow.widened())
    picture = torch.rand(2, 3, 40, 48)
    with torch.no_grad():
        latent = narrow.taesd_encoder(picture)
        assert latent.shape == (2, 16, 5, 6) and latent.std() > 0.1
        torch.testing.assert_close(wide.taesd_encoder(picture), latent, rtol=1e-4, atol=1e-5)
        decoded = narrow.taesd_decoder(latent)
        assert decoded.shape == picture.shape and decoded.std() > 0.01
        torch.testing.assert_close(wide.taesd_decoder(latent), decoded, rtol=1e-4, atol=1e-5)


def test_the_wide_autoencoder_has_taesds_tensors():
    theirs = random_models.vae(torch.Generator().manual_seed(1))
    del theirs["vae_scale"], theirs["vae_shift"]        # ComfyUI's own additions
    assert shapes(Autoencoder().widened()) == shapes(theirs)


def test_flux_has_the_names_of_its_checkpoints():
    shape = flux1.Shape(hidden=256, depth=1, depth_single=2, in_features=64, context_dim=96, vec_dim=64, guidance=False)
    model = Flux(shape.hidden, shape.depth, shape.depth_single, shape.context_dim, shape.vec_dim)
    tensors = {place.name: place.tensor.shape for place in shape.comfy_plain()}
    for layer in by_layer(shape.comfy_places()):
        tensors |= {f"{layer.name}.weight": (layer.n, layer.k), f"{layer.name}.bias": (layer.n,)}
    assert shapes(model.state_dict()) == tensors


def test_flux_and_judge_fit_the_demo():
    torch.manual_seed(1)
    model = Flux(256, 1, 1, demo.CONTEXT, demo.SLOTS)
    torch.nn.init.normal_(model.final_layer.linear.weight)          # as it is made, it says nothing
    x, text = torch.randn(2, 16, 20, 20), torch.cat([demo.encode(prompt)[0] for prompt in ("a red star", "")])
    flow = model(x, torch.tensor([0.5, 0.5]), text, train.pooled(text))
    assert flow.shape == x.shape and flow.isfinite().all() and flow.std() > 0.1
    judge = Judge({name: len(options) for name, options in scenes.LABELS.items()})
    assert shapes(judge(torch.rand(2, 3, train.SIZE, train.SIZE))) == {
        name: (2, len(options)) for name, options in scenes.LABELS.items()}


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


# ---- training

def test_training_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setitem(train.STEPS, "toy", 12)

    def trained(folder, stop=None):
        folder.mkdir(exist_ok=True)
        torch.manual_seed(1)
        model = torch.nn.Linear(8, 8)
        trainer, first = train.Trainer(folder, "toy", model, 0.1, report=1, hidden=[model.weight]), model.weight.clone()

        def loss(random):
            if trainer.step == stop:
                raise KeyboardInterrupt
            x = torch.randn(16, 8) + float(random.normal())
            return (model(x).float() - 2 * x).square().mean()

        with torch.enable_grad():
            trainer.run(loss)
        assert not torch.equal(model.weight, first)
        return trainer, [*model.parameters()]

    whole, weights = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", stop=7)
    rest, again = trained(tmp_path / "parts")
    assert len(rest.losses) == 7 and rest.losses == whole.losses[5:]         # a file is written every five steps
    assert all(map(torch.equal, weights, again))
    assert all(map(torch.equal, weights, trained(tmp_path / "parts")[1]))    # at its end there is nothing to do


@pytest.mark.parametrize("prompt", [None, 5, ["a star"]], ids=str)
def test_a_prompt_that_is_no_text(prompt):
    """What is linked to an input reaches a node unchecked."""
    with pytest.raises(demo.PromptError, match="^The prompt is .*, needs to be a text. Connect one"):
        demo.encode(prompt)
