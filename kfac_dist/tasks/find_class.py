"""Load the class that `file.py:Class` or `package.module:Class` names."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from kfac_dist.config.problems import did_you_mean
from kfac_dist.errors import InvalidSpecError
from kfac_dist.tasks.blame import UserFiles, blame_user


def find_class(label: str, base_dir: Path) -> tuple[type, UserFiles]:
    """Run the module that `label` names; return the class and which files are the user's.

    Files are relative to `base_dir`. Every process finds the class in this way, so it is never
    pickled. Raises InvalidSpecError if the class does not exist, UserTaskError if its module
    raises.
    """
    source, _, class_name = label.rpartition(":")
    if not source or not class_name.isidentifier():
        raise InvalidSpecError(
            f"task: {label!r} must have the form file.py:Class or package.module:Class"
        )
    if source.endswith(".py"):
        module, files = _run_file(label, (base_dir / source).resolve(), base_dir)
    else:
        module, files = _import(label, source, base_dir)
    return _pick(module, class_name, label), files


def _run_file(label: str, path: Path, base_dir: Path) -> tuple[ModuleType, UserFiles]:
    if not path.is_file():
        raise InvalidSpecError(
            f"task: the file {path} does not exist (task {label}, relative to {base_dir})"
        )
    files = UserFiles(
        label=label, folder=path.parent, is_package=False, base_dir=base_dir.resolve()
    )
    _let_import_from(path.parent)
    _let_import_from(base_dir.resolve())  # also for a file in a subfolder
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"kfac_dist_task_{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InvalidSpecError(f"task: {path} cannot be loaded as a Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look up the module of a class by name
    with blame_user(files, "loading the module", always=True):
        spec.loader.exec_module(module)
    return module, files


def _import(label: str, name: str, base_dir: Path) -> tuple[ModuleType, UserFiles]:
    _let_import_from(base_dir.resolve())
    top = name.partition(".")[0]
    files = _files_of(label, _find_spec(top), base_dir)
    if files is None:
        raise _no_module(label, top, base_dir)
    with blame_user(files, "loading the module", always=True):
        return _import_existing(label, name, base_dir), files


def _import_existing(label: str, name: str, base_dir: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        # If the missing module is part of `name`, the specification is wrong. Any other module is
        # one that the user's code imports.
        if name == missing or name.startswith(f"{missing}."):
            raise _no_module(label, missing, base_dir) from error
        raise


def _find_spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ValueError, ImportError):
        return None


def _files_of(label: str, spec: ModuleSpec | None, base_dir: Path) -> UserFiles | None:
    if spec is None:
        return None
    package = list(spec.submodule_search_locations or ())
    if package:
        folder = Path(package[0])
    elif spec.has_location and spec.origin:
        folder = Path(spec.origin).parent
    else:
        return None
    return UserFiles(
        label=label, folder=folder, is_package=bool(package), base_dir=base_dir.resolve()
    )


def _no_module(label: str, name: str, base_dir: Path) -> InvalidSpecError:
    return InvalidSpecError(
        f"task: there is no module {name!r} (task {label}; looked in {base_dir} and in installed "
        "packages). To name a file, use file.py:Class"
    )


def _let_import_from(folder: Path) -> None:
    # As Python does for a script, but last: a user's file must not hide an installed module.
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _pick(module: ModuleType, class_name: str, label: str) -> type:
    found = getattr(module, class_name, None)
    if isinstance(found, type):
        return found
    own = [
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module.__name__
    ]
    what = "is not a class" if hasattr(module, class_name) else "does not exist"
    classes = f"classes in the module: {', '.join(own)}." if own else "the module has no classes."
    raise InvalidSpecError(
        f"task {label}: {class_name} {what}; {classes}{did_you_mean(class_name, own)}"
    )
