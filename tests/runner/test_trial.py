"""`recipe.py --trial`: one training, one metrics.json; a diverged one is an answer, too."""

import json

from hf_recipe.runner.main import main
from hf_recipe.tune.results import read_curve, read_result

QUICK = ["--trial", "--use_cpu", "--num_train_epochs", "1", "--report_to", "none"]


def run(folder, *arguments):
    assert main([*QUICK, "--output_dir", str(folder), *arguments]) == 0
    return json.loads((folder / "metrics.json").read_text())


def test_a_trial_leaves_its_metrics_and_its_curve(tmp_path):
    told = run(tmp_path, "--learning_rate=0.003", "--dropout=0.1", "--adam_beta1=0.95")
    assert told["state"] == "complete"
    assert told["facts"]["processes"] == 1
    assert 0 < told["metrics"]["eval_loss"] < 3
    points, _ = read_curve(tmp_path, 0)
    assert points[-1][0] == told["facts"]["steps"]
    assert len({step for step, _ in points}) == len(points)
    result = read_result(tmp_path, "eval/loss")
    assert result.value == told["metrics"]["eval_loss"]
    assert result.seed == 42


def test_a_trial_that_diverges_is_infeasible_and_ends(tmp_path):
    told = run(tmp_path, "--learning_rate=1e30", "--max_grad_norm=0", "--optim=sgd")
    assert told["state"] == "infeasible"
    assert "eval_loss" not in told["metrics"]
    assert read_result(tmp_path, "eval/loss").state == "infeasible"


def test_agents_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    assert main([*QUICK, "--output_dir", str(tmp_path), "--max_steps", "2"]) == 0
    assert (tmp_path / "trials" / "abc" / "metrics.json").is_file()


def test_a_dropout_that_is_none_is_refused(capsys):
    assert main(["--trial", "--dropout", "1.5"]) == 2
    assert "--dropout must lie in [0, 1)" in capsys.readouterr().err
