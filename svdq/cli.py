"""python -m svdq: look into, merge and convert SVDQ FLUX checkpoints without ComfyUI."""

import argparse
import json
import sys
from pathlib import Path

import torch

from . import checkpoint, report
from .errors import CheckpointError


def main(arguments=None):
    """Exit codes: 0 done, 1 the file cannot be used (or, for info, has problems), 2 wrong usage."""
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
    options = parser.parse_args(arguments)
    try:
        return {"info": _info, "merge": _merge, "dequantize": _dequantize}[options.command](options)
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


def _refuse_existing(out):
    if Path(out).exists():
        raise CheckpointError(f"{out}: exists already. Choose another name, or remove it first")
    if not Path(out).parent.is_dir():
        raise CheckpointError(f"{out}: there is no folder {Path(out).parent}. Make it first")
