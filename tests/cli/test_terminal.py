"""No text of another person can steer the terminal of the one who reads it."""

from __future__ import annotations

import json
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.cli.terminal import indented, one_line, plain


def test_control_characters_are_written_out() -> None:
    text = "\x1b[2J\x1b]0;title\x07 \x9b1m \x7f \u202eback\u2066 \r over"
    expected = r"\u001b[2J\u001b]0;title\u0007 \u009b1m \u007f \u202eback\u2066 " r"\u000d over"
    assert plain(text) == expected


def test_words_in_every_language_stay() -> None:
    text = "a\tb\nc Ünïcode 漢字 עברית 🎉 [bold]"
    assert plain(text) == text


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    shown = plain(text)
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n"]
    assert "\n" not in one_line(text)
    assert all(line.startswith("    ") for line in indented(text).split("\n")[1:])


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_json_means_the_same_afterwards(text: str) -> None:
    assert json.loads(plain(json.dumps({text: text}, ensure_ascii=False))) == {text: text}
