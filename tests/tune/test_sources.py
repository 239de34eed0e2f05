"""Studies that were run elsewhere: Optuna's own, an export of W&B, the main job's experiments."""

import csv
import json
import math

import pytest
import yaml

from hf_recipe.cli import main
from hf_recipe.runner.ledger import COLUMNS
from hf_recipe.tune.analysis import analyse
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


def the_table_of_wandbs_guide(folder):
    """One row per run, its config and summary as cells of Python."""
    path = folder / "project.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["", "summary", "config", "name"])
        writer.writeheader()
        for number, point in enumerate(POINTS):
            summary = {"_wandb": {"runtime": 3}, "eval/loss": loss(point)}
            writer.writerow({"summary": summary, "config": point, "name": f"run-{number}"})
    return str(path)


def what_the_api_gives(folder):
    path = folder / "runs.json"
    rows = [{"state": "finished", "config": p, "summary": {"eval/loss": loss(p)}} for p in POINTS]
    path.write_text(json.dumps(rows))
    return str(path)


def a_folder_of_trials(folder):
    for number, point in enumerate(POINTS):
        run, value = folder / f"{number:02}", loss(point)
        run.mkdir()
        metrics = {} if math.isnan(value) else {"eval_loss": value}
        state = "complete" if metrics else "infeasible"
        told = {"state": state, "metrics": metrics, "params": point, "seed": 4}
        (run / "metrics.json").write_text(json.dumps(told))
    (folder / "logs").mkdir()  # no run's
    return str(folder)


def what_hyperparameter_search_leaves(folder):
    for number, point in enumerate(POINTS):
        run = folder / f"run-{number:02}" / "checkpoint-7"
        run.mkdir(parents=True)
        history = [{"step": 3, "eval_loss": 9.0}, {"step": 7, "eval_loss": loss(point)}]
        state = {"trial_params": point, "log_history": history}
        (run / "trainer_state.json").write_text(json.dumps(state))
    return str(folder)


def a_folder_of_model_cards(folder):
    for number, point in enumerate(POINTS):
        run = folder / f"run-{number:02}"
        run.mkdir()
        (run / "eval_results.json").write_text(json.dumps({"eval_loss": loss(point)}))
        lines = [f"- {name}: {value!r}" for name, value in point.items()]
        (run / "README.md").write_text("\n".join(["# Model", *lines, "- optimizer: adamw (fused)"]))
    return str(folder)


MADE = (
    ours,
    a_plain_optuna_study,
    an_export,
    a_job,
    the_table_of_wandbs_guide,
    what_the_api_gives,
    a_folder_of_trials,
    what_hyperparameter_search_leaves,
    a_folder_of_model_cards,
)


@pytest.mark.parametrize("made", MADE)
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
    with pytest.raises(ValueError, match="holds none of: a study"):
        read_trials(str(tmp_path), NAMES, "eval/loss")
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(yaml.safe_dump({"program": "t.py", "parameters": SPACE}))
    assert main(["sweep", "report", str(sweep), str(tmp_path / "nowhere.csv")]) == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "runs.json").write_text("[]")
    assert main(["sweep", "report", str(sweep), str(tmp_path / "runs.json")]) == 2
    assert "holds no finished trial" in capsys.readouterr().err
    export = an_export(tmp_path)
    with pytest.raises(ValueError, match="the metric eval_loss; near it: eval/loss"):
        read_trials(export, NAMES, "eval_loss")
    with pytest.raises(ValueError, match="parameters learningrate; near it: learning_rate"):
        read_trials(export, ["learningrate"], "eval/loss")


def test_who_was_stopped_early_has_not_failed(tmp_path):
    """Neither an Optuna pruner's trials nor a run that W&B's hyperband killed are infeasible."""
    import optuna

    url = f"sqlite:///{tmp_path}/study.db"
    study = optuna.create_study(storage=url, study_name="mine")
    given = {"learning_rate": optuna.distributions.FloatDistribution(1e-5, 1e-2, log=True)}
    for number in range(12):
        trial = study.ask(given)
        trial.report(1.0, 1)
        if number < 3:
            study.tell(trial, 0.1 * number)
        else:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    states = ["finished"] * 2 + ["killed"] * 9
    rows = [
        {"State": state, "learning_rate": 1e-4 * n, "eval/loss": 1.0 / n}
        for n, state in enumerate(states, 1)
    ]
    (tmp_path / "runs.json").write_text(json.dumps(rows))
    space = {"learning_rate": SPACE["learning_rate"]}
    for source, finished, stopped in ((url, 3, 9), (str(tmp_path / "runs.json"), 2, 9)):
        trials = read_trials(source, ["learning_rate"], "eval/loss")
        report = analyse(trials, space, "eval/loss", False)
        assert "trials-infeasible" not in {f.check for f in report.flat}
        best = report.exhibits[0]
        assert len(best.rows) == finished
        assert f"{stopped} more were stopped early" in best.caption
    optuna.create_study(storage=url, study_name="other")
    with pytest.raises(ValueError, match="the studies mine, other; say --study"):
        read_trials(url, ["learning_rate"], "eval/loss")
    assert len(read_trials(url, ["learning_rate"], "eval/loss", study="mine")) == 12


@pytest.mark.slow
def test_runs_that_wandb_keeps_offline_are_read_by_its_own_reader(tmp_path):
    import wandb

    for point in POINTS[:3]:  # told, not by variables: what W&B read of those first, it keeps
        config = point | {"seed": 5}
        with wandb.init(project="digits", config=config, dir=tmp_path, mode="offline") as run:
            run.log({"eval/loss": loss(point)})
    for folder in (tmp_path, tmp_path / "wandb"):
        trials = read_trials(str(folder), NAMES, "eval/loss")
        assert sorted(t["value"] for t in trials) == pytest.approx(sorted(map(loss, POINTS[:3])))
        assert {t["seed"] for t in trials} == {5}
        assert {t["state"] for t in trials} == {"finished"}
