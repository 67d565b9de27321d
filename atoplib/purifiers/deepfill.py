"""The paper's purifier: DeepFillv2, a two-stage inpainting network, with the names that public weights use.

Yu et al. 2019, "Free-Form Image Inpainting with Gated Convolution"; the contextual attention is that of Yu et al. 2018,
"Generative Image Inpainting with Contextual Attention", section 4.1. Module names follow the public PyTorch weights.
"""

import re
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from atoplib.purifiers.gated import GatedConv2d, GatedUpConv2d

SOFTMAX_SCALE = 10.0
MIN_PATCH_NORM = 1e-4
DILATIONS = (1, 2, 4, 8, 16)


class WeightsError(ValueError):
    """A file of weights that cannot be used; the message says what is wrong with it and what to do."""


class DeepFillV2(nn.Module):
    """DeepFillv2 generator: a coarse stage, then a fine stage with a contextual-attention branch.

    Input: (batch, 5, height, width): RGB in [-1, 1] with missing pixels set to 0, a plane of ones, the mask (1 =
    missing), which may differ from image to image. Output: (coarse, fine), each (batch, 3, height, width) in [-1, 1]
    and at least float32, also under autocast. Height and width: multiples of 8, not necessarily equal.

    The public weights have ``width`` 48: 4.1 M parameters, 27.7 G multiply-adds (55 GFLOP) for a 256 px image.

    Raises ValueError for a width that is not a positive multiple of 4 and for an input of another shape.
    """

    def __init__(self, width: int = 48):
        super().__init__()
        if width < 4 or width % 4:
            raise ValueError(f"width must be a positive multiple of 4 (48 in the public weights), got {width}")
        self.stage1 = _coarse_stage(width)
        self.stage2 = FineStage(width)

    def forward(
        self, x: Float[Tensor, "batch 5 height width"]
    ) -> tuple[Float[Tensor, "batch 3 height width"], Float[Tensor, "batch 3 height width"]]:
        if x.ndim != 4 or x.shape[1] != 5 or x.shape[2] % 8 or x.shape[3] % 8:
            raise ValueError(
                "DeepFillV2 reads (batch, 5, height, width) with height and width divisible by 8, "
                f"got {tuple(x.shape)}; resize or pad the images to the next multiple of 8"
            )
        rgb, mask = x[:, :3], x[:, 4:]
        coarse = self.stage1(x)
        fine = self.stage2(coarse.to(x.dtype) * mask + rgb * (1 - mask), mask)
        return coarse, fine


def _coarse_stage(width: int) -> nn.Sequential:
    w = width
    layers = OrderedDict(
        conv1=GatedConv2d(5, w // 2, 5),
        down_block1=DownBlock(w // 2, w, w),
        down_block2=DownBlock(w, 2 * w, 2 * w),
    )
    for index, dilation in enumerate((*DILATIONS, 1, 1), start=1):
        layers[f"conv_bn{index}"] = GatedConv2d(2 * w, 2 * w, 3, dilation=dilation)
    layers |= OrderedDict(
        up_block1=UpBlock(2 * w, w, w), up_block2=UpBlock(w, w // 2, w // 4), conv_to_rgb=TanhConv2d(w // 4, 3)
    )
    return nn.Sequential(layers)


class FineStage(nn.Module):
    """Second stage: a dilated branch and a contextual-attention branch on the same image, joined and decoded.

    Input: the image with its holes filled by the coarse stage (batch, 3, height, width) in [-1, 1], and the mask
    (batch, 1, height, width), 1 = missing. Output: RGB in [-1, 1].
    """

    def __init__(self, width: int):
        super().__init__()
        w = width
        self.conv_conv1 = GatedConv2d(3, w // 2, 5)
        self.conv_down_block1 = DownBlock(w // 2, w // 2, w)
        self.conv_down_block2 = DownBlock(w, w, 2 * w)
        for index, dilation in enumerate(DILATIONS, start=1):
            self.add_module(f"conv_conv_bn{index}", GatedConv2d(2 * w, 2 * w, 3, dilation=dilation))

        self.ca_conv1 = GatedConv2d(3, w // 2, 5)
        self.ca_down_block1 = DownBlock(w // 2, w // 2, w)
        self.ca_down_block2 = DownBlock(w, 2 * w, 2 * w)
        self.ca_conv_bn1 = GatedConv2d(2 * w, 2 * w, 3, activation="relu")
        self.contextual_attention = ContextualAttention()
        self.ca_conv_bn4 = GatedConv2d(2 * w, 2 * w, 3)
        self.ca_conv_bn5 = GatedConv2d(2 * w, 2 * w, 3)

        self.conv_bn6 = GatedConv2d(4 * w, 2 * w, 3)
        self.conv_bn7 = GatedConv2d(2 * w, 2 * w, 3)
        self.up_block1 = UpBlock(2 * w, w, w)
        self.up_block2 = UpBlock(w, w // 2, w // 4)
        self.conv_to_rgb = TanhConv2d(w // 4, 3)

    def forward(
        self, image: Float[Tensor, "batch 3 height width"], mask: Float[Tensor, "batch 1 height width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        dilated = self.conv_down_block2(self.conv_down_block1(self.conv_conv1(image)))
        for index in range(1, len(DILATIONS) + 1):
            dilated = self.get_submodule(f"conv_conv_bn{index}")(dilated)

        attended = self.ca_conv_bn1(self.ca_down_block2(self.ca_down_block1(self.ca_conv1(image))))
        attended = self.contextual_attention(attended, mask)
        attended = self.ca_conv_bn5(self.ca_conv_bn4(attended))

        joined = self.conv_bn7(self.conv_bn6(torch.cat((dilated, attended), dim=1)))
        return self.conv_to_rgb(self.up_block2(self.up_block1(joined)))


class DownBlock(nn.Sequential):
    """Gated 3x3 of stride 2 to ``middle_channels``, then gated 3x3 to ``out_channels``."""

    def __init__(self, in_channels: int, middle_channels: int, out_channels: int):
        downsample = GatedConv2d(in_channels, middle_channels, 3, stride=2)
        super().__init__(OrderedDict(conv1_downsample=downsample, conv2=GatedConv2d(middle_channels, out_channels, 3)))


class UpBlock(nn.Sequential):
    """Gated upsampling by 2 to ``middle_channels``, then gated 3x3 to ``out_channels``."""

    def __init__(self, in_channels: int, middle_channels: int, out_channels: int):
        upsample = GatedUpConv2d(in_channels, middle_channels)
        super().__init__(OrderedDict(conv1_upsample=upsample, conv2=GatedConv2d(middle_channels, out_channels, 3)))


class TanhConv2d(nn.Module):
    """Plain 3x3 convolution and tanh, which gives values in [-1, 1], at least float32."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "batch in_channels h w"]) -> Float[Tensor, "batch out_channels h w"]:
        return torch.tanh(_at_least_float32(self.conv(x)))


class ContextualAttention(nn.Module):
    """Rebuilds features from patches of the unmasked part of the same image (Yu et al. 2018, section 4.1).

    Input: features (batch, channels, h, w) with even h and w, mask (batch, 1, 4 * h, 4 * w), 1 = missing. Output: like
    the features. L = h * w / 4 patches are compared with L positions: an L x L matrix for each image, L = 1024 at 256
    px. An image without any valid patch gets zeros.
    """

    def __init__(self):
        super().__init__()
        # Constant and not read: _fuse_scores adds the same three terms four times as fast as a convolution with it.
        # It is here because public files hold it.
        self.register_buffer("fuse_weight", torch.eye(3).view(1, 1, 3, 3))

    def forward(
        self, features: Float[Tensor, "batch channels h w"], mask: Float[Tensor, "batch 1 mask_h mask_w"]
    ) -> Float[Tensor, "batch channels h w"]:
        h, w = features.shape[-2:]
        # bfloat16's eight bits, times the softmax scale, would pick the patches at random.
        with torch.autocast(features.device.type, enabled=False):
            scores = _fuse_scores(_match_scores(_at_least_float32(features)), h // 2, w // 2)
            valid = _valid_patches(mask).to(scores.dtype)
            weights = torch.softmax(SOFTMAX_SCALE * scores * valid, dim=1) * valid
        patches = F.unfold(features, kernel_size=4, stride=2, padding=1)  # batch, 16 * channels, L
        pasted = patches @ weights.to(patches.dtype)
        # Every pixel is covered by four patches.
        return F.fold(pasted, output_size=(h, w), kernel_size=4, stride=2, padding=1) / 4


def _match_scores(features: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch patches positions"]:
    """Correlation of every normalised 3x3 patch of the half-size features with the window at every position."""
    windows = F.unfold(features[:, :, ::2, ::2], kernel_size=3, padding=1)  # batch, 9 * channels, L
    norms = torch.linalg.vector_norm(windows, dim=1, keepdim=True).clamp(min=MIN_PATCH_NORM)
    return (windows / norms).mT @ windows


def _fuse_scores(
    scores: Float[Tensor, "batch patches positions"], rows: int, columns: int
) -> Float[Tensor, "batch patches positions"]:
    """Adds the scores of the neighbouring pairs, first along rows, then along columns, so that matches agree."""
    by_columns = _swap_raster_order(_add_diagonal_neighbours(scores), rows, columns)
    return _swap_raster_order(_add_diagonal_neighbours(by_columns), columns, rows)


def _add_diagonal_neighbours(scores: Float[Tensor, "batch n m"]) -> Float[Tensor, "batch n m"]:
    """Convolution with the 3x3 identity, zero padding."""
    padded = F.pad(scores, (1, 1, 1, 1))
    return padded[:, :-2, :-2] + scores + padded[:, 2:, 2:]


def _swap_raster_order(scores: Float[Tensor, "batch n n"], rows: int, columns: int) -> Float[Tensor, "batch n n"]:
    """Renumbers patches and positions of a rows x columns grid from row-major to column-major order."""
    grids = scores.reshape(-1, rows, columns, rows, columns)
    return grids.permute(0, 2, 1, 4, 3).reshape(scores.shape)


def _valid_patches(mask: Float[Tensor, "batch 1 height width"]) -> Tensor:
    """(batch, L, 1) of bool: the mask, at 1/8 of the size, is zero over the patch's whole 3x3 window."""
    # max_pool2d pads with minus infinity: cells outside the image count as not masked.
    return (F.max_pool2d(mask[:, :, ::8, ::8], 3, stride=1, padding=1) == 0).flatten(2).mT


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def load_deepfill_weights(path: str | Path, *, width: int | None = None) -> DeepFillV2:
    """Builds a generator from a public file (``states_pt_*.pth``) or an AToP checkpoint, on the CPU, in float32.

    The first holds the generator under the key ``G``, the second prefixes its names with ``generator.``; a bare state
    dict loads too. Nothing but tensors is unpickled, so a file cannot run code.

    Args:
        path: the file.
        width: base width that the caller needs; None takes the file's own (48 in the public weights).

    Raises:
        FileNotFoundError: no such file.
        WeightsError: truncated, not written by torch.save, with Python objects in it, for the TensorFlow arithmetic
            (``states_tf_*``), with missing or unexpected names or shapes, or of another width.
    """
    path = Path(path)
    state = _read_tensors(path)
    state = _without_prefix(state, "generator.") or state

    if not any(name.startswith("stage1.") for name in state) and any(name.startswith("conv1.") for name in state):
        raise WeightsError(
            f"{path} holds weights for the TensorFlow arithmetic (names such as 'conv1.conv.weight' without a stage, "
            "as in states_tf_*.pth), which pads differently: take the states_pt_*.pth file of the same training instead"
        )
    with torch.device("meta"):
        names = DeepFillV2(width=4).state_dict().keys()
    missing, unexpected = sorted(names - state.keys()), sorted(state.keys() - names)
    if missing or unexpected:
        raise WeightsError(
            f"{path} is not a DeepFillv2 generator: {_listing('missing', missing)}; "
            f"{_listing('unexpected', unexpected)}. Expected the names of states_pt_places2.pth"
        )

    first = state["stage1.conv1.conv.weight"].shape
    # Its output channels are features and gates, width / 2 of each.
    file_width = first[0] if first[1:] == (5, 5, 5) and first[0] and first[0] % 4 == 0 else None
    if file_width is None:
        raise WeightsError(
            f"{path}: stage1.conv1.conv.weight has shape {tuple(first)}, allowed is (width, 5, 5, 5), width a multiple "
            "of 4: the file belongs to another network"
        )
    if width not in (None, file_width):
        raise WeightsError(
            f"{path} holds a generator of width {file_width}, not {width}: pass width={file_width} or leave it out"
        )
    with torch.device("meta"):
        expected = DeepFillV2(file_width).state_dict()
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if state[name].shape != tensor.shape
    ]
    if wrong:
        raise WeightsError(f"{path}, a generator of width {file_width}: {_listing('wrong shapes', wrong)}")

    model = DeepFillV2(file_width)
    fuse_weight = "stage2.contextual_attention.fuse_weight"
    if not torch.equal(state[fuse_weight].float(), model.state_dict()[fuse_weight]):
        raise WeightsError(f"{path}: {fuse_weight} is not the 3x3 identity, so the file belongs to another arithmetic")
    model.load_state_dict(state)
    return model


def read_atop_classifier(path: str | Path) -> dict[str, Tensor]:
    """State dict of the classifier that an AToP checkpoint keeps beside its generator (names after ``res.``).

    Raises FileNotFoundError and WeightsError like ``load_deepfill_weights``; WeightsError too if there is none.
    """
    state = _without_prefix(_read_tensors(Path(path)), "res.")
    if not state:
        raise WeightsError(f"{path} has no names that begin with 'res.': it is no AToP checkpoint with a classifier")
    return state


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a checkpoint: those under ``G`` where it has that key, else its own."""
    if not path.is_file():
        raise FileNotFoundError(f"no file of weights at {path}: check the path, or download the weights first")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # broken bytes come out of torch.load as any of a dozen types
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        if blocked:
            raise WeightsError(
                f"{path} was refused, and nothing in it was run: it holds a Python object ({blocked[1]}) beside "
                "tensors. Use a file that holds a state dict only"
            ) from error
        raise WeightsError(
            f"{path} is truncated or was not written by torch.save ({path.stat().st_size} bytes): download it again"
        ) from error
    state = content.get("G", content) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a state dict or a dict with one under 'G'")
    return {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _without_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _listing(what: str, items: list[str], limit: int = 4) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return f"{what} ({len(items)}): {', '.join(items[:limit]) or 'none'}{more}"
