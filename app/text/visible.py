"""How is foreign text shown? As the text that it is: nothing in it is invisible, turns its neighbours round or is endless."""

# Names of files, attributes and labels come from whoever wrote a run. Control characters clear a terminal, bidirectional
# overrides (U+202E) turn a sentence round, zero-width characters make two names look the same, and a lone surrogate cannot
# be written to a file at all. Every face shows them as Python writes them, such as \u202e.

from __future__ import annotations

import re
import unicodedata

LONGEST_NAME = 120
"""Letters of a name, such as that of a run or a module. A heuristic of ours: as many as fit into one line of a page."""

LONGEST_LABEL = 60
"""Letters of a name inside a figure, whose curves need the room. A heuristic of ours: half the width of a page."""

LONGEST_TEXT = 2000
"""Letters of any other text of a run, such as an attribute: about a page. A heuristic of ours."""

# Cc control, Cf format (bidirectional, zero width, tags), Cs surrogate, Co private use, Cn unassigned, Zl and Zp line and
# paragraph separators. Zs are spaces; all but the plain one look like it.
_INVISIBLE_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"})
# Letters and marks that Unicode shows as nothing (Default_Ignorable_Code_Point), and the blank Braille pattern.
_BLANKS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0")
# Inside an emoji these two choose and join pictures: 👩 + joiner + 🔬 is one sign.
_EMOJI_PARTS = frozenset({0x200D, 0xFE0F})
# On one letter; no writing system that we know of needs more, and a tower of them covers other lines
_MOST_MARKS = 4
_EMOJI_CATEGORIES = frozenset({"So", "Sk", "Mn"})
_RIGHT_TO_LEFT = frozenset({"R", "AL", "AN"})
_ISOLATED, _END = "\u2068", "\u2069"
_SPACES = re.compile(r"^ +| +$|(?<= ) +")


def visible(text: object, *, lines: bool = False, longest: int | None = None) -> str:
    r"""Text in which everything can be seen; what cannot is written as Python escapes it.

    Words of right-to-left scripts are isolated, so that they do not move what is around them.

    ``text``: anything; what is no text is converted to it.
    ``lines``: keep line breaks and tabs, where the place has room for them.
    ``longest``: letters after which the middle is left out, see `shortened`; None keeps all.

    Examples
    --------
    >>> visible("a\u202egnp.exe"), visible("a\x1b[2J\x00"), visible("naïve 模型 🔭")
    ('a\\u202egnp.exe', 'a\\x1b[2J\\x00', 'naïve 模型 🔭')
    """
    shown = str(text)
    # Before anything that looks at each letter: a text of megabytes costs no more than a page.
    if longest is not None:
        shown = shortened(shown, longest)
    if shown.isascii() and shown.isprintable():
        return shown
    kept = "\n\t" if lines else ""
    # A text that was isolated before comes back unchanged.
    isolated = shown.startswith(_ISOLATED) and shown.endswith(_END)
    inner = _escaped(shown[1:-1] if isolated else shown, kept)
    if any(unicodedata.bidirectional(letter) in _RIGHT_TO_LEFT for letter in inner):
        return f"{_ISOLATED}{inner}{_END}"
    return _escaped(shown, kept) if isolated else inner


def visible_name(name: object) -> str:
    r"""The name of a run, a chain or a module, in which also the spaces that a page would lose can be seen.

    ``name``: such as the name of a file.
    Returns: At its full length; names that differ still do.
    """
    return visible(_SPACES.sub(lambda found: r"\x20" * len(found.group()), str(name)))


def _escaped(text: str, kept: str) -> str:
    found: list[str] = []
    marks = 0
    for place, letter in enumerate(text):
        marks = marks + 1 if unicodedata.combining(letter) else 0
        seen = _is_seen(letter) and marks <= _MOST_MARKS
        if letter in kept or seen or _is_in_emoji(text, place):
            found.append(letter)
        else:
            found.append(escape(letter))
    return "".join(found)


def escape(letter: str) -> str:
    """A letter as Python escapes it."""
    return letter.encode("unicode_escape").decode("ascii")


def _is_seen(letter: str) -> bool:
    if letter == " ":
        return True
    if unicodedata.category(letter) in _INVISIBLE_CATEGORIES or letter in _BLANKS:
        return False
    # Variation selectors.
    return not ("\ufe00" <= letter <= "\ufe0f" or "\U000e0100" <= letter <= "\U000e01ef")


def _is_in_emoji(text: str, place: int) -> bool:
    """Whether a joiner or a selector follows a picture, where it has its meaning."""
    before = text[place - 1 : place]
    return (
        ord(text[place]) in _EMOJI_PARTS
        and before > "\u2000"
        and unicodedata.category(before) in _EMOJI_CATEGORIES
    )


def shortened(text: str, longest: int, *, counted: bool = True) -> str:
    """Text without its middle where it is too long, and how long it was.

    ``counted``: add how long it was, where there is room.
    """
    if len(text) <= longest:
        return text
    # The beginning names the kind; the end is where names of one series differ.
    end = longest // 4
    kept = f"{text[: longest - end]} … {text[len(text) - end :]}"
    return f"{kept} ({len(text)} characters)" if counted else kept
