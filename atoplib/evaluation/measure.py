"""Measure defences by a protocol: attack, decide, count; in pieces that survive an interruption."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from atoplib.attacks import ATTACKS, PassCounter, bpda
from atoplib.contract import prepare
from atoplib.decisions import RULES, correct, fixed_sample, full_float32, is_random, reseed, sample_logits
from atoplib.evaluation.protocols import COUNTS, Protocol, Row, check_protocol, for_classes, radii
from atoplib.evaluation.results import CLEAN, FILES, WORST, Evaluation, Outcome, worst_case
from atoplib.files import read_json, set_aside, write_atomically, write_json
from atoplib.hashing import code_hash, environment, function_hash, json_hash, model_hash, tensor_hash
from atoplib.pipeline import AToPPipeline
from atoplib.progress import Report, format_seconds

PIECE = 100  # images that are attacked at once, and finished or repeated as a whole
SURROGATE = "the classifier"  # as a target of transfer attacks
KNOWN_SAMPLE = 0  # the seed that an attacker knows
FACTS = "evaluation.json"


class _Setting(NamedTuple):
    """What all pieces share: ``targets`` are the defences, and what transfer attacks use."""

    plan: Protocol
    targets: Mapping[str, nn.Module]
    random: Mapping[str, bool]
    seed: int
    max_batch: int
    dtype: torch.dtype
    keep_images: bool


class _Piece(NamedTuple):
    """One attack on one target for one batch of images, at every radius, then shown to some defences. ``row``
    is None, and ``target`` "", for clean images; ``key`` a hash of all that decides what is found."""

    row: Row | None
    eps: tuple[float, ...]
    target: str
    shown_to: tuple[str, ...]
    batch: int
    images: slice
    key: str = ""

    @property
    def title(self) -> str:
        return CLEAN if self.row is None else f"{self.target}, {self.row.heading}"

    @property
    def file(self) -> str:
        words = "".join(c if c.isalnum() else " " for c in self.title.lower()).split()
        return f"pieces/{'-'.join(words)}-batch{self.batch}-{self.key}.safetensors"


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
    classifier: nn.Module | None = None,
    max_batch: int = 256,
    dtype: torch.dtype = torch.float32,
    keep_images: bool = False,
    progress: Report | None = None,
    notify: Callable[[str], None] | None = None,
    **overrides: Any,
) -> Evaluation:
    """Accuracy of each defence on the same images: clean, under each attack of a protocol, by every rule.

    Only attacks on the whole defence say something about robustness. A transfer attack is made once, on the
    undefended classifier, and shown to every defence; a pipeline with another classifier meets the one that
    is made on its own. BPDA is for pipelines. Attacks and decisions have separate seeds, and each piece
    (attack, target, batch) random numbers of its own, torch's global ones included, so that its result
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
        classifier: what transfer attacks on all defences use, for example a sister model; None: as above.
        max_batch: copies of images (images x samples) that are in memory at once.
        dtype: what attacks compute in (autocast); decisions are always float32.
        keep_images: return the adversarial images, and keep them in ``run_dir``.
        progress: called with passes done and in all, and what runs; see ``progress.Progress``.
        notify: called with a sentence when pieces are measured anew.
        overrides: in place of the protocol's: ``steps``, ``eot_samples``, ``queries``, ``votes``, ...

    Raises:
        ValueError: for a model in train mode, images outside [0, 1], wrong labels, names, options or radii.

    Source: Carlini et al. 2019; Lee & Kim 2023 (PGD + EOT through the whole pipeline); Croce & Hein 2020.
    """
    defences = dict(defences) if isinstance(defences, Mapping) else {"defence": defences}
    if not defences or max_batch < 1:
        raise ValueError(f"a defence and max_batch >= 1 are needed, got {list(defences)} and {max_batch}")
    plan = check_protocol(protocol, norm, **overrides)
    # all of them before the first runs: no statistics move, no hour is lost
    prepared = {name: prepare(model, images, labels) for name, model in defences.items()}
    targets = {name: model for name, (model, _, _) in prepared.items()}
    _, images, labels = next(iter(prepared.values()))
    targets |= {n: prepare(m, images, labels)[0] for n, m in _surrogates(targets, classifier).items()}
    random = {name: is_random(model, images, max_batch=max_batch) for name, model in targets.items()}
    few = (sample_logits(model, images[:1], max_batch=max_batch).shape[2] for model in targets.values())
    plan = for_classes(plan, min(few))
    setting = _Setting(plan, targets, random, seed, max_batch, dtype, keep_images)
    sizes = radii(images, eps, norm)
    sizes = {row.norm: sizes[row.norm] for row in plan.rows if row.norm in sizes}
    facts = {
        "defences": {name: model_hash(model, images) for name, model in targets.items()},
        "images": tensor_hash(images),
        "labels": tensor_hash(labels),
        "protocol": plan._asdict() | {"rows": [row._asdict() for row in plan.rows], "votes": plan.num_votes},
        "norm": norm,
        "eps": sizes,
        "attacks": {row.attack: function_hash(ATTACKS[row.attack].function) for row in plan.rows},
        "shared": {"seed": seed, "max_batch": max_batch, "dtype": str(dtype), "images kept": keep_images},
        "code": code_hash("atoplib.evaluation.measure"),
        "environment": environment(images.device),
    }
    facts = _plain(facts)
    pieces = [
        piece._replace(key=_key(piece, facts, images[piece.images], labels[piece.images]))
        for piece in _pieces(setting, tuple(defences), sizes, len(images))
    ]
    folder = None if run_dir is None else Path(run_dir)
    if folder is not None:
        _open(folder, facts, {piece.file for piece in pieces}, notify)
    efforts = [_effort(piece, setting) for piece in pieces]
    found: list[tuple[_Piece, dict[str, Tensor]]] = []
    for number, piece in enumerate(pieces):

        def report(step: int, of: int, *_: Tensor, message: str = piece.title, number: int = number) -> None:
            if progress is not None:
                done = sum(efforts[:number]) + efforts[number] * step // max(1, of)
                progress(done, sum(efforts), "passes", message)

        tensors = None if folder is None else _load(folder / piece.file)
        if tensors is None:
            tensors = _measure(piece, images[piece.images], labels[piece.images], setting, report)
            if folder is not None:
                write_atomically(folder / piece.file, partial(safetensors.torch.save_file, tensors))
        found.append((piece, tensors))
        report(1, 1, message=_so_far(found))
    facts["gradient_free"] = [row.heading for row in plan.rows if not ATTACKS[row.attack].gradient]
    facts["known_sample"] = [row.heading for row in plan.rows if row.known_sample]
    outcomes = [outcome for name in defences for outcome in _outcomes(name, found, setting)]
    result = Evaluation(tuple(outcomes), labels.cpu().numpy(), facts)
    if folder is not None:
        result.write(folder)
    return result


def _surrogates(defences: Mapping[str, nn.Module], classifier: nn.Module | None) -> dict[str, nn.Module]:
    """What transfer attacks use: one classifier for all, and without one given a pipeline's own other one."""
    own = {name: model.classifier for name, model in defences.items() if isinstance(model, AToPPipeline)}
    if classifier is not None:
        return {SURROGATE: classifier}
    shared = defences.get("undefended", next(iter(own.values()), None))
    if shared is None:
        return {}
    same = model_hash(shared)
    others = {name: model for name, model in own.items() if model is not shared and model_hash(model) != same}
    return {SURROGATE: shared} | {f"{SURROGATE} of {name}": model for name, model in others.items()}


def _pieces(
    setting: _Setting, defences: tuple[str, ...], sizes: Mapping[str, tuple[float, ...]], count: int
) -> Iterator[_Piece]:
    """The pieces of work, in order. Of a mean over several copies BPDA has no image for the identity."""
    targets = setting.targets
    sharing = tuple(name for name in defences if f"{SURROGATE} of {name}" not in targets)
    purifying = [n for n in defences if isinstance(targets[n], AToPPipeline) and targets[n].copies == 1]
    for row in (None, *setting.plan.rows):
        if row is None:
            work = [("", defences)]
        elif row.threat_model == "transfer":
            work = [(SURROGATE, sharing)] if SURROGATE in targets else []
            work += [(f"{SURROGATE} of {name}", (name,)) for name in defences if name not in sharing]
        else:
            names = purifying if row.threat_model == "bpda" else defences
            work = [(name, (name,)) for name in names if setting.random[name] or not row.random_only]
        eps = (0.0,) if row is None else sizes.get(row.norm, ())
        for target, shown_to in work if eps else ():
            for batch, first in enumerate(range(0, count, PIECE) if shown_to else ()):
                yield _Piece(row, eps, target, shown_to, batch, slice(first, min(first + PIECE, count)))


def _plain(value: Any) -> Any:
    """A value as JSON has it, tensors and functions by their hash."""
    return json.loads(
        json.dumps(value, default=lambda x: tensor_hash(x) if isinstance(x, Tensor) else function_hash(x))
    )


def _key(piece: _Piece, facts: Mapping[str, Any], images: Tensor, labels: Tensor) -> str:
    row = piece.row and _plain(piece.row._asdict())
    models = [facts["defences"].get(name) for name in (piece.target, *piece.shown_to)]
    own = [row and (row, facts["attacks"][row["attack"]]), piece.eps, piece.shown_to, piece.batch, models]
    shared = [facts[name] for name in ("shared", "code", "environment")]
    votes = [facts["protocol"][name] for name in ("votes", "rule")]
    return json_hash([own, shared, votes, tensor_hash(images), tensor_hash(labels)])


def _effort(piece: _Piece, setting: _Setting) -> int:
    """About how many passes a piece takes: of its images in every step, sample and run, at every radius."""
    count = piece.images.stop - piece.images.start
    options = {} if piece.row is None else ATTACKS[piece.row.attack].options | dict(piece.row.options)
    steps, samples, runs, queries = (options.get(n) or 1 for n in COUNTS[:4])
    decisions = setting.plan.num_votes * len(piece.shown_to)
    return count * len(piece.eps) * (steps * samples * runs + queries + decisions)


def _measure(
    piece: _Piece, images: Tensor, labels: Tensor, setting: _Setting, report: Callable[..., None]
) -> dict[str, Tensor]:
    """Attack and decide: of every radius the decisions by each rule, the mean over samples, and what it cost.

    Decisions use samples that the attack has not seen. ``worst_of_n`` rests on as many after every attack:
    more samples find more errors whatever the attack.
    """
    row, most, tensors, smaller = piece.row, setting.plan.num_votes, {}, None
    known = row is not None and row.known_sample
    for number, eps in enumerate(piece.eps):
        started = time.monotonic()
        shown, passes = images, 0
        if row is not None:
            smaller, passes = _attack(piece, eps, images, labels, smaller, setting, report)
            shown = smaller
        for name in piece.shown_to:
            votes = (row and row.votes or most) if setting.random[name] and not known else 1
            model, seed = setting.targets[name], _seed("decision", setting.seed, piece.batch)
            with _random_numbers(model, seed, images.device, known):
                logits = sample_logits(model, shown, num_samples=votes, max_batch=setting.max_batch)
            decided = [correct(logits[: most if r == "worst_of_n" else None], labels, r) for r in RULES]
            tensors[f"{number}/{name}/correct"] = torch.stack(decided)
            tensors[f"{number}/{name}/mean"] = (logits.argmax(dim=2) == labels).float().mean(dim=0)
            tensors[f"{number}/{name}/votes"] = torch.tensor(votes)
        tensors[f"{number}/cost"] = torch.tensor([passes, time.monotonic() - started], dtype=torch.float64)
        if setting.keep_images:
            tensors[f"{number}/images"] = shown
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _attack(
    piece: _Piece,
    eps: float,
    images: Tensor,
    labels: Tensor,
    smaller: Tensor | None,
    setting: _Setting,
    report: Callable[..., None],
) -> tuple[Tensor, int]:
    """Adversarial images at one radius, and passes of images through the target. What ``smaller``, those at
    the radius before, break stays broken; the rest is attacked from there."""
    row, attack, model = piece.row, ATTACKS[piece.row.attack], setting.targets[piece.target]
    votes = setting.plan.num_votes if setting.random[piece.target] else 1
    options = row.keywords(eps, random=setting.random[piece.target], rule=setting.plan.rule, votes=votes)
    counter = PassCounter(bpda(model) if row.threat_model == "bpda" else model)
    seed, device = _seed("attack", setting.seed, piece.batch), images.device
    exact = setting.dtype == torch.float32
    # float32 is meant as such, as in decisions: TF32 would make an attack believe in other errors
    computing = full_float32(device) if exact else torch.autocast(device.type, dtype=setting.dtype)
    result, rows = images, torch.arange(len(images), device=device)
    with _random_numbers(model, seed, device, row.known_sample), computing:
        if smaller is not None and not row.known_sample:
            logits = sample_logits(counter, smaller, num_samples=votes, max_batch=setting.max_batch)
            result, rows = smaller, correct(logits, labels, setting.plan.rule).nonzero().squeeze(1)
            if options.get("start", attack.options.get("start")) == "random":
                options["start"] = smaller[rows]
        if len(rows):
            options |= {"seed": seed, "max_batch": setting.max_batch, "callback": report}
            found = attack.function(counter, images[rows], labels[rows], eps=eps, norm=row.norm, **options)
            result = result.index_copy(0, rows, found.to(result.dtype))
    return result.detach(), counter.gradient_passes + counter.forward_passes


def _seed(purpose: str, seed: int, batch: int) -> int:
    """Of an attack, or of the decisions after it, which differ; of the first batch ``seed`` and ``seed +
    1``."""
    return seed + (purpose == "decision") if batch == 0 else int(json_hash([purpose, seed, batch])[:15], 16)


@contextmanager
def _random_numbers(model: nn.Module, seed: int, device: torch.device, known_sample: bool) -> Iterator[None]:
    """Within the block a model's random numbers start from ``seed``, and torch's global ones, for modules
    without own; with ``known_sample`` they are one sample, the same in attack and decision."""
    reseed(model, seed)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with fixed_sample(model, KNOWN_SAMPLE) if known_sample else nullcontext():
            yield


def _so_far(found: Sequence[tuple[_Piece, Mapping[str, Tensor]]]) -> str:
    """``AToP, PGD-40 + EOT-10 linf: 34 of 100 correct so far``: the last piece with those before it, largest
    radius."""
    last = found[-1][0]
    key = f"{len(last.eps) - 1}/{last.shown_to[0]}/correct"
    right = torch.cat([tensors[key][0] for piece, tensors in found if piece.title == last.title])
    return f"{last.title}: {int(right.sum())} of {len(right)} correct so far"


def _outcomes(
    name: str, found: Sequence[tuple[_Piece, Mapping[str, Tensor]]], setting: _Setting
) -> Iterator[Outcome]:
    """One defence: clean, every attack at every radius, and the worst cases of each norm and of all."""
    attacked: list[Outcome] = []
    for row in (None, *setting.plan.rows):
        own = [(piece, tensors) for piece, tensors in found if piece.row is row and name in piece.shown_to]
        for number, eps in enumerate(own[0][0].eps if own else ()):
            parts = [tensors for _, tensors in own]
            decided, mean = (
                torch.cat([part[f"{number}/{name}/{key}"] for part in parts], dim=-1).numpy()
                for key in ("correct", "mean")
            )
            passes, seconds = sum(part[f"{number}/cost"] for part in parts).tolist()
            what = (CLEAN, "", "") if row is None else (row.heading, row.threat_model, row.norm)
            votes = int(parts[0][f"{number}/{name}/votes"])
            kept = torch.cat([part[f"{number}/images"] for part in parts]) if setting.keep_images else None
            outcome = Outcome(name, *what, eps, votes, decided, mean, passes / len(mean), seconds, kept)
            yield outcome
            if row is None:
                clean = outcome
            elif not row.known_sample:
                attacked.append(outcome)
    norms = list(dict.fromkeys(item.norm for item in attacked))
    largest = {norm: max(item.eps for item in attacked if item.norm == norm) for norm in norms}
    for norm, eps in dict.fromkeys((item.norm, item.eps) for item in attacked):
        together = [item for item in attacked if (item.norm, item.eps) == (norm, eps)]
        if len(together) > 1:
            yield worst_case([clean, *together], f"{WORST} {norm}" if len(norms) > 1 else WORST)
    if len(norms) > 1:
        yield worst_case([clean, *(item for item in attacked if item.eps == largest[item.norm])])


def _open(
    run_dir: Path, facts: Mapping[str, Any], wanted: set[str], notify: Callable[[str], None] | None
) -> None:
    """Say what changed since the last evaluation in this directory, and archive its results and the pieces
    that depend on it."""
    before = read_json(run_dir / FACTS) or facts
    changed = []
    for name in (name for name in facts if before.get(name) != facts[name]):
        old, new = before.get(name), facts[name]
        nested = isinstance(old, dict) and isinstance(new, dict) and name != "protocol"
        parts = [part for part in {**old, **new} if old.get(part) != new.get(part)] if nested else []
        changed.append(f"{name} ({', '.join(parts)})" if parts else name)
    if changed:
        pieces = [path.relative_to(run_dir).as_posix() for path in run_dir.glob("pieces/*.safetensors")]
        old = [name for name in pieces if name not in wanted]
        results = [name for name in (*FILES, FACTS) if (run_dir / name).exists()]
        archive = set_aside(run_dir, [run_dir / name for name in (*old, *results)])
        if notify is not None:
            stay = f"{len(pieces) - len(old)} of {len(wanted)} pieces do not depend on it and stay"
            what = f"Measured anew, because it changed: {'; '.join(changed)}"
            notify(f"{what}. {stay}; the earlier results are in {archive}")
    elif notify is not None and all(_load(run_dir / name) is not None for name in wanted):
        age = time.time() - min((run_dir / name).stat().st_mtime for name in wanted)
        as_it_was = "Loaded, not measured again: all that it depends on is as it was"
        notify(f"{as_it_was}; measured {format_seconds(age)} ago.")
    write_json(run_dir / FACTS, dict(facts))


def _load(path: Path) -> dict[str, Tensor] | None:
    """A finished piece, or None; a damaged file counts as not finished."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError, ValueError):
        return None
