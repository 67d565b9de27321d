"""What an attack raises: one value an image from its logits."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def margin(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """The best wrong logit minus the right one, in float32: above 0 where the image is misread.

    Source: Carlini & Wagner 2017, section V-A (f_6 without its clamp).
    """
    logits = logits.float()
    right = logits.gather(1, labels[:, None])
    wrong = logits.scatter(1, labels[:, None], -torch.inf)
    return wrong.amax(dim=1) - right.squeeze(1)
