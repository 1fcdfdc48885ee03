"""Say how SVDQ layers will run on this machine, and build the kernels they need. Installs nothing, always exits 0.

Managers run it after installing the pack; it may be run again at any time, and the pack works without it: what is not
built here is built at the first start.
"""

import importlib
import importlib.util
import logging
import sys
import types
from pathlib import Path


def main():
    if importlib.util.find_spec("torch") is None:
        say("no torch in this Python. Run install.py with the Python that runs ComfyUI.")
        return
    import torch

    say(f"torch {torch.__version__}, Python {sys.version.split()[0]}")
    build, registry, variant = map(kernels, ("build", "registry", "variant"))
    where = {}                                          # Target -> its name
    for index in range(torch.cuda.device_count()):
        name, target = torch.cuda.get_device_name(index), variant.Target.of(f"cuda:{index}")
        where[target] = f"{target.name} {name}" + (f", {variant.sm(target.capability)}" if target.capability else "")
    if not where:
        say("no CUDA GPU found; layers run on the CPU")
        where[variant.Target("cpu")] = "cpu"
    for kind in dict.fromkeys(target._replace(index=None) for target in where):
        for library in registry.libraries(kind):
            report(build.build(library, library.arch(kind.capability)))
    for target, name in where.items():
        say(name)
        show_plans(target)


def show_plans(target):
    import torch

    registry, variant, weights = map(kernels, ("registry", "variant", "weights"))
    half = variant.usual_dtype(target)
    dtype = torch.float32 if target.type == "cpu" else half             # what ComfyUI picks there
    for precision in weights.PRECISIONS:
        say(f"    {precision}: {registry.plan(weights.example(precision, half), target, dtype, repack=True)}")


def report(built):
    if built.route is None:
        say(f"no kernels {built.library.name} for {built.arch}; another path serves. {built.library.missing}")
    else:
        say(f"kernels {built.library.name} for {built.arch} by {built.route}, ready in {built.seconds:.1f} s:", *built.paths)
    for reason in built.reasons:
        say(f"not {reason}")


def kernels(module):
    """A module of svdq/kernels/, without the pack's root, which imports ComfyUI."""
    pack = sys.modules.setdefault("svdq_pack", types.ModuleType("svdq_pack"))
    pack.__path__ = [str(Path(__file__).resolve().parent)]
    return importlib.import_module(f"svdq_pack.svdq.kernels.{module}")


def say(*lines):
    print("\n    ".join(map(str, ("SVDQ: " + lines[0], *lines[1:]))), flush=True)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")       # a console that cannot show é gets \xe9, not a traceback
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        main()
    except Exception as error:      # a broken driver or torch must not fail the installation of the pack
        doctor = kernels("errors").command("doctor")
        say(f"could not look at this machine: {error}. The pack works without this; `{doctor}` says more.")
