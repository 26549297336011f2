"""The gzipped IDX files of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
from images import printable, sentence

#: Bytes of an array; Fashion-MNIST's largest has 47 million.
MOST_BYTES = 1 << 27
EXPECTED = "an IDX file of bytes, gzipped"


def read(path: Path) -> np.ndarray:
    """An array of bytes: two zero bytes, type 8, rank, a size of four bytes for each axis, the bytes.

    Raises:
        ValueError, OSError: another or a broken file; one sentence that names it.
    """
    where = printable(path)
    try:
        with gzip.open(path) as file:
            head = file.read(4)
            if head[:3] != b"\0\0\x08" or len(head) < 4:
                raise ValueError(f"a file that starts with {head!r}")
            sizes = file.read(4 * head[3])
            shape = [int(size) for size in np.frombuffer(sizes[: len(sizes) // 4 * 4], dtype=">i4")]
            count = math.prod(shape)
            if len(shape) < max(head[3], 1) or min(shape) < 1 or count > MOST_BYTES:
                raise ValueError(f"{head[3]} sizes {shape}, which are no array of at most {MOST_BYTES} bytes")
            raw = file.read(count + 1)  # to the end, where gzip compares its checksum
    except FileNotFoundError:
        raise
    except Exception as error:  # gzip and zlib have errors of four kinds
        raise ValueError(
            sentence(f"{where}: expected {EXPECTED}, got {type(error).__name__}: {error}")
        ) from error
    if len(raw) != count:
        more = "more" if len(raw) > count else len(raw)
        raise ValueError(sentence(f"{where}: expected {count} bytes for the sizes {shape}, got {more}"))
    return np.frombuffer(raw, dtype=np.uint8).reshape(shape)
