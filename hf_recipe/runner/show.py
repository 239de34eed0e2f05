"""What the main job prints: a heading per stage, a line per experiment, gates, a last table."""

from __future__ import annotations

import contextlib
import math
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from hf_recipe.core.finding import Finding
from hf_recipe.core.report import GATES, Gate, Report
from hf_recipe.instruments.compare import Outcome, Variant
from hf_recipe.report.console import WIDTH, ConsoleSink

COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}


class Show:
    """Prints on rank 0 alone; bars only on a terminal.

    Args:
        leads: False: nothing is printed.
    """

    def __init__(self, leads: bool = True) -> None:
        self.leads = leads
        self.console = Console(file=sys.stdout, quiet=not leads, highlight=False, soft_wrap=True)
        self.sink = ConsoleSink(enabled=leads)
        self._told: set[str] = set()

    def silent_sink(self) -> ConsoleSink:
        """For the recipe of one experiment: what it finds is printed by `finding`."""
        return ConsoleSink(enabled=False)

    def say(self, text: str) -> None:
        for given in text.split("\n"):
            for line in _wrapped(given, len(given) - len(given.lstrip())):
                self.console.print(line, markup=False)

    def once(self, text: str) -> None:
        """As `say`, but never twice."""
        if text not in self._told:
            self._told.add(text)
            self.say(text)

    def stage(self, stage: str) -> None:
        self.console.print()
        self.console.print(f"{stage.upper()}", style="bold", markup=False)

    def finding(self, finding: Finding) -> None:
        self.sink.finding(finding)

    def gate(self, gate: Gate) -> None:
        head = f"  gate: {gate.verdict.upper()}  \u201c{GATES[gate.stage]}\u201d"
        for line in _wrapped(head, 8):
            self.console.print(line, style=COLOURS[gate.verdict], markup=False)
        for reason in gate.reasons:
            self.say(f"        {reason}")

    def experiment(
        self, number: int, variant: Variant, outcome: Outcome, metric: str, *, known: bool
    ) -> None:
        if variant.key in self._told:
            return  # a stage looks back at what another one ran
        self._told.add(variant.key)
        loss = f"{outcome.loss:.4f}" if math.isfinite(outcome.loss) else "not finite"
        score = "" if outcome.metric is None else f"  {metric} {outcome.metric:.4f}"
        if "validation" in variant.settings["part"]:
            loss, score = "-", ""  # it was learned from: not a score
        cost = "done before" if known else f"{outcome.cost:.1f} s"
        what = f"{variant.change} (seed {variant.seed})"
        self.say(f"  {number:3d}  {what:<46}  loss {loss}{score}  {cost}")

    @contextlib.contextmanager
    def training(self, name: str) -> Iterator[Any]:
        """A bar while one experiment trains; yields a callback, or None without a terminal."""
        if not (self.leads and self.console.is_terminal):
            yield None
            return
        from hf_recipe.runner.pieces import Progress as Teller

        columns = (TextColumn("       {task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(name, total=None)
            tell: Callable[[int, int], None] = lambda step, total: progress.update(  # noqa: E731
                task, completed=step, total=total
            )
            yield Teller(tell)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        table = RichTable(title=title, title_justify="left", box=None, pad_edge=False)
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*row)
        self.console.print()
        self.console.print(table)

    def closing(self, report: Report, path: str) -> None:
        self.console.print()
        self.sink.summary(report, path)


def _wrapped(line: str, hanging: int) -> list[str]:
    """`line` in lines of at most WIDTH columns; a path is never broken."""
    return textwrap.wrap(
        line,
        WIDTH,
        subsequent_indent=" " * hanging,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [""]
