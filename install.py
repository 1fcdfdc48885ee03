"""Say which way SVDQ layers will run on this machine. Changes nothing, installs nothing, always exits 0.

Managers run it after installing the pack; it may be run again at any time, and the pack works without it.
"""

import importlib.util
import sys


def main():
    if importlib.util.find_spec("torch") is None:
        print("SVDQ: no torch in this Python. Run install.py with the Python that runs ComfyUI.")
        return
    import torch

    print(f"SVDQ: torch {torch.__version__}, Python {sys.version.split()[0]}")
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        print(f"SVDQ: {torch.cuda.get_device_name(index)}, sm_{major}{minor}")
    if not torch.cuda.device_count():
        print("SVDQ: no CUDA GPU found; ComfyUI will run on the device torch offers")
    print("SVDQ: layers run weight-only: weights stay 4-bit in memory and are multiplied in 16 bit. "
          "Fused 4-bit kernels are not part of this version.")


if __name__ == "__main__":
    try:
        main()
    except Exception as error:      # a broken driver or torch must not fail the installation of the pack
        print(f"SVDQ: could not look at this machine: {error}")
