from __future__ import annotations

from pathlib import Path

import pytest

from kfac_dist.errors import KfacDistError
from kfac_dist.runs.json_lines import Journal
from kfac_dist.runs.tail import JournalTail


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def numbers(tail: JournalTail, most: int = 100) -> list[tuple[int, int]]:
    return [(line, values["n"]) for line, values in tail.read(most)]


def test_each_line_is_read_once_and_counted(path: Path) -> None:
    tail = JournalTail(path)
    assert numbers(tail) == []
    journal = Journal(path)
    for n in range(5):
        journal.append(f'{{"n": {n}}}')
    assert numbers(tail, most=3) == [(1, 0), (2, 1), (3, 2)]
    assert numbers(tail) == [(4, 3), (5, 4)]
    journal.append('{"n": 9}')
    journal.close()
    assert numbers(tail) == [(6, 9)]
    tail.rewind()
    assert len(numbers(tail)) == 6


def test_a_line_that_is_being_written_is_waited_for(path: Path) -> None:
    tail = JournalTail(path)
    path.write_text('{"n": 1}\n{"n": ')
    assert numbers(tail) == [(1, 1)]
    with path.open("a") as file:
        file.write("2}\n")
    assert numbers(tail) == [(2, 2)]


def test_a_journal_that_was_replaced_is_read_from_its_beginning(path: Path) -> None:
    journal, tail = Journal(path), JournalTail(path)
    for n in range(4):
        journal.append(f'{{"n": {n}}}')
    assert len(numbers(tail)) == 4
    journal.replace(iter(['{"n": 0}', '{"n": 7}']))
    assert numbers(tail) == [(1, 0), (2, 7)]


@pytest.mark.parametrize("line", ["{", "[1]"])
def test_an_error_names_the_damaged_line(path: Path, line: str) -> None:
    path.write_text(f'{{"n": 1}}\n{line}\n')
    with pytest.raises(KfacDistError, match=r"events\.jsonl: line 2"):
        JournalTail(path).read(100)
