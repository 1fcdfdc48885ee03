"""Quantise a model to SVDQ: any 16-bit or fp8 transformer of a known family in, one INT4 or NVFP4 checkpoint out, a layer at
a time.

    run.py          the whole model: checks, resume, progress, the file
    source.py       the weights of a model on disk
    calibration.py  statistics of the layers' inputs, captured while a host samples
    assume.py       the same where nobody captured any
    layer.py        one linear: smooth, low rank, round, correct the bias
    rounding.py     the 4-bit grids
    picture.py      the report in words and as a drawing
"""

from .run import Progress, quantize
from .source import FileSource

__all__ = ["FileSource", "Progress", "quantize"]
