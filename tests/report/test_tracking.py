import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from hf_recipe.core.exhibit import Table
from hf_recipe.core.finding import Finding
from hf_recipe.core.report import Report
from hf_recipe.report import tracking
from hf_recipe.report.tracking import TrackingSink, scalars, status
from tests.report.samples import rich_report

CANARY = "canary-4711"


class Run:
    """Takes what a run of W&B takes, so that what is sent can be counted."""

    def __init__(self):
        self.logged, self.alerts, self.summary, self.metrics = [], [], {}, []

    def log(self, values, **options):
        assert not options  # never step=
        self.logged.append(values)

    def alert(self, **alert):
        self.alerts.append(alert)

    def define_metric(self, name, **options):
        self.metrics.append(name)


@pytest.fixture
def run(monkeypatch):
    run = Run()
    monkeypatch.setattr(tracking, "wandb_run", lambda: run)
    return run


def test_scalars_are_what_a_sweep_can_sort_by():
    assert scalars(rich_report()) == {
        "recipe/errors": 1,
        "recipe/warnings": 2,
        "recipe/notes": 2,
        "recipe/loss-not-finite": 2,
        "recipe/gradient-not-finite": 1,
        "recipe/clipping-dominates": 8,
        "recipe/split-leak": 1,
        "recipe/class-imbalance": 1,
        "recipe/duplicate-example": 1,
    }
    assert status(rich_report()) == "error"
    assert status(Report(ran={"a": ["run"]})) == "healthy"


def test_an_update_logs_against_the_global_step_and_only_what_is_new(run):
    sink, report = TrackingSink(), Report(ran={"a": ["run"]})
    sink.update(report, 0)
    sink.update(report, 10)
    report.add(Finding(check="a", stage="data", severity="warning", message="m"))
    sink.update(report, 20)
    assert run.logged == [
        {"recipe/errors": 0, "recipe/warnings": 0, "recipe/notes": 0, "train/global_step": 0},
        {"recipe/errors": 0, "recipe/warnings": 1, "recipe/notes": 0, "recipe/a": 1,
         "train/global_step": 20},
    ]  # fmt: skip
    assert run.metrics == ["train/global_step", "recipe/*"]
    assert run.summary["recipe/status"] == "warning"
    assert run.summary["recipe/a"] == 1


def test_an_alert_per_name_of_an_error_and_none_of_a_warning(run):
    sink, report = TrackingSink(), rich_report()
    for subject in ("x", "y"):
        report.add(replace(report.flat[0], subject=subject))
        sink.update(report, 1)
    assert [alert["title"] for alert in run.alerts] == ["error: loss-not-finite"]
    assert run.alerts[0]["level"] == "ERROR"
    assert "logged 4.297" in run.alerts[0]["text"]


def test_without_a_run_nothing_happens(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=None))
    TrackingSink().close(rich_report(), 3)
    monkeypatch.delitem(sys.modules, "wandb")
    TrackingSink().close(rich_report(), 3)
    assert "wandb" not in sys.modules


def test_trackio_is_told_of_errors_if_it_has_a_run(monkeypatch):
    told, active = [], SimpleNamespace(get=lambda: None)
    trackio = SimpleNamespace(
        context_vars=SimpleNamespace(current_run=active),
        AlertLevel={"ERROR": "level-error"},
        alert=lambda **alert: told.append(alert),
    )
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    TrackingSink(["trackio"]).update(rich_report(), 1)
    assert told == []
    active.get = lambda: "a run"
    TrackingSink(["wandb"]).update(rich_report(), 1)
    assert told == []
    TrackingSink(["trackio"]).update(rich_report(), 1)
    assert [(a["title"], a["level"]) for a in told] == [("error: loss-not-finite", "level-error")]


# -------------------------------------------------------------------- a real run, offline


def private_report():
    report = rich_report()
    report.add(
        Finding(check="label-shortcut", stage="data", severity="error", message="3 rows",
                quotes=(CANARY,), examples=(987654321,))
    )  # fmt: skip
    report.exhibit(Table("rows", "data", ("text",), ((CANARY,),), private=True))
    report.crashed["c"] = f"ValueError: {CANARY} (probe, x.py:1)"
    report.measurements[0] = replace(report.measurements[0], values={"raw": [1.0], "rows": CANARY})
    return report


SCRIPT = """
import sys
import wandb
from hf_recipe.core.report import Report
from hf_recipe.report.tracking import TrackingSink
report = Report.from_json(sys.argv[1])
sink = TrackingSink(log_samples=sys.argv[2] == "yes")
run = wandb.init(project="p", mode="offline")
run.log({"train/loss": 1.0, "train/global_step": 1})
sink.update(report, 1)
sink.follow({"predictions/row 3": 0.5, "lost": float("nan")}, 2)
sink.close(report, 2, tables=("rows",))
run.finish()
"""


def offline(tmp_path, samples):
    private_report().to_json(tmp_path / "in.json")
    folder = tmp_path / "wandb-all"
    places = ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")
    for name in places:
        (folder / name).mkdir(parents=True)
    environment = {**tracking.os.environ, "WANDB_MODE": "offline", "PYTHONPATH": "."}
    environment |= {name: str(folder / name) for name in places}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "in.json"), samples]
    subprocess.run(command, check=True, env=environment, timeout=240)
    (record,) = folder.rglob("*.wandb")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(record)]
    out = subprocess.run(
        inspect, check=True, env=environment, capture_output=True, text=True, timeout=240
    )
    records = [json.loads(line) for line in out.stdout.splitlines() if line.strip()]
    sent = b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file()) + out.stdout.encode()
    return folder, records, sent


@pytest.mark.slow
def test_what_an_offline_run_holds_and_that_no_row_is_in_it(tmp_path):
    folder, records, sent = offline(tmp_path, "no")
    history = [r["history"]["item"] for r in records if r["type"] == "history"]
    ours = [item for item in history if "recipe/errors" in item]
    assert [int(item["train/global_step"]) for item in ours] == [1]
    assert int(ours[0]["recipe/errors"]) == 2
    assert int(ours[0]["recipe/loss-not-finite"]) == 2
    (followed,) = [item for item in history if "recipe/predictions/row 3" in item]
    assert float(followed["recipe/predictions/row 3"]) == 0.5
    assert "recipe/lost" not in followed
    assert not list(folder.rglob("media/table/recipe/rows*.table.json"))
    titles = [r["alert"]["title"] for r in records if r["type"] == "alert"]
    assert titles == ["error: loss-not-finite", "error: label-shortcut"]

    (table,) = folder.rglob("media/table/recipe/findings*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"][:2] == ["severity", "check"]
    assert content["data"][0][1] == "loss-not-finite"
    assert "quotes" not in content["columns"]
    assert b"Not sound: " in sent  # the page is among the artifact's files
    assert CANARY.encode() not in sent
    assert b"987654321" not in sent
    assert b"iVBORw0KGgo" not in sent  # nor is a picture of a row


@pytest.mark.slow
def test_rows_leave_the_machine_with_consent(tmp_path):
    folder, _, sent = offline(tmp_path, "yes")
    (table,) = folder.rglob("media/table/recipe/findings*.table.json")
    assert CANARY in table.read_text()
    (rows,) = folder.rglob("media/table/recipe/rows*.table.json")
    assert CANARY in rows.read_text()
    assert b"987654321" in sent
    assert b"iVBORw0KGgo" in sent
