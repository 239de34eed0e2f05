"""`hf-recipe review` and `human`: a person looks at rows, in the terminal or on a local page."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from hf_recipe.baselines.human import HumanBaseline, human_baseline, human_interview, read_answers
from hf_recipe.core.check import Skip
from hf_recipe.core.report import write_atomically
from hf_recipe.data.review import review_of, suspects_of
from hf_recipe.data.source import Roles
from hf_recipe.inspection import choose_roles, load_splits, read_split, require_column
from hf_recipe.instruments.batches import Rows
from hf_recipe.instruments.interview import Interview, ask_in_terminal
from hf_recipe.instruments.local_page import LocalPage


def opened(options: Any) -> tuple[Any, Any, Roles]:
    """The split that was asked for, as a data set and as a source, with its columns' roles.

    Raises:
        ValueError: no such file, split or column.
    """
    splits = load_splits(options.path)
    name = options.split or next(iter(splits))
    if name not in splits:
        raise ValueError(f"no split {name!r}; there are {', '.join(splits)}")
    data = splits[name]
    source = read_split(name, data)
    named = [n for n in (options.text, options.image) if n]
    for column in (*named, *([options.label] if options.label else [])):
        require_column(column, source)
    return data, source, choose_roles(source, options.label, named)[0]


def ask(interview: Interview, *, web: bool) -> None:
    """Ask in the terminal, or serve the page until it is done or interrupted."""
    if not web:
        ask_in_terminal(interview)
        return
    page = LocalPage(interview)
    _say(f"open {page.address}\n(this machine only; Ctrl-C to save and leave)")
    try:
        page.done.wait()
    except KeyboardInterrupt:
        pass
    finally:
        page.close()
    _say(f"saved: {interview.journal.path} ({len(interview.answers)} answers)")


def review(options: Any) -> int:
    """Show suspects, write the patch file."""
    data, source, roles = opened(options)
    try:
        seen, suspects = suspects_of(
            Rows(data, data, dict, source.name), source, roles, most=options.count
        )
    except Skip as reason:
        raise ValueError(str(reason)) from None
    if not suspects:
        _say("no row's label is contradicted")
        return 0
    _say(f"{len(suspects)} suspects of {len(seen.rows):,} rows, worst first")
    interview = review_of(data, suspects, seen, roles, options.out)
    ask(interview, web=options.web)
    _say(f"apply it: hf_recipe.data.preprocess, ApplyReview({str(options.out)!r})")
    return 0


def human(options: Any) -> int:
    """Ask a person, then say what they reached."""
    data, _, roles = opened(options)
    folder = Path(options.output_dir)
    mine = folder / f"{options.annotator}.jsonl"
    interview = human_interview(
        data, roles, mine, count=options.count, seed=options.seed, annotator=options.annotator
    )
    again = len(interview.questions) - len({question.row for question in interview.questions})
    if again:
        _say(f"{len(interview.questions) - again} rows, {again} of them asked twice: "
             "how far do you agree with yourself?")  # fmt: skip
    ask(interview, web=options.web)
    answers = [read_answers(path) for path in sorted(folder.glob("*.jsonl"))]
    if not any(one.first for one in answers):
        _say("nothing answered yet")
        return 0
    labels = dict(enumerate(data[roles.label][:]))
    text = told(human_baseline(answers, labels))
    sys.stdout.write(text)
    write_atomically(folder / "human.txt", text)
    return 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def told(seen: HumanBaseline) -> str:
    """The figures as lines of text."""

    lines = [
        f"rows          {seen.rows}, by {seen.annotators} "
        f"annotator{'' if seen.annotators == 1 else 's'}",
        f"accuracy      {seen.right / seen.answered:.1%} [{seen.low:.1%}, {seen.high:.1%}]",
    ]
    if not math.isnan(seen.self_agreement):
        kappa = f"{seen.self_kappa:.3f} [{seen.kappa_low:.3f}, {seen.kappa_high:.3f}]"
        known = "undefined: one class alone" if math.isnan(seen.self_kappa) else kappa
        lines.append(f"self          agreement {seen.self_agreement:.3f}, kappa {known}")
    if not math.isnan(seen.alpha):
        lines.append(f"annotators    Krippendorff's alpha {seen.alpha:.3f}")
    if not math.isnan(seen.seconds):
        lines.append(f"time          {seen.seconds:.1f} s an answer")
    listed = ", ".join(map(str, seen.disagreements[:20]))
    more = " ..." if len(seen.disagreements) > 20 else ""
    lines.append(
        f"disagreements {len(seen.disagreements)}" + (f", rows {listed}{more}" if listed else "")
    )
    return "\n".join(lines) + "\n"
