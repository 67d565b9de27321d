"""What an evaluation consists of: pieces that are finished or repeated as a whole, and are tried out before
the first of them runs."""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from atoplib.attacks import ATTACKS
from atoplib.contract import Adapted
from atoplib.decisions import forked_rng
from atoplib.evaluation.protocols import COUNTS, Protocol, Row
from atoplib.evaluation.results import CLEAN
from atoplib.hashing import function_hash, json_hash, model_hash, tensor_hash
from atoplib.pipeline import AToPPipeline

PIECE = 100  # images that are attacked at once
SURROGATE = "the classifier"  # as a target of transfer attacks
SISTER = "sister of"


class Piece(NamedTuple):
    """One attack on one target for one batch of images, at every radius, then shown to some defences; of
    clean images ``row`` is None, ``target`` "". ``file`` holds a hash of all that decides what is found."""

    row: Row | None
    eps: tuple[float, ...]
    target: str
    shown_to: tuple[str, ...]
    batch: int
    images: slice
    file: str = ""

    @property
    def attack(self) -> str:
        return self.row.heading if self.row else CLEAN

    @property
    def title(self) -> str:
        return f"{self.target}, {self.attack}" if self.row else CLEAN


def helpers(defences: Mapping[str, nn.Module], sisters: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """What attacks use in place of a defence: one classifier for all, a pipeline's own other one, sisters."""
    classifiers = {name: model.classifier for name, model in defences.items() if _is_pipeline(model)}
    models = {f"{SISTER} {name}": model for name, model in sisters.items() if name in defences}
    shared = defences.get("undefended", next(iter(classifiers.values()), None))
    if shared is not None:
        models[SURROGATE], same = shared, model_hash(shared)
        models |= {
            f"{SURROGATE} of {n}": model for n, model in classifiers.items() if model_hash(model) != same
        }
    return models


def _is_pipeline(model: nn.Module) -> bool:
    """Also one whose type or hooks made an adapter of it necessary."""
    return isinstance(model.network if isinstance(model, Adapted) else model, AToPPipeline)


def _targets(
    threat_model: str, targets: Mapping[str, nn.Module], defences: tuple[str, ...]
) -> list[tuple[str, tuple[str, ...]]]:
    """The models that are attacked, and the defences that the images are shown to. Of a mean of logits BPDA
    has no image for the identity."""
    alone = [(name, (name,)) for name in defences]
    if threat_model == "bpda":
        pipelines = {name: targets[name] for name in defences if _is_pipeline(targets[name])}
        return [(n, (n,)) for n, each in pipelines.items() if each.copies == 1 or each.average == "images"]
    if threat_model == "sister":
        alone = [(f"{SISTER} {name}", shown_to) for name, shown_to in alone]
    if threat_model == "transfer":
        sharing = tuple(name for name in defences if f"{SURROGATE} of {name}" not in targets)
        alone = [(SURROGATE, sharing), *((f"{SURROGATE} of {name}", shown_to) for name, shown_to in alone)]
    return [(target, shown_to) for target, shown_to in alone if target in targets and shown_to]


def all_pieces(
    plan: Protocol,
    targets: Mapping[str, nn.Module],
    random: Mapping[str, bool],
    defences: tuple[str, ...],
    sizes: Mapping[str, Any],
    count: int,
) -> list[Piece]:
    """The pieces of work, in order, the clean images first."""
    work = [(None, (0.0,), "", defences)]
    for row in plan.rows:
        for target, shown_to in _targets(row.threat_model, targets, defences):
            if sizes.get(row.norm) and (random[target] or not row.random_only):
                work.append((row, sizes[row.norm], target, shown_to))
    batches = [slice(first, min(first + PIECE, count)) for first in range(0, count, PIECE)]
    return [Piece(*each, batch, images) for each in work for batch, images in enumerate(batches)]


def plain(value: Any) -> Any:
    """A value as JSON has it, tensors and functions by their hash."""
    return json.loads(json.dumps(value, default=function_hash))


def file_of(piece: Piece, facts: Mapping[str, Any], images: Tensor, labels: Tensor) -> str:
    """Where a piece is kept, by all that decides what is found."""
    decides = [
        piece.row and [plain(piece.row._asdict()), facts["attacks"][piece.row.attack]],
        [facts["defences"].get(name) for name in (piece.target, *piece.shown_to)],
        [facts[name] for name in ("shared", "code", "environment")],
        [facts["protocol"][name] for name in ("votes", "rule")],
        [piece.eps, piece.shown_to, piece.batch, tensor_hash(images), tensor_hash(labels)],
    ]
    words = re.sub(r"[\W_]+", "-", piece.title.lower())
    return f".pieces/{words[:100]}-batch{piece.batch}-{json_hash(decides)}.pt"


def effort(piece: Piece, votes: int) -> int:
    """About how many passes a piece takes: of its images in every step, sample and run, at every radius."""
    options = piece.row.keywords(1.0, random=True, rule="any", votes=votes) if piece.row else {}
    steps, samples, runs, queries = (options.get(n) or 1 for n in COUNTS[:4])
    tries = ATTACKS[piece.row.attack].tries if piece.row else 1
    return (
        (piece.images.stop - piece.images.start)
        * len(piece.eps)
        * (tries * steps * samples * runs + queries + votes * len(piece.shown_to))
    )


class _AlwaysWrong(nn.Module):
    """A model that is always wrong about one image."""

    def __init__(self, label: Tensor, classes: int, random: bool) -> None:
        super().__init__()
        self.random = random
        self.logits = nn.Parameter((torch.arange(classes, device=label.device) != label[:, None]).float())

    def forward(self, images: Tensor) -> Tensor:
        noise = torch.rand_like(images[:, 0, 0, 0]) if self.random else 0
        return self.logits * (9 + images.mean(dim=(1, 2, 3)) + noise)[:, None]


def try_out(piece: Piece, plan: Protocol, image: Tensor, label: Tensor, classes: int, random: bool) -> None:
    """A piece's attack at every radius on one image that is misclassified anyhow: settings that cannot be
    stop here, before the first hour."""
    model = _AlwaysWrong(label, classes, random).eval()
    with forked_rng(image.device):
        for eps in piece.eps if piece.row else ():
            options = piece.row.keywords(eps, random=random, rule=plan.rule, votes=plan.num_votes)
            ATTACKS[piece.row.attack].function(model, image, label, eps=eps, norm=piece.row.norm, **options)
