"""tools/pack_suite.py tells what a pack does: here packs of the tests' own, under the names of two that it knows."""

import os
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "pack_suite.py"
AGAINST_US = """
from svdq_pack.nodes.host.layer import SVDQLinear
own = SVDQLinear.run_together
def wrong(layers):
    own(layers)
    for _, jobs in layers:
        for _, _, out, _ in jobs:
            if hasattr(out, "mul_"):    # a layer.Hidden is no tensor
                out.mul_(1.01)
SVDQLinear.run_together = staticmethod(wrong)
"""
PACKS = {
    "ComfyUI-GGUF": "NODE_CLASS_MAPPINGS = {}" + AGAINST_US,
    "ComfyUI-ppm": "import svdq_pack.nowhere",
}


def test_verdicts(tmp_path, newest):
    for name, code in PACKS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    done = subprocess.run([sys.executable, str(TOOL), str(tmp_path)], capture_output=True, text=True,
                          env=os.environ | {"SVDQ_COMFYUI": newest})
    table = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in done.stdout.splitlines()[2:]]
    found = {}
    for name, _, _, *figures in table:
        found.setdefault(name, []).append(figures)
    assert done.returncode == 1 and list(found) == sorted(PACKS), done.stderr[-2000:]
    (stock, ours, difference, fused, share, verdict), = found["ComfyUI-GGUF"]
    assert stock == ours == "0" and float(difference) < 1e-5 < float(fused) and (share, verdict) == ("100 %", "differs")
    assert [row[-1] for row in found["ComfyUI-ppm"]] == ["does not import: No module named 'svdq_pack.nowhere'"]
