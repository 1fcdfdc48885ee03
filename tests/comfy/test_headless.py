"""workflows/run.py as it is started from a shell, by a Python without packages, beside real ComfyUIs.

It runs in a copy of the checkout whose bundled workflows are test_templates_run.py's small ones.
"""

import contextlib
import functools
import http.server
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat

from svdq_pack.tests.comfy.test_templates_run import BATCHES, small, zoo  # noqa: F401
from svdq_pack.tests.headless import certificates
from svdq_pack.tests.headless.proxy import Proxy
from svdq_pack.tools.templates.graphs import TEMPLATES, VAE
from svdq_pack.workflows.headless import process

ROOT = Path(__file__).resolve().parents[2]
API = {template.name: json.loads((ROOT / "workflows" / "api" / f"{template.name}.json").read_text()) for template in TEMPLATES}
FOREVER = 10_000                # steps that nobody waits for
PATIENCE = 300                  # seconds for whatever must come

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs pseudo-terminals and signals")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A ComfyUI's folder with this pack in it. run.py is a copy: Python looks for modules where a script truly stands."""
    pack = tmp_path_factory.mktemp("comfy") / "custom_nodes" / "svdq-under-test"
    (pack / "workflows" / "api").mkdir(parents=True)
    (pack / "svdq").symlink_to(ROOT / "svdq")
    (pack / "workflows" / "headless").symlink_to(ROOT / "workflows" / "headless")
    for path in (ROOT / "workflows").glob("*.json"):
        (pack / "workflows" / path.name).symlink_to(path)
    for name, graph in API.items():
        graph = small(graph)
        for node in graph.values():
            if node["class_type"] == "EmptySD3LatentImage":
                node["inputs"]["batch_size"] = BATCHES.get(name, 1)
        (pack / "workflows" / "api" / f"{name}.json").write_text(json.dumps(graph))
    text, port = (ROOT / "workflows" / "run.py").read_text(), process._free_port(0)
    assert "\nPORT = 8188 " in text, "or a ComfyUI of whoever runs the tests is asked"
    (pack / "workflows" / "run.py").write_text(text.replace("\nPORT = 8188 ", f"\nPORT = {port} "))
    return pack


@pytest.fixture
def run_py(checkout, tmp_path):
    """run_py(arguments, **of Popen) -> Popen, with pipes, its pictures in tmp_path/out. Whatever still runs is ended."""
    running = []

    def run_py(*arguments, **options):
        # -S: not even what is installed beside this Python
        command = [sys.executable, "-S", "-E", checkout / "workflows" / "run.py", "--out", tmp_path / "out", *arguments]
        running.append(subprocess.Popen(command, cwd=tmp_path, **{
            "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}))
        return running[-1]

    yield run_py
    for process_ in running:
        process_.kill()
        process_.communicate()


@pytest.fixture
def on_server(run_py, server):
    return functools.partial(run_py, "--server", server.process.url)


def ended(process_):
    """(exit code, lines of standard output, standard error)"""
    out, err = process_.communicate(timeout=PATIENCE)
    return process_.returncode, out.splitlines(), err


def read_until(stream, wanted):
    """What a process says until a line holds this."""
    lines = []
    for line in stream:
        lines.append(line)
        if re.search(wanted, line):
            return lines
    raise AssertionError(f"ended without {wanted}: {lines}")


def idle(server):
    """Wait until the server has nothing to do."""
    deadline = time.monotonic() + PATIENCE
    while any((queue := server.json("/queue")).values()):
        assert time.monotonic() < deadline, queue
        time.sleep(0.1)


@pytest.fixture
def others(server, graph):
    """others(steps) -> the id of a job of somebody else. All are gone afterwards."""
    from svdq_pack.workflows.headless.client import Client
    with Client(server.process.url) as client:
        queued = []

        def queue(steps):
            queued.append(client.queue(graph(steps=steps, seed=len(queued) + int(time.time()))))
            return queued[-1]

        yield queue
        for prompt_id in queued:
            client.interrupt(prompt_id)
        idle(server)


def outcome(server, prompt_id):
    return server.json(f"/history/{prompt_id}")[prompt_id]["status"]["status_str"]


# ---- all templates, by name ----

@pytest.mark.usefixtures("zoo")
@pytest.mark.parametrize("name", API)
def test_template(name, on_server, server, base, tmp_path):
    """By the name without its number, pictures by upload, another for each node; they are what it ran on."""
    graph, changes = small(API[name]), []
    for id, node in graph.items():
        if node["class_type"] == "LoadImage":
            picture = Image.linear_gradient("L").rotate(90 * len(changes)).resize((64, 64)).convert("RGBA")
            picture.paste((200, 40, 40, 0), (16, 16, 40, 40))
            picture.save(tmp_path / f"uploaded {name} {id}.png")
            changes += ["--set", f"{id}.image=@uploaded {name} {id}.png"]
    code, out, err = ended(on_server(name[len("svdq-00-"):], *changes, "--json"))
    assert code == 0, err
    said = json.loads(out[0])
    assert len(out) == 1 and said["error"] is None and (said["files"] or said["texts"])
    for path in said["files"]:
        assert Path(path).parent == tmp_path / "out" and Path(path).is_file()
    ran = server.json(f"/history/{said['prompt_id']}")[said["prompt_id"]]["prompt"][2]
    uploaded = [node["inputs"]["image"] for node in ran.values() if node["class_type"] == "LoadImage"]
    assert uploaded == [f"uploaded {name} {id}.png" for id, node in graph.items() if node["class_type"] == "LoadImage"]
    for path in (*(base / "input" / picture for picture in uploaded),
                 *(base / "models").glob("*/*mine.*")):         # what was quantised, and what was captured for it
        path.unlink()


@pytest.mark.usefixtures("zoo")
def test_a_mask_of_its_own(on_server, tmp_path, base):
    """White is painted anew, black stays."""
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(tmp_path / "photo.png")
    masks, pictures = {"none": [], "left": (0, 0, 32, 64), "right": (32, 0, 64, 64)}, {}
    for name, box in masks.items():
        mask = Image.new("RGB", (64, 64))
        if box:
            mask.paste((255, 255, 255), box)
        mask.save(tmp_path / f"mask-{name}.png")
        code, out, err = ended(on_server("fill-inpaint", "--set", "Picture.image=@photo.png",
                                         "--set", f"Picture.mask=@mask-{name}.png"))
        assert code == 0, err
        pictures[name] = Image.open(out[0]).convert("RGB")
        (base / "input" / f"mask-{name}.png").unlink()
    (base / "input" / "photo.png").unlink()

    def change(name):
        differs = ImageChops.difference(pictures[name], pictures["none"]).convert("L")
        wide, high = differs.size
        return [ImageStat.Stat(differs.crop(box)).sum[0] for box in ((0, 0, wide // 2, high), (wide // 2, 0, wide, high))]

    (left, right), (other_left, other_right) = change("left"), change("right")
    assert left > 2 * right and other_right > 2 * other_left, (left, right, other_left, other_right)


@pytest.mark.usefixtures("zoo")
def test_the_oldest_comfyui(run_py, servers, base, tmp_path):
    """Upload, mask, the files that are there, two runs, and a job taken back: what it answers has the same form."""
    oldest = servers("oldest")
    on_oldest = functools.partial(run_py, "--server", oldest.process.url.removeprefix("http://"))
    for name in ("photo.png", "mask.png"):
        Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(tmp_path / name)
    code, out, err = ended(on_oldest("fill-inpaint", "--set", "Picture.image=@photo.png", "--set", "Picture.mask=@mask.png",
                                     "--count", "2"))
    assert code == 0 and len(out) == 2, err
    for name in ("photo.png", "mask.png"):
        (base / "input" / name).unlink()
    code, out, err = ended(on_oldest("fill-inpaint", "--show"))
    assert code == 0 and "there    vae/ae.safetensors  0.3 GB" in out
    process_ = on_oldest("demo", "--set", f"Sampler.steps={FOREVER}")
    read_until(process_.stderr, r"Sampler, step \d+/10000$")
    process_.send_signal(signal.SIGTERM)
    assert ended(process_)[0] == 130
    idle(oldest)


# ---- what it says ----

def test_seeds_and_json(on_server):
    code, out, err = ended(on_server("demo", "--set", "Sampler.steps=1", "--seed", "5", "--count", "2", "--json", "--quiet"))
    assert (code, err) == (0, "")
    runs = [json.loads(line) for line in out]
    assert [one["seeds"] for one in runs] == [{"Sampler.seed": 5}, {"Sampler.seed": 6}]
    first, second = (Path(one["files"][0]).read_bytes() for one in runs)
    assert first != second


def test_prompts_from_standard_input(on_server):
    """One of them the demo does not know: the others are painted, and the exit code tells."""
    process_ = on_server("demo", "--set", "Sampler.steps=1", "--prompts", "-", stdin=subprocess.PIPE)
    out, err = process_.communicate("a red circle on a white background\n# no\na red cat\na blue ring on a pink background\n",
                                    timeout=PATIENCE)
    assert process_.returncode == 1 and len(out.splitlines()) == 2 and "does not know 'cat'" in err


def test_texts_where_nothing_is_saved(on_server):
    code, out, err = ended(on_server("is-it-fast-here"))
    assert code == 0 and len(out) > 5 and "done in" in err


@pytest.mark.usefixtures("zoo")
def test_show(on_server):
    """Of the files one is there; of the other, the other precision is."""
    other = "svdq-fp4_r32-flux.1-dev.safetensors"
    code, out, err = ended(on_server("flux-dev-text-to-image", "--show", "--set", f"SVDQ Loader.model_name={other}"))
    assert code == 0, err
    sampler, = (line for line in out if line.startswith("Sampler.sampler_name="))
    assert sampler.startswith('Sampler.sampler_name="euler"   euler, ') and sampler.endswith("more")
    assert "Sampler.steps=2   1 to 10000" in out
    states = {line.split()[1]: line.split()[0] for line in out if line.startswith(("there", "missing"))}
    assert states == {"vae/ae.safetensors": "there", f"diffusion_models/{other}": "missing"}


def test_on_a_terminal(run_py, server, tmp_path):
    """One line that changes; the path goes to the pipe."""
    mine, its = pty.openpty()
    process_ = run_py("--server", server.process.url, "demo", "--set", "Sampler.seed=77", stderr=its)
    os.close(its)
    said = b""
    with contextlib.suppress(OSError):                  # the other end is closed
        while select.select([mine], [], [], PATIENCE)[0] and (piece := os.read(mine, 1 << 16)):
            said += piece
    os.close(mine)
    assert process_.wait(PATIENCE) == 0
    assert re.search(rb"\r\[\d/\d\] Sampler, step \d+/2 *\r", said) and b"done in" in said.splitlines()[-1]
    assert Path(process_.stdout.read().strip()).parent == tmp_path / "out"


# ---- a busy server, and leaving ----

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_leaving_while_it_waits(number, on_server, server, others):
    running = others(FOREVER)
    process_ = on_server("demo")
    read_until(process_.stderr, "^queued, 1 ahead$")
    behind = others(1)
    process_.send_signal(number)
    code, out, err = ended(process_)
    assert (code, out, err) == (130, [], "run.py: interrupted\n")
    queue = server.json("/queue")
    assert [[item[1] for item in queue[kind]] for kind in ("queue_running", "queue_pending")] == [[running], [behind]]
    server.client.interrupt(running)
    idle(server)
    assert outcome(server, behind) == "success"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_leaving_while_it_runs(number, on_server, server, others):
    process_ = on_server("demo", "--set", f"Sampler.steps={FOREVER}", "--json")
    read_until(process_.stderr, r"Sampler, step \d+/10000$")
    behind = others(1)
    process_.send_signal(number)
    code, out, err = ended(process_)
    said = json.loads(out[0])
    assert code == 130 and said["error"] == "interrupted" and said["prompt_id"]
    idle(server)
    assert outcome(server, said["prompt_id"]) == "error" and outcome(server, behind) == "success"


def test_the_queue_moves_on(on_server, server, others):
    """Two ahead, then one, then it runs."""
    first, second = others(FOREVER), others(FOREVER)
    process_ = on_server("demo", "--set", "Sampler.steps=1")
    read_until(process_.stderr, "^queued, 2 ahead$")
    server.client.interrupt(first)
    read_until(process_.stderr, "^queued, 1 ahead$")
    server.client.interrupt(second)
    code, out, err = ended(process_)
    assert code == 0 and len(out) == 1


def test_time_is_up(on_server, server, others):
    """Behind somebody who is not finished: only the own job goes."""
    running = others(FOREVER)
    code, out, err = ended(on_server("demo", "--timeout", "2"))
    assert (code, out) == (4, []) and "not done after 2 s" in err
    queue = server.json("/queue")
    assert [item[1] for item in queue["queue_running"]] == [running] and queue["queue_pending"] == []


# ---- a server that is protected, and one that dies ----

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return certificates.write(tmp_path_factory.mktemp("certificates"))


def test_behind_a_proxy_with_a_token(run_py, server, made, tmp_path):
    (tmp_path / "headers").write_text("Authorization: Bearer s3cret\n")
    with Proxy(server.process.port, made[1], "Bearer s3cret") as proxy:
        arguments = ["--server", proxy.url, "demo", "--set", "Sampler.steps=1", "--set", "Sampler.seed=78"]
        code, out, err = ended(run_py(*arguments, "--ca", made[0], "--header", f"@{tmp_path / 'headers'}"))
        assert code == 0 and Path(out[0]).is_file() and "Sampler, step 1/1" in err
        code, out, err = ended(run_py(*arguments, "--ca", made[0]))
        assert code == 3 and "401" in err
        code, out, err = ended(run_py(*arguments))
        assert code == 3 and "--ca FILE" in err


def test_a_server_that_dies_meanwhile(run_py, server, made):
    """What is between is cut, as the server is the other tests'."""
    proxy = Proxy(server.process.port, made[1], "x")
    with proxy:
        process_ = run_py("--server", proxy.url, "demo", "--ca", made[0], "--header", "Authorization: x",
                          "--set", "Sampler.steps=10000", "--json")
        read_until(process_.stderr, r"Sampler, step \d+/10000$")
    proxy.cut()
    code, out, err = ended(process_)
    said = json.loads(out[0])
    assert code == 3 and "no ComfyUI answers" in said["error"]
    server.client.interrupt(said["prompt_id"])
    idle(server)


# ---- files of models ----

class Hub(http.server.SimpleHTTPRequestHandler):
    """Serves the folder of a test."""

    def log_message(self, *_):
        """Keep the test output quiet."""


@pytest.mark.usefixtures("zoo")
def test_a_missing_file_is_fetched(on_server, base, tmp_path):
    """From the address in the template's canvas form, by a mirror on loopback."""
    vae = base / "models" / VAE.directory / VAE.name
    place = tmp_path / urllib.parse.urlsplit(VAE.url).path[1:]
    place.parent.mkdir(parents=True)
    shutil.move(vae, place)
    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, directory=tmp_path))
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    environ = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
    try:
        for arguments, message in (([], f"  vae/ae.safetensors (0.3 GB): {environ['HF_ENDPOINT']}/"),
                                   (["--download"], f"They go to {vae.parent}.\nNobody is there to agree: say --yes")):
            code, out, err = ended(on_server("flux-dev-text-to-image", *arguments, env=environ))
            assert code == 2 and message in err and not vae.exists()
        code, out, err = ended(on_server("flux-dev-text-to-image", "--download", "--yes", env=environ))
        assert code == 0 and len(out) == 1, err
        assert vae.read_bytes() == place.read_bytes() and re.search("^ae.safetensors: 0.0. of 0.0. GB$", err, re.M)
    finally:
        hub.shutdown()
        shutil.move(place, vae)


# ---- one of its own ----

@pytest.fixture
def tree(checkout, base, newest):
    """Makes the folder that the checkout stands in a ComfyUI: its main.py starts the newest one beside the tests' base."""
    from svdq_pack.workflows.headless import maker
    starter = [str(ROOT / "workflows" / "headless" / "comfy_main.py"), newest]
    if not maker.vision_cannot_load().exists():
        starter = [f"{newest}/main.py"]
    command = [sys.executable, *starter, "--base-directory", str(base), "--database-url", "sqlite:///:memory:", "--cpu"]
    main = checkout.parents[1] / "main.py"
    main.write_text(f"import os, sys\nos.execv({sys.executable!r}, {command!r} + sys.argv[1:])\n")
    yield main.parent
    main.unlink()


def test_open_and_then_the_default(run_py, tree, tmp_path):
    """The one that --open starts serves others meanwhile, and ends with it."""
    environ = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY", "COMFYUI_PATH")}
    browser = run_py("--open", env=environ)
    page, = read_until(browser.stdout, "^http")
    url = page.partition("/?")[0]
    assert page == f"{url}/?template=svdq-00-demo&source=svdq-under-test\n"
    code, out, err = ended(run_py("demo", "--set", "Sampler.steps=1", env=environ))
    assert code == 0 and Path(out[0]).is_file() and f"using the ComfyUI at {url}; --new would start another" in err
    browser.send_signal(signal.SIGINT)
    code, out, err = ended(browser)
    assert code == 0 and f"starting ComfyUI in {tree}" in err and err.endswith("Ctrl-C ends it.\n")
    with pytest.raises(OSError):
        process.NO_PROXY.open(f"{url}/system_stats", timeout=5)
