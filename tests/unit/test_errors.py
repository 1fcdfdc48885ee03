"""svdq/kernels/errors.py, svdq/errors.py: commands in messages can be pasted in any folder, and messages are printable."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from svdq_pack.svdq.compare import CompareError
from svdq_pack.svdq.errors import CheckpointError, LoraError, shown
from svdq_pack.svdq.kernels import errors

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("a", "two words", "it's", "$HOME `ls` * ~", 'say "no"', "é", "")
needs_sh = pytest.mark.skipif(os.name == "nt", reason="asks a POSIX shell")


def test_command():
    assert errors.command() == f"{errors.quoted(sys.executable)} {errors.quoted(str(ROOT / 'svdq'))}"
    assert errors.command("dequantize", "FILE", "OUT") == f"{errors.command()} dequantize FILE OUT"
    assert errors.command("info", Path("a b")).startswith(f"{errors.command()} info ")


def test_command_of_a_program_that_embeds_python(monkeypatch):
    """It may not say which Python it is."""
    monkeypatch.setattr(sys, "executable", None)
    assert errors.command("doctor").startswith("python ")


@needs_sh
@pytest.mark.parametrize("word", WORDS)
def test_a_shell_reads_what_was_quoted(monkeypatch, word):
    monkeypatch.setattr(sys, "executable", "printf")
    line = errors.command(word).replace(errors.quoted(str(ROOT / "svdq")), "%s")
    assert subprocess.run(line, shell=True, capture_output=True, text=True).stdout == word


@pytest.mark.parametrize("path, line", [
    (r"C:\ComfyUI_windows_portable\python_embeded\python.exe", r"C:\ComfyUI_windows_portable\python_embeded\python.exe"),
    (r"C:\Users\Zoë\svdq", r"C:\Users\Zoë\svdq"),
    (r"C:\Program Files\python.exe", r'"C:\Program Files\python.exe"'),
    (r"D:\R&D\svdq", r'"D:\R&D\svdq"'),
    (r"\\server\share (x86)\svdq", r'"\\server\share (x86)\svdq"'),
])
def test_quoted_for_windows(path, line):
    assert errors.quoted(path, windows=True) == line


def messages(path):
    """The texts in a Python file that are not docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and node.body
                  and isinstance(node.body[0], ast.Expr)}
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
            and id(node) not in docstrings]


def test_messages_give_the_whole_command():
    """`python -m svdq` works in one folder only, so no message names it."""
    files = [ROOT / "install.py", *(path for room in ("svdq", "nodes") for path in (ROOT / room).rglob("*.py"))]
    found = [(path, text) for path in files for text in messages(path) if "-m svdq" in text]
    assert len(files) > 30 and not found


@pytest.mark.parametrize("error", [CheckpointError, LoraError, CompareError])
def test_errors_are_fit_for_a_terminal_and_a_dialog(error):
    """Names out of files may stand in them as they are, and the class's module is no path."""
    said = str(error("a\x1b[31m: \u202eb\nc \udcff é"))
    assert said == r"a\x1b[31m: \u202eb\nc \udcff é"
    assert f"{error.__module__}.{error.__qualname__}" == f"svdq.{error.__name__}"


def test_spaces_of_other_scripts_stay():
    """A path that is printed is one that opens. Lines and paragraphs of Unicode's end a line, and spaces do not."""
    path = "/\u56f3\u3000\u9762/Shot at 7.14\u202fPM\xa01.png"
    assert errors.printable(path) == shown(path) == path
    assert errors.printable("a\u2028b\u200bc\u3000d") == "a\\u2028b\\u200bc\u3000d"


def test_words_of_compilers_keep_their_lines():
    assert str(errors.BuildError("a\n\x1b[1mb")) == "a\n\\x1b[1mb"
    assert errors.BuildError.__module__ == errors.ShapeError.__module__ == "svdq"
