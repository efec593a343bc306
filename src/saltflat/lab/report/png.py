"""Small pictures as text that can stand in a page: PNG (ISO/IEC 15948), eight bits a channel, in a data address."""

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray


def png(pixels: NDArray[np.uint8]) -> bytes:
    """A picture of (H, W) grey or (H, W, 3) red, green and blue values.

    Raises ValueError for another shape.

    >>> png(np.zeros((2, 3), np.uint8))[12:24] == b"IHDR" + struct.pack(">II", 3, 2)
    True
    """
    if pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)) or 0 in pixels.shape:
        raise ValueError(f"pixels: expected shape (H, W) or (H, W, 3), got {pixels.shape}")
    height, width = pixels.shape[:2]
    colour = 0 if pixels.ndim == 2 else 2
    rows = np.ascontiguousarray(pixels, np.uint8).reshape(height, -1)
    filtered = np.pad(rows, ((0, 0), (1, 0))).tobytes()  # a row begins with the filter that it was put through: none
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(filtered, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def data_address(pixels: NDArray[np.uint8]) -> str:
    """The picture as an address that needs no network."""
    return f"data:image/png;base64,{base64.b64encode(png(pixels)).decode()}"
