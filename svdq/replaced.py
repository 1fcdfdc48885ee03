"""Whether somebody has replaced, hooked or wrapped what a fused forward steps over.

Whoever replaces code does so before or after we are imported, so what was there then tells nothing: a function is its library's
own when it was written in its file.

Test: tests/comfy/inprocess/checks_blocks.py, tests/hf/inside/checks_blocks.py
"""

import sys
from functools import cache

from torch.nn.modules import module as every_module


def is_unhooked(module):
    """Whether calling a module runs the forward of its class, and nothing else."""
    forward = module.__dict__.get("forward")    # whoever wraps forward leaves a bound method of ours behind when done
    return ((forward is None or getattr(forward, "__func__", None) is type(module).forward)
            and not module._forward_hooks and not module._forward_pre_hooks)


def none_hooks_all():
    """Whether torch calls no hook for every module, a profiler's for instance."""
    return not every_module._global_forward_hooks and not every_module._global_forward_pre_hooks


@cache
def is_of(function, home):
    """Whether a function was written in the file of a module, under the name it has; a wrapper was not."""
    code = getattr(function, "__code__", None)
    return (code is not None and not hasattr(function, "__wrapped__") and code.co_filename == home.__file__
            and code.co_name == function.__name__)


def has_own(kind, name, homes):
    """Whether a method of a class was written in the file of the class that it is from, one of modules of these names."""
    owner = next(one for one in kind.__mro__ if name in vars(one))
    return owner.__module__ in homes and is_of(vars(owner)[name], sys.modules[owner.__module__])
