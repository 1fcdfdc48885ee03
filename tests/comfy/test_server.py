"""What a user of a running ComfyUI sees of the pack: over HTTP, in a real server."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy
import pytest

from svdq_pack.workflows.headless.client import Failed, Interrupted, Rejected, ServerError

ROOT = Path(__file__).resolve().parents[2]
NODES = ["SVDQModelLoader", "SVDQHubLoader", "SVDQLoraLoader", "SVDQLoraStack", "SVDQCaptureCalibration", "SVDQQuantize",
         "SVDQCompare", "SVDQInfo", "SVDQDoctor", "SVDQLoadConditioning", "SVDQSaveConditioning", "SVDQDemoPrompt",
         "SVDQDemoVAE", "SVDQTextEncoderLoader"]


def pixels(image):
    return numpy.asarray(image).astype(int)


def same(a, b):
    return a.size == b.size and a.tobytes() == b.tobytes()


# ---- what it offers

@pytest.fixture(scope="module")
def object_info(server):
    return server.client.object_info()


def test_nodes(object_info):
    ours = {name for name, node in object_info.items() if node["python_module"] == "custom_nodes.svdq-under-test"}
    assert ours == set(NODES)


@pytest.mark.parametrize("name", NODES)
def test_node_explains_itself(name, object_info):
    node = object_info[name]
    assert node["display_name"] != name and node["category"] in ("svdq/loaders", "svdq/quantize", "svdq/tools")
    assert node["description"].endswith(".") and len(node["description"]) > 40
    assert node["search_aliases"]
    assert all(node["output_tooltips"])
    for kind in ("required", "optional"):
        for key, (_, options) in node["input"].get(kind, {}).items():
            if key not in ("conditioning", "model"):                # a link, and its name says all
                assert options["tooltip"].endswith("."), key


@pytest.mark.parametrize("name", NODES)
def test_help_page(name, server):
    """The frontend asks for it at this place."""
    page = server.get(f"/extensions/svdq-under-test/docs/{name}.md").decode()
    assert len(page) > 200


def test_models_are_listed(object_info):
    names = object_info["SVDQModelLoader"]["input"]["required"]["model_name"][1]["options"]
    assert "demo.safetensors" in names
    assert "old/svdq-legacy" in names and not [name for name in names if "transformer_blocks" in name]
    places = [names.index(name) for name in ("old/svdq-legacy", "svdq-int4_r16-demo.safetensors", "demo.safetensors")]
    assert places == sorted(places), "the user's own SVDQ models come first, then the pack's"
    assert "conditioning.safetensors" in \
        object_info["SVDQLoadConditioning"]["input"]["required"]["file"][1]["options"]


@pytest.mark.parametrize("which", ["newest", "oldest"])
def test_the_demo_is_in_lists_of_ours_alone(which, servers):
    """And comes after what the user has."""
    info = servers(which).client.object_info()
    stock = json.dumps([info[name]["input"] for name in info if info[name]["python_module"] != "custom_nodes.svdq-under-test"])
    assert "demo.safetensors" in stock
    for name in ("svdq-int4_r16-demo", "svdq-fp4_r16-demo", "svdq-demo-vae", "svdq-demo-sticker"):
        assert name not in stock
    loras = info["SVDQLoraLoader"]["input"]["required"]["lora_name"][1]["options"]
    assert loras[-1] == "svdq-demo-sticker.safetensors" and {"peft.safetensors", "kohya_bfl.safetensors"} <= set(loras)


def test_templates(server):
    files = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
    listed = server.json("/workflow_templates")
    assert sorted(listed["svdq-under-test"]) == files
    for name in files:
        assert server.json(f"/api/workflow_templates/svdq-under-test/{name}.json")["nodes"]
        assert server.get(f"/api/workflow_templates/svdq-under-test/{name}.jpg")[:3] == b"\xff\xd8\xff"


# ---- running

@pytest.mark.parametrize("model", ["demo.safetensors", "int4.safetensors", "nvfp4.safetensors"])
def test_picture(model, run, graph):
    image, = run(graph(model, seed=7))
    assert image.size == (64, 64)
    assert pixels(image).std() > 5                          # not one colour
    other, = run(graph(model, seed=8))
    assert not same(image, other)


def test_same_seed_same_bytes(run, graph):
    """The copy has another name, so that nothing of the first run is taken from a cache."""
    sampled = []
    first, = run(graph(seed=3))
    second, = run(graph("demo-copy.safetensors", seed=3),
                  lambda kind, data: sampled.append(kind) if kind == "progress" else None)
    assert sampled and same(first, second)


def test_batch(run, graph):
    images = run(graph(seed=4, batch_size=2))
    assert [image.size for image in images] == [(64, 64)] * 2
    assert abs(pixels(images[0]) - pixels(images[1])).max() > 10


@pytest.mark.parametrize("width, height", [(200, 136), (64, 328)])
def test_any_size(width, height, run, graph):
    image, = run(graph(width=width, height=height))
    assert image.size == (width, height)
    assert pixels(image).std() > 5


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_dequantised_in_the_stock_loader(precision, run, graph):
    """UNETLoader with what 'python -m svdq dequantize' wrote: the same picture, at most one step of 255 apart."""
    stock = graph(seed=5, steps=4)
    stock["1"] = {"class_type": "UNETLoader", "_meta": {"title": "stock"},
                  "inputs": {"unet_name": f"{precision}-dense.safetensors", "weight_dtype": "default"}}
    ours, theirs = run(graph(f"{precision}.safetensors", seed=5, steps=4, act_bits="16")), run(stock)
    assert abs(pixels(ours[0]) - pixels(theirs[0])).max() <= 1


def test_legacy_folder(run, graph):
    assert same(run(graph("old/svdq-legacy", seed=6))[0], run(graph(seed=6))[0])


def test_node_of_the_earlier_pack(run, graph):
    """A workflow made for NunchakuFluxDiTLoader runs through our loader."""
    old = graph(seed=10)
    old["1"] = {"class_type": "NunchakuFluxDiTLoader", "_meta": {"title": "Nunchaku FLUX DiT Loader"},
                "inputs": {"model_path": "demo-copy.safetensors", "cache_threshold": 0, "attention": "nunchaku-fp16",
                           "cpu_offload": "auto", "device_id": 0, "data_type": "bfloat16"}}
    ours = graph(seed=10)
    ours["1"]["inputs"]["compute_dtype"] = "bfloat16"
    assert same(run(old)[0], run(ours)[0])


def test_prompt_of_the_earlier_pack_as_scripts_write_it(server, run, graph):
    """Without `_meta`, or with one of another kind, and without an input that older versions had not: what ComfyUI's
    replacement takes for granted."""
    old = graph(seed=10)
    for meta in ({}, {"_meta": []}, {"_meta": None}):
        old["1"] = {"class_type": "NunchakuFluxDiTLoader", "inputs": {"model_path": "demo-copy.safetensors"}, **meta}
        assert same(run(old)[0], run(graph(seed=10))[0])
    old["1"]["inputs"] = {}
    with pytest.raises(Rejected, match="model_name"):
        server.client.queue(old)


def test_save_and_load_conditioning(server, run, graph):
    made = graph(seed=11)
    made["30"] = {"class_type": "SVDQSaveConditioning", "_meta": {"title": "save"},
                  "inputs": {"conditioning": ["3", 0], "filename_prefix": "kept"}}
    first, = run(made)
    file, = server.outputs()["30"]["text"]
    again = graph(seed=11, positive=["2", 0])
    again["2"]["inputs"]["file"] = f"{file} [output]"
    again["4"]["inputs"]["conditioning"] = ["2", 0]
    assert same(run(again)[0], first)


def test_info(server, run):
    run({"1": {"class_type": "SVDQInfo", "inputs": {"model_name": "nvfp4.safetensors"}, "_meta": {"title": "info"}}})
    text, = server.outputs()["1"]["text"]
    assert "nvfp4" in text and "FLUX-like (dev" in text and "problems        none" in text


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
@pytest.mark.parametrize("which", ["newest", "oldest"])
def test_doctor(which, servers):
    """On a CPU; the second run looks again."""
    server, graph = servers(which), {"1": {"class_type": "SVDQDoctor", "inputs": {}, "_meta": {"title": "doctor"}}}
    for _ in range(2):
        server.run(graph)
        text, = server.outputs()["1"]["text"]
        assert "\nINT4 files: fused kernels, 4-bit weights, 8-bit activations\n" in text
        assert "\nNVFP4 files: 4-bit weights, exact activations\n" in text
        assert "self-test: all 39 passed" in text and text.startswith("GPU: none that torch can use\n")


def test_replaced_file_is_loaded_again(base, run, graph):
    models = base / "models" / "diffusion_models"
    changing = models / "changing.safetensors"
    shutil.copy(models / "int4.safetensors", changing)
    before, = run(graph(changing.name, seed=12))
    shutil.copy(models / "demo.safetensors", models / "new.tmp")
    os.replace(models / "new.tmp", changing)
    after, = run(graph(changing.name, seed=12))
    assert not same(before, after)
    assert same(after, run(graph(seed=12))[0])


# ---- when things go wrong

def test_interrupt(server, run, graph):
    asked = []

    def stop(kind, data):
        if kind == "progress" and data["node"] == "6" and not asked:        # ComfyUI leaves steps out when it is fast
            asked.append(data["value"])
            server.client.interrupt(data["prompt_id"])

    with pytest.raises(Interrupted, match="KSampler"):
        run(graph(seed=13, steps=10_000), stop)
    assert run(graph(seed=13))


def test_missing_model(run, graph):
    with pytest.raises(Rejected, match="(?s)model_name.*not in list"):
        run(graph("nowhere.safetensors"))


@pytest.mark.parametrize("file, message", [
    ("truncated.safetensors", "not a complete safetensors file.*cut short or is damaged"),
    ("nan.safetensors", "single_transformer_blocks.0.mlp_fc2.wscales: contains NaN.*get it again"),
    ("sixteen-bit.safetensors", "16-bit FLUX model that is not SVDQ; load it with 'Load Diffusion Model'"),
])
def test_bad_file(file, message, run, graph):
    """An error that says what the file is and what to do; the next run works."""
    with pytest.raises(Failed, match=rf"node 1 \(SVDQModelLoader\) failed: .*CheckpointError: .*{file}.*{message}"):
        run(graph(file))
    assert run(graph(seed=14))


@pytest.mark.parametrize("kind, inputs, error, sentence", [
    ("SVDQInfo", {"model_name": "sixteen-bit.safetensors"}, "CheckpointError", "sixteen-bit.safetensors: .*16-bit FLUX model"),
    ("SVDQHubLoader", {"repo_id": "no-owner"}, "CheckpointError", "repo_id 'no-owner': needs the form owner/name"),
    ("SVDQLoraLoader", {"lora_name": "peft.safetensors", "strength": 1, "model": ["10", 0]}, "LoraError",
     "the MODEL is no SVDQ model"),
    ("SVDQCompare", {"reference": ["20", 0], "quantised": ["20", 0], "reference_latent": ["21", 0]}, "CompareError",
     "one latent is connected"),
    ("SVDQDemoPrompt", {"text": "a red cat"}, "PromptError", "The demo model does not know 'cat'")])
def test_an_error_report_starts_with_the_sentence(kind, inputs, error, sentence, server, run):
    """In its name is no path of this machine, which ComfyUI puts before the names of a pack's modules."""
    graph = {"1": {"class_type": kind, "inputs": inputs},
             "10": {"class_type": "UNETLoader", "inputs": {"unet_name": "int4-dense.safetensors", "weight_dtype": "default"}},
             "20": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}},
             "21": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
             "30": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}}
    with pytest.raises(Failed):
        run(graph)
    report, = (data for name, data in server.json(f"/history/{server.prompt_id}")[server.prompt_id]["status"]["messages"]
               if name == "execution_error")
    assert report["exception_type"] == f"svdq.{error}"
    assert re.match(f"(?s)(/\\S+/)?{sentence}", report["exception_message"]), report["exception_message"]


@pytest.mark.parametrize("which", ["newest", "oldest"])
@pytest.mark.parametrize("inputs", [{"repo_id": "no-owner"}, {"other_repo_id": "no-owner"}])
def test_any_repository_may_be_named(which, inputs, servers):
    """Where graphs of the API name one that the list lacks, too: it is the node that looks at it, not ComfyUI."""
    listed = servers(which).client.object_info()["SVDQHubLoader"]["input"]["required"]["repo_id"][1]["options"]
    assert len(listed) == 7
    graph = {"1": {"class_type": "SVDQHubLoader", "inputs": {"repo_id": listed[0], **inputs}},
             "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 1]}}}
    with pytest.raises(Failed, match="repo_id 'no-owner': needs the form owner/name"):
        servers(which).run(graph)


def test_unknown_help_page(server):
    """The check of help pages can fail."""
    with pytest.raises(ServerError, match="404"):
        server.get("/extensions/svdq-under-test/docs/NoSuchNode.md")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow(server, run, graph):
    """20 prompts that take turns among three models, each evicted from the cache and loaded anew."""
    def resident():
        status = Path(f"/proc/{server.process.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def turn(number):
        for model in ("demo.safetensors", "int4.safetensors", "nvfp4.safetensors", "demo-copy.safetensors"):
            run(graph(model, seed=100 + number, steps=1))

    turn(0)
    sizes = [resident()]
    for number in range(1, 6):
        turn(number)
        sizes.append(resident())
    print("MiB", sizes)
    assert sizes[-1] - sizes[0] < 20                    # measured 0.5; one model kept per prompt would be 100
