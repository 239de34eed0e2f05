"""Faulty and fixed runs: how the learning rate falls, and how a run stops and chooses."""

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer

import hf_recipe
from tests.gallery.harness import Case, assert_found, assert_silent, run
from tests.models import arguments, bert, words


def classifier(folder, *, callbacks=(), optimizers=(None, None), model=None, rows=None, **args):
    return Trainer(
        model=model if model is not None else bert(),
        args=arguments(folder, **{"max_steps": 20, **args}),
        train_dataset=rows if rows is not None else words(64),
        eval_dataset=words(96, seed=2),
        callbacks=list(callbacks),
        optimizers=optimizers,
    )


def warm_up(folder, faulty):
    return classifier(folder, warmup_steps=500 if faulty else 4)


def stepped(milestone):
    def build(folder, faulty):
        model = bert()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        at = [milestone if faulty else 12]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, at)
        return classifier(folder, model=model, optimizers=(optimizer, schedule))

    return build


def horizon(folder, faulty):
    model = bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    end = 5 if faulty else 20
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, end)
    return classifier(folder, model=model, optimizers=(optimizer, schedule))


def hurried(folder, faulty):
    """A callback of the user's that steps the scheduler too, three times more per update."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
            for _ in range(3 if faulty else 0):
                lr_scheduler.step()

    return classifier(folder, callbacks=[Steps()], max_steps=40)


def metric(folder, faulty):
    return classifier(
        folder,
        callbacks=[EarlyStoppingCallback(3)],
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="steps",
        save_steps=5,
        load_best_model_at_end=True,
        metric_for_best_model="f1" if faulty else "loss",
    )


def memorised(folder, faulty):
    """24 rows learnt by heart, half of them mislabelled; or a rule, learnt from 256 rows."""
    rows = words(24 if faulty else 256)
    if faulty:
        rows = rows.map(lambda row, i: {"labels": (row["labels"] + i % 2) % 4}, with_indices=True)
    return classifier(
        folder, rows=rows, max_steps=96, learning_rate=3e-3, eval_strategy="steps", eval_steps=8
    )


def declared(folder, faulty):
    """The same rows by heart: judged by the loss, or by an accuracy that still rises."""
    rows = words(24).map(lambda row, i: {"labels": (row["labels"] + i % 2) % 4}, with_indices=True)
    evaluations = iter(range(1000))
    trainer = classifier(
        folder,
        rows=rows,
        max_steps=96,
        learning_rate=3e-3,
        eval_strategy="steps",
        eval_steps=8,
        metric_for_best_model="loss" if faulty else "progress",
        greater_is_better=not faulty,
    )
    trainer.compute_metrics = lambda seen: {"progress": 0.01 * next(evaluations)}
    return trainer


def guarded(folder, faulty):
    """By heart, and nothing stops it; or it is stopped, and ends with its best weights."""
    rows = words(24).map(lambda row, i: {"labels": (row["labels"] + i % 2) % 4}, with_indices=True)
    options = {} if faulty else {"save_strategy": "steps", "save_steps": 8}
    return classifier(
        folder,
        rows=rows,
        callbacks=[] if faulty else [hf_recipe.EarlyStopping()],
        max_steps=96,
        learning_rate=3e-3,
        eval_strategy="steps",
        eval_steps=8,
        load_best_model_at_end=not faulty,
        **options,
    )


CASES = [
    Case("warmup-too-long", warm_up, "warning", train=False),
    Case("schedule-never-decays", stepped(10_000), "warning", train=False),
    Case("schedule-decays-early", horizon, "warning", train=False),
    Case("schedule-decays-early", hurried, "error", name="scheduler stepped four times"),
    Case("early-stop-miswired", metric, "error", train=False),
    Case("overfitting", memorised, "warning", also={"input-ignored"}),
    Case(
        "overfitting",
        declared,
        "warning",
        also={"input-ignored"},
        healthy_also={"input-ignored"},
        name="overfitting by the metric that is declared",
    ),
    Case(
        "overfitting",
        guarded,
        "warning",
        also={"input-ignored"},
        healthy_also={"input-ignored"},
        name="overfitting without early stopping",
    ),
]


def test_the_advice_is_of_this_run(tmp_path):
    report = run(memorised(tmp_path, True))
    (found,) = [f for f in report.findings if f.check == "overfitting"]
    assert "more data (24 rows)" in found.message
    assert "TokenDropout" in found.message
    assert "parameters per row" in found.message
    assert "dropout (now 0" in found.message


@pytest.mark.parametrize("case", CASES, ids=str)
def test_faulty_run_is_named(case, tmp_path):
    assert_found(case, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fixed_twin_is_silent(case, tmp_path):
    assert_silent(case, tmp_path)
