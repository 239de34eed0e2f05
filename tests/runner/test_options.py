"""Mistakes get one line that says what to write."""

import pytest

from hf_recipe.runner.options import UsageError, parse


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--evaluation_strategy", "steps"], "--eval_strategy"),
        (["--warmup_ratio", "0.1"], "--warmup_steps"),
        (["--no_cuda"], "--use_cpu"),
        (["--tokenizer", "x"], "--tokenizer_name"),
        (["--lerning_rate", "1"], "did you mean --learning_rate"),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--stages", "data,tunes"], "did you mean tune"),
        (["--task", "tagging"], "unknown value 'tagging'"),
        (["--target_metric", "0.98"], "accuracy=0.98"),
        (["--seeds", "1"], "at least 2"),
        (["--fail_on", "errors"], "did you mean error"),
        (["--config", "/no/such.yaml"], "no such file: /no/such.yaml"),
        (["--dataset_name", "a", "--train_file", "b"], "exclude each other"),
        (["--test_file", "b"], "needs --train_file"),
        (["digits"], "not understood: 'digits'"),
    ],
)
def test_one_line_names_the_value(arguments, says):
    with pytest.raises(UsageError) as error:
        parse(["--use_cpu", "true", *arguments])
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_flags_win_over_the_yaml(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("learning_rate: 0.01\nstages: [data, tune]\nuse_cpu: true\nseed: 3\n")
    options = parse(["--learning_rate", "0.5", "--config", str(path)])
    assert options.training.learning_rate == 0.5
    assert options.training.seed == 3
    assert options.stages == ("data", "tune")
    assert {"learning_rate", "seed", "stages", "use_cpu"} <= options.given


def test_outdated_names_in_the_yaml_are_answered_too(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("evaluation_strategy: steps\n")
    with pytest.raises(UsageError, match="--eval_strategy"):
        parse(["--config", str(path)])


def test_stages_come_in_the_recipes_order():
    assert parse(["--use_cpu", "--stages", "tune,data"]).stages == ("data", "tune")


def test_a_target_is_read():
    options = parse(["--use_cpu", "--target_metric", "accuracy=0.98"])
    assert options.target == ("accuracy", 0.98)


def test_help_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    assert "--train_file" in capsys.readouterr().out
