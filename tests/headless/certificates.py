"""Certificates for servers on loopback, by the standard library alone: an authority of our own, and what it signs.

X.509 version 3 in DER (RFC 5280), RSA of 2048 bits with SHA-256 (RFC 8017, section 8.2). Keys live as long as a test.
"""

import base64
import datetime
import hashlib
import secrets

SHA256_RSA, RSA, NAME = "1.2.840.113549.1.1.11", "1.2.840.113549.1.1.1", "2.5.4.3"
BASIC, ALTERNATIVE, USAGE, ITS_KEY, SIGNERS_KEY = "2.5.29.19", "2.5.29.17", "2.5.29.15", "2.5.29.14", "2.5.29.35"
SHA256_PREFIX = bytes.fromhex("3031300d060960864801650304020105000420")
EXPONENT = 65537
SMALL = [n for n in range(3, 2000, 2) if all(n % d for d in range(3, int(n ** 0.5) + 1, 2))]


def write(folder, plain=False):
    """(ca.pem, server.pem), the latter with key, of an authority and of a server called localhost and 127.0.0.1. plain: without
    what RFC 5280 asks for and many do not write, what a key is for and which one signed."""
    authority, server = Key(), Key()
    issuer = name("an authority of the tests")
    ca = certificate(issuer, issuer, authority, authority, [
        extension(BASIC, sequence(b"\x01\x01\xff"), critical=True),                     # may sign
        *(() if plain else (
            extension(USAGE, bits(b"\x06", unused=1), critical=True),                   # keyCertSign, cRLSign
            extension(ITS_KEY, tagged(0x04, authority.id()))))])
    own = certificate(name("localhost"), issuer, server, authority, [
        extension(ALTERNATIVE, sequence(tagged(0x82, b"localhost"), tagged(0x87, bytes([127, 0, 0, 1])))),
        *(() if plain else (extension(SIGNERS_KEY, sequence(tagged(0x80, authority.id()))),))])
    (folder / "ca.pem").write_text(pem("CERTIFICATE", ca))
    (folder / "server.pem").write_text(pem("CERTIFICATE", own) + pem("RSA PRIVATE KEY", server.der()))
    return folder / "ca.pem", folder / "server.pem"


class Key:
    def __init__(self):
        while True:
            self.p, self.q = prime(), prime()
            self.n, phi = self.p * self.q, (self.p - 1) * (self.q - 1)
            if self.p != self.q and phi % EXPONENT:
                break
        self.d = pow(EXPONENT, -1, phi)

    def sign(self, data):
        tail = b"\0" + SHA256_PREFIX + hashlib.sha256(data).digest()
        return pow(int.from_bytes(b"\0\1".ljust(256 - len(tail), b"\xff") + tail, "big"), self.d, self.n).to_bytes(256, "big")

    def public(self):
        return sequence(sequence(identifier(RSA), b"\x05\x00"), bits(sequence(integer(self.n), integer(EXPONENT))))

    def id(self):
        return hashlib.sha1(self.public()).digest()

    def der(self):
        return sequence(*map(integer, (0, self.n, EXPONENT, self.d, self.p, self.q, self.d % (self.p - 1),
                                       self.d % (self.q - 1), pow(self.q, -1, self.p))))


def prime():
    """1024 bits, the first two of them ones, so that a product of two has 2048."""
    while True:
        n = secrets.randbits(1024) | 3 << 1022 | 1
        if all(n % small for small in SMALL) and all(is_witnessed(n) for _ in range(8)):
            return n


def is_witnessed(n):
    """A round of Miller and Rabin: never false of a prime, in at most a quarter of the rounds true of another number."""
    even, twos = n - 1, 0
    while even % 2 == 0:
        even, twos = even // 2, twos + 1
    x = pow(secrets.randbelow(n - 3) + 2, even, n)
    return x in (1, n - 1) or any((x := x * x % n) == n - 1 for _ in range(twos - 1))


def certificate(subject, issuer, key, signer, extensions):
    now = datetime.datetime.now(datetime.timezone.utc)
    times = (tagged(0x17, (now + datetime.timedelta(days)).strftime("%y%m%d%H%M%SZ").encode()) for days in (-1, 1))
    algorithm = sequence(identifier(SHA256_RSA), b"\x05\x00")
    signed = sequence(tagged(0xA0, integer(2)), integer(secrets.randbits(64)), algorithm, issuer, sequence(*times), subject,
                      key.public(), tagged(0xA3, sequence(*extensions)))
    return sequence(signed, algorithm, bits(signer.sign(signed)))


def extension(kind, value, critical=False):
    return sequence(identifier(kind), b"\x01\x01\xff" * critical, tagged(0x04, value))


def name(text):
    return sequence(tagged(0x31, sequence(identifier(NAME), tagged(0x0C, text.encode()))))


def tagged(tag, content):
    size = len(content)
    length = bytes([size]) if size < 128 else bytes([0x80 | (n := (size.bit_length() + 7) // 8)]) + size.to_bytes(n, "big")
    return bytes([tag]) + length + content


def sequence(*parts):
    return tagged(0x30, b"".join(parts))


def integer(n):
    return tagged(0x02, n.to_bytes(n.bit_length() // 8 + 1, "big"))


def bits(content, unused=0):
    return tagged(0x03, bytes([unused]) + content)


def identifier(dotted):
    first, second, *rest = map(int, dotted.split("."))
    content = bytes([40 * first + second])
    for number in rest:
        groups = [number & 0x7F]
        while number := number >> 7:
            groups.insert(0, number & 0x7F | 0x80)
        content += bytes(groups)
    return tagged(0x06, content)


def pem(kind, der):
    lines = base64.encodebytes(der).decode().replace("\n", "")
    rows = "\n".join(lines[i:i + 64] for i in range(0, len(lines), 64))
    return f"-----BEGIN {kind}-----\n{rows}\n-----END {kind}-----\n"
