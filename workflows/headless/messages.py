"""The pack's own ways with text that came from outside, under whichever name this folder was imported. No torch."""

import importlib
import sys
import types

from .environment import ROOT

parent = types.ModuleType("svdq_pack")          # the pack is no package here, and its imports reach for one
parent.__path__ = [str(ROOT)]
sys.modules.setdefault(parent.__name__, parent)
printable = importlib.import_module("svdq_pack.svdq.kernels.errors").printable
errors = importlib.import_module("svdq_pack.svdq.errors")
first, shown = errors.first, errors.shown
LONGEST, MOST = 300, 100        # characters of a path or a progress line, nodes or inputs that are listed


class UsageError(Exception):
    """The arguments or the workflow file are wrong."""
