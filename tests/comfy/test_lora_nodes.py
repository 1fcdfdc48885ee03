"""The pack's LoRA nodes in a running ComfyUI: pictures, the report, errors, and graphs made for the earlier pack."""

import shutil

import numpy
import pytest
import torch
from safetensors.torch import save_file

from svdq_pack.workflows.headless.client import Failed, Rejected

STRENGTH = 0.75


@pytest.fixture(scope="module", autouse=True)
def files(base):
    loras = base / "models" / "loras"
    whole = (loras / "peft.safetensors").read_bytes()
    (loras / "nodes-cut.safetensors").write_bytes(whole[:len(whole) // 2])
    for name, layer, size in (("changing", "double_blocks_0_img_attn_proj", 128),
                              ("sdxl", "down_blocks_0_attentions_0_proj_in", 8)):
        save_file({f"lora_unet_{layer}.lora_{way}.weight": torch.eye(size) for way in ("up", "down")},
                  loras / f"nodes-{name}.safetensors")


@pytest.fixture
def picture(run, graph):
    """picture(class, **inputs of the LoRA node) -> pixels"""
    def picture(kind=None, **inputs):
        made = graph("nvfp4.safetensors", seed=9, **({"model": ["20", 0]} if kind else {}))
        if kind:
            made["20"] = {"class_type": kind, "inputs": {"model": ["1", 0], **inputs}}
        return numpy.asarray(run(made)[0]).astype(int)
    return picture


def test_loader(server, picture):
    """The picture of the stock node to the byte, and the report in the history."""
    plain = picture()
    ours = picture("SVDQLoraLoader", lora_name="peft.safetensors", strength=STRENGTH)
    report, = server.outputs()["20"]["text"]
    assert report.startswith("peft.safetensors, strength 0.75\n  key style     diffusers/PEFT\n")
    assert "30 matched, 0 not" in report and "6 in 4 bit, 4 in 16 bit" in report
    assert abs(ours - plain).max() > 10
    assert (ours == picture("LoraLoaderModelOnly", lora_name="peft.safetensors", strength_model=STRENGTH)).all()
    assert (picture("SVDQLoraLoader", lora_name="peft.safetensors", strength=0.0) == plain).all()
    assert "not applied" in server.outputs()["20"]["text"][0]


def test_strengths_in_a_row(picture):
    """Going back to the first is bitwise: what was loaded, factored and written in between leaves nothing."""
    first, other, again = (picture("SVDQLoraLoader", lora_name="kohya_bfl.safetensors", strength=strength)
                           for strength in (STRENGTH, -0.5, STRENGTH))
    assert (first == again).all() and (first != other).any()


def test_stack(server, picture):
    """One slot is the loader; without any, nothing happens."""
    assert (picture("SVDQLoraStack", lora_2="peft.safetensors", strength_2=STRENGTH)
            == picture("SVDQLoraLoader", lora_name="peft.safetensors", strength=STRENGTH)).all()
    assert (picture("SVDQLoraStack", lora_1="None", strength_1=1.0) == picture()).all()
    picture("SVDQLoraStack", lora_1="peft.safetensors", strength_1=0.5, lora_2="kohya_bfl.safetensors", strength_2=0.25)
    report, = server.outputs()["20"]["text"]
    assert "peft.safetensors, strength 0.5\n" in report and "kohya_bfl.safetensors, strength 0.25\n" in report


def test_slots(server):
    """Five, none of which must be given."""
    inputs = server.client.object_info()["SVDQLoraStack"]["input"]
    slots = inputs["optional"]
    assert [*inputs["required"]] == ["model"]
    assert [*slots] == [f"{what}_{i}" for i in range(1, 6) for what in ("lora", "strength")]
    assert slots["lora_1"][1]["options"][0] == slots["lora_1"][1]["default"] == "None"
    assert "peft.safetensors" in slots["lora_5"][1]["options"] and slots["strength_5"][1]["default"] == 1


def test_replaced_file(base, picture):
    before = picture("SVDQLoraLoader", lora_name="nodes-changing.safetensors", strength=1.0)
    loras = base / "models" / "loras"
    shutil.copy(loras / "peft.safetensors", loras / "nodes-changing.safetensors")
    after = picture("SVDQLoraLoader", lora_name="nodes-changing.safetensors", strength=1.0)
    assert (after == picture("SVDQLoraLoader", lora_name="peft.safetensors", strength=1.0)).all()
    assert (after != before).any()


@pytest.mark.parametrize("name, message", [
    ("nodes-cut", "not a readable LoRA file: .*get it again"),
    ("nodes-sdxl", "this is a LoRA for SD 1.5 or SDXL with kohya keys, and the model is FLUX.1. Get this LoRA for FLUX.1")])
def test_bad_file(name, message, picture):
    """The error arrives, and the next prompt works."""
    with pytest.raises(Failed, match=rf"node 20 \(SVDQLoraLoader\) failed: .*LoraError: {name}.safetensors: {message}"):
        picture("SVDQLoraLoader", lora_name=f"{name}.safetensors", strength=1.0)
    with pytest.raises(Failed, match=rf"\(SVDQLoraStack\) failed: .*LoraError: {name}.safetensors: "):
        picture("SVDQLoraStack", lora_1="peft.safetensors", lora_2=f"{name}.safetensors")
    assert (picture("SVDQLoraLoader", lora_name="peft.safetensors", strength=STRENGTH) != picture()).any()


@pytest.mark.parametrize("kind, slot, field", [
    ("SVDQLoraLoader", "lora_name", "strength"), ("SVDQLoraStack", "lora_1", "strength_1"),
    ("LoraLoaderModelOnly", "lora_name", "strength_model")])
def test_strength_of_nan(kind, slot, field, picture):
    """It passes ComfyUI's limits, and would make a black picture."""
    with pytest.raises(Failed, match=rf"\({kind}\) failed: svdq.LoraError: .*the strength of a LoRA is nan. Give a number"):
        picture(kind, **{slot: "peft.safetensors", field: float("nan")})


def test_not_in_the_list(picture):
    with pytest.raises(Rejected, match="(?s)lora_name.*not in list"):
        picture("SVDQLoraLoader", lora_name="nowhere.safetensors", strength=1.0)


def test_loader_of_the_earlier_pack(picture):
    """A graph for NunchakuFluxLoraLoader or its stack, as scripts write it, runs through ours."""
    theirs = picture("NunchakuFluxLoraLoader", lora_name="peft.safetensors", lora_strength=0.5)
    assert (theirs == picture("SVDQLoraLoader", lora_name="peft.safetensors", strength=0.5)).all()
    theirs = picture("NunchakuFluxLoraLoader", lora_name="peft.safetensors")
    assert (theirs == picture("SVDQLoraLoader", lora_name="peft.safetensors", strength=1.0)).all()
    theirs = picture("NunchakuFluxLoraStack", **{f"lora_{what}_{i}": value for i in range(9, 16) for what, value in
                                                 (("name", "peft.safetensors"), ("strength", 0.5 if i == 12 else 0.0))})
    assert (theirs == picture("SVDQLoraLoader", lora_name="peft.safetensors", strength=0.5)).all()
