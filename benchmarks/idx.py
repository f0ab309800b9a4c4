"""Reads IDX files, the format of MNIST and its relatives, plain or gzipped."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from benchmarks.errors import BenchmarkError

__all__ = ["read_idx"]

_GZIP_MAGIC = b"\x1f\x8b"
_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: Path) -> np.ndarray:
    """Return the array in an IDX file.

    The file starts with two zero bytes, a byte for the element type, a byte for the number of dimensions, and each
    dimension as a big-endian 32-bit integer; the elements follow, the last index running fastest.

    Args:
        path: The file; gzip is recognised by its first bytes, not by its name.

    Raises:
        BenchmarkError: If the file cannot be read, is no IDX file, or is shorter or longer than it says.
    """
    try:
        content = path.read_bytes()
        if content.startswith(_GZIP_MAGIC):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise BenchmarkError(f"{path} cannot be read: {error}; get the file again") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _DTYPES:
        raise BenchmarkError(
            f"{path} is not an IDX file: it starts with the bytes {content[:4].hex(' ') or '(none)'}, an IDX file of "
            "bytes with 00 00 08; get the file again"
        )
    dtype, dimensions = np.dtype(_DTYPES[content[2]]), content[3]
    start = 4 + 4 * dimensions
    header = content[4:start].ljust(4 * dimensions, b"\0")
    shape = [int(size) for size in np.frombuffer(header, dtype=">u4")]
    expected = start + dtype.itemsize * math.prod(shape)
    if len(content) != expected:
        raise BenchmarkError(
            f"{path} is {'truncated' if len(content) < expected else 'too long'}: expected {expected} bytes for sizes "
            f"{shape}, found {len(content)}; get the file again"
        )
    array = np.frombuffer(content, dtype=dtype, offset=start).reshape(shape)
    return array.astype(dtype.newbyteorder("="))
