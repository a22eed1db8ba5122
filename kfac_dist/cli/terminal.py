"""Makes text safe to show on a terminal, also text of other people."""

from __future__ import annotations

# C0 without tab and newline, DEL, C1, marks that reverse the direction of writing, separators of
# lines and paragraphs, and lone surrogates, which no stream can encode.
_UNSAFE = (
    *(code for code in range(0x20) if code not in (0x09, 0x0A)),
    *range(0x7F, 0xA0),
    0x061C,
    0x200E,
    0x200F,
    *range(0x2028, 0x202F),
    *range(0x2066, 0x206A),
    *range(0xD800, 0xE000),
)
_ESCAPES = {code: f"\\u{code:04x}" for code in _UNSAFE}
_INDENT = "    "


def plain(text: str) -> str:
    r"""Return a text with its control characters written as `\u001b`; tabs and newlines stay.

    A terminal obeys the characters, with which a message could clear the screen, set the title or
    pretend to be another message. JSON stays the same JSON, because that is its own notation.
    """
    return text.translate(_ESCAPES)


def one_line(text: str) -> str:
    """Return a text on one line, plain, its lines joined by spaces."""
    return plain(" ".join(text.split()))


def indented(text: str) -> str:
    """Return a plain text whose lines after the first are set in, so that none looks like ours."""
    return plain(text).replace("\n", "\n" + _INDENT)
