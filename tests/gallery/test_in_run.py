"""Faults inside a forward, a step or a checkpoint that no curve shows; each next to its twin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback

import hf_recipe
from tests.gallery.harness import Case, assert_found, assert_silent, everything
from tests.gallery.healthy import chains
from tests.models import arguments, bert, llama, points, progressions, words


def loss_and(logits: Any, labels: Any) -> dict[str, Any]:
    return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def train(folder: Path, model: nn.Module, data: Any, cls: Any = Trainer, **changes: Any) -> Trainer:
    given = ("callbacks", "optimizers", "eval_dataset", "compute_metrics", "data_collator")
    own = {name: changes.pop(name) for name in given if name in changes}
    kept = changes.pop("preprocess_logits_for_metrics", None)
    return cls(
        model=model,
        args=arguments(folder, **{"max_steps": 12, **changes}),
        train_dataset=data,
        preprocess_logits_for_metrics=kept,
        **own,
    )


# ---------------------------------------------------------------- inside the forward


class Functions(nn.Module):
    """Its activations are functions, no modules; the last one is a hinge in the loss."""

    def __init__(self, bias: float = 0.0, gain: float = 1.0) -> None:
        super().__init__()
        self.first, self.second, self.head = (
            nn.Linear(a, b) for a, b in ((8, 32), (32, 32), (32, 10))
        )
        nn.init.constant_(self.first.bias, bias)
        with torch.no_grad():
            self.second.weight.mul_(gain)

    def forward(self, features: Any = None, labels: Any = None) -> dict[str, Any]:
        hidden = functional.relu(self.first(features))
        logits = self.head(torch.tanh(self.second(hidden)))
        solved = functional.relu(logits.detach() - 1e3).sum()
        return {"loss": functional.cross_entropy(logits, labels) + solved, "logits": logits}


def dead_function(folder, faulty):
    torch.manual_seed(0)
    return train(folder, Functions(bias=-50.0 if faulty else 0.0), points(), max_steps=20)


def saturated_function(folder, faulty):
    torch.manual_seed(0)
    return train(folder, Functions(gain=60.0 if faulty else 1.0), points(), max_steps=20)


class Tokens(nn.Module):
    """A label for each token; the faulty loss has classes and positions mixed up."""

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.table, self.head, self.mixed = nn.Embedding(64, 16), nn.Linear(16, 5), mixed

    def forward(self, input_ids: Any = None, labels: Any = None) -> dict[str, Any]:
        logits = self.head(self.table(input_ids))
        rows, width, classes = logits.shape
        turned = logits.view(rows, classes, width) if self.mixed else logits.transpose(1, 2)
        return {"loss": functional.cross_entropy(turned, labels), "logits": logits}


def mixed_axes(folder, faulty):
    torch.manual_seed(0)
    rows = progressions(64).map(lambda row: {"labels": [i % 5 for i in row["input_ids"]]})
    return train(folder, Tokens(faulty), rows, max_steps=2)


class FirstTokens(nn.Module):
    """Reads all of a row, or cuts it short."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.table, self.head, self.limit = nn.Embedding(64, 16), nn.Linear(16, 4), limit

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        return loss_and(self.head(self.table(input_ids[:, : self.limit]).mean(1)), labels)


def cut_short(folder, faulty):
    torch.manual_seed(0)
    return train(folder, FirstTokens(4 if faulty else 12), words(64), max_steps=2)


class Checkpointed(nn.Module):
    """Nothing before its checkpointed block has a gradient: reentrant, it gets none either."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.block, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.reentrant = reentrant

    def forward(self, features: Any = None, labels: Any = None) -> dict[str, Any]:
        hidden = checkpoint(self.block, features, use_reentrant=self.reentrant)
        return loss_and(self.head(hidden.relu()), labels)


def reentrant(folder, faulty):
    torch.manual_seed(0)
    return train(folder, Checkpointed(faulty), points(64), max_steps=2)


# ---------------------------------------------------------------- inside the step


class WritesBack(TrainerCallback):
    """An average of the weights that is put into the model itself after each step."""

    def __init__(self, writes: bool) -> None:
        self.writes, self.kept = writes, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                kept = self.kept.setdefault(name, parameter.clone())
                kept.lerp_(parameter, 1e-4)
                if self.writes:
                    parameter.copy_(kept)


def written_back(folder, faulty):
    return train(folder, bert(), words(), callbacks=[WritesBack(faulty)])


def upside_down(folder, faulty):
    """Rates by layer that fall towards the head."""
    model = bert()
    parts = [model.bert.embeddings, *model.bert.encoder.layer, model.bert.pooler, model.classifier]
    fall = 1e-3 if faulty else 0.7
    groups = [
        {"params": list(part.parameters()), "lr": 1e-3 * fall ** (i if faulty else len(parts) - i)}
        for i, part in enumerate(parts)
    ]
    return train(folder, model, words(), optimizers=(torch.optim.AdamW(groups), None))


def half_descent(folder, faulty):
    model = llama()
    return train(
        folder, model.bfloat16() if faulty else model, chains(64), optim="sgd",
        learning_rate=1e-3 if faulty else 0.5, lr_scheduler_type="constant",
    )  # fmt: skip


class Cleared(Trainer):
    clears = True

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.clears:
            model.zero_grad()
        return super().training_step(model, inputs, num_items_in_batch)


class NotCleared(Cleared):
    clears = False


def micro_batches_gone(folder, faulty):
    kind = Cleared if faulty else NotCleared
    return train(folder, bert(), words(64), kind, gradient_accumulation_steps=4, max_steps=2)


class ClearedAfter(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.optimizer.zero_grad()
        return loss


def cleared_after(folder, faulty):
    return train(folder, bert(), words(), ClearedAfter if faulty else Trainer)


class Preferred(Trainer):
    """A loss against a reference; the faulty one is the model itself."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        ours, theirs = model(**inputs), self.reference(**inputs)
        gap = ours.logits.logsumexp(-1) - theirs.logits.detach().logsumexp(-1)
        loss = -functional.logsigmoid(gap * inputs["labels"].sub(1.5)).mean()
        return (loss, ours) if return_outputs else loss


def own_reference(folder, faulty):
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    trainer = train(folder, model, words(), Preferred, max_steps=30)
    trainer.reference = model if faulty else bert(seed=9).eval()
    return trainer


# ---------------------------------------------------------------- evaluation


class OwnStep(Trainer):
    trains = True

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if self.trains:
            model.train()
        with torch.no_grad():
            outputs = model(**self._prepare_inputs(inputs))
        return outputs.loss, outputs.logits, inputs["labels"]


class OwnStepRight(OwnStep):
    trains = False


EVALUATED = {"eval_strategy": "steps", "eval_steps": 6}


def evaluates_in_training_mode(folder, faulty):
    kind = OwnStep if faulty else OwnStepRight
    evaluation = words(32, seed=2)
    return train(folder, bert(), words(64), kind, eval_dataset=evaluation, max_steps=2, **EVALUATED)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def nothing_left(folder, faulty):
    def top(logits, labels):
        answers = logits.argmax(-1)
        return None if faulty else answers

    return train(
        folder, bert(), words(64), eval_dataset=words(32, seed=2), max_steps=2,
        compute_metrics=accuracy, preprocess_logits_for_metrics=top, **EVALUATED,
    )  # fmt: skip


def unshifted_metric(folder, faulty):
    """A model whose class does not say which loss it has, and tokens that never repeat."""

    def metric(prediction):
        answers, labels = prediction.predictions.argmax(-1), prediction.label_ids
        if not faulty:
            answers, labels = answers[:, :-1], labels[:, 1:]
        return {"accuracy": float((answers == labels).mean())}

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    return train(
        folder, GPT2LMHeadModel(config), progressions(64), eval_dataset=progressions(32, seed=2),
        compute_metrics=metric, learning_rate=1e-2, max_steps=40, eval_strategy="steps",
        eval_steps=20,
    )  # fmt: skip


CASES = [
    Case("dead-unit", dead_function, "warning", also={"input-without-gradient"}, name="relu"),
    Case("dead-unit", saturated_function, "warning", name="tanh saturated"),
    Case("loss-broadcast", mixed_axes, "error", name="view for transpose"),
    Case("input-without-gradient", cut_short, "warning", name="cut short"),
    Case("parameter-without-gradient", reentrant, "error", name="reentrant"),
    Case("update-too-small", written_back, "warning", name="written back"),
    Case("update-too-small", upside_down, "warning", name="rates upside down"),
    Case("update-rounded-away", half_descent, "warning", name="half precision and SGD"),
    Case("loss-scaled-by-accumulation", micro_batches_gone, "error", name="micro-batches gone"),
    Case("update-too-small", cleared_after, "warning", name="cleared before the step"),
    Case("loss-not-decreasing", own_reference, "warning", name="own reference"),
    Case("eval-nondeterministic", evaluates_in_training_mode, "error", name="prediction_step"),
    Case("metrics-never-computed", nothing_left, "error", name="preprocess returns None"),
    Case("metric-disagrees", unshifted_metric, "error", name="shift of an unknown loss"),
]
for case in CASES:  # its own check and those that it must not be mistaken for
    case.settings.setdefault(
        "select",
        [case.check, "example-leak", "clipping-dominates", "dead-unit", "update-too-small"],
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fault_is_found(case, tmp_path):
    assert_found(case, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fixed_twin_is_silent(case, tmp_path):
    assert_silent(case, tmp_path)


# ---------------------------------------------------------------- checkpoints


class SavesTheBody(Trainer):
    def _save(self, output_dir=None, state_dict=None):
        self.model.bert.save_pretrained(output_dir)


class SavesAll(Trainer):
    def _save(self, output_dir=None, state_dict=None):
        self.model.save_pretrained(output_dir)


SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 6, "max_steps": 12}


def found(recipe: hf_recipe.trainer.recipe.Recipe, check: str) -> list[str]:
    assert recipe.report.crashed == {}
    recipe.detach()
    return [f.message for f in everything(recipe.report) if f.check == check]


@pytest.mark.parametrize("cls", [SavesTheBody, SavesAll])
def test_a_way_of_saving_of_ones_own_is_read_back(cls, tmp_path):
    trainer = train(tmp_path, bert(), words(), cls, **SAVED)
    recipe = hf_recipe.attach(trainer, select=["save-fails"])
    trainer.train()
    told = found(recipe, "save-fails")
    assert bool(told) == (cls is SavesTheBody)
    assert all("classifier.weight" in message for message in told)


@pytest.mark.parametrize("kept", [[], ["classifier"]])
def test_a_head_beside_the_adapters_is_missed_before_step_1(kept, tmp_path):
    model = get_peft_model(bert(), LoraConfig(r=2, target_modules=["query"], modules_to_save=kept))
    for name, parameter in model.named_parameters():
        if "classifier" in name and "original_module" not in name:
            parameter.requires_grad_(True)
    trainer = train(tmp_path, model, words(), label_names=["labels"], **SAVED)
    recipe = hf_recipe.attach(trainer, select=["save-fails"])
    recipe.preflight()
    assert bool(found(recipe, "save-fails")) == (not kept)


class NoOptimizer(Trainer):
    def _load_optimizer_and_scheduler(self, checkpoint):
        return


class NoWeights(Trainer):
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        return


@pytest.mark.parametrize(
    ("cls", "rows", "word"),
    [
        (Trainer, 8, ""),
        (NoOptimizer, 8, "optimizer (it holds no state), scheduler (its count is 0)"),
        (NoWeights, 8, "weights ("),
        (Trainer, 16, "a step takes 16 rows after resuming at step 6, and took 8"),
    ],
)
def test_half_a_resume(cls, rows, word, tmp_path):
    train(tmp_path, bert(), words(), **SAVED).train()
    again = train(tmp_path, bert(seed=1), words(), cls, per_device_train_batch_size=rows, **SAVED)
    recipe = hf_recipe.attach(again, select=["resume-incomplete"])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    told = found(recipe, "resume-incomplete")
    assert len(told) == bool(word)
    assert all(word in message for message in told)
