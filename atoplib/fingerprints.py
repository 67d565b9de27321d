"""Short digests that tell whether a tensor or a network is still the same."""

import hashlib

import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, str)
SET_FROM_OUTSIDE = ("seed", "training")


def tensor_fingerprint(tensor: Tensor) -> str:
    """16 hex digits of the SHA-256 of a tensor's type, shape and bytes."""
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def model_fingerprint(model: nn.Module) -> str:
    """16 hex digits of the SHA-256 of a module's structure (its printed form), its weights, and the public numbers and texts
    that its parts keep as attributes; but for its mode and the seed of its dice, which a training or an evaluation sets.
    """
    digest = hashlib.sha256(f"{type(model).__qualname__} {model!r}".encode())
    for name, part in model.named_modules():
        public = {key: value for key, value in vars(part).items() if key not in SET_FROM_OUTSIDE and not key.startswith("_")}
        own = sorted((key, value) for key, value in public.items() if isinstance(value, PLAIN))
        digest.update(f"{name} {own!r}".encode())
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor_fingerprint(tensor)}".encode())
    return digest.hexdigest()[:16]
