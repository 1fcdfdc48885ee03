"""python -m svdq: look into, merge and convert SVDQ FLUX checkpoints, and into this machine, without ComfyUI."""

import argparse
import json
import sys
from pathlib import Path

import torch

from . import bench, checkpoint, doctor, report
from .errors import CheckpointError


def main(arguments=None):
    """Exit codes: 0 done, 1 the file cannot be used (info: has problems; doctor, bench: a check failed), 2 wrong usage
    (bench: no CUDA GPU)."""
    parser = argparse.ArgumentParser(prog="python -m svdq", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="say what a checkpoint is and whether it can be loaded")
    info.add_argument("file", help="an SVDQ .safetensors file, or a legacy folder")
    info.add_argument("--json", action="store_true", help="print the facts as JSON")
    merge = commands.add_parser("merge", help="turn a legacy folder into a single file")
    merge.add_argument("folder", help="holds transformer_blocks.safetensors and unquantized_layers.safetensors")
    merge.add_argument("out", help="the new .safetensors file")
    dequantize = commands.add_parser("dequantize", help="write the weight-only equivalent as an ordinary FLUX model")
    dequantize.add_argument("file", help="an SVDQ .safetensors file, or a legacy folder")
    dequantize.add_argument("out", help="the new .safetensors file, with BFL names; 24 GB for FLUX.1 in bfloat16")
    dequantize.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    examine = commands.add_parser("doctor", help="say what this machine is, what serves on it and whether it is right")
    examine.add_argument("--json", action="store_true", help="print the facts as JSON")
    measure = commands.add_parser("bench", help="check and time the linears of FLUX on this GPU")
    measure.add_argument("--tokens", type=_positive, nargs="+", metavar="N", default=bench.TOKENS,
                         help="rows of x; default: %(default)s, which is FLUX at 1024 x 1024 and its text alone")
    measure.add_argument("--rank", type=int, choices=range(16, 129, 16), metavar="R", default=32,
                         help="of the low-rank branch: a multiple of 16 up to 128; default: %(default)s")
    measure.add_argument("--quick", action="store_true", help="10 runs per row, not 50: for a look, not for a claim")
    measure.add_argument("--json", metavar="FILE", help="write all rows to this file, too")
    options = parser.parse_args(arguments)
    try:
        return {"info": _info, "merge": _merge, "dequantize": _dequantize, "doctor": _doctor,
                "bench": _bench}[options.command](options)
    except (CheckpointError, OSError) as error:
        print(f"svdq: {error}", file=sys.stderr)
        return 1


def _info(options):
    facts = report.describe(options.file)
    print(json.dumps(facts, indent=2) if options.json else report.as_text(facts))
    return 1 if facts["problems"] else 0


def _merge(options):
    _refuse_existing(options.out)
    checkpoint.merge(options.folder, options.out)
    print(options.out)
    return 0


def _dequantize(options):
    _refuse_existing(options.out)
    checkpoint.dequantize(options.file, options.out, getattr(torch, options.dtype))
    print(options.out)
    return 0


def _doctor(options):
    facts = doctor.describe()
    print(json.dumps(facts, indent=2) if options.json else doctor.as_text(facts))
    return 0 if facts["passed"] else 1


def _bench(options):
    reason = bench.missing()
    if reason:
        print(f"svdq: {reason}", file=sys.stderr)
        return 2
    if options.json:
        Path(options.json).touch()                              # say now, not after minutes, that it cannot be written
    facts = bench.measure(options.tokens, options.rank, 10 if options.quick else 50)
    print(bench.as_markdown(facts))
    if options.json:
        Path(options.json).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return 0 if facts["passed"] else 1


def _positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _refuse_existing(out):
    if Path(out).exists():
        raise CheckpointError(f"{out}: exists already. Choose another name, or remove it first")
    if not Path(out).parent.is_dir():
        raise CheckpointError(f"{out}: there is no folder {Path(out).parent}. Make it first")
