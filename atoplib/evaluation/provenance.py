"""What the headers of checkpoints tell of how defences were trained: on which attack, on what they share, at which cost."""

from collections.abc import Mapping
from typing import Any

from atoplib.evaluation.costs import total
from atoplib.flops import training_total

SHARED = ("dataset", "image_size", "max_train", "padding", "flip")  # by everything that is compared
OF_CLASSIFIERS = ("classifier", "classifier_options", "label_smoothing")

Header = Mapping[str, Any]
"""As ``checkpoints.read_header`` returns it."""


def _parameters(header: Header) -> Mapping[str, Any]:
    return header.get("parameters") or {}


def _was_attacked(header: Header) -> bool:
    parameters = _parameters(header)
    return bool(parameters.get("adversarial")) or parameters.get("variant") == "ft_adv"


def attacked_norms(headers: Mapping[str, Header]) -> list[str]:
    """The norms of the attacks that any of the defences was trained on, in their order."""
    return list(dict.fromkeys(_parameters(header)["norm"] for header in headers.values() if _was_attacked(header)))


def training_attack(header: Header) -> str:
    """The attack of a defence's training in words: ``none``, or ``PGD-5, linf 0.3, on the classifier``."""
    if not _was_attacked(header):
        return "none"
    parameters = _parameters(header)
    steps, sees = parameters["attack_steps"], parameters.get("attack_sees", "classifier")
    name = "FGSM" if steps == 1 else f"PGD-{steps}"
    seen = "through the whole pipeline" if sees == "pipeline" else "on the classifier"
    return f"{name}, {parameters['norm']} {parameters['eps']:.4g}, {seen}"


def differences(headers: Mapping[str, Header], first: str = "undefended") -> list[str]:
    """A sentence for each setting in which a defence's training differs from that of ``first`` although comparing them asks
    that it does not: data and augmentation; of classifiers the architecture, too.
    """
    base = _parameters(headers[first])
    found = ["AT was not trained on attacks"] if "AT" in headers and not _was_attacked(headers["AT"]) else []
    for name, header in headers.items():
        own = _parameters(header)
        names = SHARED + (OF_CLASSIFIERS if header.get("kind") == "classifier" else ())
        found += [
            f"{name} was trained with {key} {own.get(key)}, {first} with {base.get(key)}"
            for key in names
            if own.get(key) != base.get(key)
        ]
    return found


def training_costs(
    headers: Mapping[str, Header], classifiers: Mapping[str, Header] | None = None
) -> dict[str, tuple[int | None, int | None]]:
    """FLOPs of each defence's training and, apart, of its purifier's pre-training; None where one was not recorded.

    Args:
        headers: of ``undefended`` and of whatever is compared: classifiers alone, and purifiers.
        classifiers: by defence, of the classifier that its purifier stands before, where that is not the undefended one
            and not the one that it was fine-tuned for.

    Returns:
        by defence (training, pre-training), as ``Cost`` has them: what stands before a classifier costs its training, too,
        and what was trained from other weights costs theirs.
    """
    undefended = training_total(headers["undefended"].get("metrics") or {})

    def costs(name: str, header: Header) -> tuple[int | None, int | None]:
        metrics = header.get("metrics") or {}
        own = training_total(metrics)
        if header.get("kind") == "classifier":
            return own, 0
        before = undefended
        if classifiers and name in classifiers:
            before = training_total(classifiers[name].get("metrics") or {})
        if "variant" not in _parameters(header):  # pre-trained only
            return before, own
        tuned_for = metrics.get("classifier_flops", undefended)
        return total(before if classifiers and name in classifiers else tuned_for, own), metrics.get("pretrain_flops")

    return {name: costs(name, header) for name, header in headers.items()}
