"""What goes wrong at the boundary of this folder, and how a message names the command that helps.

Messages say: who, what it got, what it needs.
"""

import os
import re
import shlex
import sys
import unicodedata
from pathlib import Path


class ShapeError(ValueError):
    """A tensor whose shape or dtype an operator or a layout cannot take."""
    __module__ = "svdq"                 # not the path ComfyUI loads packs under: error dialogs begin with it


class RangeError(ValueError):
    """Numbers that a dtype has not."""
    __module__ = "svdq"


class BuildError(RuntimeError):
    """Kernels could not be compiled or loaded. The message carries the compiler's own words."""
    __module__ = "svdq"

    def __init__(self, message):
        super().__init__(printable(message, lines=True))


def printable(text, lines=False):
    """Text that may hold names out of files or words of other programs, for a terminal: what is no printable character
    (colours, a cleared screen, text that runs backwards) becomes its escape; spaces of every width stay, which names of files
    have in Japan and on macOS. lines: line feeds stay."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or unicodedata.category(character) == "Zs" or lines and character == "\n"
        else character.encode("unicode_escape").decode() for character in text)


def command(*arguments):
    """The line that runs a command of this pack, ready to paste in every folder: command("doctor") ->
    "PYTHON PACK/svdq doctor" with both paths in full.

    The Python is the running one, which has torch. Arguments (text or paths) are quoted where the shell needs it; on
    Windows that is cmd, and PowerShell wants "& " before a line that starts with a quote.
    """
    folder = Path(__file__).absolute().parents[1]
    return " ".join(quoted(str(part)) for part in (sys.executable or "python", folder, *arguments))


def quoted(text, windows=os.name == "nt"):
    """One argument as the shell of this system takes it. A path of Windows has no quotes inside."""
    if not windows:
        return shlex.quote(text)
    return text if re.fullmatch(r"[\w\\/:.~-]+", text) else f'"{text}"'
