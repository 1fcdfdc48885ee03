import importlib.metadata
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from headless import environment
from headless.environment import SetupError


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "HOME", tmp_path / "home")
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


# ---- steps ----

def test_a_step_is_done_once_per_recipe(home):
    done = []
    for recipe in ("a", "a", "b", "b"):
        environment.step("one", recipe, lambda recipe=recipe: done.append(recipe))
    assert done == ["a", "b"]
    environment.step("two", "b", lambda: done.append("two"))
    assert done == ["a", "b", "two"]


def test_an_interrupted_step_is_done_again(home):
    def interrupted():
        raise KeyboardInterrupt

    done = []
    environment.step("one", "a", lambda: done.append(1))
    with pytest.raises(KeyboardInterrupt):
        environment.step("one", "b", interrupted)
    environment.step("one", "a", lambda: done.append(2))        # what "a" had made is not trusted any more
    assert done == [1, 2]


def test_a_step_whose_result_was_deleted_is_done_again(home):
    result = home / "result"
    environment.step("one", "a", result.touch, result)
    result.unlink()
    environment.step("one", "a", result.touch, result)
    assert result.exists()


def test_a_new_venv_forgets_what_was_installed(home, monkeypatch):
    monkeypatch.setattr(environment, "PYTHON", home / "venv" / "python")
    monkeypatch.setattr(environment, "_run", lambda *command: (home / "venv" / "python").touch())
    (home / "venv").mkdir()
    done = []
    for _ in range(2):
        environment._make_venv()
        environment.step("torch", "x", lambda: done.append("torch"))
    assert done == ["torch"]
    environment.PYTHON.unlink()
    environment._make_venv()
    environment.step("torch", "x", lambda: done.append("torch"))
    assert done == ["torch", "torch"]


def test_two_venvs_forget_apart(home, monkeypatch):
    """Deleting one does not make the other again."""
    made = []

    def run(*command):
        made.append(Path(command[-1]).name)
        python = Path(command[-1], "bin", "python")
        python.parent.mkdir(parents=True)
        python.touch()

    monkeypatch.setattr(environment, "PYTHON", home / "venv" / "bin" / "python")
    monkeypatch.setattr(environment, "_run", run)
    for name in ("venv", environment.HF):
        assert environment._make_venv(name) == home / name / "bin" / "python"
    steps = {"venv": ["torch", "comfyui-1"], environment.HF: ["hf torch", "hf-lowest"]}
    for gone, kept in (("venv", environment.HF), (environment.HF, "venv")):
        for name in steps["venv"] + steps[environment.HF]:
            environment.step(name, "x", lambda: None)
        shutil.rmtree(home / gone)
        made.clear()
        for name in ("venv", environment.HF):
            environment._make_venv(name)
        assert made == [gone]
        assert not any(environment._is_current(name, "x") for name in steps[gone])
        assert all(environment._is_current(name, "x") for name in steps[kept])


def test_only_one_process_at_a_time(home):
    with environment.locked():
        with open(home / "lock", "w") as file:
            assert not environment.try_lock(file)
    with open(home / "lock", "w") as file:
        assert environment.try_lock(file)


def test_a_failed_command_shows_its_last_lines(home):
    with pytest.raises(SetupError, match=r"failed with code 3, see .*log\.txt(.|\n)*\| line 29") as caught:
        environment._run(sys.executable, "-c", "for i in range(30): print('line', i)\nraise SystemExit(3)")
    assert "line 17" not in str(caught.value)
    assert "line 18" in str(caught.value)
    assert "line 0\n" in (home / "log.txt").read_text()


def test_a_python_without_torch(home):
    said = "ERROR: No matching distribution found for " + environment.TORCH
    with pytest.raises(SetupError, match=r"no build for Python 3\..*3\.10 to 3\.14"):
        environment._run(sys.executable, "-c", f"print({said!r}); raise SystemExit(1)")


def test_a_full_disk(home, monkeypatch):
    usage = type("Usage", (), {"free": 2.5e9})
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SetupError, match="has 2.5 GB free; the environment needs about"):
        environment._check_disk()


# ---- extract ----

def sdist(path, *members):
    """A .tar.gz of (name, content), where content may be a type of tarfile that has none."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
                info.type, info.linkname = content, "/etc/passwd"
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_extract_takes_only_the_folder(tmp_path):
    archive = sdist(tmp_path / "a.tar.gz", ("p-1/setup.py", b"no"), ("p-1/vendor", tarfile.DIRTYPE),
                    ("p-1/vendor/C/main.py", b"yes"), ("p-1/vendor/C/a/b.py", b"deep"),
                    ("p-1/vendor/Cc/x.py", b"no"), ("p-1/link", tarfile.SYMTYPE))
    out = tmp_path / "out"
    environment.extract(archive, "vendor/C", out)
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert files == {"main.py": b"yes", "a/b.py": b"deep"}


@pytest.mark.parametrize("name, content", [
    ("p-1/vendor/C/../../../../evil.py", b"x"),
    ("p-1/vendor/C/..", b"x"),
    ("p-1/vendor/C/..\\..\\evil.py", b"x"),
    ("p-1/vendor/C/c:evil.py", b"x"),
    ("p-1/vendor/C/link", tarfile.SYMTYPE),
    ("p-1/vendor/C/link", tarfile.LNKTYPE),
    ("p-1/vendor/C/device", tarfile.CHRTYPE),
])
def test_extract_refuses_what_could_leave_the_folder(tmp_path, name, content):
    archive = sdist(tmp_path / "a.tar.gz", ("p-1/vendor/C/main.py", b"fine"), (name, content))
    with pytest.raises(SetupError, match="not a plain file inside the archive"):
        environment.extract(archive, "vendor/C", tmp_path / "deep" / "er" / "out")
    assert not list(tmp_path.rglob("*evil*"))


def test_extract_without_the_folder(tmp_path):
    with pytest.raises(SetupError, match="has no vendor/C"):
        environment.extract(sdist(tmp_path / "a.tar.gz", ("p-1/main.py", b"")), "vendor/C", tmp_path / "out")


def test_every_tree_is_pinned():
    assert {environment.COMFYUI, environment.OLD_COMFYUI} == set(environment.TREES)
    for wanted in (*environment.TREES.values(), environment.OLD_FRONTEND, environment.CUTLASS):
        assert "==" in wanted and "--hash=sha256:" in wanted


def test_the_trees_have_what_they_pin():
    """The oldest one its web page, the newest one every package that the environment has."""
    for variable in ("COMFYUI_DIR", "COMFYUI_OLD_DIR"):
        if not os.environ.get(variable):
            pytest.skip(f"{variable} is not set; tests/run.py sets it")
    newest, oldest = (Path(os.environ[variable], "requirements.txt").read_text().split()
                      for variable in ("COMFYUI_DIR", "COMFYUI_OLD_DIR"))
    assert environment.OLD_FRONTEND.split()[0] in oldest
    pins = dict(wanted.split("==") for wanted in newest if "==" in wanted)
    there = {name: version for name, version in pins.items() if any(
        wanted.startswith(f"{name}==") for wanted in environment.DEPENDENCIES + environment.ALONE)}
    assert "comfyui-frontend-package" in there
    assert there == {name: importlib.metadata.version(name) for name in there}


# ---- a tree fetched by hand ----

REQUIREMENTS = """comfyui-frontend-package==9.1.0
comfyui-workflow-templates==9.2.0  # with parts of its own
comfyui-embedded-docs==9.3
torch
av>=16.0.0
# numpy==1.0
pydantic~=2.0
comfy-kitchen=={}
"""


@pytest.fixture
def requirements():
    """Of a tree where one of the venv's exact versions is still the wanted one."""
    same = next(wanted for wanted in environment.DEPENDENCIES if wanted.startswith("comfy-kitchen=="))
    return REQUIREMENTS.format(same.partition("==")[2])


def test_other_pins(requirements):
    """Neither what the venv has in this version, nor what it has not at all."""
    assert environment.other_pins(requirements) == [
        "comfyui-frontend-package==9.1.0", "comfyui-workflow-templates==9.2.0", "comfyui-workflow-templates-core",
        "comfyui-workflow-templates-json"]
    assert environment.other_pins(requirements.replace("\n", "\r\n")) == environment.other_pins(requirements)
    assert environment.other_pins("torch\n") == []


def test_a_given_tree_has_its_packages_once_per_pins(home, monkeypatch, tmp_path, requirements):
    installed, packages = [], home / "comfyui-given"

    def pip(*arguments):
        installed.append(arguments)
        (packages / "installed").touch()

    monkeypatch.setattr(environment, "_make_venv", lambda: None)
    monkeypatch.setattr(environment, "_pip", pip)
    monkeypatch.chdir(tmp_path)
    Path("main.py").touch()
    for text in (requirements, requirements):
        Path("requirements.txt").write_text(text)
        assert environment.given_tree(".") == (tmp_path, packages)
        assert (packages / "installed").is_file()
    Path("requirements.txt").write_text("torch\n")
    environment.given_tree(".")
    assert not list(packages.iterdir())
    assert installed == [("install", "--no-deps", "--target", str(packages), *environment.other_pins(requirements))]


@pytest.mark.parametrize("there, missing", [
    ((), "main.py and no requirements.txt"), (("main.py",), "requirements.txt"), (("requirements.txt",), "main.py")])
def test_a_given_folder_without_comfyui(home, tmp_path, there, missing):
    for name in there:
        (tmp_path / name).touch()
    with pytest.raises(SetupError, match=rf"has no {missing}\. It must be ComfyUI's own folder"):
        environment.given_tree(tmp_path)
    assert not list(home.iterdir())


# ---- diffusers' Python ----

@pytest.fixture
def commands(home, monkeypatch):
    """What is run while no command does anything but make an interpreter, and any import works."""
    commands = []

    def run(*command):
        commands.append(command)
        for folder in ("venv", environment.HF):
            python = home / folder / "bin" / "python"
            python.parent.mkdir(parents=True, exist_ok=True)
            python.touch()

    monkeypatch.setattr(environment, "PYTHON", home / "venv" / "bin" / "python")
    monkeypatch.setattr(environment, "_run", run)
    monkeypatch.setattr(environment, "_import_error", lambda python, code: None)
    return commands


def test_make_hf(home, commands, tmp_path):
    """Each step once, all in its own venv; svdq is there as this checkout, without what would be another torch."""
    wanted = tmp_path / "wanted.txt"
    wanted.write_text("pytest\n")
    python = environment.make_hf(wanted)
    assert python == home / "hf" / "bin" / "python"
    assert commands[0] == (sys.executable, "-m", "venv", "--clear", str(home / "hf"))
    torch, company, library, extras = (command for command in commands[1:])
    for command in commands[1:]:
        assert command[:4] == (str(python), "-m", "pip", "install")
    assert torch[4:] == (environment.TORCH,)
    assert company[4] == environment.TORCH and set(environment.HF_DEPENDENCIES) <= set(company) and "einops" in company
    assert not any(wanted.startswith("torchvision") for wanted in company)
    assert library[4:] == ("--no-deps", "--no-build-isolation", "-e", str(environment.ROOT))
    assert extras[-2:] == ("-r", str(wanted))
    done = len(commands)
    assert environment.make_hf(wanted) == environment.make_hf() == python and len(commands) == done


def test_a_diffusers_that_does_not_import(home, commands, monkeypatch):
    monkeypatch.setattr(environment, "_import_error", lambda python, code: "No module named 'zlib'")
    for _ in range(2):                                          # and is not taken for made the second time
        with pytest.raises(SetupError, match=r"diffusers does not work in .*hf.*: No module named 'zlib'\. Delete .*hf and"):
            environment.make_hf()


def test_the_lowest_diffusers(home, commands):
    """What svdq asks for at least, from the one place that says so."""
    said = dict(re.findall(r'"(\w+)": "([\d.]+)"', (environment.ROOT / "svdq" / "hf" / "__init__.py").read_text()))
    folder = environment.lowest_hf()
    assert folder == home / "hf-lowest"
    *_, pip = commands
    assert pip[:7] == (str(home / "hf" / "bin" / "python"), "-m", "pip", "install", "--no-deps", "--target", str(folder))
    assert pip[7:] == (f"diffusers=={said['diffusers']}", f"peft=={said['peft']}")
    folder.mkdir()                                              # as pip would
    commands.clear()
    assert environment.lowest_hf() == folder and not commands
    folder.rmdir()
    assert environment.lowest_hf() == folder and len(commands) == 1


# ---- find ----

@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A ComfyUI with this pack in its custom_nodes, and Pythons that can import everything."""
    pack = tmp_path / "ComfyUI" / "custom_nodes" / "svdq"
    pack.mkdir(parents=True)
    (tmp_path / "ComfyUI" / "main.py").touch()
    monkeypatch.setattr(environment, "ROOT", pack)
    monkeypatch.setattr(environment, "_import_error", lambda python, code: None)
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
    monkeypatch.setattr(environment, "_import_error", lambda python, code: "No module named 'torch'")
    with pytest.raises(SetupError) as caught:
        environment.find()
    assert str(caught.value).count("(not there)") == 3
    assert f"{sys.executable} (No module named 'torch')" in str(caught.value)


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
