"""svdq/ways_out.py: messages tell people to do what can be done where they are, and both hosts may live in one process."""

import inspect
import re
import threading

import pytest
from huggingface_hub import errors as hub_errors

from svdq_pack.svdq import foreign, hub, lora_keys
from svdq_pack.svdq.container import TensorFile
from svdq_pack.svdq.errors import CheckpointError
from svdq_pack.svdq.ways_out import COMFYUI, DIFFUSERS, WAYS_OUT, said_in, way_out
from svdq_pack.tests.unit.test_errors import messages
from svdq_pack.tests.unit.test_imports import ROOT, graph

BOTH = pytest.mark.parametrize("host", [COMFYUI, DIFFUSERS], ids=["comfyui", "diffusers"])
OTHERS = {              # what no message of a host speaks of
    COMFYUI: re.compile(r"from_single_file|from_pretrained|load_lora|load_textual|pipeline|token\b"),
    DIFFUSERS: re.compile(r"comfyui|\bnodes?\b|'SVDQ|'Load |'Unet|'DualCLIP|Loader\b|models/|restart|refresh", re.IGNORECASE)}

FOREIGN = {             # a tensor of a file that is no SVDQ model: its way out
    "encoder.block.0.layer.0.SelfAttention.q.qweight": "4-bit T5", "transformer_blocks.0.attn.to_q.lora_A.weight": "LoRA",
    "lora_unet_single_blocks_0_linear1.lora_down.weight": "LoRA", "controlnet_blocks.0.weight": "ControlNet",
    "img_in.weight double_blocks.0.img_attn.qkv.weight": "16-bit model", "text_model.encoder.layers.0.mlp.fc1.weight": "CLIP",
    "encoder.block.0.layer.0.SelfAttention.q.weight": "T5", "decoder.conv_in.weight": "VAE", "taesd_decoder.1.weight": "VAE",
    "model.diffusion_model.input_blocks.0.0.weight first_stage_model.decoder.conv_in.weight": "all in one",
    "diffusion_model.blocks.0.weight": "another model", "transformer_blocks.0.img_mlp.net.0.proj.qweight": None,
    "layers.0.attention.to_qkv.qweight": None, "transformer_blocks.0.ff.inverted_conv.qweight": None,
    "down_blocks.0.attn2.to_q.qweight": None, "heard.of.by.nobody.qweight": None}
NO_LORAS = {            # the same of a file that is no LoRA for FLUX.1
    "transformer_blocks.0.qkv_proj.qweight single_transformer_blocks.0.mlp_fc1.qweight": "SVDQ model",
    "emb_params": "embedding", "clip_l t5xxl": "embedding", "lora_te1_text_model_x.alpha": "LoRA for text encoders",
    "transformer_blocks.0.mlp_fc1.lora_down": None, "unet.mid_block.attentions.0.proj_in.lora_A.weight": None,
    **{key: of for key, of in FOREIGN.items() if of != "LoRA"}}
ANSWERS = {             # of Hugging Face
    "GatedRepoError": "gated", "RepositoryNotFoundError": "private", "EntryNotFoundError": "no such file",
    "RevisionNotFoundError": None, "HfHubHTTPError": None}


def said(tmp_path):
    """(way out or None, message) of every message that has one, and of those beside them."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"GGUF\3\0\0\0" + bytes(100))
    with pytest.raises(CheckpointError) as caught:
        TensorFile(path)
    yield "GGUF", str(caught.value).replace(str(tmp_path), "")
    for dtype in ("BF16", "F8_E4M3", "F32"):
        for keys, of in FOREIGN.items():
            yield of, foreign.identify(keys.split(), {dtype})
        for keys, of in NO_LORAS.items():
            yield of, lora_keys.refusal(keys.split(), {dtype})
    for name, of in ANSWERS.items():
        kind = getattr(hub_errors, name)
        yield of, hub._answer(kind.__new__(kind, "403"), "svdq-int4_r32-flux.1-dev.safetensors")


@BOTH
def test_every_message(tmp_path, host):
    """Each says what its row of the table says, no row is left over, and none speaks of the other host."""
    with said_in(host):
        found = list(said(tmp_path))
    assert {of for of, _ in found} == {*WAYS_OUT, None}
    for of, text in found:
        assert of is None or WAYS_OUT[of][host] in text, (of, text)
        assert not OTHERS[host].search(text), text


@BOTH
def test_table(host):
    for of, ways in WAYS_OUT.items():
        assert len(ways) == 2 and not OTHERS[host].search(ways[host]), of
        assert ways[host] == ways[host].strip(". "), f"{of}: what stands around it ends the sentence"


def test_comfyui_is_spoken_to_unless_somebody_says_otherwise(tmp_path):
    """On the command line, too."""
    with said_in(COMFYUI):
        wanted = list(said(tmp_path))
    assert list(said(tmp_path)) == wanted


def test_said_for_a_block():
    ours, theirs = WAYS_OUT["gated"]
    with pytest.raises(KeyError), said_in(DIFFUSERS):
        assert way_out("gated") == theirs
        with said_in(COMFYUI):
            assert way_out("gated") == ours
        assert way_out("gated") == theirs
        way_out("heard of by nobody")
    assert way_out("gated") == ours


def test_said_for_each_call_of_a_function():
    """Its signature stays, which libraries look at."""
    @said_in(DIFFUSERS)
    def call(where, *, depth=0):
        return [way_out("VAE"), *(call(where, depth=depth - 1) if depth else ())]

    assert str(inspect.signature(call)) == "(where, *, depth=0)"
    assert call(1, depth=2) == [WAYS_OUT["VAE"][DIFFUSERS]] * 3 == call(1, depth=2)
    assert way_out("VAE") == WAYS_OUT["VAE"][COMFYUI]


def test_two_hosts_in_one_process():
    """Side by side: neither hears the other's words, whoever was imported last or called first."""
    found, together = {}, threading.Barrier(2, timeout=10)

    def ask(host):
        with said_in(host):
            together.wait()
            found[host] = way_out("LoRA")
            together.wait()

    threads = [threading.Thread(target=ask, args=(host,)) for host in (COMFYUI, DIFFUSERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict(enumerate(WAYS_OUT["LoRA"]))


# Texts that speak of ComfyUI where diffusers gets, and why they may.
ALLOWED = {
    "svdq/hub.py": ["as this node did not download it", "use 'SVDQ Loader'", "take 'SVDQ Loader'"],    # of `download`: a node's
    "svdq/kernels/cache.py": ["comfyui-svdq", "comfyui-svdq-"],                                        # a folder's name
    "svdq/lora_keys.py": ["ComfyUI (diffusion_model.)"]}                                               # a dialect's name


def test_no_other_text_is_for_one_host():
    """Of all files that svdq/hf is built on; what else a host has to say goes into the table."""
    edges, files = graph(), [name for name in graph() if name.startswith("svdq/hf/")]
    for name in files:
        files += sorted(edges[name] - set(files))
    assert {"svdq/hf/model.py", "svdq/container.py", "svdq/lora_file.py"} <= set(files)
    found = {name: texts for name in files if name != "svdq/ways_out.py" and (
        texts := [text for text in messages(ROOT / name) if OTHERS[DIFFUSERS].search(text)])}
    assert found.keys() == ALLOWED.keys(), found
    for name, texts in found.items():
        assert len(texts) == len(ALLOWED[name]) and all(
            any(part in text for text in texts) for part in ALLOWED[name]), texts


def test_doors_of_diffusers_say_so():
    """What users call there and what reads files."""
    doors = {"model.py": ["from_pretrained", "load_lora_adapter"], "lora_files.py": ["_for_pipeline"]}
    for name, functions in doors.items():
        text = (ROOT / "svdq" / "hf" / name).read_text()
        assert re.findall(r"@said_in\(DIFFUSERS\)\n *def (\w+)", text) == functions
