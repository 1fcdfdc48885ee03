#!/usr/bin/env python3
"""Paint a picture by an SVDQ model in diffusers' own pipeline.

    python3 workflows/diffusers_demo.py                                 the small demo model that comes with the pack
    python3 workflows/diffusers_demo.py "two red hearts on a blue background" --seed 7
    python3 workflows/diffusers_demo.py --lora                          with its LoRA, which makes stickers
    python3 workflows/diffusers_demo.py "a red fox" --model svdq-int4_r32-flux.1-schnell.safetensors

It makes a Python with diffusers once, in .environment, and runs there. The demo downloads nothing else. With --model, the text
encoders and the VAE of a FLUX.1 (10 GB) come from Hugging Face, and so does the model (7 GB) unless it is a file. The last line
printed is the path of the picture.
"""

import argparse
import io
import os
import signal
import sys
import time
from pathlib import Path

from headless import environment, outputs

DEMO_PROMPT = "a green moon above a blue ring on a checkered orange background"
PROMPT = "A cat holding a sign that says hello world"
OUT = environment.ROOT / "output" / "diffusers-demo.png"
EXIT_CODES = """exit codes:
  0    done
  1    it failed while it painted
  2    bad arguments, a prompt that the demo model does not know, or a model or LoRA that cannot be used
  3    no Python with diffusers could be made, or Hugging Face not be reached
  130  interrupted
"""


class UsageError(Exception):
    """The arguments are wrong."""


def main(arguments=None):
    options = parser().parse_args(arguments)
    try:
        make_room(options.out)
        environment.enter_hf(__file__)
        print(paint(options))
        return 0
    except UsageError as error:
        return complain(error, 2)
    except KeyboardInterrupt:
        return 130                      # who started this says so


def parser():
    new = argparse.ArgumentParser(description=__doc__, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter)
    new.add_argument("prompt", nargs="?", metavar="PROMPT",
                     help="what to paint; the demo model knows few words, of simple things, and lists them for any other")
    new.add_argument("--model", metavar="FILE|REPO",
                     help="an SVDQ file or folder of a FLUX.1, or owner/name on Hugging Face; default: the demo model")
    loras = new.add_mutually_exclusive_group()
    loras.add_argument("--lora", action="store_true", help="with the demo model's LoRA, which makes stickers")
    loras.add_argument("--lora-file", metavar="FILE|REPO", help="with this LoRA")
    new.add_argument("--out", type=Path, default=OUT, metavar="PNG",
                     help="the picture, numbered where another file has its name; default: output/diffusers-demo.png in this "
                          "repository")
    new.add_argument("--seed", type=whole(0, 2**64 - 1), default=0, metavar="N", help="default: %(default)s")
    new.add_argument("--steps", type=whole(1, 1000), metavar="N", help="default: what suits the model")
    return new


def whole(least, most):
    """An argument's type: whole numbers of a range."""
    def number(text):
        if not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text}: must be {least} to {most}")
        return int(text)

    return number


def make_room(out):
    """Say now, not after minutes, that a picture cannot be written there."""
    if os.path.isdir(out):
        raise UsageError(f"--out {str(out)!a}: is a folder. Name a PNG file")
    if (why := outputs.refusal(out.absolute().parent)) is not None:
        raise UsageError(f"--out {str(out)!a}: cannot be written: {why}. Choose another file")


def paint(options):
    """The path of the picture. Ends the process where there is none."""
    import torch  # this and what follows is in that Python only
    from headless.painter import Painter

    from svdq.errors import PackError, shown

    start = time.monotonic()
    try:
        painter = Painter(options.model, options.lora_file or (True if options.lora else None))
        picture = painter.paint(options.prompt or (DEMO_PROMPT if painter.is_demo else PROMPT), options.seed, options.steps)
    except PackError as error:
        sys.exit(complain(error, 2))
    except OSError as error:            # diffusers' and Hugging Face's, of several lines
        sys.exit(complain(shown(" ".join(str(error).split()), 600), 3))
    except torch.OutOfMemoryError as error:
        sys.exit(complain(f"the device has too little memory: {shown(' '.join(str(error).split()), 300)}", 1))
    print(f"done in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    data = io.BytesIO()
    picture.save(data, "PNG")
    try:
        return outputs.save(options.out.absolute(), data.getvalue())
    except (OSError, ValueError) as error:
        sys.exit(complain(f"{str(options.out)!a}: cannot be written: {getattr(error, 'strerror', None) or error}", 1))


def complain(error, code):
    print(f"diffusers_demo.py: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    for name in ("SIGTERM", "SIGHUP"):                  # end what was started on these, too; Windows has no SIGHUP
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:      # which nohup says
            signal.signal(getattr(signal, name), lambda *_: sys.exit(130))
    sys.exit(main())
