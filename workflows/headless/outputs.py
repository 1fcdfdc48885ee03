"""Where pictures and other results are saved."""

import contextlib
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
    while True:
        if path.is_file() and path.read_bytes() == data:
            return path
        if not os.path.lexists(path):
            with contextlib.suppress(FileExistsError):  # another process has made it just now
                return _write(path, data)
        path, number = wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}"), number + 1


def _write(path, data):
    """Write a file that is not there, whole or not at all."""
    with open(path, "xb") as file:
        try:
            file.write(data)
            file.flush()
        except BaseException:
            os.unlink(path)
            raise
    return path
