"""A metric counted again: literal answers, and real evaluations with planted mistakes."""

import math

import datasets
import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from transformers import BertConfig, BertForTokenClassification, Trainer

from hf_recipe.instruments.answers import Answers, counted
from hf_recipe.regularize.metric_agreement import METRIC_DISAGREES, RecountedMetric
from hf_recipe.regularize.recount import recount
from tests.gallery.harness import Case, assert_found, assert_silent, everything, run
from tests.models import VOCABULARY, arguments, bert, llama, points, progressions, words


def metric(reported, right=None, wrong=None, form="class", meaning="accuracy", rows=64, tied=0):
    return RecountedMetric(
        "accuracy", reported, form, meaning, rows, tied, right or {"": 0.8}, wrong or {}
    )


def told(measured):
    return [(f.severity, f.evidence.get("cause")) for f in METRIC_DISAGREES.judge(measured)]


def test_judging():
    assert told(metric(0.8)) == []
    assert told(metric(80.0)) == []  # in percent
    assert told(metric(0.8004, {"": 0.80042})) == []  # rounded
    assert told(metric(0.5, wrong={"masked|": 0.5})) == [(None, "masked")]
    assert told(metric(0.5, {"": 0.8, "balanced": 0.5}, {"last|": 0.5})) == []
    assert told(metric(0.5)) == [("warning", None)]
    assert told(metric(0.79)) == []  # off by a row or two
    assert told(metric(0.78, tied=3)) == []
    assert told(metric(0.5, form="token")) == []  # many meanings: only known mistakes
    assert told(metric(0.5, meaning="f1")) == []
    assert told(metric(0.5, rows=4)) == []
    places = {"shifted, of tokens": 0.7, "shifted, whole rows": 0.0}
    unshifted = {"unshifted|of tokens": 0.0}
    assert told(metric(0.0, places, unshifted, form="token")) == [(None, "unshifted")]
    assert told(metric(0.7, places, unshifted, form="token")) == []
    assert told(metric(-0.8)) == [("warning", None)]
    assert told(metric(12.5)) == []  # a share in no unit: not this metric


def sheet(pairs, outputs=3, rounds=None, repeated=None, ranks=()):
    rows = np.array([[a, b, 0] for a, b in pairs], float)
    return Answers("class", rows, repeated, rounds or (len(rows),), ranks, outputs)


def test_recounting_agrees_with_sklearn():
    generator = np.random.default_rng(0)
    pairs = generator.integers(0, 3, (50, 2))
    seen, true = pairs.T
    answers = sheet(pairs)
    right, wrong = recount(answers, "f1", None)
    for average in ("macro", "micro", "weighted"):
        assert right[average] == pytest.approx(sk.f1_score(true, seen, average=average))
    assert right["class 1"] == pytest.approx(sk.f1_score(true, seen, labels=[1], average="macro"))
    for name, function in (("precision", sk.precision_score), ("recall", sk.recall_score)):
        values = recount(answers, name, None)[0]
        assert values["macro"] == pytest.approx(function(true, seen, average="macro"))
    assert recount(answers, "matthews", None)[0][""] == pytest.approx(
        sk.matthews_corrcoef(true, seen)
    )
    values, wrong = recount(answers, "accuracy", None)
    assert values["balanced"] == pytest.approx(sk.balanced_accuracy_score(true, seen))
    assert wrong["broadcast|"] == pytest.approx(np.mean(seen[:, None] == true[None]))


def test_wrong_rows():
    pairs = [(0, 0)] * 6 + [(1, 0)] * 2
    values, wrong = recount(sheet(pairs, rounds=(3, 3, 2)), "accuracy", None)
    assert values[""] == 0.75
    assert (wrong["last|"], wrong["batches|"]) == (0.0, pytest.approx(2 / 3))


def test_numbers():
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(40, 2))
    answers = Answers("number", rows, None, (40,), (), 1)
    right, wrong = recount(answers, "mse", None)
    assert right[""] == pytest.approx(np.mean((rows[:, 0] - rows[:, 1]) ** 2))
    table = (rows[:, :1] - rows[None, :, 1]) ** 2
    assert wrong["broadcast|"] == pytest.approx(table.mean())
    right, wrong = recount(answers, "r2", None)
    assert right[""] == pytest.approx(sk.r2_score(rows[:, 1], rows[:, 0]))
    assert wrong["swapped|"] == pytest.approx(sk.r2_score(rows[:, 0], rows[:, 1]))
    squared = np.mean((rows[:, 0] - rows[:, 1]) ** 2)
    assert recount(answers, "rmse", None)[1]["root|"] == pytest.approx(squared)
    assert recount(answers, "mse", None)[1]["root|"] == pytest.approx(squared**0.5)


def test_forms_of_answers():
    tied = counted(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1]))
    assert tied[2][:, 2].tolist() == [1, 0]
    assert counted(torch.ones(2, 3).long(), torch.ones(2, 3).long()) is None  # generated tokens
    assert counted(torch.ones(3, 2), torch.ones(2).long()) is None
    kind, outputs, rows = counted((torch.zeros(4, 1), None), torch.zeros(4))
    assert (kind, outputs, rows.shape) == ("number", 1, (4, 2))
    logits = torch.eye(3)[torch.tensor([[1, 2, 0]])]
    kind, _, rows = counted(logits, torch.tensor([[0, 1, -100]]))
    # nothing right in place; each answer is the next label
    assert rows[0].tolist() == [2, 0, 1, 1, 3, 0]


# ------------------------------------------------------------------ gallery


def accuracy(choose=lambda logits, labels: (logits.argmax(-1), labels), masked=True):
    def compute(prediction):
        seen, labels = choose(*prediction)
        kept = labels != -100 if masked else np.ones_like(labels, bool)
        return {"accuracy": float((seen == labels)[kept].mean())}

    return compute


def trained(folder, model, train, test, compute, **changes):
    return Trainer(
        model=model,
        args=arguments(
            folder,
            **{"eval_strategy": "steps", "eval_steps": 20, "learning_rate": 3e-3, **changes},
        ),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=compute,
    )


def labelled(rows, seed):
    """Which tokens are even; some positions are not supervised."""
    data = words(rows, seed=seed)
    labels = [
        [-100 if i % 3 == 0 else t % 2 for i, t in enumerate(row)] for row in data["input_ids"]
    ]
    return data.remove_columns("labels").add_column("labels", labels)


def tagger(seed=0):
    torch.manual_seed(seed)
    return BertForTokenClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            num_labels=2,
        )
    )


def masked(folder, faulty):
    return trained(folder, tagger(), labelled(256, 1), labelled(40, 2), accuracy(masked=not faulty))


def unshifted(folder, faulty):
    def choose(logits, labels):
        seen = logits.argmax(-1)
        return (seen, labels) if faulty else (seen[:, :-1], labels[:, 1:])

    return trained(
        folder, llama(), progressions(), progressions(40, seed=2), accuracy(choose), max_steps=40
    )


def last_batch(folder, faulty):
    """Called batch by batch; the faulty one forgets all but the last."""
    hits = []

    def compute(prediction, compute_result=False):
        seen = prediction.predictions.argmax(-1) == prediction.label_ids
        hits[:] = [seen] if faulty else [*hits, seen]
        if not compute_result:
            return {}
        value = float(torch.cat(hits).float().mean())
        hits.clear()
        return {"accuracy": value}

    return trained(
        folder,
        bert(),
        words(),
        words(41, seed=2),
        compute,
        batch_eval_metrics=True,
        eval_steps=3,
        max_steps=6,
    )


def compared_with_all(folder, faulty):
    def choose(logits, labels):
        return logits.argmax(-1)[:, None] if faulty else logits.argmax(-1), labels

    def compute(prediction):
        seen, labels = choose(*prediction)
        return {"accuracy": float((seen == labels).mean())}

    return trained(folder, bert(), words(), words(41, seed=2), compute)


def across(folder, faulty):
    """As many classes as rows, and the highest logit sought along the rows."""

    def compute(prediction):
        axis = 0 if faulty else -1
        return {
            "accuracy": float((prediction.predictions.argmax(axis) == prediction.label_ids).mean())
        }

    return trained(folder, bert(classes=24), words(), words(24, seed=2), compute, max_steps=40)


CASES = [
    Case("metric-disagrees", masked, "error", name="masked"),
    Case("metric-disagrees", unshifted, "error", name="unshifted"),
    Case("metric-disagrees", last_batch, "error", name="last"),
    Case("metric-disagrees", compared_with_all, "error", name="broadcast"),
    Case(
        "metric-disagrees",
        across,
        "warning",
        also=("absent-class",),
        healthy_also=("absent-class",),
        name="across",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_faulty(case, tmp_path):
    report = assert_found(case, tmp_path)
    (found,) = [f for f in report.findings if f.check == case.check]
    if case.severity == "error":
        assert found.evidence["cause"] == case.name
        assert not math.isclose(found.evidence["reported"], found.evidence["recounted"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_healthy(case, tmp_path):
    assert_silent(case, tmp_path)


def test_other_definitions_are_silent(tmp_path):
    """Weighted F1, percent, balanced accuracy, rounded; and what cannot be counted is skipped."""

    def compute(prediction):
        seen, true = prediction.predictions.argmax(-1), prediction.label_ids
        return {
            "f1": sk.f1_score(true, seen, average="weighted"),
            "accuracy": round(100 * sk.balanced_accuracy_score(true, seen), 2),
            "matthews_correlation": sk.matthews_corrcoef(true, seen),
            "own_score": 3.0,
        }

    report = run(trained(tmp_path, bert(), words(), words(41, seed=2), compute))
    assert report.ran["metric-disagrees"] == ["eval"]
    assert not [f for f in everything(report) if f.check == "metric-disagrees"]


def test_without_a_metric_it_says_why(tmp_path):
    rows = datasets.Dataset.from_dict(points(64).to_dict())
    from tests.models import batchnorm

    report = run(trained(tmp_path, batchnorm(), rows, rows.select(range(20)), None, max_steps=20))
    assert "metric-disagrees" not in report.ran
    assert report.skipped["metric-disagrees"]


def test_yes_or_no_outputs():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, (40, 3)).astype(float)
    logits = generator.normal(size=(40, 3)) + labels
    answers = Answers("flags", np.concatenate([logits, labels], 1), None, (40,), (), 3)
    right, wrong = recount(answers, "f1", None)
    for average in ("macro", "micro", "weighted"):
        known = sk.f1_score(labels, logits > 0, average=average)
        assert right[average] == pytest.approx(known)
        cut = sk.f1_score(labels, logits > 0.5, average=average)
        assert wrong[f"threshold|{average}"] == pytest.approx(cut)
    right, _ = recount(answers, "accuracy", None)
    assert right["of rows"] == pytest.approx(sk.accuracy_score(labels, logits > 0))
    # one output, taught 0 and 1 by a squared error: 0.5 is as right a threshold as 0
    single = Answers("number", answers.rows[:, [0, 3]], None, (40,), (), 1)
    right, wrong = recount(single, "accuracy", None)
    assert right["at 0.5, of rows"] == pytest.approx(np.mean((logits[:, 0] > 0.5) == labels[:, 0]))
    assert wrong == {}
