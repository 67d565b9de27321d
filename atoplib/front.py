"""What a classifier may learn to read through: a pre-trained purifier with its random transform, not trained any more."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from atoplib.pipeline import AToPPipeline, for_attacks, load_pipeline
from atoplib.transforms import Draw


class Front(nn.Module):
    """g(t(x)): images (B, 3, H, W) in [0, 1] -> purified; ``pipeline`` throws the dice, its classifier is not asked."""

    def __init__(self, pipeline: AToPPipeline) -> None:
        super().__init__()
        self.pipeline = pipeline.requires_grad_(False).eval()

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], draw: Draw | None = None
    ) -> Float[Tensor, "batch 3 height width"]:
        return self.pipeline.purify(images, draw)


def load_front(purifier_path: Path, *, device: torch.device | str = "cpu", seed: int = 0) -> Front:
    """The purifier of a run, frozen, with the random transform that it was trained with.

    Raises:
        FileNotFoundError, CheckpointError: as ``pipeline.load_pipeline``.
    """
    return Front(for_attacks(load_pipeline(purifier_path, nn.Identity(), device=device, seed=seed)))
