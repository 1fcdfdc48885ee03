"""svdq/hf/__init__.py: what is said to whoever has no diffusers or no PEFT, or old ones. Needs neither: versions are faked."""

import importlib
import importlib.metadata
import shlex
import sys

import pytest

from svdq_pack import svdq

HF = "svdq_pack.svdq.hf"
GOOD = {"diffusers": "0.42.1", "peft": "0.19.0"}


@pytest.fixture
def installed(monkeypatch):
    """{package: version} of this Python, to be changed."""
    packages = dict(GOOD)

    def version(package):
        if package not in packages:
            raise importlib.metadata.PackageNotFoundError(package)
        return packages[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    yield packages
    for name in [name for name in sys.modules if name.partition(HF)[0] == ""]:      # imported by a lie
        del sys.modules[name]
    vars(svdq).pop("hf", None)


@pytest.fixture
def hf(installed):
    return importlib.import_module(HF)


@pytest.mark.parametrize("package", GOOD)
@pytest.mark.parametrize("newer", [0, 1])
@pytest.mark.parametrize("ending", ["", ".dev0", "rc1", ".post1", "+cu128", ".dev0+g1234567", "a2"])
def test_new_enough(hf, installed, package, newer, ending):
    """From the lowest on, with all that versions of programs under way or from elsewhere have at their end."""
    major, minor, patch = hf.LOWEST[package].split(".")
    installed[package] = f"{major}.{int(minor) + newer}.{patch}{ending}"
    hf.require(package)


@pytest.mark.parametrize("version", ["0.36", "0.37", "0.36rc1", "0.100.0", "1.0", "1", "2026.1.1", "0.43.0.dev0"])
def test_new_enough_in_other_forms(hf, installed, version):
    installed["diffusers"] = version
    hf.require("diffusers")


@pytest.mark.parametrize("package", GOOD)
@pytest.mark.parametrize("version", ["0.9.2", "0.17.99", "0.17.0.dev99", "0.17rc36", "0.17+cu128.99", "0", "unknown", ""])
def test_too_old(hf, installed, package, version):
    """Numbers are numbers: 0.9 is older than 0.36. What is no version is taken for an old one."""
    installed[package] = version
    with pytest.raises(ImportError) as caught:
        hf.require(package)
    has = f"{package} {version}" if version else f"no {package}"
    assert str(caught.value) == (f"SVDQ models in diffusers need {package} {hf.LOWEST[package]} or newer, and this Python has "
                                 f"{has}. Install it: {hf.INSTALL}")


@pytest.mark.parametrize("package", GOOD)
@pytest.mark.parametrize("broken", [False, True])
def test_missing(hf, installed, package, broken):
    """Not there, or with metadata that say no version."""
    installed.pop(package)
    if broken:
        installed[package] = None
    with pytest.raises(ImportError, match=f"need {package} .* has no {package}. Install it: python -m pip install"):
        hf.require(package)


def test_command_installs_what_is_asked_for(hf):
    words = shlex.split(hf.INSTALL)
    assert words[:4] == ["python", "-m", "pip", "install"] and "'" not in hf.INSTALL      # cmd would take > for a redirection
    assert {f"{package}>={lowest}" for package, lowest in hf.LOWEST.items()} < set(words)


@pytest.mark.parametrize("version", [None, "0.34.0"])
def test_users_door(installed, version):
    """`from svdq import ...` says so, each time, and other names stay errors of their own."""
    installed.pop("diffusers")
    if version:
        installed["diffusers"] = version
    for _ in range(2):
        with pytest.raises(ImportError, match="SVDQ models in diffusers need diffusers"):
            from svdq_pack.svdq import SVDQFluxTransformer2DModel  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name 'unheard'"):
        from svdq_pack.svdq import unheard  # noqa: F401
    assert HF not in sys.modules
