"""Which ComfyUI runs the pack: the one it stands in (find), or a private one made once beside it (make). And a Python
with diffusers, which is no part of ComfyUI (make_hf). What makes them is in maker.py, which only a clone has."""

import importlib
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

ROOT = Path(os.path.abspath(__file__)).parents[2]       # not resolve(): a pack linked into custom_nodes stands there
HOME = ROOT / ".environment"
WINDOWS = os.name == "nt"
RAY = "ray[data]==2.60.0"       # what workflows/batch.py takes beside diffusers

# python, comfy: interpreter and folder of main.py.  base: --base-directory, None where ComfyUI keeps its own folders.
# starter: the command to which main.py's arguments are appended.
Environment = namedtuple("Environment", "python comfy base starter")

NO_COMFYUI = (f"{ROOT} stands in no ComfyUI's custom_nodes, and only a clone of the repository makes a private ComfyUI. "
              "Move it there, set COMFYUI_PATH to the ComfyUI that has it, or name one that runs with --server.")
NO_HF = ("only a clone of the repository makes a Python with diffusers. Take one that has torch, install {} in it, and run "
         "this there with SVDQ_HF=1 set.")


class SetupError(Exception):
    """No ComfyUI could be found or made."""


# ---- find ----

def find():
    """The ComfyUI this pack stands in, or the one COMFYUI_PATH names; None where there is neither."""
    if os.environ.get("COMFYUI_PATH"):
        comfy = Path(os.environ["COMFYUI_PATH"]).expanduser().absolute()
        if not (comfy / "main.py").is_file():
            raise SetupError(f"COMFYUI_PATH is {comfy}, which has no main.py. "
                             "It must be ComfyUI's own folder; correct it, or unset it to use a private ComfyUI.")
        packs = comfy / "custom_nodes"
        if not packs.is_dir() or not any(pack.resolve() == ROOT.resolve() for pack in packs.iterdir()):
            raise SetupError(f"{packs} does not contain this pack ({ROOT}). ComfyUI must load it to run its "
                             "workflows; clone or link it there, or unset COMFYUI_PATH.")
    elif ROOT.parent.name == "custom_nodes" and (ROOT.parent.parent / "main.py").is_file():
        comfy = ROOT.parent.parent
    else:
        return None
    python = _interpreter(comfy)
    return Environment(python, comfy, None, [str(python), str(comfy / "main.py")])


def _interpreter(comfy):
    inside = "Scripts/python.exe" if WINDOWS else "bin/python"
    tried = []
    for python in (comfy / ".venv" / inside, comfy / "venv" / inside,
                   comfy.parent / "python_embeded" / "python.exe", Path(sys.executable)):
        if not python.is_file():
            tried.append(f"{python} (not there)")
            continue
        missing = import_error(python, "import torch, aiohttp")
        if not missing:
            return python
        tried.append(f"{python} ({missing})")
    raise SetupError(f"no Python of ComfyUI in {comfy} can import torch and aiohttp; tried {', '.join(tried)}. "
                     "Run this script with the Python that runs your ComfyUI.")


def sees_gpu(python):
    """Whether torch of this interpreter finds a device that ComfyUI would use without --cpu."""
    return import_error(python, "import sys, torch; sys.exit(not (torch.cuda.is_available() or "
                                 "torch.backends.mps.is_available() or torch.xpu.is_available()))") is None


def import_error(python, code):
    """None, or the last line the interpreter printed when it failed."""
    done = subprocess.run([str(python), "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          stdin=subprocess.DEVNULL, text=True, errors="replace")
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


# ---- make ----

def make(extra_requirements=None):
    """The private environment, made or completed as needed. extra_requirements: a requirements.txt to install too."""
    return _maker(NO_COMFYUI).make(extra_requirements)


def make_hf(extra_requirements=None):
    """The Python of a private environment with diffusers, made or completed as needed. extra_requirements: as of make."""
    return _maker(NO_HF.format(f'"{ROOT}[diffusers]"')).make_hf(extra_requirements)


def make_ray():
    """make_hf's Python, with Ray."""
    return _maker(NO_HF.format(f'"{ROOT}[diffusers]" "{RAY}"')).make_ray()


def _maker(refusal):
    """The module maker. SetupError(refusal) where it is not: in a pack that came from the registry (.comfyignore)."""
    if not Path(__file__).with_name("maker.py").is_file():
        raise SetupError(refusal)
    return importlib.import_module(".maker", __package__)


def enter(script):
    """For a script that needs ComfyUI's Python: returns there, with the tree's folder in SVDQ_COMFYUI. In any other Python
    it runs the script there, with the same arguments, and exits as that did."""
    if "SVDQ_COMFYUI" in os.environ:
        return
    try:
        found = find() or make()
    except SetupError as error:
        sys.exit(f"{Path(script).name}: {error}")
    sys.exit(_run_script(found.python, script, {"SVDQ_COMFYUI": str(found.comfy)}))


def enter_hf(script, make=None):
    """For a script that needs diffusers: returns in the Python of make, or make_hf. In any other it runs the script there, with
    the same arguments, and exits as that did, or with 3 where there is no such Python, or 130 when interrupted."""
    if "SVDQ_HF" in os.environ:
        return
    try:
        # Threads with nothing to do sleep, as others may want the cores; transformers would say at each start that it has no
        # torchvision.
        sys.exit(_run_script((make or make_hf)(), script, {"OMP_WAIT_POLICY": "passive", "TRANSFORMERS_VERBOSITY": "error"}
                             | os.environ | {"SVDQ_HF": "1"}))
    except SetupError as error:
        print(f"{Path(script).name}: {error}", file=sys.stderr)
        sys.exit(3)
    except KeyboardInterrupt:
        print(f"{Path(script).name}: interrupted", file=sys.stderr)
        sys.exit(130)


def _run_script(python, script, environ):
    """The exit code of a script with this process's arguments, which ends when this process is made to."""
    with subprocess.Popen([str(python), script, *sys.argv[1:]], env=os.environ | environ) as child:
        try:
            return child.wait()
        except BaseException:                           # Ctrl-C reaches it, too, a signal to this process alone does not
            child.terminate()
            child.wait()
            raise


def try_lock(file):
    try:
        if WINDOWS:
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:                                     # somebody else holds it
        return False
    return True
