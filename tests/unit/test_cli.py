"""python PACK/svdq: as a user runs it, and main() for the many small cases."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from svdq_pack.svdq import checkpoint, cli
from svdq_pack.svdq.checkpoint import Checkpoint
from svdq_pack.svdq.families.family import by_layer
from svdq_pack.svdq.kernels.errors import command
from svdq_pack.tests.unit.helpers import BLOCKS, MODELS, REST, assert_same_tensors, metadata_of, relative, save, save_legacy

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(model, tmp_path):
    return save_legacy(tmp_path / "legacy", load_file(model), metadata_of(model))


@pytest.fixture
def run(capsys):
    """run("info", path) -> (exit code, stdout, stderr)"""
    def call(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()
    return call


def python(*arguments, folder, **environment):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, capture_output=True,
                          env={**os.environ, **environment}, timeout=300)


def test_from_another_folder(golden_dir, tmp_path):
    """As the README gives it, on a console that cannot print the file's name: it is escaped, nothing crashes."""
    path = save(tmp_path / "svdq-é.safetensors", load_file(golden_dir / f"{MODELS['nvfp4']}.safetensors"))
    done = python(ROOT / "svdq", "info", path.name, folder=tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"svdq-\xe9.safetensors" in done.stdout and b"problems        none" in done.stdout


def test_as_a_module_inside_the_pack():
    done = python("-m", "svdq", "--help", folder=ROOT)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout.startswith(f"usage: {command()}".encode())


def test_failure_and_the_command_it_names(golden_dir, tmp_path):
    """By a relative path. Modules of the pack that bear names of others' are not taken for theirs, and the command that the
    message gives works although its paths have blanks in them."""
    pack = tmp_path / "my packs" / "SVDQ"
    shutil.copytree(ROOT / "svdq", pack / "svdq", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("random", "numpy", "torch"):
        for folder in (pack, pack / "svdq"):
            (folder / f"{name}.py").write_text("raise ImportError('a file of the pack was taken for another module')\n")
    tensors = load_file(golden_dir / f"{MODELS['nvfp4']}.safetensors")
    for name in ("norm_out.linear.bias", "proj_out.weight"):
        del tensors[name]
    save(tmp_path / "two problems.safetensors", tensors)
    before = set(tmp_path.iterdir())
    done = python(os.path.relpath(pack / "svdq", tmp_path), "dequantize", "two problems.safetensors", "out.safetensors",
                  folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, b"") and set(tmp_path.iterdir()) == before
    assert done.stderr.startswith(b"svdq: two problems.safetensors: ") and done.stderr.count(b"\n") == 1
    start, line, end = done.stderr.decode().split("`")
    assert start.endswith("(1 more; ") and end.startswith(" lists them)")
    done = subprocess.run(line, shell=True, cwd=ROOT.anchor, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr, done.stdout.count("PROBLEM")) == (1, "", 2)


def test_through_a_link(tmp_path):
    """The pack is often linked into custom_nodes; here only its command is."""
    (tmp_path / "svdq").symlink_to(ROOT / "svdq", target_is_directory=True)
    done = python("svdq", "--help", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout.startswith(b"usage: ")


def test_without_a_console(golden_dir, tmp_path):
    path = save(tmp_path / "model.safetensors", load_file(golden_dir / f"{MODELS['nvfp4']}.safetensors"))
    done = python("-c", f"import runpy, sys; sys.stdout, sys.argv[1:] = None, ['info', {str(path)!r}]; "
                        f"runpy.run_path({str(ROOT / 'svdq')!r}, run_name='__main__')", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(os.name == "nt", reason="links")
@pytest.mark.parametrize("place", ["ComfyUI/.venv/bin", "ComfyUI/venv/bin", "ComfyUI/custom_nodes/pack/.environment/venv/bin"])
def test_the_message_names_the_python_of_comfyui(place, tmp_path):
    """Of the ComfyUI that the pack is linked into."""
    pack = tmp_path / "ComfyUI" / "custom_nodes" / "pack"
    pack.mkdir(parents=True)
    (pack / "svdq").symlink_to(ROOT / "svdq", target_is_directory=True)
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "python").touch()
    done = python("-c", f"import runpy, sys; sys.modules['torch'] = None; "
                        f"runpy.run_path({str(pack / 'svdq')!r}, run_name='__main__')", folder=tmp_path)
    assert done.returncode == 1 and done.stderr.decode().endswith(f"which seems to be {tmp_path / place / 'python'}\n")


@pytest.mark.parametrize("missing", ["torch", "filelock"])
def test_in_a_python_without(missing, tmp_path):
    done = python("-c", f"import runpy, sys; sys.modules[{missing!r}] = None; "
                        f"runpy.run_path({str(ROOT / 'svdq')!r}, run_name='__main__')", folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode() == f"svdq: {sys.executable} has no {missing}. Run the same command with the Python that runs " \
                                   f"ComfyUI{os.linesep}"


@pytest.mark.parametrize("at", ["import", "work"])
def test_interrupted(at, tmp_path):
    """Ctrl-C ends in one line, also while torch is being imported."""
    stop = "def stop(*_): raise KeyboardInterrupt"
    where = "stop" if at == "import" else "lambda _: type('cli', (), {'main': stop})"
    done = python("-c", f"import importlib, runpy, sys\n{stop}\nimportlib.import_module = {where}\n"
                        f"sys.exit(runpy.run_path({str(ROOT / 'svdq')!r}, run_name='__main__'))", folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.decode().split()) == (130, b"", ["svdq:", "interrupted"])


def test_info(run, model, precision):
    code, out, err = run("info", model)
    assert (code, err) == (0, "")
    lines = dict(line.strip().split(maxsplit=1) for line in out.splitlines()[1:])
    assert out.startswith(str(model)) and lines["problems"] == "none"
    assert lines["model"] == f"FLUX-like ({'schnell' if precision == 'int4' else 'dev, Krea or Kontext'})"
    assert lines["blocks"] == "1 double, 1 single" and lines["rank"] == "16 (12 layers)"


def test_info_json(run, model, folder):
    (code, out, err), (_, legacy, _) = run("info", model, "--json"), run("info", folder, "--json")
    facts, of_folder = json.loads(out), json.loads(legacy)
    assert (code, err, facts["problems"], facts["notices"]) == (0, "", [], [])
    assert (facts["container"], of_folder["container"]) == ("single file", "legacy folder")
    different = {key for key in facts if facts[key] != of_folder[key]}
    assert different == {"path", "container", "metadata_keys"}


def test_info_of_odd_names(run, model, tmp_path):
    """The path and the metadata's keys are anybody's words."""
    code, out, err = run("info", save(tmp_path / "\x1b[31mred.safetensors", load_file(model), {"\x1b[2Jcleared": "x"}))
    assert (code, err) == (0, "") and out.replace("\n", "").isprintable()
    assert r"\x1b[31mred.safetensors" in out and r"\x1b[2Jcleared" in out


def test_info_lists_every_problem(run, model, tmp_path):
    tensors = load_file(model)
    for name in ("transformer_blocks.0.qkv_proj.smooth", "norm_out.linear.bias", "proj_out.weight"):
        del tensors[name]
    path = save(tmp_path / "m.safetensors", tensors | {"odd": torch.zeros(1)})
    code, out, err = run("info", path)
    assert (code, err, out.count("PROBLEM"), out.count("notice")) == (1, "", 3, 1)
    assert "norm_out.linear.bias: missing" in out and "odd" in out
    assert len(json.loads(run("info", path, "--json")[1])["problems"]) == 3


def test_info_without_the_tensors_that_set_the_sizes(run, model, tmp_path):
    tensors = load_file(model)
    del tensors["x_embedder.weight"]
    code, out, err = run("info", save(tmp_path / "m.safetensors", tensors))
    assert (code, err) == (1, "") and "PROBLEM         x_embedder.weight: missing" in out
    assert "None" not in out and "model           unknown" in out


@pytest.mark.parametrize("arguments", [(), ("info",), ("merge", "a"), ("unpack", "a"),
                                       ("dequantize", "a", "b", "--dtype", "int8")])
def test_wrong_usage(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    assert end.value.code == 2 and f"usage: {command()}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["info", "merge", "dequantize"])
def test_no_such_file(run, tmp_path, command):
    code, out, err = run(command, tmp_path / "no.safetensors", *([] if command == "info" else [tmp_path / "out"]))
    assert (code, out) == (1, "") and err.startswith("svdq: ") and "no.safetensors: no such file" in err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["merge", "dequantize"])
def test_output_is_never_overwritten(run, folder, tmp_path, command):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"precious")
    code, _, err = run(command, folder, out)
    assert code == 1 and "out.safetensors: exists already" in err and out.read_bytes() == b"precious"
    code, _, err = run(command, folder, tmp_path / "nowhere" / "out.safetensors")
    assert code == 1 and "there is no folder" in err and "nowhere" in err


@pytest.mark.parametrize("command", ["merge", "dequantize"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_link_to_nowhere_is_never_replaced(run, folder, tmp_path, monkeypatch, command, when):
    out, write = tmp_path / "out.safetensors", checkpoint.write_tensors

    def put(*_):
        out.symlink_to("nowhere")

    if when == "before":
        put()
    else:
        monkeypatch.setattr(checkpoint, "write_tensors", lambda path, specs, metadata, tensors: write(
            path, specs, metadata, (item if i else put() or item for i, item in enumerate(tensors))))
    code, _, err = run(command, folder, out)
    assert code == 1 and "out.safetensors: exists already" in err and os.readlink(out) == "nowhere"
    assert sorted(os.listdir(tmp_path)) == ["legacy", "out.safetensors"]


def test_merge(run, folder, model, tmp_path):
    out = tmp_path / "out.safetensors"
    assert run("merge", folder, out) == (0, f"{out}\n", "")
    assert_same_tensors(load_file(out), load_file(model))
    assert metadata_of(out).keys() == metadata_of(model).keys()


@pytest.mark.parametrize("file", ["config.json", "comfy_config.json"])
def test_merge_without_a_json_file_that_is_too_long(run, folder, tmp_path, file):
    """It is made from the tensors."""
    (folder / file).write_text(" " * 20_000_000)
    out = tmp_path / "out.safetensors"
    code, said, notice = run("merge", folder, out)
    assert (code, said) == (0, f"{out}\n") and f"{file}: has more than 1,048,576 bytes" in notice and notice.count("\n") == 1
    assert json.loads(metadata_of(out)[file.removesuffix(".json")]) and run("info", out)[0] == 0


@pytest.mark.parametrize("command", ["merge", "dequantize"])
def test_paths_and_errors_are_printable(run, folder, tmp_path, monkeypatch, command):
    code, out, err = run(command, folder, tmp_path / "\x1b[31mred.safetensors")
    assert (code, err) == (0, "") and out == f"{tmp_path}/\\x1b[31mred.safetensors\n"

    def broken(*_):
        raise OSError("\x1b[31mred")

    monkeypatch.setattr(cli.checkpoint, command, broken)
    assert run(command, folder, tmp_path / "out.safetensors") == (1, "", "svdq: \\x1b[31mred\n")


@pytest.mark.parametrize("command", ["merge", "dequantize"])
def test_what_is_no_part_of_the_model_is_left_out(run, folder, model, tmp_path, command):
    """Whatever its numbers are, and the command says so; of the model, NaN is refused."""
    out, rest = tmp_path / "out.safetensors", load_file(folder / REST)
    beside = {"odd": torch.full((3,), torch.nan), "transformer_blocks.0.odd\x1b": torch.full((3,), torch.nan)}
    save(folder / REST, rest | beside)
    code, said, err = run(command, folder, out)
    assert (code, said) == (0, f"{out}\n") and "svdq: notice: 2 tensors" in err and "odd\\x1b" in err and err.count("\n") == 1
    if command == "merge":
        assert_same_tensors(load_file(out), load_file(model))
    out.unlink()
    save(folder / REST, rest | {"proj_out.bias": torch.full_like(rest["proj_out.bias"], torch.nan)})
    code, _, err = run(command, folder, out)
    assert code == 1 and "proj_out.bias: contains NaN" in err and not out.exists()


@pytest.mark.parametrize("command", ["merge", "dequantize"])
def test_a_damaged_source_leaves_no_output(run, folder, tmp_path, command):
    tensors = load_file(folder / BLOCKS)
    smooth = tensors["single_transformer_blocks.0.mlp_fc2.smooth"]
    save(folder / BLOCKS, tensors | {"single_transformer_blocks.0.mlp_fc2.smooth": torch.zeros_like(smooth)[:-1]})
    code, _, err = run(command, folder, tmp_path / "out.safetensors")
    assert code == 1 and "mlp_fc2.smooth: is BF16" in err
    save(folder / BLOCKS, tensors | {"single_transformer_blocks.0.mlp_fc2.smooth": torch.zeros_like(smooth)})
    if command == "dequantize":                             # found while writing
        code, _, err = run(command, folder, tmp_path / "out.safetensors")
        assert code == 1 and "mlp_fc2.smooth: contains 0" in err
    assert [entry.name for entry in tmp_path.iterdir()] == ["legacy"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantize(run, model, precision, golden, tmp_path, dtype):
    """The file is a FLUX under BFL names, and every layer of it answers the probes of the golden model."""
    out = tmp_path / "flux.safetensors"
    assert run("dequantize", model, out, "--dtype", str(dtype).removeprefix("torch.")) == (0, f"{out}\n", "")
    plain, io = load_file(out), golden(f"{MODELS[precision]}.io")
    shape = Checkpoint(model).shape
    assert {tensor.dtype for tensor in plain.values()} == {dtype} and metadata_of(out) == {"format": "pt"}
    assert "double_blocks.0.img_attn.norm.query_norm.scale" in plain
    assert "single_blocks.0.norm.key_norm.scale" in plain
    assert ("guidance_in.in_layer.weight" in plain) == shape.guidance
    assert len(plain) == 2 * 13 + (20 if shape.guidance else 16) + 6
    h = shape.hidden
    assert plain["single_blocks.0.linear1.weight"].shape == (7 * h, h)
    assert plain["single_blocks.0.linear2.weight"].shape == (h, 5 * h)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for layer in by_layer(shape.comfy_places()):
        weight, bias = plain[f"{layer.name}.weight"].float(), plain[f"{layer.name}.bias"].float()
        if layer.name.endswith("linear2"):                  # one bias for both inputs
            got = bias + sum(weight[:, place.col:place.col + place.k] @ io[f"probe.{place.slot.module}.x"].float()
                             for place in layer.places)
            want = sum(io[f"probe.{place.slot.module}.y"] for place in layer.places)
            assert relative(got, want) <= tolerance, layer
            continue
        for place in layer.places:
            rows, module = slice(place.row, place.row + place.n), place.slot.module
            got = weight[rows] @ io[f"probe.{module}.x"].float() + bias[rows]
            assert relative(got, io[f"probe.{module}.y"]) <= tolerance, module
