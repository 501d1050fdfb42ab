#!/usr/bin/env python3
"""Computes the test vectors of keys and SPIs of ESP associations, independently of the Rust code.

Written from the definition at the head of overlay/src/esp.rs, RFC 5869 (HKDF) and RFC 7748 (X25519). Needs Debian's
python3-cryptography. To write the vectors again, from the top of the repository:

    python3 overlay/src/esp/vectors.py > overlay/src/esp/vectors.json
"""

import base64
import hashlib
import hmac
import ipaddress
import itertools
import json

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

KEY_LENGTHS = {"aes-gcm-128": 20, "aes-gcm-256": 36}
FIRST_SPI = 256


def field(data):
    return len(data).to_bytes(8, "big") + data


def transcript(association):
    data = b""
    for end in (association["sender"], association["receiver"]):
        data += field(end["node"].encode())
        data += field(end["epoch"].to_bytes(8, "big"))
        data += field(ipaddress.ip_address(end["address"]).packed)
        data += field(base64.b64decode(end["publicKey"]))
    return data + field(association["cipher"].encode())


def hkdf_sha256(salt, secret, info, length):
    pseudorandom = hmac.new(salt or bytes(32), secret, hashlib.sha256).digest()
    block, output = b"", b""
    for counter in itertools.count(1):
        if len(output) >= length:
            return output[:length]
        block = hmac.new(pseudorandom, block + info + bytes([counter]), hashlib.sha256).digest()
        output += block


def derive(association, private, public, preshared):
    secret = private.exchange(X25519PublicKey.from_public_bytes(public))
    info = field(b"husk esp key v1") + transcript(association)
    return hkdf_sha256(preshared, secret, info, KEY_LENGTHS[association["cipher"]])


def spi(association, salt, bits):
    digest = hashlib.sha256(field(b"husk esp spi v1") + field(salt.to_bytes(8, "big")) + transcript(association)).digest()
    return FIRST_SPI + int.from_bytes(digest[:4], "big") % min(2**bits, 2**32 - FIRST_SPI)


def pair(seed):
    """A private key that nobody uses, and its public key."""
    private = hashlib.sha256(b"husk esp test vector " + seed).digest()
    key = X25519PrivateKey.from_private_bytes(private)
    public = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return private, key, public


def vectors():
    ends = {
        4: (("node-a", 1, "192.0.2.1"), ("node-b.example", 2**64 - 1, "192.0.2.254")),
        6: (("node-a", 0, "2001:db8::1"), ("b", 7, "fd00:0:0:1::ffff")),
    }
    preshared_keys = (None, b"a secret of the cluster, longer than the 64 bytes of a block of SHA-256 \x00\xff")
    salts = itertools.cycle(((0, 32), (2**64 - 1, 32), (2**53 + 1, 8), (0x0123456789ABCDEF, 16)))
    for family, cipher, preshared in itertools.product((4, 6), KEY_LENGTHS, preshared_keys):
        private, key, public = pair(b"sender %d" % family)
        peer_private, peer_key, peer_public = pair(b"receiver %d" % family)
        publics = (public, peer_public)
        sender, receiver = (
            {"node": node, "epoch": epoch, "address": address, "publicKey": base64.b64encode(it).decode()}
            for (node, epoch, address), it in zip(ends[family], publics)
        )
        association = {"sender": sender, "receiver": receiver, "cipher": cipher}
        secret = derive(association, key, peer_public, preshared)
        assert secret == derive(association, peer_key, public, preshared)
        salt, bits = next(salts)
        yield {
            "association": association,
            "senderPrivate": private.hex(),
            "receiverPrivate": peer_private.hex(),
            "preshared": None if preshared is None else preshared.hex(),
            "key": secret.hex(),
            "salt": salt,
            "bits": bits,
            "spi": spi(association, salt, bits),
        }


print(json.dumps(list(vectors()), indent=1))
