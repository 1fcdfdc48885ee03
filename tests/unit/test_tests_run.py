"""tests/run.py: what it says of itself and of a report."""

import argparse
import os
import subprocess
import sys
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


def test_left_out(run):
    """Files by name where others of their folder ran, folders where none did."""
    left = run.left_out(xml.ElementTree(xml.fromstring(REPORT)))
    assert {"tests/unit/test_cli.py", "tests/headless/test_client.py", "tests/hostile", "tests/comfy"} <= set(left)
    assert not {"tests/unit", "tests/unit/test_lora.py", "tests/headless", "tests/headless/test_run.py"} & set(left)


def test_a_comfyui_fetched_by_hand_stands_for_the_newest(run, monkeypatch, tmp_path):
    """Its packages come before whatever PYTHONPATH had; its folder is no path of tests."""
    environment, ran = run.environment, []
    monkeypatch.setattr(environment, "HOME", tmp_path)
    monkeypatch.setattr(environment, "make", lambda extra: environment.Environment("python", "newest", None, []))
    monkeypatch.setattr(environment, "comfy_tree", lambda version: "oldest")
    monkeypatch.setattr(environment, "old_frontend", lambda: "page")
    monkeypatch.setattr(environment, "cutlass_headers", lambda: "headers")
    monkeypatch.setattr(environment, "make_hf", lambda extra: "python with diffusers")
    monkeypatch.setattr(environment, "lowest_hf", lambda: "folder")
    monkeypatch.setattr(environment, "given_tree", lambda folder: (Path(folder, "tree"), Path("packages")))
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    monkeypatch.setattr(run.subprocess, "run", lambda command, env: ran.append((command, env)) or argparse.Namespace(
        returncode=0))
    monkeypatch.setenv("PYTHONPATH", "mine")
    assert run.main(["-x", "--comfyui", str(tmp_path), "-k", "rank"]) == run.main(["-x", "-k", "rank"]) == 0
    (given, there), (plain, here) = ran
    assert given[-4:] == plain[-4:] == [str(ROOT / "tests"), "-x", "-k", "rank"]
    assert (there["COMFYUI_DIR"], there["COMFYUI_OLD_DIR"]) == (str(tmp_path / "tree"), "oldest")
    assert (there["PYTHONPATH"], here["PYTHONPATH"]) == (os.pathsep.join(["packages", "mine"]), "mine")
    assert (here["COMFYUI_DIR"], here["CUTLASS_INCLUDE"]) == ("newest", "headers")
    assert (here["SVDQ_HF_PYTHON"], here["SVDQ_HF_LOWEST"]) == ("python with diffusers", "folder")


def test_what_cannot_be_had_is_named(run, capsys):
    def refuse():
        raise run.environment.SetupError("no such package")
    assert (run.or_nothing("CUTLASS", lambda: "folder"), run.or_nothing("CUTLASS", refuse)) == ("folder", "")
    assert capsys.readouterr().err == "tests/run.py: without CUTLASS: no such package\n"


@pytest.mark.parametrize("argument, found", [("tests", True), ("tests/hf", True), ("tests/hf/test_hf.py::test_check", True),
                                             ("tests/headless/test_batch.py", True), ("tests/unit", False), ("-x", False),
                                             ("tests/comfy/test_server.py", False), ("nothing", False)])
def test_who_wants_diffusers(run, monkeypatch, argument, found):
    """Its environment takes minutes to make, and most of the tests need none of it."""
    monkeypatch.chdir(ROOT)
    assert run.has_hf(argument) == found
