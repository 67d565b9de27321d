"""Checkpoints: weights as safetensors with a JSON header, and the state of an unfinished training.

Nothing is ever unpickled without ``weights_only=True``.
"""

import hashlib
import importlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from atoplib.classifiers import Normalize, build_classifier
from atoplib.purifiers import build_purifier

FORMAT = "atoplib-checkpoint-1"
MOST_HEADER_BYTES = 10_000_000  # of names, shapes and facts; ours take some ten thousand
OF_ONES_OWN = "own: "  # begins the architecture of a network that none of our builders makes; its class follows
BUILDERS: dict[str, Callable[..., nn.Module]] = {"classifier": build_classifier, "purifier": build_purifier}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which file, why, and what to do."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` on a temporary name beside ``path``, flush to disk, then rename; an earlier file survives a failure.

    Raises:
        OSError: with the path and what to do, when the disk is full or the folder cannot be written.
    """
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        part = Path(name)
        os.close(handle)
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.chmod(0o644)
        os.replace(part, path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise OSError(
            f"could not write {path}: {error}. What was there before is untouched; free some disk space or choose "
            f"another folder, then run again"
        ) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; NaN is refused, as no other reader takes it."""
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_atomically(path, lambda part: part.write_text(text))


def save_checkpoint(
    path: Path, module: nn.Module, *, kind: str, architecture: str, options: Mapping[str, Any], **facts: Any
) -> None:
    """Save a module's weights with all that is needed to build it again.

    Args:
        path: the file, ``*.safetensors``; replaced atomically.
        kind: ``classifier`` or ``purifier``.
        architecture, options: what its builder was called with.
        facts: anything else worth keeping beside the weights (settings, data, metrics, version), as JSON.
    """
    header = {"format": FORMAT, "kind": kind, "architecture": architecture, "options": dict(options), **facts}
    tensors, extra = tensors_of(module)
    if extra:
        header["extra_state"] = extra
    header["sha256"] = digest(header, tensors)
    metadata = {"atoplib": json.dumps(header, sort_keys=True)}
    write_atomically(path, lambda part: safetensors.torch.save_file(tensors, part, metadata=metadata))


def tensors_of(module: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """What a checkpoint holds of a module: its state on the CPU, and the names of what is no tensor (``get_extra_state``),
    which is kept as bytes. Weights that share memory (tied, aliased) are written once for each of their names.

    Raises:
        CheckpointError: for what cannot be saved and loaded again.
    """
    tensors: dict[str, Tensor] = {}
    extra, places = [], set()
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            extra.append(name)
            tensors[name] = _as_bytes(value, name)
            continue
        _check_saveable_tensor(value, name)
        tensor = value.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if place in places or value._base is not None else tensor
        places.add(place)
    return tensors, extra


def check_saveable(module: nn.Module) -> None:
    """Raise CheckpointError, before an hour of training, if a network cannot be saved; nothing is written or copied."""
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            _check_saveable_tensor(value, name)
        else:
            _as_bytes(value, name)


def _check_saveable_tensor(value: Tensor, name: str) -> None:
    if isinstance(value, nn.parameter.UninitializedTensorMixin):
        raise CheckpointError(f"{name} of this network has no shape yet, so it cannot be saved: give it one batch first")
    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        what = "quantised" if value.is_quantized else "on the device meta" if value.is_meta else f"{value.layout}"
        raise CheckpointError(f"{name} of this network is {what}; only dense tensors can be saved: train it dense")


def _as_bytes(value: Any, name: str) -> Tensor:
    """A module's extra state as bytes that can be read without running any code of theirs."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception as error:  # pickling may raise anything
        raise CheckpointError(
            f"{name} of this network (from its get_extra_state) is a {type(value).__name__}, which cannot be saved and loaded "
            f"without running code; let get_extra_state return numbers, texts, lists, dicts and tensors alone"
        ) from error
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a checkpoint's content: its facts, but for the digest itself, and every name, type, shape and number."""
    facts = json.loads(json.dumps({name: value for name, value in header.items() if name != "sha256"}))
    hashed = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.flatten().view(torch.uint8).numpy())
    return hashed.hexdigest()


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a checkpoint, without its weights.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if the file is truncated, is no safetensors file (a pickle is never opened), or is not ours.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}; run the notebook that writes it first")
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
        if size > MOST_HEADER_BYTES:
            raise CheckpointError(
                f"{path} is not a whole safetensors file: it announces a header of {size} bytes, allowed are "
                f"{MOST_HEADER_BYTES}. Do not use it"
            )
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); it is truncated, damaged or of another format. "
            f"Delete it and run the notebook that writes it again"
        ) from error
    try:
        header = json.loads(metadata["atoplib"])
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} holds no atoplib header; was it written by another program?") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not of format {FORMAT}; it was written by another version of atoplib")
    return header


def load_checkpoint(path: Path, *, kind: str, device: torch.device | str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """Build the module that a checkpoint holds, in eval mode, with its header.

    Raises FileNotFoundError and CheckpointError as ``load_built`` does.
    """
    return load_built(path, BUILDERS[kind], kind=kind, device=device)


def load_built(
    path: Path, builder: Callable[..., nn.Module], *, kind: str, device: torch.device | str = "cpu"
) -> tuple[nn.Module, dict[str, Any]]:
    """``load_checkpoint`` with a builder of one kind, so that code which calls it depends on that kind alone.

    Nothing as large as the file asks for is allocated before the file was seen to hold it.

    Args:
        builder: called with the architecture's name and, by name, its options.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if the file is damaged, of another kind, or its weights do not fit its own header.
    """
    path = Path(path)
    header = read_header(path)
    if header.get("kind") != kind:
        raise CheckpointError(f"{path} holds a {header.get('kind')}, not a {kind}")

    def build() -> nn.Module:
        return builder(header["architecture"], **header["options"])

    try:
        with torch.device("meta"):
            expected = build().state_dict()
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        if str(header.get("architecture")).startswith(OF_ONES_OWN):
            raise CheckpointError(
                f"{path} holds a {kind} of one's own ({header['architecture'].removeprefix(OF_ONES_OWN)}), which only its "
                f"author can build: load it by checkpoints.load_own(path, make, kind={kind!r}) and give it to the stage or "
                f"to the defences"
            ) from error
        raise CheckpointError(f"{path} names an architecture that cannot be built: {error}") from error
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}
        extra = set(header.get("extra_state", ()))
        shapes = {name: shape for name, shape in shapes.items() if name not in extra}
        check_shapes({name: tensor.shape for name, tensor in expected.items() if isinstance(tensor, Tensor)}, shapes, path)
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): delete it and run the notebook that writes it") from error
    if header.get("sha256", "") not in ("", digest(header, tensors)):
        raise CheckpointError(
            f"{path} is damaged: its content is not what was saved. Delete it and run the notebook that writes it again"
        )
    module = build()
    load_weights(module, tensors, path, extra)
    return module.to(device).eval(), header


def load_own(path: Path, make: Callable[[], nn.Module], *, kind: str, device: torch.device | str = "cpu") -> nn.Module:
    """A network of one's own, trained by a notebook, in eval mode.

    Args:
        make: builds it; called twice, the first time for shapes alone.

    Raises FileNotFoundError and CheckpointError as ``load_built`` does.
    """
    return load_built(path, lambda name, **options: make(), kind=kind, device=device)[0]


def holds(path: Path, module: nn.Module) -> bool:
    """Whether a file is an undamaged checkpoint of the very weights that a module has."""
    try:
        header, tensors = read_header(path), safetensors.torch.load_file(path)
    except (OSError, CheckpointError, safetensors.SafetensorError):
        return False
    own, _ = tensors_of(module)
    return (
        header.get("sha256") == digest(header, tensors)
        and own.keys() == tensors.keys()
        and all(torch.equal(own[name], tensor) for name, tensor in tensors.items())
    )


def load_weights(
    module: nn.Module, tensors: Mapping[str, Any], source: Path, extra: Sequence[str] | set[str] = ()
) -> None:
    """Copy weights into a module; every name and shape must fit (CheckpointError says which one does not).

    ``extra`` are the names that hold a module's extra state as bytes (``tensors_of``).
    """
    expected = {name: tensor.shape for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}
    found = {name: tensor.shape for name, tensor in tensors.items() if name not in extra and isinstance(tensor, Tensor)}
    check_shapes(expected, found, source)
    try:
        states = {name: torch.load(io.BytesIO(tensors[name].numpy().tobytes()), weights_only=True) for name in extra}
        module.load_state_dict({**tensors, **states})
    except Exception as error:  # a damaged state may raise anything
        raise CheckpointError(f"the weights in {source} cannot be put into the network: {error}") from error


def has_own_header(path: Path) -> bool:
    """Whether a file is a checkpoint of the kit's own form (whole or not), in contrast to somebody's weights."""
    try:
        read_header(path)
    except CheckpointError:
        return False
    return True


def load_foreign(
    path: Path,
    factory: str | Callable[..., nn.Module],
    options: Mapping[str, Any] | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """A network from weights that another program saved, in eval mode: images in [0, 1] -> logits. No pickle is run.

    Args:
        path: a state dict, ``.pth`` or ``.pt`` (also below ``state_dict``, ``model`` or ``net``) or ``.safetensors``;
            ``module.`` in front of its names is taken off.
        factory: what builds the network: a callable, or ``"package.module:function"``.
        options: its keyword arguments.
        mean, std: per channel, of images in [0, 1], of the normalisation that is put in front; None: the network has its own.

    Raises:
        FileNotFoundError: if there is no file.
        CheckpointError: for a factory that is not there or cannot build, and weights that cannot be read or do not fit.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give the path of .pth, .pt or .safetensors weights")
    if (mean is None) != (std is None):
        raise CheckpointError(f"mean and std belong together, got mean={mean} and std={std}; give both or neither")
    name = factory if isinstance(factory, str) else getattr(factory, "__qualname__", repr(factory))
    build = _factory(factory) if isinstance(factory, str) else factory
    tensors = _foreign_state(path)
    try:
        network = build(**(options or {}))
    except Exception as error:  # somebody's code
        raise CheckpointError(f"{name} cannot build a network with the options {dict(options or {})}: {error}") from error
    if not isinstance(network, nn.Module):
        raise CheckpointError(f"{name} must return a torch.nn.Module, but it returned a {type(network).__name__}")
    load_weights(network, tensors, path)
    if mean is not None and std is not None:
        network = nn.Sequential(Normalize(mean, std), network)
    return network.to(device).eval()


def _factory(name: str) -> Callable[..., nn.Module]:
    """The callable that ``package.module:function`` names; the dotted part after the colon may be nested."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise CheckpointError(
            f"a factory is given as 'package.module:function', such as 'torchvision.models:resnet18', got {name!r}"
        )
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(f"the factory {name!r} cannot be found ({error}); is its package installed?") from error
    if not callable(found):
        raise CheckpointError(f"the factory {name!r} is a {type(found).__name__}, not a function that builds a network")
    return found


def _foreign_state(path: Path) -> dict[str, Any]:
    """The state dict in somebody's file, without ``module.`` in front of its names."""
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files and refused pickles raise all kinds
        raise CheckpointError(
            f"{path} cannot be read as weights ({_first_line(error)}); allowed are state dicts (torch.save(model.state_dict(), "
            f"path)) and .safetensors, for whole pickled models run code"
        ) from error
    for key in ("state_dict", "model", "net"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dict, neither itself nor below state_dict, model or net")
    if all(str(name).startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return dict(state)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def check_shapes(expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size], source: Path) -> None:
    """Raise CheckpointError unless a file's tensors have the names and shapes that the architecture has."""
    missing, surplus = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    wrong = [name for name in expected if name in found and found[name] != expected[name]]
    if missing or surplus or wrong:
        example = (missing or surplus or wrong)[0]
        raise CheckpointError(
            f"the weights in {source} belong to another architecture: {len(missing)} missing, {len(surplus)} unknown, "
            f"{len(wrong)} of another shape (for example {example!r})"
        )


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Save a training's state (tensors, numbers, strings, lists, dicts), keeping the one before as ``*.previous``."""
    newest = path.with_name(path.name + ".newest")
    write_atomically(newest, lambda part: torch.save(state, part))
    # Only now, with the new state safe on the disk: a disk that is full leaves both older ones where they are.
    if path.exists():
        os.replace(path, path.with_name(path.name + ".previous"))
    os.replace(newest, path)


def load_state(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The newest readable state, and a sentence if it is not the newest one; (None, None) if there is none.

    Raises:
        CheckpointError: if states are there, but none of them can be read.
    """
    problems = []
    # *.newest is there, and whole, when a process was killed between its writing and its renaming.
    for candidate in (path.with_name(path.name + ".newest"), path, path.with_name(path.name + ".previous")):
        if not candidate.is_file():
            continue
        try:
            with zipfile.ZipFile(candidate) as records:  # torch itself does not compare the checksums that it writes
                damaged = records.testzip()
            if damaged is not None:
                raise ValueError(f"{damaged} is damaged")
            state = torch.load(candidate, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise TypeError(f"it holds a {type(state).__name__}, not a state")
        except Exception as error:  # a damaged file may raise anything: EOFError, RuntimeError, UnpicklingError, ...
            reason = next(iter(str(error).splitlines()), "")
            problems.append(f"{candidate} cannot be read ({type(error).__name__}: {reason})")
            continue
        return state, f"{problems[0]}; went on from the state before it" if problems else None
    if problems:
        raise CheckpointError(f"{'; '.join(problems)}. Delete the run directory to start anew")
    return None, None
