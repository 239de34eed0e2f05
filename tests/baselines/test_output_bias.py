"""The bias of the output layer: the gap it closes, and the curve it straightens."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as t
from datasets import Dataset

from hf_recipe.baselines import hockey_stick, output_bias
from hf_recipe.baselines.hockey_stick import FirstDrop
from hf_recipe.baselines.initial_loss import PROBE as LOSS
from hf_recipe.baselines.output_bias import PriorGap, set_output_bias
from hf_recipe.instruments.subject import Plan
from tests.baselines.runs import told
from tests.baselines.start_cases import CASES, columns, examined, regression, text, trainer_of

GAP = PriorGap(
    gap=0.58, standard_error=0.03, uniform=math.log(2), problem_type="single_label_classification",
    task="classification", outputs=2, rows=256, has_bias=True, fresh=True, steps=400.0,
    total_steps=1000,
)  # fmt: skip


def severities(measurement):
    return [f.severity or "warning" for f in output_bias.OUTPUT_BIAS.judge(measurement)]


class TestJudgingTheGap:
    @pytest.mark.parametrize("skew", [None, 0.3, 0.5])
    def test_a_wide_gap_is_a_warning(self, skew):
        assert severities(replace(GAP, skew=skew)) == ["warning"]

    @pytest.mark.parametrize(
        "change", [{"has_bias": False}, {"has_bias": None}, {"steps": 15.0},
                   {"problem_type": "regression"},
                   {"problem_type": "multi_label_classification"}, {"task": "masked"},
                   {"task": "seq2seq"}, {"skew": 0.0}, {"skew": 0.1},
                   {"skew": 0.193}]  # four to one
    )  # fmt: skip
    def test_it_is_a_note_where_little_can_be_won(self, change):
        assert severities(replace(GAP, **change)) == ["note"]

    @pytest.mark.parametrize(
        "change", [{"gap": 0.1}, {"gap": 0.0}, {"fresh": False}, {"relation": "weighted"},
                   {"relation": "custom"}]
    )  # fmt: skip
    def test_silent(self, change):
        assert severities(replace(GAP, **change)) == []

    def test_json_and_back(self):
        assert PriorGap.from_values(GAP.values()) == GAP


def gap_of(model, rows, **kwargs):
    trainer = trainer_of(model, rows, remove_unused_columns=False, **kwargs)
    examiner = examined(trainer, output_bias.PROBE)
    assert not examiner.report.crashed
    return examiner.report.flat, examiner.latest.get("PriorGap")


def test_imbalance_is_found_and_the_remedy_silences_it():
    model, rows = CASES["imbalanced"]()
    findings, _ = gap_of(model, rows)
    assert [(f.check, f.severity) for f in findings] == [("output-bias-unset", "warning")]
    mode, others = model.training, model.classifier.weight.clone()
    change = set_output_bias(model, rows)
    assert change.layer == "classifier"
    assert change.after <= 0.1 * change.before
    assert model.training == mode
    assert torch.equal(others, model.classifier.weight)
    assert not gap_of(model, rows)[0]


@pytest.mark.parametrize("name", ["bert", "bert-2", "vit", "resnet", "mlp", "mlp-2", "bert-tokens"])
def test_balanced_labels_are_silent(name):
    assert not gap_of(*CASES[name]())[0]


def test_weights_that_lean_are_no_prior():
    """Even labels under a net whose fresh weights favour one output: a note, not a prior's."""
    even = np.random.default_rng(0).permutation(np.arange(1024) % 2)
    model, rows = with_labels(CASES["bert-2"](), even)
    with torch.no_grad():
        model.classifier.bias[0] = 1.5
    findings, gap = gap_of(model, rows)
    assert gap.gap > 0.2
    assert gap.skew < 0.02
    assert {f.severity for f in findings} <= {"note"}
    assert gap_of(*CASES["imbalanced"]())[1].skew > 0.2


def skewed(classes, n=256):
    p = 2.0 ** -np.arange(classes)
    return np.random.default_rng(0).choice(classes, n, p=p / p.sum())


def with_labels(case, labels):
    model, rows = case
    return model, [{**r, "labels": torch.as_tensor(y)} for r, y in zip(rows, labels, strict=False)]


REMEDIES = {
    "softmax": lambda: with_labels(CASES["bert"](), skewed(4)),
    "image": lambda: with_labels(CASES["vit"](), skewed(10, 1797)),
    "convolution": lambda: CASES["segformer"](),
    "tokens": lambda: with_labels(CASES["bert-tokens"](), skewed(5, 256 * 16).reshape(256, 16)),
    "masked": lambda: with_labels(CASES["bert-masked"](), skewed(61, 256 * 16).reshape(256, 16)),
    "binary": lambda: CASES["multi-label"](),
    "regression": lambda: regression(1.0, 50.0),
    "bare": lambda: with_labels(CASES["mlp"](), skewed(10, 1797)),
}


@pytest.mark.parametrize("name", REMEDIES)
def test_the_remedy_closes_nine_tenths_of_the_gap(name):
    model, rows = REMEDIES[name]()
    change = set_output_bias(model, rows)
    assert change.before > 0
    assert change.after <= 0.1 * change.before
    measured = gap_of(model, rows)[1]
    assert measured.gap <= 0.1 * change.before + 4 * measured.standard_error


def test_it_takes_a_data_set_with_columns_the_model_does_not_know():
    model, rows = CASES["imbalanced"]()
    table = Dataset.from_dict(
        {k: [r[k].tolist() for r in rows] for k in rows[0]} | {"source": ["web"] * len(rows)}
    )
    assert set_output_bias(model, table).after < 0.05


def test_under_an_absolute_loss_the_median_is_set():
    model, rows = regression()
    values = np.concatenate([np.zeros(300), np.full(142, 100.0)]).astype("float32")
    set_output_bias(model, with_labels((model, rows), values)[1], median=True)
    assert abs(model.head.bias.item()) < 5


def test_a_head_without_bias_is_told():
    model, rows = CASES["gpt2"]()
    with pytest.raises(ValueError, match="no bias to set: the output layer 'lm_head'"):
        set_output_bias(model, rows)
    model, rows = with_labels(CASES["gpt2-classifier"](), skewed(4))
    (finding,) = gap_of(model, rows)[0]
    assert finding.severity == "note"
    assert "no bias to set" in finding.message


def test_a_choice_head_has_no_frequencies():
    with pytest.raises(ValueError, match="choice head"):
        set_output_bias(*CASES["choice"]())


DROP = FirstDrop(
    initial=0.69, prior=0.1, arrived=60, fell=0.01, noise=0.01, uniform=math.log(2),
    problem_type="single_label_classification", total_steps=1000,
)  # fmt: skip


class TestJudgingTheDrop:
    def judge(self, **change):
        faults = hockey_stick.HOCKEY_STICK.judge(replace(DROP, **change))
        return [f.severity or "warning" for f in faults]

    def test_a_drop_to_the_prior_that_stays_there(self):
        assert self.judge() == ["warning"]

    def test_a_short_one_is_a_note(self):
        assert self.judge(arrived=15) == ["note"]

    @pytest.mark.parametrize("task", ["causal", "masked", "seq2seq"])
    def test_over_a_vocabulary_it_is_a_note(self, task):
        assert self.judge(task=task) == ["note"]

    def test_between_even_labels_it_is_a_note(self):
        assert self.judge(initial=1.2, prior=math.log(2)) == ["note"]

    @pytest.mark.parametrize("change", [{"fell": 0.4}, {"initial": 0.12}, {"noise": 0.3}])
    def test_silent(self, change):
        assert self.judge(**change) == []


def rare(share, n=512):
    """Text rows of two classes that no first step can tell apart: parity of a sum."""
    generator = np.random.default_rng(3)
    ids = generator.integers(10, 60, (n, 12))
    y = ids.sum(1) % 2 * (generator.random(n) < 2 * share)
    return columns(input_ids=ids, attention_mask=np.ones_like(ids), labels=y)


def easy(n=512):
    """Text rows whose balanced class is their first token."""
    generator = np.random.default_rng(3)
    ids = generator.integers(10, 60, (n, 12))
    y = generator.integers(0, 2, n)
    ids[:, 0] = 5 + y
    return columns(input_ids=ids, attention_mask=np.ones_like(ids), labels=y)


def run_of(rows, *, bias, steps=120):
    torch.manual_seed(0)
    model, _ = text(t.BertForSequenceClassification, t.BertConfig, 2)
    if bias:
        set_output_bias(model, rows)
    trainer = trainer_of(
        model, rows, batch=64, max_steps=steps, learning_rate=1e-3, logging_steps=1,
        save_strategy="no",
    )  # fmt: skip
    seen = examined(trainer, LOSS).latest
    drops = told(trainer, hockey_stick.FIRST_DROP, seen, Plan(steps, 8, 64))
    return [f for d in drops for f in hockey_stick.HOCKEY_STICK.judge(d)]


def test_a_run_that_first_learns_the_prior_and_its_twin_with_the_bias():
    (fault,) = run_of(rare(0.05), bias=False)
    assert "only learnt the label frequencies" in fault.message
    assert run_of(rare(0.05), bias=True) == []


def test_a_balanced_run_is_silent():
    assert run_of(easy(), bias=False, steps=60) == []
