"""The project's texts are plain English: no stilted phrase, no wall of text, no slip of spelling.

Texts are the pages in Markdown, the comments of the proto files, and of the Python sources the
docstrings, comments and string constants.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.paths import ROOT
from tests.project.pages import pages

SOURCES = ("kfac_dist", "workers", "benchmarks", "examples")
PROTO = ROOT / "proto"
GENERATED = ROOT / "kfac_dist/v1"
# Anything longer is an argument that a list makes easier to follow.
MAX_PARAGRAPH = 500

# What to avoid, and what to write instead. A space in a pattern is any white space.
STILTED = {
    r"(is|are|was|were|in|by) none of": "is not one of; is not in any of",
    r"there (is|are|was|were) none": "name what is missing, or: if it does not exist",
    r"tells? whether": "return whether, say whether",
    r"who(so)?ever": "everybody who, callers that",
    r"(goes|go|went|gone|going) on(?! top)": "continue, resume",
    r"(is|are|was|were|be|been) told": "receives, learns, is reported, is measured against",
    r"of (a|an|the|its|another) [a-z]+'s(?! [\w{])": "of the ..., with the noun",
    r"as (one|you) likes?": "any number of, in any way",
    r"to be had": "available",
    r"(that|those) which": "what, those that",
    r"what of": "which part of",
    r"so many(?! \w+ that)": "this many, that many, the first N",
    r"(?<!not\s)all the same(?! \w)": "anyway",
    r"but for": "except for",
    r"without a word": "silently, without a message",
    r"anew": "again",
    r"decides? about": "determines, affects",
    r"nothing but": "only",
    r"only who": "only those who",
    r"comes? of": "results from, follows from",
    r"(?<!there\s)(is|are|was|were) no (?!more|less|such|[a-z]{3,5}er\b)[a-z]+": "is not a ...",
    r"needs? not": "does not need to, need not happen",
    r"not any more": "no longer",
    r"sees? to it": "makes sure",
    r"goes? without": "has no",
    r"(there|here|where)(of|by|in|upon|to)": "say it in full",
}


class Text(NamedTuple):
    """A piece of text that begins at `line` of a file."""

    path: Path
    line: int
    content: str


class Finding(NamedTuple):
    """A phrase, where it stands, and what is plainer."""

    path: Path
    line: int
    phrase: str
    instead: str

    def __str__(self) -> str:
        place = self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path
        return f"{place}:{self.line}: {self.phrase!r}; plainer: {self.instead}"


def sources() -> Iterator[Path]:
    for top in SOURCES:
        for path in sorted((ROOT / top).rglob("*.py")):
            if GENERATED not in path.parents:
                yield path


def texts() -> Iterator[Text]:
    for page in (*pages(), *sorted(PROTO.rglob("*.proto"))):
        yield Text(page, 1, page.read_text())
    for path in sources():
        yield from texts_of_source(path, path.read_text())


def texts_of_source(path: Path, source: str) -> Iterator[Text]:
    """Yield comments, each with those that follow it, and strings."""
    yield from comments(path, source)
    parts = set[ast.AST]()
    for node in ast.walk(ast.parse(source)):  # parents before their parts
        if isinstance(node, ast.JoinedStr):
            parts.update(node.values)
            pieces = [p.value if isinstance(p, ast.Constant) else "{}" for p in node.values]
            yield Text(path, node.lineno, "".join(map(str, pieces)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in parts:
            yield Text(path, node.lineno, node.value)


def comments(path: Path, source: str) -> Iterator[Text]:
    run: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NL and run and token.line.lstrip().startswith("#"):
            continue  # the end of a line that is a comment
        if token.type == tokenize.COMMENT and (not run or token.start[0] == run[-1].start[0] + 1):
            run.append(token)
            continue
        if run:
            yield as_text(path, run)
        run = [token] if token.type == tokenize.COMMENT else []
    if run:
        yield as_text(path, run)


def as_text(path: Path, run: list[tokenize.TokenInfo]) -> Text:
    return Text(path, run[0].start[0], "\n".join(token.string.lstrip("# ") for token in run))


def compiled(pattern: str) -> re.Pattern[str]:
    # Comments of proto files have a mark at the beginning of each line.
    spaced = pattern.replace(" ", r"\s+(?://\s*)?")
    return re.compile(rf"(?<![\w-])(?:{spaced})(?![\w-])", re.IGNORECASE)


PATTERNS = {compiled(pattern): instead for pattern, instead in STILTED.items()}


def stilted(text: Text) -> Iterator[Finding]:
    for pattern, instead in PATTERNS.items():
        for match in pattern.finditer(text.content):
            line = text.line + text.content.count("\n", 0, match.start())
            yield Finding(text.path, line, " ".join(match[0].split()), instead)


def paragraphs(text: Text) -> Iterator[Text]:
    """Yield the paragraphs and list items of a page; tables, headings and code are left out."""
    in_code, lines, start = False, list[str](), 0
    for number, line in enumerate([*text.content.splitlines(), ""], start=1):
        fence = line.lstrip().startswith("```")
        in_code ^= fence
        prose = not (fence or in_code or line.startswith(("|", "#", "    "))) and line.strip()
        if lines and (not prose or re.match(r"\s*([-*] |\d+\.)", line)):
            yield Text(text.path, start, " ".join(lines))
            lines = []
        if prose:
            start = start if lines else number
            lines.append(prose)


def walls(page: Path) -> Iterator[Finding]:
    for paragraph in paragraphs(Text(page, 1, page.read_text())):
        length = len(re.sub(r"\]\([^)]*\)", "]", paragraph.content))
        if length > MAX_PARAGRAPH:
            yield Finding(page, paragraph.line, f"{length} characters", "a list, or two paragraphs")


def test_no_phrase_is_stilted() -> None:
    found = [str(finding) for text in texts() for finding in stilted(text)]
    assert not found, "\n".join(found)


def test_no_paragraph_is_a_wall_of_text() -> None:
    found = [str(finding) for page in pages() for finding in walls(page)]
    assert not found, "\n".join(found)


def is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_a_function_returns_whether_something_holds() -> None:
    """Docstrings of functions are imperative: "Return whether", not "Whether"; properties are not.

    A property is read like an attribute, so "Whether the folder holds a run" describes it.
    """
    found = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node) or ""
                if docstring.startswith("Whether ") and not is_property(node):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not found, "\n".join(found)


def test_spelling() -> None:
    """By codespell, with the settings of pyproject.toml."""
    tops = [*SOURCES, "proto", "tests", "docs", ".ci", "README.md", "CHANGELOG.md", "Makefile"]
    command = [sys.executable, "-m", "codespell_lib", *tops]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("Tell whether it is.", ["Tell whether"]),
        ("The run goes\non after it.", ["goes on"]),
        ("The driver puts it on top.", []),
        ("It goes on top of the stack.", []),
        ("of a step's, joining is no part", ["of a step's", "is no part"]),
        ("There is no limit; there is no longer one.", []),
        ("They are not all the same.", []),
        ("Applied all the same.", ["all the same"]),
        ("It took so many steps that it ended.", []),
        ("The inverse worker's factors are averaged.", []),
        ("Ongoing. Whether it goes.", []),
    ],
)
def test_the_patterns_find_what_they_are_meant_to(text: str, phrases: list[str]) -> None:
    found = stilted(Text(ROOT / "page.md", 1, text))
    assert sorted(f.phrase for f in found) == sorted(phrases)


def test_the_places_of_findings() -> None:
    source = '"""One.\n\nIt goes\non.\n"""\n\nx = 1\n# There\n# is none\ny = f"it is {x} told"\n'
    found = [f for text in texts_of_source(ROOT / "x.py", source) for f in stilted(text)]
    assert sorted((f.line, f.phrase) for f in found) == [(3, "goes on"), (8, "There is none")]
