"""The loss before training: literal numbers, every head, faulty losses and heads."""

import math
from dataclasses import replace

import pytest
import torch
import transformers as t
from torch import nn
from torch.nn import functional

from hf_recipe.baselines.initial_loss import CHECK, PROBE, InitialLoss
from hf_recipe.core.check import Measurement
from tests.baselines.start_cases import BERT, CASES, LLAMA, examined, mlp, text, trainer_of

HEALTHY = InitialLoss(
    observed=2.31, recomputed=2.31, expected=2.305, standard_error=0.01, uniform=math.log(10),
    prior=2.29, task="classification", problem_type="single_label_classification", outputs=10,
    rows=128, groups=128, redrawn=(2.30, 2.32, 2.31, 2.29, 2.33, 2.30, 2.31, 2.30),
)  # fmt: skip


def faults(measurement, **thresholds):
    return list(CHECK.judge(measurement, thresholds))


class TestJudging:
    def test_healthy_numbers_are_silent(self):
        assert not faults(HEALTHY)
        assert not faults(replace(HEALTHY, redrawn=()))

    def test_a_trained_head_may_start_lower(self):
        assert not faults(replace(HEALTHY, observed=0.2, recomputed=0.2, expected=6.0))

    @pytest.mark.parametrize("value", [4.5, math.inf, math.nan])
    def test_never_higher(self, value):
        assert faults(replace(HEALTHY, observed=value, recomputed=value))
        assert faults(replace(HEALTHY, observed=value, recomputed=value, redrawn=()))

    @pytest.mark.parametrize(
        ("relation", "word"),
        [("sum", "adds up"), ("negative", "flipped"), ("zero", "exactly 0"),
         ("not finite", "not finite"), ("scaled", "constant"), ("applied twice", "twice")],
    )  # fmt: skip
    def test_a_loss_that_is_not_the_mean_is_named(self, relation, word):
        (fault,) = faults(replace(HEALTHY, observed=-2.31, relation=relation))
        assert word in fault.message
        assert "-log(1/10) = 2.303" in fault.message

    @pytest.mark.parametrize("relation", ["weighted", "custom", "sum over outputs"])
    def test_other_losses_are_judged_by_their_logits(self, relation):
        assert not faults(replace(HEALTHY, observed=1.9, relation=relation))

    def test_a_family_that_starts_high_by_design_is_its_own_measure(self):
        high = replace(HEALTHY, observed=19.0, recomputed=19.0, expected=18.4)
        design = (17.2, 20.1, 19.1, 18.0, 19.9, 18.5)
        assert not faults(replace(high, redrawn=design))
        assert faults(high)

    def test_blown_up_hidden_states_are_told_by_whole_models(self):
        high = replace(
            HEALTHY, observed=90.0, recomputed=90.0, redrawn=(80.0, 95.0, 88.0, 99.0, 85.0, 91.0)
        )
        assert not faults(high)
        assert faults(replace(high, remade=(2.31, 2.32, 2.30)))

    def test_message_and_evidence_hold_the_three_numbers(self):
        (fault,) = faults(replace(HEALTHY, observed=8.0, recomputed=8.0))
        assert fault.evidence["seen"].startswith("8 over 128 rows")
        assert "2.308" in fault.evidence["expected"]
        assert "-log(1/10)" in fault.evidence["expected"]

    def test_json_and_back(self):
        assert InitialLoss.from_values(HEALTHY.values()) == HEALTHY
        assert issubclass(InitialLoss, Measurement)


@pytest.mark.parametrize("name", CASES)
def test_every_fresh_head_is_as_expected(name):
    torch.manual_seed(0)
    model, rows = CASES[name]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = trainer_of(model, rows, remove_unused_columns=False)
    random = torch.get_rng_state()
    examiner = examined(trainer, PROBE)
    assert not examiner.report.flat
    assert not examiner.report.crashed
    start = examiner.latest["InitialLoss"]
    assert start.relation == "mean"
    assert start.redrawn
    off = abs(start.observed - start.expected)
    assert off <= 4 * start.standard_error + 0.005 * start.expected
    if start.problem_type != "regression":
        assert off <= 0.03 * start.observed
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def loss_of(function):
    class Custom(t.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = function(outputs["logits"], labels)
            return (loss, outputs) if return_outputs else loss

    return Custom


def found(model, rows, **kwargs):
    examiner = examined(trainer_of(model, rows, **kwargs), PROBE)
    assert not examiner.report.crashed
    return examiner.report.flat, examiner.latest.get("InitialLoss")


entropy = functional.cross_entropy
BAD_LOSSES = {
    "sum": (lambda z, y: entropy(z, y, reduction="sum"), "sum"),
    "negated": (lambda z, y: -entropy(z, y), "negative"),
    "zero": (lambda z, y: 0 * entropy(z, y), "zero"),
    "softmax twice": (lambda z, y: entropy(z.softmax(-1), y), "applied twice"),
    "nan": (lambda z, y: entropy(z, y) * float("nan"), "not finite"),
    "divided": (lambda z, y: entropy(z, y) / 4, "scaled"),
    "weighted sum": (
        lambda z, y: entropy(z, y, weight=torch.tensor([1.0, 2, 3, 4]), reduction="sum"), "sum"),
}  # fmt: skip

GOOD_LOSSES = {
    "plain": (lambda z, y: entropy(z, y), "mean"),
    "log_softmax": (lambda z, y: entropy(z.log_softmax(-1), y), "mean"),
    "class weights": (
        lambda z, y: entropy(z, y, weight=torch.tensor([1.0, 2, 3, 4])), "weighted"),
    "focal": (
        lambda z, y: ((1 - z.softmax(-1)[range(len(y)), y]) ** 2
                      * entropy(z, y, reduction="none")).mean(), "custom"),
    "smoothed": (lambda z, y: entropy(z, y, label_smoothing=0.1), None),
    "bf16": (lambda z, y: entropy(z.bfloat16(), y), "mean"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LOSSES)
def test_a_faulty_loss_is_found(name):
    function, relation = BAD_LOSSES[name]
    model, rows = text(t.BertForSequenceClassification, t.BertConfig)
    findings, start = found(model, rows, cls=loss_of(function))
    assert [f.check for f in findings] == ["initial-loss-unexpected"]
    assert start.relation == relation


@pytest.mark.parametrize("name", GOOD_LOSSES)
def test_its_healthy_twin_is_silent(name):
    function, relation = GOOD_LOSSES[name]
    model, rows = text(t.BertForSequenceClassification, t.BertConfig)
    findings, start = found(model, rows, cls=loss_of(function))
    assert not findings
    assert relation in (None, start.relation)


@pytest.mark.parametrize("name", ["focal", "distilled"])
def test_a_loss_of_another_form_is_not_the_mean_times_a_constant(name):
    """At even logits a focal loss is the mean loss times (1 - 1/K)^2; at larger ones it is not."""
    distilled = lambda z, y: entropy(z, y) + 0.1 * entropy(z, z.detach().roll(1, 0).softmax(-1))  # noqa: E731
    function = {"focal": GOOD_LOSSES["focal"][0], "distilled": distilled}[name]
    model, rows = text(t.BertForSequenceClassification, t.BertConfig)
    with torch.no_grad():
        model.classifier.weight.mul_(1e-3)
    findings, start = found(model, rows, cls=loss_of(function))
    assert not findings
    assert start.relation == "custom"


def test_a_sigmoid_before_the_binary_loss_is_found():
    model, rows = CASES["multi-label"]()
    twice = functional.binary_cross_entropy_with_logits
    findings, _ = found(model, rows, cls=loss_of(lambda z, y: twice(z.sigmoid(), y)))
    assert [f.check for f in findings] == ["initial-loss-unexpected"]
    findings, start = found(model, rows, cls=loss_of(lambda z, y: twice(z, y) * 50))
    assert not findings
    assert start.relation == "sum over outputs"


def scale(model, factor):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


def bias(model, value):
    with torch.no_grad():
        model.classifier.bias[0] = value


def fill(model, value):
    with torch.no_grad():
        model.classifier.weight.fill_(value)
        model.classifier.weight[0] = -value


BAD_HEADS = {
    "every weight x 50": lambda m: scale(m, 50),
    "bias +5": lambda m: bias(m, 5.0),
    "left uninitialised": lambda m: fill(m, 1e30),
    "nan": lambda m: bias(m, math.nan),
}


@pytest.mark.parametrize("name", BAD_HEADS)
def test_a_faulty_head_is_found(name):
    model, rows = text(t.BertForSequenceClassification, t.BertConfig)
    BAD_HEADS[name](model)
    findings, _ = found(model, rows)
    assert [f.check for f in findings] == ["initial-loss-unexpected"]


def test_a_blown_up_bare_module_is_found():
    model, rows = mlp()
    scale(model, 50)
    findings, start = found(model, rows, remove_unused_columns=False)
    assert [f.check for f in findings] == ["initial-loss-unexpected"]
    assert start.remade


def test_a_head_with_the_prior_as_bias_is_silent():
    model, rows = CASES["imbalanced"]()
    share = sum(float(r["labels"]) for r in rows) / len(rows)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([1 - share, share]).log())
    findings, start = found(model, rows)
    assert not findings
    assert start.observed < 0.5 * start.uniform


def train_head(model, rows, steps=60):
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    batch = {k: torch.stack([r[k] for r in rows]) for k in rows[0]}
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model


def test_a_trained_head_is_silent_and_swapped_classes_are_found():
    model, rows = text(t.BertForSequenceClassification, t.BertConfig)
    train_head(model, rows)
    findings, start = found(model, rows)
    assert not findings
    assert start.observed < 1.0
    swapped = [{**r, "labels": (r["labels"] + 1) % 4} for r in rows]
    findings, _ = found(model, swapped)
    assert [f.check for f in findings] == ["initial-loss-unexpected"]


def test_a_trained_language_model_is_silent():
    model, rows = CASES["llama"]()
    findings, start = found(train_head(model, rows[:64], 40), rows)
    assert not findings
    assert start.observed < 4.0


def test_lora_on_a_fresh_head_is_silent():
    peft = pytest.importorskip("peft")
    model, rows = text(t.BertForSequenceClassification, t.BertConfig)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="SEQ_CLS"))
    findings, start = found(adapted, rows)
    assert not findings
    assert start.relation == "mean"
    assert start.redrawn


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_label_smoothing_of_the_arguments_is_known(smoothing):
    model = t.LlamaForCausalLM(t.LlamaConfig(**LLAMA))
    rows = CASES["llama"]()[1]
    findings, start = found(model, rows, label_smoothing_factor=smoothing)
    assert not findings
    assert start.relation == "mean"


def test_a_custom_decoder_is_read_by_the_loss_it_reports():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(64, 32), nn.Linear(32, 64)

        def forward(self, input_ids, labels=None):
            z = self.head(self.table(input_ids))
            return {"loss": entropy(z[:, :-1].reshape(-1, 64), labels[:, 1:].reshape(-1)),
                    "logits": z}  # fmt: skip

    _, start = found(Decoder(), CASES["gpt2"]()[1], remove_unused_columns=False)
    assert start.task == "causal"
    assert start.relation == "mean"


def test_without_labels_it_says_why():
    class Reconstruct(nn.Linear):
        def forward(self, x):
            made = super().forward(x)
            return {"loss": functional.mse_loss(made, x), "made": made}

    rows = [{"x": torch.randn(4)} for _ in range(32)]
    trainer = trainer_of(Reconstruct(4, 4), rows, remove_unused_columns=False)
    examiner = examined(trainer, PROBE)
    assert "no labels" in examiner.report.skipped["initial-loss-unexpected"]


def test_a_resumed_run_is_skipped():
    from hf_recipe.core.config import Settings
    from hf_recipe.examiner import Examiner
    from tests.baselines.start_cases import subject_of

    model, rows = text(t.BertForSequenceClassification, t.BertConfig)
    examiner, subject = Examiner(Settings()), subject_of(trainer_of(model, rows))
    subject.resumed = True
    examiner.examine(PROBE, subject)
    assert "resumed" in examiner.report.skipped["initial-loss-unexpected"]


def test_a_declared_regression_is_read_as_one():
    config = t.BertConfig(**BERT, num_labels=1, problem_type="regression")
    rows = [{**r, "labels": torch.tensor(float(r["labels"]))} for r in CASES["bert"]()[1]]
    findings, start = found(t.BertForSequenceClassification(config), rows)
    assert not findings
    assert start.problem_type == "regression"
