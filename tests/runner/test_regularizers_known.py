"""Each regularizer where it must help, and where it cannot: two worlds whose truth is known.

Few rows, many of whose columns say nothing and some of whose labels are wrong, learned by heart;
and many rows of a rule without noise, on which no training has gone too far.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from hf_recipe.runner import regularize_stage
from hf_recipe.runner.data import load
from hf_recipe.runner.experiment import Lab
from hf_recipe.runner.journey import Journey
from hf_recipe.runner.options import parse
from hf_recipe.runner.show import Show


def table(path, rows, seed, columns, flipped):
    """Columns of noise, and a label that is told by the first two."""
    draw = np.random.default_rng(seed)
    inputs = draw.normal(size=(rows, columns))
    labels = (inputs[:, 0] + inputs[:, 1] > 0) ^ (draw.random(rows) < flipped)
    lines = [",".join([*(f"c{i}" for i in range(columns)), "label"])]
    for row, label in zip(inputs, labels, strict=True):
        lines.append(",".join(f"{value:.4f}" for value in row) + ("," + ("no", "yes")[int(label)]))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def a_lab(folder, rows, columns, flipped, *flags):
    files = []
    for seed, (part, count) in enumerate((("train", rows), ("validation", 1500), ("test", 60))):
        name = table(folder / f"{part}.csv", count, seed, columns, flipped)
        files += [f"--{part}_file", name]
    usual = ("--use_cpu", "true", "--report_to", "none", "--seeds", "2", "--output_dir")
    asked = parse([*usual, str(folder / "out"), *files, *flags])
    lab = Lab(asked, load(asked), folder / "out", Show())
    lab.stage = "regularize"
    return lab


def verdicts(lab, names):
    """What each regularizer alone comes to: True kept, False worse, None not to be told."""
    found = {}
    for name in names:
        lab.options.recipe = SimpleNamespace(**{**vars(lab.options.recipe), "regularizers": name})
        journey = Journey(lab, lab.start)
        start = journey.outcomes("where it starts", lab.start, watch=True)
        _, rungs = regularize_stage.climb(journey, start)
        found[name] = rungs[1].kept
    return found


@pytest.mark.slow
def test_what_was_learned_by_heart_is_mended(tmp_path):
    """160 rows, 18 of 20 columns without meaning, one label in seven wrong, sixty epochs."""
    lab = a_lab(tmp_path, 160, 20, 0.15, "--num_train_epochs", "60", "--learning_rate", "3e-3")
    names = ("averaging", "features", "dropout")
    names += ("weight-decay", "label-smoothing", "early-stopping")
    found = verdicts(lab, names)
    assert found == dict.fromkeys(names, True)


@pytest.mark.slow
def test_where_nothing_was_overdone_nothing_helps(tmp_path):
    """3,000 rows of a rule without noise, four epochs."""
    lab = a_lab(tmp_path, 3000, 6, 0.0, "--num_train_epochs", "4", "--learning_rate", "1e-3")
    names = ("averaging", "augmentation", "dropout")
    names += ("weight-decay", "label-smoothing", "early-stopping")
    found = verdicts(lab, names)
    assert [name for name in names if found[name]] == []
    assert found["weight-decay"] is found["label-smoothing"] is False
