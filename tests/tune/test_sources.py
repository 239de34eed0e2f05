"""Studies that were run elsewhere: Optuna's own, an export of W&B, the main job's experiments."""

import csv
import json
import math

import pytest
import yaml

from hf_recipe.cli import main
from hf_recipe.runner.ledger import COLUMNS
from hf_recipe.tune.engines import OptunaEngine, Result, search
from hf_recipe.tune.sources import read_trials
from hf_recipe.tune.space import quasi_random

SPACE = {
    "learning_rate": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-2},
    "dropout": {"values": [0.0, 0.1, 0.3]},
}
NAMES = list(SPACE)
POINTS = quasi_random(SPACE, 12, 0)


def loss(point):
    """An optimum beyond the upper edge of the rate; one diverges."""
    value = (math.log10(point["learning_rate"]) + 1.5) ** 2
    return math.nan if point == POINTS[5] else value


def ours(folder):
    engine = OptunaEngine(SPACE, storage=folder / "study.journal")
    search(engine, lambda trial: Result("complete", loss(trial.params), seed=4), 12)
    return str(folder)


def a_plain_optuna_study(folder):
    import optuna

    url = f"sqlite:///{folder}/study.db"
    study = optuna.create_study(storage=url)
    kinds = optuna.distributions
    given = {
        "learning_rate": kinds.FloatDistribution(1e-5, 1e-2, log=True),
        "dropout": kinds.CategoricalDistribution([0.0, 0.1, 0.3]),
    }
    for point in POINTS:
        study.enqueue_trial(point)
        trial = study.ask(given)
        value = loss(point)
        study.tell(trial, None if math.isnan(value) else value,
                   state=optuna.trial.TrialState.FAIL if math.isnan(value) else None)  # fmt: skip
    return url


def an_export(folder):
    path = folder / "export.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["Name", "State", *NAMES, "eval/loss"])
        writer.writeheader()
        for point in POINTS:
            value = loss(point)
            state = "crashed" if math.isnan(value) else "finished"
            told = "" if math.isnan(value) else value
            writer.writerow({"State": state, **point, "eval/loss": told})
    return str(path)


def a_job(folder):
    with (folder / "experiments.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for point in POINTS:
            config = {"part": "train", "teacher": "", **point}
            row = {"seed": 7, "config": json.dumps(config), "validation_loss": loss(point)}
            writer.writerow(dict.fromkeys(COLUMNS, "") | row)
        refit = row | {"config": json.dumps(config | {"part": "train+validation"})}
        writer.writerow(dict.fromkeys(COLUMNS, "") | refit)
    return str(folder)


@pytest.mark.parametrize("made", [ours, a_plain_optuna_study, an_export, a_job])
def test_any_study_becomes_the_same_page(made, tmp_path, capsys):
    source = made(tmp_path)
    trials = read_trials(source, NAMES, "eval/loss")
    for trial, point in zip(trials, POINTS, strict=True):
        assert trial["params"] == pytest.approx(point)
    assert [t["value"] is None for t in trials] == [i == 5 for i in range(12)]
    sweep, page = tmp_path / "sweep.yaml", tmp_path / "page.html"
    goal = {"name": "eval/loss", "goal": "minimize"}
    sweep.write_text(yaml.safe_dump({"program": "t.py", "metric": goal, "parameters": SPACE}))
    capsys.readouterr()
    assert main(["sweep", "report", str(sweep), source, "--output", str(page)]) == 0
    said = capsys.readouterr().out
    assert "optimum-at-edge" in said
    assert "12 trials" in said
    assert "eval/loss along learning_rate" in page.read_text()


def test_what_holds_no_study_is_named(tmp_path, capsys):
    with pytest.raises(ValueError, match="neither a study"):
        read_trials(str(tmp_path), NAMES, "eval/loss")
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(yaml.safe_dump({"program": "t.py", "parameters": SPACE}))
    assert main(["sweep", "report", str(sweep), str(tmp_path / "nowhere.csv")]) == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "runs.json").write_text("[]")
    assert main(["sweep", "report", str(sweep), str(tmp_path / "runs.json")]) == 2
    assert "holds no finished trial" in capsys.readouterr().err
