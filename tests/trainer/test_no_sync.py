"""Watching never makes the host wait for the device: counted on a device that is not the CPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback

import hf_recipe
from hf_recipe.instruments.layers import looks_at
from hf_recipe.instruments.record import Recorder, flushes_at
from tests.models import arguments, bert, words

FIRST, LAST = 33, 64  # a flush at 48 and 64, a sampled step at 50


class Reads(TorchDispatchMode):
    """Counts, by optimizer step, what copies a number to the host."""

    def __init__(self):
        super().__init__()
        self.step, self.counts = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.counts[self.step] = self.counts.get(self.step, 0) + 1
        return func(*args, **(kwargs or {}))


class Counting(TrainerCallback):
    """Counts in the steps FIRST to LAST."""

    def __init__(self, reads):
        self.reads = reads

    def on_step_begin(self, args, state, control, **kwargs):
        self.reads.step = state.global_step + 1
        if self.reads.step == FIRST:
            self.reads.__enter__()
        elif self.reads.step == LAST + 1:
            self.reads.__exit__(None, None, None)


ELSEWHERE = torch.empty((), device="meta")  # lies on no CPU, and cannot be read


def add_elsewhere(self, loss):
    finite = ADD(self, ELSEWHERE)
    self.micro_batches[-1] = loss
    return finite


def take_norm_elsewhere(self, norm):
    TAKE_NORM(self, ELSEWHERE)
    self.norm = norm


ADD, TAKE_NORM = Recorder.add, Recorder.take_norm


def reads_of(folder, *, watched):
    """Reads by step of a run, with the recipe or without."""
    reads = Reads()
    trainer = Trainer(
        model=bert(num_hidden_layers=1),
        args=arguments(folder, max_steps=LAST + 2, optim="adamw_torch", logging_strategy="no"),
        train_dataset=words(),
        callbacks=[Counting(reads)],
    )
    recipe = hf_recipe.attach(trainer) if watched else None
    trainer.train()
    if recipe is not None:
        assert recipe.report.crashed == {}
        assert recipe.recorder.last_step == LAST + 2
        recipe.detach()
    return reads.counts


def test_no_step_waits_for_the_device_but_those_that_are_flushed_or_sampled(tmp_path, monkeypatch):
    bare, on_cpu = (reads_of(tmp_path / str(w), watched=w) for w in (False, True))
    monkeypatch.setattr(Recorder, "add", add_elsewhere)
    monkeypatch.setattr(Recorder, "take_norm", take_norm_elsewhere)
    watched = reads_of(tmp_path / "elsewhere", watched=True)
    usual = [s for s in range(FIRST, LAST + 1) if not flushes_at(s) and not looks_at(s)]
    assert len(usual) == 29
    assert {s: watched.get(s, 0) - bare.get(s, 0) for s in usual} == dict.fromkeys(usual, 0)
    # on a CPU loss and norm are read at their step: nobody waits for them there
    assert {s: on_cpu[s] - bare.get(s, 0) for s in usual} == dict.fromkeys(usual, 2)
