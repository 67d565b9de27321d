"""What a result depends on, as short digests: the one place that decides whether something is still the same.

Values, files, tensors, the package's own sources, functions of a notebook's cells, networks, and what
computes. torch is imported only where a tensor or a network is asked about, so that a batch starts at once.
"""

import ast
import dis
import functools
import hashlib
import importlib
import json
import os
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from atoplib.files import NOT_OF_THE_DATA

PACKAGE = Path(__file__).resolve().parent
SHOWS_ONLY = ("batch", "explorer", "figures", "progress", "runs")
"""Parts of the package that change no number: they show, keep or start what others compute."""
NO_IDENTITY = ("workspace", "data_dir", "device", "keep_every")
"""Parameters that tell where a result is made and kept, and do not change what it is."""
NO_ATTRIBUTES = (
    "seed", "training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_generators",
)  # fmt: skip
NO_MEMBERS = ("__dict__", "__weakref__", "__module__", "__doc__", "__firstlineno__", "__static_attributes__")
NO_MEMBERS += ("__slotnames__",)  # that copyreg keeps there
PLAIN = ("argparse", "builtins", "collections", "datetime", "decimal", "fractions", "functools", "itertools")
PLAIN += ("operator", "re", "torchvision", "types")
"""Libraries whose objects are told apart by what a copy of them would carry over."""
LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "platlib", "purelib"))


def _short(*parts: bytes | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def json_hash(value: Any) -> str:
    """16 hex digits of a JSON value, whatever the order of its keys."""
    return _short(json.dumps(value, sort_keys=True))


def file_hash(path: Path) -> str:
    """The SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def path_hash(path: Path) -> str:
    """The SHA-256 of a file; of a folder, of the names, sizes and times of all files in it, hidden ones
    and what is no data aside.
    """
    if path.is_file():
        return file_hash(path)
    listing = []
    for folder, folders, files in os.walk(path):
        folders[:], files = (
            sorted(name for name in names if name[0] != "." and name.lower() not in NOT_OF_THE_DATA)
            for names in (folders, files)
        )
        for name in files:
            facts = (Path(folder) / name).stat()
            listing.append([os.path.relpath(Path(folder) / name, path), facts.st_size, facts.st_mtime_ns])
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


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


def code_hash(*things: Any) -> str:
    """16 hex digits of the sources of modules of atoplib, given by name, as modules, or by a function or
    class in them, and of all modules of atoplib that they import, directly or through others; but for
    ``SHOWS_ONLY``.

    Of a module that this process has imported, the source counts that was there when it was first asked
    about, or reloaded.
    """
    names = {
        thing if isinstance(thing, str) else getattr(thing, "__module__", None) or thing.__name__
        for thing in things
    }
    found: dict[str, str] = {}
    waiting = sorted(names)
    while waiting:
        name = waiting.pop()
        path = _source(name)
        if name in found or path is None or (name.split(".")[1:] or [""])[0] in SHOWS_ONLY:
            continue
        source = _text_when_imported(name, path)
        found[name] = _short(source)
        waiting += _imports(source)
    return json_hash(found)


def notebook_hash(notebook: Path) -> str:
    """16 hex digits of a notebook's code cells but its parameters, and of all of atoplib that they import;
    asked once a process, as long as the file is the same.
    """
    return _notebook_hash(notebook, notebook.stat().st_mtime_ns, PACKAGE)


@functools.lru_cache(maxsize=64)
def _notebook_hash(notebook: Path, changed: int, package: Path) -> str:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = [
        cell
        for cell in cells
        if cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", [])
    ]
    sources = ["".join(cell["source"]) for cell in code]
    plain = "\n".join(
        line for line in "\n".join(sources).splitlines() if not line.lstrip().startswith(("%", "!"))
    )
    return json_hash([sources, {name: _graph(name) for name in sorted(set(_imports(plain)))}])


def _graph(name: str) -> str:
    """As ``code_hash``, of what a notebook imports itself: that counts even where it only shows."""
    path = _source(name)
    return "" if path is None else code_hash(name) + _short(path.read_bytes())


def _source(module: str) -> Path | None:
    if module.split(".")[0] != "atoplib":
        return None
    stem = PACKAGE.joinpath(*module.split(".")[1:])
    return next((path for path in (stem / "__init__.py", stem.with_suffix(".py")) if path.is_file()), None)


def _text_when_imported(name: str, path: Path) -> str:
    spec = getattr(sys.modules.get(name), "__spec__", None)  # another object after a reload
    text = getattr(spec, "_atoplib_source", None)
    if text is None:
        text = path.read_text(encoding="utf-8")
        if spec is not None:
            spec._atoplib_source = text
    return text


@functools.lru_cache(maxsize=512)
def _imports(source: str) -> tuple[str, ...]:
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name.split(".")[0] == "atoplib"]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "atoplib":
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(names)


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
    module = getattr(value, "__module__", None) or ""
    if isinstance(value, types.FunctionType):
        yield from _walk_function(value, module, seen)
    elif isinstance(value, functools.partial):
        yield from _walk((value.func, value.args, value.keywords), seen)
    elif isinstance(value, types.MethodType):
        yield from _walk((value.__func__, value.__self__), seen)
    elif isinstance(value, types.CodeType):
        names = (value.co_name, value.co_names, value.co_varnames, value.co_freevars)
        yield f"{value.co_code.hex()} {names}"
        yield from _walk(value.co_consts, seen)
    elif isinstance(value, types.ModuleType):
        yield f"module {value.__name__} {_module_code(value.__name__)}"
        if _is_own(value.__name__):
            for name, member in sorted(vars(value).items()):
                if not name.startswith("__"):
                    yield name
                    yield from _walk(member, seen)
    elif isinstance(value, type):
        yield f"class {module}.{value.__qualname__}"
        yield from _walk_class(value, module, seen)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            yield from _walk((key, value[key]), seen)
    elif isinstance(value, list | tuple | set | frozenset):
        yield type(value).__name__
        for item in sorted(value, key=repr) if isinstance(value, set | frozenset) else value:
            yield from _walk(item, seen)
    else:
        yield from _walk_object(value, module, seen)


def _walk_function(function: types.FunctionType, module: str, seen: dict) -> Iterator[str]:
    yield f"function {module}.{function.__qualname__} {_module_code(module)}"
    if not _is_own(module):
        return
    yield from _walk(function.__code__, seen)
    yield from _walk((function.__defaults__, function.__kwdefaults__), seen)
    for cell in function.__closure__ or ():
        try:
            yield from _walk(cell.cell_contents, seen)
        except ValueError:
            yield "empty cell"  # of a function that refers to itself, not yet bound
    for name in sorted(_names(function.__code__)):
        if name in function.__globals__:
            yield name
            yield from _walk(function.__globals__[name], seen)
    for name in sorted(_names(function.__code__, ("IMPORT_NAME",))):
        try:
            imported = importlib.import_module(name)
        except Exception:  # relative, or not there: the call will tell
            continue
        yield from _walk(imported, seen)


def _names(code: types.CodeType, by: tuple[str, ...] = ("LOAD_GLOBAL", "LOAD_NAME")) -> set:
    """The globals that code looks up, or modules that it imports, in nested functions, too; attributes are
    others' names."""
    own = {step.argval for step in dis.get_instructions(code) if step.opname in by}
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return own.union(*(_names(each, by) for each in inner))


def _walk_class(kind: type, module: str, seen: dict) -> Iterator[str]:
    yield _module_code(module)
    if _is_own(module):
        for name, member in sorted(vars(kind).items()):
            if name not in NO_MEMBERS:
                yield name
                yield from _walk(getattr(member, "__func__", getattr(member, "fget", member)), seen)
        yield from _walk(kind.__bases__, seen)


def _walk_object(value: Any, module: str, seen: dict) -> Iterator[str]:
    kind = type(value)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.nn.Module):
        yield f"network {model_hash(value)}"
    elif torch is not None and isinstance(value, torch.Tensor):
        yield f"tensor {tensor_hash(value)}"
    elif torch is not None and isinstance(value, torch.Generator):
        yield f"generator {value.device}"  # its state moves; where it decides, it is seeded
    elif hasattr(value, "__array_interface__"):
        yield f"array {value.dtype} {value.shape} {_short(value.tobytes())}"
    elif kind.__module__ == "atoplib.parameters":
        kept = {name: item for name, item in value.as_dict().items() if name not in NO_IDENTITY}
        yield from _walk(kept, seen)
    elif kind.__module__.startswith(tuple(f"atoplib.{name}" for name in SHOWS_ONLY)):
        yield kind.__qualname__
    else:
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
    if module.split(".")[0] in ("atoplib", "builtins", "torch"):
        return False
    if module in ("__main__", ""):
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and not str(Path(file).resolve()).startswith(LIBRARIES)


@functools.lru_cache(maxsize=512)
def _version(root: str) -> str:
    return str(getattr(sys.modules.get(root), "__version__", ""))


def _module_code(module: str) -> str:
    """What tells a module's code: sources of atoplib, the file of the user's own, a library's version."""
    root = module.split(".")[0]
    if root == "atoplib":
        return code_hash(module)
    if _is_own(module):
        file = getattr(sys.modules.get(module), "__file__", None)
        return file_hash(Path(file)) if file and module != "__main__" and Path(file).is_file() else ""
    return _version(root)


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
        parts += [name, *_walk_class(type(part), type(part).__module__, {})]
        parts += _walk(kept, {id(model): (0, model)})
    for name, tensor in model.state_dict().items():
        parts.append(f"{name} {tensor_hash(tensor) if isinstance(tensor, torch.Tensor) else repr(tensor)}")
    return _short(*parts, *(answers(model, images) if own else ()))


def _decides(name: str, value: Any) -> bool:
    """Whether an attribute of a part is worth a look: not its weights, parts and seed, nor empty tables."""
    empty = isinstance(value, bool | int | str | dict | list | tuple | set | None) and not value
    scripted = type(value).__name__ in ("ScriptModule", "ScriptMethod")  # repr is an address; answers tell
    return not scripted and name not in NO_ATTRIBUTES and not (name.startswith("_") and empty)
