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

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "recipe.py"
QUICK = ["--use_cpu", "true", "--num_train_epochs", "1", "--trials", "2", "--keep_going"]


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
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert (tmp_path / "student" / "model.safetensors").is_file()
    with (tmp_path / "experiments.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["number"]) for row in rows] == list(range(1, len(rows) + 1))
    assert len({row["key"] for row in rows}) == len(rows)
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == len(rows)

    # one outcome is lost, as when the job is killed: it alone is trained again
    outcome = next(tmp_path.glob(f"outcomes/*/{rows[3]['key']}.json"))
    outcome.unlink()
    capsys.readouterr()
    assert main(arguments) == first
    said = capsys.readouterr().out
    assert said.count("done before") == len(rows) - 1
    with (tmp_path / "experiments.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    """World size 2 in fact; one report, one W&B run an experiment, the same losses."""
    outcomes = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]
        command += [str(processes), "--master_port", "29611", str(SCRIPT), *QUICK]
        command += ["--output_dir", str(folder), "--stages", "data,baselines"]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert done.returncode in (0, 1), done.stderr[-2000:]
        files = {p.name: json.loads(p.read_text())["outcome"] for p in folder.glob("outcomes/*/*")}
        assert all(o["facts"]["processes"] == processes for o in files.values())
        assert len(list((folder / "wandb").glob("offline-run-*"))) == len(files)
        outcomes.append(files)
    one, two = outcomes
    assert one.keys() == two.keys()
    assert one
    for name, outcome in one.items():
        other = two[name]
        first = [loss for _, loss in outcome["facts"]["train_curve"][:1]]
        assert [loss for _, loss in other["facts"]["train_curve"][:1]] == pytest.approx(
            first, abs=1e-5
        )
        assert len(other["row_losses"]) == len(outcome["row_losses"])
        assert other["row_losses"] == pytest.approx(outcome["row_losses"], abs=1e-2)
    verdicts = [
        {g.stage: g.verdict for g in Report.from_json(tmp_path / n / "report.json").gates}
        for n in ("1", "2")
    ]
    assert verdicts[0] == verdicts[1]
