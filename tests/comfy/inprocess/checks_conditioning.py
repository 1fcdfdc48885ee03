"""Save Conditioning and Load Conditioning: what is saved is listed and comes back equal, or one error names the entry."""

import json
import os
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdq_pack.nodes import conditioning
from svdq_pack.nodes.conditioning import KEY, LARGEST, SVDQLoadConditioning, SVDQSaveConditioning
from svdq_pack.svdq.errors import CheckpointError
from svdq_pack.tests.comfy.inprocess.support import noise, sample
from svdq_pack.tests.unit.helpers import limit, metadata_of

import folder_paths     # noqa: E402, comes from the tree that support has chosen
import node_helpers     # noqa: E402
import nodes            # noqa: E402

NAN, INF = float("nan"), float("inf")
COND = torch.randn(1, 7, 128, generator=torch.Generator().manual_seed(1))
POOLED = torch.randn(1, 64, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """The input and output folders of this test."""
    for kind in ("input", "output"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    return tmp_path


def listed():
    return SVDQLoadConditioning.INPUT_TYPES()["required"]["file"][1]["options"]


def saved(conditioning, prefix="prompt"):
    """What Save Conditioning says it wrote."""
    output = SVDQSaveConditioning.execute(conditioning, prefix)
    assert output.args[0] is conditioning
    return output.ui["text"][0]


def loaded(file):
    return SVDQLoadConditioning.execute(file).args[0]


def returned(conditioning):
    return loaded(f"{saved(conditioning)} [output]")


def assert_equal(got, want):
    assert len(got) == len(want)
    for (cond, options), (others, wanted) in zip(got, want):
        assert options.keys() == wanted.keys()
        for value, other in ((cond, others), *((options[name], wanted[name]) for name in wanted)):
            assert type(value) is type(other) or isinstance(value, torch.Tensor)
            if isinstance(other, torch.Tensor):
                assert value.dtype == other.dtype and value.shape == other.shape and value.is_contiguous()
                value, other = (one.detach().contiguous().view(-1).view(torch.uint8) for one in (value, other))
                assert torch.equal(value, other)
            else:
                assert value == other


# What can be saved

def test_round_trip(places):
    prompt = [[COND, {"pooled_output": POOLED, "guidance": 0.1, "width": 1024, "default": True, "method": "index"}],
              [torch.randn(2, 5, 128).bfloat16(), {"pooled_output": None, "start_percent": 0.25}]]
    file = saved(prompt, "a test")
    assert file == "conditioning/a test_00001_.safetensors" and listed() == [f"{file} [output]"]
    path = places / "output" / file
    assert load_file(path).keys() == {"0.cond", "0.pooled_output", "1.cond"}
    assert json.loads(metadata_of(path)[KEY])[1] == {"pooled_output": None, "start_percent": 0.25}
    assert_equal(loaded(listed()[0]), prompt)
    assert saved(prompt, "a test") == "conditioning/a test_00002_.safetensors" and len(listed()) == 2


def test_nodes_of_comfyui():
    """Combine with itself, which shares memory; average, concat, zero out, masks, ranges, guidance."""
    one = [[COND, {"pooled_output": POOLED}]]
    both, = nodes.ConditioningCombine().combine(one, one)
    mask, = nodes.ConditioningSetMask().append(one, torch.ones(8, 8).expand(2, 8, 8), "default", 0.5)
    for prompt in (both, mask, nodes.ConditioningConcat().concat(one, one)[0], nodes.ConditioningZeroOut().zero_out(one)[0],
                   nodes.ConditioningSetTimestepRange().set_range(both, 0.1, 0.75)[0],
                   nodes.ConditioningAverage().addWeighted(one, one, 0.5)[0],
                   node_helpers.conditioning_set_values(both, {"guidance": 3.5})):
        assert_equal(returned(prompt), prompt)


@pytest.mark.parametrize("value", [
    COND.transpose(1, 2), COND[:, ::2, 3:], COND[:, :1].expand(3, 5, 128), COND.to(torch.float8_e4m3fn),
    COND.to(torch.float8_e5m2), COND.double(), COND.half(), torch.nn.Parameter(COND.clone()),
    torch.complex(COND, COND).conj().imag], ids=str)
def test_encodings(value):
    prompt = [[value, {"pooled_output": value[:, 0]}]]
    assert_equal(returned(prompt), prompt)


@pytest.mark.parametrize("value", [
    torch.tensor(3.5), torch.tensor(7), torch.ones(1, 9, dtype=torch.int64), torch.ones(4, dtype=torch.bool),
    torch.arange(5, dtype=torch.uint8), torch.zeros(0, 4), True, False, 0, -3, 1 << 40, 0.1, 1e-320, None, "", "ünï \0 \"x\""])
def test_options(value):
    prompt = [[COND, {"a": value}], [COND, {}], [COND, {"b_c": value, "é": value, "pooled_output": POOLED}]]
    assert_equal(returned(prompt), prompt)


def test_large_numbers(dev):
    """Up to the bound they are kept, and sampled without NaN."""
    def up_to(bound, *shape):
        values = noise(*shape)
        return values / values.abs().max() * bound

    model = dev.load()
    options = {"pooled_output": up_to(LARGEST, 1, model.model.diffusion_model.params.vec_in_dim), "guidance": LARGEST,
               "strength": LARGEST, "mask": torch.full((1, 8, 8), LARGEST), "mask_strength": LARGEST}
    prompt = [[up_to(LARGEST, 1, 7, model.model.diffusion_model.params.context_in_dim), options]]
    assert_equal(returned(prompt), prompt)
    assert sample(model, **options).isfinite().all()


def test_options_of_others():
    """What ComfyUI does not read is not judged, and None is as if what it may be in place of were not there."""
    prompt = [[COND, {"of_another": torch.finfo(torch.float32).min, "seed": 1 << 60, "bias": COND * 1e30, "method": "x",
                      "guidance": None, "concat_mask": None, "reference_latents": None, "pooled_output": None}]]
    assert_equal(returned(prompt), prompt)


@pytest.mark.parametrize("conditioning, words", [
    ([], ["the conditioning is empty"]),
    ([[COND, {}], [None, {}]], ["'cond' is a NoneType", "entry 1"]),
    ([[torch.tensor(1.0), {}]], ["'cond' is [] torch.float32, needs a tensor of floats with at least 3 axes"]),
    ([[COND[0], {}]], ["'cond' is [7, 128]"]), ([[COND[:, :0], {}]], ["'cond' is [1, 0, 128]"]),
    ([[COND.long(), {}]], ["torch.int64"]), ([[COND.cfloat(), {}]], ["torch.complex64"]),
    ([[COND.to("meta"), {}]], ["without numbers"]), ([[COND.to_sparse(), {}]], ["without numbers"]),
    ([[COND * NAN, {}]], ["'cond' has NaN or Inf", "entry 0"]),
    ([[COND, {"pooled_output": POOLED / 0}]], ["'pooled_output' has NaN or Inf"]),
    ([[COND, {"pooled_output": 3.5}]], ["'pooled_output' is a float, needs a tensor"]),
    ([[COND, {"x": POOLED.to(torch.complex64)}]], ["'x' is a tensor of torch.complex64, which a file cannot hold"]),
    ([[COND, {"area": (1, 2)}]], ["'area' is a tuple", "before areas"]),
    ([[COND, {"control": object()}]], ["'control' is a object"]),
    ([[COND, {"hooks": [1]}]], ["'hooks' is a list"]),
    ([[COND, {"reference_latents": [COND]}]], ["'reference_latents' is a list"]),
    ([[COND, {"model_conds": {}}]], ["'model_conds' is a dict"]), ([[COND, {"cond": COND}]], ["'cond' is a Tensor"]),
    ([[COND, {"cond": None}]], ["'cond' is a NoneType"]),
    ([[COND * 1e38, {}]], ["'cond' reaches", "no real one is above 1e+06", "entry 0"]),
    ([[COND, {"mask": POOLED * 1e7}]], ["'mask' reaches"]), ([[COND, {"strength": -1e7}]], ["'strength' reaches 1e+07"]),
    ([[COND, {"area": None}]], ["'area' is a NoneType"]), ([[COND, {"mask": None}]], ["'mask' is a NoneType"]),
    ([[COND, {"guidance": torch.tensor(3.5)}]], ["'guidance' is [] torch.float32, needs a number"]),
    ([[COND, {"strength": NAN}]], ["'strength' is no number"]),
    ([[COND, {"strength": 10**5000}]], ["'strength' is no number"]),
    ([[COND, {3: 4}]], ["'3' is no name"]), ([[COND, {"b.c": 4}]], ["'b.c' is no name"]),
    ([[COND, {"a\ud800": 4}]], ["is no name"]),
    ([[COND, {"a\nb": POOLED}]], ["is no name"])])
def test_what_no_file_holds(places, conditioning, words):
    with pytest.raises(CheckpointError) as caught:
        saved(conditioning)
    message = str(caught.value)
    assert message.startswith("Save Conditioning: ") and all(word in message for word in words), message
    assert message.isprintable() and len(message) < 400 and not list((places / "output").iterdir())


# Where it is saved

@pytest.mark.parametrize("prefix, file", [
    ("a/b", "a/b_00001_"), (" x.safetensors ", "x_00001_"), ("v1.0", "v1.0_00001_"), ("%year%", None), ("é" * 100, None)])
def test_saved_is_listed(prefix, file):
    told = saved([[COND, {}]], prefix)
    assert listed() == [f"{told} [output]"] and (file is None or told == f"conditioning/{file}.safetensors")
    assert_equal(loaded(listed()[0]), [[COND, {}]])


@pytest.mark.parametrize("prefix", ["", " ", "a/", "/x", "../x", "a/../../x", ".", "..", ".hidden", "a\\b", "c:x", "*", "a?",
                                    "[a]", "a<b", "a\0b", "\x1b[2J", "nul", "con/a", "a" * 300, "\udcff", 5, None])
def test_bad_prefix(places, prefix):
    with pytest.raises(CheckpointError, match="is no name for a new file.*'prompt'") as caught:
        saved([[COND, {}]], prefix)
    assert str(caught.value).isprintable() and not list((places / "output").iterdir())


def test_places_that_cannot_be_written(places, monkeypatch):
    (places / "output" / "conditioning").write_bytes(b"a file")
    with pytest.raises(CheckpointError, match="conditioning/prompt: cannot be written: "):
        saved([[COND, {}]])
    (places / "output" / "conditioning").unlink()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "makedirs", full)
    with pytest.raises(CheckpointError, match="conditioning/prompt: .*disk is full. Make room"):
        saved([[COND, {}]])
    monkeypatch.undo()


def test_links(places):
    """Whether ComfyUI follows a link out of its folders is its own affair, and its version's."""
    (places / "elsewhere").mkdir()
    save_file({"0.cond": COND}, places / "elsewhere" / "old.safetensors")
    (places / "output" / "conditioning").symlink_to(places / "elsewhere")
    try:
        told = saved([[COND, {}]])
    except CheckpointError as error:
        assert "conditioning/prompt: cannot be written: " in str(error)
    else:
        assert f"{told} [output]" in listed()
    try:
        assert_equal(loaded("conditioning/old.safetensors [output]"), [[COND, {}]])
    except CheckpointError as error:
        assert "old.safetensors [output]: leads out of ComfyUI's folders" in str(error)


def test_full_disk(places, monkeypatch):
    """In the middle of the file: the path is named, nothing half written stays, and what was there before does."""
    file, fsync = saved([[COND, {}]]), os.fsync

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="prompt_00002_.safetensors: .*(disk is full|No space left)"):
        saved([[COND, {}]])
    monkeypatch.setattr(os, "fsync", fsync)
    assert [path.name for path in (places / "output" / "conditioning").iterdir()] == [os.path.basename(file)]


def test_saved_at_the_same_time(places, monkeypatch):
    """All look for a free name before the first writes: each has a file of its own."""
    together, find = threading.Barrier(4), folder_paths.get_save_image_path

    def found(*given):
        answer = find(*given)
        together.wait()
        return answer

    monkeypatch.setattr(folder_paths, "get_save_image_path", found)
    prompts = [[[COND + i, {}]] for i in range(4)]
    with ThreadPoolExecutor(4) as threads:
        files = list(threads.map(saved, prompts))
    assert sorted(files) == [f"conditioning/prompt_{i:05}_.safetensors" for i in range(1, 5)]
    for file, prompt in zip(files, prompts):
        assert_equal(loaded(f"{file} [output]"), prompt)


def test_more_than_can_be_read(places, monkeypatch):
    monkeypatch.setattr(conditioning, "MAX_TENSORS", 3)
    assert_equal(returned([[COND, {}]] * 3), [[COND, {}]] * 3)
    with pytest.raises(CheckpointError, match="^Save Conditioning: this has 4 tensors.* more than 3 .*in several files"):
        saved([[COND, {"pooled_output": POOLED}]] * 2)
    assert len(listed()) == 1


# What may be read

def test_old_files(places):
    """Of versions that kept numbers as tensors without axes."""
    save_file({"0.cond": COND, "0.guidance": torch.tensor(3.5), "1.cond": COND.half()}, places / "input" / "old.safetensors")
    assert listed() == ["old.safetensors"]
    assert_equal(loaded("old.safetensors"), [[COND, {"guidance": 3.5}], [COND.half(), {}]])


def test_loaded_does_not_follow_the_file(places):
    """What ComfyUI caches stays what it is when somebody writes over the file in place."""
    path = places / "input" / "a.safetensors"
    save_file({"0.cond": COND}, path)
    (cond, _), = loaded("a.safetensors")
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(size - COND.nbytes)
        file.write(bytes(COND.nbytes))
    assert torch.equal(cond, COND)
    os.truncate(path, 8)
    assert torch.equal(cond, COND)              # a map of the file would end the process here


def test_it_samples(dev, places):
    """The same pictures from a file as from the encoder."""
    model = dev.load()
    options = {"pooled_output": noise(1, model.model.diffusion_model.params.vec_in_dim, seed=2), "guidance": 3.5}
    (_, read), = returned([[COND, options]])
    assert torch.equal(sample(model, **read), sample(model, **options))


@pytest.mark.parametrize("tensors, others, words", [
    ({}, None, ["holds no conditioning but nothing"]), ({"weight": COND}, None, ["holds no conditioning but weight"]),
    ({"cond": COND}, None, ["holds no conditioning"]), ({"0.x": COND}, None, ["holds no conditioning"]),
    ({"1.cond": COND}, None, ["holds no conditioning"]), ({"00.cond": COND}, None, ["holds no conditioning"]),
    ({"0.cond": COND, "2.cond": COND}, None, ["holds no conditioning"]), ({"٠.cond": COND}, None, ["holds no conditioning"]),
    ({"0.cond": COND, "99999999999999.cond": COND}, None, ["holds no conditioning"]),
    ({"0.cond": COND, "9" * 5000 + ".cond": COND}, None, ["holds no conditioning"]),
    ({"0.cond": COND, "1.pooled_output": POOLED}, None, ["holds no conditioning"]),
    ({"0.cond": COND, "-1.cond": COND}, None, ["holds no conditioning"]),
    ({"0.cond": torch.tensor(1.0)}, None, ["'cond' is a float, needs a tensor"]),
    ({"0.cond": torch.tensor(1.0)}, [{}], ["'cond' is [] torch.float32"]), ({"0.cond": COND.long()}, None, ["torch.int64"]),
    ({"0.cond": COND > 0}, None, ["torch.bool"]), ({"0.cond": COND[0, 0]}, None, ["[128]"]),
    ({"0.cond": COND[:0]}, None, ["[0, 7, 128]"]),
    ({"0.cond": COND * NAN}, None, ["'cond' has NaN or Inf"]),
    ({"0.cond": (COND * NAN).to(torch.float8_e4m3fn)}, None, ["NaN"]),
    ({"0.cond": COND, "0.pooled_output": POOLED * INF}, None, ["'pooled_output' has NaN or Inf"]),
    ({"0.cond": COND, "0.pooled_output": torch.tensor(1.0)}, None, ["'pooled_output' is a float"]),
    ({"0.cond": COND, "0.pooled_output": POOLED.int()}, None, ["torch.int32"]),
    ({"0.cond": COND, "0.guidance": torch.tensor(NAN)}, None, ["'guidance' is no number"]),
    ({"0.cond": COND, "0.model_conds": COND}, None, ["'model_conds' is a Tensor, where ComfyUI keeps objects"]),
    ({"0.cond": COND, "0.hooks": COND}, None, ["'hooks' is a Tensor"]), ({"0.cond": COND, "0.uuid": COND}, None, ["'uuid'"]),
    ({"0.cond": COND, "0.a\nb": COND}, None, ["is no name of an option"]),
    ({"0.cond": COND}, [], ["does not fit"]), ({"0.cond": COND}, [{}, {}], ["does not fit"]),
    ({"0.cond": COND}, {}, ["does not fit"]),
    ({"0.cond": COND}, [3], ["does not fit"]), ({"0.cond": COND}, "[" * 100_000, ["does not fit"]),
    ({"0.cond": COND}, "9" * 5000, ["does not fit"]), ({"0.cond": COND}, [{"area": [1, 2, 3, 4]}], ["'area' is a list"]),
    ({"0.cond": COND}, [{"x": {}}], ["'x' is a dict"]), ({"0.cond": COND}, [{"x": [1]}], ["'x' is a list"]),
    ({"0.cond": COND}, [{"control": 3}], ["'control' is a int"]),
    ({"0.cond": COND}, [{"strength": INF}], ["'strength' is no number"]),
    ({"0.cond": COND}, [{"pooled_output": "x"}], ["'pooled_output' is a str"]),
    ({"0.cond": COND * 1e38}, None, ["'cond' reaches", "no real one is above 1e+06"]),
    ({"0.cond": COND, "1.cond": COND.double() * 1e300}, None, ["'cond' reaches", "entry 1"]),
    ({"0.cond": COND, "0.pooled_output": POOLED * -1e38}, None, ["'pooled_output' reaches"]),
    *(({"0.cond": COND}, [{name: 1e308}], [f"'{name}' reaches 1e+308"])
      for name in ("strength", "mask_strength", "guidance")),
    ({"0.cond": COND}, [{"start_percent": -(1 << 60)}], ["'start_percent' reaches 1.15e+18"]),
    *(({"0.cond": COND}, [{name: value}], [f"'{name}' is a {type(value).__name__}, needs a number"]) for name, value in (
        ("strength", "x"), ("guidance", "abc"), ("timestep_start", "x"), ("timestep_end", None), ("start_percent", "a"),
        ("end_percent", None), ("clip_end_percent", ""), ("mask_strength", "1"), ("set_area_to_bounds", "x"))),
    ({"0.cond": COND, "0.strength": COND}, None, ["'strength' is [1, 7, 128] torch.float32, needs a number"]),
    ({"0.cond": COND}, [{"clip_start_percent": 0.5}], ["'clip_start_percent' is without a 'clip_end_percent'"]),
    *(({"0.cond": COND}, [{name: 3}], [f"'{name}' is a int, needs a tensor of floats"]) for name in (
        "mask", "noise_concat", "concat_latent_image", "concat_mask", "denoise_mask", "cross_attn_controlnet")),
    *(({"0.cond": COND, "0.mask": value}, None,
       ["'mask' is ", "needs a tensor of floats with at least 2 axes, none of them 0, and 16 bits a number"])
      for value in (torch.zeros(0), torch.zeros(1, 0, 8), POOLED[0], POOLED > 0, POOLED.int(), POOLED.to(torch.float8_e5m2))),
    *(({"0.cond": COND}, [{name: value}], [f"'{name}' is a {type(value).__name__}, where ComfyUI keeps objects"])
      for name, value in (("reference_latents", 7), ("additional_models", 3), ("attention_mask_img_shape", 3), ("area", None),
                          ("control", None), ("hooks", None), ("gligen", None), ("self", None), ("model_conds", None))),
    ({"0.cond": COND, "0.reference_latents": COND}, None, ["'reference_latents' is a Tensor"])])
def test_hostile_files(places, tensors, others, words):
    metadata = None if others is None else {KEY: others if isinstance(others, str) else json.dumps(others)}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, places / "input" / "x.safetensors", metadata)
    with pytest.raises(CheckpointError) as caught, limit(10):
        loaded("x.safetensors")
    message = str(caught.value)
    assert message.startswith("x.safetensors: ") and all(word in message for word in words), message
    assert message.isprintable() and len(message) < 500 and "Save Conditioning" in message


@pytest.mark.parametrize("content", [b"", b"no file", b"{}" * 50, struct.pack("<Q", 1 << 62) + bytes(100),
                                     struct.pack("<Q", 8) + b"{\"a\":3} "])
def test_no_safetensors(places, content):
    (places / "input" / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="x.safetensors: "):
        loaded("x.safetensors")


def test_a_link_to_nowhere(places):
    """It is listed, and what its fingerprint meets is ours."""
    (places / "input" / "x.safetensors").symlink_to("x.safetensors")
    for read in (SVDQLoadConditioning.execute, SVDQLoadConditioning.fingerprint_inputs):
        with pytest.raises(CheckpointError, match="x.safetensors: "):
            read("x.safetensors")


def test_a_pipe_is_not_waited_for(places):
    os.mkfifo(places / "input" / "x.safetensors")
    with limit(5), pytest.raises(CheckpointError, match="a device or a pipe"):
        loaded("x.safetensors")


@pytest.mark.parametrize("file", ["", "none.safetensors", "../x.safetensors", "/etc/passwd", "a\0b", "x" * 5000, "[output]",
                                  "../x.safetensors [output]", 5, None, ["x.safetensors"]])
def test_only_what_is_listed_is_read(places, file):
    """A text that is linked to the input reaches the node unchecked."""
    save_file({"0.cond": COND}, places / "x.safetensors")
    for read in (SVDQLoadConditioning.execute, SVDQLoadConditioning.fingerprint_inputs):
        with pytest.raises(CheckpointError, match="no such file in the input folder") as caught:
            read(file)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_an_empty_list_says_where_files_go(places):
    assert listed() == [conditioning.NO_FILE]           # the page would show "undefined"
    with pytest.raises(CheckpointError, match="no such file in the input folder or in output/conditioning"):
        loaded(conditioning.NO_FILE)
    save_file({"0.cond": COND}, places / "input" / "x.safetensors")
    assert listed() == ["x.safetensors"]


def test_many_entries(places):
    """No time that grows with the square of the header."""
    save_file({f"{i}.cond": torch.zeros(1, 1, 1) for i in range(8000)}, places / "input" / "x.safetensors")
    with limit(60):
        assert len(loaded("x.safetensors")) == 8000
