"""The border to the file system: opening what others wrote, writing, and names that users give to what we write.

Test: tests/unit/test_files.py, tests/hostile/test_files.py
"""

import errno
import os
import re
import stat
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath, PurePosixPath

from .errors import CheckpointError, PackError, shown

MAX_TEXT = 1 << 20      # bytes of a JSON file beside a model; the longest in use, the index of a model in parts, has 0.1 MB
LONGEST = 200           # characters of a name, so that temporary files and work folders of it have names too
_RESERVED = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.I)       # devices, on Windows


def open_regular(path):
    """A file for reading bytes, unbuffered. Raises OSError; CheckpointError for what is no regular file: a pipe would be
    waited for, a device may have no end."""
    # Python opens a pipe's name only when somebody writes to it, unless told not to wait
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: this is a device or a pipe. Name a file")
    return os.fdopen(descriptor, "rb", buffering=0)


def read_text(path, limit=MAX_TEXT):
    """The text of a small file. Raises CheckpointError for one that cannot be read, is longer than `limit` bytes or no
    UTF-8."""
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > limit:
                raise CheckpointError(f"{path}: has more than {limit:,} bytes, which no such file needs. Get it again")
            return file.readall().decode("utf-8")
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:          # ValueError: a NUL in the path, or bytes that are no UTF-8
        raise CheckpointError(f"{path}: cannot be read: {shown(error, 200)}. Get it again") from error


@contextmanager
def writing(path):
    """What the system refuses while `path`, a file or a folder, is made or changed: one CheckpointError that names it."""
    try:
        yield
    except PackError:
        raise
    except (OSError, ValueError) as error:          # ValueError: a NUL in the path
        what = ("the disk is full. Make room" if disk_full(error) else
                f"{shown(getattr(error, 'strerror', None) or error, 200)}. Choose another place, or make this one writable")
        raise CheckpointError(f"{path}: cannot be written: {what}") from error


def disk_full(error):
    """Whether an exception says so, or one that it was raised from does."""
    while error is not None and getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
        error = error.__cause__
    return error is not None


@contextmanager
def folders_in_front(path):
    """Folders in front of a new file that are made in the block go again, if they are empty, where it fails."""
    missing = [folder for folder in Path(path).parents if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):                     # something else is in it by now
                folder.rmdir()
        raise


def require_free(path):
    """Raise CheckpointError unless a new file can have this name: nothing has it, no link to nowhere either."""
    if os.path.lexists(path):
        raise CheckpointError(f"{path}: exists already. Choose another name, or remove it first")
    folder = PurePath(path).parent
    if not os.path.isdir(folder):
        raise CheckpointError(f"{path}: there is no folder {folder}. Make it first")


def while_free(path, items):
    """The items of what is written to a new file. CheckpointError when the last is written, too, if somebody has taken the
    name by then: writing may take minutes, and would end with replacing what is there."""
    require_free(path)
    yield from items
    require_free(path)


def new_name(text, example, suffix="", folders=False):
    """A name that a user gives to a new file, safe on every system: a PurePosixPath with `suffix`, which may be given or not.

    example   of a good name, for the message        folders   whether it may begin with folders

    Raises CheckpointError: for separators, "..", hidden files, wildcards, control characters, devices, and over-long names.
    """
    plain = str(text).strip().removesuffix(suffix)
    parts = plain.split("/")
    why = ("is no text" if not isinstance(text, str) else
           "may have no folders in front" if len(parts) > 1 and not folders else
           next((reason for part in parts if (reason := _wrong(part))), None))
    if why:
        allowed = ", if you like with folders in front" if folders else ", without folders"
        raise CheckpointError(f"'{shown(text)}' is no name for a new file: it {why}. Give one such as '{example}'{allowed}")
    return PurePosixPath(f"{plain}{suffix}")


def _wrong(part):
    """Why one part of a name is not safe, to follow "it"; None if it is."""
    if not part.strip():
        return "has an empty part"
    if part.startswith("."):
        return "begins with a dot"
    if part != part.strip() or part.endswith("."):
        return "has a part that begins or ends with a space or ends with a dot, which Windows drops"
    if any(character in '*?[]<>|":\\' for character in part):
        return 'holds one of * ? [ ] < > | " : \\'
    if not part.isprintable():
        return "holds control characters"
    if _RESERVED.fullmatch(part):
        return "is the name of a device on Windows"
    if len(part.encode()) > LONGEST:
        return f"is longer than {LONGEST} bytes"
    return None
