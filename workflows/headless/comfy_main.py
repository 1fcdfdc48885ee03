"""python comfy_main.py TREE [arguments]: TREE/main.py where torchvision's compiled half cannot load (maker.py).

A published torchvision is built for CUDA. Beside a torch without CUDA its Python half still serves ComfyUI, but refuses
to import because it registers fake kernels for operators that only the compiled half declares. So declare them.
"""

import os
import runpy
import sys


def declare_operators():
    """Call before the first import of torchvision, and keep the result: the operators vanish with it."""
    import torch
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


if __name__ == "__main__":
    tree = os.path.abspath(sys.argv[1])
    operators = declare_operators()
    sys.argv = [os.path.join(tree, "main.py"), *sys.argv[2:]]
    sys.path[0] = tree                                  # as if main.py had been started itself
    os.chdir(tree)
    runpy.run_path(sys.argv[0], run_name="__main__")
