"""Measure defences by a protocol: attack, judge, count; in pieces that survive an interruption."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib import __version__
from atoplib.attacks import BPDA, check_attack
from atoplib.attacks.suite import ATTACKS
from atoplib.evaluation.protocols import UNSEEN, Budget, PlannedAttack, Protocol
from atoplib.evaluation.scores import Outcomes, Score, judge_draws, score, worst_case
from atoplib.evaluation.store import Store, attack_seed, hashed, verdict_seed
from atoplib.fingerprints import code_hash, model_fingerprint, tensor_fingerprint
from atoplib.pipeline import AToPPipeline
from atoplib.progress import Report
from atoplib.verdicts import VERDICTS, draw_logits, full_float32, is_random, reseed

CLEAN = "clean"
WORST = "worst case"


@dataclass(frozen=True)
class Evaluation:
    """What was measured: the table's cells, what became of each image, and the images where they were kept.

    Attributes:
        scores: a cell for each defence and attack; last of each defence the worst cases: of each norm, and of all attacks.
        outcomes: the same, image by image.
        adversarial: by (defence, attack, seed), ``clean`` included, if they were to be kept.
    """

    scores: tuple[Score, ...]
    outcomes: tuple[Outcomes, ...]
    adversarial: dict[tuple[str, str, int], Tensor]


class _Unit(NamedTuple):
    """A piece of work: one attack on one target for one batch of images, then shown to some defences."""

    planned: PlannedAttack | None  # None: clean images
    target: str  # a defence, "" for the classifier alone, or the classifier alone of a defence that has another
    shown_to: tuple[str, ...]
    seed: int
    batch: int
    images: slice

    @property
    def size(self) -> int:
        return self.images.stop - self.images.start

    @property
    def label(self) -> str:
        return CLEAN if self.planned is None else self.planned.heading

    @property
    def name(self) -> str:
        words = f"{self.label} {self.target or 'all'}".lower()
        slug = "-".join("".join(c if c.isalnum() else " " for c in words).split())
        return f"{slug}-{hashed(self.label, self.target) % 2**24:06x}-seed{self.seed}-batch{self.batch}"


class _Piece(NamedTuple):
    """A finished unit: verdicts by ``DEFENCE/VERDICT``, the images if they are kept, and the seconds it took."""

    unit: _Unit
    tensors: dict[str, Tensor]
    seconds: float


def evaluate(
    defences: Mapping[str, nn.Module],
    images: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, " batch"],
    protocol: Protocol,
    budget: Budget,
    *,
    classifier: nn.Module,
    seeds: Sequence[int] = (0,),
    batch_size: int = 100,
    max_batch: int = 256,
    attack_dtype: torch.dtype = torch.float32,
    directory: Path | None = None,
    keep_others: bool = False,
    keep_images: bool = False,
    progress: Report | None = None,
) -> Evaluation:
    """Accuracy of each defence on the same images, clean and under each attack of ``protocol``, by every verdict.

    Only attacks that see the whole defence say something about robustness; one that sees the classifier alone is made
    once and shown to every defence, but to a pipeline with another classifier the one that is made on its own; BPDA is for
    pipelines that purify. Each piece (attack, target, seed, batch) has random numbers of its own, torch's global ones
    included, so its result depends neither on the other pieces nor on an interruption.

    Args:
        defences: by name; any module in eval mode, images in [0, 1] -> logits. One with a method ``reseed(seed)``, as
            ``AToPPipeline``, gives the same numbers again.
        images, labels: in [0, 1]; true classes; on the defences' device.
        protocol, budget: what is done, and how far an attack may go.
        classifier: what transfer attacks see, unless a pipeline has one of its own.
        seeds: repetitions, each with other random starts and dice.
        batch_size: images of one piece.
        max_batch: copies of images (images x draws) that are in memory at once.
        attack_dtype: what attacks compute in (autocast); verdicts are always float32.
        directory: where finished pieces are kept; the same call goes on there. None keeps nothing.
        keep_others: a call that measures anything else (models, images, budget, device, ...) works in a folder of its own
            below ``directory``, beside those of others, instead of being refused.
        keep_images: return the adversarial images, and keep them in ``directory``.
        progress: called with images done and in all, an image counting once an attack and target.

    Raises:
        ValueError: for a model in train mode, images outside [0, 1], labels without a logit, seeds that repeat, or a
            ``directory`` that holds another evaluation, unless others are kept.

    Source: Carlini et al. 2019; Lee & Kim 2023 (PGD + EOT through the whole pipeline); Croce & Hein 2020.
    """
    if not defences or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"at least one defence and different seeds are needed, got {list(defences)} and {list(seeds)}")
    if batch_size < 1 or max_batch < 1:
        raise ValueError(f"batch_size and max_batch must be at least 1, got {batch_size} and {max_batch}")
    # all of them before the first runs: no statistics move, no hour is lost
    defences = {name: check_attack(model, images, labels)[0] for name, model in defences.items()}
    classifier, images, labels = check_attack(classifier, images, labels)
    others = _other_classifiers(classifier, defences)
    alone = {_alone(name): other for name, other in others.items()}
    targets: dict[str, nn.Module] = {"": classifier, **defences, **alone}
    random = {name: is_random(model, images, max_batch=max_batch) for name, model in targets.items()}
    settings = {
        (planned.heading, name): planned.build(budget, random=random[name], verdict=protocol.verdict)
        for planned in protocol.attacks
        for name in targets
    }
    # of a mean over several draws BPDA has no image to put the identity for
    purifying = [n for n, model in defences.items() if isinstance(model, AToPPipeline) and getattr(model, "copies", 1) == 1]
    identity = {
        "protocol": _plain(asdict(protocol)),
        "budget": asdict(budget),
        "images": tensor_fingerprint(images),
        "labels": tensor_fingerprint(labels),
        "models": {name or "classifier": model_fingerprint(model) for name, model in targets.items()},
        "seeds": list(seeds),
        "batch_size": batch_size,
        "max_batch": max_batch,
        "attack_dtype": str(attack_dtype),
        "images_kept": keep_images,
        "code": code_hash("atoplib.evaluation.measure"),
        "versions": {"atoplib": __version__, "torch": torch.__version__},
        "device": images.device.type,  # another kind throws other dice from the same seed; one of the same kind only rounds
    }
    store = Store(directory, identity, keep_others=keep_others)
    units = list(_units(protocol, tuple(defences), purifying, tuple(others), seeds, len(images), batch_size))
    total, done = sum(unit.size for unit in units), 0
    pieces = []
    for unit in units:

        def report(step: int, steps: int, *_: Tensor, done: int = done, size: int = unit.size) -> None:
            if progress is not None:
                progress(done + size * step // max(1, steps), total, "images", {})

        piece = store.load(unit.name)
        if piece is None:
            started = time.monotonic()
            shown, truth = images[unit.images], labels[unit.images]
            if unit.planned is not None:
                with _computing_in(attack_dtype, images.device):
                    model, chosen = targets[unit.target], settings[unit.label, unit.target]
                    model = BPDA(model) if unit.planned.sees == "bpda" else model
                    shown = _attack(unit, model, shown, truth, chosen, max_batch, report)
            tensors = _verdicts(unit, shown, truth, defences, random, protocol, max_batch)
            if keep_images:
                tensors["adversarial"] = shown
            piece = tensors, time.monotonic() - started
            store.save(unit.name, *piece)
        pieces.append(_Piece(unit, *piece))
        done += unit.size
        report(0, 1, done=done)
    outcomes = tuple(_collect(protocol, pieces, random))
    return Evaluation(tuple(score(item) for item in outcomes), outcomes, _images_kept(pieces) if keep_images else {})


def with_worst_unseen(outcomes: Sequence[Outcomes]) -> list[Outcomes]:
    """What ``evaluate`` measured by a protocol ``with_seen``: the worst case of the attacks
    that no training saw stands in place of those of single norms.
    """
    found = []
    for defence in dict.fromkeys(item.defence for item in outcomes):
        own = [item for item in outcomes if item.defence == defence and not item.attack.startswith(f"{WORST} ")]
        unseen = [item for item in own if item.attack.startswith(f"{UNSEEN}: ")]
        clean = [item for item in own if item.attack == CLEAN]
        worst = [worst_case([*clean, *unseen], f"{UNSEEN}: {WORST}")] if len(unseen) > 1 else []
        last = len(own) - (own[-1].attack == WORST)
        found += [*own[:last], *worst, *own[last:]]
    return found


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within the block torch's global dice start from ``seed``: those of modules that have none of their own."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _attack(
    unit: _Unit, model: nn.Module, images: Tensor, labels: Tensor, settings: Any, max_batch: int, report: Callable
) -> Tensor:
    """The unit's adversarial images; its random numbers depend on nothing but the unit."""
    seed = attack_seed(unit.seed, unit.batch)
    reseed(model, seed)
    generator = torch.Generator(images.device).manual_seed(seed)
    function = ATTACKS[unit.planned.attack].function
    with _seeded(seed, images.device):
        return function(model, images, labels, settings, generator=generator, max_batch=max_batch, callback=report)


def _draws(planned: PlannedAttack | None, protocol: Protocol) -> int:
    """Forward passes of each verdict after this attack on a random defence."""
    return protocol.num_draws if planned is None or planned.num_draws is None else planned.num_draws


def _alone(name: str) -> str:
    """The classifier of a defence, as a target of attacks."""
    return f"classifier of {name}"


def _other_classifiers(classifier: nn.Module, defences: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The classifiers of the pipelines that stand before another one than ``classifier``, by the pipeline's name."""
    shared = model_fingerprint(classifier)
    own = {name: model.classifier for name, model in defences.items() if isinstance(model, AToPPipeline)}
    return {name: other for name, other in own.items() if other is not classifier and model_fingerprint(other) != shared}


def _units(
    protocol: Protocol,
    defences: tuple[str, ...],
    purifying: Sequence[str],
    others: Sequence[str],
    seeds: Sequence[int],
    count: int,
    batch_size: int,
) -> Iterator[_Unit]:
    """The pieces of work, in order. BPDA is for what purifies; elsewhere there is nothing to put the identity for."""
    batches = [slice(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
    sharing = tuple(name for name in defences if name not in others)  # the classifier
    for seed in seeds:
        for planned in (None, *protocol.attacks):
            if planned is None:
                work = [("", defences)]
            elif planned.sees == "classifier":
                work = [("", sharing), *((_alone(name), (name,)) for name in others)]
            else:
                work = [(name, (name,)) for name in (purifying if planned.sees == "bpda" else defences)]
            for target, shown_to in work:
                for batch, images in enumerate(batches):
                    if shown_to:
                        yield _Unit(planned, target, shown_to, seed, batch, images)


def _verdicts(
    unit: _Unit,
    shown: Tensor,
    labels: Tensor,
    defences: Mapping[str, nn.Module],
    random: Mapping[str, bool],
    protocol: Protocol,
    max_batch: int,
) -> dict[str, Tensor]:
    """Every defence's verdicts on the images shown, with dice that the attack has not seen. The worst of N draws is one
    of as many after every attack: else the attack that is judged by more would seem to break more.
    """
    tensors, seed = {}, verdict_seed(unit.seed, unit.batch)
    for name in unit.shown_to:
        reseed(defences[name], seed)
        draws = _draws(unit.planned, protocol) if random[name] else 1
        with _seeded(seed, shown.device):
            logits = draw_logits(defences[name], shown, num_draws=draws, max_batch=max_batch)
        right, average = judge_draws(logits, labels, worst_of=protocol.num_draws)
        tensors |= {f"{name}/{verdict}": value for verdict, value in right.items()}
        tensors[f"{name}/average"] = average
    return tensors


def _computing_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager:
    """What an attack computes in; float32 is meant as such, as in verdicts: TF32 would have it believe in other errors."""
    return full_float32(device) if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def _collect(protocol: Protocol, pieces: Sequence[_Piece], random: Mapping[str, bool]) -> Iterator[Outcomes]:
    """Put the pieces together: for each defence clean, every attack, and the worst cases."""
    for name in pieces[0].unit.shown_to:  # the clean images, which come first, are shown to all
        attacked = []
        for planned in (None, *protocol.attacks):
            parts = [piece for piece in pieces if piece.unit.planned == planned and name in piece.unit.shown_to]
            if not parts:
                continue
            outcomes = Outcomes(
                defence=name,
                attack=CLEAN if planned is None else planned.heading,
                norm="" if planned is None else planned.norm,
                draws=_draws(planned, protocol) if random[name] else 1,
                right={verdict: _joined(parts, f"{name}/{verdict}") for verdict in VERDICTS},
                average=_joined(parts, f"{name}/average"),
                seconds=sum(piece.seconds for piece in parts),
            )
            yield outcomes
            if planned is None:
                clean = outcomes
            else:
                attacked.append(outcomes)
        norms = list(dict.fromkeys(item.norm for item in attacked))
        for norm in norms if len(norms) > 1 else ():
            of_norm = [item for item in attacked if item.norm == norm]
            if len(of_norm) > 1:
                yield worst_case([clean, *of_norm], f"{WORST} {norm}")
        if len(attacked) > 1:
            yield worst_case([clean, *attacked], WORST)


def _joined(parts: Sequence[_Piece], key: str) -> Tensor:
    """Batches side by side, seeds one below the other: (seeds, images)."""
    rows: dict[int, list[Tensor]] = {}
    for piece in parts:
        rows.setdefault(piece.unit.seed, []).append(piece.tensors[key].cpu())
    return torch.stack([torch.cat(row) for row in rows.values()])


def _images_kept(pieces: Sequence[_Piece]) -> dict[tuple[str, str, int], Tensor]:
    """Adversarial images by defence, attack and seed, on the CPU: pieces of an earlier call were read from files."""
    kept: dict[tuple[str, str, int], list[Tensor]] = {}
    for piece in pieces:
        for name in piece.unit.shown_to:
            kept.setdefault((name, piece.unit.label, piece.unit.seed), []).append(piece.tensors["adversarial"].cpu())
    return {key: torch.cat(parts) for key, parts in kept.items()}


def _plain(value: object) -> object:
    """Settings as JSON has them: tuples become lists, mappings dicts."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
