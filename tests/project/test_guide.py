"""The guide keeps to the code: paths, links and citations lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.project.pages import pages

DOCS = ROOT / "docs"
ALGORITHM = DOCS / "algorithm.md"
# Where the algorithm is cited: sources, tests and pages.
CITING = ("kfac_dist", "workers", "tests", "benchmarks", "examples", "docs", "proto", "README.md")
LINK = re.compile(r"\]\((?!https?://|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")
ANCHOR = re.compile(r"algorithm\.md#([\w-]+)")
NUMBERED = re.compile(r"algorithm\.md,?\s+sections?\s+\d")

HEADINGS_OF_THE_ALGORITHM = [
    "notation",
    "scale",
    "fisher",
    "statistics",
    "block-diagonal",
    "block-tridiagonal",
    "kronecker-sum",
    "factored-damping",
    "step-size-and-momentum",
    "norm-constraint",
    "damping",
    "gamma",
    "schedules",
    "averaging",
    "layers",
    "block-splitting",
    "ekfac",
    "asynchrony",
    "ladder",
    "oracles",
]


def without_code(text: str) -> str:
    """Leave out blocks of code, in which a # is a comment and no heading."""
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors(page: Path) -> list[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.strip().lower()) for heading in headings]
    return [heading.replace(" ", "-") for heading in plain]


def citing_files() -> Iterator[Path]:
    for name in CITING:
        top = ROOT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.suffix in (".py", ".md", ".proto", ".yaml") and path != Path(__file__):
                yield path


def found(pattern: re.Pattern[str]) -> Iterator[tuple[str, re.Match[str]]]:
    """Yield where each match is, as file:line, and the match."""
    for path in citing_files():
        text = path.read_text()
        for match in pattern.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            yield f"{path.relative_to(ROOT)}:{line}", match


def table_of_changes() -> list[list[str]]:
    page = (DOCS / "contributing.md").read_text()
    table = page[page.index("| to add or change |") :].split("\n\n")[0]
    return [row.strip("| ").split(" | ") for row in table.splitlines()[2:]]


def test_the_algorithm_has_the_headings_that_are_cited() -> None:
    assert [a for a in anchors(ALGORITHM) if a in HEADINGS_OF_THE_ALGORITHM] == (
        HEADINGS_OF_THE_ALGORITHM
    )


def test_each_citation_of_the_algorithm_is_a_heading() -> None:
    known = set(anchors(ALGORITHM))
    cited = [(place, match[1]) for place, match in found(ANCHOR)]
    assert cited
    assert not [f"{place}: #{anchor}" for place, anchor in cited if anchor not in known]


def test_no_citation_of_the_algorithm_is_by_number() -> None:
    assert not [f"{place}: {match[0]}" for place, match in found(NUMBERED)]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    for link, anchor in LINK.findall(without_code(page.read_text())):
        target = (page.parent / link).resolve() if link else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), f"{link}#{anchor}"


def test_the_table_of_changes_names_paths_that_exist() -> None:
    rows = table_of_changes()
    assert all(len(row) == 3 for row in rows)
    for subject, *cells in rows:
        paths = [n for n in re.findall(r"`([^`]+)`", " ".join(cells)) if is_path(n)]
        assert paths, subject
        assert not [path for path in paths if not (ROOT / path).exists()], subject


def is_path(name: str) -> bool:
    """Return whether a name in backticks is a path of the repository, and no word of the code."""
    return " " not in name and ("/" in name or name.endswith((".md", ".toml", ".py")))


def test_the_table_of_changes_covers_what_is_asked_most() -> None:
    subjects = " ".join(row[0] for row in table_of_changes())
    for asked in (
        "layer type", "step rule", "inverse", "metric", "verb of the command line", "role",
        "data set", "task", "key of the job specification", "field of a message",
    ):  # fmt: skip
        assert asked in subjects


def test_what_one_step_reads_is_where_the_page_says() -> None:
    """docs/read_one_step.md: each `Class.method` beside a link is in the file that it links to."""
    page = (DOCS / "read_one_step.md").read_text()
    named = re.findall(r"\]\(\.\./([\w/]+\.py)\), `(\w+)\.(\w+)`", page)
    assert len(named) >= 5
    for path, owner, method in named:
        text = (ROOT / path).read_text()
        assert f"class {owner}" in text, f"{path} has no class {owner}"
        assert f"def {method}(" in text, f"{path} has no {owner}.{method}"


def test_five_files_at_most_lie_between_a_step_and_a_factor() -> None:
    page = (DOCS / "read_one_step.md").read_text()
    walk = page.partition("**From `KFAC.step` to `X^T X`**")[2].partition("## ")[0]
    files = re.findall(r"^\d\. \[`([\w/]+\.py)`\]", walk, re.M)
    assert 1 <= len(files) <= 5
    for caller, called in pairwise(files):
        module = called.removesuffix(".py").replace("/", ".")
        assert f"from {module} import" in (ROOT / caller).read_text(), f"{caller}, {called}"
