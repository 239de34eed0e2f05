"""Reviewing suspects: a scripted reviewer mends flipped digits, and the patch survives."""

import io
import json

import datasets
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from hf_recipe.data.preprocess import Pipeline
from hf_recipe.data.review import ApplyReview, review_of, suspects_of
from hf_recipe.inspection import choose_roles, read_split
from hf_recipe.instruments.batches import Rows
from hf_recipe.instruments.interview import ask_in_terminal


def started(data, path, most=10**9):
    source = read_split("train", data)
    roles = choose_roles(source, "label", ("pixels",))[0]
    seen, suspects = suspects_of(Rows(data, data, dict, "train"), source, roles, most=most)
    return review_of(data, suspects, seen, roles, path), suspects


@pytest.fixture(scope="module")
def flipped():
    pixels, truth = load_digits(return_X_y=True)
    train, test = np.arange(1797) % 4 != 0, np.arange(1797) % 4 == 0
    labels = truth[train]
    wrong = np.random.default_rng(0).random(len(labels)) < 0.1
    noisy = np.where(wrong, (labels + 3) % 10, labels)
    data = datasets.Dataset.from_dict({"pixels": pixels[train].tolist(), "label": noisy.tolist()})
    return data, labels, pixels[test], truth[test]


def accuracy(data, pixels, truth):
    x = np.asarray(data["pixels"][:]) / 16
    model = LogisticRegression(max_iter=300).fit(x, data["label"][:])
    return model.score(pixels / 16, truth)


def test_a_scripted_reviewer_brings_the_accuracy_back(flipped, tmp_path):
    data, labels, pixels, truth = flipped
    interview, suspects = started(data, tmp_path / "patch.jsonl")
    keys = "".join(f"{labels[row]}\n" for row, _, _ in suspects)
    screen = io.StringIO()
    ask_in_terminal(interview, keys=io.StringIO(keys), screen=screen)
    assert f"{len(suspects)} answers" in screen.getvalue()
    mended = Pipeline((ApplyReview(str(tmp_path / "patch.jsonl")),)).transform(data)
    clean = datasets.Dataset.from_dict({"pixels": data["pixels"][:], "label": labels.tolist()})
    assert (np.asarray(mended["label"]) != labels).mean() < 0.025
    best, noisy = accuracy(clean, pixels, truth), accuracy(data, pixels, truth)
    noise = (best * (1 - best) / len(truth)) ** 0.5
    assert best - accuracy(mended, pixels, truth) < noise
    assert best - noisy > 2 * noise
    assert mended.features == data.features
    assert mended.column_names == data.column_names
    assert mended._fingerprint != data._fingerprint


def test_a_patch_is_replayed_resumed_and_refused_elsewhere(flipped, tmp_path):
    data = flipped[0].select(range(400))
    path = tmp_path / "patch.jsonl"
    interview, suspects = started(data, path, most=5)
    keep, drop = len(interview.choices) - 2, len(interview.choices) - 1
    for key in (f"{drop}\n", "3\n", "u\n", f"{keep}\n", "wrong\n", "s\n", ""):
        ask_in_terminal(interview, keys=io.StringIO(key), screen=io.StringIO())
    with path.open("ab") as file:
        file.write(b'{"item": 3, "cho')  # a crash in the middle of a line
    again, _ = started(data, path, most=5)
    assert again.answers == {0: drop, 1: keep, 2: None}
    assert again.place == 3
    assert again.answer(3, 4)
    mended = ApplyReview(str(path)).transform(data)
    assert len(mended) == 399
    shuffled = ApplyReview(str(path)).transform(data.shuffle(seed=1))
    assert sorted(shuffled["label"]) == sorted(mended["label"])
    before = ApplyReview(str(path)).fingerprint("x")
    assert again.undo()
    assert ApplyReview(str(path)).fingerprint("x") != before
    row = suspects[0][0]
    other = data.select([i for i in range(400) if i != row])
    with pytest.raises(ValueError, match=f"row {row} is not in this data"):
        ApplyReview(str(path)).transform(other)
    with pytest.raises(ValueError, match="begun for something else"):
        started(data, path, most=4)
    (tmp_path / "no.jsonl").write_text(json.dumps({"kind": "?"}) + "\n")
    with pytest.raises(ValueError, match="not a labels patch"):
        ApplyReview(str(tmp_path / "no.jsonl")).transform(data)
