#!/usr/bin/env python3
"""The steps of .ci/gpu that are no command of their own: build the kernels, run each of them once.

    python3 tools/gpu_steps.py build    every library that variants may launch on this GPU; exit 1 if one does not build
    python3 tools/gpu_steps.py once     every variant with kernels on small layers, for a sanitizer to watch; exit 1 on a fault
"""

import argparse
import sys
import types
from pathlib import Path

import torch

pack = types.ModuleType("svdq_pack")            # the pack without its root, which imports ComfyUI
pack.__path__ = [str(Path(__file__).resolve().parents[1])]
sys.modules.setdefault(pack.__name__, pack)

from svdq_pack.svdq.kernels import build, check, registry  # noqa: E402
from svdq_pack.svdq.kernels.variant import Target  # noqa: E402
from svdq_pack.svdq.kernels.weights import example  # noqa: E402


def build_all():
    capability, failed = torch.cuda.get_device_capability(), False
    for library in registry.libraries(Target("cuda", capability)):
        built = build.build(library, library.arch(capability))
        print(library.name, built.arch, built.route or "NOT BUILT", f"{built.seconds:.1f} s", *built.paths, *built.reasons,
              sep="\n    ")
        failed |= built.route is None
    return failed


def run_once():
    target, failed = Target.of("cuda"), []
    for variant in registry.VARIANTS:
        serves = variant.library is not None and not variant.on_request and any(
            variant.declines(target, dtype, example(precision, dtype)) is None
            for precision in variant.precisions for dtype in variant.dtypes)
        if serves:
            wrong = check.small(variant, "cuda")
            print(variant.name, *(wrong or ["right"]), sep="\n    ")
            failed += wrong
    torch.cuda.synchronize()
    return bool(failed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("build", "once"))
    step = parser.parse_args().step
    return {"build": build_all, "once": run_once}[step]()


if __name__ == "__main__":
    sys.exit(main())
