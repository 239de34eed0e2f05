import json

from hf_recipe.core.report import Report
from hf_recipe.report.sarif import render_sarif
from tests.report.samples import findings, rich_report


def run_of(report, **options):
    log = json.loads(render_sarif(report, **options))
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    return run


def test_results_point_at_their_rules():
    run = run_of(rich_report())
    rules = run["tool"]["driver"]["rules"]
    assert len({rule["id"] for rule in rules}) == len(rules)
    assert len(run["results"]) == len(findings())  # symptoms too
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in ("error", "warning", "note")
        assert result["message"]["text"]
    prints = [result["partialFingerprints"]["identity/v1"] for result in run["results"]]
    assert len(set(prints)) == len(prints)


def test_a_rule_carries_help():
    (rule,) = [
        r for r in run_of(rich_report())["tool"]["driver"]["rules"] if r["id"] == "split-leak"
    ]
    assert "measures memory" in rule["help"]["text"]
    assert "clean_rows" in rule["help"]["markdown"]
    assert "hf-recipe explain split-leak" in rule["help"]["text"]
    assert rule["defaultConfiguration"] == {"level": "warning"}


def test_levels_steps_and_numbers_stand_in_the_result():
    result = run_of(rich_report())["results"][0]
    assert result["ruleId"] == "loss-not-finite"
    assert result["level"] == "error"
    assert result["occurrenceCount"] == 2
    assert result["properties"]["step"] == 4
    assert result["properties"]["evidence"]["losses"][1] == {"$float": "nan"}


def test_what_did_not_run_is_said():
    run = run_of(rich_report())
    notices = run["invocations"][0]["toolExecutionNotifications"]
    assert run["invocations"][0]["executionSuccessful"] is False
    assert [n["level"] for n in notices] == ["error", "note", "note", "note"]
    assert run_of(Report(status="finished"))["invocations"][0]["executionSuccessful"] is True


def test_no_row_of_the_data_is_in_it():
    text = render_sarif(rich_report())
    assert "alert(1)" not in text
    assert "secret" not in text
    assert "391" not in text


def test_a_script_gives_findings_a_place(tmp_path):
    location = run_of(rich_report(), script="src\\train.py")["results"][0]["locations"][0]
    assert location["physicalLocation"]["artifactLocation"]["uri"] == "src/train.py"
    assert "physicalLocation" not in run_of(rich_report())["results"][0]["locations"][0]
    rich_report().to_sarif(tmp_path / "r.sarif")
    assert json.loads((tmp_path / "r.sarif").read_text())["version"] == "2.1.0"
