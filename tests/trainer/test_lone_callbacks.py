"""Each of the card's callbacks, alone in `Trainer(callbacks=[...])` at the default logging_steps:
it names its own fault, and is silent on the healthy twin."""

import pytest
import torch
import transformers as t

import hf_recipe
from hf_recipe.baselines.output_bias import set_output_bias
from tests.baselines.start_cases import text
from tests.baselines.test_output_bias import rare
from tests.models import arguments, bert, words

LOGGING_STEPS = 500  # the Trainer's default: no scalar is logged within any of these runs


def trained(folder, callback, model, rows, **changes):
    """The alarms and notes of a run with `callback` alone."""
    t.set_seed(0)
    settings = {"logging_steps": LOGGING_STEPS, **changes}
    trainer = t.Trainer(
        model=model,
        args=arguments(folder, **settings),
        train_dataset=rows,
        callbacks=[callback],
    )
    trainer.train()


def names(callback):
    assert callback.report.crashed == {}
    return [finding.check for finding in callback.findings]


@pytest.mark.parametrize("faulty", [True, False])
def test_initial_loss(tmp_path, faulty):
    model = bert()
    if faulty:
        with torch.no_grad():
            model.classifier.weight.mul_(2000)
    callback = hf_recipe.InitialLossCallback()
    trained(tmp_path, callback, model, words(), max_steps=3)
    assert names(callback) == (["initial-loss-unexpected"] if faulty else [])


@pytest.mark.parametrize("faulty", [True, False])
def test_hockey_stick(tmp_path, faulty):
    torch.manual_seed(0)
    model, _ = text(t.BertForSequenceClassification, t.BertConfig, 2)
    rows = rare(0.05)
    if not faulty:
        set_output_bias(model, rows)
    callback = hf_recipe.HockeyStickCallback()
    trained(tmp_path, callback, model, rows, max_steps=90, per_device_train_batch_size=32)
    assert names(callback) == (["hockey-stick"] if faulty else [])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"warmup_steps": 30}, ["warmup-too-long"]),
        ({"warmup_steps": 2}, []),
        ({"lr_scheduler_type": "cosine"}, []),
    ],
)
def test_decay(tmp_path, changes, expected):
    callback = hf_recipe.LRDecayCallback()
    trained(tmp_path, callback, bert(), words(), max_steps=40, **changes)
    assert names(callback) == expected


@pytest.mark.parametrize(
    ("end", "expected"),
    [(4, ["schedule-decays-early"]), (4000, ["schedule-never-decays"]), (40, [])],
)
def test_decay_of_the_users_own_scheduler(tmp_path, end, expected):
    model = bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [end], 0.001)
    if not expected:
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, end)
    callback = hf_recipe.LRDecayCallback()
    trainer = t.Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=40, logging_steps=LOGGING_STEPS),
        train_dataset=words(),
        callbacks=[callback],
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    assert names(callback) == expected


@pytest.mark.parametrize("learns", [True, False])
def test_early_stopping(tmp_path, learns):
    """It stops where nothing can be learned (labels by chance), not where the loss falls."""
    rows, held_out = words(), words(seed=9)
    if not learns:
        rows, held_out = chance(rows, 0), chance(held_out, 1)
    stopping = hf_recipe.EarlyStopping()
    t.set_seed(0)
    trainer = t.Trainer(
        model=bert(),
        args=arguments(
            tmp_path,
            max_steps=120,
            logging_steps=LOGGING_STEPS,
            eval_strategy="steps",
            eval_steps=4,
            lr_scheduler_type="constant",
        ),
        train_dataset=rows,
        eval_dataset=held_out,
        callbacks=[stopping],
    )
    trainer.train()
    assert (trainer.state.global_step == 120) == learns
    assert bool(stopping.rule.reason) != learns


def chance(rows, seed):
    """The same inputs under labels that have nothing to do with them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (len(rows),), generator=generator).tolist()
    return rows.remove_columns("labels").add_column("labels", labels)
