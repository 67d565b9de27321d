"""Protocols as data: which attacks, how strong, on how many images, decided by how many samples. An attack is
one row."""

from collections.abc import Mapping, Sequence
from sys import float_info
from typing import Any, NamedTuple

import numpy as np
import torch

from atoplib.attacks import ATTACKS, RADII, usual_radii
from atoplib.attacks.pgd import ENSEMBLES
from atoplib.decisions import ANY
from atoplib.parameters import check_counts, check_known, check_settings, convert, one_of

COUNTS = ("steps", "eot_samples", "restarts", "queries", "votes")
# What an attacker uses: all of the defence; a classifier, whose adversarial images the defence is then shown;
# another training of the defence, likewise; all of it, with the identity as the backward pass of transform
# and purifier.
THREAT_MODELS = ("white-box", "transfer", "sister", "bpda")


class Row(NamedTuple):
    """One attack of a protocol, a column of its table.

    Attributes:
        attack: a name of ``attacks.ATTACKS``.
        name: the column's heading; ``{norm}`` and the names of options in braces stand for their values. "":
            the attack's title.
        norm: what eps is a radius of (``linf``, ``l2``, ``l1``, ``flow``, ...); None: the norm that
            ``evaluate`` is asked for.
        threat_model: one of ``THREAT_MODELS``.
        options: keyword arguments of the attack.
        step: its step size ``alpha`` in units of eps; None: the attack's own.
        votes: samples of the decision after it, in place of the protocol's.
        equal_passes: a deterministic model, which needs no EOT, is attacked by as many restarts as a random
            one has EOT samples, so that all rows of a table cost as many gradient passes.
        random_only: for random models alone.
        known_sample: the attacker knows the sample of t, and the decision uses that one: how much randomness
            hides. It is no part of a worst case.
    """

    attack: str
    name: str = ""
    norm: str | None = None
    threat_model: str = "white-box"
    options: Mapping[str, Any] = {}
    step: float | None = None
    votes: int | None = None
    equal_passes: bool = False
    random_only: bool = False
    known_sample: bool = False

    @property
    def heading(self) -> str:
        """The name, with the values of what it names in braces."""
        return (self.name or ATTACKS[self.attack].title).format(**{"norm": self.norm, **self.options})

    def keywords(self, eps: float, *, random: bool, rule: str, votes: int) -> dict[str, Any]:
        """Keyword arguments of the attack at radius eps; ``rule`` and ``votes`` where it decides itself."""
        known = ATTACKS[self.attack].options
        options = {name: known[name] for name in ("steps", "eot_samples", "restarts") if name in known}
        options |= {"rule": rule, **self.options}
        options["votes"] = max(votes, options.get("votes", 1)) if random else 1  # a decision's at least
        smoothing = ENSEMBLES.get(self.norm, {}).get("smoothing", ()) if self.attack == "pgd_ensemble" else ()
        options["restarts"] = max(len(smoothing), options.get("restarts", 1))  # a run by each of them
        if self.step is not None:
            options["alpha"] = self.step * eps
        if not random and "eot_samples" in known:
            samples, options["eot_samples"] = options["eot_samples"], 1
            if self.equal_passes:
                parts = max(1, options["steps"] // (80 if smoothing else 40))  # starts bring more than steps
                options["steps"] //= parts
                options["restarts"] *= parts * samples
                if self.attack == "pgd_ensemble" and not smoothing:  # targets find more than the margin
                    options.setdefault("loss", ("mean_softmax", *["likely_targets"] * 9))
        return {name: value for name, value in options.items() if name in known}


class Protocol(NamedTuple):
    """A way to measure robustness that can be named beside the number.

    Attributes:
        name, purpose: the purpose is one sentence on what it is for and what it costs.
        rows: the attacks, after the clean images.
        num_images: test images that notebooks attack.
        votes: samples of each decision on a random defence; None: as many as the most EOT samples of a
            gradient, at least 10.
        rule: by which an attack itself takes an image for broken, with ``votes`` samples: once every sample
            is wrong. By a majority it would stop while a single sample is still correct four times in ten.
        selection: which images: ``mixed`` (a fixed choice, all classes mixed), or ``lee-kim`` (those that
            Lee & Kim 2023 attack, where the data set is CIFAR in its standard order).
    """

    name: str
    purpose: str
    rows: tuple[Row, ...]
    num_images: int = 512
    votes: int | None = None
    rule: str = ANY
    selection: str = "mixed"

    @property
    def num_votes(self) -> int:
        """Samples of each decision."""
        return self.votes or max([10, *(row.options.get("eot_samples", 1) for row in self.rows)])


def single(
    attack: str, *, threat_model: str = "white-box", votes: int | None = None, **options: Any
) -> Protocol:
    """A protocol of one attack; options that it does not have, and None, are left out."""
    known = ATTACKS[attack].options if attack in ATTACKS else ()
    check_known(options, {name for each in ATTACKS.values() for name in each.options}, "no attack has")
    options = {name: value for name, value in options.items() if name in known and value is not None}
    changes = ", ".join(f"{name} {value}" for name, value in options.items())
    row = Row(attack, threat_model, None, threat_model, options, equal_passes="restarts" in known)
    name = f"{attack} alone{changes and f' ({changes})'}"
    return Protocol(name, "one attack", (row,), num_images=200, votes=votes)


def check_protocol(protocol: str | Protocol, norm: str = "linf", **overrides: Any) -> Protocol:
    """The protocol of this name, or a protocol of one's own, checked; every row has a norm.

    Args:
        norm: of the rows that name none.
        overrides: ``steps``, ``eot_samples``, ``queries``, ``votes``, ... in place of those of rows that have
            such an option; the protocol's name says so. None leaves it.

    Raises:
        ValueError: for an unknown protocol, attack, norm, threat model, or option, a number below 1, or two
            rows of one heading.
    """
    if isinstance(protocol, str):
        check_settings(protocol=(protocol, one_of(*PROTOCOLS)))
        protocol = PROTOCOLS[protocol]
    options = {name: value for name, value in overrides.items() if value is not None}
    known = {"votes"}.union(*(row.options for row in protocol.rows))
    for name, value in options.items():
        if name not in known:
            raise ValueError(
                f"protocol {protocol.name!r} takes the options {', '.join(sorted(known))} (None: its own), "
                f"not {name}={value}"
            )
    counts = {"rows": len(protocol.rows), "votes": 1 if protocol.votes is None else protocol.votes}
    check_counts(**counts | {name: value for name, value in options.items() if name in COUNTS})
    rows = []
    for row in protocol.rows:
        row = row._replace(
            norm=row.norm or norm,
            options={name: options.get(name, value) for name, value in row.options.items()},
            votes=None if "votes" in options else row.votes,
        )
        check_settings(
            attack=(row.attack, one_of(*ATTACKS)), threat_model=(row.threat_model, one_of(*THREAT_MODELS))
        )
        attack, whose = ATTACKS[row.attack], f"of {row.attack}"
        names = {f"option {name} {whose}": (name, one_of(*attack.options)) for name in row.options}
        check_settings(**{f"norm {whose}": (row.norm, one_of(*attack.norms))}, **names)
        if row not in rows:  # the row of the norm asked for may be one that is there anyhow
            rows.append(row)
    headings = [row.heading for row in rows]
    if len(set(headings)) < len(headings):
        raise ValueError(f"attacks of {protocol.name} have the same name: {', '.join(headings)}")
    changes = ", ".join(f"{name} {value}" for name, value in options.items())
    name = protocol.name + (f" ({changes})" if changes else "")
    return protocol._replace(name=name, rows=tuple(rows), votes=options.get("votes", protocol.votes))


def for_classes(protocol: Protocol, classes: int) -> Protocol:
    """The protocol for models of so many classes. Of few, AutoAttack (needs 4) makes way for those of its
    parts that exist, and the DLR loss (needs 3) for the cross-entropy, under names that say so."""

    rows, suffix = [], f" ({classes} classes)"
    for row in protocol.rows:
        parts = [(row.attack, row.name, row.options)]
        shared = {name: row.options[name] for name in ("steps", "eot_samples") if name in row.options}
        if row.attack == "autoattack" and classes < 4:
            losses = ("ce", "dlr") if classes == 3 else ("ce",)
            parts = [("apgd", f": APGD-{loss.upper()}", shared | {"loss": loss}) for loss in losses]
            parts += [("square", ": Square", {"queries": row.options.get("queries", 1000)})]
            title = row.name or "AutoAttack {norm}"
            parts = [(attack, f"{title}{part}{suffix}", options) for attack, part, options in parts]
        elif row.options.get("loss") == "dlr" and classes < 3:
            name = (row.name or "APGD-DLR {norm}").replace("DLR", "CE")
            parts = [("apgd", name + suffix, shared | {"loss": "ce"})]
        parts = [part for part in parts if row.norm in ATTACKS[part[0]].norms]  # Square knows no l1
        rows += [row._replace(attack=attack, name=name, options=options) for attack, name, options in parts]
    return protocol._replace(rows=tuple(rows))


def radii(
    images: torch.Tensor, eps: float | Sequence[float] | Mapping[str, Any] | None = None, norm: str = "linf"
) -> dict[str, tuple[float, ...]]:
    """The radii of each norm, ascending. None: linf 0.3 and l2 2.0 for grey images (digits), 8/255 and 0.5
    for colour; a number: that of ``norm``, the others as for None; a list: of ``norm`` alone; a mapping: of
    the norms that it names.

    Raises:
        ValueError: for a radius that is not above 0, an l_inf radius above 1, an empty list or one that is
            not ascending.
    """
    sizes = {} if np.ndim(eps) else usual_radii(images)
    sizes |= {} if eps is None else dict(eps) if isinstance(eps, Mapping) else {norm: eps}
    for name, value in sizes.items():
        check_settings(**{"each norm of eps": (name, one_of(*RADII))})
        value = value.tolist() if isinstance(value, np.ndarray | np.generic | torch.Tensor) else value
        value = convert(f"eps of {name}", value, float | list[float])
        values = tuple(value) if isinstance(value, list) else (value,)
        largest = 1 if name == "linf" else float_info.max
        if not values or list(values) != sorted(set(values)) or not 0 < values[0] <= values[-1] <= largest:
            raise ValueError(
                f"eps of {name} must be above 0 and finite (linf: at most 1, images lie in [0, 1]; 8/255?), "
                f"one number or an ascending list of at least one, got {value}"
            )
        sizes[name] = values
    return sizes


def images_of(protocol: Protocol, dataset: str, max_test: int | None = None) -> int | list[int]:
    """The test images that a protocol attacks, for ``data.load(max_test=...)``: how many, or their
    positions."""
    count = max_test or protocol.num_images
    standard = dataset in ("cifar10", "cifar100")  # in the order that the literature numbers
    if protocol.selection == "lee-kim" and standard and count <= 512:
        return np.random.RandomState(0).choice(10_000, 512, replace=False)[:count].tolist()
    return count


_STEP = 0.007 * 255 / 8  # Lee & Kim 2023: 0.007 at eps 8/255, in units of eps
_PGD = "PGD-{steps} + EOT-{eot_samples} {norm}"


def _strongest(
    steps: int, samples: int, norm: str | None = None, *, name: str = _PGD, restarts: int = 1, **row: Any
) -> Row:
    """The strongest attack of the kit for its passes."""
    options = {"steps": steps, "eot_samples": samples, "restarts": restarts}
    return Row("pgd_ensemble", name, norm, options=options, equal_passes=True, **row)


def _published(steps: int, norm: str | None = None, *, step: float = _STEP) -> Row:
    """PGD + EOT as it was published: from the image, in equal steps."""
    options = {"steps": steps, "eot_samples": 20, "start": "clean", "early_stop": 5, "shrink": False}
    return Row("pgd", f"{_PGD}, equal steps", norm, step=step, options=options)


def _transfer(steps: int) -> Row:
    return Row("pgd", "transfer PGD-{steps}", threat_model="transfer", step=_STEP, options={"steps": steps})


def _bpda(steps: int, samples: int, votes: int | None = None) -> Row:
    """As Hill et al. 2021: steps of 2/255 at eps 8/255."""
    options = {"steps": steps, "eot_samples": samples, "early_stop": 5}
    return Row("pgd", "BPDA + EOT {norm}", threat_model="bpda", step=2 / 8, votes=votes, options=options)


def _flow(samples: int, restarts: int = 10) -> Row:
    options = {"steps": 30, "eot_samples": samples, "restarts": restarts, "votes": 30}
    return Row("flow", "flow + EOT-{eot_samples}", "flow", options=options, equal_passes=True)


def _randomness(steps: int) -> tuple[Row, ...]:
    """How much randomness hides: an attacker who knows the sample of t; ever more EOT samples."""
    return (
        Row(
            "pgd_ensemble",
            "known sample of t, PGD-{steps} {norm}",
            random_only=True,
            known_sample=True,
            options={"steps": steps, "eot_samples": 1, "restarts": 1, "early_stop": 0},
        ),
        _strongest(steps, 1, name=f"{_PGD}, saturation", random_only=True),
        _strongest(steps, 5, name=f"{_PGD}, saturation", random_only=True),
    )


_UNSEEN = (
    _strongest(80, 5, "l1", restarts=10),  # few images are left after the first
    Row("occlusion", "occlusion", "occlusion", options={"eot_samples": 5}),
    Row("rotation_translation", "rotation, translation", "rotation"),
    Row("corruption", "corruptions", "corruption"),
)

# The named protocols: rows of ``attacks.ATTACKS`` with options.
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "demo",
            "one white-box attack (PGD-80 + EOT-5) and transfer beside it, 200 images; a minute on 2 cores",
            (
                _strongest(80, 5, name="transfer", threat_model="transfer"),
                _strongest(80, 5, name="white-box"),
            ),
            num_images=200,
        ),
        Protocol(
            "quick",
            "a look at five kinds of attack, each too short to be believed alone; minutes on 2 cores",
            (
                _transfer(40),
                _strongest(80, 5),
                _strongest(80, 5, "l2"),
                Row("apgd", "APGD-DLR {norm}", options={"steps": 30, "eot_samples": 10, "loss": "dlr"}),
                _bpda(20, 10),
                _flow(5, 2),
                Row("square", "Square {norm}", options={"queries": 200}),
            ),
            num_images=128,
        ),
        Protocol(
            "compare",
            "the attack of AT's and AToP's training and unseen threats, 200 images; minutes on 2 cores",
            (
                _strongest(80, 5, name="transfer", threat_model="transfer"),
                _strongest(80, 5),
                _strongest(160, 5, "l2"),
                _flow(3, 17),
                Row("square", "Square {norm}", options={"queries": 500}),
                *_UNSEEN,
            ),
            num_images=200,
        ),
        Protocol(
            "cpu",
            "the published attacks at half their length in ``strict``, 128 images; an hour on 2 cores",
            (
                _transfer(100),
                _published(100),
                _published(100, "l2"),
                Row(
                    "autoattack",
                    "AutoAttack {norm}",
                    options={"steps": 50, "eot_samples": 20, "queries": 1000},
                ),
                _bpda(25, 15),
                _flow(10),
                Row("square", "Square {norm}", options={"queries": 1000}),
            ),
            num_images=128,
        ),
        Protocol(
            "lee-kim",
            "PGD-200 + EOT-20 in both norms as Lee & Kim 2023, and transfer, 512 images; minutes on a GPU",
            # 0.005 at l2 eps 0.5: 200 of them cross the ball twice; _STEP orbits in it
            (_transfer(200), _published(200), _published(200, "l2", step=0.005 / 0.5)),
            selection="lee-kim",
        ),
        Protocol(
            "standard",
            "the strongest PGD, AutoAttack, transfer, what randomness hides, 512 images; hours on a GPU",
            (
                _transfer(100),
                _strongest(100, 20),
                _strongest(100, 20, "l2"),
                Row(
                    "autoattack",
                    "AutoAttack {norm}",
                    options={"steps": 100, "eot_samples": 20, "queries": 1000},
                ),
                *_randomness(100),
                _strongest(100, 20, name="transfer from a sister", threat_model="sister"),
            ),
        ),
        Protocol(
            "strict",
            "all at its published length, unseen threats, the 512 images of Lee & Kim; hours on a GPU",
            (
                _transfer(200),
                _published(200),
                _published(200, "l2"),
                _strongest(200, 20),
                Row(
                    "autoattack",
                    "AutoAttack {norm}",
                    options={"steps": 100, "eot_samples": 20, "queries": 5000},
                ),
                _bpda(50, 15, votes=150),
                _flow(20),
                Row("square", "Square {norm}", options={"queries": 5000}),
                *_randomness(200),
                _strongest(200, 20, name="transfer from a sister", threat_model="sister"),
                *_UNSEEN,
                Row("occlusion", "noise patch", "occlusion", options={"eot_samples": 5, "patch": "random"}),
            ),
            selection="lee-kim",
        ),
        Protocol(
            "authors-log",
            "what the log of the published code measures: attacks on f alone, shown to the defence once",
            (
                Row("fgsm", "FGSM on f", threat_model="transfer"),
                Row("pgd", "PGD-{steps} on f", threat_model="transfer", options={"steps": 20}),
                Row("autoattack", "AutoAttack on f", threat_model="transfer"),
            ),
            votes=1,
        ),
    )
}
