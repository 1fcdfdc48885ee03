"""A file dropped into svdq/kernels/variants/ is all that a variant needs; a broken one takes only itself out of service.

The pack's svdq/ is copied, one file is added, and a process of its own says what the registry, linear, doctor
and bench make of it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

EXTRA = '''
"""All activations in 16 bit on the CPU, for a test."""
from ..variant import Variant
from ..weights import chunks
calls = []

def prepare(x, weight):
    calls.append(len(x))
    return weight.smoothed(x)

def product(x, weight, out, bias, accumulate, epilogue=None):
    y = x.float() @ weight.dense(x.dtype).float().t() + (0 if bias is None else bias.float())
    out.copy_(y + out if accumulate else y)

VARIANTS = (Variant("extra", "a file of its own", prepare, product, device=("cpu",), max_rank=0, preference=90),)
'''
FILES = {
    "good": EXTRA, "import error": "import no_such_module\n" + EXTRA, "no VARIANTS": EXTRA.replace("VARIANTS =", "ROWS ="),
    "wrong": EXTRA.replace("y + out if", "1.05 * y + out if").replace("else y)", "else 1.05 * y)"),
    "raises": EXTRA.replace("    y = ", "    [][0]\n    y = ")}
assert len(set(FILES.values())) == len(FILES)

# Forks, because torch takes longer to import than all the rest.
LOOK = """
import contextlib, importlib, io, json, logging, os, sys, types
from pathlib import Path
import torch

def look(folder):
    pack = types.ModuleType("svdq_pack")
    pack.__path__ = [str(folder)]
    sys.modules["svdq_pack"] = pack
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("svdq_pack").addHandler(handler)
    from svdq_pack.svdq.kernels import check, ops, registry
    from svdq_pack.svdq.kernels.variant import Target
    from svdq_pack.svdq import bench, cli
    # Those with kernels of the CPU aside: no compiler is needed to see what becomes of a file.
    registry.VARIANTS = tuple(variant for variant in registry.VARIANTS if variant.device != ("cpu",) or variant.name == "extra")
    check.WIDE = check.WIDE[1:2]
    weight, bias = check.random_weight("int4", torch.bfloat16, 128, 256)
    x, out, want = check.random_x(5, 256, torch.bfloat16), *torch.zeros(2, 5, 128, dtype=torch.bfloat16)
    plan = registry.plan(weight, Target("cpu"), torch.bfloat16)
    extra = sys.modules.get("svdq_pack.svdq.kernels.variants.extra")
    getattr(extra, "calls", []).clear()
    ops.linear(x, weight, out, bias)
    calls = list(getattr(extra, "calls", []))
    with registry.using("weight_only"):
        ops.linear(x, weight, want, bias)
    facts = {
        "served by": plan.variant.name, "declined": {variant.name: why for variant, why in plan.declined}, "calls": calls,
        "error": check.relative(out, want), "trusted": [[variant.name, registry.trusted(variant, Target("cpu"))]
                                                        for variant in registry.VARIANTS if variant.name == "extra"],
        "others": sorted({variant.name for variant in registry.VARIANTS} - {"extra"}), "broken": registry.BROKEN,
        "bench": [variant.name for variant in bench.serving("int4", Target("cpu"))]}
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        facts["exit"] = cli.main(["doctor"])
    facts["doctor"], facts["log"] = text.getvalue(), said
    Path(folder, "facts.json").write_text(json.dumps(facts))

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    child = os.fork()
    if not child:
        look(folder)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """What FILES came to: {name: facts}"""
    folders = {name: tmp_path_factory.mktemp("pack") for name in FILES}
    for name, folder in folders.items():
        shutil.copytree(ROOT / "svdq", folder / "svdq", ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "svdq" / "kernels" / "variants" / "extra.py").write_text(FILES[name])
    done = subprocess.run([sys.executable, "-c", LOOK, *map(str, folders.values())], capture_output=True, text=True,
                          timeout=600, cwd=folders["good"], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert all((folder / "facts.json").exists() for folder in folders.values()), done.stderr
    return {name: json.loads((folder / "facts.json").read_text()) for name, folder in folders.items()}


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


@needs_fork
def test_a_new_file_serves(facts):
    """Dispatched, self-tested, listed by doctor, offered to bench."""
    new = facts["good"]
    assert (new["served by"], new["declined"], new["calls"], new["broken"]) == ("extra", {}, [5], {})
    assert new["error"] < 1e-2 and new["trusted"] == [["extra", True]] and new["bench"] == ["extra"]
    assert (new["exit"], new["log"]) == (0, [])
    who, tests = new["doctor"].split("who serves\n")[1].split("self-test\n")
    assert "cpu     int4   extra        a file of its own (bfloat16, float16, float32)" in who
    assert "cpu     nvfp4  weight_only" in who and "cpu     awq    weight_only" in who
    for kind in ("int4", "int4 unsigned", "int4 without -8"):
        assert tests.count(f"  ok     cpu     {kind:<16}extra ") == 3
    assert "FAILED" not in tests and "all 24 passed" in tests


@needs_fork
@pytest.mark.parametrize("name, words", [("import error", "ModuleNotFoundError: No module named 'no_such_module'"),
                                         ("no VARIANTS", "has no attribute 'VARIANTS'")])
def test_a_file_that_cannot_be_imported(facts, name, words):
    broken = facts[name]
    assert broken["broken"].keys() == {"extra.py"} and words in broken["broken"]["extra.py"]
    assert_only_it_is_out(broken, facts["good"])
    assert broken["trusted"] == [] and broken["declined"] == {}
    assert "svdq/kernels/variants/extra.py cannot be used" in broken["log"][0]
    assert "  BROKEN extra.py: " in broken["doctor"] and words in broken["doctor"] and "all 15 passed" in broken["doctor"]


@needs_fork
@pytest.mark.parametrize("name, words", [("wrong", "linear: "), ("raises", "IndexError: list index out of range")])
def test_a_variant_that_fails_its_self_test(facts, name, words):
    broken = facts[name]
    assert broken["broken"] == {} and broken["trusted"] == [["extra", False]]
    assert_only_it_is_out(broken, facts["good"])
    assert "failed its self-test" in broken["declined"]["extra"]
    assert "extra fails its self-test on cpu" in broken["log"][0] and words in broken["log"][0]
    who, tests = broken["doctor"].split("who serves\n")[1].split("self-test\n")
    assert "not extra: did not build, or failed its self-test" in who and "BROKEN" not in broken["doctor"]
    failed = [line for line in tests.splitlines() if line.startswith("  FAILED cpu")]
    assert len(failed) == 9 and all(" extra " in line for line in failed) and "9 of 24 failed" in tests


def assert_only_it_is_out(broken, good):
    """The others are there and serve, the log says so once, doctor's exit code, too."""
    assert (broken["served by"], broken["calls"], broken["bench"]) == ("weight_only", [], [])
    assert broken["others"] == good["others"] and broken["error"] == 0
    assert len(broken["log"]) == 1 and broken["exit"] == 1
    assert "cpu     int4   weight_only" in broken["doctor"]
