"""Architectures, the race of rates, growing inputs: on literal numbers, and through trainings."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from transformers import Trainer

from hf_recipe.complexify.architectures import (
    CAPACITY_SHORT,
    LADDERS,
    RUNGS,
    NextRung,
    ladder,
    table,
)
from hf_recipe.complexify.growth import (
    GROWTH_UNHELPFUL,
    GrowInput,
    Growth,
    climb,
    coarser,
    fewer,
    shorter,
)
from hf_recipe.complexify.rate_race import (
    UNSTABLE_ABOVE_BEST_RATE,
    Lap,
    RateRace,
    blown_up,
    half_decades,
    picture,
    settled,
    warm_ups,
)
from hf_recipe.instruments.compare import Outcome
from tests.gallery.harness import run
from tests.models import arguments, llama, progressions

# -------------------------------------------------------------------- architectures


def test_every_ladder_climbs_and_names_its_papers():
    for kind, designs in LADDERS.items():
        sizes = [design.blocks for design in designs]
        assert sizes == sorted(set(sizes)), kind
        assert all(re.search(r" (19|20)\d\d ", design.paper) for design in designs)
        assert all(design.width % design.heads == 0 for design in designs)


def test_where_the_ladder_begins():
    assert [d.name for d in ladder("text", 500).values()] == [
        "bert-64x1",
        "bert-tiny",
        "bert-128x4",
        "bert-mini",
    ]
    assert ladder("text", 10**6)["base"].blocks > ladder("text", 10**4)["base"].blocks
    assert ladder("text", 10**12)["larger"].name == "bert-base"
    assert ladder("image", 100, "vit-tiny")["base"].name == "vit-tiny"
    with pytest.raises(ValueError, match="vit-64x2"):
        ladder("image", 100, "resnet")
    rows = table(ladder("image", 100), {"base": 7}).rows
    assert [row[0] for row in rows] == list(RUNGS)
    assert [row[5] for row in rows] == [None, 7, None, None]


def test_capacity():
    rung = NextRung("a", "b", 10, 20, loss=1.0, gain=0.3, low=0.2, high=0.4, seeds=2)

    def told(**changes):
        return len(list(CAPACITY_SHORT.judge(dataclasses.replace(rung, **changes))))

    assert told() == 1
    assert told(low=-0.1) == 0
    assert told(gain=0.01, low=0.005) == 0
    assert told(gain=float("nan"), low=float("nan")) == 0


# -------------------------------------------------------------------- rates


def race(losses, remedies=(), blind=2.3):
    rates = [0.001 * 3**i for i in range(len(losses))]
    laps = tuple(Lap(rate, (loss,), 0.01) for rate, loss in zip(rates, losses, strict=True))
    extra = tuple(Lap(rates[-1], (loss,), 0.01, name) for name, loss in remedies)
    return RateRace(laps, extra, blind)


def told(*args, **kwargs):
    return [f.evidence["opened"] for f in UNSTABLE_ABOVE_BEST_RATE.judge(race(*args, **kwargs))]


def test_judging_the_race():
    assert told([0.9, 0.5, 0.6]) == []  # worse, not blown up
    assert told([0.9, 0.5, 2.4]) == [False]
    assert told([0.9, 0.5, float("nan")]) == [False]
    assert told([0.9, 0.5, 2.4], [("a warm-up", 0.3), ("clipping", 2.2)]) == [True]
    assert told([0.9, 0.5, 2.4], [("a warm-up", 0.49)]) == [False]  # within the noise
    assert told([2.4, 0.5, 0.4]) == []  # a rate too low is no instability
    assert told([float("nan")] * 3) == []
    assert [lap.loss for lap in blown_up(race([0.9, 0.5, 2.4, 2.5]))] == [2.4, 2.5]


def test_pieces_of_the_race():
    assert half_decades(1e-3) == (1e-4, 3.2e-4, 1e-3, 3.2e-3, 1e-2)
    assert warm_ups(120) == (0.1,)
    assert warm_ups(2000) == (0.001, 0.01, 0.1)
    lap = Lap(1e-3, (1.0, 1.2), 0.02)
    assert lap.loss == pytest.approx(1.1)
    assert lap.error == pytest.approx((0.02**2 / 2 + 0.1**2) ** 0.5)
    assert len(picture(race([0.9, 0.5, float("inf")])).lines[0].x) == 2
    flat = [(i, 1.0 if i > 30 else 2.0) for i in range(1, 101)]
    assert settled(flat) == pytest.approx(0.31)
    assert settled([(i, 1 / i) for i in range(1, 101)]) > 0.8


def lap_of(rate, warmup=0, rows=256):
    """A short run at a constant rate; its loss on training rows, in evaluation mode."""
    data = progressions(rows)
    trainer = Trainer(
        model=llama(num_hidden_layers=1),
        args=arguments(
            "unused",
            max_steps=40,
            learning_rate=rate,
            lr_scheduler_type="constant_with_warmup" if warmup else "constant",
            warmup_steps=warmup,
        ),
        train_dataset=data,
        eval_dataset=data.select(range(64)),
    )
    trainer.train()
    return Lap(rate, (trainer.evaluate()["eval_loss"],), 0.02, "a warm-up" if warmup else "")


def test_a_real_race_names_the_edge():
    laps = tuple(lap_of(rate) for rate in (3e-3, 1e-2, 1.0))
    found = RateRace(laps, (lap_of(1.0, warmup=4),), blind=np.log(61))
    assert [lap.rate for lap in blown_up(found)] == [1.0]
    (fault,) = UNSTABLE_ABOVE_BEST_RATE.judge(found)
    assert fault.evidence["opened"] is False  # nothing opens a rate of one
    assert list(UNSTABLE_ABOVE_BEST_RATE.judge(RateRace(laps[:2], (), np.log(61)))) == []


class Small(torch.nn.Module):
    """Eight numbers, one hidden layer, four classes."""

    def __init__(self):
        super().__init__()
        linear = torch.nn.Linear
        self.net = torch.nn.Sequential(linear(8, 32), torch.nn.ReLU(), linear(32, 4))

    def forward(self, features=None, labels=None):
        logits = self.net(features)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def ragged(times):
    """Rows under a rule; three in a hundred are so many times as large as the rest."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 8, generator=generator)
    labels = (x[:, 0] * x[:, 1] > 0).long() * 2 + (x[:, 2] + x[:, 3] * x[:, 4] > 0).long()
    x[torch.rand(512, generator=generator) < 0.03] *= times
    return [{"features": f, "labels": y} for f, y in zip(x, labels, strict=True)]


def sgd_lap(rows, rate, *, clip=0.0, warmup=0, change=""):
    """(a short run at a constant rate, the 90th percentile of its gradient's norms)."""
    torch.manual_seed(0)
    trainer = Trainer(
        model=Small(),
        args=arguments(
            "unused",
            max_steps=200,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=512,
            learning_rate=rate,
            optim="sgd",
            lr_scheduler_type="constant_with_warmup" if warmup else "constant",
            warmup_steps=warmup,
            max_grad_norm=clip,
            logging_steps=1,
            logging_nan_inf_filter=False,
        ),
        train_dataset=rows,
        eval_dataset=rows,
    )
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    loss = trainer.evaluate()["eval_loss"]
    return Lap(rate, (loss,), 0.02, change), float(np.nanquantile(norms, 0.9))


@pytest.mark.parametrize(
    ("times", "rates", "opens"), [(20, (0.1, 0.3), True), (1, (1.0, 30.0), False)]
)
def test_clipping_opens_a_rate_where_rare_rows_blow_it_up_and_nothing_opens_one_that_is_too_high(
    times, rates, opens
):
    rows = ragged(times)
    (good, norm), (lost, _) = (sgd_lap(rows, rate) for rate in rates)
    steps = round(max(warm_ups(200)) * 200)
    remedies = (
        sgd_lap(rows, rates[1], warmup=steps, change="a warm-up")[0],
        sgd_lap(rows, rates[1], clip=norm, change="clipping")[0],
    )
    found = RateRace((good, lost), remedies, blind=np.log(4))
    assert [lap.rate for lap in blown_up(found)] == [rates[1]]
    (fault,) = UNSTABLE_ABOVE_BEST_RATE.judge(found)
    assert fault.evidence["opened"] is opens
    assert ("with clipping" in fault.fix) is opens
    assert list(UNSTABLE_ABOVE_BEST_RATE.judge(RateRace((good,), (), np.log(4)))) == []


# -------------------------------------------------------------------- growth


def test_smaller_inputs():
    pixels = torch.arange(16.0).view(1, 1, 4, 4)
    small = coarser(pixels, 2)
    assert small.shape == pixels.shape
    assert small.mean() == pixels.mean()
    assert len(coarser(pixels, 1).unique()) == 1
    assert coarser(pixels, 4) is pixels
    batch = {"input_ids": torch.ones(2, 6), "labels": torch.ones(2, 6), "kept": 1}
    assert shorter(batch, 3, True)["labels"].shape == (2, 3)
    assert shorter(batch, 3, False)["labels"].shape == (2, 6)
    assert fewer(torch.ones(2, 4), [1, 3]).tolist() == [[0, 1, 0, 1]] * 2


def test_climbing_keeps_what_helps():
    generator = np.random.default_rng(0)
    noise = generator.normal(0, 0.05, (2, 200))
    means = {2: 1.0, 4: 0.5, 8: 0.5}
    extra = {2: 0.0, 4: 0.0, 8: 1.0}

    def train(size):
        return [
            Outcome(tuple(means[size] + row + extra[size] * generator.normal(0, 0.01, 200)), size)
            for row in noise
        ]

    standing, rungs, grown = climb(train, [("2", 2), ("4", 4), ("8", 8)], what="side")
    assert standing == 4
    assert [rung.kept for rung in rungs.rungs] == [True, True, False]
    assert [(g.before, g.after) for g in grown] == [("2", "4"), ("4", "8")]
    assert [len(list(GROWTH_UNHELPFUL.judge(g))) for g in grown] == [0, 1]
    assert grown[1].cost == pytest.approx(2.0)
    lost = Growth("side", "4", "8", float("-inf"), float("-inf"), float("-inf"), 2, 1.0)
    assert len(list(GROWTH_UNHELPFUL.judge(lost))) == 1


def test_grow_input_while_training(tmp_path):
    seen = []

    class Sees(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.append(inputs["input_ids"].shape[1])
            return super().training_step(model, inputs, *args, **kwargs)

    callback = GrowInput({0.0: 6, 0.5: 16})
    trainer = Sees(
        model=llama(num_hidden_layers=1),
        args=arguments(tmp_path, max_steps=12),
        train_dataset=progressions(),
        callbacks=[callback],
    )
    run(trainer)
    assert set(seen[:6]) == {6}
    assert seen[-4:] == [16] * 4
    assert trainer.callback_handler.train_dataloader.collate_fn is not callback._grown


@pytest.mark.parametrize("sizes", [{}, {0.5: 4}, {0.0: 8, 0.5: 4}, {0.0: 4, 2.0: 8}, {0.0: 0}])
def test_sizes_that_cannot_be(sizes):
    with pytest.raises(ValueError, match="sizes"):
        GrowInput(sizes)
