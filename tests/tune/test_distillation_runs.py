"""What takes longer: two processes against one, and a small student on the digits."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from sklearn.datasets import load_digits

from hf_recipe.tune.distillation import DistillationTrainer
from tests.processes import torchrun
from tests.tune.heads_zoo import Rows
from tests.tune.test_distillation import arguments

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path):
    script = Path(__file__).with_name("two_processes.py")
    for processes in (1, 2):
        torchrun(script, tmp_path, processes, processes=processes)
    for head in ("sequence", "token", "llama", "gpt2"):
        one, two = (torch.load(tmp_path / f"{head}-{n}.pt") for n in (1, 2))
        assert (one - two).abs().max() < 1e-5, head
    for head in ("token", "llama", "gpt2"):  # the teacher's weights are split over two processes
        sharded = torch.load(tmp_path / f"{head}-2-sharded.pt")
        assert (sharded - torch.load(tmp_path / f"{head}-1.pt")).abs().max() < 1e-5, head


class Perceptron(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, 10)
        )

    def forward(self, pixels, labels=None):
        logits = self.layers(pixels)
        found = {"logits": logits}
        return found if labels is None else {"loss": F.cross_entropy(logits, labels), **found}


@pytest.mark.slow
def test_a_student_of_an_eighth_keeps_the_teacher_with_a_tenth_of_the_labels(tmp_path):
    data, kept, gained = load_digits(), [], []
    for seed in range(2):
        order = np.random.default_rng(seed).permutation(len(data.target))
        pixels, labels = (data.data[order] / 16).astype(np.float32), data.target[order]
        rows = [{"pixels": x, "labels": int(y)} for x, y in zip(pixels, labels, strict=True)]
        train, test = rows[:1437], Rows(rows[1437:])
        few = [row if i < 144 else row | {"labels": -100} for i, row in enumerate(train)]

        def fit(model, rows, epochs, test=test, truth=labels[1437:], **teacher):
            args = arguments(
                tmp_path,
                max_steps=-1,
                num_train_epochs=epochs,
                learning_rate=5e-3,
                optim="adamw_torch",
                lr_scheduler_type="linear",
                per_device_train_batch_size=32,
                alpha=0.9,
                distill_temperature=4.0,
            )
            kind = DistillationTrainer if teacher else tf.Trainer
            trainer = kind(model, args, train_dataset=Rows(rows), **teacher)
            trainer.train()
            return (trainer.predict(test).predictions.argmax(-1) == truth).mean()

        tf.set_seed(seed)
        teacher, student = Perceptron(256), Perceptron(32)
        alone = copy.deepcopy(student)
        best = fit(teacher, train, 15)
        taught, untaught = fit(student, few, 25, teacher=teacher), fit(alone, few[:144], 250)
        kept.append(taught / best)
        gained.append(taught - untaught)
    assert np.mean(kept) >= 0.97
    assert np.mean(gained) >= 0.02
