"""What run.py says on standard error while it works."""

import shutil
import sys
import unicodedata

from .graph import title
from .messages import LONGEST, printable


class Progress:
    """Lines for people; `step` is one line that changes on a terminal, a line per event elsewhere. quiet: nothing."""

    def __init__(self, stream=None, quiet=False):
        self.stream, self.quiet = stream or sys.stderr, quiet
        self.live, self.open = self.stream.isatty(), False
        self.begin({})

    def begin(self, prompt):
        """A graph whose events follow."""
        self.prompt, self.started = prompt, set()

    def on_event(self, kind, data):
        if kind == "queued":
            self.step(f"queued, {data['ahead']} ahead")
        elif kind == "execution_cached":
            self.started.update(data["nodes"])
        elif kind == "executing" and data.get("node"):
            self.started.add(data["node"])
            self._node(data["node"])
        elif kind == "progress" and data.get("node"):
            self._node(data["node"], f", step {data['value']}/{data['max']}")

    def _node(self, id, step=""):
        name = title(self.prompt, id) if id in self.prompt else id          # nodes may add nodes while they run
        self.step(f"[{len(self.started)}/{len(self.prompt)}] {name[:LONGEST]}{step}")

    def step(self, text):
        if not self.quiet:
            line = printable(text)
            self.stream.write("\r" + fitted(line, shutil.get_terminal_size().columns - 1) if self.live else line + "\n")
            self.stream.flush()
            self.open = self.live

    def end(self):
        """What is said next begins a line."""
        if self.open:
            self.stream.write("\n")
            self.open = False

    def say(self, text):
        if not self.quiet:
            self.end()
            print(printable(text, lines=True), file=self.stream, flush=True)


def fitted(line, width):
    """So many cells of a terminal, where a letter of Chinese takes two: cut off, or filled with spaces."""
    kept = ""
    for letter in line:
        cells = 0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF")
        if cells > width:
            break
        kept, width = kept + letter, width - cells
    return kept + " " * width
