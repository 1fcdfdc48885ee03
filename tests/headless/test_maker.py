"""What makes the private environments, without making one: its steps, its venvs, its archives."""

import importlib.metadata
import io
import os
import re
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
from headless import maker
from headless.environment import SetupError


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "HOME", tmp_path / "home")
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


# ---- steps ----

def test_a_step_is_done_once_per_recipe(home):
    done = []
    for recipe in ("a", "a", "b", "b"):
        maker.step("one", recipe, lambda recipe=recipe: done.append(recipe))
    assert done == ["a", "b"]
    maker.step("two", "b", lambda: done.append("two"))
    assert done == ["a", "b", "two"]


def test_an_interrupted_step_is_done_again(home):
    def interrupted():
        raise KeyboardInterrupt

    done = []
    maker.step("one", "a", lambda: done.append(1))
    with pytest.raises(KeyboardInterrupt):
        maker.step("one", "b", interrupted)
    maker.step("one", "a", lambda: done.append(2))        # what "a" had made is not trusted any more
    assert done == [1, 2]


def test_a_step_whose_result_was_deleted_is_done_again(home):
    result = home / "result"
    maker.step("one", "a", result.touch, result)
    result.unlink()
    maker.step("one", "a", result.touch, result)
    assert result.exists()


def test_a_new_venv_forgets_what_was_installed(home, monkeypatch):
    monkeypatch.setattr(maker, "PYTHON", home / "venv" / "python")
    monkeypatch.setattr(maker, "_run", lambda *command: (home / "venv" / "python").touch())
    (home / "venv").mkdir()
    done = []
    for _ in range(2):
        maker._make_venv()
        maker.step("torch", "x", lambda: done.append("torch"))
    assert done == ["torch"]
    maker.PYTHON.unlink()
    maker._make_venv()
    maker.step("torch", "x", lambda: done.append("torch"))
    assert done == ["torch", "torch"]


def test_two_venvs_forget_apart(home, monkeypatch):
    """Deleting one does not make the other again."""
    made = []

    def run(*command):
        made.append(Path(command[-1]).name)
        python = Path(command[-1], "bin", "python")
        python.parent.mkdir(parents=True)
        python.touch()

    monkeypatch.setattr(maker, "PYTHON", home / "venv" / "bin" / "python")
    monkeypatch.setattr(maker, "_run", run)
    for name in ("venv", maker.HF):
        assert maker._make_venv(name) == home / name / "bin" / "python"
    steps = {"venv": ["torch", "comfyui-1"], maker.HF: ["hf torch", "hf-lowest"]}
    for gone, kept in (("venv", maker.HF), (maker.HF, "venv")):
        for name in steps["venv"] + steps[maker.HF]:
            maker.step(name, "x", lambda: None)
        shutil.rmtree(home / gone)
        made.clear()
        for name in ("venv", maker.HF):
            maker._make_venv(name)
        assert made == [gone]
        assert not any(maker._is_current(name, "x") for name in steps[gone])
        assert all(maker._is_current(name, "x") for name in steps[kept])


def test_only_one_process_at_a_time(home):
    with maker.locked():
        with open(home / "lock", "w") as file:
            assert not maker.try_lock(file)
    with open(home / "lock", "w") as file:
        assert maker.try_lock(file)


def test_a_failed_command_shows_its_last_lines(home):
    with pytest.raises(SetupError, match=r"failed with code 3, see .*log\.txt(.|\n)*\| line 29") as caught:
        maker._run(sys.executable, "-c", "for i in range(30): print('line', i)\nraise SystemExit(3)")
    assert "line 17" not in str(caught.value)
    assert "line 18" in str(caught.value)
    assert "line 0\n" in (home / "log.txt").read_text()


def test_a_python_without_torch(home):
    said = "ERROR: No matching distribution found for " + maker.TORCH
    with pytest.raises(SetupError, match=r"no build for Python 3\..*3\.10 to 3\.14"):
        maker._run(sys.executable, "-c", f"print({said!r}); raise SystemExit(1)")


def test_a_full_disk(home, monkeypatch):
    usage = type("Usage", (), {"free": 2.5e9})
    monkeypatch.setattr(maker.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SetupError, match="has 2.5 GB free; the environment needs about"):
        maker._check_disk()


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
    maker.extract(archive, "vendor/C", out)
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
        maker.extract(archive, "vendor/C", tmp_path / "deep" / "er" / "out")
    assert not list(tmp_path.rglob("*evil*"))


def test_extract_without_the_folder(tmp_path):
    with pytest.raises(SetupError, match="has no vendor/C"):
        maker.extract(sdist(tmp_path / "a.tar.gz", ("p-1/main.py", b"")), "vendor/C", tmp_path / "out")


def test_every_tree_is_pinned():
    assert {maker.COMFYUI, maker.OLD_COMFYUI} == set(maker.TREES)
    for wanted in (*maker.TREES.values(), maker.OLD_FRONTEND, maker.CUTLASS):
        assert "==" in wanted and "--hash=sha256:" in wanted


def test_the_trees_have_what_they_pin():
    """The oldest one its web page, the newest one every package that the environment has."""
    for variable in ("COMFYUI_DIR", "COMFYUI_OLD_DIR"):
        if not os.environ.get(variable):
            pytest.skip(f"{variable} is not set; tests/run.py sets it")
    newest, oldest = (Path(os.environ[variable], "requirements.txt").read_text().split()
                      for variable in ("COMFYUI_DIR", "COMFYUI_OLD_DIR"))
    assert maker.OLD_FRONTEND.split()[0] in oldest
    pins = dict(wanted.split("==") for wanted in newest if "==" in wanted)
    there = {name: version for name, version in pins.items() if any(
        wanted.startswith(f"{name}==") for wanted in maker.DEPENDENCIES + maker.ALONE)}
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
    same = next(wanted for wanted in maker.DEPENDENCIES if wanted.startswith("comfy-kitchen=="))
    return REQUIREMENTS.format(same.partition("==")[2])


def test_other_pins(requirements):
    """Neither what the venv has in this version, nor what it has not at all."""
    assert maker.other_pins(requirements) == [
        "comfyui-frontend-package==9.1.0", "comfyui-workflow-templates==9.2.0", "comfyui-workflow-templates-core",
        "comfyui-workflow-templates-json"]
    assert maker.other_pins(requirements.replace("\n", "\r\n")) == maker.other_pins(requirements)
    assert maker.other_pins("torch\n") == []


def test_a_given_tree_has_its_packages_once_per_pins(home, monkeypatch, tmp_path, requirements):
    installed, packages = [], home / "comfyui-given"

    def pip(*arguments):
        installed.append(arguments)
        (packages / "installed").touch()

    monkeypatch.setattr(maker, "_make_venv", lambda: None)
    monkeypatch.setattr(maker, "_pip", pip)
    monkeypatch.chdir(tmp_path)
    Path("main.py").touch()
    for text in (requirements, requirements):
        Path("requirements.txt").write_text(text)
        assert maker.given_tree(".") == (tmp_path, packages)
        assert (packages / "installed").is_file()
    Path("requirements.txt").write_text("torch\n")
    maker.given_tree(".")
    assert not list(packages.iterdir())
    assert installed == [("install", "--no-deps", "--target", str(packages), *maker.other_pins(requirements))]


@pytest.mark.parametrize("there, missing", [
    ((), "main.py and no requirements.txt"), (("main.py",), "requirements.txt"), (("requirements.txt",), "main.py")])
def test_a_given_folder_without_comfyui(home, tmp_path, there, missing):
    for name in there:
        (tmp_path / name).touch()
    with pytest.raises(SetupError, match=rf"has no {missing}\. It must be ComfyUI's own folder"):
        maker.given_tree(tmp_path)
    assert not list(home.iterdir())


# ---- diffusers' Python ----

@pytest.fixture
def commands(home, monkeypatch):
    """What is run while no command does anything but make an interpreter, and any import works."""
    commands = []

    def run(*command):
        commands.append(command)
        for folder in ("venv", maker.HF):
            python = home / folder / "bin" / "python"
            python.parent.mkdir(parents=True, exist_ok=True)
            python.touch()

    monkeypatch.setattr(maker, "PYTHON", home / "venv" / "bin" / "python")
    monkeypatch.setattr(maker, "_run", run)
    monkeypatch.setattr(maker, "import_error", lambda python, code: None)
    return commands


def test_make_hf(home, commands, tmp_path):
    """Each step once, all in its own venv; svdq is there as this checkout, without what would be another torch."""
    wanted = tmp_path / "wanted.txt"
    wanted.write_text("pytest\n")
    python = maker.make_hf(wanted)
    assert python == home / "hf" / "bin" / "python"
    assert commands[0] == (sys.executable, "-m", "venv", "--clear", str(home / "hf"))
    torch, company, library, extras = (command for command in commands[1:])
    for command in commands[1:]:
        assert command[:4] == (str(python), "-m", "pip", "install")
    assert torch[4:] == (maker.TORCH,)
    assert company[4] == maker.TORCH and set(maker.HF_DEPENDENCIES) <= set(company) and "einops" in company
    assert not any(wanted.startswith("torchvision") for wanted in company)
    assert library[4:] == ("--no-deps", "--no-build-isolation", "-e", str(maker.ROOT))
    assert extras[-2:] == ("-r", str(wanted))
    done = len(commands)
    assert maker.make_hf(wanted) == maker.make_hf() == python and len(commands) == done


def test_a_diffusers_that_does_not_import(home, commands, monkeypatch):
    monkeypatch.setattr(maker, "import_error", lambda python, code: "No module named 'zlib'")
    for _ in range(2):                                          # and is not taken for made the second time
        with pytest.raises(SetupError, match=r"diffusers does not work in .*hf.*: No module named 'zlib'\. Delete .*hf and"):
            maker.make_hf()


def test_the_lowest_diffusers(home, commands):
    """What svdq asks for at least, from the one place that says so."""
    said = dict(re.findall(r'"(\w+)": "([\d.]+)"', (maker.ROOT / "svdq" / "hf" / "__init__.py").read_text()))
    folder = maker.lowest_hf()
    assert folder == home / "hf-lowest"
    *_, pip = commands
    assert pip[:7] == (str(home / "hf" / "bin" / "python"), "-m", "pip", "install", "--no-deps", "--target", str(folder))
    assert pip[7:] == (f"diffusers=={said['diffusers']}", f"peft=={said['peft']}")
    folder.mkdir()                                              # as pip would
    commands.clear()
    assert maker.lowest_hf() == folder and not commands
    folder.rmdir()
    assert maker.lowest_hf() == folder and len(commands) == 1
