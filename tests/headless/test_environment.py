"""Which ComfyUI and which Python are taken, and how a script gets into them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from headless import environment, maker
from headless.environment import SetupError

# ---- find ----

@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A ComfyUI with this pack in its custom_nodes, and Pythons that can import everything."""
    pack = tmp_path / "ComfyUI" / "custom_nodes" / "svdq"
    pack.mkdir(parents=True)
    (tmp_path / "ComfyUI" / "main.py").touch()
    monkeypatch.setattr(environment, "ROOT", pack)
    monkeypatch.setattr(environment, "import_error", lambda python, code: None)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    return tmp_path / "ComfyUI"


def test_find_the_comfyui_around_the_pack(installed):
    found = environment.find()
    assert (found.comfy, found.base) == (installed, None)
    assert found.starter == [sys.executable, str(installed / "main.py")]


def test_find_prefers_comfyuis_own_python(installed):
    python = installed / "venv" / ("Scripts/python.exe" if environment.WINDOWS else "bin/python")
    python.parent.mkdir(parents=True)
    python.touch()
    assert environment.find().python == python


def test_find_nothing(installed, monkeypatch):
    (installed / "main.py").unlink()
    assert environment.find() is None


def test_comfyui_path(installed, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", installed / "custom_nodes" / "svdq")
    monkeypatch.setenv("COMFYUI_PATH", str(installed))
    assert environment.find().comfy == installed


def test_comfyui_path_without_comfyui(installed, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(installed / "custom_nodes"))
    with pytest.raises(SetupError, match="has no main.py"):
        environment.find()


def test_comfyui_path_without_the_pack(installed, monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setenv("COMFYUI_PATH", str(installed))
    with pytest.raises(SetupError, match="does not contain this pack"):
        environment.find()


def test_find_names_every_python_it_tried(installed, monkeypatch):
    monkeypatch.setattr(environment, "import_error", lambda python, code: "No module named 'torch'")
    with pytest.raises(SetupError) as caught:
        environment.find()
    assert str(caught.value).count("(not there)") == 3
    assert f"{sys.executable} (No module named 'torch')" in str(caught.value)


# ---- make ----

@pytest.mark.parametrize("make, said", [
    ("make", "^.+ stands in no ComfyUI's custom_nodes, and only a clone .+ set COMFYUI_PATH .+ --server"),
    ("make_hf", r'^only a clone .+ install "[^"]+\[diffusers\]" in it, .+ SVDQ_HF=1'),
    ("make_ray", r'^only a clone .+ install "[^"]+\[diffusers\]" "ray\[data\]==[\d.]+" in it, .+ SVDQ_HF=1')])
def test_a_pack_from_the_registry_makes_nothing(monkeypatch, tmp_path, make, said):
    """maker.py is not published, and what to do instead is said."""
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    with pytest.raises(SetupError, match=said):
        getattr(environment, make)()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make, arguments", [("make", ("wanted.txt",)), ("make_hf", ("wanted.txt",)), ("make_ray", ())])
def test_a_clone_has_its_maker(monkeypatch, make, arguments):
    monkeypatch.setattr(maker, make, lambda *given: ("made", *given))
    assert getattr(environment, make)(*arguments) == ("made", *arguments)


# ---- enter ----

def test_enter_runs_the_script_in_comfyuis_python(installed, monkeypatch, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os, pathlib, sys\n"
                      "pathlib.Path(sys.argv[1]).write_text(os.environ['SVDQ_COMFYUI'])\n"
                      "sys.exit(7)\n")
    monkeypatch.delenv("SVDQ_COMFYUI", raising=False)
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "said")])
    with pytest.raises(SystemExit) as ended:
        environment.enter(str(script))
    assert ended.value.code == 7 and (tmp_path / "said").read_text() == str(installed)
    monkeypatch.setenv("SVDQ_COMFYUI", str(installed))
    environment.enter(str(script))                              # there already


def test_enter_says_why_there_is_no_comfyui(monkeypatch, tmp_path):
    monkeypatch.delenv("SVDQ_COMFYUI", raising=False)
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"^script\.py: COMFYUI_PATH is .+, which has no main\.py"):
        environment.enter("somewhere/script.py")


def test_enter_hf_runs_the_script_there(monkeypatch, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os, sys\nsys.exit(int(sys.argv[1]) + int(os.environ['SVDQ_HF']))\n")
    monkeypatch.delenv("SVDQ_HF", raising=False)
    monkeypatch.setattr(environment, "make_hf", lambda: Path(sys.executable))
    monkeypatch.setattr(sys, "argv", [str(script), "6"])
    with pytest.raises(SystemExit) as ended:
        environment.enter_hf(str(script))
    assert ended.value.code == 7
    monkeypatch.setenv("SVDQ_HF", "1")
    environment.enter_hf(str(script))                           # there already


@pytest.mark.parametrize("error, code, said", [
    (SetupError("the disk is full"), 3, "script.py: the disk is full\n"),
    (KeyboardInterrupt(), 130, "script.py: interrupted\n")])
def test_enter_hf_without_its_python(monkeypatch, capsys, error, code, said):
    def make_hf():
        raise error

    monkeypatch.delenv("SVDQ_HF", raising=False)
    monkeypatch.setattr(environment, "make_hf", make_hf)
    with pytest.raises(SystemExit) as ended:
        environment.enter_hf("somewhere/script.py")
    assert (ended.value.code, capsys.readouterr().err) == (code, said)


@pytest.mark.skipif(environment.WINDOWS, reason="signals of POSIX")
def test_what_a_script_has_started_ends_with_it(tmp_path):
    """Ctrl-C that reaches the first process alone."""
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(environment.ROOT / 'workflows')!r})\n"
                      "from headless import environment\n"
                      "from pathlib import Path\n"
                      "environment.make_hf = lambda: Path(sys.executable)\n"
                      "environment.enter_hf(__file__)\n"
                      "import os, time\n"
                      f"Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
                      "time.sleep(60)\n")
    with subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True,
                          env={name: value for name, value in os.environ.items() if name != "SVDQ_HF"}) as first:
        for _ in range(600):
            if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
                break
            time.sleep(0.05)
        first.send_signal(signal.SIGINT)
        assert first.wait(30) == 130 and first.stderr.read() == "script.py: interrupted\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
