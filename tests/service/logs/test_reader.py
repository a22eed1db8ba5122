"""Logs as one stream: order, filters, continuing at a cursor, and names that lead elsewhere."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.errors import UsageError
from kfac_dist.service.job_records import LogLine
from kfac_dist.service.logs import LogCursor, LogFilter, read_lines
from kfac_dist.service.logs.files import MAX_LINE_BYTES
from kfac_dist.service.logs.reader import MAX_LINES

ALL = LogFilter()


def stamped(second: int, text: str) -> str:
    return json.dumps({"event": text, "timestamp": f"2026-01-01T00:00:{second:02d}Z"}) + "\n"


def texts(lines: list[LogLine]) -> list[str]:
    return [json.loads(line.text)["event"] if line.time else line.text for line in lines]


def read_all(folder: Path, wanted: LogFilter = ALL, *, complete: bool = True) -> list[LogLine]:
    cursor, lines = LogCursor(), []
    while True:
        batch, cursor = read_lines(folder, wanted, cursor, complete=complete)
        if not batch:
            return lines
        lines += batch
        cursor = LogCursor.decode(cursor.encode("job"), "job")


def test_lines_of_workers_come_by_time(tmp_path: Path) -> None:
    (tmp_path / "inverse_worker-0.log").write_text(stamped(1, "a") + stamped(4, "d"))
    (tmp_path / "gradient_worker-1.log").write_text(stamped(2, "b") + stamped(3, "c"))
    (tmp_path / "gradient_worker-1.a2.log").write_text(stamped(5, "e"))
    (tmp_path / "driver-0.out").write_text("printed\n")
    lines = read_all(tmp_path)
    assert texts(lines) == ["printed", "a", "b", "c", "d", "e"]
    assert [(line.role, line.rank, line.attempt) for line in lines[-2:]] == [
        ("inverse_worker", 0, 1),
        ("gradient_worker", 1, 2),
    ]


@pytest.mark.parametrize(
    ("wanted", "left"),
    [
        (LogFilter(roles=frozenset({"inverse_worker"})), ["a"]),
        (LogFilter(ranks=frozenset({1})), ["b", "c"]),
        (LogFilter(attempts=frozenset({2})), ["c"]),
        (LogFilter(roles=frozenset({"gradient_worker"}), attempts=frozenset({1})), ["b"]),
        (LogFilter(roles=frozenset({"nobody"})), []),
    ],
)
def test_filters(tmp_path: Path, wanted: LogFilter, left: list[str]) -> None:
    (tmp_path / "inverse_worker-0.log").write_text(stamped(1, "a"))
    (tmp_path / "gradient_worker-1.log").write_text(stamped(2, "b"))
    (tmp_path / "gradient_worker-1.a2.log").write_text(stamped(3, "c"))
    assert texts(read_all(tmp_path, wanted)) == left


def test_a_line_that_is_being_written_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "driver-0.log"
    path.write_text("whole\nhal")
    lines, cursor = read_lines(tmp_path, ALL, LogCursor(), complete=False)
    assert texts(lines) == ["whole"]
    assert read_lines(tmp_path, ALL, cursor, complete=False)[0] == []
    with path.open("a") as file:
        file.write("f\nlast")
    lines, cursor = read_lines(tmp_path, ALL, cursor, complete=False)
    assert texts(lines) == ["half"]
    lines, _ = read_lines(tmp_path, ALL, cursor, complete=True)
    assert texts(lines) == ["last"]


def test_a_log_that_appears_later_is_read_from_its_beginning(tmp_path: Path) -> None:
    (tmp_path / "driver-0.log").write_text("one\n")
    _, cursor = read_lines(tmp_path, ALL, LogCursor(), complete=False)
    (tmp_path / "inverse_worker-0.log").write_text("two\n")
    lines, _ = read_lines(tmp_path, ALL, cursor, complete=False)
    assert texts(lines) == ["two"]


@given(
    st.lists(st.integers(0, 3), max_size=40),
    st.integers(0, 12),
)
def test_the_tail_is_the_last_lines(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], wanted: int
) -> None:
    folder = tmp_path_factory.mktemp("logs")
    lines = [f"{number}" * length for number, length in enumerate(lengths)]
    (folder / "driver-0.log").write_text("".join(f"{line}\n" for line in lines))
    got, _ = read_lines(folder, ALL, LogCursor(), complete=True, tail_lines=wanted)
    assert texts(got) == lines[max(0, len(lines) - wanted) :]


def test_a_very_long_line_comes_in_pieces_and_batches_are_bounded(tmp_path: Path) -> None:
    long = "x" * (3 * MAX_LINE_BYTES + 5)
    (tmp_path / "driver-0.log").write_text(long + "\n" + "y\n" * (2 * MAX_LINES))
    lines = read_all(tmp_path)
    assert "".join(line.text for line in lines[:4]) == long
    assert len(lines) == 4 + 2 * MAX_LINES
    batch, _ = read_lines(tmp_path, ALL, LogCursor(), complete=True)
    assert len(batch) <= MAX_LINES


def test_bytes_that_are_not_text_are_shown_with_replacements(tmp_path: Path) -> None:
    (tmp_path / "driver-0.log").write_bytes(b"\xff\xfe\x00 odd\n{broken\n[1]\n")
    assert [line.text for line in read_all(tmp_path)] == ["\ufffd\ufffd\x00 odd", "{broken", "[1]"]


def test_only_plain_files_with_the_names_of_logs_are_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret\n")
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "driver-0.log").symlink_to(secret)
    (folder / "notes.log").write_text("not ours\n")
    (folder / "driver-0.log.bak").write_text("not ours\n")
    (folder / "inverse_worker-0.log").mkdir()
    assert read_all(folder) == []
    assert read_all(tmp_path / "missing") == []


def token(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


@pytest.mark.parametrize(
    "text",
    [
        "no token",
        "äöü",
        token([]),
        token({"driver-0.log": 0}),
        token(["job", ["driver-0.log"]]),
        token([1, {}]),
        token(["job", {"../secret.txt": 0}]),
        token(["job", {"driver-0.log": -1}]),
        token(["job", {"driver-0.log": 2**70}]),
        token(["job", {"driver-0.log": True}]),
        token(["job", {"driver-0.log": "1"}]),
        "A" * 100_000,
    ],
)
def test_a_made_up_token_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="resume_token: not a token"):
        LogCursor.decode(text, "job")


def test_a_token_of_another_job_is_refused() -> None:
    given = LogCursor(offsets={"driver-0.log": 5}).encode("one")
    assert LogCursor.decode(given, "one").offsets == {"driver-0.log": 5}
    with pytest.raises(UsageError, match="belongs to the logs of job one, not of two"):
        LogCursor.decode(given, "two")


def test_an_offset_beyond_the_end_gives_nothing(tmp_path: Path) -> None:
    (tmp_path / "driver-0.log").write_text("one\n")
    cursor = LogCursor(offsets={"driver-0.log": 10_000})
    assert read_lines(tmp_path, ALL, cursor, complete=True)[0] == []
