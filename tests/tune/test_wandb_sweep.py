"""Sweeps: what `sweep init` writes, and that it runs, against a stand-in for W&B's server."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_recipe.cli import main
from hf_recipe.runner.sweep import _here
from hf_recipe.tune.space import quasi_random
from hf_recipe.tune.wandb_sweep import (
    FLAVOURS,
    Launch,
    flattened,
    read_points,
    sweep_config,
    write_sweep,
)
from tests.tune.wandb_server import environment, serve

ROOT = Path(__file__).resolve().parents[2]
SPACE = {"learning_rate": {"distribution": "log_uniform_values", "min": 1e-3, "max": 1e-2}}

# One rank's view of a trial: its arguments on disk, the metric at the server from rank 0.
SCRIPT = """
import json, os, pathlib, sys
rank = int(os.environ.get("RANK", "0"))
given = dict(word[2:].split("=", 1) for word in sys.argv[1:])
seen = pathlib.Path(given["seen"]) / (os.environ["WANDB_RUN_ID"] + "-" + str(rank))
seen.write_text(json.dumps(given))
if rank == 0:
    import wandb
    with wandb.init() as run:
        for step in range(3):
            run.log({"eval/loss": abs(float(given["learning_rate"]) - 3e-3) + 1 / (1 + step)})
"""


def drawn(config, number):
    """What W&B's controller would hand out as run `number`; None: no more."""
    if config["method"] == "grid":
        values = config["parameters"]["point"]["values"]
        return {"point": values[number]} if number < len(values) else None
    if number >= config["run_cap"]:
        return None
    return quasi_random(config["parameters"], number + 1, seed=1)[-1]


class Client:
    """W&B's command line with the stand-in as its server."""

    def __init__(self, backend, folder, cwd):
        self.backend, self.cwd = backend, cwd
        wandb = Path(folder) / "client"
        wandb.mkdir()
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.env = os.environ | environment(backend, wandb)
        self.env |= {"PATH": path, "PYTHONPATH": str(ROOT), "WANDB_SILENT": "false"}

    def start(self, *words):
        return subprocess.Popen(
            [sys.executable, "-m", "wandb", *words],
            cwd=self.cwd,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def sweep(self, path):
        said = self.start("sweep", str(path)).communicate(timeout=240)[0]
        (name,) = self.backend.sweeps
        assert name in said, said
        return f"someone/sweeps/{name}", said


def finish(*processes):
    try:
        said = [process.communicate(timeout=480)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return said


@pytest.mark.slow
def test_two_agents_run_two_process_trials_of_the_main_job(tmp_path):
    """sweep init, wandb sweep, two wandb agents; each trial is one run of two ranks."""
    path = tmp_path / "sweep.yaml"
    asked = ["--num_train_epochs", "1", "--output_dir", str(tmp_path / "out")]
    wanted = ["--trials", "2", "--processes", "2", "--cpu", "--output", str(path)]
    assert main(["sweep", "init", *wanted, "--", *asked]) == 0
    with serve(drawn) as backend:
        client = Client(backend, tmp_path, ROOT)
        name, _ = client.sweep(path)
        said = finish(*(client.start("agent", name) for _ in range(2)))
    assert backend.unknown == []
    config = yaml.safe_load(path.read_text())
    rates = [drawn(config, n)["learning_rate"] for n in range(2)]
    assert len(backend.runs) == 2, said
    for run in backend.runs.values():
        assert run["state"] == "finished", said
        assert run["config"]["learning_rate"]["value"] in rates
        losses = [row["eval/loss"] for row in run["history"] if "eval/loss" in row]
        assert len(losses) >= 5
        assert run["summary"]["eval/loss"] == losses[-1]
        told = json.loads((tmp_path / "out" / "trials" / run["name"] / "metrics.json").read_text())
        assert told["facts"]["processes"] == 2
        # Ours is over rows, the Trainer's over batches of which the last is filled up.
        assert told["metrics"]["eval_loss"] == pytest.approx(losses[-1], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("flavour", "ranks"), [("index", 2), ("scheduler", 1)])
def test_quasi_random_points_reach_every_rank(tmp_path, flavour, ranks):
    """The same points from a grid of numbers and from W&B's scheduler."""
    script, seen = tmp_path / "train.py", tmp_path / "seen"
    script.write_text(SCRIPT)
    seen.mkdir()
    wanted = ["--trials", "2", "--processes", str(ranks), "--cpu", "--output", "sweep.yaml"]
    wanted += ["--program", "train.py", "--flavour", flavour, "--learning_rate", "3e-3"]
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        assert main(["sweep", "init", *wanted, "--", f"--seen={seen}"]) == 0
    finally:
        os.chdir(here)
    config = yaml.safe_load((tmp_path / "sweep.yaml").read_text())
    config["command"].remove("--use_cpu")
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(config))
    with serve(drawn) as backend:
        client = Client(backend, tmp_path, tmp_path)
        name, said = client.sweep("sweep.yaml")
        others = []
        if flavour == "scheduler":
            assert "sweep-scheduler" in said
            words = ("sweep-scheduler", name, "--batch-size", "1", "--poll-interval", "1")
            others = [client.start(*words)]
        finish(client.start("agent", name), *others)
    assert backend.unknown == []
    given = [json.loads(p.read_text()) for p in sorted(seen.iterdir())]
    assert len(given) == 2 * ranks, [p.name for p in seen.iterdir()]
    assert given[0::ranks] == given[ranks - 1 :: ranks]  # all ranks of each run
    rates = sorted({float(one["learning_rate"]) for one in given})
    space = {"learning_rate": {"distribution": "log_uniform_values", "min": 3e-4, "max": 3e-2}}
    expected = sorted(point["learning_rate"] for point in quasi_random(space, 2, 0))
    assert rates == pytest.approx(expected)
    trials = [run for name, run in backend.runs.items() if not name.endswith("-controller")]
    assert [run["state"] for run in trials] == ["finished"] * 2


def test_the_repositorys_sweep_is_what_init_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    made = tmp_path / "sweep.yaml"
    assert main(["sweep", "init", "--trials", "16", "--output", str(made)]) == 0
    assert made.read_text() == (ROOT / "scripts" / "sweep.yaml").read_text()
    config = yaml.safe_load(made.read_text())
    assert (ROOT / config["program"]).is_file()
    assert config["metric"] == {"name": "eval/loss", "goal": "minimize"}
    assert config["early_terminate"]["type"] == "hyperband"
    assert set(config["parameters"]) == {"learning_rate", "adam_beta1"}


def test_wandb_takes_every_flavour():
    """The client's own validation, without a server."""
    from wandb.apis.public.sweeps import _validate_config_and_fill_distribution as validate

    for flavour in ("wandb", "scheduler", "index"):
        for method in ("random", "bayes"):
            content = sweep_config(SPACE, Launch(), flavour=flavour, method=method, name="s")
            filled = validate(json.loads(json.dumps(content)))
            assert filled["parameters"]


def test_names_are_flat_and_processes_are_launched():
    nested = {"optimizer": {"parameters": {"lr": {"min": 0.0, "max": 1.0}}}, "x": {"value": 1}}
    assert flattened(nested) == {"optimizer.lr": {"min": 0.0, "max": 1.0}, "x": {"value": 1}}
    words = Launch("t.py", ("--a=1",), processes=2, cpu=True).words
    assert words[:2] == ["accelerate", "launch"]
    assert "--multi_gpu" in words  # also on processors: --cpu starts a single process
    assert "--cpu" not in words
    assert "--main_process_port=0" in words
    assert words[-3:] == ["${program}", "--a=1", "--use_cpu"]
    assert "--multi_gpu" not in Launch("t.py").words
    with pytest.raises(ValueError, match="no normal"):
        sweep_config({"x": {"distribution": "normal"}}, Launch(), flavour="scheduler")
    with pytest.raises(ValueError, match="flavour must be"):
        sweep_config(SPACE, Launch(), flavour="sobol")
    with pytest.raises(ValueError, match="method must be"):
        sweep_config(SPACE, Launch(), method="grid")


def test_points_are_kept_beside_the_sweep(tmp_path):
    content = sweep_config(SPACE, Launch(), flavour="index", trials=4, name=str(tmp_path / "s"))
    written = write_sweep(tmp_path / "s.yaml", content, SPACE, trials=4, seed=2)
    assert read_points(written[1]) == quasi_random(SPACE, 4, 2)
    assert str(written[1]) in content["command"]
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no points"):
        read_points(tmp_path / "other.json")


USER = """
import json, os, pathlib, sys
given = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
loss = (float(given["learning_rate"]) / 5e-5 - 1) ** 2
out = pathlib.Path(os.environ["HF_RECIPE_TRIAL"])
(out / "all_results.json").write_text(json.dumps({"eval_loss": loss}))
"""


def test_the_same_file_runs_here_without_an_account(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script, path, out = tmp_path / "train.py", tmp_path / "sweep.yaml", tmp_path / "out"
    script.write_text(USER)
    wanted = ["--program", str(script), "--trials", "6", "--output", str(path)]
    assert main(["sweep", "init", *wanted]) == 0
    config = yaml.safe_load(path.read_text())
    config["command"] = ["${interpreter}", "${program}", "${args}"]  # no accelerate: faster
    path.write_text(yaml.safe_dump(config))
    run = ["sweep", "run", str(path), "--output_dir", str(out), "--workers", "2"]
    assert main(run) == 0
    said = capsys.readouterr().out
    assert re.search(r"best: trial \d", said)
    best = yaml.safe_load((out / "best.yaml").read_text())
    assert set(best) == {"learning_rate"}
    assert "<html" in (out / "study.html").read_text()
    trials = len(list(out.glob("trial-*")))
    assert trials == 6
    assert main(run) == 0  # complete: nothing runs again
    assert len(list(out.glob("trial-*"))) == trials


def test_a_trial_run_here_reports_to_nobody_and_has_a_folder_of_its_own():
    command = ["train.py", "--output_dir", "out", "--report_to", "wandb", "--seed=3", "${args}"]
    here = ["train.py", "--output_dir=${folder}", "--report_to=none", "--seed=3", "${args}"]
    assert _here(command) == here
    assert _here(["--report_to=wandb", "--output_dir=out"]) == ["--report_to=none", here[1]]
    assert _here(["--report_to=trackio"]) == ["--report_to=trackio"]


def test_the_file_says_how_it_is_used(tmp_path):
    launch = Launch("t.py", ("--output_dir", "out"))
    said = {}
    for flavour in FLAVOURS:
        content = sweep_config(SPACE, launch, flavour=flavour, trials=6, name=str(tmp_path / "s"))
        write_sweep(tmp_path / "s.yaml", content, SPACE, trials=6, seed=2)
        text = (tmp_path / "s.yaml").read_text()
        said[flavour] = [line for line in text.splitlines() if line.startswith("#")]
        assert any("WANDB_RUN_ID" in line for line in said[flavour])
    assert said["wandb"][-1].endswith("sweep run s.yaml")  # its run_cap is the number of trials
    assert said["scheduler"][-1].endswith("sweep run s.yaml --trials 6")
    assert not any("sweep run" in line for line in said["index"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bla"], "invalid choice: 'bla'"),
        (["init", "--trails", "3"], "--trails"),
        (["init", "--", "--lerning_rate", "3"], "did you mean --learning_rate?"),
        (["init", "--learning_rate", "1e-3", "--scientific", "max_steps"], "not tuned for quality"),
        (["init", "--learning_rate", "1e-3", "--scientific", "beta"], "no range is known"),
        (["init", "--learning_rate", "1e-3", "--trials", "1"], "at least 2 trials"),
        (["init", "--program", "nowhere.py"], "no such file"),
        (["init", "--processes", "0"], "--processes must be at least 1"),
        (["run", "nowhere.yaml"], "No such file"),
        (["run", "{bad}"], "not valid YAML"),
        (["run", "{list}"], "no `parameters:`"),
        (["run", "{nothing}"], "neither a program nor a command"),
        (["run", "{index}"], "--flavour wandb"),
        (["point", "{index}", "--point", "0", "--", "true"], "no points"),
    ],
)
def test_mistakes_get_one_line(arguments, words, tmp_path, capsys):
    files = {
        "bad": "a: [",
        "list": "- 1",
        "nothing": "parameters: {x: {min: 0, max: 1}}",
        "index": "program: x\nparameters: {point: {values: [0]}}",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    places = {name: str(tmp_path / name) for name in files}
    filled = [a.format(**places) if a.startswith("{") else a for a in arguments]
    assert main(["sweep", *filled]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == 1
