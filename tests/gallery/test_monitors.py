"""Faults that show while a run goes on, through `attach`; each next to its fixed twin."""

from typing import Any

import datasets
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.modeling_outputs import SequenceClassifierOutput

from tests.gallery.harness import Case, assert_found, assert_silent
from tests.gallery.healthy import chains
from tests.models import NormConfig, arguments, bert, llama, points, words

# Causes and symptoms that the same fault may rightly raise beside its own name.
COURSE = ("loss-diverged", "update-too-large", "loss-spike", "loss-not-decreasing")


def classify(folder, model=None, data=None, cls=Trainer, **changes: Any) -> Trainer:
    return cls(
        model=model if model is not None else bert(),
        args=arguments(folder, **{"max_steps": 40, **changes}),
        train_dataset=data if data is not None else words(),
    )


def language(folder, model=None, **changes: Any) -> Trainer:
    return Trainer(
        model=model if model is not None else llama(),
        args=arguments(folder, **{"max_steps": 60, "learning_rate": 3e-3, **changes}),
        train_dataset=chains(),
    )


def hot(folder, faulty):
    return classify(folder, learning_rate=1.0 if faulty else 1e-3, lr_scheduler_type="constant")


def cold(folder, faulty):
    return language(folder, learning_rate=1e-9 if faulty else 3e-3, max_steps=80)


def kept_gradients(folder, faulty):
    model = bert()
    if faulty:
        model.zero_grad = lambda set_to_none=True: None
    trainer = classify(folder, model, max_steps=8)
    if faulty:
        trainer.create_optimizer()
        trainer.optimizer.zero_grad = lambda set_to_none=True: None
    return trainer


class Drops(TrainerCallback):
    """Clears the gradients right before the optimizer steps."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for parameter in model.parameters():
            parameter.grad = None


def dropped_gradients(folder, faulty):
    trainer = classify(folder, max_steps=12)
    if faulty:
        trainer.add_callback(Drops())
    return trainer


def eps_of_one(folder, faulty):
    return classify(folder, adam_epsilon=1.0 if faulty else 1e-8, learning_rate=1e-4)


def still_head(folder, faulty):
    model = bert()
    head = list(model.classifier.parameters())
    body = [p for n, p in model.named_parameters() if not n.startswith("classifier")]
    groups = [{"params": body, "lr": 1e-3}, {"params": head, "lr": 0.0 if faulty else 1e-3}]
    trainer = Trainer(
        model=model,
        args=arguments(folder, max_steps=12),
        train_dataset=words(),
        optimizers=(torch.optim.AdamW(groups), None),
    )
    return trainer


def half_weights(folder, faulty):
    model = llama()
    model = model.bfloat16() if faulty else model
    return language(folder, model, learning_rate=1e-5, max_steps=12, bf16=not faulty)


def tight_clipping(folder, faulty):
    limit = 1e-6 if faulty else 10.0
    return classify(folder, optim="sgd", learning_rate=0.1, max_grad_norm=limit)


class Deep(nn.Module):
    """A classifier of many layers; `function` between them."""

    def __init__(self, layers: int, function: type[nn.Module], gain: float = 1.0) -> None:
        super().__init__()
        width, blocks = 16, []
        for i in range(layers):
            blocks += [nn.Linear(8 if i == 0 else width, width), function()]
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(width, 4)
        self.config = NormConfig(num_labels=4)
        with torch.no_grad():
            for module in self.body:
                if isinstance(module, nn.Linear):
                    module.weight.mul_(gain)

    def forward(self, features=None, labels=None):
        logits = self.head(self.body(features))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def deep_sigmoid(folder, faulty):
    torch.manual_seed(0)
    model = Deep(12, nn.Sigmoid) if faulty else Deep(4, nn.ReLU)
    return classify(folder, model, points())


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 1)

    def forward(self, features=None, labels=None):
        value = self.head(features).squeeze(-1)
        loss = None if labels is None else nn.functional.mse_loss(value, labels.float())
        return {"loss": loss, "logits": value}


def growing(folder, faulty):
    torch.manual_seed(0)
    rate = 0.3 if faulty else 0.01
    return classify(
        folder, Line(), points(), optim="sgd", learning_rate=rate, max_grad_norm=0.0,
        lr_scheduler_type="constant", max_steps=20,
    )  # fmt: skip


def dead_layer(folder, faulty):
    torch.manual_seed(0)
    model = Deep(2, nn.ReLU)
    if faulty:
        with torch.no_grad():
            model.body[0].bias.fill_(-30.0)
    return classify(folder, model, points())


class Sequential(Trainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def same_order(folder, faulty):
    cls = Sequential if faulty else Trainer
    return classify(folder, data=words(64), cls=cls, max_steps=20)


class Slow(torch.utils.data.Dataset):
    def __init__(self, rows: datasets.Dataset, seconds: float) -> None:
        self.rows, self.seconds = rows, seconds

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        import time

        time.sleep(self.seconds)
        return self.rows[int(i)]


def slow_rows(folder, faulty):
    return classify(folder, data=Slow(words(), 0.003 if faulty else 0.0), max_steps=32)


FAULTS = [
    Case("loss-diverged", hot, "warning", also=(*COURSE, "dead-unit", "vanishing-gradient"),
         name="rate of one: diverged", settings={"ignore": ["update-too-large"]}),
    Case("update-too-large", hot, "warning", also=(*COURSE, "dead-unit", "vanishing-gradient"),
         name="rate of one: updates"),
    Case("loss-not-decreasing", cold, "warning", also=("update-too-small",), name="cold: loss",
         settings={"ignore": ["update-too-small"]}),
    Case("update-too-small", cold, "warning", name="rate of 1e-9"),
    Case("gradient-accumulates", kept_gradients, "error"),
    Case("update-too-small", dropped_gradients, "warning", name="gradients dropped"),
    Case("update-too-small", eps_of_one, "warning", name="eps of one"),
    Case("update-too-small", still_head, "warning", name="head's rate 0"),
    Case("update-rounded-away", half_weights, "warning"),
    Case("clipping-dominates", tight_clipping, "warning", also=("update-too-small",)),
    Case("vanishing-gradient", deep_sigmoid, "warning"),
    Case("exploding-gradient", growing, "warning", also=COURSE,
         settings={"ignore": ["update-too-large"]}),
    Case("dead-unit", dead_layer, "warning", also=("vanishing-gradient",)),
    Case("order-repeats", same_order, "warning"),
]  # fmt: skip


@pytest.mark.parametrize("case", FAULTS, ids=str)
def test_the_fault_is_named(case, tmp_path):
    assert_found(case, tmp_path)


@pytest.mark.parametrize("case", FAULTS, ids=str)
def test_its_fixed_twin_is_silent(case, tmp_path):
    assert_silent(case, tmp_path)


def test_waiting_for_data_is_a_note(tmp_path):
    case = Case("waiting-for-data", slow_rows, "note")
    assert_found(case, tmp_path)
