"""Tables for people and JSON and YAML for programs, with texts and times of every kind."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
import yaml

from kfac_dist.cli.output import Format, key_table, make_table, moment, write_result, write_table

HOSTILE = "\x1b[31m[bold]x[/bold] :smile: \x9b\u202e"
SHOWN = r"\u001b[31m[bold]x[/bold] :smile: \u009b\u202e"


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "CET-1CEST")
        time.tzset()
        yield
    time.tzset()


def test_tables_show_texts_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    write_table(make_table((HOSTILE, "b"), [(HOSTILE, 1)], right=()))
    write_table(key_table({HOSTILE: {HOSTILE: HOSTILE}}))
    out = capsys.readouterr().out
    assert out.count(SHOWN) == 5
    assert "\x1b" not in out


@pytest.mark.parametrize("output", [Format.json, Format.yaml])
def test_programs_read_the_same_text(output: Format, capsys: pytest.CaptureFixture[str]) -> None:
    write_result({"text": HOSTILE, "umlaut": "ü"}, output)
    out = capsys.readouterr().out
    assert not {"\x1b", "\x9b", "\u202e"} & set(out)
    read = json.loads(out) if output is Format.json else yaml.safe_load(out)
    assert read == {"text": HOSTILE, "umlaut": "ü"}


@pytest.mark.usefixtures("berlin")
def test_people_read_local_time_with_its_zone(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"winter": moment(1769868309.5), "summer": moment(1784124309.0), "never": moment(None)}
    write_result(facts, Format.table)
    out = capsys.readouterr().out
    assert "2026-01-31 15:05:09 CET" in out
    assert "2026-07-15 16:05:09 CEST" in out
    assert "never" not in out


@pytest.mark.usefixtures("berlin")
@pytest.mark.parametrize("output", [Format.json, Format.yaml])
def test_programs_read_utc(output: Format, capsys: pytest.CaptureFixture[str]) -> None:
    write_result({"then": moment(1769868309.5), "never": moment(None)}, output)
    out = capsys.readouterr().out
    read = json.loads(out) if output is Format.json else yaml.safe_load(out)
    assert read == {"then": "2026-01-31T14:05:09.500Z", "never": None}


def test_rows_of_a_cut_table_have_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("a-long-name-of-a-job" * 5, "first\nsecond " * 200), ("b", None)]
    write_table(make_table(("job", "message"), rows, right=(), cut="message"))
    header, first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(rows[0][0])
    assert len(first) <= 200
    assert first.endswith("…")
    assert second.split() == ["b", "-"]
    assert header.split() == ["job", "message"]
