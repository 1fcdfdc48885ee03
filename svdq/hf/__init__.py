"""SVDQ FLUX models in diffusers: a genuine FluxTransformer2DModel with our layers in it.

    model.py       the class: loading, saving, devices, what of diffusers' own would fail silently
    layer.py       our linear as one of its modules, and rows of a fused q, k, v as another
    operators.py   the layer as an operator of torch, for torch.compile and autograd
    adapters.py    LoRA: PEFT keeps it, the low-rank branch computes it
    lora_files.py  LoRA files of every dialect, under diffusers' names
    attention.py   norms and rotation of q and k inside the kernels
    blocks.py      whole blocks inside the kernels
    source.py      which file a path or a name on Hugging Face means

Nothing imports this but `svdq.SVDQFluxTransformer2DModel`, when it is asked for.
"""

import importlib.metadata
import re

LOWEST = {"diffusers": "0.36.0", "peft": "0.18.0"}        # the oldest whose pipelines import beside transformers 5
# Windows' cmd knows no other quotes, and without them takes > for a redirection
INSTALL = 'python -m pip install "diffusers>=%(diffusers)s" "peft>=%(peft)s" accelerate transformers' % LOWEST


def require(package):
    """Raise ImportError with what to install unless a package is there and new enough."""
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is None or _numbers(found) < _numbers(LOWEST[package]):
        has = f"{package} {found}" if found else f"no {package}"
        raise ImportError(f"SVDQ models in diffusers need {package} {LOWEST[package]} or newer, and this Python has {has}. "
                          f"Install it: {INSTALL}")


def _numbers(version):
    """Of the release that a version is, or is on the way to: 0.43.0.dev0 has what 0.43.0 will have."""
    numbers = re.findall(r"\d+", re.match(r"[\d.]*", version)[0])
    return [int(number) for number in (*numbers, 0, 0, 0)[:3]]


require("diffusers")
