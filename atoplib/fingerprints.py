"""Short digests that tell whether a tensor, a network or the code is still the same: what decides on reuse asks here."""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor, nn

PACKAGE = Path(__file__).resolve().parent
ONLY_SHOWN = ("batch", "drawing", "explorer", "figures", "heatmaps", "progress")
"""Parts of the package that show results, or start notebooks, and change no number."""
PLAIN = (bool, int, float, str)
SET_FROM_OUTSIDE = ("seed", "training")
PROBES = ((3, 32, 32), (5, 32, 32), (1, 28, 28), (3, 64, 64), (5, 64, 64), (3, 224, 224), (1, 32, 32))
"""Sizes of the images that a network is asked about, the first that it takes."""


@cache
def code_hash(module: str) -> str:
    """16 hex digits of the sources of a module of atoplib, ``atoplib.training`` for example, and of every module of atoplib that it
    imports, directly or through others. As they were when this process first asked, so about when it imported them.
    """
    digest = hashlib.sha256()
    for name, path in sorted(imported_by(module).items()):
        digest.update(f"{name}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def imported_by(module: str) -> dict[str, Path]:
    """Modules of atoplib along the imports of one of them, itself among them, with their files; but for ``ONLY_SHOWN``."""
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _source(name)
        if name in found or path is None or name.split(".")[1:2] and name.split(".")[1] in ONLY_SHOWN:
            continue
        found[name] = path
        waiting += _imports(path)
    return found


def _source(module: str) -> Path | None:
    stem = PACKAGE.joinpath(*module.split(".")[1:])
    return next((path for path in (stem / "__init__.py", stem.with_suffix(".py")) if path.is_file()), None)


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "atoplib")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "atoplib":
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def environment(device: torch.device) -> str:
    """What computes: another release of torch, or another kind of device, gives other numbers."""
    return f"torch {torch.__version__} on {device.type}"


def tensor_fingerprint(tensor: Tensor) -> str:
    """16 hex digits of the SHA-256 of a tensor's type, shape and bytes."""
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def model_fingerprint(model: nn.Module) -> str:
    """16 hex digits of the SHA-256 of a module's structure (its printed form), its weights, and the public numbers and texts
    that its parts keep as attributes; but for its mode and the seed of its dice, which a training or an evaluation sets.

    Where a part is neither torch's nor the kit's, also of what it answers to fixed images: what such a part keeps in lists,
    tensors or closures, or computes by a ``forward`` that was edited, no structure shows.
    """
    digest = hashlib.sha256(f"{type(model).__qualname__} {model!r}".encode())
    for name, part in model.named_modules():
        public = {key: value for key, value in vars(part).items() if key not in SET_FROM_OUTSIDE and not key.startswith("_")}
        own = sorted((key, value) for key, value in public.items() if isinstance(value, PLAIN))
        digest.update(f"{name} {own!r}".encode())
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor_fingerprint(tensor)}".encode())
    for name, part in _of_ones_own(model):
        digest.update(f"{name} {_answers(part)}".encode())
    return digest.hexdigest()[:16]


def _of_ones_own(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost parts that hold code of neither torch's nor the kit's; within the kit's own parts they are looked for."""
    if type(module).__module__.split(".")[0] in ("atoplib", "torch", "torchvision"):
        for child_name, child in module.named_children():
            yield from _of_ones_own(child, f"{name}.{child_name}")
    else:
        yield name, module


def _answers(network: nn.Module) -> str:
    """A digest of what a network makes of fixed images, in eval mode. One that takes none of ``PROBES`` is like no other, itself
    not either: it is computed anew rather than taken for another.
    """
    modes = [(part, part.training) for part in network.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    weight = next((w for w in (*network.parameters(), *network.buffers()) if w.is_floating_point()), torch.zeros(()))
    cuda = [weight.device] if weight.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(cuda):
            network.eval()
            for shape in PROBES:
                torch.manual_seed(0)
                images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
                try:
                    output = network(images.to(weight.device, weight.dtype))
                except Exception:  # whatever a network of another size raises
                    continue
                return hashlib.sha256(b"".join(_bytes(output))).hexdigest()
    finally:
        for part, training in modes:
            part.training = training
        with torch.no_grad():
            for buffer, kept in buffers:
                buffer.copy_(kept)
    return uuid4().hex


def _bytes(output: object) -> Iterator[bytes]:
    """The tensors of an output, whatever holds them."""
    if isinstance(output, Tensor):
        # four digits: another number of threads rounds otherwise
        yield "".join(f"{value:.3e} " for value in output.detach().flatten().double().tolist()[:4096]).encode()
    elif isinstance(output, dict):
        for value in output.values():
            yield from _bytes(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _bytes(value)
    elif hasattr(output, "logits"):
        yield from _bytes(output.logits)
