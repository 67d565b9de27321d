"""What a result depends on, as short digests: the one place that decides whether something is still the same.

Values, files, tensors, the package's own sources, functions of a notebook's cells, networks, and what
computes. torch is imported only where a tensor or a network is asked about, so that a batch starts at once.
"""

import ast
import contextlib
import copyreg
import dis
import functools
import hashlib
import importlib
import json
import platform
import sys
import sysconfig
import types
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from atoplib.files import data_files
from atoplib.parameters import Parameters

PACKAGE = Path(__file__).resolve().parent
# Parts of the package that change no number: they show, keep or start what others compute.
SHOWS_ONLY = ("batch", "explorer", "figures", "progress", "runs")
# Parameters that tell where a result is made and kept, and do not change what it is.
NO_IDENTITY = ("workspace", "data_dir", "device", "keep_every")
PACKAGES = ("torch", "torchvision", "numpy", "torchattacks")
# The attribute by which a network remembers with which weights it was given to a training.
INITIAL = "_initial"
NO_ATTRIBUTES = (
    "training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_generators",
    INITIAL,
)  # fmt: skip
NO_MEMBERS = (
    "__dict__", "__weakref__", "__module__", "__doc__", "__firstlineno__", "__static_attributes__",
    "__slotnames__",  # that copyreg keeps there
    "_abc_impl",
)  # fmt: skip
PLAIN = (bool, int, float, complex, str, bytes, type(None), slice, range)
TABLES = (dict, types.MappingProxyType)
ROWS = (list, tuple, type({}.keys()), type({}.values()), type({}.items()))
# Libraries whose objects keep nothing that could decide on a number: locks.
NO_CONTENT = ("_thread", "_queue")
LIBRARIES = tuple(f"{Path(sysconfig.get_path(name)).resolve()}/" for name in ("stdlib", "platlib", "purelib"))


def _short(*parts: bytes | str) -> str:
    text = b"".join((part if isinstance(part, bytes) else part.encode()) + b"\0" for part in parts)
    return hashlib.sha256(text).hexdigest()[:16]


def json_hash(value: Any) -> str:
    """16 hex digits of a JSON value, whatever the order of its keys."""
    return _short(json.dumps(value, sort_keys=True))


def path_hash(path: Path) -> str:
    """The SHA-256 of a file; of a folder, a digest of the names, sizes and times (of change, too, which no
    program can set) of all files in it, hidden ones and what is no data aside.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    facts = ((str(file.relative_to(path)), file.stat()) for file in data_files(path))
    return json_hash([[name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in facts])


def tensor_hash(tensor: Any) -> str:
    """16 hex digits of a tensor's type, shape and bytes."""
    import torch

    tensor = tensor.detach().cpu() if tensor.layout is torch.strided else tensor.detach().to_dense().cpu()
    tensor = tensor.resolve_conj().resolve_neg().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Releases of Python and of the packages that decide numbers."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def environment(device: Any = "cpu") -> dict[str, str]:
    """What computes: other releases, or another kind of device, give other numbers."""
    return {"device": str(device).partition(":")[0], **versions()}


def code_hash(module: str) -> str:
    """16 hex digits of the source of a module of atoplib, and of all modules of atoplib that it imports,
    directly or through others; but for ``SHOWS_ONLY``.

    Of a module that this process has imported, the source counts that was imported, whatever the file says
    by now.
    """
    sources: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _source(name)
        if (
            name not in sources
            and path is not None
            and name.partition(".")[2].split(".")[0] not in SHOWS_ONLY
        ):
            sources[name] = _text_when_imported(name, path)
            waiting += _imports(sources[name])
    return json_hash(sources)


def notebook_hash(notebook: Path) -> str:
    """16 hex digits of a notebook's code cells but its parameters, of all of atoplib that they import, and of
    modules of the user's own beside it or in the folder that we are in."""
    from IPython.core.inputtransformer2 import TransformerManager

    cells = [c for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    sources = ["".join(c["source"]) for c in cells if "parameters" not in c["metadata"].get("tags", [])]
    to_python, names = TransformerManager().transform_cell, []  # magics, shell commands
    for source in sources:
        with contextlib.suppress(SyntaxError):  # the kernel says so
            names += _imports(to_python(source.partition("\n")[2] if source[:2] == "%%" else source))
    imported = {name: path for name in names if (path := _source(name))}
    user_modules = {name: [path_hash(path) for path in _beside(name, notebook)] for name in names}
    # What a notebook imports itself counts even where it only shows.
    texts = {name: code_hash(name) + _text_when_imported(name, path) for name, path in imported.items()}
    return json_hash([sources, texts, user_modules])


def _beside(module: str, notebook: Path) -> list[Path]:
    """The files of a user's own module or package, beside a notebook or where its kernel starts, here."""
    stems = [folder / module.split(".")[0] for folder in (notebook.parent, Path.cwd())]
    files = [file for stem in stems for file in (stem.with_suffix(".py"), *stem.glob("**/*.py"))]
    return [file for file in files if file.is_file() and not file.is_relative_to(PACKAGE)]


def _source(module: str) -> Path | None:
    root, *names = module.split(".")
    stem = PACKAGE.joinpath(*names)
    files = (stem / "__init__.py", stem.with_suffix(".py")) if root == "atoplib" else ()
    return next((path for path in files if path.is_file()), None)


class _Sources(dict[str, str]):
    """Sources of atoplib's modules by name, as they were imported: Python asks this object first where each
    module is, which it leaves to others, but notes the text; also at every reload.
    """

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> None:
        """Note the source of a module that is about to be imported."""
        source = _source(name) if name.split(".")[0] == "atoplib" else None
        if source is not None:
            self[name] = source.read_text(encoding="utf-8")


SOURCES = _Sources()
sys.meta_path.insert(0, SOURCES)
for _name in [*sys.modules]:
    SOURCES.find_spec(_name)


def _text_when_imported(name: str, path: Path) -> str:
    return SOURCES[name] if name in sys.modules and name in SOURCES else path.read_text(encoding="utf-8")


@functools.lru_cache(maxsize=512)
def _imports(source: str) -> tuple[str, ...]:
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(names)


def function_hash(function: Callable[..., Any]) -> str:
    """16 hex digits of a function as it would run now: its code, constants, defaults, closure, and every
    global that it refers to, followed through functions and classes of one's own; networks by ``model_hash``,
    tensors by content, the package's functions by ``code_hash``, whatever else by what pickle would keep of
    it. What not even pickle can keep (an open file, a generator) has another hash at every call.
    """
    return _short(*_walk(function, {}))


def _walk(value: Any, seen: dict) -> Iterator[str]:
    """Texts that tell a value from another. ``seen`` keeps what was met, for circles and so that no id is
    used twice.
    """
    kind = type(value)
    if kind in PLAIN or isinstance(value, Path):
        yield f"{kind.__name__} {value!r}"
        return
    if id(value) in seen:
        yield f"again {seen[id(value)][0]}"
        return
    seen[id(value)] = len(seen), value
    match value:
        case types.FunctionType():
            yield from _walk_function(value, seen)
        case types.MethodType():
            yield from _walk((value.__func__, value.__self__), seen)
        case weakref.ref():
            yield from _walk(value(), seen)
        case types.CodeType():
            yield f"{value.co_code.hex()} {value.co_name} {value.co_varnames} {value.co_freevars}"
            yield from _walk([value.co_names, value.co_consts], seen)
        case types.ModuleType():
            yield f"module {value.__name__} {_module_code(value.__name__)}"
            if _is_user_code(value.__name__):
                yield from _walk({name: each for name, each in vars(value).items() if name[:2] != "__"}, seen)
        case type():
            yield f"class {value.__module__}.{value.__qualname__}"
            yield from _walk_class(value, seen)
        case _ if kind in (*TABLES, *ROWS):
            yield f"{kind.__name__} of {len(value)}"
            for item in value.items() if kind in TABLES else value:  # in their order
                yield from _walk(item, seen)
        case _ if kind in (set, frozenset):
            yield f"{kind.__name__} of {len(value)}"
            yield from sorted(_short(*_walk(item, dict(seen))) for item in value)
        case _:
            yield from _walk_object(value, seen)


def _walk_function(function: types.FunctionType, seen: dict) -> Iterator[str]:
    module = function.__module__ or ""
    yield f"function {module}.{function.__qualname__} {_module_code(module)}"
    if (
        not _is_user_code(module)
        and getattr(sys.modules.get(module), function.__qualname__, None) is function
    ):
        return  # the module's source tells all of it, decorators among it
    for cell in function.__closure__ or ():
        try:
            yield from _walk(cell.cell_contents, seen)
        except ValueError:
            yield "empty cell"  # of a function that refers to itself, not yet bound
    if not _is_user_code(module):
        return
    code, space = function.__code__, function.__globals__
    yield from _walk([code, function.__defaults__, function.__kwdefaults__, vars(function)], seen)
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
    if _is_user_code(kind.__module__):
        for name, member in sorted(vars(kind).items()):
            if name not in NO_MEMBERS:
                yield name
                yield from _walk(getattr(member, "__func__", getattr(member, "fget", member)), seen)
        yield from _walk(kind.__bases__, seen)


def _walk_object(value: Any, seen: dict) -> Iterator[str]:
    import numpy
    import torch

    kind = type(value)
    yield from _walk(kind, seen)
    match value:
        case torch.nn.Module():
            yield f"network {model_hash(value)} {[part.training for part in value.modules()]}"
        case torch.Tensor():
            hooks = (value._backward_hooks, value._post_accumulate_grad_hooks)
            yield f"tensor {tensor_hash(value)}"
            yield from _walk([list(each.values()) for each in hooks if each], seen)
        case torch.Generator():
            yield f"{value.device} {value.initial_seed()}"  # its state moves
        case torch.fx.Graph():
            yield str(value)
            yield from _walk([node.target for node in value.nodes], seen)
        case Parameters():
            yield json_hash({k: v for k, v in value.as_dict().items() if k not in NO_IDENTITY})
        case numpy.ndarray() if kind is numpy.ndarray and not value.dtype.hasobject:
            yield f"{value.dtype} {value.shape} {_short(value.tobytes())}"
        case _ if kind.__module__.startswith(tuple(f"atoplib.{name}" for name in SHOWS_ONLY)):
            pass
        case _:
            if _is_user_code(kind.__module__) or kind.__module__.startswith("atoplib"):
                yield from _walk(getattr(value, "__dict__", None), seen)
            yield from _walk(_carried(value), seen)


def _carried(value: Any) -> Any:
    """What pickle would keep of an object, slots and items among it; of what it cannot keep, a text that is
    never the same."""
    if isinstance(value, functools._lru_cache_wrapper):
        return value.__wrapped__
    if type(value).__module__ in NO_CONTENT:
        return None
    try:
        reduce = copyreg.dispatch_table.get(type(value))
        parts = reduce(value) if reduce else value.__reduce_ex__(4)
    except Exception:  # whatever somebody's class raises
        return uuid.uuid4().hex
    return parts if isinstance(parts, str) else [*parts[:3], *(list(each or ()) for each in parts[3:5])]


def _is_user_code(module: str) -> bool:
    """Whether a module is the user's: a notebook, a script, a file of theirs; not atoplib, nor an installed
    library.
    """
    file = getattr(sys.modules.get(module), "__file__", None)
    known = file is None or module.split(".")[0] in ("atoplib", "builtins", "torch")
    return module in ("__main__", "") or not (known or str(Path(file).resolve()).startswith(LIBRARIES))


def _module_code(module: str) -> str:
    """What tells a module's code: sources of atoplib, the file of the user's own, a library's version."""
    root = module.split(".")[0]
    if root == "atoplib":
        return code_hash(module)
    if _is_user_code(module):
        file = Path(getattr(sys.modules.get(module), "__file__", None) or "")
        return path_hash(file) if module != "__main__" and file.is_file() else ""
    return str(getattr(sys.modules.get(root), "__version__", ""))


def model_hash(model: Any, images: Any = None) -> str:
    """16 hex digits of a network: structure, weights, the code of its classes, what its parts keep as
    attributes, hooks and replaced functions among them; but for its mode and its seed, which a training or an
    evaluation sets.

    Where a part is neither torch's nor the kit's, also of what the whole answers to probe images, or to the
    first of ``images`` (B, C, H, W) where it takes none of those: what is kept where none of this looks
    changes an answer. Of a random network the answers after one seed count, unless it has a generator of its
    own.
    """
    import torch

    from atoplib.probing import answers

    if not isinstance(model, torch.nn.Module):
        return function_hash(model)
    parts, custom = [f"{type(model).__qualname__} {model!r}"], False
    met = {id(part): (number, part) for number, part in enumerate(model.modules())}
    for name, part in model.named_modules():
        kind = type(part)
        compiled = isinstance(part, torch.jit.ScriptModule) or kind.__name__ == "OptimizedModule"
        custom |= (
            compiled
            or isinstance(part, torch.fx.GraphModule)
            or kind.__module__.split(".")[0] not in ("atoplib", "torch", "torchvision")
        )
        computed_from = dict(part.named_parameters(recurse=False))
        kept = {
            # hooks in their order, without the numbers that torch counts up
            key: list(value.values()) if "_hooks" in key and isinstance(value, Mapping) else value
            for key, value in sorted(vars(part).items())
            # weight, where torch computes it anew from weight_orig at every call
            if _decides(part, key, value) and f"{key}_orig" not in computed_from
        }
        # what torch compiled keeps nothing that can be read: its answers tell
        parts += [name, *_walk_class(kind, {}), *_walk({} if compiled else kept, dict(met))]
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= model.named_buffers(remove_duplicate=False)  # those that are not saved, too
    more = {name: value for name, value in model.state_dict().items() if name not in tensors}
    parts += _walk(tensors | more, dict(met))
    return _short(*parts, *(answers(model, images) if custom else ()))


def _decides(part: Any, name: str, value: Any) -> bool:
    """Whether an attribute of a part is worth a look: not its weights, parts and the seed of what can be
    reseeded, nor empty tables."""
    empty = isinstance(value, bool | int | str | dict | list | tuple | set | None) and not value
    reseeded = name == "seed" and hasattr(part, "reseed")
    return name not in NO_ATTRIBUTES and not reseeded and not (name.startswith("_") and empty)
