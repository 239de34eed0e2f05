"""Healthy runs as strangers write them: own losses, steps, optimizers, schedules and samplers.

As in `healthy`, each builder takes (folder, seed) and returns a Trainer that is about to train
well. The suite samples this list; `scripts/benchmark.py healthy` runs it whole.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import WeightedRandomSampler
from transformers import (
    EvalPrediction,
    Trainer,
    TrainerCallback,
    default_data_collator,
)
from transformers.optimization import Adafactor, AdafactorSchedule

from tests.gallery.healthy import RUN, Healthy
from tests.models import arguments

DIGITS = {**RUN, "max_steps": 100, "eval_steps": 50, "per_device_train_batch_size": 32}


class Table(nn.Module):
    """Rows of numbers through one hidden layer; `loss` compares its outputs with the labels."""

    def __init__(self, inputs: int, outputs: int, loss: Any = functional.cross_entropy) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(64, outputs)
        self.loss = loss

    def forward(self, x: Any, labels: Any = None) -> dict[str, Any]:
        logits = self.head(self.body(x))
        found = {"logits": logits.squeeze(-1)}
        return found if labels is None else {"loss": self.loss(found["logits"], labels), **found}


def rows_of(x: Any, labels: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"x": x.tolist(), "labels": labels.tolist()})


def digits(seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x, y = (pixels / 8 - 1).astype(np.float32)[order], labels[order]
    return rows_of(x[:1350], y[:1350]), rows_of(x[1350:], y[1350:])


def digit_run(
    folder: Path, seed: int, cls: type[Trainer] = Trainer, model: Any = None,
    given: dict[str, Any] | None = None, **changes: Any,
) -> Trainer:  # fmt: skip
    """Real digits in a Trainer of class `cls`; `given` goes to it, `changes` to its arguments."""
    torch.manual_seed(seed)
    train, evaluation = digits(seed)
    return cls(
        model=model if model is not None else Table(64, 10),
        args=arguments(folder, seed=seed, **{**DIGITS, **changes}),
        train_dataset=train,
        eval_dataset=evaluation,
        **(given or {}),
    )


def diabetes(outputs: int, loss: Any) -> Any:
    """Real regression: standardised measurements and a standardised target."""

    def build(folder: Path, seed: int) -> Trainer:
        x, y = load_diabetes(return_X_y=True)
        order = np.random.default_rng(seed).permutation(len(y))
        x, y = (x / x.std(0))[order], ((y - y.mean()) / y.std())[order]
        torch.manual_seed(seed)
        return Trainer(
            model=Table(10, outputs, loss),
            args=arguments(folder, seed=seed, **{**DIGITS, "max_steps": 200}),
            train_dataset=rows_of(x[:340], y[:340]),
            eval_dataset=rows_of(x[340:], y[340:]),
        )

    return build


# ---------------------------------------------------------------- losses


def quantiles(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    levels = torch.tensor([0.1, 0.5, 0.9])
    error = labels[:, None] - values
    return torch.maximum(levels * error, (levels - 1) * error).sum(1).mean()


def likelihood(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean and variance of a normal distribution, both predicted."""
    spread = functional.softplus(values[:, 1]) + 1e-3
    return functional.gaussian_nll_loss(values[:, 0], labels, spread)


class MixUp:
    """Mixed pairs and soft labels for training; evaluation rows as they are."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        x = torch.tensor([row["x"] for row in rows])
        y = functional.one_hot(torch.tensor([row["labels"] for row in rows]), 10).float()
        share, other = float(np.random.beta(0.4, 0.4)), torch.randperm(len(x))
        return {"x": share * x + (1 - share) * x[other],
                "labels": share * y + (1 - share) * y[other]}  # fmt: skip


class Mixes(Trainer):
    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        mixing, self.data_collator = self.data_collator, default_data_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = mixing


class TwoPasses(Trainer):
    """Two passes under other dropout, and a term that draws them together (R-Drop)."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        loss = outputs["loss"]
        if model.training:
            again = model(**inputs)
            p, q = outputs["logits"].log_softmax(-1), again["logits"].log_softmax(-1)
            apart = functional.kl_div(p, q, log_target=True, reduction="batchmean")
            loss = 0.5 * (loss + again["loss"]) + apart
        return (loss, outputs) if return_outputs else loss


class TwoTasks(nn.Module):
    """Which digit, and how dark: each loss weighed by a learnt log variance."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.digit, self.dark = nn.Linear(64, 10), nn.Linear(64, 1)
        self.doubt = nn.Parameter(torch.zeros(2))

    def forward(self, x: Any, labels: Any = None, dark: Any = None) -> dict[str, Any]:
        hidden = self.body(x)
        logits, value = self.digit(hidden), self.dark(hidden)[:, 0]
        parts = functional.cross_entropy(logits, labels), functional.mse_loss(value, dark)
        loss = (torch.stack(parts) * (-self.doubt).exp() + self.doubt).sum()
        return {"loss": loss, "logits": logits, "value": value}


def two_tasks(folder: Path, seed: int) -> Trainer:
    trainer = digit_run(folder, seed, model=TwoTasks(), label_names=["labels", "dark"])
    for name in ("train_dataset", "eval_dataset"):
        data = getattr(trainer, name)
        dark = np.asarray(data["x"]).mean(1)
        setattr(trainer, name, data.add_column("dark", ((dark + 0.39) / 0.09).tolist()))
    return trainer


class Variational(nn.Module):
    """An autoencoder that says nothing of labels; `return_loss` tells the Trainer so."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
        self.decode = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, x: Any, return_loss: bool = True) -> dict[str, Any]:
        mean, log = self.encode(x).chunk(2, -1)
        code = mean + torch.randn_like(mean) * (0.5 * log).exp() if self.training else mean
        made = self.decode(code)
        apart = -0.5 * (1 + log - mean.square() - log.exp()).sum(1).mean()
        return {"loss": functional.mse_loss(made, x) * 64 + 0.1 * apart, "logits": made}


def variational(folder: Path, seed: int) -> Trainer:
    trainer = digit_run(folder, seed, model=Variational(), prediction_loss_only=True)
    trainer.train_dataset = trainer.train_dataset.remove_columns("labels")
    trainer.eval_dataset = trainer.eval_dataset.remove_columns("labels")
    return trainer


class Target(nn.Module):
    """Two views of a picture; one is to predict what a slow copy makes of the other (BYOL)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
        self.predicts = nn.Linear(32, 32)
        self.slow = copy.deepcopy(self.body).requires_grad_(False)

    def forward(self, x: Any, return_loss: bool = True) -> dict[str, Any]:
        one, other = (x + 0.3 * torch.randn_like(x) for _ in range(2))
        loss = torch.zeros(())
        for a, b in ((one, other), (other, one)):
            with torch.no_grad():
                wanted = self.slow(b)
            loss = (
                loss + 1 - functional.cosine_similarity(self.predicts(self.body(a)), wanted).mean()
            )
        return {"loss": loss}


class Follows(TrainerCallback):
    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        for slow, fast in zip(model.slow.parameters(), model.body.parameters(), strict=True):
            slow.lerp_(fast, 0.02)


def target(folder: Path, seed: int) -> Trainer:
    torch.manual_seed(seed)
    trainer = digit_run(
        folder, seed, model=Target(), given={"callbacks": [Follows()]}, eval_strategy="no"
    )
    trainer.train_dataset = trainer.train_dataset.remove_columns("labels")
    trainer.eval_dataset = None
    return trainer


# ---------------------------------------------------------------- steps, optimizers, schedules


class Sharpness(Trainer):
    """Sharpness-aware: the gradient is taken a small step up the slope."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs)
        self.accelerator.backward(loss)
        moved = [(p, p.grad.clone()) for p in model.parameters()]
        norm = torch.stack([g.norm() for _, g in moved]).norm() + 1e-12
        with torch.no_grad():
            for p, g in moved:
                p.add_(g, alpha=float(0.02 / norm))
        model.zero_grad()
        self.accelerator.backward(self.compute_loss(model, inputs))
        with torch.no_grad():
            for p, g in moved:
                p.sub_(g, alpha=float(0.02 / norm))
        return loss.detach()


class Lion(torch.optim.Optimizer):
    """Signs of a momentum: every weight moves by the rate."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.sub_(group["lr"] * (0.9 * momentum + 0.1 * p.grad).sign())
                momentum.lerp_(p.grad, 0.01)


def with_lion(folder: Path, seed: int) -> Trainer:
    torch.manual_seed(seed)
    model = Table(64, 10)
    lion = Lion(model.parameters(), 3e-4)
    return digit_run(folder, seed, model=model, given={"optimizers": (lion, None)})


def relative_steps(folder: Path, seed: int) -> Trainer:
    """Adafactor that sets its own rate."""
    torch.manual_seed(seed)
    model = Table(64, 10)
    optimizer = Adafactor(model.parameters(), scale_parameter=True, relative_step=True, lr=None)
    both = optimizer, AdafactorSchedule(optimizer)
    return digit_run(folder, seed, model=model, given={"optimizers": both})


def one_cycle(folder: Path, seed: int) -> Trainer:
    torch.manual_seed(seed)
    model = Table(64, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=101)
    return digit_run(folder, seed, model=model, given={"optimizers": (optimizer, cycle)})


class Average(TrainerCallback):
    """A running average of the weights, which evaluation borrows."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.mean = {n: p.detach().clone() for n, p in model.named_parameters()}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for name, p in model.named_parameters():
            self.mean[name].lerp_(p.detach(), 0.1)


class Averages(Trainer):
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        (average,) = (c for c in self.callback_handler.callbacks if isinstance(c, Average))
        own = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self._set(average.mean)
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._set(own)

    @torch.no_grad()
    def _set(self, values: dict[str, torch.Tensor]) -> None:
        for name, p in self.model.named_parameters():
            p.copy_(values[name])


class Unfreezes(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.body.requires_grad_(False)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 40:
            model.body.requires_grad_(True)


class BatchByBatch:
    """A metric that adds up, for `batch_eval_metrics`."""

    def __init__(self) -> None:
        self.right: list[torch.Tensor] = []

    def __call__(self, found: EvalPrediction, compute_result: bool = False) -> dict[str, float]:
        self.right.append((found.predictions.argmax(-1) == found.label_ids).float())
        if not compute_result:
            return {}
        right, self.right = self.right, []
        return {"accuracy": float(torch.cat(right).mean())}


# ---------------------------------------------------------------- rows


class Rarely(Trainer):
    """Draws the rare class as often as the common one."""

    def _get_train_sampler(self, train_dataset=None):
        weights = np.where(np.asarray(self.train_dataset["labels"]) == 1, 9.0, 1.0)
        return WeightedRandomSampler(torch.tensor(weights), len(weights))


def rarely(folder: Path, seed: int) -> Trainer:
    def data(rows: int, seed: int) -> datasets.Dataset:
        draw = np.random.default_rng(seed)
        labels = (draw.random(rows) < 0.1).astype(int)
        return rows_of(draw.normal(size=(rows, 6)) + 1.5 * labels[:, None], labels)

    torch.manual_seed(seed)
    return Rarely(
        model=Table(6, 2),
        args=arguments(folder, seed=seed, **{**DIGITS, "max_steps": 150}),
        train_dataset=data(1500, seed + 1),
        eval_dataset=data(500, seed + 1001),
    )


SCRIPTS = [
    Healthy("quantiles", diabetes(3, quantiles)),
    Healthy("Gaussian likelihood", diabetes(2, likelihood)),
    Healthy("Huber", diabetes(1, functional.smooth_l1_loss)),
    Healthy("MixUp", lambda f, s: digit_run(f, s, Mixes, given={"data_collator": MixUp()})),
    Healthy("R-Drop", lambda f, s: digit_run(f, s, TwoPasses)),
    Healthy("hinge", lambda f, s: digit_run(
        f, s, model=Table(64, 10, functional.multi_margin_loss))),
    Healthy("two tasks", two_tasks),
    Healthy("variational", variational),
    Healthy("slow target", target),
    Healthy("sharpness-aware", lambda f, s: digit_run(f, s, Sharpness)),
    Healthy("Lion", with_lion),
    Healthy("Adafactor's own rate", relative_steps),
    Healthy("one cycle", one_cycle),
    Healthy("plateau", lambda f, s: digit_run(f, s, lr_scheduler_type="reduce_lr_on_plateau")),
    Healthy("averaged evaluation", lambda f, s: digit_run(
        f, s, Averages, given={"callbacks": [Average()]})),
    Healthy("unfreezing", lambda f, s: digit_run(f, s, given={"callbacks": [Unfreezes()]})),
    Healthy("batches' metrics", lambda f, s: digit_run(
        f, s, given={"compute_metrics": BatchByBatch()}, batch_eval_metrics=True)),
    Healthy("one huge batch", lambda f, s: digit_run(f, s, per_device_train_batch_size=2048,
                                                     learning_rate=1e-2)),
    Healthy("rare class drawn often", rarely),
]  # fmt: skip
