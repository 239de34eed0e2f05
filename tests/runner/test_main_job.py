"""The main job, end to end, on few epochs: once through, killed and gone on with, bad input."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_recipe.core.report import Report
from hf_recipe.runner.main import main
from tests.processes import TORCHRUN

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "recipe.py"
QUICK = [
    "--use_cpu",
    "true",
    "--num_train_epochs",
    "1",
    "--trials",
    "2",
    "--seeds",
    "2",
    "--keep_going",
]


def texts(path, rows=240):
    """A rule (the word "good" or "bad" decides) with one label in twenty flipped."""
    lines = ["review,label"]
    for i in range(rows):
        positive = (i * 7 + i // 3) % 2 == 0
        word = "good" if positive else "bad"
        label = "pos" if positive != (i % 20 == 0) else "neg"
        lines.append(f"a {word} story about number {i},{label}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--warmup_ratio", "0.1"], "--warmup_steps"),
        (["--train_file", "/no/such.csv"], "/no/such.csv"),
        (["--model_name_or_path", "/no/such/model"], "--model_name_or_path /no/such/model"),
        (["--output_dir", "/proc/nothing"], "--output_dir /proc/nothing"),
    ],
)
def test_usage_is_one_line_and_code_2(arguments, says, capsys, tmp_path):
    folder = [] if "--output_dir" in arguments else ["--output_dir", str(tmp_path)]
    assert main([*QUICK, *folder, *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert says in lines[0]


def schedule_of(folder, key):
    """The schedule of an experiment, as it was remembered."""
    (path,) = folder.glob(f"outcomes/*/{key}.json")
    return json.loads(path.read_text())["variant"]["settings"]["schedule"]


@pytest.mark.slow
def test_all_stages_then_again_without_training(tmp_path, capsys):
    arguments = [
        *QUICK,
        "--output_dir",
        str(tmp_path),
        "--train_file",
        str(texts(tmp_path / "t.csv")),
    ]
    first = main(arguments)
    assert first in (0, 1)
    report = Report.from_json(tmp_path / "report.json")
    assert report.status == "finished"
    assert not report.crashed
    assert [gate.stage for gate in report.gates] == [
        "data",
        "baselines",
        "complexify",
        "regularize",
        "tune",
    ]
    assert (tmp_path / "report.html").stat().st_size > 1000
    assert (tmp_path / "MODEL_CARD.md").is_file()
    for name in ("model", "student"):
        assert (tmp_path / name / "model.safetensors").is_file()
        card = (tmp_path / name / "README.md").read_text()
        assert card.startswith("---\ntags:")
        assert f": the {name}\n" in card
        assert f"| **{name}**, this one |" in card
        assert ("distilled out of it" in card) == (name == "student")
        assert "**Fidelity of the student**" in card
        assert "| agreement of top answers |" in card
        assert "**Loss per class, teacher and student**" in card
    shown = {exhibit.title for exhibit in report.exhibits}
    assert {"Fidelity of the student", "The search", "Test, read once"} <= shown
    asked = {answer.question: answer.answer for answer in report.answers}
    assert "top answers agree" in asked["How much of the teacher has arrived?"]
    assert "averaged" in asked["Do the best runs together beat the best one?"]
    with (tmp_path / "experiments.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["number"]) for row in rows] == list(range(1, len(rows) + 1))
    assert len({row["key"] for row in rows}) == len(rows)
    shared = [row for row in rows if row["seconds"] == "0.00"]
    assert 0 < len(shared) <= 8  # stopping and averaging are seen in other trainings
    brief = [row for row in rows if json.loads(row["config"])["epochs"] == 0.5]
    assert [row["change"] for row in brief] == ["trial 1", "trial 2"]
    again = [row for row in rows if row["change"].endswith("at full length")]
    assert again
    assert not {row["seed"] for row in again} & {row["seed"] for row in brief}
    assert not [row for row in rows if row["change"] == "teacher"]  # nothing is trained twice
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == len(rows) - len(shared)
    schedules = {
        (row["stage"], "warm-up" in row["change"]): schedule_of(tmp_path, row["key"])
        for row in rows
        if row["stage"] != "tune"
    }
    assert set(schedules) >= {("baselines", False), ("complexify", False), ("regularize", False)}
    assert {s for (_, warmed), s in schedules.items() if not warmed} == {"constant"}
    ladders = {e.title: e for e in report.exhibits if hasattr(e, "rungs")}
    assert {"Growth", "Growing the input: length", "Decay, tuned last"} <= set(ladders)

    # one outcome is lost, as when the job is killed: it alone is trained again
    outcome = next(tmp_path.glob(f"outcomes/*/{rows[3]['key']}.json"))
    outcome.unlink()
    capsys.readouterr()
    assert main(arguments) == first
    said = capsys.readouterr().out
    assert said.count("done before") == len(rows) - 1
    with (tmp_path / "experiments.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)


ACCELERATE = (
    *("accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"),
    *(
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
        "--num_processes",
    ),
)


def launched(launcher, processes, folder, *arguments):
    """The outcomes by key and the verdicts by stage of a job of so many processes."""
    command = [sys.executable, "-m", launcher[0], *launcher[1:], str(processes)]
    command += [str(SCRIPT), *QUICK, "--output_dir", str(folder), *arguments]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr[-2000:]
    files = {p.name: json.loads(p.read_text())["outcome"] for p in folder.glob("outcomes/*/*")}
    assert files
    assert all(outcome["facts"]["processes"] == processes for outcome in files.values())
    trained = [outcome for outcome in files.values() if outcome["cost"]]
    assert len(list((folder / "wandb").glob("offline-run-*"))) == len(trained)
    gates = Report.from_json(folder / "report.json").gates
    return files, {gate.stage: gate.verdict for gate in gates}


def first_losses(outcome):
    """What was logged first; later, rounding of sums in another order has grown."""
    return [loss for _, loss in outcome["facts"]["train_curve"][:1]]


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    """World size 2 in fact, through all stages; one report, one W&B run an experiment."""
    one, verdicts = launched(TORCHRUN, 1, tmp_path / "1")
    two, others = launched(TORCHRUN, 2, tmp_path / "2")
    assert list(verdicts) == ["data", "baselines", "complexify", "regularize", "tune"]
    assert verdicts == others
    same = one.keys() & two.keys()  # what noise decides may send the two jobs other ways
    assert len(same) > 10
    for name in same:
        setup = json.loads(next((tmp_path / "1").glob(f"outcomes/*/{name}")).read_text())
        settings = setup["variant"]["settings"]
        if settings["dropout"] or settings["augment"] or settings["teacher"]:
            continue  # each process draws its own noise, and a teacher has its own rounding
        assert first_losses(two[name]) == pytest.approx(first_losses(one[name]), abs=1e-5)
        assert len(two[name]["row_losses"]) == len(one[name]["row_losses"])


@pytest.mark.slow
def test_accelerate_launches_two_processes_too(tmp_path):
    """With ``--use_cpu``: ``--cpu`` would silently run one."""
    stages = ("--stages", "data,baselines")
    one, verdicts = launched(TORCHRUN, 1, tmp_path / "1", *stages)
    two, others = launched(ACCELERATE, 2, tmp_path / "2", *stages)
    assert verdicts == others
    assert one.keys() == two.keys()
    for name, outcome in one.items():
        assert first_losses(two[name]) == pytest.approx(first_losses(outcome), abs=1e-5)
        assert two[name]["row_losses"] == pytest.approx(outcome["row_losses"], abs=1e-2)
