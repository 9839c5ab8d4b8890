"""Colour profiles made for the tests: the ICC.1 format, as little of it as they need."""

from __future__ import annotations

import struct

# sRGB's primaries as every sRGB profile holds them (adapted to D50).
RED, GREEN, BLUE = (0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)
D50 = (0.9642, 1.0, 0.8249)


def matrix_profile(
    red: tuple[float, ...] = RED, green: tuple[float, ...] = GREEN, blue: tuple[float, ...] = BLUE
) -> bytes:
    """Return an RGB profile with these primaries (XYZ) and sRGB's curve, roughly: gamma 2.2."""
    gamma = b"curv" + bytes(4) + struct.pack(">IH", 1, int(2.2 * 256))
    tags = {b"wtpt": _xyz(D50), b"rXYZ": _xyz(red), b"gXYZ": _xyz(green), b"bXYZ": _xyz(blue)}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma)
    return _profile(b"RGB ", b"XYZ ", tags)


def gray_profile(gamma: float) -> bytes:
    """Return a grey profile with this gamma."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, int(gamma * 256))
    return _profile(b"GRAY", b"XYZ ", {b"wtpt": _xyz(D50), b"kTRC": curve})


def cmyk_profile() -> bytes:
    """Return a CMYK profile of grey inks: lightness falls by 50 for cyan, by all for any other ink."""
    table = bytearray()
    for corner in range(16):
        cyan, others = corner >> 3, corner & 7
        lightness = 0 if others else 50 if cyan else 100
        table += bytes((round(lightness * 2.55), 128, 128))
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    lut = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + matrix + identity * 4 + bytes(table) + identity * 3
    return _profile(b"CMYK", b"Lab ", {b"wtpt": _xyz(D50), b"A2B0": lut}, kind=b"prtr")


def _profile(space: bytes, connection: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    name = b"Test profile\0"
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", len(name)) + name + bytes(78), **tags}
    tags[b"cprt"] = b"text" + bytes(4) + b"none\0"
    offset = 128 + 4 + 12 * len(tags)
    directory, body = struct.pack(">I", len(tags)), b""
    for tag, data in tags.items():
        data += bytes(-len(data) % 4)
        directory += tag + struct.pack(">II", offset + len(body), len(data))
        body += data
    head = struct.pack(">I", offset + len(body)) + b"lcms" + b"\x02\x10\0\0" + kind + space + connection
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _xyz(D50)[8:] + bytes(48)
    return head + directory + body


def _xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in values))
