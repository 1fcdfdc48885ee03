"""python PACK/svdq COMMAND, from every folder; inside the pack `python -m svdq COMMAND` does the same."""

import os
import sys

# Python puts the folder it was asked to run first on sys.path (with -m, the working folder: the pack). A file of ours would
# there hide any other module of its name, so both leave sys.path before anything else is imported.
folder = os.path.dirname(os.path.realpath(__file__))        # realpath: the pack is often reached through a link
pack = os.path.dirname(folder)
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) not in (folder, pack)]

import importlib  # noqa: E402
import types  # noqa: E402

# `svdq` is a top-level package here, but its imports reach for `..kernels`: give it a parent.
parent = types.ModuleType("svdq_pack")
parent.__path__ = [pack]
sys.modules[parent.__name__] = parent


def pythons():
    """Where the Python of the ComfyUI that this pack stands in may be, and where run.py makes one; not all are there."""
    here, inside = os.path.dirname(os.path.dirname(os.path.abspath(__file__))), ("bin", "python")     # not through links
    if os.name == "nt":
        inside = "Scripts", "python.exe"
    comfy = os.path.dirname(os.path.dirname(here))
    return [os.path.join(comfy, ".venv", *inside), os.path.join(comfy, "venv", *inside),
            os.path.join(os.path.dirname(comfy), "python_embeded", "python.exe"),
            os.path.join(here, ".environment", "venv", *inside)]


def main():
    try:
        return importlib.import_module("svdq_pack.svdq.cli").main()
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith(parent.__name__):
            raise                                           # the pack itself is not whole
        better = [python for python in pythons() if os.path.isfile(python) and python != sys.executable]
        sys.exit(f"svdq: {sys.executable} has no {error.name}. Run the same command with the Python that runs ComfyUI"
                 + (f", which seems to be {better[0]}" if better else ""))
    except KeyboardInterrupt:                               # importing torch takes a while, too
        print("\nsvdq: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    if sys.stdout is not None:                              # None under pythonw, or with the descriptor closed
        sys.stdout.reconfigure(errors="backslashreplace")   # a console that cannot show é gets \xe9, not a traceback
    sys.exit(main())
