"""The start of a run through `attach`: faulty losses and heads, and what must stay silent."""

import pytest
import torch
import transformers as t
from torch.nn import functional

from tests.baselines.start_cases import CASES, text, trainer_of
from tests.baselines.test_output_bias import rare
from tests.gallery.harness import Case, assert_found, assert_silent, run

STAGE = {"select": ["initial-loss-unexpected", "output-bias-unset", "hockey-stick",
                    "input-ignored"]}  # fmt: skip


def with_loss(bad, good):
    def build(folder, faulty):
        class Custom(t.Trainer):
            def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
                labels = inputs.pop("labels")
                outputs = model(**inputs)
                loss = (bad if faulty else good)(outputs["logits"], labels)
                return (loss, outputs) if return_outputs else loss

        torch.manual_seed(0)
        model, rows = text(t.BertForSequenceClassification, t.BertConfig)
        return trainer_of(model, rows, cls=Custom, max_steps=3, save_strategy="no")

    return build


def with_head(spoil):
    def build(folder, faulty):
        torch.manual_seed(0)
        model, rows = text(t.BertForSequenceClassification, t.BertConfig)
        if faulty:
            with torch.no_grad():
                spoil(model)
        return trainer_of(model, rows, max_steps=3, save_strategy="no")

    return build


def imbalanced(folder, faulty):
    torch.manual_seed(0)
    model, rows = CASES["imbalanced"]()
    if not faulty:
        from hf_recipe.baselines.output_bias import set_output_bias

        set_output_bias(model, rows)
    return trainer_of(model, rows, max_steps=3, save_strategy="no", learning_rate=1e-4)


mean = functional.cross_entropy
NAME = "initial-loss-unexpected"
FAULTS = [
    Case(NAME, with_loss(lambda z, y: mean(z, y, reduction="sum"), mean), name="summed",
         settings=STAGE),
    Case(NAME, with_loss(lambda z, y: -mean(z, y), mean), name="negated", settings=STAGE),
    Case(NAME, with_loss(lambda z, y: mean(z.softmax(-1), y),
                         lambda z, y: mean(z.log_softmax(-1), y)),
         name="softmax twice", settings=STAGE),
    Case(NAME, with_loss(lambda z, y: -z.softmax(-1).gather(1, y[:, None]).mean(), mean),
         name="no logarithm", settings=STAGE),
    Case(NAME, with_loss(lambda z, y: -z.gather(1, y[:, None]).mean(), mean),
         name="no softmax", settings=STAGE),
    Case(NAME, with_head(lambda m: m.classifier.weight.mul_(2000)), name="head x 2000",
         settings=STAGE),
    Case(NAME, with_head(lambda m: m.classifier.bias.copy_(torch.tensor([6.0, 0, 0, 0]))),
         name="bias", settings=STAGE, also=("output-bias-unset",)),
    Case("output-bias-unset", imbalanced, settings=STAGE, severity="warning"),
]  # fmt: skip


@pytest.mark.parametrize("case", FAULTS, ids=str)
def test_the_fault_is_named(case, tmp_path):
    report = assert_found(case, tmp_path)
    missing = {"no logarithm": "logarithm is missing", "no softmax": "log_softmax is missing"}
    if case.name in missing:
        assert any(missing[case.name] in f.message for f in report.findings)


@pytest.mark.parametrize("case", FAULTS, ids=str)
def test_the_twin_is_silent(case, tmp_path):
    assert_silent(case, tmp_path)


@pytest.mark.parametrize("name", ["multi-label", "t5-v1.1", "regression-1e6", "regression-1e-5",
                                  "mamba", "segformer", "question", "mlp-tuple"])  # fmt: skip
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_healthy_heads_raise_no_alarm(name, seed):
    torch.manual_seed(seed)
    model, rows = CASES[name]()
    trainer = trainer_of(
        model, rows, max_steps=2, save_strategy="no", seed=seed, remove_unused_columns=False
    )
    report = run(trainer, **STAGE)
    told = {f.check for f in report.findings if f.severity != "note"}
    assert told == set()


def test_hockey_stick_alone_catches_its_fault():
    torch.manual_seed(0)
    model, _ = text(t.BertForSequenceClassification, t.BertConfig, 2)
    trainer = trainer_of(
        model, rare(0.05), batch=32, max_steps=90, learning_rate=1e-3, save_strategy="no"
    )
    report = run(trainer, select=["hockey-stick"])
    assert [f.check for f in report.findings] == ["hockey-stick"]
