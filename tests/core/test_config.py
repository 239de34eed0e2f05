import pytest

from hf_recipe.core.config import Settings

CHECKS = {"loss-spike": ("factor", "window"), "split-leak": ()}


def resolve(directory, arguments=None, command_line=None):
    return Settings.resolve(arguments, command_line, checks=CHECKS, directory=directory)


def test_defaults_come_from_nowhere(tmp_path):
    assert resolve(tmp_path) == Settings()


def test_argument_over_command_line_over_yaml_over_pyproject(tmp_path):
    def write(**values):
        (tmp_path / "pyproject.toml").write_text(
            f'[tool.hf_recipe]\noverhead = 0.1\nselect = ["data"]\n'
            f'on_error = "{values["pyproject"]}"\n'
        )

    write(pyproject="stop")
    settings = resolve(tmp_path)
    assert (settings.overhead, settings.on_error) == (0.1, "stop")
    assert settings.origins["overhead"] == "[tool.hf_recipe] in pyproject.toml"

    (tmp_path / "recipe.yaml").write_text("overhead: 0.2\nignore: [loss-spike]\n")
    settings = resolve(tmp_path)
    assert (settings.overhead, settings.ignore) == (0.2, ("loss-spike",))
    assert settings.origins["overhead"] == "recipe.yaml"

    settings = resolve(tmp_path, command_line={"overhead": "0.3", "ignore": None})
    assert (settings.overhead, settings.ignore) == (0.3, ("loss-spike",))
    assert settings.origins["overhead"] == "command line"

    settings = resolve(tmp_path, {"overhead": 0.4, "select": None}, {"overhead": 0.3})
    assert (settings.overhead, settings.select) == (0.4, ("data",))
    assert settings.origins == {
        "overhead": "argument",
        "ignore": "recipe.yaml",
        "select": "[tool.hf_recipe] in pyproject.toml",
        "on_error": "[tool.hf_recipe] in pyproject.toml",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ignore": ["loss-spik"]}, "unknown ignore.*did you mean 'loss-spike'"),
        ({"select": "dta"}, "did you mean 'data'"),
        ({"expect": ["split-leek"]}, "did you mean 'split-leak'"),
        ({"severity": {"loss-spike": "eror"}}, "did you mean 'error'"),
        ({"thresholds": {"loss-spike": {"facto": 3}}}, "did you mean 'factor'"),
        ({"thresholds": {"loss-spike": 3}}, "must map check names"),
        ({"on_error": "rais"}, "did you mean 'raise'"),
        (
            {"thresholds": {"loss-spike": {"factor": "5e-4"}}},
            "thresholds: factor of loss-spike must be a number; got '5e-4'",
        ),
        ({"overhead": 0}, r"overhead must lie in \(0, 1\]; got 0"),
        ({"overhead": float("nan")}, "got nan"),
        ({"overhead": "much"}, "must be a number; got 'much'"),
        ({"log_samples": "no"}, "must be true or false; got 'no'"),
        ({"baseline": "nowhere.json"}, "no such file: nowhere.json"),
        ({"ignor": []}, "unknown setting 'ignor' .*did you mean 'ignore'"),
        ({"colour": 1}, "unknown setting 'colour'.*known: "),
        ({"ignore": 3}, "must be a list of names; got 3"),
    ],
)
def test_a_wrong_value_says_what_to_write(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        resolve(tmp_path, arguments)


def test_files_may_hold_keys_of_others_but_no_near_miss(tmp_path):
    (tmp_path / "recipe.yaml").write_text("learning_rate: 0.1\n3: 4\n")
    assert resolve(tmp_path) == Settings()
    (tmp_path / "recipe.yaml").write_text("overheads: 0.1\n")
    with pytest.raises(ValueError, match="did you mean 'overhead'"):
        resolve(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("recipe.yaml", "- a list"),
        ("recipe.yaml", "a: [b"),
        ("pyproject.toml", "[tool"),
        ("pyproject.toml", "[tool]\nhf_recipe = 3"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        resolve(tmp_path)


def test_what_is_selected():
    assert Settings().selects("loss-spike", "complexify")
    assert not Settings(ignore=("complexify",)).selects("loss-spike", "complexify")
    assert Settings(select=("loss-spike",), ignore=("complexify",)).selects(
        "loss-spike", "complexify"
    )
    assert not Settings(select=("data",)).selects("loss-spike", "complexify")
    assert not Settings(select=("loss-spike",), ignore=("loss-spike",)).selects("loss-spike", "x")
