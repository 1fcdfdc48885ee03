"""tests/run.py: what it says of itself and of reports, what runs side by side, and how that ends."""

import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORT = """<testsuites><testsuite>
<testcase name="test_a" file="tests/unit/test_lora.py"/>
<testcase name="test_b" file="tests/unit/test_lora.py"><failure message="no"/></testcase>
<testcase name="test_c" file="tests/headless/test_run.py"><skipped message="no GPU">x.py:3: no GPU</skipped></testcase>
<testcase name="test_d" file="tests/headless/test_run.py"><skipped message="no GPU">x.py:4: no GPU</skipped></testcase>
<testcase name="" classname="tests.x"><skipped message="collection skipped">('x.py', 9, 'Skipped: no g++')</skipped></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))        # the script adds to it
    from svdq_pack.tests import run
    return run


def test_help():
    done = subprocess.run([sys.executable, ROOT / "tests" / "run.py", "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--fast" in done.stdout and "tests/unit" in done.stdout and "pytest" in done.stdout


def test_fast_names_tests(run):
    """A file that was renamed is noticed here, not when somebody is in a hurry."""
    for name in run.FAST:
        path = ROOT / "tests" / name
        assert path.is_file() or any(path.rglob("test_*.py")), name


def test_summary(run):
    assert run.summary(xml.ElementTree(xml.fromstring(REPORT))) == "1 passed, 1 failed, 3 skipped (2: no GPU; 1: no g++)"


def test_summary_of_two(run):
    report = xml.ElementTree(xml.fromstring(REPORT))
    assert run.summary(report, report) == "2 passed, 2 failed, 6 skipped (4: no GPU; 2: no g++)"


def test_left_out(run):
    """Files by name where others of their folder ran, folders where none did."""
    left = run.left_out(xml.ElementTree(xml.fromstring(REPORT)))
    assert {"tests/unit/test_cli.py", "tests/headless/test_client.py", "tests/hostile", "tests/comfy"} <= set(left)
    assert not {"tests/unit", "tests/unit/test_lora.py", "tests/headless", "tests/headless/test_run.py"} & set(left)


@pytest.fixture
def made(run, monkeypatch, tmp_path):
    """An environment that nobody has to make. Signals stay pytest's."""
    maker = run.maker
    monkeypatch.setattr(maker, "HOME", tmp_path)
    monkeypatch.setattr(maker, "make", lambda extra: maker.Environment(sys.executable, "newest", None, []))
    monkeypatch.setattr(maker, "comfy_tree", lambda version: "oldest")
    monkeypatch.setattr(maker, "old_frontend", lambda: "page")
    monkeypatch.setattr(maker, "cutlass_headers", lambda: "headers")
    monkeypatch.setattr(maker, "make_hf", lambda extra: "python with diffusers")
    monkeypatch.setattr(maker, "lowest_hf", lambda: "folder")
    monkeypatch.setattr(maker, "given_tree", lambda folder: (Path(folder, "tree"), Path("packages")))
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)


@pytest.fixture
def ran(run, made, monkeypatch):
    """[(commands, env)] that main would have run; each command as what follows pytest's own options."""
    ran = []

    def note(commands, env, folder):
        at = 1 + next(number for number, word in enumerate(commands[0]) if word.startswith("--junitxml="))
        ran.append(([command[at:] for command in commands], env))
        return [0] * len(commands)

    monkeypatch.setattr(run, "side_by_side", note)
    return ran


def test_a_comfyui_fetched_by_hand_stands_for_the_newest(run, ran, monkeypatch, tmp_path):
    """Its packages come before whatever PYTHONPATH had; its folder is no path of tests."""
    monkeypatch.setenv("PYTHONPATH", "mine")
    assert run.main(["-x", "--comfyui", str(tmp_path), "-k", "rank"]) == run.main(["-x", "-k", "rank"]) == 0
    (given, there), (plain, here) = ran
    assert given == plain == [[str(ROOT / "tests"), "-x", "-k", "rank"]]
    assert (there["COMFYUI_DIR"], there["COMFYUI_OLD_DIR"]) == (str(tmp_path / "tree"), "oldest")
    assert (there["PYTHONPATH"], here["PYTHONPATH"]) == (os.pathsep.join(["packages", "mine"]), "mine")
    assert (here["COMFYUI_DIR"], here["CUTLASS_INCLUDE"]) == ("newest", "headers")
    assert (here["SVDQ_HF_PYTHON"], here["SVDQ_HF_LOWEST"]) == ("python with diffusers", "folder")


KERNELS, UNIT = str(ROOT / "tests" / "kernels"), str(ROOT / "tests" / "unit")
IGNORED = [f"--ignore={KERNELS}", f"--ignore={UNIT}"]


@pytest.mark.parametrize("arguments, processes", [
    ([], [[KERNELS, UNIT], [str(ROOT / "tests"), *IGNORED]]),
    (["tests"], [[KERNELS, UNIT], ["tests", *IGNORED]]),
    (["."], [[KERNELS, UNIT], [".", *IGNORED]]),
    (["-k", "not tests"], [[KERNELS, UNIT, "-k", "not tests"], [str(ROOT / "tests"), *IGNORED, "-k", "not tests"]]),
    (["-k", "tests"], [[KERNELS, UNIT, "-k", "tests"], [str(ROOT / "tests"), *IGNORED, "-k", "tests"]]),      # no path
    (["tests/hf", "tests/kernels/families", "tests/comfy"], [["tests/kernels/families"], ["tests/hf", "tests/comfy"]]),
    (["tests/unit/test_cli.py::test_a", "tests/hf/test_hf.py::test_b[x-::]"],
     [["tests/unit/test_cli.py::test_a"], ["tests/hf/test_hf.py::test_b[x-::]"]]),
    (["tests/unit", "tests/kernels"], [["tests/unit", "tests/kernels"]]),
    (["tests/unit/test_lora.py", "-x"], [["tests/unit/test_lora.py", "-x"]]),
    (["tests/comfy", "tests/hf", "-k", "a"], [["tests/comfy", "tests/hf", "-k", "a"]]),
    (["-x"], [[str(ROOT / "tests"), "-x"]]),                                                    # the first failure of all
    (["tests", "--pdb"], [["tests", "--pdb"]]),
    (["tests/unit", "tests/comfy", "tests/nothing"], [["tests/unit", "tests/comfy", "tests/nothing"]])])
def test_who_shares_the_work(run, ran, monkeypatch, arguments, processes):
    monkeypatch.chdir(ROOT)
    assert run.main(arguments) == 0 and [commands for commands, _ in ran] == [processes]


def test_fast_shares_the_work(run, ran, monkeypatch):
    monkeypatch.delenv("SVDQ_HF_PYTHON", raising=False)         # which a whole run has
    assert all(any(folder.rglob("test_*.py")) for folder in run.HALF)
    assert run.main(["--fast"]) == 0 and run.main(["--fast", "-x"]) == 0
    (shared, env), (alone, _) = ran
    assert sorted(sum(shared, [])) == sorted(str(ROOT / "tests" / name) for name in run.FAST) and len(shared) == 2
    assert alone == [[*(str(ROOT / "tests" / name) for name in run.FAST), "-x"]] and "SVDQ_HF_PYTHON" not in env


@pytest.mark.parametrize("codes, code", [([0], 0), ([5], 5), ([-9], -9), ([0, 0], 0), ([0, 5], 0), ([5, 0], 0), ([5, 5], 5),
                                         ([1, 0], 1), ([5, 1], 1), ([1, 2], 1), ([2, 2], 2), ([0, -11], -11), ([-9, 5], -9)])
def test_exit_code(run, codes, code):
    assert run.exit_code(codes) == code


A = """import pytest
def test_good(): pass
def test_gpu(): pytest.skip("no GPU")
"""
B = """import pytest
def test_bad(): assert False
def test_gpu(): pytest.skip("no GPU")
def test_tool(): pytest.skip("no tool")
"""


@pytest.fixture
def small(run, made, monkeypatch, tmp_path):
    """small(of tests/kernels, of tests/comfy): a repository with one file of tests in each half."""
    def write(a, b):
        for folder, text in (("kernels", a), ("unit", None), ("comfy", b)):
            (tmp_path / "tests" / folder).mkdir(parents=True)
            if text is not None:
                (tmp_path / "tests" / folder / f"test_of_{folder}.py").write_text(text)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "TESTS", tmp_path / "tests")
    monkeypatch.setattr(run, "HALF", (tmp_path / "tests" / "kernels", tmp_path / "tests" / "unit"))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    return write


def test_two_reports_are_one_line(run, small, capfd, tmp_path):
    """The second half's output comes after the first one's, and nothing of either stays."""
    small(A, B)
    assert run.main([]) == 1
    said = capfd.readouterr().out
    assert said.index("1 passed, 1 skipped in") < said.index("test_of_comfy.py") < said.index("1 failed, 2 skipped in")
    assert said.splitlines()[-1] == "1 passed, 1 failed, 3 skipped (2: no GPU; 1: no tool)"
    assert os.listdir(tmp_path) == ["tests"]


def test_a_half_may_have_nothing_of_it(run, small, capfd):
    small(A, B)
    assert run.main(["-k", "tool"]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "0 passed, 0 failed, 1 skipped (1: no tool)"


def test_a_half_without_a_report_is_no_success(run, small, capfd):
    """As when the system takes the memory of one."""
    small(A, "import os, signal\ndef test_killed(): os.kill(os.getpid(), signal.SIGKILL)\n")
    assert run.main([]) == -signal.SIGKILL
    assert capfd.readouterr().out.splitlines()[-2:] == [
        "tests/run.py: a pytest process ended with code -9 and without a report; its tests are not counted",
        "1 passed, 0 failed, 1 skipped (1: no GPU)"]


WAITS = """import os, pathlib, time
def test_waits():
    pathlib.Path({pid!r}).write_text(str(os.getpid()))
    time.sleep(60)
"""
SCRIPT = """import sys
sys.path.insert(0, {tests!r})
import run
run.ROOT, run.TESTS, run.maker.HOME = run.Path({root!r}), run.Path({root!r}, "tests"), run.Path({root!r})
run.HALF = (run.TESTS / "kernels", run.TESTS / "unit")
run.maker.make = lambda extra: run.maker.Environment(sys.executable, "newest", None, [])
run.maker.comfy_tree = run.maker.old_frontend = run.maker.cutlass_headers = lambda *_: ""
run.maker.make_hf = run.maker.lowest_hf = lambda *_: ""
sys.exit(run.main([]))
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 2), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_what_is_interrupted_ends_both(small, tmp_path, sent, code):
    """Ctrl-C goes to the whole group, as a terminal sends it; a CI that gives up ends tests/run.py alone."""
    pids = [tmp_path / "a.pid", tmp_path / "b.pid"]
    small(*(WAITS.format(pid=str(pid)) for pid in pids))
    script = SCRIPT.format(tests=str(ROOT / "tests"), root=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True) as first:
        for _ in range(1200):
            if all(pid.exists() and pid.read_text() for pid in pids):
                break
            time.sleep(0.05)
        (os.killpg if sent == signal.SIGINT else os.kill)(first.pid, sent)
        said = first.communicate(timeout=60)[0]
    assert first.returncode == code
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)
    if sent == signal.SIGINT:
        assert said.count("!!! KeyboardInterrupt !!!") == 2 and said.splitlines()[-1].endswith("0 failed, 0 skipped")
    assert not list(tmp_path.glob("tests-*"))


def test_what_cannot_be_had_is_named(run, capsys):
    def refuse():
        raise run.maker.SetupError("no such package")
    assert (run.or_nothing("CUTLASS", lambda: "folder"), run.or_nothing("CUTLASS", refuse)) == ("folder", "")
    assert capsys.readouterr().err == "tests/run.py: without CUTLASS: no such package\n"


@pytest.mark.parametrize("argument, found", [("tests", True), ("tests/hf", True), ("tests/hf/test_hf.py::test_check", True),
                                             ("tests/headless/test_batch.py", True), ("tests/unit", False), ("-x", False),
                                             ("tests/comfy/test_server.py", False), ("nothing", False)])
def test_who_wants_diffusers(run, monkeypatch, argument, found):
    """Its environment takes minutes to make, and most of the tests need none of it."""
    monkeypatch.chdir(ROOT)
    assert run.has_hf(argument) == found
