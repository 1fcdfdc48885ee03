"""What this pack raises about what came from outside. Hosts show these to people, with the class's module before it."""

from .kernels.errors import printable


class PackError(ValueError):
    """One line for people: what came, what is needed, what to do next. Names out of files may stand in it as they are."""
    __module__ = "svdq"                 # not the path ComfyUI loads packs under: error dialogs begin with it

    def __init__(self, message):
        super().__init__(printable(message))

    def __init_subclass__(cls):
        cls.__module__ = "svdq"


class CheckpointError(PackError):
    """A file or folder that cannot be used as asked."""


class LoraError(PackError):
    """A LoRA that cannot be used as asked."""


def shown(text, limit=100):
    """Text that came out of a file, made fit for a message: short, on one line, without control characters."""
    text = str(text)[:limit + 1]
    text = text if printable(text) == text else ascii(text)
    return text if len(text) <= limit else text[:limit] + "..."


def first(texts, most):
    """So many of a list of texts, and how many more there are."""
    return texts[:most] + [f"and {len(texts) - most:,} more"] * (len(texts) > most)
