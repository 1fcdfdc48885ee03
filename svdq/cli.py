"""Look into, merge, convert and make SVDQ FLUX checkpoints, and look into this machine, without ComfyUI."""

import argparse
import datetime
import json
import sys
import time
from functools import partial
from pathlib import Path

import torch

from . import bench, bench_file, checkpoint, compare, data_sheets, doctor, predict, quantize, report
from .container import replacing
from .errors import PackError
from .files import require_free, writing
from .kernels.errors import command, printable
from .quantize import picture


def main(arguments=None):
    """Exit codes: 0 done, 1 the file cannot be used (info: has problems; doctor, bench: a check failed), 2 wrong usage
    (bench: no CUDA GPU), 3 interrupted (quantize: the same command continues), 130 interrupted (the others)."""
    installed = Path(sys.argv[0]).stem == "svdq" and Path(sys.argv[0]).is_file()       # `python PACK/svdq` is a folder
    parser = argparse.ArgumentParser(prog="svdq" if installed else command(), description=__doc__)
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
    measure.add_argument("--out", metavar="FILE", help="the file with all results, to paste into an issue; default: "
                                                       "svdq-bench-CARD-DATE.md in this folder")
    measure.add_argument("--predict", choices=data_sheets.CARDS, metavar="CARD",
                         type=lambda text: data_sheets.named(text) or text,
                         help="measure nothing: predict a step on a card from counts and its data sheet, and say what limits: "
                              + ", ".join(data_sheets.CARDS))
    measure.add_argument("--json", action="store_true", help="of a prediction: as JSON")
    quality = commands.add_parser("compare", help="say how far a quantised model's pictures are from the 16-bit model's")
    quality.add_argument("reference", help="a picture or latent of the 16-bit model, or a folder of them")
    quality.add_argument("quantised", help="the same of the quantised model: same prompts, seeds and order")
    quality.add_argument("--sheet", metavar="PNG", help="write reference | quantised | 8 x difference to this picture, too")
    quality.add_argument("--json", metavar="FILE", help="write all numbers to this file, too")
    make = commands.add_parser("quantize", help="make an SVDQ checkpoint of a FLUX.1 model")
    make.add_argument("model", help="a bf16, fp16 or fp8 FLUX.1 transformer: .safetensors, its .index.json, or their folder")
    make.add_argument("out", help="the new .safetensors file; while it is made, finished blocks are in OUT.svdq-work")
    make.add_argument("--precision", choices=[*checkpoint.PRECISIONS], default="int4", help="default: %(default)s")
    make.add_argument("--rank", type=_positive, default=32, metavar="R", help="a multiple of 16; default: %(default)s")
    make.add_argument("--calibration", metavar="FILE", help="statistics from 'SVDQ Capture Calibration'; default: none, "
                                                            "which assumes them from the weights: for drafts")
    make.add_argument("--report", metavar="DIR", help="write report.json and report.svg into this folder, too")
    make.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    make.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        return {"info": _info, "merge": _merge, "dequantize": _dequantize, "doctor": _doctor,
                "bench": _bench, "compare": _compare, "quantize": _quantize}[options.command](options)
    except (PackError, OSError) as error:
        print(f"svdq: {printable(error)}", file=sys.stderr)
        return 1


def _info(options):
    facts = report.describe(options.file)
    print(json.dumps(facts, indent=2) if options.json else report.as_text(facts))
    return 1 if facts["problems"] else 0


def _merge(options):
    require_free(options.out)
    _say_notices(options.folder)
    checkpoint.merge(options.folder, options.out)
    print(printable(options.out))
    return 0


def _dequantize(options):
    require_free(options.out)
    _say_notices(options.file)
    checkpoint.dequantize(options.file, options.out, getattr(torch, options.dtype))
    print(printable(options.out))
    return 0


def _doctor(options):
    facts = doctor.describe()
    print(json.dumps(facts, indent=2) if options.json else doctor.as_text(facts))
    return 0 if facts["passed"] else 1


def _bench(options):
    if options.predict:
        facts = predict.predict(options.predict)
        print(json.dumps(facts, indent=2) if options.json else predict.as_markdown(facts))
        return 0
    reason = bench.missing()
    if reason:
        print(f"svdq: {reason}", file=sys.stderr)
        return 2
    path = Path(options.out or bench_file.name(torch.cuda.get_device_name(), datetime.date.today().isoformat()))
    with replacing(path) as file:                       # say now, not after minutes, that it cannot be written
        file.write(b"svdq bench was cut before its first row.\n")
    facts = bench.measure(options.tokens, options.rank, 10 if options.quick else 50, partial(bench_file.write, path))
    text = bench_file.as_text(facts)
    print(text.partition(bench_file.BEGIN)[0])
    card = data_sheets.named(facts["machine"]["card"])
    if card:                                    # beside what was measured
        print(predict.in_short(predict.predict(card)) + "\n")
    large = f"; it has {len(text) / 1000:.0f} kB, so attach it instead" if len(text) > bench_file.MOST else ""
    print(f"Please paste this file into an issue: {printable(path.absolute())}{large}")
    return 0 if facts["passed"] else 1


def _compare(options):
    if options.sheet:
        compare.check_new(options.sheet, compare.PICTURES)
    if options.json:
        compare.check_new(options.json)
    given = compare.read(options.reference, options.quantised)
    if options.sheet and "pictures" not in given:
        raise compare.CompareError("--sheet takes pictures, and these are latents. Decode them first, or leave it out")
    facts = compare.compare(**given)
    print(compare.as_text(facts))
    if options.sheet:
        compare.write_picture(options.sheet, compare.sheet(*given["pictures"]))
    if options.json:
        compare.write_json(options.json, facts)
    return 0


def _quantize(options):
    told = [Path(options.report, name) for name in ("report.json", "report.svg")] if options.report else []
    if told:                                            # say now, not after an hour, that they cannot be written
        with writing(options.report):
            Path(options.report).mkdir(parents=True, exist_ok=True)
        for path in told:
            picture.require_ours(path)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        facts = quantize.quantize(options.model, options.out, options.precision, options.rank, options.calibration,
                                  seed=options.seed, device=device, progress=_Line())
    except KeyboardInterrupt:
        print("\nsvdq: interrupted. Finished blocks are kept; the same command goes on from there", file=sys.stderr)
        return 3
    print(f"{picture.as_text(facts)}\n{facts['seconds']:.0f} s\n{printable(options.out)}")
    for path in told:
        picture.require_ours(path)                      # somebody else had time to put something there
        with replacing(path) as file:
            file.write((picture.svg(facts) if path.suffix == ".svg" else json.dumps(facts, indent=2) + "\n").encode())
    return 0


class _Line:
    """Progress on one line of a terminal; in a log, a line each half minute."""

    def __init__(self):
        self.last = 0.0

    def __call__(self, progress):
        terminal = sys.stderr.isatty()
        if not terminal and time.monotonic() - self.last < 30:
            return
        self.last = time.monotonic()
        left = progress.seconds_left
        text = f"{progress.done / progress.total:4.0%} {progress.text}"
        if left is not None:
            hours, minutes = divmod(left / 60, 60)
            text += f", {hours:.0f} h {minutes:02.0f} min left" if hours else f", {minutes:.1f} min left"
        print(f"\r\x1b[K{text}" if terminal else text, end="" if terminal and progress.done < progress.total else "\n",
              file=sys.stderr, flush=True)


def _positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _say_notices(path):
    """What of a checkpoint will not be in the file that is made of it."""
    for text in checkpoint.Checkpoint(path).notices:
        print(f"svdq: notice: {printable(text)}", file=sys.stderr)
