"""Checkpoints: weights as safetensors with a JSON header, somebody's weights, and the state of an unfinished
training.

Nothing is ever unpickled without ``weights_only=True``, and no header makes code of another package run.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from atoplib import classifiers, contract, files, freezing, purifiers

FORMAT = "atoplib-checkpoint-1"
CUSTOM = "custom: "  # begins the architecture of a network that none of our builders makes; its class follows
BUILDERS: dict[str, Callable[..., nn.Module]] = {"classifier": classifiers.build, "purifier": purifiers.build}
WRAPPERS = ("module.", "_orig_mod.")  # in front of names, by DataParallel and torch.compile


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which file, why, and what to do."""


def save(
    path: Path, module: nn.Module, *, kind: str, architecture: str, options: Mapping[str, Any], **facts: Any
) -> None:
    """Save a module's weights with all that is needed to build it again; the same content, the same bytes.

    Args:
        path: the file, ``*.safetensors``; replaced atomically.
        kind: ``classifier`` or ``purifier``.
        architecture, options: what its builder was called with. Where that makes another network than this
            one, ``CUSTOM`` and the name of its class are written instead.
        facts: anything else worth keeping beside the weights (transform, parameters, metrics), as JSON. With
            ``encoder_file`` the encoder's weights are left to that file (``load``).

    Raises:
        CheckpointError: for what cannot be saved. OSError: where the file cannot be written.
    """
    if not _is_built_by(kind, architecture, options, module):
        architecture, options = CUSTOM + type(module).__name__, {}
    header = {"format": FORMAT, "kind": kind, "architecture": architecture, "options": dict(options), **facts}
    tensors, header["extra_state"] = tensors_of(module)
    if "encoder_file" in facts:
        tensors = {name: value for name, value in tensors.items() if not name.startswith("encoder.")}
    header["sha256"] = _digest(header, tensors)
    metadata = {"atoplib": json.dumps(header, sort_keys=True)}
    files.write_atomically(
        Path(path), lambda part: safetensors.torch.save_file(tensors, part, metadata=metadata)
    )


def _is_built_by(kind: str, architecture: str, options: Mapping[str, Any], module: nn.Module) -> bool:
    """Whether the builder makes this very network: parts of the same types, weights of the same shapes."""
    try:
        with torch.device("meta"):
            return _form(BUILDERS[kind](architecture, **options)) == _form(module)
    except Exception:  # a factory may be somebody's code
        return False


def _form(network: nn.Module) -> tuple[list[Any], dict[str, torch.Size]]:
    return [(name, type(part)) for name, part in network.named_modules()], _shapes(network.state_dict())


def _shapes(state: Mapping[str, Any], extra: Collection[str] = ()) -> dict[str, torch.Size]:
    """The shapes of a state's tensors, without those that hold an ``extra`` state."""
    return {name: v.shape for name, v in state.items() if isinstance(v, Tensor) and name not in extra}


def tensors_of(module: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """A copy of a module's state on the CPU, and the names of what is no tensor (``get_extra_state``), kept
    as bytes. Weights that share memory (tied, aliased) are copied once for each of their names."""
    tensors, extra = {}, []
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            extra.append(name)
            value = _as_bytes(value, name)
        if (
            isinstance(value, nn.parameter.UninitializedTensorMixin)
            or value.layout is not torch.strided
            or value.is_quantized
            or value.is_meta
        ):
            raise CheckpointError(
                f"{name} of this network is no dense tensor of known shape, and only such can be saved: give "
                "a lazy network one batch first, and train it dense"
            )
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, extra


def _as_bytes(value: Any, name: str) -> Tensor:
    """A module's extra state as bytes that can be loaded without running any code of theirs."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception as error:  # pickling may raise anything
        raise CheckpointError(
            f"{name} of this network (from its get_extra_state) is a {type(value).__name__}, which cannot be "
            "saved and loaded without running code; let get_extra_state return numbers, texts, lists, dicts "
            "and tensors alone"
        ) from error
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a checkpoint's content: its facts, but for the digest itself, and every name, type, shape
    and number."""
    facts = {name: value for name, value in header.items() if name != "sha256"}
    hashed = hashlib.sha256(json.dumps(json.loads(json.dumps(facts)), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.flatten().view(torch.uint8).numpy())
    return hashed.hexdigest()


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a checkpoint, without its weights.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if the file is truncated, is no safetensors file (a pickle is never opened), or is
            not ours.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}; run the notebook that writes it first")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); it is truncated, damaged or of another "
            "format. Delete it and run the notebook that writes it again"
        ) from error
    with suppress(KeyError, TypeError, ValueError, RecursionError):
        header = json.loads(metadata["atoplib"])
        if header["format"] == FORMAT:
            return header
    raise CheckpointError(
        f"{path} has no header of format {FORMAT}; it was written by another program, or another version of "
        "atoplib"
    )


def load(
    path: Path, *, kind: str, device: torch.device | str = "cpu", build: Callable[[], nn.Module] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The module that a checkpoint holds, in eval mode, with its header.

    Nothing as large as the file asks for is allocated before the file was found to hold it. A purifier whose
    encoder is a classifier of the same folder may leave that to it: its header then has ``encoder_file``, the
    classifier's file, and ``encoder_sha256``, that file's own.

    Args:
        build: makes the network, in place of the builder that the header names; called twice, first for
            shapes alone.

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if the file is damaged, of another kind, or its weights do not fit its own header.
    """
    header = read_header(path)
    if header.get("kind") != kind:
        raise CheckpointError(f"{path} holds a {header.get('kind')}, not a {kind}")
    name = str(header.get("architecture"))
    if build is None and ":" in name:  # "package.module:function", too: a file must not choose what is run
        raise CheckpointError(
            f"{path} holds a custom {kind} ({name.rpartition(': ')[2]}), which only its author can build: "
            f"load it by checkpoints.load(path, kind={kind!r}, build=MAKE), where MAKE() builds the network"
        )
    make = build or (lambda: BUILDERS[kind](name, **header["options"]))
    try:
        tensors, extra = safetensors.torch.load_file(path), set(header.get("extra_state", ()))
        borrowed = _encoder_of(header, path)
        with torch.device("meta"):
            expected = _shapes(make().state_dict())
    except Exception as error:  # whatever a damaged file or a builder raises
        raise CheckpointError(
            f"{path} holds no network that can be built: {contract.first_line(error)}"
        ) from error
    _check_shapes(expected, _shapes(borrowed | tensors, extra), path)
    if header.get("sha256", "") not in ("", _digest(header, tensors)):
        raise CheckpointError(
            f"{path} is damaged: its content is not what was saved. Delete it and run the notebook that "
            "writes it again"
        )
    module = make()
    load_weights(module, borrowed | tensors, path, extra)
    return module.to(device).eval(), header


def _encoder_of(header: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The weights of the encoder that a purifier's file leaves to a classifier's."""
    if "encoder_file" not in header:
        return {}
    beside = path.with_name(Path(header["encoder_file"]).name)
    if not beside.is_file() or read_header(beside)["sha256"] != header["encoder_sha256"]:
        raise CheckpointError(
            f"its encoder, {beside.name}, is another one than it was trained on, or not in its folder"
        )
    classifier, _ = load(beside, kind="classifier")
    return {
        f"encoder.{name}": weight
        for name, weight in purifiers.encoder_weights(freezing.freeze(classifier)).items()
    }


def load_weights(
    module: nn.Module, tensors: Mapping[str, Any], source: Path, extra: Collection[str] = ()
) -> None:
    """Copy weights into a module; every name and shape must fit (CheckpointError says which one does not).

    ``extra`` are the names that hold a module's extra state as bytes.
    """
    _check_shapes(_shapes(module.state_dict()), _shapes(tensors, extra), source)
    try:
        states = {name: torch.load(io.BytesIO(tensors[name].numpy()), weights_only=True) for name in extra}
        module.load_state_dict({**tensors, **states})
    except Exception as error:  # a damaged state may raise anything
        raise CheckpointError(f"the weights in {source} cannot be put into the network: {error}") from error


def _check_shapes(expected: dict[str, torch.Size], actual: dict[str, torch.Size], source: Path) -> None:
    """Raise CheckpointError unless a file's tensors have the names and shapes of a state."""
    missing, surplus = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
    wrong = [name for name in expected if name in actual and actual[name] != expected[name]]
    if missing or surplus or wrong:
        raise CheckpointError(
            f"the weights in {source} belong to another architecture: {len(missing)} missing, {len(surplus)} "
            f"unknown, {len(wrong)} of another shape (for example {(missing or surplus or wrong)[0]!r})"
        )


def load_foreign(
    path: Path,
    factory: str | Callable[..., nn.Module],
    options: Mapping[str, Any] | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """A network from somebody's weights, in eval mode: images in [0, 1] -> logits. No pickle is run.

    Args:
        path: a state dict, ``.pth`` or ``.pt`` (also below ``state_dict``, ``model_state_dict``, ``model`` or
            ``net``) or ``.safetensors``; what DataParallel and torch.compile put in front of its names
            (``WRAPPERS``) is taken off where they do not fit as they are.
        factory: what builds the network: a callable, or ``"package.module:function"``.
        options: its keyword arguments.
        mean, std: per channel, of images in [0, 1], of the normalisation that is put in front; None: the
            network has its own.

    Raises:
        FileNotFoundError, CheckpointError: for the file. ValueError: for a factory that cannot build.
    """
    tensors = _read_state(Path(path))
    network = classifiers.build_custom(factory, options or {})
    expected, _ = tensors_of(network)
    while not expected.keys() & tensors.keys():
        prefix = next((each for each in WRAPPERS if all(name.startswith(each) for name in tensors)), None)
        if prefix is None:
            break
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    counted = {name: value for name, value in expected.items() if name.endswith("num_batches_tracked")}
    load_weights(network, counted | tensors, path)  # old files lack these
    if mean is not None or std is not None:
        network = nn.Sequential(classifiers.Normalize(mean, std), network)
    return network.to(device).eval()


def _read_state(path: Path) -> dict[str, Any]:
    """The state dict in somebody's file."""
    path = path.expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}; give the path of .pth, .pt or .safetensors weights"
        )
    try:
        if path.suffix.lower() == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files and refused pickles raise all kinds
        raise CheckpointError(
            f"{path} cannot be read as weights ({contract.first_line(error)}); allowed are state dicts "
            "(torch.save(model.state_dict(), path)) and .safetensors, for whole pickled models run code"
        ) from error
    for key in ("state_dict", "model_state_dict", "model", "net", "G"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"{path} holds no state dict, neither itself nor below state_dict, model_state_dict, model or net"
        )
    return {str(name): value for name, value in state.items()}


def load_deepfill(path: Path) -> purifiers.DeepFillV2:
    """A DeepFillv2 generator, on the CPU, in float32, from a public file (``states_pt_*.pth``, under the key
    ``G``), an AToP checkpoint (its names after ``generator.``) or a bare state dict; errors as
    ``load_foreign``."""
    state = {name.removeprefix("module."): value for name, value in _read_state(Path(path)).items()}
    prefix = "generator." if any(name.startswith("generator.") for name in state) else ""
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    shape = getattr(state.get("stage1.conv1.conv.weight"), "shape", ())
    if len(shape) != 4 or shape[1:] != (5, 5, 5):
        raise CheckpointError(
            f"{path} holds no DeepFillv2 generator with the names of states_pt_places2.pth (states_tf_*.pth "
            "pads differently: take the states_pt_*.pth file of the same training)"
        )
    generator = purifiers.DeepFillV2(shape[0])
    load_weights(generator, state, path)
    if not torch.equal(generator.stage2.contextual_attention.fuse_weight[0, 0], torch.eye(3)):
        raise CheckpointError(
            f"{path}: its fuse_weight is not the 3x3 identity, so it belongs to another arithmetic"
        )
    return generator


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Save a training's state (tensors, numbers, strings, lists, dicts), keeping the one before as
    ``*.previous``."""
    newest = path.with_name(path.name + ".newest")
    files.write_atomically(newest, lambda part: torch.save(dict(state), part))
    # Only now, with the new state safe on the disk: a disk that is full leaves both older ones where they
    # are.
    _take_over(newest, path)


def _take_over(newest: Path, path: Path) -> None:
    if path.exists():
        path.replace(path.with_name(path.name + ".previous"))
    newest.replace(path)


def load_state(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The newest readable state, and a sentence if it is not the newest one; (None, None) if there is none.

    Raises:
        CheckpointError: if states are there, but none of them can be read.
    """
    problems = []
    # *.newest is there, and whole, when a process was killed between its writing and its renaming.
    candidates = [path.with_name(path.name + end) for end in (".newest", "", ".previous")]
    for candidate in filter(Path.is_file, candidates):
        try:
            # Torch itself does not compare the checksums that it writes.
            with zipfile.ZipFile(candidate) as records:
                if records.testzip() is not None:
                    raise ValueError("a checksum does not fit")
            state = torch.load(candidate, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file may raise anything
            problems.append(
                f"{candidate} cannot be read ({type(error).__name__}: {contract.first_line(error)})"
            )
        else:
            if candidate.suffix == ".newest":
                _take_over(candidate, path)
            return state, f"{problems[0]}; went on from the state before it" if problems else None
    if problems:
        raise CheckpointError(f"{'; '.join(problems)}. Delete the run directory to start anew")
    return None, None
