"""Each of the five gates in a real run that passes, in one that warns, and in one that fails."""

import numpy as np
import pytest

from hf_recipe.core.report import Report
from hf_recipe.runner.main import main


def table(path, rows, seed, rule, flipped=0.0, constant=False):
    """Six numbers and a label by `rule`; `flipped` of the labels are wrong."""
    draw = np.random.default_rng(seed)
    inputs = draw.normal(size=(rows, 6))
    labels = rule(inputs) ^ (draw.random(rows) < flipped)
    if constant:
        inputs[:, 5] = 1.0
    lines = ["a,b,c,d,e,f,label"]
    for row, label in zip(inputs, labels, strict=True):
        lines.append(",".join(f"{value:.4f}" for value in row) + ("," + ("no", "yes")[int(label)]))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def crossed(inputs):
    """No line separates the classes: the simplest model is at a loss."""
    return inputs[:, 0] * inputs[:, 1] > 0


def straight(inputs):
    """A line separates the classes: a larger model has nothing to add."""
    return inputs[:, 0] + 0.5 * inputs[:, 1] > 0


def gates(folder, *arguments):
    """Stage -> verdict of a whole run."""
    main(
        [
            *(
                "--use_cpu",
                "true",
                "--report_to",
                "none",
                "--trials",
                "2",
                "--keep_going",
                "--seeds",
                "2",
            ),
            *("--output_dir", str(folder / "out"), *arguments),
        ]
    )
    report = Report.from_json(folder / "out" / "report.json")
    return {gate.stage: gate for gate in report.gates}


STAGES = ("data", "baselines", "complexify", "regularize", "tune")


def three(folder, rows):
    """Flags of few training rows, and of many held-out ones, on which little is not noise."""
    parts = (("train", rows), ("validation", 2000), ("test", 300))
    flags = [
        (f"--{part}_file", table(folder / f"{part}.csv", size, seed, crossed, flipped=0.2))
        for seed, (part, size) in enumerate(parts)
    ]
    return [text for pair in flags for text in pair]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "epochs"),
    [
        (("data", "baselines"), "20"),
        (("complexify", "regularize"), "80"),  # so long that it overfits, and much can mend it
    ],
)
def test_gates_pass(tmp_path, stages, epochs):
    """Few rows of a rule that no line draws."""
    asked = ("--stages", ",".join(stages), "--learning_rate", "1e-2", "--num_train_epochs", epochs)
    linear = ("--lr_scheduler_type", "linear")
    found = gates(tmp_path, *three(tmp_path, 250), *asked, *linear)
    assert {stage: gate.verdict for stage, gate in found.items()} == dict.fromkeys(stages, "pass")


@pytest.mark.slow
def test_tuning_passes(tmp_path):
    """A rate and a length from which the search has far to go."""
    rate = ("--stages", "tune", "--learning_rate", "1e-3", "--num_train_epochs", "8")
    found = gates(tmp_path, *three(tmp_path, 400), *rate)
    assert {s: gate.verdict for s, gate in found.items()} == {"tune": "pass"}


@pytest.mark.slow
def test_every_gate_warns(tmp_path):
    """A constant column; a line that the simplest model draws as well, seen for one epoch."""
    data = table(tmp_path / "t.csv", 900, 1, straight, flipped=0.2, constant=True)
    rate = ("--learning_rate", "1e-3", "--num_train_epochs", "1")
    found = gates(tmp_path, "--train_file", data, *rate)
    assert {stage: found[stage].verdict for stage in STAGES} == dict.fromkeys(STAGES, "warn")


@pytest.mark.slow
def test_every_gate_fails(tmp_path):
    """Validation rows out of training, and a rate at which nothing stays finite."""
    data = table(tmp_path / "t.csv", 400, 2, straight)
    held_out = table(tmp_path / "v.csv", 100, 2, straight)
    files = ("--train_file", data, "--validation_file", held_out, "--test_file", held_out)
    rate = ("--learning_rate", "1e30", "--num_train_epochs", "1")
    found = gates(tmp_path, *files, *rate, "--target_metric", "accuracy=0.999")
    assert {stage: found[stage].verdict for stage in STAGES} == dict.fromkeys(STAGES, "fail")
