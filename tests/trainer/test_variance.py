"""`recipe.trial_variance`: the spread over seeds, and a Trainer that is as it was before."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

import hf_recipe
from hf_recipe.core.report import Report
from hf_recipe.trainer.variance import TrialVariance, trial_variance


class Rows(torch.utils.data.Dataset):
    def __init__(self, n=48):
        draw = torch.Generator().manual_seed(3)
        self.x = torch.randn(n, 6, generator=draw)
        self.y = (self.x[:, 0] + 0.5 * torch.randn(n, generator=draw) > 0).long()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "labels": self.y[i]}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.Dropout(0.2), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        )

    def forward(self, x, labels=None):
        logits = self.layers(x)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def trainer(folder, fresh=True, **options):
    given = dict(max_steps=8, use_cpu=True, report_to="none", learning_rate=0.02, disable_tqdm=True)
    args = TrainingArguments(str(folder), save_strategy="no", **{**given, **options})
    start = {"model_init": Net} if fresh else {"model": Net()}
    return Trainer(**start, args=args, train_dataset=Rows(), eval_dataset=Rows(30))


@pytest.mark.parametrize("fresh", [True, False])
def test_the_same_configuration_varies_and_nothing_is_left_of_it(tmp_path, fresh):
    subject, twin = trainer(tmp_path / "a", fresh), trainer(tmp_path / "b", fresh)
    if not fresh:
        twin.model.load_state_dict(subject.model.state_dict())
    before = {k: v.clone() for k, v in subject.model.state_dict().items()}
    state = torch.get_rng_state()
    found = trial_variance(subject, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in subject.model.state_dict().items())
    assert found.seeds == (42, 43, 44)
    assert found.fresh == fresh
    assert len(set(found.metrics["eval_loss"])) == 3
    assert found.spread() > 0
    assert found.resolves() > 2 * found.spread()
    assert not any("per_second" in name for name in found.metrics)
    for each in (subject, twin):
        torch.manual_seed(1)
        each.train()
    pairs = zip(subject.model.parameters(), twin.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert [h.get("loss") for h in subject.state.log_history] == [
        h.get("loss") for h in twin.state.log_history
    ]


def test_the_same_seed_does_not_vary(tmp_path):
    found = trial_variance(trainer(tmp_path), seeds=(5, 5))
    assert found.spread() == 0


def test_the_report_says_what_two_runs_can_tell(tmp_path):
    recipe = hf_recipe.attach(trainer(tmp_path), report_dir=tmp_path / "report")
    found = recipe.trial_variance(2)
    answer = next(a for a in recipe.report.answers if "vary" in a.question)
    assert "are not told apart" in answer.answer
    again = Report.from_json(tmp_path / "report" / "report.json")
    stored = next(m for m in again.measurements if m.kind == "TrialVariance")
    assert TrialVariance.from_values(stored.values) == found
    assert not recipe.paused


def test_what_cannot_be_measured_is_named(tmp_path):
    with pytest.raises(ValueError, match="at least 2"):
        trial_variance(trainer(tmp_path), 1)
    alone = trainer(tmp_path)
    alone.eval_dataset = None
    with pytest.raises(ValueError, match="eval_dataset"):
        trial_variance(alone, 2)
