"""The search engine: points, shared studies, dead workers, and what trials leave behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_recipe.tune.command import expand
from hf_recipe.tune.engines import LOST, OptunaEngine, Result
from hf_recipe.tune.results import read_curve, read_result
from hf_recipe.tune.space import quasi_random
from hf_recipe.tune.study import flat
from hf_recipe.tune.worker import TrialsFail, Worker, identity, is_alive

SPACE = {
    "learning_rate": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-2},
    "dropout": {"values": [0.0, 0.1, 0.3]},
    "layers": {"min": 1, "max": 4},
    "spread": {"distribution": "normal", "mu": 0.0, "sigma": 1.0},
    "kind": {"value": "small"},
    "optimizer": {"parameters": {"beta": {"min": 0.5, "max": 1.0}}},
}
RATE = {"learning_rate": SPACE["learning_rate"]}

# A script of the user's own: it reads its flags, takes a while, leaves its metrics.
SCRIPT = """
import json, math, os, pathlib, sys, time
given = dict(word[2:].split("=", 1) for word in sys.argv[1:])
folder = pathlib.Path(os.environ["HF_RECIPE_TRIAL"])
(folder / "began").write_text(str(os.getpid()))
rate = float(given["learning_rate"])
time.sleep(float(given.get("seconds", 0)))
if given.get("bad") == "crash":
    raise SystemExit("no such column: labelz")
loss = math.log10(rate / 1e-3) ** 2
if given.get("bad") == "diverge" and rate > 1e-3:
    loss = float("nan")
for step in range(1, 10):
    if given.get("slow"):
        (folder / "curve.jsonl").open("a").write(json.dumps([step, loss]) + "\\n")
        time.sleep(float(given["slow"]))
(folder / "metrics.json").write_text(json.dumps({"metrics": {"eval_loss": loss}, "seed": 3}))
"""


def engine(folder, space=RATE, **options):
    return OptunaEngine(space, storage=Path(folder) / "study.journal", **options)


def worker(folder, trials, *arguments, space=RATE, storage=None, **options):
    script = Path(folder) / "trial.py"
    script.write_text(SCRIPT)
    said = []
    made = Worker(
        OptunaEngine(space, storage=storage or Path(folder) / "study.journal", **options),
        ["${interpreter}", "${program}", *arguments, "${args}"],
        Path(folder),
        trials,
        program=str(script),
        interpreter=sys.executable,
        say=said.append,
        beat=0.1,
        grace=0.5,
    )
    return made, said


def test_points_are_the_quasi_random_ones_in_their_order(tmp_path):
    searching = engine(tmp_path, SPACE, seed=5)
    drawn = quasi_random(SPACE, 6, seed=5)
    for point in drawn:
        suggestion = searching.suggest(6)
        expected = dict(flat(point))
        assert list(suggestion.params) == list(expected)
        for name, value in expected.items():
            same = pytest.approx(value, rel=1e-6) if name == "spread" else value
            assert suggestion.params[name] == same
        searching.tell(suggestion.number, Result("complete", 1.0))
    assert searching.suggest(6) is None
    assert len(searching.trials()) == 6


def test_a_study_outlives_its_engine_and_names_what_does_not_fit_it(tmp_path):
    first = engine(tmp_path)
    number = first.suggest(4).number
    first.tell(number, Result("complete", 0.5, seed=1, curve=(2.0, 0.5)))
    again = engine(tmp_path)
    assert again.trials() == first.trials()
    assert again.trials()[0]["curve"] == [2.0, 0.5]
    assert again.suggest(4).params == dict(quasi_random(RATE, 2, 0)[1])
    with pytest.raises(ValueError, match="another space"):
        engine(tmp_path, {"learning_rate": {"min": 0.1, "max": 1.0}})
    with pytest.raises(ValueError, match="another metric"):
        engine(tmp_path, metric="eval/accuracy")
    with pytest.raises(ValueError, match="search must be one of"):
        engine(tmp_path, search="grid")


def test_a_diverged_trial_is_infeasible_and_stays(tmp_path):
    searching = engine(tmp_path)
    for value in (0.3, float("nan"), float("inf"), None):
        assert searching.tell(searching.suggest(9).number, Result("complete", value))
    assert [t["state"] for t in searching.trials()] == ["complete", *["failed"] * 3]
    states = [t.state.name for t in searching.study.trials]
    assert states == ["COMPLETE", "PRUNED", "PRUNED", "PRUNED"]
    assert "nan" in searching.trials()[1]["reason"]
    assert not searching.tell(0, Result("complete", 9.0))  # it was told before
    assert searching.trials()[0]["value"] == 0.3


def test_bayes_takes_over_after_exploring(tmp_path):
    searching = engine(tmp_path, search="bayes", explore=4)
    drawn = quasi_random(RATE, 8, 0)
    rates = []
    for _ in range(8):
        suggestion = searching.suggest(8)
        rate = suggestion.params["learning_rate"]
        rates.append(rate)
        searching.tell(suggestion.number, Result("complete", abs(rate - 1e-3)))
    assert rates[:4] == [p["learning_rate"] for p in drawn[:4]]
    assert not set(rates[4:]) & {p["learning_rate"] for p in drawn}
    assert all(1e-5 <= rate <= 1e-2 for rate in rates)


def test_workers_share_a_study_without_running_a_point_twice(tmp_path):
    code = (
        "import sys; from tests.tune.test_engines import worker; "
        "made, said = worker(sys.argv[1], 8, '--seconds=0.05'); made.run()"
    )
    start = [sys.executable, "-c", code, str(tmp_path)]
    both = [subprocess.Popen(start) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    trials = engine(tmp_path).trials()
    assert len(trials) == 8
    expected = sorted(p["learning_rate"] for p in quasi_random(RATE, 8, 0))
    assert sorted(t["params"]["learning_rate"] for t in trials) == expected
    assert all(t["seed"] == 3 for t in trials)


def test_a_database_serves_as_well_as_a_file(tmp_path):
    made, said = worker(tmp_path, 2, storage=f"sqlite:///{tmp_path}/study.db")
    assert made.run() == 2
    assert len(made.engine.trials()) == 2
    assert said[0].startswith("trial 0: ")


@pytest.mark.parametrize("orphan", ["lives", "killed"])
def test_killing_a_worker_loses_no_finished_trial(tmp_path, orphan):
    """kill -9 in the third trial: two results stay, the third is run on or run again."""
    code = (
        "import sys; from tests.tune.test_engines import worker; "
        "made, said = worker(sys.argv[1], 5, '--seconds=0.8'); made.run()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    began, deadline = tmp_path / "trial-0002" / "began", time.monotonic() + 240
    while not (began.exists() and began.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if orphan == "killed":
        os.kill(int(began.read_text()), signal.SIGKILL)
    kept = engine(tmp_path).trials()
    assert [t["number"] for t in kept] == [0, 1]
    made, said = worker(tmp_path, 5)
    made.run()
    trials = made.engine.trials()
    assert len(trials) == 5
    assert trials[:2] == kept
    expected = sorted(p["learning_rate"] for p in quasi_random(RATE, 5, 0))
    again = sorted(t["params"]["learning_rate"] for t in trials)
    assert any("taken up" in line for line in said)
    if orphan == "lives":  # its process went on, and its result was taken
        assert again == expected
        assert [t["number"] for t in trials] == [0, 1, 2, 3, 4]
    else:  # its point was run again, under another number
        assert expected[0] in again
        assert 2 not in [t["number"] for t in trials]
        lost = quasi_random(RATE, 3, 0)[2]["learning_rate"]
        assert lost in again


def test_a_worker_elsewhere_is_given_up_only_when_its_heart_stands_still(tmp_path):
    searching = engine(tmp_path)
    number = searching.suggest(3).number
    del searching._live[number]
    elsewhere = {"host": "another-machine", "pid": 1, "started": "5"}
    searching.note(number, worker=elsewhere, folder=str(tmp_path), beat=1)
    made, _ = worker(tmp_path, 3)
    assert made.engine.resume(made._left) == []
    time.sleep(0.3)
    searching.note(number, beat=2)
    assert made.engine.resume(made._left) == []
    time.sleep(0.6)
    assert made.engine.resume(made._left) == [number]
    assert made.engine.suggest(3).params == dict(quasi_random(RATE, 1, 0)[0])


def test_only_one_takes_up_a_lost_trial(tmp_path):
    searching = engine(tmp_path)
    number = searching.suggest(2).number
    others = [engine(tmp_path) for _ in range(2)]
    taken = [other.resume(lambda n, notes: Result("failed", reason=LOST)) for other in others]
    assert taken == [[number], []]
    assert sum(t.state.name == "WAITING" for t in searching.study.trials) == 1


def test_a_process_is_known_by_its_start_too():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    named = identity(process.pid)
    assert is_alive(named)
    assert not is_alive(named | {"started": "1"})
    assert not is_alive(named | {"host": "elsewhere"})
    process.communicate(b"\n")
    assert not is_alive(named)


def test_a_command_that_cannot_work_ends_the_search_with_its_last_line(tmp_path):
    made, _ = worker(tmp_path, 9, "--bad=crash")
    with pytest.raises(TrialsFail, match="no such column: labelz"):
        made.run()
    assert len(made.engine.trials()) == 3


def test_a_trial_finds_the_commands_of_its_own_python(tmp_path, monkeypatch):
    """``accelerate`` stands beside the interpreter, also where nobody has activated it."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    made, _ = worker(tmp_path, 1)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    launcher = tmp_path / "bin" / "launch-it"
    launcher.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    launcher.chmod(0o755)
    made.interpreter = str(tmp_path / "bin" / "python")
    made.command = ["${env}", "launch-it", "${program}", "${args}"]
    made.run()
    assert [t["state"] for t in made.engine.trials()] == ["complete"]


def test_diverged_processes_are_infeasible(tmp_path):
    made, said = worker(tmp_path, 6, "--bad=diverge")
    made.run()
    states = {t["params"]["learning_rate"] > 1e-3: t["state"] for t in made.engine.trials()}
    assert states == {True: "failed", False: "complete"}
    assert any("infeasible" in line for line in said)


def test_halving_stops_what_is_far_behind(tmp_path):
    made, _ = worker(tmp_path, 6, "--slow=0.3", halving=True)
    made.beat = 0.2
    made.run()
    states = [t["state"] for t in made.engine.trials()]
    assert states.count("pruned") >= 1
    assert states.count("complete") >= 1
    best = min(quasi_random(RATE, 6, 0), key=lambda p: abs(p["learning_rate"] / 1e-3 - 1))
    kept = {t["params"]["learning_rate"]: t["state"] for t in made.engine.trials()}
    assert kept[best["learning_rate"]] == "complete"


def test_results_are_read_from_what_the_trainer_leaves(tmp_path):
    assert read_result(tmp_path, "eval/loss") is None
    history = [
        {"step": 5, "eval_loss": 2.0},
        {"step": 9, "loss": 1.0},
        {"step": 10, "eval_loss": 1.5},
    ]
    (tmp_path / "checkpoint-10").mkdir()
    state = tmp_path / "checkpoint-10" / "trainer_state.json"
    state.write_text(json.dumps({"log_history": history}))
    assert read_result(tmp_path, "eval/loss") == Result("complete", 1.5, curve=(2.0, 1.5))
    (tmp_path / "all_results.json").write_text('{"eval_loss": 1.25, "eval_f1": 0.5}')
    assert read_result(tmp_path, "eval/loss").value == 1.25
    assert read_result(tmp_path, "eval/f1").value == 0.5
    (tmp_path / "metrics.json").write_text('{"metrics": {"eval_loss": 1.0}, "state": "complete"}')
    assert read_result(tmp_path, "eval/loss").value == 1.0
    missing = read_result(tmp_path, "eval/accuracy")
    assert missing.state == "failed"
    assert "eval_loss" in missing.reason
    (tmp_path / "metrics.json").write_text('{"metrics": {"eval_l')  # killed while writing
    assert read_result(tmp_path, "eval/loss").value == 1.25


def test_a_curve_is_read_in_whole_lines(tmp_path):
    path = tmp_path / "curve.jsonl"
    assert read_curve(tmp_path, 0) == ([], 0)
    path.write_text("[1, 2.5]\n[2, 2.")
    points, at = read_curve(tmp_path, 0)
    assert points == [(1, 2.5)]
    path.write_text("[1, 2.5]\n[2, 2.25]\n")
    assert read_curve(tmp_path, at) == ([(2, 2.25)], 19)


def test_commands_are_expanded_as_wandb_does(monkeypatch):
    params = {"learning_rate": 0.001, "flag": True, "off": False, "name": "a b"}
    words = expand(["${env}", "x", "${args}"], params)
    assert words == [
        "/usr/bin/env", "x", "--learning_rate=0.001", "--flag=True", "--off=False", "--name=a b",
    ]  # fmt: skip
    assert expand(["${args_no_boolean_flags}"], params)[1:] == ["--flag", "--name=a b"]
    assert expand(["${args_no_hyphens}"], params)[0] == "learning_rate=0.001"
    assert json.loads(expand(["${args_json}"], params)[0]) == params
    monkeypatch.setenv("PLACE", "here")
    assert expand(["--at=${envvar:PLACE}/${folder}"], {}, folder="f") == ["--at=here/f"]
    assert expand([], {"a": 1}, program="t.py")[1:] == ["python", "t.py", "--a=1"]
    with pytest.raises(ValueError, match="args_append_hydra"):
        expand(["${args_append_hydra}"], params)
    with pytest.raises(ValueError, match="no variable NOWHERE"):
        expand(["${envvar:NOWHERE}"], params)
