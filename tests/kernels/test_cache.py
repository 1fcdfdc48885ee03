"""Whom the cache trusts, what it does where it trusts nobody, and what it removes."""

import ctypes
import logging
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from svdq_pack.svdq.kernels import cache

needs_gxx = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
needs_owners = pytest.mark.skipif(not cache.OWNERS, reason="no owners and modes")
needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc")
NAME = "svdq_toy_sm_86_" + "0123456789abcdef0123"
STRANGER = 12345
CACHED = cache.cache_folder, cache.folder_to_build_in, cache._opened, cache._private_folder


def mode(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


@pytest.fixture(autouse=True)
def forget():
    """Nothing of one test is known to the next."""
    for function in CACHED:
        function.cache_clear()
    yield
    for function in CACHED:
        function.cache_clear()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The folder in which the cache is looked for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "home"))
    (tmp_path / "home").mkdir(0o700)
    return tmp_path / "home"


@pytest.fixture
def umask_000():
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture(params=["chown", "another user"])
def give_away(request, monkeypatch):
    """give_away(path): it belongs to somebody else from now on."""
    if request.param == "chown":
        if os.geteuid() != 0:
            pytest.skip("only root gives away")
        return lambda path: os.chown(path, STRANGER, STRANGER, follow_symlinks=False)
    fstat, given = os.fstat, []

    def stranger(descriptor):
        info = fstat(descriptor)
        return os.stat_result((*info[:4], STRANGER, *info[5:10])) if info.st_ino in given else info
    monkeypatch.setattr(cache.os, "fstat", stranger)
    return lambda path: given.append(os.lstat(path).st_ino)


def library(path, number):
    """A stored shared library whose function `number` gives that."""
    subprocess.run(["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", path], check=True, text=True,
                   input=f'extern "C" int number() {{ return {number}; }}')
    binary = path.read_bytes()
    path.unlink()
    cache.store(path, binary)
    return path


# The folder

def refused(folder, caplog, *words):
    """What serves instead of a folder: private, empty, said once in these words; the folder is as it was."""
    before = (os.lstat(folder), sorted(os.listdir(folder)) if folder.is_dir() else None) if os.path.lexists(folder) else None
    private = cache.cache_folder()
    assert private == cache.cache_folder() == cache.folder_to_build_in() != folder and os.listdir(private) == []
    message, = caplog.messages
    assert all(word in message for word in (*words, str(private), "again at every start", "Make ", "CACHE_HOME"))
    after = (os.lstat(folder), sorted(os.listdir(folder)) if folder.is_dir() else None) if os.path.lexists(folder) else None
    assert (before and (before[0][:3], before[1])) == (after and (after[0][:3], after[1]))
    cache.store(private / NAME, b"binary")
    assert cache.stored(private / NAME) == b"binary"
    assert not cache.OWNERS or (mode(private), os.lstat(private).st_uid) == (0o700, os.geteuid())
    shutil.rmtree(private)


def test_cache_folder(home):
    folder = cache.cache_folder()
    assert folder == cache.folder_to_build_in() == home / "comfyui-svdq" and os.listdir(folder) == []
    cache.store(folder / NAME, b"binary")
    assert cache.stored(folder / NAME) == b"binary" and os.listdir(folder) == [NAME]


@needs_owners
def test_umask_000(tmp_path, monkeypatch, umask_000):
    """What the pack makes is private: the folder, the folders above it, the binaries, scratch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new" / "home"))
    folder = cache.folder_to_build_in()
    cache.store(folder / NAME, b"binary")
    assert [mode(path) for path in (folder, folder.parent, folder.parent.parent)] == [0o700] * 3
    assert mode(folder / NAME) == 0o600
    with cache.scratch_folder(folder, NAME) as scratch:
        assert mode(scratch) == 0o700 and set(os.listdir(folder)) == {NAME, scratch.name}
    assert os.listdir(folder) == [NAME]


@needs_owners
def test_folder_of_another_user(home, caplog, give_away):
    folder = home / "comfyui-svdq"
    folder.mkdir(0o700)
    cache.store(folder / NAME, b"binary")
    cache._opened.cache_clear()
    give_away(folder)
    refused(folder, caplog, f"{folder} belongs to user {STRANGER}, and this is user {os.geteuid()}")
    assert cache.stored(folder / NAME) is None
    with pytest.raises(PermissionError):
        cache.store(folder / NAME, b"more")


@needs_owners
@pytest.mark.parametrize("open_", [0o777, 0o770, 0o720, 0o702, 0o1777])
def test_folder_that_others_may_write(home, caplog, open_):
    folder = home / "comfyui-svdq"
    folder.mkdir()
    folder.chmod(open_)
    refused(folder, caplog, f"{folder} has mode {open_:04o}")


@needs_owners
@pytest.mark.parametrize("to", ["ours", "nowhere"])
def test_link(home, caplog, to):
    folder = home / "comfyui-svdq"
    (home / "ours").mkdir(0o700)
    folder.symlink_to(home / to)
    refused(folder, caplog, f"{folder} is a link")
    assert os.listdir(home / "ours") == []


def test_file_in_the_way(home, caplog):
    (home / "comfyui-svdq").write_text("in the way")
    refused(home / "comfyui-svdq", caplog, "comfyui-svdq'")


def test_file_above_in_the_way(home, caplog):
    home.rmdir()
    home.write_text("in the way")
    refused(home / "comfyui-svdq", caplog, str(home))


def test_link_to_nowhere_above(home, caplog):
    home.rmdir()
    home.symlink_to(home.parent / "nowhere")
    refused(home / "comfyui-svdq", caplog, "No such file")


def test_no_home(home, caplog, monkeypatch):
    def fail():
        raise RuntimeError("Could not determine home directory.")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("LOCALAPPDATA")
    monkeypatch.setattr(cache.Path, "home", fail)
    refused(home / "comfyui-svdq", caplog, "Could not determine home")


@needs_owners
def test_relative_folder_is_no_cache(home, monkeypatch):
    """The XDG specification has such a value ignored; the running folder may be anybody's."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("XDG_CACHE_HOME", ".")
    monkeypatch.setenv("HOME", str(home))
    assert cache.cache_folder() == home / ".cache" / "comfyui-svdq"


@needs_owners
@pytest.mark.parametrize("value", ["", "rel", ".", "./a/b"])
def test_relative_home_is_none(home, caplog, monkeypatch, value):
    monkeypatch.chdir(home)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", value)
    refused(home / value / ".cache" / "comfyui-svdq", caplog, f"the home folder is '{value}', which is no full path")
    assert os.listdir(home) == []


@pytest.mark.parametrize("proc", [pytest.param(True, marks=needs_proc), False])
def test_folder_that_is_removed(home, monkeypatch, umask_000, proc):
    """While the process runs: it is made again, as private as before, and not through another's link."""
    if not proc:
        monkeypatch.setattr(cache, "_by_descriptor", lambda descriptor, path: path)
    folder = cache.folder_to_build_in()
    cache.store(folder / NAME, b"binary")
    for write in (lambda: cache.store(folder / NAME, b"again"), lambda: cache.scratch_folder(folder, NAME).__enter__(),
                  lambda: cache.remove(folder / NAME)):
        shutil.rmtree(home)
        assert cache.stored(folder / NAME) is None
        shutil.rmtree(home)
        write()
        assert folder.is_dir() and mode(folder) == 0o700
    cache.store(folder / NAME, b"again")
    assert cache.stored(folder / NAME) == b"again"
    shutil.rmtree(folder)
    folder.symlink_to(home)
    if cache.OWNERS and proc:
        with pytest.raises(PermissionError, match="is a link"):
            cache.store(folder / NAME, b"again")


def test_folder_without_room(home, caplog, monkeypatch):
    """For the largest library, not just for a byte."""
    room = []

    class Small:
        def __init__(self, dir=None):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, data):
            room.append(len(data))
            if len(data) > 1 << 20:
                raise OSError(28, "No space left on device")
    monkeypatch.setattr(cache.tempfile, "TemporaryFile", Small)
    private = cache.folder_to_build_in()
    assert private != cache.cache_folder() and room == [32 << 20] and "with 32 MiB of room" in caplog.text
    private.rmdir()


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(28, "No space left on device")], ids=str)
def test_folder_that_cannot_be_written(home, caplog, monkeypatch, error):
    """What it holds serves on; what is built goes into a private folder, said once."""
    folder = cache.cache_folder()
    cache.store(folder / NAME, b"binary")

    def refuse(dir=None):                           # root may write anywhere, so chmod proves nothing
        raise error
    monkeypatch.setattr(cache.tempfile, "TemporaryFile", refuse)
    assert cache.cache_folder() == folder and cache.stored(folder / NAME) == b"binary" and not caplog.messages
    private = cache.folder_to_build_in()
    assert private == cache.folder_to_build_in() != folder
    message, = caplog.messages
    assert f"{folder}: {error.strerror}" in message and str(private) in message and f"Make {folder} writable" in message
    private.rmdir()


def test_no_folder_can_be_written(home, caplog, monkeypatch):
    """Not even the private one: an error that `build` makes a reason of."""
    (home / "comfyui-svdq").write_text("in the way")

    def full(dir=None):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(cache.tempfile, "TemporaryFile", full)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            cache.folder_to_build_in()
    assert len(caplog.messages) == 1
    cache.cache_folder().rmdir()


def test_message_shows_what_a_terminal_would_obey(home, caplog, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "\x1b[31mred"))
    (home / "\x1b[31mred").write_text("in the way")
    cache.cache_folder().rmdir()
    assert caplog.messages[0].isprintable() and "\\x1b[31mred" in caplog.messages[0]


# Where there are no owners and modes

@pytest.fixture
def no_owners(home, monkeypatch):
    """As on Windows: the profile is `home`."""
    monkeypatch.setattr(cache, "OWNERS", False)
    monkeypatch.setattr(cache.Path, "home", lambda: home)
    return home


@pytest.mark.parametrize("above", ["", "AppData/Local"])
def test_profile(no_owners, monkeypatch, above):
    monkeypatch.setenv("XDG_CACHE_HOME", str(no_owners / above))
    folder = cache.folder_to_build_in()
    assert folder == no_owners / above / "comfyui-svdq" and cache.held(folder) == folder
    folder.chmod(0o777)                             # says nothing there
    cache._opened.cache_clear()
    cache.store(folder / NAME, b"binary")
    assert cache.stored(folder / NAME) == b"binary" and os.listdir(folder) == [NAME]
    with cache.scratch_folder(folder, NAME) as scratch:
        assert scratch.parent == folder
    cache.remove(folder / NAME)
    assert os.listdir(folder) == []


@needs_gxx
def test_profile_loads_by_path(no_owners):
    assert cache.load_library(library(cache.cache_folder() / NAME, 3)).number() == 3


@pytest.mark.parametrize("how", ["elsewhere", "link above", "link", "the profile's name goes on"])
def test_outside_of_the_profile(no_owners, tmp_path, monkeypatch, caplog, how):
    outside, base = tmp_path / ("home2" if how.startswith("the") else "outside"), no_owners
    outside.mkdir()
    if how == "link":
        (base / "comfyui-svdq").symlink_to(outside)
    elif how == "link above":
        (base / "Local").symlink_to(outside)
        base = base / "Local"
    else:
        base = outside
    monkeypatch.setenv("XDG_CACHE_HOME", str(base))
    private = cache.cache_folder()
    message, = caplog.messages
    assert f"is not in your profile, {no_owners}" in message and tmp_path not in private.parents and os.listdir(outside) == []
    assert cache.folder_to_build_in() == private
    private.rmdir()


# Binaries

@needs_owners
@pytest.mark.parametrize("how", ["link", "dangling link", "0666", "0620", "pipe", "folder"])
def test_binary_that_is_not_ours_alone(home, how):
    folder = cache.cache_folder()
    path, other = folder / NAME, folder / "other"
    cache.store(other, b"binary")
    if "link" in how:
        path.symlink_to(other if how == "link" else folder / "nothing")
    elif how == "pipe":
        os.mkfifo(path, 0o600)
    elif how == "folder":
        path.mkdir()
    else:
        other.rename(path)
        path.chmod(int(how, 8))
    assert cache.stored(path) is None
    with pytest.raises(OSError):
        cache.load_library(path)
    if how != "folder":
        cache.store(path, b"another")               # takes its place, not what a link leads to
        assert cache.stored(path) == b"another" and mode(path) == 0o600 and stat.S_ISREG(os.lstat(path).st_mode)
        assert how != "link" or cache.stored(other) == b"binary"


@needs_owners
def test_binary_of_another_user(home, give_away):
    path = cache.cache_folder() / NAME
    cache.store(path, b"binary")
    give_away(path)
    assert cache.stored(path) is None
    cache.store(path, b"another")
    assert cache.stored(path) == b"another"


@needs_gxx
@needs_proc
def test_swapped_folder(home):
    """Somebody who may write above the folder puts another in its place, with another library of that name."""
    folder = cache.cache_folder()
    path = library(folder / NAME, 1)
    (home / "planted").mkdir(0o700)
    library(home / "planted" / NAME, 2)
    folder.rename(home / "away")
    (home / "planted").rename(folder)
    assert cache.load_library(path).number() == 1
    cache.store(folder / "more", b"more")
    assert cache.stored(folder / "more") == b"more"
    with cache.scratch_folder(folder, NAME) as scratch:         # where other processes write
        subprocess.run([sys.executable, "-c", "import sys; open(sys.argv[1], 'w')", scratch / "source"], check=True)
        assert len(list((home / "away").glob(f".{NAME}.*/source"))) == 1
    cache.remove(path)
    assert os.listdir(home / "away") == ["more"] and os.listdir(folder) == [NAME]


@needs_gxx
@needs_proc
def test_swapped_between_check_and_load(home, monkeypatch):
    path, other = library(cache.cache_folder() / NAME, 1), library(home / "other", 2)

    class Swap(ctypes.CDLL):
        def __init__(self, name):
            os.replace(other, path)
            super().__init__(name)
    monkeypatch.setattr(cache.ctypes, "CDLL", Swap)
    assert cache.load_library(path).number() == 1
    monkeypatch.undo()
    assert cache.load_library(path).number() == 2


@needs_gxx
def test_libraries_one_after_the_other(home):
    """The system knows a library by its name, which must not be that of the one before."""
    folder, numbers = cache.cache_folder(), range(1, 5)
    paths = [library(folder / f"{NAME}.{number}", number) for number in numbers]
    assert [cache.load_library(path).number() for path in paths] == list(numbers)
    assert [cache.load_library(path).number() for path in paths] == list(numbers)
    replaced = library(paths[0], 9)
    assert cache.load_library(replaced).number() == 9


@needs_gxx
def test_without_proc(home, monkeypatch):
    monkeypatch.setattr(cache, "_by_descriptor", lambda descriptor, path: path)
    assert cache.load_library(library(cache.folder_to_build_in() / NAME, 4)).number() == 4


def test_refused_library_is_closed(home):
    path = cache.cache_folder() / NAME
    cache.store(path, b"no library")
    kept = len(cache._loaded)
    with pytest.raises(OSError):
        cache.load_library(path)
    assert len(cache._loaded) == kept


# Leftovers

def aged(path, days):
    then = time.time() - days * cache.DAY
    os.utime(path, (then, then), follow_symlinks=False)
    return path


@pytest.mark.parametrize("name", [NAME, "svdq_toy_sm_90a_" + NAME[-20:], "svdq_cpu_cpu_" + NAME[-20:]])
def test_leftovers(home, caplog, name):
    """Scratch of killed builds goes after a day, binaries after 90, when something is built: by our names, links as links."""
    folder, outside = cache.cache_folder(), home / "outside"
    outside.mkdir()
    (outside / "kept").write_text("")
    days = {"foreign.so": 999, ".hidden": 999, f"{name}.txt": 999, f"{name}.so.orig": 999, f"{name}.so": 91, f"{name}.pyd": 91,
            f"{name}.cubin": 91, f"new{name}.so": 89, f"new{name}.pyd": 89, f"new{name}.cubin": 89, f".{name}.so.77.140": 2,
            f".{name}.cubin.abc_1": 2, f".{name}.so.new": 0.5, f".{name}.folder": 2, f".{name}.link": 2}
    for entry in days:
        path = folder / entry
        if entry.endswith("folder"):
            path.mkdir()
            (path / "toy.cu").write_text("")
            (path / "out").symlink_to(outside)
        elif entry.endswith("link"):
            path.symlink_to(outside)
        else:
            path.write_text("")
    for entry, age in days.items():
        aged(folder / entry, age)
    cache.cache_folder()
    assert set(os.listdir(folder)) == days.keys()
    cache.folder_to_build_in()
    assert set(os.listdir(folder)) == {entry for entry, age in days.items() if age not in (2, 91)}
    assert os.listdir(outside) == ["kept"] and not caplog.messages


def test_leftover_that_cannot_be_removed(home, caplog, monkeypatch):
    path = cache.cache_folder() / f"{NAME}.so"
    cache.store(path, b"binary")
    aged(path, 91)

    def unlink(other, real=os.unlink, **more):
        if Path(other).name == path.name:
            raise PermissionError(13, "in use")
        real(other, **more)
    monkeypatch.setattr(cache.os, "unlink", unlink)
    caplog.set_level(logging.DEBUG)
    assert cache.folder_to_build_in() == path.parent and "stays" in caplog.text


@pytest.mark.parametrize("writable", [True, False])
def test_use_is_noted(home, monkeypatch, writable):
    """Also where reading does not (noatime). The time when it was built stays: doctor tells from it whether that was now."""
    noted, path = [], cache.cache_folder() / f"{NAME}.so"
    cache.store(path, b"binary")
    built, utime = aged(path, 200).stat().st_mtime_ns, os.utime

    def note(path, ns):
        if not writable:
            raise OSError(30, "Read-only file system")
        noted.append(ns)
        utime(path, ns=ns)
    monkeypatch.setattr(cache.os, "utime", note)
    assert cache.stored(path) == b"binary" and cache.stored(path) == b"binary"
    assert [(time.time_ns() - used < 60e9, kept) for used, kept in noted] == [(True, built)] * writable     # not at each use
    cache.folder_to_build_in()
    assert path.stat().st_mtime_ns == built
