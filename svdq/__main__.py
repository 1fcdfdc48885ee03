"""Run from the root of the pack, `svdq` is a top-level package, but its imports reach for `..kernels`: give it a parent."""

import importlib
import sys
import types
from pathlib import Path

parent = types.ModuleType("svdq_pack")
parent.__path__ = [str(Path(__file__).resolve().parent.parent)]
sys.modules[parent.__name__] = parent

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")       # a console that cannot show é gets \xe9, not a traceback
    sys.exit(importlib.import_module("svdq_pack.svdq.cli").main())
