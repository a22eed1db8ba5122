"""The plan of the folders: small rooms, names that occur once, tests that mirror the sources."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import ROOT

SOURCES = ("kfac_dist", "workers")
GENERATED = ROOT / "kfac_dist/v1"
COMMANDS = ROOT / "kfac_dist/cli/commands"  # one verb a file, named after the verb
ROLES = tuple(
    ROOT / "workers" / r for r in ("gradient_worker", "inverse_worker", "parameter_server")
)
MIGRATIONS = ROOT / "kfac_dist/service/store/migrations"  # alembic's own layout

MAX_SIBLINGS = 15
MAX_FILE_LINES = 400
MAX_BODY_LINES = 60

# Folders of tests that mirror no folder of the sources, with the reason.
FOLDERS_WITHOUT_SOURCE = {
    "gpu": "what matters on a GPU, most of which runs on the CPU too",
    "end_to_end": "the installed command, as a user types it",
    "nodes": "Ray nodes that have nothing in common but a network",
    "oracles": "statements about the mathematics, whichever module computes it",
    "oracles/numbered": "the numbered statements of docs/algorithm.md",
    "oracles/truth": "the slow and obvious code that the oracles compare with",
    "project": "documents, layout and interface of the project itself",
    "workers/whole_jobs": "whole jobs, in which all roles take part",
    "workers/whole_jobs/sharded": "whole jobs whose parameter server has several shards",
}


def modules() -> Iterator[Path]:
    for top in SOURCES:
        for path in (ROOT / top).rglob("*.py"):
            if GENERATED not in path.parents:
                yield path


def named_modules() -> Iterator[Path]:
    return (path for path in modules() if not path.name.startswith("__"))


def is_in(path: Path, *folders: Path) -> bool:
    return any(folder in path.parents for folder in folders)


def test_no_folder_has_more_siblings_than_one_can_overlook() -> None:
    siblings = defaultdict(set)
    for path in named_modules():
        siblings[path.parent].add(path.name)
    for path in modules():
        siblings[path.parent.parent].add(path.parent.name)
    full = {
        str(folder.relative_to(ROOT)): len(names)
        for folder, names in siblings.items()
        if len(names) > MAX_SIBLINGS and folder not in (COMMANDS, ROOT)
    }
    assert not full


def test_no_folder_of_tests_has_more_siblings() -> None:
    folders = {path.parent for path in (ROOT / "tests").rglob("*.py")}
    counts = {
        folder: len({p.name for p in folder.glob("*.py")} - {"conftest.py"}) for folder in folders
    }
    assert not {str(folder): count for folder, count in counts.items() if count > MAX_SIBLINGS}


def test_no_class_name_occurs_twice() -> None:
    places = defaultdict(list)
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_no_file_name_occurs_twice() -> None:
    places = defaultdict(list)
    for path in named_modules():
        if not is_in(path, COMMANDS, *ROLES):
            places[path.name].append(str(path.relative_to(ROOT)))
    assert not {name: found for name, found in places.items() if len(found) > 1}


@pytest.mark.parametrize("top", [*SOURCES, "benchmarks"])
def test_files_and_bodies_are_short(top: str) -> None:
    long = {}
    for path in (ROOT / top).rglob("*.py"):
        if GENERATED in path.parents:
            continue
        text, where = path.read_text(), path.relative_to(ROOT)
        if text.count("\n") > MAX_FILE_LINES:
            long[str(where)] = text.count("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[min(1, len(node.body) - 1) if ast.get_docstring(node) else 0]
                lines = node.body[-1].end_lineno - first.lineno + 1
                if lines > MAX_BODY_LINES:
                    long[f"{where}:{node.lineno} {node.name}"] = lines
    assert not long


def source_folder(tests: Path) -> Path | None:
    """The folder whose modules the tests in a folder are of; None where there is none."""
    mirrored = tests.relative_to(ROOT / "tests")
    if mirrored.parts[:1] in (("workers",), ("benchmarks",)):
        return ROOT / mirrored
    return ROOT / "kfac_dist" / mirrored


def files_of_tests() -> Iterator[Path]:
    return (ROOT / "tests").rglob("test_*.py")


def test_each_folder_of_tests_mirrors_one_of_sources() -> None:
    without = {
        str(path.parent.relative_to(ROOT / "tests"))
        for path in files_of_tests()
        if not (source_folder(path.parent) or path).is_dir()
    }
    assert without <= set(FOLDERS_WITHOUT_SOURCE)


def test_each_file_of_tests_is_named_after_a_module() -> None:
    """`test_NAME.py`, or `test_NAME_more.py` where a module has several."""
    stray = []
    for path in files_of_tests():
        if str(path.parent.relative_to(ROOT / "tests")) in FOLDERS_WITHOUT_SOURCE:
            continue
        folder = source_folder(path.parent)
        names = {module.stem for module in folder.glob("*.py")}
        subject = path.stem.removeprefix("test_")
        if not any(subject == name or subject.startswith(f"{name}_") for name in names):
            stray.append(str(path.relative_to(ROOT)))
    assert not stray


def test_each_exception_is_still_one() -> None:
    for folder in FOLDERS_WITHOUT_SOURCE:
        assert (ROOT / "tests" / folder).is_dir()
        assert not source_folder(ROOT / "tests" / folder).is_dir()
