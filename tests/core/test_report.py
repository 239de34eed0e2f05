import json
import math
import os
from dataclasses import replace

import pytest

from hf_recipe.core import report as module
from hf_recipe.core.exhibit import EXHIBITS, Answer, Table
from hf_recipe.core.finding import STAGES, Finding
from hf_recipe.core.report import MOST_KEPT, Gate, Report, Stored, write_atomically
from tests.report.samples import rich_report


def found(check="a", severity="warning", **more):
    return Finding(check=check, stage="data", severity=severity, message="m", **more)


def stored(step=1, kind="Loss", moment="run", split="train", **values):
    return Stored(kind, 1, moment, split, step, values)


# -------------------------------------------------------------------- JSON


def test_json_is_lossless_for_every_kind_of_exhibit(tmp_path):
    report = rich_report()
    assert {type(e).__name__ for e in report.exhibits} == set(EXHIBITS)
    text = report.to_json(tmp_path / "report.json")
    again = Report.from_json(tmp_path / "report.json")
    assert again.to_json() == text
    assert repr(again.exhibits) == repr(report.exhibits)
    assert repr(again.findings) == repr(report.findings)
    assert again.measurements == report.measurements
    assert again.gates == report.gates
    assert again.answers == report.answers


def test_json_has_no_bare_nan_and_evidence_keeps_its_nested_ones():
    def refuse(constant):
        raise AssertionError(constant)

    data = json.loads(rich_report().to_json(), parse_constant=refuse)
    (error,) = [f for f in Report.from_dict(data).findings if f.severity == "error"]
    assert math.isnan(error.evidence["losses"][1])
    assert error.evidence["losses"][2]["deep"] == [math.inf, -math.inf]


def test_json_holds_texts_that_have_no_utf8(tmp_path):
    report = Report(title="\ud83d half a pair, \x00 and é")
    report.to_json(tmp_path / "r.json")
    assert Report.from_json(tmp_path / "r.json").title == report.title


def test_another_schema_is_refused():
    with pytest.raises(ValueError, match=r"schema 'other/1', expected"):
        Report.from_dict({"schema": "other/1"})


# -------------------------------------------------------------------- adding


def test_repeats_count_up():
    report = Report()
    report.add(found(step=1, last_step=1))
    assert report.add(found(step=5, last_step=5)).count == 2
    report.add(found(subject="other"))
    assert [(f.subject, f.count, f.step) for f in report.flat] == [("", 2, 1), ("other", 1, None)]


def test_a_run_keeps_the_newest_measurement_and_those_in_which_something_was_found():
    report = Report()
    report.store(stored(1, x=1), keep=True)
    for step in range(2, 50):
        report.store(stored(step, x=step))
    assert [m.step for m in report.measurements] == [1, 49]
    report.store(stored(50, split="validation", x=0))
    assert [m.step for m in report.measurements] == [1, 49, 50]


def test_a_fault_at_every_flush_does_not_push_out_the_first_ones_or_the_preflight():
    report = Report()
    report.store(stored(None, "Columns", "dataset", x=0))
    for step in range(5000):
        report.store(stored(step, x=step), keep=True)
    steps = [m.step for m in report.measurements]
    assert steps == [None, *range(MOST_KEPT - 1), 4999]


def test_a_probe_that_sees_the_same_again_is_kept_once_and_its_columns_all():
    report = Report()
    for _ in range(2):
        for column in ("a", "b"):
            report.store(stored(None, "Column", "dataset", column=column))
    assert [m.values["column"] for m in report.measurements] == ["a", "b"]


def test_exhibits_answers_and_gates_are_replaced_by_their_later_selves():
    report = Report()
    for cell in (1, 2):
        report.exhibit(Table("t", "data", ("c",), ((cell,),)))
        report.answer(Answer("q", "data", str(cell)))
        report.gate(Gate("tune", "pass"))
        report.gate(Gate("data", "warn" if cell == 1 else "pass"))
    assert [e.rows for e in report.exhibits] == [((2,),)]
    assert [a.answer for a in report.answers] == ["2"]
    assert [(g.stage, g.verdict) for g in report.gates] == [("data", "pass"), ("tune", "pass")]


def test_at_least():
    report = Report(flat=[found("a", "note"), found("b", "error"), found("c")])
    assert [f.check for f in report.at_least("warning")] == ["b", "c"]
    with pytest.raises(ValueError, match="got 'bad'"):
        report.at_least("bad")


# -------------------------------------------------------------------- what comes next


def test_the_next_step_is_the_worst_finding_then_the_first_shut_gate_then_the_next_stage():
    report = Report(flat=[found("w", fix="f()"), found("e", "error", fix="g()", subject="x")])
    assert report.next_step == "Mend e (x) first: g()"
    report.flat = [found("w")]
    assert report.next_step == "Mend w first: hf-recipe explain w"
    report.flat = [found("n", "note")]
    report.gate(Gate("data", "pass"))
    assert "one_batch" in report.next_step
    report.gate(Gate("complexify", "fail", ("never overfitted",)))
    assert report.next_step == "The complexify gate is shut: never overfitted"
    for stage in STAGES:
        report.gate(Gate(stage, "pass"))
    assert report.next_step == "All five gates are open: leave it in training."
    report.gate(Gate("tune", "warn", ("distilled", "warn: undecided")))
    assert report.next_step == "All five gates are open, tune with a doubt: undecided"
    assert "one_batch" in Report().next_step


# -------------------------------------------------------------------- privacy


def test_redacted_holds_no_row_of_the_data():
    report = rich_report()
    report.add(found(quotes=("canary",), symptoms=(found("s", quotes=("canary",)),)))
    report.exhibit(Table("t", "data", ("canary",), (("canary",),), private=True))
    report.crashed |= {"c": "KeyError: 'canary'", "d": "canary alone", "e": "canary: 3 rows"}
    report.measurements += [
        replace(
            stored(rows=[{"text": "canary", "loss": 1.0}], seen=["canary"]),
            private=("rows.text", "seen"),
        )
    ]
    shown = report.redacted()
    text = shown.to_json()
    assert text.count("canary") == 1  # the type of an error is no value of the data
    assert shown.crashed["c"] == "KeyError"
    assert shown.crashed["d"] == "error"
    assert "secret" not in text
    assert shown.measurements[-1].values == {"rows": [{"loss": 1.0}]}
    assert not any(f.examples for f in shown.flat)
    assert not any(e.private for e in shown.exhibits)
    assert "canary" in report.to_json()  # the report itself is as it was


# -------------------------------------------------------------------- writing


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "report.json"
    write_atomically(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(module.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["report.json"]


def test_a_written_file_has_the_usual_permissions(tmp_path):
    write_atomically(tmp_path / "ours", b"x")
    (tmp_path / "plain").write_bytes(b"x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
