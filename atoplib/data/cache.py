"""Files of decoded images, memory-mapped. Each is a .npy file (n, 3, h, w) of uint8, named by a key of all that decides
on its pixels, decoded by a pool of threads and written under another name first: a file with its name is whole, and a
damaged one is made again.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from atoplib.data.checks import ROOM

_CACHE_VERSION = 1  # raise it when the pixels that one and the same file gives change
_THREADS_FROM_BYTES = 4096  # of an encoded image: decoding a smaller one is mostly Python, and two threads are slower

Progress = Callable[[int, int, str], None]  # (done, total, unit)


class BrokenCache(Exception):
    """The file is no cache of this shape, or a damaged one; it is to be made again."""


def cached(
    path: Path,
    shape: tuple[int, ...],
    load: Callable[[int], np.ndarray],
    *,
    workers: int,
    unit: str,
    progress: Progress | None,
) -> np.ndarray:
    """Open the .npy file at `path`, made of load(0), load(1), ... (h, w, 3) if it is not there.

    It is written under another name first, so that a file with this name is whole.
    """
    if path.exists():
        with contextlib.suppress(BrokenCache):
            return open_cache(path, shape[0])
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        _check_room(path.parent, int(np.prod(shape)))
        with open(temporary, "wb") as file, contextlib.closing(_decoded(shape, load, workers)) as blocks:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "|u1", "fortran_order": False, "shape": tuple(int(n) for n in shape)}
            )
            for done, block in blocks:
                file.write(block)
                if progress:
                    progress(done, shape[0], unit)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written ({error.strerror or error}): {ROOM}") from error
    finally:
        with contextlib.suppress(OSError):  # there is none, or its folder is none: the error above says more
            temporary.unlink()
    return open_cache(path, shape[0])


def open_cache(path: Path, count: int) -> np.ndarray:
    """Map a cache of `count` images. Raises BrokenCache for a file that cannot be one."""
    try:
        # Not copy-on-write ("c"), which Linux refuses for a file larger than the machine's memory.
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise BrokenCache from error
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[:2] != (count, 3):
        raise BrokenCache
    return np.asarray(pixels)


def cache_key(*parts: object) -> str:
    """Return 16 hex digits of all that decides on the pixels of a cache."""
    return hashlib.sha256(repr((_CACHE_VERSION, *parts)).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def decoding_threads(encoded_bytes: float) -> int:
    """Return how many threads decode images of so many encoded bytes the fastest."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, cores) if encoded_bytes >= _THREADS_FROM_BYTES else 1


def _decoded(shape: tuple[int, ...], load: Callable[[int], np.ndarray], workers: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (images done, block of images) in order, decoded by a pool of threads that runs only a few blocks ahead."""
    count, per_block = shape[0], max(1, min(256, 2**22 // int(np.prod(shape[1:]))))

    def decode(first: int) -> np.ndarray:
        block = np.empty((min(per_block, count - first), *shape[1:]), dtype=np.uint8)
        for offset in range(len(block)):
            block[offset] = load(first + offset).transpose(2, 0, 1)
        return block

    waiting: deque[Future[np.ndarray]] = deque()
    pool = ThreadPoolExecutor(workers)
    done = 0
    try:
        for first in range(0, count, per_block):
            waiting.append(pool.submit(decode, first))
            if len(waiting) > 2 * workers:
                block = waiting.popleft().result()
                done += len(block)
                yield done, block
        while waiting:
            block = waiting.popleft().result()
            done += len(block)
            yield done, block
    finally:  # also on Ctrl-C and on a damaged file: what has not begun is not begun
        pool.shutdown(wait=True, cancel_futures=True)


def _remove_abandoned(path: Path) -> None:
    """Delete what a killed process left of this file; one being written now has changed within the hour."""
    for part in path.parent.glob(f"{path.name}.*.part"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > 3600:
                part.unlink()


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + 2**20:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")
