"""run.py and a ComfyUI behind TLS and a login: a token, a self-made authority."""

import ssl
import urllib.parse

import pytest
from headless import client as client_module

from svdq_pack.tests.headless import certificates
from svdq_pack.tests.headless.proxy import Proxy

TOKEN = "Bearer s3cret"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(ca.pem, server.pem)"""
    return certificates.write(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def behind(comfy, made, monkeypatch):
    """A Proxy before the fake ComfyUI."""
    monkeypatch.setattr(client_module, "POLL", 0)
    with Proxy(urllib.parse.urlsplit(comfy.url).port, made[1], TOKEN) as proxy:
        yield proxy


@pytest.fixture
def asks(run, graph, tmp_path, capsys):
    """asks(arguments) -> (exit code, standard output, standard error)"""
    def asks(*arguments):
        code = run.main([str(graph), "--out", str(tmp_path / "out"), *arguments])
        return code, *capsys.readouterr()
    return asks


def test_a_token_and_an_authority_of_ones_own(behind, asks, made, comfy, fakes, tmp_path):
    comfy.talk = lambda ws: ws.send(fakes.frame(1, fakes.event("executing", node="1")),
                                    fakes.frame(1, fakes.event("execution_success")))
    code, out, err = asks("--server", behind.url, "--ca", str(made[0]), "--header", f"Authorization: {TOKEN}")
    assert code == 0 and out == f"{tmp_path / 'out' / 'a b.png'}\n", err
    assert "[1/2] Empty\n" in err                       # it came over the websocket
    assert {head.split()[1].partition("?")[0] for head in behind.asked} >= {"/ws", "/prompt", "/view"}
    assert all(f"\r\nauthorization: {TOKEN}" in head.replace("Authorization", "authorization") for head in behind.asked)


def test_exit_3_no_token(behind, asks, made):
    for header in ((), ("--header", "Authorization: Bearer other")):
        code, out, err = asks("--server", behind.url, "--ca", str(made[0]), *header)
        assert (code, out) == (3, "") and "401 Unauthorized" in err and "say who you are, by --header" in err
        code, out, err = asks("--server", behind.url, "--ca", str(made[0]), "--show", *header)
        assert (code, out) == (3, "") and "HTTP 401: who are you?" in err and "say who you are, by --header" in err


def test_exit_3_an_authority_that_nobody_trusts(behind, asks):
    code, out, err = asks("--server", behind.url, "--header", f"Authorization: {TOKEN}")
    assert (code, out) == (3, "") and "name its PEM file: --ca FILE" in err and behind.asked == []


def test_an_authority_that_is_no_stickler(comfy, asks, made, tmp_path, monkeypatch):
    """As `openssl req -x509` may make it. Python 3.13 refuses such by itself, and then --ca would be of no use."""
    def strict(**options):
        context = plain(**options)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    plain = ssl.create_default_context
    monkeypatch.setattr(client_module.ssl, "create_default_context", strict)
    authority, server = certificates.write(tmp_path, plain=True)
    with Proxy(urllib.parse.urlsplit(comfy.url).port, server, TOKEN) as proxy:
        code, _, err = asks("--server", proxy.url, "--ca", str(authority), "--header", f"Authorization: {TOKEN}")
        assert code == 0, err
        code, _, err = asks("--server", proxy.url, "--ca", str(made[0]), "--header", f"Authorization: {TOKEN}")
        assert code == 3 and "The authority of --ca has not signed the server's certificate." in err and "name its" not in err


def test_exit_3_another_name(behind, asks, made):
    """A certificate is for the names in it."""
    code, out, err = asks("--server", behind.url.replace("127.0.0.1", "127.1"), "--ca", str(made[0]))
    assert (code, out) == (3, "") and "Use a name that is in its certificate" in err and behind.asked == []


def test_a_token_goes_nowhere_else(behind, asks, made, comfy):
    """A page to log in, on another server: not followed, and said."""
    behind.login = None
    code, out, err = asks("--server", behind.url, "--ca", str(made[0]), "--header", f"Authorization: {TOKEN}", "--show")
    assert (code, out) == (3, "") and "answered HTTP 302: go to https://login.invalid/" in err
    assert comfy.seen == [] and len(behind.asked) == 1
