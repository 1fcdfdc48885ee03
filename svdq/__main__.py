"""python PACK/svdq COMMAND, from every folder; `svdq COMMAND` and `python -m svdq COMMAND` where it is installed."""

import importlib
import os
import sys


def pythons():
    """Where the Python of the ComfyUI that this pack stands in may be, and where run.py makes one; not all are there."""
    here, inside = os.path.dirname(os.path.dirname(os.path.abspath(__file__))), ("bin", "python")     # not through links
    if os.name == "nt":
        inside = "Scripts", "python.exe"
    comfy = os.path.dirname(os.path.dirname(here))
    return [os.path.join(comfy, ".venv", *inside), os.path.join(comfy, "venv", *inside),
            os.path.join(os.path.dirname(comfy), "python_embeded", "python.exe"),
            os.path.join(here, ".environment", "venv", *inside)]


def import_package():
    """Import the package svdq from the folder of this file, which Python was asked to run.

    Python puts that folder first on sys.path (with -m, the working folder: the pack). A file of ours would there hide any other
    module of its name, so it leaves sys.path before anything else is imported.
    """
    folder = os.path.dirname(os.path.realpath(__file__))        # realpath: the pack is often reached through a link
    if sys.path and os.path.realpath(sys.path[0]) in (folder, os.path.dirname(folder)):
        del sys.path[0]
    if "svdq" in sys.modules:
        return
    import importlib.util

    init = os.path.join(folder, "__init__.py")
    spec = importlib.util.spec_from_file_location("svdq", init, submodule_search_locations=[folder])
    sys.modules["svdq"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["svdq"])


def main():
    if sys.stdout is not None:                              # None under pythonw, or with the descriptor closed
        sys.stdout.reconfigure(errors="backslashreplace")   # a console that cannot show é gets \xe9, not a traceback
    try:
        import_package()
        return importlib.import_module("svdq.cli").main()
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("svdq"):
            raise                                           # the pack itself is not whole
        better = [python for python in pythons() if os.path.isfile(python) and python != sys.executable]
        sys.exit(f"svdq: {sys.executable} has no {error.name}. Run the same command with the Python that runs ComfyUI"
                 + (f", which seems to be {better[0]}" if better else ""))
    except KeyboardInterrupt:                               # importing torch takes a while, too
        print("\nsvdq: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
