import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from headless import environment

ROOT = Path(__file__).resolve().parents[2]
HEARTS = "two red hearts on a blue background"
STAR = "a green star in the middle"


@pytest.fixture
def listed(tmp_path):
    """listed(text, ...): path of a list with these lines; objects make it a .jsonl."""
    def write(*lines):
        path = tmp_path / ("list.txt" if isinstance(lines[0], str) else "list.jsonl")
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines),
                        encoding="utf-8")
        return path
    return write


@pytest.fixture
def stand_in(batch, monkeypatch):
    """In place of Ray and the painter: `seen` is what was painted; a prompt in `trouble` goes as it says, None dies with its
    worker, an exception happens to the run itself."""
    made = types.SimpleNamespace(seen=[], trouble={})

    def paint(options, jobs, report):
        def answers():
            for i, job in enumerate(jobs):
                trouble = made.trouble.get(job.prompt, "")
                if isinstance(trouble, BaseException):
                    raise trouble
                if trouble is None:
                    continue
                made.seen.append(job.prompt)
                yield {"job": i, "seconds": 0.5, "error": trouble or None}, None if trouble else png(batch, job.origin())
        batch.collect(options, jobs, report, answers())
        return 2

    monkeypatch.setattr(batch, "paint", paint)
    monkeypatch.setattr(batch, "enter", lambda: None)
    return made


def png(batch, origin=None, color=0):
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo
    file, info = io.BytesIO(), PngInfo()
    if origin is not None:
        info.add_text(batch.CHUNK, json.dumps(origin))
    Image.new("RGB", (8, 8), (color, 0, 0)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def rows(out):
    return [json.loads(line) for line in (out / "report.jsonl").read_text(encoding="utf-8").splitlines()]


# ---- the list ----

def test_text(batch, tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbf" + f"{HEARTS}\r\n\r\n  # {STAR}\r\n \t{STAR}  \r\nkein Stern: \u2028 \u00fc".encode())
    jobs = batch.read(path)
    assert [(job.line, job.prompt) for job in jobs] == [(1, HEARTS), (4, STAR), (5, "kein Stern: \u2028 \u00fc")]
    assert [job.name for job in jobs[:2]] == ["two-red-hearts-on-a-blue-background-" + jobs[0].name[-8:],
                                              "a-green-star-in-the-middle-" + jobs[1].name[-8:]]


def test_json(batch, listed):
    job, other = batch.read(listed({"prompt": HEARTS, "seed": 7, "name": "hearts", "steps": 4, "guidance_scale": 2.5},
                                   {"prompt": STAR}), lora="sticker")
    assert (job.name, job.seed, job.more) == ("hearts", 7, {"steps": 4, "guidance_scale": 2.5})
    assert job.origin() == {"prompt": HEARTS, "seed": 7, "model": "demo", "lora": "sticker", "steps": 4, "guidance_scale": 2.5}
    assert other.more == {}


@pytest.mark.parametrize("line, message", [
    ("{", "not JSON"), ("[" * 100_000, "not JSON"), ("9" * 5000, "not JSON"),
    ('"a star"', 'an object with a text as "prompt"'), ('{"prompt": 3}', "an object"), ('{"prompt": " "}', "an object"),
    ('{"seed": 1}', "an object"), (r'{"prompt": "\ud800"}', "not Unicode"),
    ('{"prompt": "a", "step": 4}', '"step" is unknown; known are prompt, seed, name, steps'),
    ('{"prompt": "a", "seed": -1}', '"seed" is -1, needs to be a whole number from 0'),
    ('{"prompt": "a", "seed": true}', '"seed" is true'), ('{"prompt": "a", "seed": 1.0}', '"seed" is 1.0'),
    ('{"prompt": "a", "steps": 0}', '"steps" is 0'), ('{"prompt": "a", "guidance_scale": NaN}', '"guidance_scale" is NaN'),
    ('{"prompt": "a", "name": "../a"}', '"name" is'), ('{"prompt": "a", "name": ""}', '"name" is'),
    ('{"prompt": "a", "name": ".hidden"}', '"name" is'), ('{"prompt": "a", "name": "con.x"}', '"name" is'),
    ('{"prompt": "a", "name": "a."}', '"name" is'), ('{"prompt": "a", "name": ["a"]}', '"name" is'),
])
def test_bad_lines(batch, tmp_path, line, message):
    path = tmp_path / "list.jsonl"
    path.write_text('{"prompt": "a star"}\n\n' + line + "\n")
    with pytest.raises(batch.UsageError, match="1 bad line, nothing was painted") as caught:
        batch.read(path)
    assert "line 3: " in str(caught.value) and message in str(caught.value) and len(str(caught.value)) < 900


@pytest.mark.parametrize("name, data, message", [
    ("list.csv", b"a", "ends in .txt"), ("list.txt", b"\n# a\n", "has no prompts"), ("list.txt", b"\xff", "cannot be read"),
    ("gone.txt", None, "cannot be read: No such file"), ("a\0b.txt", None, "cannot be read")])
def test_bad_lists(batch, tmp_path, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(batch.UsageError, match=message):
        batch.read(tmp_path / name)


def test_a_seed_depends_on_its_line_alone(batch, listed):
    one = {job.prompt: (job.seed, job.name) for job in batch.read(listed(HEARTS, STAR, "a moon"))}
    assert {job.prompt: (job.seed, job.name) for job in batch.read(listed("a moon", "# x", STAR, HEARTS))} == one
    assert one[HEARTS] == (1267954885, one[HEARTS][1])          # written down: another rule would paint other pictures
    assert len({seed for seed, _ in one.values()}) == 3
    assert batch.read(listed(HEARTS), base=1)[0].seed != one[HEARTS][0]
    twice = batch.read(listed({"prompt": HEARTS, "name": "a"}, {"prompt": HEARTS, "name": "b"}, {"prompt": HEARTS}))
    assert len({job.seed for job in twice}) == 3 and twice[2].seed == one[HEARTS][0]


def test_lines_that_repeat_are_painted_once(batch, listed, capsys):
    assert [job.prompt for job in batch.read(listed(HEARTS, STAR, HEARTS))] == [HEARTS, STAR]
    assert "line 3 repeat" in capsys.readouterr().err


def test_two_pictures_cannot_have_one_name(batch, listed):
    with pytest.raises(batch.UsageError, match="line 2: has the name of line 1, A.") as caught:
        batch.read(listed({"prompt": HEARTS, "name": "a"}, {"prompt": STAR, "name": "A"}, {"prompt": STAR}))
    assert "1 bad line" in str(caught.value)


def test_names_hold_what_a_file_name_can(batch, listed):
    for job in batch.read(listed("\u2603 !", "../../etc/passwd", "x" * 5000, "CON")):
        assert batch.NAME.fullmatch(job.name) and not batch.RESERVED.fullmatch(job.name), job.name


# ---- pictures ----

def test_whole_pictures(batch):
    origin = {"prompt": "\u2603", "seed": 1}
    data = png(batch, origin)
    assert batch.inside(data) == origin and batch.inside(png(batch)) is None
    broken = [data[:end] for end in range(len(data))] + [data + b"\0"] + \
             [data[:at] + bytes([data[at] ^ 1]) + data[at + 1:] for at in range(len(data))]
    for other in broken:
        with pytest.raises(ValueError):
            batch.inside(other)


def test_what_is_different(batch, tmp_path):
    job = batch.Job(1, "a", HEARTS, 7, {"steps": 4})
    path = tmp_path / "a.png"
    assert batch.difference(path, job) is None
    for data, expected in ((png(batch, job.origin()), ""), (png(batch, job.origin())[:-1], None), (b"", None),
                           (png(batch), "is another picture, without a word of where it is from"),
                           (png(batch, job.origin() | {"seed": 8, "prompt": "b"}), 'was painted with prompt "b", was painted '
                                                                                  'with seed 8'),
                           (png(batch, {"prompt": HEARTS, "seed": 7, "model": "demo"}), "was painted with steps null")):
        path.write_bytes(data)
        assert batch.difference(path, job) == expected


def test_another_picture_is_put_aside_and_none_is_half_written(batch, tmp_path, monkeypatch):
    job, data = batch.Job(1, "a", HEARTS, 7), []
    for seed in (1, 2):
        data.append(png(batch, job.origin() | {"seed": seed}))
        (tmp_path / "a.png").write_bytes(data[-1])
        batch.save(tmp_path, job, png(batch, job.origin()))
        assert batch.difference(tmp_path / "a.png", job) == ""
    assert [(tmp_path / "replaced" / f"a-{i}.png").read_bytes() for i in (1, 2)] == data

    whole = (tmp_path / "a.png").read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        batch.save(tmp_path, job, png(batch, job.origin(), 9))
    assert (tmp_path / "a.png").read_bytes() == whole
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["a.png"]


# ---- a run ----

def test_what_is_there_is_not_painted_again(batch, listed, stand_in, tmp_path, capsys):
    path, out = listed(HEARTS, "a purple unicorn", STAR), tmp_path / "out"
    command = [str(path), "--out", str(out)]
    stand_in.trouble["a purple unicorn"] = "no such word"
    assert batch.main(command) == 1
    said = capsys.readouterr()
    assert said.out.startswith("3 prompts: 2 painted, 0 there already, 1 failed; 0 s, 2 workers; ")
    assert "[2/3] a-purple-unicorn-" in said.err and "no such word" in said.err
    assert [(row["prompt"], row["seconds"], row["error"]) for row in rows(out)] == [
        (HEARTS, 0.5, None), ("a purple unicorn", 0.5, "no such word"), (STAR, 0.5, None)]
    assert sorted(rows(out)[0]) == ["error", "name", "prompt", "seconds", "seed"]

    stand_in.seen.clear()
    assert batch.main(command) == 1 and stand_in.seen == ["a purple unicorn"]
    del stand_in.trouble["a purple unicorn"]
    assert batch.main(command) == 0 and stand_in.seen == ["a purple unicorn"] * 2
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("*.png")}
    capsys.readouterr()
    assert batch.main(command) == 0 and len(stand_in.seen) == 2
    assert capsys.readouterr().out.startswith("3 prompts: 0 painted, 3 there already, 0 failed; 0 s; ")
    assert {file.name: file.stat().st_mtime_ns for file in out.glob("*.png")} == before and len(before) == 3
    assert [row["seconds"] for row in rows(out)] == [0.5] * 3

    (out / "report.jsonl").write_text((out / "report.jsonl").read_text()[:-20])         # cut in its last line
    assert batch.main(command) == 0 and [row["seconds"] for row in rows(out)] == [0.5, 0.5, None]
    assert batch.main([*command, "--seed", "1"]) == 0 and len(stand_in.seen) == 5       # other seeds, other names
    assert len(list(out.glob("*.png"))) == 6


def test_another_seed_for_a_name(batch, listed, stand_in, tmp_path, capsys):
    out = tmp_path / "out"
    for seed in (1, 2, 2):
        capsys.readouterr()
        assert batch.main([str(listed({"prompt": HEARTS, "name": "a", "seed": seed})), "--out", str(out)]) == 0
        said = capsys.readouterr().err
        assert ("a.png: was painted with seed 1; it is painted anew, what is there goes to replaced/" in said) == (
            len(stand_in.seen) == 2 and "[1/1]" in said)
    assert len(stand_in.seen) == 2 and batch.inside((out / "a.png").read_bytes())["seed"] == 2
    assert batch.inside((out / "replaced" / "a-1.png").read_bytes())["seed"] == 1


def test_a_prompt_that_kills_its_workers(batch, listed, stand_in, tmp_path):
    stand_in.trouble[HEARTS] = None
    assert batch.main([str(listed(HEARTS, STAR)), "--out", str(tmp_path / "out")]) == 1
    assert [row["error"] for row in rows(tmp_path / "out")] == ["its worker died 3 times on it", None]


@pytest.mark.parametrize("trouble, code, said", [
    (KeyboardInterrupt(), 130, "interrupted"), (OSError(28, "No space left on device", "a.png"), 1, "a.png: No space left")])
def test_a_run_that_was_stopped_goes_on(batch, listed, stand_in, tmp_path, capsys, trouble, code, said):
    command = [str(listed(HEARTS, STAR, "a moon")), "--out", str(tmp_path / "out")]
    stand_in.trouble[STAR] = trouble
    assert batch.main(command) == code and said in capsys.readouterr().err
    assert [row["prompt"] for row in rows(tmp_path / "out")] == [HEARTS]
    stand_in.trouble.clear()
    assert batch.main(command) == 0 and stand_in.seen == [HEARTS, STAR, "a moon"]
    assert [row["prompt"] for row in rows(tmp_path / "out")] == [HEARTS, STAR, "a moon"]


def test_one_run_at_a_time(batch, listed, stand_in, tmp_path, capsys):
    command = [str(listed(HEARTS)), "--out", str(tmp_path)]
    with batch.alone(tmp_path):
        assert batch.main(command) == 2 and "another run" in capsys.readouterr().err
    assert batch.main(command) == 0


@pytest.mark.parametrize("arguments", [["--workers", "0"], ["--retries", "-1"], ["--threads", "x"], ["--seed", "x"]])
def test_bad_numbers(batch, listed, arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        batch.main([str(listed(HEARTS)), "--out", str(tmp_path), *arguments])
    assert caught.value.code == 2 and not list(tmp_path.glob("report*"))


def test_out_is_no_folder(batch, listed, stand_in, capsys):
    path = listed(HEARTS)
    assert batch.main([str(path), "--out", str(path)]) == 2 and "Choose another folder" in capsys.readouterr().err


# ---- workers ----

def options(**changed):
    return types.SimpleNamespace(**{"workers": None, "threads": None, "model": None, "lora": None, "retries": 2,
                                    "address": None} | changed)


@pytest.mark.parametrize("changed, has, expected", [
    ({}, {"CPU": 8}, (1, 1, {"num_cpus": 1, "num_gpus": 0})),
    ({"workers": 4, "threads": 2}, {"CPU": 8}, (4, 2, {"num_cpus": 2, "num_gpus": 0})),
    ({}, {"CPU": 8, "GPU": 4.0}, (4, None, {"num_cpus": 1, "num_gpus": 1})),
    ({"workers": 2}, {"CPU": 8, "GPU": 4.0}, (2, None, {"num_cpus": 1, "num_gpus": 1})),
    ({"workers": 3}, {"CPU": 8, "GPU": 2.0}, (3, None, {"num_cpus": 1, "num_gpus": 0.5})),
])
def test_plan(batch, changed, has, expected):
    assert batch.plan(options(**changed), has) == expected


def test_more_workers_than_the_cluster_can_have(batch):
    with pytest.raises(batch.UsageError, match="more than the 4 CPUs"):
        batch.plan(options(workers=3, threads=2), {"CPU": 4})


def test_no_ray(batch, listed, monkeypatch, tmp_path, capsys):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "ray" else there("os")
                        if name in ("torch", "diffusers", "pyarrow") else there(name, *more))
    assert batch.main([str(listed(HEARTS)), "--out", str(tmp_path)]) == 3
    assert re.fullmatch(r'batch.py: this Python has diffusers, but no Ray. Install it: .* -m pip install '
                        r'"ray\[data\]==[\d.]+"\n', capsys.readouterr().err)


def test_nobody_listens(batch, nobody):
    with pytest.raises(OSError):
        batch.probe(nobody.replace("http", "ray"))
    batch.probe("auto")


@pytest.fixture
def painter(monkeypatch):
    """In place of headless.painter: `raises` are what its next calls raise, `refusal` is derived as svdq's errors are."""
    from PIL import Image
    module = types.ModuleType("headless.painter")
    module.calls, module.raises = [], []

    class Painter:
        def __init__(self, model=None, lora=None, device=None):
            if model:
                raise module.refusal(f"{model}: no such file")

        def paint(self, prompt, seed=0, steps=None, **more):
            module.calls.append((prompt, seed, steps, more))
            if module.raises:
                raise module.raises.pop(0)
            return Image.new("RGB", (8, 8))

    module.refusal = type("PromptError", (type("PackError", (ValueError,), {}),), {})
    module.Painter = Painter
    monkeypatch.setitem(sys.modules, "headless.painter", module)
    return module


TASK = {"job": 3, "prompt": HEARTS, "seed": 7, "more": {"steps": 4, "width": 64}, "origin": {"prompt": HEARTS, "seed": 7}}


def test_a_worker_tries_again(batch, painter):
    painter.raises += [RuntimeError("out of memory"), RuntimeError("again")]
    answer, picture = batch.Worker([], None, None, None, 2).paint(TASK)
    assert painter.calls == [(HEARTS, 7, 4, {"width": 64})] * 3
    assert answer["job"] == 3 and answer["error"] is None and batch.inside(picture) == TASK["origin"]


def test_a_worker_gives_up(batch, painter):
    painter.raises += [RuntimeError("out of memory")] * 9
    answer, picture = batch.Worker([], None, None, None, 1).paint(TASK)
    assert len(painter.calls) == 2 and picture is None and answer["error"] == "RuntimeError: out of memory"


def test_a_worker_does_not_repeat_what_is_refused(batch, painter):
    painter.raises.append(painter.refusal("unknown word"))
    answer, picture = batch.Worker([], None, None, None, 2).paint(TASK)
    assert len(painter.calls) == 1 and picture is None and answer["error"] == "unknown word"


def test_a_model_that_is_not_there(batch, painter, listed, tmp_path):
    worker = batch.Worker([], "nowhere.safetensors", None, None, 2)
    assert worker.fatal.startswith("nowhere.safetensors: no such file (on ")
    with pytest.raises(batch.NoWorkers, match="the model cannot be loaded: nowhere"):
        batch.collect(options(), [], None, [({"fatal": worker.fatal}, None)])


# ---- with Ray ----

@pytest.fixture(scope="module")
def ray_python():
    """A Python with diffusers and Ray: this one, or the private one."""
    if all(importlib.util.find_spec(name) for name in ("diffusers", "ray", "pyarrow")):
        return sys.executable
    try:
        return environment.make_ray()
    except environment.SetupError as error:
        pytest.skip(f"no Ray: {str(error).splitlines()[0]}")


def workers_of(pid):
    import psutil
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if "MapWorker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:                            # it has ended meanwhile
            pass
    return found


@pytest.mark.skipif(os.name == "nt", reason="processes are killed as POSIX does")
def test_a_worker_that_is_killed_costs_nothing_but_time(batch, ray_python, listed, tmp_path):
    prompts = HEARTS, STAR, "a purple unicorn", "a moon", "two pink rings", "three black crosses", "a white square"
    path, out = listed(*({"prompt": prompt, "steps": 2} for prompt in prompts)), tmp_path / "out"
    command = [str(ray_python), str(ROOT / "workflows" / "batch.py"), str(path), "--out", str(out), "--workers", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        killed, said = [], []
        for line in run.stderr:
            said.append(line)
            if line.startswith("[1/7]"):
                killed = workers_of(run.pid)[:1]
                killed[0].send_signal(signal.SIGKILL)
        summary = run.stdout.read()
    assert killed and run.returncode == 1, "".join(said)
    assert summary.startswith("7 prompts: 6 painted, 0 there already, 1 failed; ")
    assert ["unicorn" in (row["error"] or "") for row in rows(out)] == [False, False, True] + [False] * 4
    pictures = {file.name for file in out.glob("*.png")}
    assert pictures == {f"{row['name']}.png" for row in rows(out) if not row["error"]}
    for job in batch.read(path):
        assert batch.difference(out / f"{job.name}.png", job) == (None if "unicorn" in job.prompt else "")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_nohup(batch):
    """A signal that is ignored stays ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        batch.stop_in_order()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
