import importlib.metadata
import io
import os
import sys
import tarfile
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


def test_only_one_process_at_a_time(home):
    with environment.locked():
        with open(home / "lock", "w") as file:
            assert not environment._try_lock(file)
    with open(home / "lock", "w") as file:
        assert environment._try_lock(file)


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
    for wanted in (*environment.TREES.values(), environment.OLD_FRONTEND):
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
