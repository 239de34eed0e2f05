import io
from dataclasses import replace

import pytest

from hf_recipe.core.finding import Finding
from hf_recipe.core.report import Report
from hf_recipe.report.console import ConsoleSink
from tests.report.samples import findings, rich_report


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def printed(*items, report=None, path=None, stream=None, **options):
    stream = stream or io.StringIO()
    sink = ConsoleSink(stream, **options)
    for item in items:
        sink.finding(item)
    if report is not None:
        sink.summary(report, path)
    return stream.getvalue()


def test_a_finding_in_full():
    assert printed(findings()[0]) == (
        "error[loss-not-finite] the raw loss is nan at 2 of 8 steps; the Trainer logged 4.297   "
        "train, step 4\n"
        "  seen      nan at steps 4 and 7; 21 of 21 parameters are nan\n"
        "  expected  a finite loss at every step\n"
        "  why       logging_nan_inf_filter=True replaces nan by the running mean in the log.\n"
        "  fix       TrainingArguments(..., logging_nan_inf_filter=False, bf16=True)\n"
        '  silence   ignore=["loss-not-finite"]\n'
        "  more      hf-recipe explain loss-not-finite\n"
    )


def test_the_longest_finding_fits_nine_lines_of_a_hundred_plain_columns():
    words = "ünïcödé words × 2 ± 1 without an end " * 20
    long = Finding(
        check="a-check-with-quite-a-long-name", stage="data", severity="error", message=words,
        evidence={"seen": words, "expected": words}, why=words, fix=words, split="validation",
        step=123456, rank=7,
    )  # fmt: skip
    text = printed(long)
    assert text.isascii()
    assert "x 2 +- 1" in text
    assert len(text.splitlines()) <= 9
    assert max(map(len, text.splitlines())) <= 100
    for label in ("seen", "expected", "why", "fix", "silence", "more"):
        assert f"\n  {label} " in text


def test_each_check_subject_and_split_is_told_once_and_in_full_only_the_first():
    error = findings()[0]
    text = printed(error, error, replace(error, step=9), replace(error, subject="head"))
    assert text.count("error[loss-not-finite]") == 2
    assert text.count("  why ") == 1
    assert "head: the raw loss" in text


def test_notes_wait_for_the_summary_and_a_trial_tells_errors_only():
    error, warning, note = findings()[0], findings()[1], findings()[-1]
    assert printed(note) == ""
    assert "warning[" in printed(warning)
    assert printed(warning, note, trial_mode=True) == ""
    assert "error[" in printed(error, trial_mode=True)


def test_other_processes_are_silent():
    assert printed(*findings(), report=rich_report(), enabled=False) == ""


def test_nothing_out_of_the_data_is_printed():
    text = printed(*findings(), report=rich_report(), path="r.html")
    assert "alert(1)" not in text  # a quote
    assert "391" not in text  # a row
    assert "secret" not in text  # the text of a crash
    assert "ranks-diverge (ValueError)" in text


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_codes_that_a_terminal_would_obey_are_shown(stream, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    odd = Finding(
        check="a", stage="data", severity="error", message="\x1b[2J\x07 column \u202ex\nb"
    )
    text = printed(odd, stream=stream())
    assert "\\x1b[2J\\x07 column \\u202ex b" in text
    assert "\x1b" not in text


def test_colour_on_a_terminal_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[1;31merror[loss-not-finite]\x1b[0m" in printed(findings()[0], stream=Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in printed(findings()[0], stream=Terminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in printed(findings()[0], stream=io.StringIO())


def test_the_summary():
    assert printed(report=rich_report(), path="out/recipe/report.html").splitlines() == [
        "hf-recipe: 1 error, 2 warnings, 2 notes; 18 ran, 3 skipped, 1 crashed",
        "  error[loss-not-finite] the raw loss is nan at 2 of 8 steps; the Trainer logged 4.297 "
        "(train, step",
        "    4, 2 times)",
        "    explains gradient-not-finite",
        "  warning[clipping-dominates] 92 % of the steps were clipped to a tenth of their length "
        "or less",
        "    (train, step 100, 8 times)",
        "  warning[split-leak] text: 31 of 1,000 validation rows (3.1 %) stand near-identical in "
        "training",
        "    (validation)",
        "  notes     class-imbalance, duplicate-example",
        "  skipped   2: no eval_dataset; 1: the run was not resumed",
        "  crashed   ranks-diverge (ValueError)",
        "  next      Mend loss-not-finite first: TrainingArguments(..., "
        "logging_nan_inf_filter=False,",
        "            bf16=True)",
        "  report    out/recipe/report.html",
    ]


def test_a_healthy_run_is_one_short_line_and_a_healthy_trial_none():
    healthy = Report(ran={"a": ["run"], "b": ["run"]}, skipped={"c": "no eval_dataset"})
    line = "hf-recipe: healthy; 2 ran, 1 skipped; report: r.html\n"
    assert printed(report=healthy, path="r.html") == line
    assert printed(report=healthy, trial_mode=True) == ""
    healthy.flat = [
        Finding(check=f"a-note-{i}", stage="data", severity="note", message="m") for i in range(5)
    ]
    line = "hf-recipe: 5 notes (a-note-0, a-note-1, a-note-2 and 2 more); 2 ran, 1 skipped\n"
    assert printed(report=healthy) == line
    assert printed(report=healthy, path="p" * 300) == line
    line = "hf-recipe: 5 notes; 2 ran, 1 skipped; report: a/longer/folder/report.html\n"
    assert printed(report=healthy, path="a/longer/folder/report.html") == line


def test_many_reasons_are_shortened():
    report = Report(flat=[findings()[0]], skipped={f"c-{i}": f"reason {i}" for i in range(40)})
    text = printed(report=report)
    assert "40 skipped" in text
    assert "37 more in the report" in text
    assert len(text.splitlines()) < 12


def test_reasons_are_counted_and_named_without_what_differs_by_check():
    skipped = {f"c-{i}": f"runs by its own call: hf_recipe.call_{i}(...)" for i in range(8)}
    report = Report(
        flat=[findings()[0]], skipped={**skipped, "d": "there is no tokenizer: give it"}
    )
    told = [line for line in printed(report=report).splitlines() if "own call" in line]
    assert told == ["  skipped   8: runs by its own call; 1: there is no tokenizer"]
