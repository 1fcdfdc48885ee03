class CheckpointError(ValueError):
    """A file or folder that cannot be used as asked. The message says what came, what is needed and what to do."""


class LoraError(ValueError):
    """A LoRA that cannot be used as asked. The same holds for its message."""


def shown(text, limit=100):
    """Text that came out of a file, made fit for a message: short, on one line, without control characters."""
    text = str(text)[:limit + 1]
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= limit else text[:limit] + "..."
