"""Law 1: weights, optimizer, random state and losses are bit-identical with and without us."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Sampler
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

import hf_recipe
from hf_recipe.instruments.quiet import quiet
from tests.models import (
    arguments,
    batchnorm,
    bert,
    llama,
    points,
    progressions,
    signature,
    words,
)
from tests.processes import torchrun

RUN = {
    "gradient_accumulation_steps": 2,
    "max_steps": 12,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "logging_steps": 3,
}


def _trainer(folder: Path, kind: str, **changes) -> Trainer:
    model, data = (bert(), words) if kind == "dropout" else (batchnorm(), points)
    return Trainer(
        model=model,
        args=arguments(folder, **{**RUN, **changes}),
        train_dataset=data(),
        eval_dataset=data(64, seed=2),
    )


@pytest.mark.parametrize("kind", ["dropout", "batchnorm"])
def test_a_watched_run_is_bit_identical(kind, tmp_path):
    bare = _trainer(tmp_path / "bare", kind)
    bare.train()

    watched = _trainer(tmp_path / "watched", kind)
    recipe = hf_recipe.attach(watched)
    recipe.preflight()
    watched.train()

    assert recipe.report.crashed == {}
    assert len(recipe.recorder.curves["loss"].y) == 12
    assert signature(watched) == signature(bare)


def checkpointed(folder: Path) -> Trainer:
    model = llama(attention_dropout=0.1)
    args = arguments(folder, **RUN, gradient_checkpointing=True)
    return Trainer(
        model=model,
        args=args,
        train_dataset=progressions(64),
        eval_dataset=progressions(32, seed=2),
    )


def adapted(folder: Path) -> Trainer:
    torch.manual_seed(0)
    model = get_peft_model(llama(), LoraConfig(r=4, lora_dropout=0.1, task_type="CAUSAL_LM"))
    data = progressions(64)
    return Trainer(
        model=model, args=arguments(folder, **RUN), train_dataset=data, eval_dataset=data
    )


def seq2seq(folder: Path) -> Trainer:
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                 decoder_start_token_id=0)
    )  # fmt: skip
    data = progressions(64)
    args = Seq2SeqTrainingArguments(
        **{**arguments(folder, **RUN).to_dict(), "predict_with_generate": True}
    )
    return Seq2SeqTrainer(model=model, args=args, train_dataset=data, eval_dataset=data)


def ask_everything(recipe: Any) -> None:
    """Every call that runs a model or trains one, before the run."""
    recipe.preflight()
    assert recipe.overfit_one_batch(max_steps=3) is not None
    assert recipe.find_batch_size(seconds=0.2, noise=True) is not None
    assert recipe.check_determinism(steps=1).equal
    recipe.check_checkpoint()
    recipe.compare_with_simple_models()
    with recipe.without_augmentation():
        pass


@pytest.mark.parametrize(
    "build",
    [
        lambda folder: _trainer(folder, "dropout"),
        lambda folder: _trainer(folder, "batchnorm"),
        checkpointed,
        adapted,
        seq2seq,
    ],
    ids=["dropout", "batchnorm", "checkpointing", "lora", "seq2seq"],
)
def test_every_call_leaves_the_run_bit_identical(build, tmp_path):
    """Accumulation in all; the comparison can tell: see the test of a draw below."""
    bare = build(tmp_path / "bare")
    bare.train()
    asked = build(tmp_path / "asked")
    recipe = hf_recipe.attach(asked)
    ask_everything(recipe)
    asked.train()
    assert recipe.report.crashed == {}
    assert signature(asked) == signature(bare)


def test_a_lone_callback_is_bit_identical_too(tmp_path):
    bare = _trainer(tmp_path / "bare", "batchnorm")
    bare.train()
    watched = _trainer(tmp_path / "watched", "batchnorm")
    callback = hf_recipe.RecipeCallback()
    watched.add_callback(callback)
    watched.train()
    assert callback.report.crashed == {}
    assert signature(watched) == signature(bare)


class Shuffles(Sampler):
    """Draws with a generator of its own, and shuffles its places where they lie."""

    def __init__(self, rows: int, *, in_place: bool) -> None:
        self.draw, self.places, self.in_place = np.random.default_rng(3), np.arange(rows), in_place

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self):
        if self.in_place:
            self.draw.shuffle(self.places)
        else:
            self.places = self.draw.permutation(self.places)
        return iter(self.places.tolist())


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("kept", [True, False])
def test_a_sampler_of_ones_own_draws_on_as_if_nobody_had_looked(in_place, kept, tmp_path):
    def left(watched: bool) -> Any:
        data, drawn = words(48), Shuffles(48, in_place=in_place)

        class Own(Trainer):
            def _get_train_sampler(self, dataset=None):
                return drawn if kept else Shuffles(48, in_place=in_place)

        folder = tmp_path / str(watched)
        trainer = Own(model=bert(), args=arguments(folder, max_steps=12), train_dataset=data)
        if watched:
            hf_recipe.attach(trainer).preflight()
        trainer.train()
        return signature(trainer)

    assert left(True) == left(False)


def test_a_bare_run_differs_when_the_data_order_is_drawn_from(tmp_path):
    """The comparison itself can tell: one draw from torch's generator is another run."""
    bare = _trainer(tmp_path / "bare", "dropout")
    bare.train()
    other = _trainer(tmp_path / "other", "dropout")
    other.add_callback(_Draws())
    other.train()
    assert signature(other) != signature(bare)


class _Draws(hf_recipe.RecipeCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        torch.rand(1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dropout", "batchnorm"])
def test_two_processes_are_bit_identical(kind, tmp_path):
    script = Path(__file__).with_name("two_processes.py")
    found = {}
    for watch in ("bare", "watched"):
        folder = tmp_path / watch
        torchrun(script, kind, watch, folder)
        found[watch] = [(folder / f"rank{rank}.txt").read_text() for rank in (0, 1)]
    assert found["bare"] == found["watched"]
    assert all(text.startswith("world 2 ") for text in found["bare"])


def test_the_guard_restores_everything_a_step_leaves(tmp_path):
    model = batchnorm()
    model.train()
    inputs = {"features": torch.randn(8, 8), "labels": torch.randint(0, 4, (8,))}
    model(**inputs).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    values = {n: g.clone() for n, g in gradients.items()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    states = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    with quiet(model):
        assert all(p.grad is None for p in model.parameters())
        model.eval()
        model.train()
        next(model.parameters()).requires_grad_(False)
        model(**inputs).loss.backward()
        torch.rand(3), np.random.rand(3), random.random()
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.grad is gradients[n] for n, p in model.named_parameters())
    assert all(torch.equal(p.grad, values[n]) for n, p in model.named_parameters())
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


def test_the_guard_restores_after_an_exception():
    model = batchnorm()
    model.eval()
    before = torch.get_rng_state()

    def probe():
        with quiet(model):
            model.train()
            torch.rand(1)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        probe()
    assert not model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_a_probe_compiles_nothing():
    """Its shapes would fill the compiler's cache, and the run would go on uncompiled."""
    model = torch.compile(torch.nn.Linear(3, 2), backend="eager")
    torch._dynamo.utils.counters.clear()
    with quiet(model):
        for rows in range(1, 5):
            model(torch.ones(rows, 3))
    assert not torch._dynamo.utils.counters["frames"]
    model(torch.ones(2, 3))
    assert torch._dynamo.utils.counters["frames"]["ok"] == 1
