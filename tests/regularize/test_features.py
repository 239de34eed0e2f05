"""feature-unhelpful: literal numbers, every kind of field, and columns whose worth is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from hf_recipe.regularize.features import (
    Field,
    FieldUse,
    drop_fields,
    exhibits,
    feature_unhelpful,
    field_use,
    fields_of,
    losses_of,
    unneeded,
)
from tests.models import bert, words

IDLE = Field("colour", 0.0001, -0.001, 0.001, -0.001, -0.004, 0.002)
USE = FieldUse(200, 0.5, (IDLE, Field("size", 0.4, 0.3, 0.5)))


def test_literal_numbers():
    (fault,) = feature_unhelpful(USE)
    assert fault.subject == "colour"
    assert "-0.0010 [-0.0040, +0.0020]" in fault.message
    for healthy in (
        replace(IDLE, cost=None, cost_high=None),  # never left out
        replace(IDLE, cost_high=0.02),  # it may cost 4 % of the loss
        replace(IDLE, high=0.2),  # the model uses it
        replace(IDLE, cost_high=float("nan")),
        replace(IDLE, high=float("nan")),
    ):
        assert not list(feature_unhelpful(FieldUse(200, 0.5, (healthy,))))
    assert FieldUse.from_values(USE.values()) == USE
    assert unneeded(USE) == ["colour"]


def table(rows=2500, seed=0):
    """Column 0 tells, column 1 is a copy of it, column 2 is noise, column 3 tells a little."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (rows, 4)).astype(np.float32)
    x[:, 1] = x[:, 0] + rng.normal(0, 0.05, rows)
    y = (2 * x[:, 0] + 0.8 * x[:, 3] + rng.normal(0, 0.5, rows) > 0).astype(int)
    return x, y


def test_noise_is_found_and_a_copy_is_told_by_leaving_it_out():
    x, y = table()
    held = {"x": torch.tensor(x[500:]), "labels": torch.tensor(y[500:])}

    def fitted(columns, seed):
        rows = np.random.default_rng(seed).permutation(500)[:450]
        return LogisticRegression(C=1e3).fit(x[rows][:, columns], y[rows])

    def losses(model, columns, values):
        seen = np.asarray(values)[:, columns]
        return -np.log(np.clip(model.predict_proba(seen)[np.arange(2000), y[500:]], 1e-4, 1))

    every = [0, 1, 2, 3]
    model = fitted(every, 0)
    names = ("told", "copy", "noise", "little")
    fields = fields_of(held, names=names)
    assert tuple(fields) == names
    use = field_use(lambda batch: losses(model, every, batch["x"]), held, fields)
    assert "noise" in unneeded(use)
    assert "told" not in unneeded(use)

    def train(without, seed):
        columns = [i for i in every if names[i] not in without]
        return losses(fitted(columns, seed), columns, x[500:])

    found, ladder = drop_fields(train, use, names)
    costs = {f.name: f.cost for f in found.fields}
    print(costs)
    assert [rung.change for rung in ladder.rungs][1] == "without told"
    assert {f.subject for f in feature_unhelpful(found)} == {"noise"}
    assert costs["little"] > 0.02
    assert len(exhibits(found)) == 1


def test_places_of_a_picture_and_of_a_text():
    pixels = torch.randn(40, 1, 8, 8)
    labels = (pixels[:, 0, :2, :2].mean((1, 2)) > 0).long()
    batch = {"pixel_values": pixels, "labels": labels}
    fields = fields_of(batch, grid=4)
    assert len(fields) == 16

    def losses(batch):
        logit = 5 * batch["pixel_values"][:, 0, :2, :2].mean((1, 2))
        return torch.nn.functional.softplus(torch.where(labels == 1, -logit, logit))

    use = field_use(losses, batch, fields)
    assert max(use.fields, key=lambda f: f.rise).name == "region 0,0"
    assert len(unneeded(use)) == 15
    assert exhibits(use)[1].values[0][0] > 0.5
    assert torch.equal(batch["pixel_values"], pixels)

    ids = torch.randint(5, 50, (30, 12))
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "length": torch.arange(30.0)}
    spans = fields_of(text, spans=4)
    assert list(spans) == ["tokens 0-2", "tokens 3-5", "tokens 6-8", "tokens 9-11", "length"]
    changed = spans["tokens 3-5"](text, torch.arange(30).roll(1))["input_ids"]
    assert torch.equal(changed[:, 3:6], ids.roll(1, 0)[:, 3:6])
    assert torch.equal(changed[:, :3], ids[:, :3])


def test_a_trained_model_is_asked_by_rows(tmp_path):
    from transformers import Trainer

    from tests.models import arguments

    model = bert(num_hidden_layers=1)
    args = arguments(tmp_path, max_steps=120, learning_rate=5e-3)
    Trainer(model=model, args=args, train_dataset=words(256)).train()
    held = words(128, seed=4)
    batch = {k: torch.tensor(np.array(held[k])) for k in ("input_ids", "attention_mask", "labels")}
    use = field_use(losses_of(model), batch, fields_of(batch, spans=12), repeats=2)
    ordered = [f.name for f in sorted(use.fields, key=lambda f: -f.rise)]
    assert set(ordered[:3]) <= {"tokens 0-0", "tokens 3-3", "tokens 7-7"}  # where the markers stand


def test_bad_input_is_named():
    one = {"x": torch.randn(1, 3), "labels": torch.zeros(1)}
    with pytest.raises(ValueError, match="one loss for each"):
        field_use(lambda b: [0.5], one, fields_of(one))
    with pytest.raises(ValueError, match="0 fields"):
        field_use(lambda b: [0.5, 0.4], {"labels": torch.zeros(2)}, {})
    with pytest.raises(ValueError, match="no such field: size 9"):
        drop_fields(lambda names, seed: [0.5], USE, ["size 9"])
