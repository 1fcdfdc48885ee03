import copy
import json
import struct

import pytest
from headless import graph
from headless.client import Client
from headless.environment import ROOT
from headless.messages import UsageError

from svdq_pack.tools.templates.graphs import TEMPLATES

TWO = {"1": {"class_type": "KSampler", "inputs": {"seed": 1}, "_meta": {"title": "First v1.5"}},
       "2": {"class_type": "KSampler", "inputs": {"seed": 1, "images.image0": 0}, "_meta": {"title": "Second"}},
       "7": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}}


@pytest.fixture
def two():
    return copy.deepcopy(TWO)


# ---- --set ----

@pytest.mark.parametrize("change, id, name, value", [
    ("1.seed=7", "1", "seed", 7),
    ("Second.seed=-1.5", "2", "seed", -1.5),
    ("First v1.5.seed=[\"2\", 0]", "1", "seed", ["2", 0]),
    ("Second.images.image0=true", "2", "images.image0", True),
    ("SaveImage.filename_prefix=a=b.c", "7", "filename_prefix", "a=b.c"),
    ("SaveImage.filename_prefix=", "7", "filename_prefix", ""),
    ("SaveImage.filename_prefix=\"7\"", "7", "filename_prefix", "7"),
    ("SaveImage.filename_prefix=1.50", "7", "filename_prefix", "1.50"),             # it has a text: no number
    ("SaveImage.filename_prefix=true", "7", "filename_prefix", "true"),
    ("SaveImage.filename_prefix=[\"8\", 0]", "7", "filename_prefix", "[\"8\", 0]"),   # no link: there is no such node
    ("SaveImage.filename_prefix=[\"1\", 0]", "7", "filename_prefix", ["1", 0]),
])
def test_set(two, change, id, name, value):
    graph.apply(two, change)
    expected = copy.deepcopy(TWO)
    expected[id]["inputs"][name] = value
    assert two == expected


@pytest.mark.parametrize("change, message", [
    ("seed=1", "must be NODE.INPUT=VALUE"),
    ("1.seed", "must be NODE.INPUT=VALUE"),
    ("KSampler.seed=1", r"several nodes are called KSampler(.|\n)*1: First v1.5 \(KSampler\)\n  2: Second \(.*\)$"),
    ("Third.seed=1", r"no node is called Third(.|\n)*7: SaveImage \(SaveImage\)$"),
    ("1.sed=1", r"1: First v1.5 \(KSampler\) has no input sed. It has seed\."),
])
def test_set_refuses(two, change, message):
    with pytest.raises(UsageError, match=message):
        graph.apply(two, change)
    assert two == TWO


# ---- workflow files ----

@pytest.mark.parametrize("text, message", [
    ("{", "not JSON"),
    ('{"nodes": [], "links": []}', r"Export \(API\)"),
    ("[]", "not a workflow in API format"),
    ("{}", "not a workflow in API format"),
    ('{"1": {"inputs": {}}}', "not a workflow in API format"),
    ('{"1": {"class_type": "A", "inputs": []}}', "not a workflow in API format"),
    ("[" * 200_000, "not JSON"), ('{"1":' * 200_000, "not JSON"), ("9" * 5000, "not JSON"),
])
def test_bad_workflow_files(tmp_path, text, message):
    file = tmp_path / "w.json"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        graph.load(str(file))


@pytest.mark.parametrize("name", ["nowhere", "x" * 5000, "a\0b", "\x1b]0;owned\x07", "/dev/zero"])
def test_no_such_workflow(name):
    with pytest.raises(UsageError, match="neither a file nor a bundled workflow") as caught:
        graph.load(name)
    assert len(str(caught.value)) < 700 and str(caught.value).isprintable()


def test_a_file_of_an_editor_that_marks_utf8(tmp_path):
    (tmp_path / "w.json").write_text(json.dumps(TWO), encoding="utf-8-sig")
    assert graph.load(str(tmp_path / "w.json")) == TWO


def test_enormous_workflow(tmp_path):
    """All holes: nothing on the disk, a terabyte to read."""
    with open(tmp_path / "w.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UsageError, match="w.json: has more than 67,108,864 bytes"):
        graph.load(str(tmp_path / "w.json"))


def test_a_large_picture(tmp_path):
    """Of more bytes than any graph alone has."""
    with open(tmp_path / "a.png", "wb") as file:
        file.write(graph.PNG + chunk(b"tEXt", b"prompt\0" + json.dumps(TWO).encode()))
        file.truncate(graph.LARGEST + 1)
    assert graph.load(str(tmp_path / "a.png")) == TWO


@pytest.mark.parametrize("meta", [[], ["title"], "title", 7, None, {"title": ["x"]}, {"title": None}, {"title": ""}])
def test_nodes_without_a_title(two, meta):
    two["7"]["_meta"] = meta
    graph.apply(two, "SaveImage.filename_prefix=a")
    assert two["7"]["inputs"] == {"filename_prefix": "a"} and graph.describe(two, "7") == "7: SaveImage (SaveImage)"


def test_a_value_too_deep_for_json_is_text(two):
    graph.apply(two, "7.filename_prefix=" + "[" * 5000)
    assert two["7"]["inputs"]["filename_prefix"] == "[" * 5000


def test_messages_of_large_workflows():
    prompt = {f"{i}{'x' * 500}": {"class_type": "A" * 5000, "inputs": {f"{i}{'y' * 500}": 0 for i in range(200)}}
              for i in range(200)}
    for change in ("B.seed=1", f"{'z' * 5000}.seed=1", "A" * 5000 + ".seed=1", f"0{'x' * 500}.{'z' * 5000}=1", "z" * 5000):
        with pytest.raises(UsageError) as caught:
            graph.apply(prompt, change)
        assert len(str(caught.value)) < 50_000 and ("100 more" in str(caught.value) or change[0] == "z")


def chunk(kind, data):
    return struct.pack(">I4s", len(data), kind) + data + b"sum."


def test_a_picture_is_the_graph_that_painted_it(tmp_path):
    """As PNG files of ComfyUI are: the canvas form beside the API form, and numbers of the picture before both."""
    file, head = tmp_path / "painted.png", graph.PNG + chunk(b"IHDR", bytes(13)) + chunk(b"tEXt", b"workflow\0{}")
    file.write_bytes(head + chunk(b"tEXt", b"prompt\0" + json.dumps(TWO).encode()) + chunk(b"IEND", b""))
    assert graph.load(str(file)) == TWO
    for other in (head, head + chunk(b"IEND", b""), head + b"\xff\xff\xff\xfftEXtprompt", graph.PNG,
                  head + chunk(b"zTXt", b"prompt\0" + json.dumps(TWO).encode())):
        file.write_bytes(other)
        with pytest.raises(UsageError, match="not JSON"):
            graph.load(str(file))


@pytest.mark.parametrize("ending", [".json", ".app.json"])
def test_the_file_of_a_template(ending):
    """What completing a path in a terminal gives is for the canvas; its name is for here."""
    with pytest.raises(UsageError, match="canvas saves. It is bundled in API format: say svdq-00-demo.$"):
        graph.load(str(ROOT / "workflows" / f"svdq-00-demo{ending}"))


def test_bundled_workflows(tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "BUNDLED", tmp_path)
    for name in ("svdq-01-b", "a"):
        (tmp_path / f"{name}.json").write_text(json.dumps(TWO))
    assert graph.load("a") == graph.load("b") == graph.load("svdq-01-b") == TWO
    assert graph.bundled() == ["a", "svdq-01-b"] and graph.about("a") == ("", [])


def test_names_that_bundled_workflows_had():
    """In scripts they are spelt as they once were."""
    for name in ("demo", "demo-lora", "flux-dev-text-to-image", "flux-schnell-text-to-image"):
        assert graph.load(name)


# ---- files as values ----

PICTURES = {"1": {"class_type": "LoadImage", "inputs": {"image": "example.png"}, "_meta": {"title": "Picture"}},
            "2": {"class_type": "InpaintModelConditioning", "inputs": {"pixels": ["1", 0], "mask": ["1", 1]}},
            "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["9", 0]}, "_meta": {"title": "Prompt"}},
            "4": {"class_type": "KSampler", "inputs": {"seed": 1}}}


@pytest.fixture
def pictures():
    return copy.deepcopy(PICTURES)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my \"photo\".png"
    path.write_bytes(b"\x89PNG and so on")
    return path


def test_a_picture_is_uploaded(pictures, comfy, file):
    graph.apply(pictures, f"Picture.image=@{file}")
    with Client(comfy.url) as client:
        graph.resolve(pictures, client)
    assert pictures["1"]["inputs"] == {"image": "as named there.png"}
    (path, body), = (seen for seen in comfy.seen if seen[1])
    assert path == "/upload/image" and b'name="image"; filename="my _photo_.png"' in body and file.read_bytes() in body
    assert b"overwrite" not in body                     # another picture of that name stays


def test_a_mask_takes_the_place_of_the_alpha_channel(pictures, comfy, file):
    graph.apply(pictures, f"Picture.mask=@{file}")
    assert pictures["1:mask"]["inputs"]["channel"] == "red"         # white of a drawing; its alpha says nothing
    graph.apply(pictures, "Picture mask.channel=green")
    with Client(comfy.url) as client:
        graph.resolve(pictures, client)
    assert pictures["1:mask"]["inputs"] == {"image": "as named there.png", "channel": "green"}
    assert pictures["2"]["inputs"] == {"pixels": ["1", 0], "mask": ["1:mask", 0]}
    del pictures["2"]
    with pytest.raises(UsageError, match=r"no node of this workflow takes the mask of 1: Picture \(LoadImage\)"):
        graph.apply(pictures, f"Picture.mask=@{file}")


def test_a_text_comes_from_a_file(pictures, comfy, tmp_path):
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfa fox\r\nand an owl \xc3\xbc\r\n")
    graph.apply(pictures, f"Prompt.text=@{tmp_path / 't.txt'}")
    with Client(comfy.url) as client:
        graph.resolve(pictures, client)
    assert pictures["3"]["inputs"]["text"] == "a fox\r\nand an owl \u00fc"


@pytest.mark.parametrize("change, message", [
    ("Prompt.text=@{}", "is no text in UTF-8"), ("KSampler.seed=@{}", "takes INT, and no file"),
    ("InpaintModelConditioning.mask=@{}", "has no node InpaintModelConditioning"),
    ("Picture.mask=@{}x", 'cannot be read: No such file.*For a text that begins with @ write it in quotes: "\\\\"@...'),
    ("Picture.image=@", "cannot be read"), ("Prompt.text=@\0", "cannot be read")])
def test_files_that_do_not_fit(pictures, comfy, file, change, message):
    with pytest.raises(UsageError, match=message), Client(comfy.url) as client:
        graph.apply(pictures, change.format(file))
        graph.resolve(pictures, client)
    assert "/upload/image" not in comfy.paths()


def test_a_file_without_at(pictures, comfy, file):
    """Said, where the server has no such file and it is here."""
    graph.apply(pictures, f"Picture.image={file}")
    with Client(comfy.url) as client:
        with pytest.raises(UsageError, match="is a file here, and none that the server has. To upload it: --set .*=@/"):
            graph.resolve(pictures, client)
        comfy.definitions["LoadImage"]["input"]["required"]["image"][0].append(str(file))
        client.forget()
        graph.resolve(pictures, client)


def test_a_text_that_begins_with_at(pictures):
    graph.apply(pictures, 'Prompt.text="@home"')
    assert pictures["3"]["inputs"]["text"] == "@home"


# ---- seeds and prompts ----

def test_seeds(two):
    two["3"] = {"class_type": "RandomNoise", "inputs": {"noise_seed": 2**64 - 1}}
    two["4"] = {"class_type": "KSampler", "inputs": {"seed": ["3", 0]}, "_meta": {"title": "Second"}}
    two["5"] = {"class_type": "X", "inputs": {"seed": True, "seed2": 3}}
    assert graph.seeds(two) == {"First v1.5.seed": 1, "2.seed": 1, "RandomNoise.noise_seed": 2**64 - 1}
    for seed, number, expected in ((None, 0, (1, 1, 2**64 - 1)), (None, 2, (3, 3, 1)), (40, 2, (42,) * 3)):
        made = copy.deepcopy(two)
        graph.reseed(made, seed, number)
        assert tuple(graph.seeds(made).values()) == expected
        assert made["4"] == two["4"] and made["5"] == two["5"]
    graph.reseed(two, "random", 0)
    thrown = set(graph.seeds(two).values())
    graph.reseed(two, "random", 0)
    assert len(thrown) == 1 and thrown != set(graph.seeds(two).values())


def test_a_seed_that_nobody_asked_to_change_stays(two):
    """-1 means something to some nodes."""
    two["1"]["inputs"]["seed"] = -1
    before = copy.deepcopy(two)
    graph.reseed(two, None, 0)
    assert two == before


def test_a_workflow_without_a_seed(two):
    prompt = {"7": two["7"]}
    graph.reseed(prompt, None, 0)
    for seed, number in ((3, 0), ("random", 0), (None, 1)):
        with pytest.raises(UsageError, match="no input called seed or noise_seed, so every run would be the same"):
            graph.reseed(prompt, seed, number)


def test_where_the_prompt_stands(pictures):
    assert graph.prompt_place(pictures) == "3.text"
    pictures["5"] = {"class_type": "CLIPTextEncode", "inputs": {"text": "bad"}, "_meta": {"title": "Negative"}}
    assert graph.prompt_place(pictures) == "3.text"
    pictures["3"]["_meta"]["title"] = "Positive"
    with pytest.raises(UsageError, match=r"several nodes have a text: 3: Positive .*5: Negative .*NODE.INPUT=FILE"):
        graph.prompt_place(pictures)
    with pytest.raises(UsageError, match="no node of this workflow has an input `text`"):
        graph.prompt_place({"1": pictures["1"]})


def test_every_template_with_a_prompt_says_which_it_is():
    found = {name for name in graph.bundled() if "text" in str(graph.load(name))
             and any("text" in node["inputs"] for node in graph.load(name).values())}
    assert len(found) > 20
    for name in found:
        assert graph.prompt_place(graph.load(name))


# ---- what the templates need ----

def test_what_the_notes_say_is_what_the_generator_wrote():
    """GB and addresses are read out of the notes of the canvas form."""
    for template in TEMPLATES:
        sentence, files = graph.about(template.name)
        assert {(file.name, file.directory, file.url, file.gigabytes) for file in files} == \
            {(file.name, file.directory, file.url, file.gigabytes) for file in template.files.values()}
        assert sentence.startswith(template.title) and sentence.endswith((".", "?", "!")) and len(sentence) < 220


def test_the_other_precision_is_known(two):
    known = graph.known_models()
    assert {"svdq-int4_r32-flux.1-dev.safetensors", "ae.safetensors"} <= known.keys()
    other = known["svdq-fp4_r32-flux.1-dev.safetensors"]
    assert other.directory == "diffusion_models" and other.url.endswith("nunchaku-flux.1-dev/resolve/main/" + other.name)


def test_settings_and_models(comfy, two):
    two["8"] = {"class_type": "VAELoader", "inputs": {"vae_name": "ae.safetensors"}}
    two["1"]["inputs"] |= {"scheduler": "s1", "model": ["2", 0]}
    bare = {one["set"]: one for one in graph.settings(two)}
    assert bare.keys() == {"First v1.5.seed", "First v1.5.scheduler", "Second.seed", "Second.images.image0",
                           "SaveImage.filename_prefix", "VAELoader.vae_name"}
    assert bare["Second.seed"] == {"set": "Second.seed", "value": 1, "type": None, "choices": None, "min": None, "max": None}
    (_, model, there, _), = graph.models(two)
    assert model.name == "ae.safetensors" and there is None
    with Client(comfy.url) as client:
        full = {one["set"]: one for one in graph.settings(two, client)}
        assert full["Second.seed"] | {"value": 0} == full["First v1.5.seed"] | {"value": 0, "set": "Second.seed"}
        assert full["Second.seed"]["max"] == 2**64 - 1 and len(full["First v1.5.scheduler"]["choices"]) == 40
        assert full["Second.images.image0"]["type"] is None         # the server says nothing of it
        assert [there for _, _, there, _ in graph.models(two, client)] == [False]
        two["8"]["inputs"]["vae_name"] = "old/ae.safetensors"       # another name: not one that a template fetches
        assert graph.models(two, client) == []
    assert comfy.paths().count("/object_info/KSampler") == 1        # asked once
