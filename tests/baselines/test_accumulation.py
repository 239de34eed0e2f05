import json

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from hf_recipe.baselines.accumulation import (
    LOSS_SCALED_BY_ACCUMULATION,
    MicroBatchMeans,
    measure_micro_batch_means,
)
from hf_recipe.baselines.loss_units import (
    LossUnit,
    evaluation_factor,
    measure_loss_unit,
    step_factor,
)
from hf_recipe.core.check import Skip
from hf_recipe.instruments.quiet import quiet
from hf_recipe.trainer.preflight import subject_of_trainer
from tests.models import arguments, bert, llama, progressions, words
from tests.processes import torchrun


def unit(**changes):
    healthy = {
        "mean_loss": 2.0,
        "ratio": 1.0,
        "honoured": 1.0,
        "divided": False,
        "accumulation": 4,
        "world_size": 1,
    }
    return LossUnit(**{**healthy, **changes})


def faults(measurement, **thresholds):
    return list(LOSS_SCALED_BY_ACCUMULATION.judge(measurement, thresholds))


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("given", "micro_batches", "expected"),
    [
        (unit(), 4, 1.0),
        (unit(honoured=0.0), 4, 4.0),  # nobody divides
        (unit(honoured=0.0), 3, 3.0),  # the last, shorter step of an epoch
        (unit(honoured=0.0, divided=True), 4, 1.0),
        (unit(ratio=15 / 16), 4, 15 / 16),  # the count includes a shifted position
        (unit(honoured=0.0, ratio=0.25), 4, 1.0),  # divided by the user's own hand
        (unit(honoured=1.0, divided=True), 4, 0.25),  # divided twice
    ],
)
def test_a_step_is_divided_by(given, micro_batches, expected):
    assert step_factor(given, micro_batches, 1) == pytest.approx(expected)


def test_a_step_on_two_processes_is_divided_by_them_too():
    assert step_factor(unit(honoured=0.0, ratio=2.0, world_size=2), 4, 2) == pytest.approx(8.0)
    assert evaluation_factor(unit(honoured=0.0, ratio=2.0, world_size=2)) == 2.0
    assert step_factor(None, 4, 2) == evaluation_factor(None) == 1.0
    with pytest.raises(ValueError, match="2 processes; got 1"):
        step_factor(unit(world_size=2), 4, 1)


@pytest.mark.parametrize(
    ("given", "severity"),
    [
        (unit(accumulation_factor=4.0, honoured=0.0), "error"),
        (unit(accumulation_factor=0.25, divided=True), "error"),
        (unit(accumulation_factor=1.5, honoured=0.83), "warning"),
        (unit(accumulation_factor=1.1, honoured=0.97), "note"),
        (unit(accumulation_factor=float("nan")), "error"),
        (unit(accumulation=1, world_size=2, ratio=2.0, honoured=0.0), None),
        (unit(accumulation=1, world_size=4, own_loss_ratio=0.25), None),
    ],
)
def test_a_loss_that_grows_with_the_split_is_found(given, severity):
    (fault,) = faults(given)
    assert fault.severity == severity
    assert set(fault.evidence) >= {"seen", "expected"}


@pytest.mark.parametrize(
    "given",
    [
        unit(),
        unit(accumulation_factor=1.002),
        unit(accumulation=1, honoured=0.0),  # without a split it has no effect
        unit(ratio=15 / 16),
        unit(world_size=2, ratio=1.0),
        unit(world_size=2, ratio=0.9375),
        unit(world_size=2, own_loss_ratio=0.7, honoured=0.0, divided=True),  # class weights
    ],
)
def test_a_right_scaling_is_silent(given):
    assert faults(given) == []


RAGGED = MicroBatchMeans(whole=2.0, parts=(1.0, 2.2), part_items=(5, 25), micro_items=(10, 40))


def test_labels_weigh_more_in_short_micro_batches():
    (fault,) = faults(RAGGED)
    assert fault.severity == "warning"
    assert "4 times" in fault.message
    (milder,) = faults(RAGGED, weight=5.0)
    assert milder.severity == "note"


@pytest.mark.parametrize(
    "given",
    [
        MicroBatchMeans(2.0, (1.8, 2.2), (10, 10), (20, 20)),  # as many everywhere
        MicroBatchMeans(2.0, (1.0, 1.4), (5, 25), (10, 40)),  # no mean over labels
        MicroBatchMeans(float("nan"), (1.0, 2.2), (5, 25), (10, 40)),
        MicroBatchMeans(2.0, (1.0, 2.2), (0, 30), (10, 40)),
    ],
)
def test_other_losses_have_no_such_weight(given):
    assert faults(given) == []


def test_measurements_survive_json():
    for measurement in (unit(gradient_factor=None), RAGGED):
        assert type(measurement).from_values(measurement.values()) == measurement


# ---------------------------------------------------------------- measured on real Trainers


def measured(trainer, probe=measure_loss_unit):
    subject = subject_of_trainer(trainer, fresh=True)
    with quiet(trainer.model, trainer=trainer):
        return next(iter(probe(subject)))


def trainer_of(folder, model, data, kind=Trainer, compute_loss_func=None, **args):
    return kind(
        model=model,
        args=arguments(folder, **{"gradient_accumulation_steps": 4, "max_steps": 3, **args}),
        train_dataset=data,
        compute_loss_func=compute_loss_func,
    )


def raw_bert():
    model = bert()
    del model.accepts_loss_kwargs
    return model


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    )


class Embedded(nn.Module):
    """A bare module without **kwargs: the Trainer divides by the number of micro-batches."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.embed(input_ids))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


@pytest.mark.parametrize("build", [llama, gpt2, raw_bert, bert, Embedded], ids=lambda f: f.__name__)
def test_the_unit_gives_the_mean_loss_back(build, tmp_path):
    """What training_step really returns, divided by the factor, is the rows' mean loss."""
    model = build()
    trainer = trainer_of(
        tmp_path, model, words(96) if "bert" in build.__name__ else progressions(96)
    )
    factor = step_factor(measured(trainer), 4, 1)
    returned, means = [], []
    inner = trainer.training_step

    def training_step(model, inputs, num_items_in_batch=None):
        with torch.no_grad(), quiet(model):
            model.eval()
            means.append(float(trainer.compute_loss(model, dict(inputs))))
            count = trainer._get_num_items_in_batch([inputs] * 4, torch.device("cpu"))
            loss = trainer.compute_loss(model, dict(inputs), num_items_in_batch=count)
        stock = inner(model, inputs, num_items_in_batch)
        returned.append(float(stock))
        assert loss.isfinite()
        return stock

    trainer.training_step = training_step
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if hasattr(model, "config"):
        model.config.attention_probs_dropout_prob = 0.0
    trainer.train()
    assert len(returned) == 12
    for step in range(3):
        part = slice(4 * step, 4 * step + 4)
        assert sum(returned[part]) / factor == pytest.approx(sum(means[part]) / 4, rel=0.03)


def test_a_function_that_ignores_the_count_is_found_and_one_that_uses_it_is_not(tmp_path):
    def ignoring(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs.logits, labels)

    def using(outputs, labels, num_items_in_batch):
        total = nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
        return total / num_items_in_batch  # cannot do without

    wrong = measured(trainer_of(tmp_path, bert(), words(64), compute_loss_func=ignoring))
    assert wrong.accumulation_factor == pytest.approx(4.0)
    assert wrong.gradient_factor == pytest.approx(4.0, rel=1e-4)
    assert "reduction=" in faults(wrong)[0].fix
    right = measured(trainer_of(tmp_path, bert(), words(64), compute_loss_func=using))
    assert right.accumulation_factor == pytest.approx(1.0)
    assert right.honoured == pytest.approx(1.0)
    assert faults(right) == []


def test_a_mean_per_micro_batch_is_seen_on_ragged_labels(tmp_path):
    rows = progressions(64)
    lengths = [2 + 14 * (i // 8 % 2) for i in range(64)]  # micro-batches of long and short rows
    rows = rows.map(
        lambda row, i: {"labels": row["labels"][: lengths[i]] + [-100] * (16 - lengths[i])},
        with_indices=True,
    )
    trainer = trainer_of(tmp_path, Embedded(), rows)
    means = measured(trainer, measure_micro_batch_means)
    by_item = sum(m * n for m, n in zip(means.parts, means.part_items, strict=True))
    assert by_item / sum(means.part_items) == pytest.approx(means.whole, rel=1e-4)
    even = trainer_of(tmp_path, Embedded(), progressions(64))
    assert faults(measured(even, measure_micro_batch_means)) == []


def test_a_replaced_training_step_is_skipped(tmp_path):
    class Other(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**inputs).loss
            loss.backward()
            return loss.detach()

    class More(Trainer):
        def training_step(self, *args, **kwargs):
            return super().training_step(*args, **kwargs)

    with pytest.raises(Skip, match="training_step is replaced"):
        measured(trainer_of(tmp_path, bert(), words(64), kind=Other))
    assert measured(trainer_of(tmp_path, bert(), words(64), kind=More)).accumulation_factor == 1.0


def test_nothing_is_left_behind(tmp_path):
    trainer = trainer_of(tmp_path, raw_bert(), words(64))
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    measured(trainer)
    assert trainer.args.gradient_accumulation_steps == 4
    assert trainer.args.average_tokens_across_devices is True
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


TWO = """
import json, sys
from pathlib import Path
from tests.baselines.test_accumulation import faults, measured, raw_bert, trainer_of
from tests.models import bert, llama, progressions, words
from tests.processes import a_rank
folder = Path(sys.argv[1])
told = {}
models = {"raw": (raw_bert, words), "bert": (bert, words), "llama": (llama, progressions)}
with a_rank():
    for name, (build, data) in models.items():
        trainer = trainer_of(folder, build(), data(64), gradient_accumulation_steps=1)
        unit = measured(trainer)
        told[name] = [unit.world_size, unit.ratio, [f.subject for f in faults(unit)]]
    (folder / f"rank{trainer.args.process_index}.json").write_text(json.dumps(told))
"""


@pytest.mark.slow
def test_two_processes_multiply_a_loss_that_never_divides(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    torchrun(script, tmp_path)
    for rank in (0, 1):
        told = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert told["raw"] == [2, pytest.approx(2.0, rel=1e-4), ["processes"]]
        assert told["bert"] == [2, pytest.approx(1.0, rel=1e-4), []]
        assert told["llama"] == [2, pytest.approx(1.0, rel=1e-4), []]
