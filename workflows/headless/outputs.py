"""Where pictures and other results are saved."""

import os
import tempfile


def refusal(folder):
    """Make a folder; why no file can be written there, in words, or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:              # ValueError: a NUL in the path
        return getattr(error, "strerror", None) or str(error)
    return None


def save(wanted, data):
    """Write bytes under a path, numbered where something else has it, and return where they are. Raises OSError, ValueError
    for a path with a NUL."""
    path, number = wanted, 1
    while os.path.lexists(path) and not (path.is_file() and path.read_bytes() == data):
        path, number = wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}"), number + 1
    path.write_bytes(data)
    return path
