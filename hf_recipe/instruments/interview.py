"""Questions about rows, one at a time, with answers that survive a crash.

The terminal and the local page ask the same interview; what was answered is replayed from its
journal, so that closing either, or killing it, loses nothing.
"""

from __future__ import annotations

import base64
import io
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

import numpy as np

from hf_recipe.instruments.journal import Journal

SHADES = " .:-=+*#%@"
WIDE = 32  # characters of a picture in the terminal
LONG = 4_000  # characters of a text


@dataclass(frozen=True)
class Question:
    """One row to be asked about.

    Attributes:
        row: its number in the data set.
        text: what is shown, as the network gets it; "" for a picture alone.
        picture: a PIL picture, or None.
        hint: a line above it; "" where the asking is blind.
        facts: kept with the answer in the journal.
    """

    row: int
    text: str = ""
    picture: Any = None
    hint: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


class Interview:
    """Where an interview stands: replayed from its journal, told of answers one by one."""

    def __init__(
        self, questions: Sequence[Question], choices: Sequence[str], journal: Journal
    ) -> None:
        self.questions, self.choices, self.journal = list(questions), tuple(choices), journal
        self.answers: dict[int, int | None] = {}
        for line in journal.lines[1:]:
            if "undo" in line:
                self.answers.pop(int(line["undo"]), None)
            else:
                self.answers[int(line["item"])] = line["choice"]
        self._asked: tuple[int, float] | None = None

    @property
    def place(self) -> int | None:
        """The number of the question to ask next; None at the end."""
        number = next((i for i in range(len(self.questions)) if i not in self.answers), None)
        if number is not None and (self._asked is None or self._asked[0] != number):
            self._asked = (number, time.monotonic())
        return number

    def answer(self, place: int, choice: int | None) -> bool:
        """Note the answer to question `place`; None skips it. False: it was not the one asked."""
        if place != self.place or not (choice is None or 0 <= choice < len(self.choices)):
            return False
        seconds = time.monotonic() - self._asked[1] if self._asked else 0.0
        question = self.questions[place]
        self.journal.add(
            {
                "item": place,
                "row": question.row,
                "choice": choice,
                "seconds": round(seconds, 2),
                **question.facts,
            }
        )
        self.answers[place] = choice
        return True

    def undo(self) -> bool:
        """Take the last answer back; False where there is none."""
        if not self.answers:
            return False
        last = max(self.answers)
        self.journal.add({"undo": last})
        del self.answers[last]
        self._asked = None
        return True


def ask_in_terminal(
    interview: Interview, *, keys: TextIO | None = None, screen: TextIO | None = None
) -> None:
    """Ask until the end, or until the user saves and leaves (q)."""
    keys, screen = keys or sys.stdin, screen or sys.stdout
    names = "  ".join(f"{i} {name}" for i, name in enumerate(interview.choices))
    screen.write(f"{names}\nu undo  s skip  q save and leave\n")
    while (place := interview.place) is not None:
        question = interview.questions[place]
        screen.write(f"\n[{place + 1}/{len(interview.questions)}] {question.hint}\n")
        screen.write(_shown(question) + "\n> ")
        screen.flush()
        key = read_key(keys, single=len(interview.choices) <= 10)
        if key in ("q", ""):
            break
        if key == "u":
            interview.undo()
        elif key == "s":
            interview.answer(place, None)
        elif not (key.isdecimal() and interview.answer(place, int(key))):
            screen.write(f"{key!r}? 0 to {len(interview.choices) - 1}, u, s or q\n")
    screen.write(f"\nsaved: {interview.journal.path} ({len(interview.answers)} answers)\n")


def read_key(keys: TextIO, *, single: bool) -> str:
    """One key in a terminal (where `single`), or one line; "" at the end of the input."""
    if not (single and keys.isatty()):
        line = keys.readline()
        return line.strip().lower() or ("?" if line else "")
    import termios
    import tty

    handle = keys.fileno()
    before = termios.tcgetattr(handle)
    try:
        tty.setcbreak(handle)
        return keys.read(1).lower()
    finally:
        termios.tcsetattr(handle, termios.TCSADRAIN, before)


def _shown(question: Question) -> str:
    text = "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}"
        for c in question.text[:LONG]
    )
    if question.picture is None:
        return text
    grey = question.picture.convert("L")
    height = max(1, WIDE * grey.height // (2 * grey.width))
    values = np.asarray(grey.resize((WIDE, height)), dtype=int) * (len(SHADES) - 1) // 255
    return text + "\n".join("".join(SHADES[v] for v in line) for line in values)


def png(picture: Any) -> str:
    """A PIL picture as PNG in base64, or "" for None."""
    if picture is None:
        return ""
    held = io.BytesIO()
    picture.convert("RGB" if picture.mode not in ("L", "RGB", "RGBA") else picture.mode).save(
        held, format="PNG"
    )
    return base64.b64encode(held.getvalue()).decode()
