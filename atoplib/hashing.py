"""What a result depends on, as short digests: the one place that decides whether something is still the same.

Values, files, tensors, the package's own sources, functions of a notebook's cells, networks, and what
computes. torch is imported only where a tensor or a network is asked about, so that a batch starts at once.
"""

import ast
import contextlib
import dis
import functools
import hashlib
import importlib
import json
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from atoplib.files import is_data
from atoplib.parameters import Parameters

PACKAGE = Path(__file__).resolve().parent
SHOWS_ONLY = ("batch", "explorer", "figures", "progress", "runs")
"""Parts of the package that change no number: they show, keep or start what others compute."""
NO_IDENTITY = ("workspace", "data_dir", "device", "keep_every")
"""Parameters that tell where a result is made and kept, and do not change what it is."""
GIVEN = "_given"
"""The attribute by which a network remembers with which weights it was given to a training."""
NO_ATTRIBUTES = (
    "seed", "training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_generators",
    GIVEN,
)  # fmt: skip
NO_MEMBERS = (
    "__dict__", "__weakref__", "__module__", "__doc__", "__firstlineno__", "__static_attributes__",
    "__slotnames__",  # that copyreg keeps there
)  # fmt: skip
PLAIN = (
    "argparse", "builtins", "collections", "datetime", "decimal", "fractions", "functools", "itertools",
    "operator", "re", "torchvision", "types",
)  # fmt: skip
"""Libraries whose objects are told apart by what a copy of them would carry over."""
LIBRARIES = tuple(f"{Path(sysconfig.get_path(name)).resolve()}/" for name in ("stdlib", "platlib", "purelib"))


def _short(*parts: bytes | str) -> str:
    encoded = (part if isinstance(part, bytes) else part.encode() for part in parts)
    return hashlib.sha256(b"".join(part + b"\0" for part in encoded)).hexdigest()[:16]


def json_hash(value: Any) -> str:
    """16 hex digits of a JSON value, whatever the order of its keys."""
    return _short(json.dumps(value, sort_keys=True))


def path_hash(path: Path) -> str:
    """The SHA-256 of a file; of a folder, a digest of the names, sizes and times of all files in it, hidden
    ones and what is no data aside.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = [each for each in sorted(path.rglob("*")) if each.is_file() and is_data(each.relative_to(path))]
    facts = [(str(file.relative_to(path)), file.stat()) for file in files]
    return json_hash([[name, stat.st_size, stat.st_mtime_ns] for name, stat in facts])


def tensor_hash(tensor: Any) -> str:
    """16 hex digits of a tensor's type, shape and bytes."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    return _short(
        f"{tensor.dtype} {tuple(tensor.shape)}", tensor.flatten().view(torch.uint8).numpy().tobytes()
    )


def environment(device: Any = "cpu") -> dict[str, str]:
    """What computes: another release of torch, or another kind of device, gives other numbers."""
    import torch

    return {"torch": torch.__version__, "device": torch.device(device).type, "python": sys.version.split()[0]}


def code_hash(module: str) -> str:
    """16 hex digits of the source of a module of atoplib, and of all modules of atoplib that it imports,
    directly or through others; but for ``SHOWS_ONLY``.

    Of a module that this process has imported, the source counts that was there when it was first asked
    about, or reloaded.
    """
    found: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _source(name)
        if name not in found and path is not None and name.partition(".")[2].split(".")[0] not in SHOWS_ONLY:
            found[name] = _text_when_imported(name, path)
            waiting += _imports(found[name])
    return json_hash(found)


def notebook_hash(notebook: Path) -> str:
    """16 hex digits of a notebook's code cells but its parameters, and of all of atoplib that they import."""
    cells = [c for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    sources = ["".join(c["source"]) for c in cells if "parameters" not in c["metadata"].get("tags", [])]
    lines = [line for source in sources for line in source.splitlines()]
    plain = "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))
    imported = {name: path for name in _imports(plain) if (path := _source(name))}
    # What a notebook imports itself counts even where it only shows.
    texts = {name: code_hash(name) + _text_when_imported(name, path) for name, path in imported.items()}
    return json_hash([sources, texts])


def _source(module: str) -> Path | None:
    stem = PACKAGE.joinpath(*module.split(".")[1:])
    return next((path for path in (stem / "__init__.py", stem.with_suffix(".py")) if path.is_file()), None)


def _text_when_imported(name: str, path: Path) -> str:
    # another object after a reload; of a module that is not imported, nothing is kept
    spec = getattr(sys.modules.get(name), "__spec__", types.SimpleNamespace())
    if not hasattr(spec, "_atoplib_source"):
        spec._atoplib_source = path.read_text(encoding="utf-8")
    return spec._atoplib_source


@functools.lru_cache(maxsize=512)
def _imports(source: str) -> tuple[str, ...]:
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(name for name in names if name.split(".")[0] == "atoplib")


def function_hash(function: Callable[..., Any]) -> str:
    """16 hex digits of a function as it would run now: its code, constants, defaults, closure, and every
    global that it refers to, followed through functions and classes of one's own; networks by ``model_hash``,
    tensors by content, the package's functions by ``code_hash``.
    """
    return _short(*_walk(function, {}))


def _walk(value: Any, seen: dict) -> Iterator[str]:
    """Texts that tell a value from another. ``seen`` keeps what was met, for circles and so that no id is
    used twice.
    """
    if isinstance(value, bool | int | float | complex | str | bytes | type(None) | slice | range | Path):
        yield f"{type(value).__name__} {value!r}"
        return
    if id(value) in seen:
        yield f"again {seen[id(value)][0]}"
        return
    seen[id(value)] = len(seen), value
    match value:
        case types.FunctionType():
            yield from _walk_function(value, seen)
        case functools.partial():
            yield from _walk((value.func, value.args, value.keywords), seen)
        case types.MethodType():
            yield from _walk((value.__func__, value.__self__), seen)
        case types.CodeType():
            names = (value.co_name, value.co_names, value.co_varnames, value.co_freevars)
            yield f"{value.co_code.hex()} {names}"
            yield from _walk(value.co_consts, seen)
        case types.ModuleType():
            yield f"module {value.__name__} {_module_code(value.__name__)}"
            if _is_own(value.__name__):
                yield from _walk({name: each for name, each in vars(value).items() if name[:2] != "__"}, seen)
        case type():
            yield f"class {value.__module__}.{value.__qualname__}"
            yield from _walk_class(value, seen)
        case Mapping():
            yield f"{type(value).__name__} of {len(value)}"
            for key in sorted(value, key=repr):
                yield from _walk((key, value[key]), seen)
        case list() | tuple() | set() | frozenset():
            yield f"{type(value).__name__} of {len(value)}"
            for item in sorted(value, key=repr) if isinstance(value, set | frozenset) else value:
                yield from _walk(item, seen)
        case _:
            yield from _walk_object(value, seen)


def _walk_function(function: types.FunctionType, seen: dict) -> Iterator[str]:
    module = function.__module__ or ""
    yield f"function {module}.{function.__qualname__} {_module_code(module)}"
    if not _is_own(module):
        return
    code, space = function.__code__, function.__globals__
    yield from _walk([code, function.__defaults__, function.__kwdefaults__], seen)
    for cell in function.__closure__ or ():
        try:
            yield from _walk(cell.cell_contents, seen)
        except ValueError:
            yield "empty cell"  # of a function that refers to itself, not yet bound
    steps = list(_instructions(code))
    for name in sorted({step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}):
        if name in space:  # an attribute of that name is not looked up there
            yield name
            yield from _walk(space[name], seen)
    for level, names, step in zip(steps, steps[1:], steps[2:], strict=False):
        if step.opname == "IMPORT_NAME":
            for imported in _imported(step.argval, names.argval, level.argval, space.get("__package__")):
                yield from _walk(imported, seen)


def _instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    """Of code, and of the functions that are defined in it."""
    yield from (step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG")
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _instructions(constant)


def _imported(name: str, names: tuple[str, ...] | None, level: int, package: str | None) -> Iterator[Any]:
    """What ``from name import names`` imports, relative to a package by so many dots: modules, also those in
    them. What cannot be imported is left out: the call will tell."""
    for each in (name.split(".")[0], name, *(f"{name}.{inner}".lstrip(".") for inner in names or ())):
        with contextlib.suppress(Exception):  # whatever a module raises
            yield importlib.import_module("." * level + each, package)


def _walk_class(kind: type, seen: dict) -> Iterator[str]:
    yield _module_code(kind.__module__)
    if _is_own(kind.__module__):
        for name, member in sorted(vars(kind).items()):
            if name not in NO_MEMBERS:
                yield name
                yield from _walk(getattr(member, "__func__", getattr(member, "fget", member)), seen)
        yield from _walk(kind.__bases__, seen)


def _walk_object(value: Any, seen: dict) -> Iterator[str]:
    import numpy
    import torch

    kind = type(value)
    match value:
        case torch.nn.Module():
            yield f"network {model_hash(value)}"
        case torch.Tensor():
            yield f"tensor {tensor_hash(value)}"
        case torch.Generator():
            yield f"generator {value.device}"  # its state moves; where it decides, it is seeded
        case Parameters():
            kept = {name: item for name, item in value.as_dict().items() if name not in NO_IDENTITY}
            yield from _walk(kept, seen)
        case _ if hasattr(value, "__array_interface__"):  # of NumPy, Pillow
            array = numpy.asarray(value)
            yield f"array {array.dtype} {array.shape} {_short(array.tobytes())}"
        case _ if kind.__module__.startswith(tuple(f"atoplib.{name}" for name in SHOWS_ONLY)):
            yield kind.__qualname__
        case _:
            yield f"{kind.__module__}.{kind.__qualname__}"
            if _is_own(kind.__module__):
                yield from _walk(kind, seen)
            if _is_own(kind.__module__) or kind.__module__.split(".")[0] in ("atoplib", *PLAIN):
                yield from _walk([getattr(value, "__dict__", None), _carried(value)], seen)
            elif kind.__module__ in ("torch", "numpy"):  # dtypes, devices
                yield repr(value)


def _carried(value: Any) -> Any:
    """What a copy of an object would carry over, slots and items among it; of what cannot be copied (a lock,
    a file) nothing."""
    if hasattr(value, "__wrapped__"):  # functools.lru_cache
        return value.__wrapped__
    try:
        parts = value.__reduce_ex__(4)
    except Exception:  # whatever somebody's class raises
        return None
    return parts if isinstance(parts, str) else [*parts[1:3], *(list(each or ()) for each in parts[3:5])]


def _is_own(module: str) -> bool:
    """Whether a module is the user's: a notebook, a script, a file of theirs; not atoplib, nor an installed
    library.
    """
    file = getattr(sys.modules.get(module), "__file__", None)
    known = module.split(".")[0] in ("atoplib", "builtins", "torch")
    library = known or file is None or str(Path(file).resolve()).startswith(LIBRARIES)
    return module in ("__main__", "") or not library


def _module_code(module: str) -> str:
    """What tells a module's code: sources of atoplib, the file of the user's own, a library's version."""
    root = module.split(".")[0]
    if root == "atoplib":
        return code_hash(module)
    if _is_own(module):
        file = Path(getattr(sys.modules.get(module), "__file__", None) or "")
        return path_hash(file) if module != "__main__" and file.is_file() else ""
    return str(getattr(sys.modules.get(root), "__version__", ""))


def model_hash(model: Any, images: Any = None) -> str:
    """16 hex digits of a network: structure, weights, the code of its classes, what its parts keep as
    attributes, hooks and replaced functions among them; but for its mode and its seed, which a training or an
    evaluation sets.

    Where a part is neither torch's nor the kit's, also of what the whole answers to probe images, or to the
    first of ``images`` (B, C, H, W) where it takes none of those: what is kept where none of this looks
    changes an answer. A network that answers the same images differently is random, and its answers do not
    count.
    """
    import torch

    from atoplib.probing import answers

    if not isinstance(model, torch.nn.Module):
        return function_hash(model)
    parts = [f"{type(model).__qualname__} {model!r}"]
    own = False
    for name, part in model.named_modules():
        kind = type(part).__module__.split(".")[0]
        own |= kind not in ("atoplib", "torch", "torchvision") or isinstance(part, torch.jit.ScriptModule)
        kept = {key: value for key, value in vars(part).items() if _decides(key, value)}
        # hooks in their order, without the numbers that torch counts up
        hooks = {key: value for key, value in kept.items() if "_hooks" in key and isinstance(value, Mapping)}
        kept |= {key: list(value.values()) for key, value in hooks.items()}
        parts += [name, *_walk_class(type(part), {}), *_walk(kept, {id(model): (0, model)})]
    for name, value in model.state_dict().items():
        parts.append(f"{name} {tensor_hash(value) if isinstance(value, torch.Tensor) else repr(value)}")
    return _short(*parts, *(answers(model, images) if own else ()))


def _decides(name: str, value: Any) -> bool:
    """Whether an attribute of a part is worth a look: not its weights, parts and seed, nor empty tables."""
    empty = isinstance(value, bool | int | str | dict | list | tuple | set | None) and not value
    scripted = type(value).__name__ in ("ScriptModule", "ScriptMethod")  # repr is an address; answers tell
    return not scripted and name not in NO_ATTRIBUTES and not (name.startswith("_") and empty)
