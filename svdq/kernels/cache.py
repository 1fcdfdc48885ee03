"""The user's cache of built binaries. What lies there is executed, so nothing counts that another user may have written.

The folder is made with mode 0700, the binaries with 0600. They serve if they are what they should be (a folder, a file, no
link), ours, and writable by nobody else; this is asked of the open descriptor, and then it is the descriptor that is read,
written through and loaded, so that nothing changes when a name leads elsewhere a moment later. Where the system has no owners
and modes (Windows), the folder must lie in the user's own profile instead. What fails is left as it is: a private folder
serves this process, and a message says why, once.

A binary's name hashes everything that can change it, and its own SHA-256 follows it (loaders stop before it). It is written
under another name and renamed: nobody sees half a file, two processes do no harm, and a file that is not whole is built again.

When something is built, scratch of killed builds goes after a day, and binaries go that nobody used for 90 days. Several
installations may share the cache: a binary of another version is no leftover.

Test: tests/kernels/test_cache.py
"""

import atexit
import ctypes
import hashlib
import logging
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from .errors import printable

log = logging.getLogger(__name__)
OWNERS = hasattr(os, "geteuid")         # whether files have owners and modes
DIGEST = hashlib.sha256().digest_size
ROOM = 32 << 20                         # bytes, several times what the largest library takes with its objects (2 MB of kernels)
DAY = 86400                             # seconds
_BINARY = r"\w+_(sm_\d+a?|cpu_\w+)_[0-9a-f]{20}"
NAME = re.compile(rf"{_BINARY}\.(so|pyd|cubin|json)|(?P<scratch>\.){_BINARY}\.[\w.]+")
_loaded = []


# ---- the folder

@cache
def cache_folder():
    """The user's folder for what can be made again, made if need be; if it may not be trusted, one of this process."""
    variable, usual = ("LOCALAPPDATA", "AppData/Local") if sys.platform == "win32" else ("XDG_CACHE_HOME", ".cache")
    folder = "the user's cache"
    try:
        base = os.environ.get(variable, "")
        folder = Path(base if os.path.isabs(base) else _home() / usual, "comfyui-svdq")     # XDG: relative is invalid
        if not OWNERS:
            folder, home = folder.resolve(), _home().resolve()
            if home not in folder.parents:
                raise PermissionError(f"{folder} is not in your profile, {home}")
        _make(folder)
        held(folder)
        return folder
    except (OSError, RuntimeError) as error:        # RuntimeError: the user has no home folder
        return _private(error, f"Make {folder} a folder of your own that nobody else can write (remove what is there now), or "
                               f"set {variable} to another place")


def _home():
    """Raises RuntimeError for a relative one: it would lie in the working folder, which may be anybody's."""
    home = Path.home()
    if not home.is_absolute() or OWNERS and os.environ.get("HOME") == "":
        raise RuntimeError(f"the home folder is '{os.environ.get('HOME', home)}', which is no full path")
    return home


@cache
def folder_to_build_in():
    """cache_folder(), without leftovers; if it cannot be written or is full, a folder of this process. Raises OSError."""
    folder = cache_folder()
    try:
        _sweep(held(folder))
        with tempfile.TemporaryFile(dir=held(folder)) as file:
            file.write(bytes(ROOM))
        return folder
    except OSError as error:
        if folder == _private_folder():
            raise
        return _private(f"{folder}: {error.strerror or error}", f"Make {folder} writable, with {ROOM >> 20} MiB of room")


def _private(why, advice):
    folder = _private_folder()
    log.warning("SVDQ: %s", printable(f"the cache folder cannot be used ({why}), so kernels are built again at every start, in "
                                      f"{folder}. {advice}, to keep them"))
    return folder


@cache
def _private_folder():
    folder = Path(tempfile.mkdtemp(prefix="comfyui-svdq-"))         # mode 0700
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _make(folder):
    """Folder and parents, which pathlib would open to everybody where the umask does."""
    if not folder.parent.is_dir():
        _make(folder.parent)
    with suppress(FileExistsError):                 # `held` judges what is there
        os.mkdir(folder, stat.S_IRWXU)


def held(folder):
    """The path of a folder that nobody else can write; on Linux through its descriptor, which stays open: it leads to this
    folder even when another has taken its name. One that was removed meanwhile is made again. Raises OSError for what is no
    such folder."""
    if _removed(_opened(folder)):
        _opened.cache_clear()               # descriptors stay open: another thread may use a path through one
        _make(folder)
    return _opened(folder)


def _removed(place):
    try:
        return os.stat(place).st_nlink == 0         # through a descriptor
    except FileNotFoundError:
        return True


@cache
def _opened(folder):
    if not OWNERS:
        return folder
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if os.path.islink(folder):                  # the system's word for it differs, and is none
            raise PermissionError(f"{folder} is a link") from error
        raise
    try:
        _refuse_strangers(folder, descriptor)
    except OSError:
        os.close(descriptor)
        raise
    return _by_descriptor(descriptor, folder)


def _refuse_strangers(path, descriptor):
    """Raises PermissionError if somebody else owns an open file or folder or may write it."""
    info = os.fstat(descriptor)
    if OWNERS and info.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to user {info.st_uid}, and this is user {os.geteuid()}")
    if OWNERS and info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} has mode {stat.S_IMODE(info.st_mode):04o}: others can write it")


def _by_descriptor(descriptor, path):
    """A path that leads to an open file or folder as long as it is open; its own one where there is no /proc."""
    through = Path(f"/proc/self/fd/{descriptor}")
    return through if through.exists() else path


@contextmanager
def scratch_folder(folder, name):
    """A new folder in the cache for the compilers that make the binary `name`, removed in the end."""
    place = str(held(folder)).replace("/proc/self", os.path.realpath("/proc/self"))     # as other processes see it
    scratch = tempfile.mkdtemp(prefix=f".{name}.", dir=place)
    try:
        yield Path(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sweep(place):
    """Remove what killed builds left and what nobody used for long."""
    for name in os.listdir(place):
        known = NAME.fullmatch(name)
        if known is None:
            continue
        try:
            info = os.lstat(place / name)
            last, life = (info.st_mtime, DAY) if known["scratch"] else (max(info.st_atime, info.st_mtime), 90 * DAY)
            if time.time() - last > life:
                (shutil.rmtree if stat.S_ISDIR(info.st_mode) else os.unlink)(place / name)
        except OSError as error:                    # Windows: it is in use; or another process was faster
            log.debug("SVDQ: %s stays: %s", name, error)


# ---- the binaries

def stored(path):
    """The binary that `store` wrote there; None if there is none, or not as it was written, or not by us."""
    try:
        file, binary = _open(path)
    except OSError as error:
        log.debug("SVDQ: %s: %s", path, error)
        return None
    file.close()
    return binary


def load_library(path):
    """ctypes.CDLL of the shared library that `store` wrote there: of the very file that was checked. Raises OSError."""
    file, _ = _open(path)
    try:
        library = ctypes.CDLL(str(_by_descriptor(file.fileno(), path)))
    except OSError:
        file.close()
        raise
    _loaded.append(file)        # stays open: the loader knows libraries by name, and the number must not come to mean another
    return library


def _open(path):
    """(file, binary) at a path, the file open and checked. Raises OSError that says what is wrong."""
    place = held(path.parent) / path.name
    file = open(place, "rb", buffering=0, opener=_no_link)
    try:
        _refuse_strangers(path, file.fileno())
        info = os.fstat(file.fileno())
        data = file.read() if stat.S_ISREG(info.st_mode) else b""
        binary, digest = data[:-DIGEST], data[-DIGEST:]
        if not binary or hashlib.sha256(binary).digest() != digest:
            raise OSError(f"{path} is not as it was written")
    except OSError:
        file.close()
        raise
    if time.time() - max(info.st_atime, info.st_mtime) > DAY:
        with suppress(OSError):                     # what cannot be written has nobody who sweeps it
            os.utime(place, ns=(time.time_ns(), info.st_mtime_ns))      # used; st_mtime says when it was built
    return file, binary


def _no_link(path, flags):
    # not waiting: a pipe may bear the name
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def store(path, binary):
    """Write a binary whole or not at all. Raises OSError."""
    folder = held(path.parent)
    descriptor, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=folder)     # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(binary + hashlib.sha256(binary).digest())
        os.replace(scratch, folder / path.name)
    except OSError as error:
        if stored(path) is None:                    # Windows: another process made it and has it open
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        Path(scratch).unlink(missing_ok=True)


def remove(path):
    """Remove a binary. Raises OSError."""
    (held(path.parent) / path.name).unlink(missing_ok=True)
