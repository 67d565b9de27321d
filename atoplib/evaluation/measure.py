"""Measure defences by a protocol: attack, decide, count; in pieces that survive an interruption."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.attacks import ATTACKS, PassCounter, bpda
from atoplib.attacks.losses import LOSSES
from atoplib.contract import prepare
from atoplib.decisions import RULES, correct, fixed_sample, full_float32, is_random, sample_logits, seeded
from atoplib.evaluation.pieces import (
    SISTER,
    SURROGATE,
    Piece,
    all_pieces,
    effort,
    file_of,
    helpers,
    plain,
    try_out,
)
from atoplib.evaluation.protocols import Protocol, check_protocol, for_classes, radii
from atoplib.evaluation.results import FILES, KNOWN, Evaluation, with_worst_cases
from atoplib.files import read_json, supersede, write_atomically, write_json
from atoplib.hashing import code_hash, environment, function_hash, json_hash, model_hash, tensor_hash
from atoplib.parameters import check_counts
from atoplib.progress import Report, format_seconds

FACTS = "evaluation.json"


def evaluate(
    defences: nn.Module | Mapping[str, nn.Module],
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    *,
    protocol: str | Protocol = "quick",
    eps: float | Sequence[float] | Mapping[str, Any] | None = None,
    norm: str = "linf",
    seed: int = 0,
    run_dir: str | Path | None = None,
    sisters: Mapping[str, nn.Module] | None = None,
    max_batch: int = 256,
    dtype: torch.dtype = torch.float32,
    keep_images: bool = False,
    progress: Report | None = None,
    notify: Callable[[str], None] | None = None,
    **overrides: Any,
) -> Evaluation:
    """Accuracy of each defence on the same images: clean, under each attack of a protocol, by every rule.

    A transfer attack is made once, on the undefended classifier, and shown to every defence; a pipeline with
    another classifier meets the one that is made on its own. BPDA is for pipelines. Attacks and decisions
    have separate seeds, and each piece (attack, target, batch) random numbers of its own, so that its result
    depends neither on other pieces nor on an interruption.

    Args:
        defences: modules in eval mode, images -> logits, by name; or one. ``reseed(seed)`` of a random one
            makes it repeatable.
        images, labels: in [0, 1]; true classes; on the defences' device. All of them are attacked.
        protocol: a name of ``PROTOCOLS``, or a ``Protocol``.
        eps: radius in ``norm``; a list: accuracy over eps, each attack goes on from the smaller radius; or
            {norm: radius or list}. None, and for other norms: the usual one (``protocols.radii``).
        norm: of the protocol's rows that name none.
        seed: of everything random.
        run_dir: where results and finished pieces are kept. The same call goes on there; what depends on
            something that changed is measured anew, and the old archived in ``superseded-N``.
        sisters: other trainings of some of the defences (another seed), by the defence's name; what is made
            on them in rows of the threat model ``sister`` is shown to it. Without one there is no such row.
        max_batch: copies of images (images x samples) that are in memory at once.
        dtype: what attacks compute in (autocast); decisions are always float32.
        keep_images: return the adversarial images, and keep them in ``run_dir``.
        progress: called with passes done and in all, and what runs; see ``progress.Progress``.
        notify: called with a sentence when pieces are measured anew.
        overrides: in place of the protocol's: ``steps``, ``eot_samples``, ``queries``, ``votes``, ...

    Raises:
        ValueError: for a model in train mode, images outside [0, 1], wrong labels, names, options or radii.

    Source: Carlini et al. 2019; Lee & Kim 2023 (PGD + EOT through the whole pipeline).
    """
    named = defences.items() if isinstance(defences, Mapping) else [("defence", defences)]
    defences = {str(name): model for name, model in named}
    check_counts(defences=len(defences), max_batch=max_batch)
    reserved = [name for name in defences if name.startswith((SURROGATE, SISTER))]
    if reserved or len(defences) < len(named):
        raise ValueError(
            f"defences need names of their own, none that begins with {SURROGATE!r} or {SISTER!r}, which are "
            f"attackers' models; got {[name for name, _ in named]}"
        )
    if not (isinstance(seed, int) and 0 <= seed < 2**63 - 1 and isinstance(dtype, torch.dtype)):
        raise ValueError(
            f"seed must be a whole number from 0, dtype a torch.dtype, got {seed!r} and {dtype!r}"
        )
    plan = check_protocol(protocol, norm, **overrides)
    # all of them before the first runs: no statistics move, no hour is lost
    followed = {row.threat_model for row in plan.rows if ATTACKS[row.attack].gradient}
    targets = {}
    for name, model in defences.items():
        targets[name], images, labels = prepare(model, images, labels, differentiable="white-box" in followed)
    for name, model in helpers(targets, sisters or {}).items():
        needed = "sister" if name.startswith(SISTER) else "transfer"
        targets[name], *_ = prepare(model, images, labels, differentiable=needed in followed)
    random = {name: is_random(model, images, max_batch=max_batch) for name, model in targets.items()}
    classes = min(sample_logits(model, images[:1]).shape[2] for model in targets.values())
    plan, sizes = for_classes(plan, classes), radii(images, eps, norm)
    sizes = {row.norm: sizes[row.norm] for row in plan.rows if row.norm in sizes}
    facts = {
        "defences": {name: model_hash(model, images) for name, model in targets.items()},
        "images": tensor_hash(images),
        "labels": tensor_hash(labels),
        "protocol": plan._asdict() | {"rows": [row._asdict() for row in plan.rows], "votes": plan.num_votes},
        "norm": norm,
        "eps": sizes,
        "attacks": {row.attack: function_hash((ATTACKS[row.attack].function, LOSSES)) for row in plan.rows},
        "shared": {"seed": seed, "max_batch": max_batch, "dtype": str(dtype), "images kept": keep_images},
        "code": code_hash("atoplib.evaluation.measure"),
        "environment": environment(images.device),
        "gradient_free": [row.heading for row in plan.rows if not ATTACKS[row.attack].gradient],
    }
    facts, folder = plain(facts), run_dir and Path(run_dir)
    pieces = [
        piece._replace(file=file_of(piece, facts, images[piece.images], labels[piece.images]))
        for piece in all_pieces(plan, targets, random, tuple(defences), sizes, len(images))
    ]
    for piece in pieces:
        if piece.batch == 0 and not (folder and (folder / piece.file).is_file()):
            try_out(piece, plan, images[:1], labels[:1], classes, random.get(piece.target, False))
    if folder:
        _open(folder, facts, {folder / piece.file for piece in pieces}, notify or (lambda sentence: None))
    efforts = [effort(piece, plan.num_votes) for piece in pieces]
    frames, adversarial, counts = [], defaultdict(list), defaultdict(list)
    for number, piece in enumerate(pieces):

        def report(step: int, of: int, *_: Tensor, message: str = piece.title, number: int = number) -> None:
            if progress is not None:
                now = efforts[number] * step // max(1, of)
                progress(sum(efforts[:number]) + now, sum(efforts), "passes", message)

        result = folder and _load(folder / piece.file)
        if not result:
            result = _measure(
                piece, images[piece.images], labels[piece.images], plan, targets, random, report, seed=seed,
                max_batch=max_batch, dtype=dtype, keep_images=keep_images,
            )  # fmt: skip
            if folder:
                write_atomically(folder / piece.file, partial(torch.save, result))
        frames += map(pd.DataFrame, result["rows"])
        # of the first defence, at the largest radius
        counts[piece.title] += result["rows"][-len(piece.shown_to)]["single"]
        for name, (eps, shown) in product(piece.shown_to, result["images"].items()):
            adversarial[name, piece.attack, eps].append(shown)
        right = counts[piece.title]
        report(1, 1, message=f"{piece.title}: {sum(right)} of {len(right)} correct")
    evaluation = Evaluation(
        with_worst_cases(pd.concat(frames, ignore_index=True)),
        labels.cpu().numpy(),
        facts,
        {key: torch.cat(parts) for key, parts in adversarial.items()},
    )
    if folder:
        evaluation.write(folder)
    return evaluation


def _measure(
    piece: Piece,
    images: Tensor,
    labels: Tensor,
    plan: Protocol,
    targets: Mapping[str, nn.Module],
    random: Mapping[str, bool],
    report: Callable[..., None],
    *,
    seed: int,
    max_batch: int,
    dtype: torch.dtype,
    keep_images: bool,
) -> dict[str, Any]:
    """Attack and decide: at every radius the columns of ``Evaluation.by_image`` for each defence, and the
    images by radius if they are to be kept. ``worst_of_n`` rests on as many samples after every attack: more
    find more errors whatever the attack."""
    row, most, smaller, rows, kept = piece.row, plan.num_votes, None, [], {}
    known, later = bool(row and row.known_sample), _seed("decision", seed, piece.batch)
    for place, eps in enumerate(piece.eps):
        started, shown, passes = time.monotonic(), images, 0
        if row:
            smaller, passes = _attack(
                piece, eps, images, labels, smaller, plan, targets[piece.target], random[piece.target],
                lambda step, of, *_, place=place: report(place * of + step, len(piece.eps) * of),
                seed=_seed("attack", seed, piece.batch), max_batch=max_batch, dtype=dtype,
            )  # fmt: skip
            shown = smaller
        attacked = time.monotonic() - started
        for name in piece.shown_to:
            began = time.monotonic()
            votes = (row and row.votes or most) if random[name] and not known else 1
            with (
                seeded(targets[name], later, images.device),
                fixed_sample(targets[name], 0) if known else nullcontext(),
            ):
                logits = sample_logits(targets[name], shown, num_samples=votes, max_batch=max_batch)
            counted = {rule: logits[: most if rule == "worst_of_n" else None] for rule in RULES}
            rows.append(
                {
                    "defence": name,
                    "attack": piece.attack,
                    "threat_model": KNOWN if known else row.threat_model if row else "",
                    "norm": row.norm if row else "",
                    "image": list(range(piece.images.start, piece.images.stop)),
                    "eps": eps,
                    "votes": votes,
                    **{rule: correct(samples, labels, rule).tolist() for rule, samples in counted.items()},
                    "sample_mean": (logits.argmax(dim=2) == labels).double().mean(dim=0).tolist(),
                    "passes": passes / len(labels),
                    "seconds": (attacked + time.monotonic() - began) / len(labels),
                }
            )
        if keep_images:
            kept[eps] = shown.cpu()
    return {"rows": rows, "images": kept}


def _attack(
    piece: Piece,
    eps: float,
    images: Tensor,
    labels: Tensor,
    smaller: Tensor | None,
    plan: Protocol,
    model: nn.Module,
    random: bool,
    report: Callable[..., None],
    *,
    seed: int,
    max_batch: int,
    dtype: torch.dtype,
) -> tuple[Tensor, int]:
    """Adversarial images at one radius, and passes of images through the target. What ``smaller``, those at
    the radius before, break stays broken; the rest is attacked from there."""
    row, attack, device = piece.row, ATTACKS[piece.row.attack], images.device
    votes = (row.votes or plan.num_votes) if random else 1
    options = row.keywords(eps, random=random, rule=plan.rule, votes=votes)
    counter = PassCounter(bpda(model) if row.threat_model == "bpda" else model)
    # float32 is meant as such, as in decisions: TF32 would make an attack believe in other errors
    computing = full_float32(device) if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
    result, rows = images, torch.arange(len(images), device=device)
    with (
        seeded(model, seed, device),
        fixed_sample(model, 0) if row.known_sample else nullcontext(),
        computing,
    ):
        if smaller is not None and not row.known_sample:
            logits = sample_logits(counter, smaller, num_samples=votes, max_batch=max_batch)
            result, rows = smaller, correct(logits, labels, plan.rule).nonzero().squeeze(1)
            if options.get("start", attack.options.get("start")) == "random":
                options["start"] = smaller[rows]
        if len(rows):
            options |= {"seed": seed, "max_batch": max_batch, "callback": report}
            adversarial = attack.function(
                counter, images[rows], labels[rows], eps=eps, norm=row.norm, **options
            )
            result = result.index_copy(0, rows, adversarial.to(result.dtype))
    return result.detach(), counter.gradient_passes + counter.forward_passes


def _seed(purpose: str, seed: int, batch: int) -> int:
    """Of an attack, or of the decisions after it; of the first batch ``seed`` and ``seed + 1``."""
    return seed + (purpose == "decision") if batch == 0 else int(json_hash([purpose, seed, batch])[:15], 16)


def _open(run_dir: Path, facts: Mapping[str, Any], wanted: set[Path], notify: Callable[[str], Any]) -> None:
    """Say what changed since the last evaluation here, and archive its results and what depends on it."""
    both = read_json(run_dir / FACTS) or facts, facts
    old, new = (pd.json_normalize(each, max_level=1).iloc[0].to_dict() for each in both)
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if changed:
        pieces = set(run_dir.glob(".pieces/*.pt"))
        results = [run_dir / name for name in (*FILES, FACTS) if (run_dir / name).exists()]
        archive = supersede(run_dir, [*(pieces - wanted), *results])
        notify(
            f"Measured anew, because it changed: {'; '.join(changed)}. {len(pieces & wanted)} of "
            f"{len(wanted)} pieces do not depend on it and stay; the earlier results are in {archive}"
        )
    elif all(map(_load, wanted)):
        age = format_seconds(time.time() - min(path.stat().st_mtime for path in wanted))
        notify(f"Loaded, not measured again: all that it depends on is as it was; measured {age} ago.")
    write_json(run_dir / FACTS, dict(facts))


def _load(path: Path) -> dict[str, Any] | None:
    """A finished piece, or None; a damaged file counts as not finished."""
    try:
        return torch.load(path, weights_only=True)
    except Exception:  # a damaged file may raise anything
        return None
