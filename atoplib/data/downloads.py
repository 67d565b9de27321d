"""Data sets that torchvision downloads: opened where they are, downloaded where they are not, quietly and with a
timeout. Each way in which that fails ends in one sentence that says what to put where by hand.
"""

import contextlib
import errno
import io
import socket
from collections.abc import Iterator
from typing import NamedTuple

from atoplib.data.checks import ROOM, one_line
from atoplib.data.request import Request

_DOWNLOAD_TIMEOUT_S = 30.0  # without one, a firewall that drops packets would hang a notebook for ever


class _Download(NamedTuple):
    unpacked: str  # what torchvision makes of it below data_dir
    by_hand: str  # what to put where, when this machine cannot download


_DOWNLOADS = {
    "MNIST": _Download("MNIST", "the four files *-ubyte.gz of MNIST into {0}/MNIST/raw"),
    "FashionMNIST": _Download("FashionMNIST", "the four files *-ubyte.gz of Fashion-MNIST into {0}/FashionMNIST/raw"),
    "CIFAR10": _Download("cifar-10-batches-py", "cifar-10-python.tar.gz (cs.toronto.edu/~kriz/cifar.html) into {0}"),
    "CIFAR100": _Download("cifar-100-python", "cifar-100-python.tar.gz (cs.toronto.edu/~kriz/cifar.html) into {0}"),
    "Imagenette": _Download(
        "imagenette2*", "imagenette2-320.tgz, or imagenette2.tgz above 320 px, (github.com/fastai/imagenette) into {0}"
    ),
}


def open_torchvision(request: Request, kind: str, **options):
    """Open one of torchvision's data sets in data_dir; download it only when it is not there."""
    import torchvision.datasets  # here, because mnist5k and folders do without its two seconds

    make = getattr(torchvision.datasets, kind)
    download = _DOWNLOADS[kind]
    try:
        return make(str(request.data_dir), **options)
    except PermissionError:
        raise
    except Exception as error:  # RuntimeError "not found or corrupted", or any other for files that were cut short
        found = sorted(request.data_dir.glob(download.unpacked))
        if found and "not found" not in str(error):
            raise ValueError(f"{found[0]} is damaged ({one_line(error)}): delete it and run again") from error
    if request.progress:
        request.progress(0, 1, f"{kind} download")
    try:
        with _quiet_download():
            dataset = make(str(request.data_dir), download=True, **options)
    except Exception as error:  # no network, timeouts, bad archives: these come as many kinds
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            message = f"{kind} cannot be stored in {request.data_dir} ({error.strerror}): {ROOM}"
            raise OSError(error.errno, message) from error
        raise FileNotFoundError(
            f"{request.name} is not complete in {request.data_dir} and could not be downloaded ({one_line(error)}): "
            f"put {download.by_hand.format(request.data_dir)} by hand, or use mnist5k, which is embedded, or "
            f"folder:PATH with images of your own"
        ) from error
    if request.progress:
        request.progress(1, 1, f"{kind} download")
    return dataset


@contextlib.contextmanager
def _quiet_download() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_S)
    chatter = io.StringIO()
    try:
        with contextlib.redirect_stdout(chatter), contextlib.redirect_stderr(chatter):
            yield
    finally:
        socket.setdefaulttimeout(before)
