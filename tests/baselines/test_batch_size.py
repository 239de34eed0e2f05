"""The largest batch: exact under a known limit, the knee beside brute force, nothing left."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import Trainer

import hf_recipe
from hf_recipe.baselines.batch_search import find_batch_size
from hf_recipe.baselines.batch_size import BATCH_SIZE_SMALL as CHECK
from hf_recipe.baselines.batch_size import BatchSize
from hf_recipe.instruments import fitting
from hf_recipe.instruments.fitting import (
    knee,
    largest_fitting,
    noise_scale,
    rate_at,
    split_batch,
)
from hf_recipe.instruments.memory import TensorBytes, free_bytes
from hf_recipe.instruments.quiet import quiet
from hf_recipe.instruments.row_lengths import longest_rows
from hf_recipe.trainer.preflight import subject_of_trainer
from tests.models import BatchNormMLP, NormConfig, arguments, batchnorm, bert, points, words

# ---------------------------------------------------------------- the search


class Allocator:
    """Refuses more than `room` rows, as an accelerator does."""

    def __init__(self, room: int, error: BaseException | None = None) -> None:
        self.room, self.tried = room, []
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    def __call__(self, rows: int) -> None:
        self.tried.append(rows)
        if rows > self.room:
            raise self.error


@pytest.mark.parametrize("limit", [1, 7, 128, 1000])
@pytest.mark.parametrize("room", [0, 1, 2, 37, 127, 128, 129, 5000])
def test_a_known_limit_is_found_exactly(room, limit, monkeypatch):
    monkeypatch.setattr(fitting, "clear_device_cache", lambda **given: None)  # slow, and apart
    allocator = Allocator(room)
    assert largest_fitting(allocator, limit=limit, start=2) == min(room, limit)
    assert len(set(allocator.tried)) == len(allocator.tried) <= 2 * math.log2(limit + 1) + 3


def test_python_s_own_error_counts_and_others_are_raised():
    assert largest_fitting(Allocator(9, MemoryError()), limit=100) == 9
    with pytest.raises(ValueError, match="shape"):
        largest_fitting(Allocator(9, ValueError("shape")), limit=100)


def test_the_knee_lies_within_one_power_of_two_of_brute_force():
    draw = torch.Generator().manual_seed(0)
    sizes = [2**i for i in range(9)]
    for fixed in (0.0, 3.0, 20.0, 100.0):
        exact = {n: n / (fixed + n) for n in sizes}
        noisy = {
            n: v * (1 + 0.02 * float(torch.randn((), generator=draw))) for n, v in exact.items()
        }
        best = max(exact.values())
        brute = next(n for n in range(1, 257) if n / (fixed + n) >= 0.95 * best)
        assert 0.5 <= knee(noisy) / brute <= 2
    with pytest.raises(ValueError, match="at least one"):
        knee({})


def test_between_measured_sizes_speed_is_read_off():
    assert rate_at({1: 10.0, 4: 40.0}, 2) == pytest.approx(20.0)
    assert rate_at({1: 10.0, 4: 40.0}, 9) == 40.0


@pytest.mark.parametrize(
    ("effective", "largest", "wanted", "expected"),
    [(32, 100, 8, 8), (32, 12, 32, 8), (32, 1, 8, 1), (30, 8, 7, 6), (8, 100, 64, 8)],
)
def test_the_batch_of_a_step_is_kept_by_accumulation(effective, largest, wanted, expected):
    rows = split_batch(effective, largest=largest, wanted=wanted)
    assert (rows, effective % rows) == (expected, 0)


def test_the_noise_scale_of_known_gradients():
    """Gradients drawn with |G|^2 = 1 and tr(Sigma) = 50: the scale is 50 rows."""
    draw = torch.Generator().manual_seed(0)
    mean = torch.zeros(20)
    mean[0] = 1.0
    each = mean + math.sqrt(50 / 20) * torch.randn(40, 8, 8, 20, generator=draw)
    micro = each.mean(2)
    few = micro.square().sum(-1).mean(1).tolist()
    many = micro.mean(1).square().sum(-1).tolist()
    scale, low, high = noise_scale(few, many, small=8, large=64)
    assert low < 50 < high
    assert scale == pytest.approx(50, rel=0.3)
    assert math.isnan(noise_scale([1.0, 1.0], [0.0, 0.0], small=8, large=64)[0])


def test_tensors_are_counted_while_they_live():
    there = torch.zeros(100, 100)
    with TensorBytes() as counted:
        kept = torch.zeros(1000)
        for _ in range(3):
            torch.zeros(500)
        there.t().detach()[0] += 1.0  # what stood there before is not made, however it is seen
    assert counted.peak == 6000
    assert counted.now == 4000
    del kept
    assert counted.now == 0
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50


# ---------------------------------------------------------------- judging

HEALTHY: dict[str, Any] = {
    "largest": 64,
    "bounded": False,
    "longest": 128,
    "memory_bytes": 10**9,
    "used_bytes": 9 * 10**8,
    "speeds": {"1": 10.0, "2": 20.0, "4": 38.0, "8": 70.0, "16": 98.0, "32": 100.0, "64": 100.0},
    "knee": 16,
    "current": 16,
    "accumulation": 1,
}


def told(**changes: Any) -> list[Any]:
    return list(CHECK.judge(BatchSize(**{**HEALTHY, **changes})))


@pytest.mark.parametrize(
    "changes",
    [{}, {"current": 32}, {"current": 64}, {"current": 300, "largest": 256, "bounded": True},
     {"current": 8, "speeds": {"8": 99.0, "16": 100.0}}],
)  # fmt: skip
def test_a_batch_as_fast_as_it_gets_is_silent(changes):
    assert told(**changes) == []


def test_a_faster_split_of_the_same_step_is_named():
    (fault,) = told(current=4, accumulation=8)
    assert fault.fix == (
        "TrainingArguments(per_device_train_batch_size=16, gradient_accumulation_steps=2)"
    )
    assert "2.6 times" in fault.message


def test_a_faster_step_is_another_training():
    (fault,) = told(current=4)
    assert "another training" in fault.message


def test_a_batch_that_does_not_fit_is_named():
    (fault,) = told(current=128)
    assert fault.severity == "note"
    assert "per_device_train_batch_size=16, gradient_accumulation_steps=8" in fault.fix
    assert told(current=128, accelerator=True)[0].severity == "warning"
    assert "not even one" in told(largest=0, current=8)[0].message


# ---------------------------------------------------------------- a real Trainer


def ragged(rows: int = 64) -> datasets.Dataset:
    data = words(rows).to_dict()
    for i in range(rows):
        length = 4 + i % 9
        for name in ("input_ids", "attention_mask"):
            data[name][i] = data[name][i][:length]
    return datasets.Dataset.from_dict(data)


def test_the_longest_rows_come_first(tmp_path: Path) -> None:
    data = ragged().select(range(10, 60))
    trainer = Trainer(model=bert(), args=arguments(tmp_path), train_dataset=data)
    rows = subject_of_trainer(trainer, fresh=True).rows("train")
    lengths = [len(ids) for ids in data["input_ids"]]
    chosen, longest = longest_rows(rows, 5)
    assert longest == max(lengths) == 12
    assert {lengths[i] for i in chosen} == {12}
    pixels = [{"pixel_values": torch.zeros(1, 4, 4), "labels": 0}] * 3
    trainer = Trainer(model=bert(), args=arguments(tmp_path), train_dataset=pixels)
    assert longest_rows(subject_of_trainer(trainer, fresh=True).rows("train"), 2) == ([0, 1], 16)


def state(trainer: Trainer) -> list[bytes]:
    tensors = [*trainer.model.state_dict().values(), torch.get_rng_state()]
    if trainer.optimizer is not None:
        kept = trainer.optimizer.state_dict()["state"].values()
        tensors += [v for s in kept for v in s.values() if isinstance(v, torch.Tensor)]
    return [t.detach().numpy().tobytes() for t in tensors]


@pytest.mark.parametrize("trained", [False, True])
def test_a_budget_bounds_it_and_nothing_is_left(trained, tmp_path: Path) -> None:
    trainer = Trainer(
        model=batchnorm() if trained else bert(),
        args=arguments(tmp_path, max_steps=3, optim="adamw_torch", gradient_accumulation_steps=2),
        train_dataset=points() if trained else words(),
    )
    recipe = hf_recipe.attach(trainer, select=["batch-size-small"])
    if trained:
        trainer.train()
    before, rates = (
        state(trainer),
        [g["lr"] for g in trainer.optimizer.param_groups] if trained else [],
    )
    free = recipe.find_batch_size(seconds=0.5, noise=False)
    assert (free.largest, free.bounded) == (256, True)
    budget = free.used_bytes // 2
    found = recipe.find_batch_size(memory=budget, seconds=0.5, noise=trained)
    assert 16 <= found.largest < 256
    assert not found.bounded
    assert found.used_bytes <= budget
    assert found.advised[0] * found.advised[1] == 16
    assert state(trainer) == before
    assert not trained or rates == [g["lr"] for g in trainer.optimizer.param_groups]
    assert not trained or found.noise_scale > 0 or math.isnan(found.noise_scale)
    assert recipe.report.crashed == {}
    assert recipe.report.ran["batch-size-small"] == ["probe"]
    assert {f.severity for f in recipe.findings} <= {"note"}
    recipe.detach()


def test_the_counted_bytes_grow_with_the_rows_and_the_bound_is_exact(tmp_path: Path) -> None:
    trainer = Trainer(model=bert(), args=arguments(tmp_path), train_dataset=words())
    recipe = hf_recipe.attach(trainer)
    first = recipe.find_batch_size(memory=4 * 10**6, seconds=0.5, noise=False)
    again = recipe.find_batch_size(memory=first.used_bytes, seconds=0.5, noise=False)
    less = recipe.find_batch_size(memory=first.used_bytes - 1, seconds=0.5, noise=False)
    assert (again.largest, less.largest) == (first.largest, first.largest - 1)
    batch = recipe.overfit_one_batch(rows="largest", max_steps=2)
    assert batch.rows == first.largest - 1
    with pytest.raises(ValueError, match="got 0"):
        recipe.find_batch_size(memory=0)
    recipe.detach()


class Bounded(BatchNormMLP):
    """Refuses more than `room` rows, as an accelerator does; a pass takes known seconds."""

    room, fixed, now = 37, 0.0, 0.0

    def forward(self, features=None, labels=None):
        if len(features) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        Bounded.now += self.fixed + 0.01 * len(features)
        return super().forward(features, labels)


def bounded(tmp_path: Path, **changes: Any) -> Trainer:
    torch.manual_seed(0)
    model = Bounded(NormConfig(num_labels=4))
    for name, value in changes.items():
        setattr(model, name, value)
    args = arguments(tmp_path, gradient_accumulation_steps=4)
    return Trainer(model=model, args=args, train_dataset=points(256))


@pytest.mark.parametrize("room", [2, 37, 129])
def test_an_allocator_with_a_known_limit_gives_exactly_that_limit(room, tmp_path: Path) -> None:
    trainer = bounded(tmp_path, room=room)
    before = state(trainer)
    recipe = hf_recipe.attach(trainer, select=["batch-size-small"])
    found = recipe.find_batch_size(memory=2**40, seconds=0.5, noise=False)
    assert (found.largest, found.bounded) == (room, False)
    rows, times = found.advised
    assert rows * times == 32  # what a step learns from is kept
    assert rows <= room
    assert state(trainer) == before
    recipe.detach()


@pytest.mark.parametrize("fixed", [0.0, 0.4])
def test_the_measured_knee_is_that_of_brute_force(fixed, tmp_path: Path) -> None:
    subject = subject_of_trainer(bounded(tmp_path, room=200, fixed=fixed), fresh=True)
    subject.trainer.create_optimizer()
    subject.optimizer = subject.trainer.optimizer
    with quiet(subject.model, trainer=subject.trainer):
        found, _ = find_batch_size(
            subject, memory=2**40, seconds=1e6, noise=False, clock=lambda: Bounded.now
        )
    rates = {n: n / (fixed + 0.01 * n) for n in range(1, found.largest + 1)}
    brute = next(n for n, rate in rates.items() if rate >= 0.95 * max(rates.values()))
    assert 0.5 <= found.knee / max(brute, 2) <= 2  # BatchNorm has no batch of one


def test_a_stream_is_skipped_with_the_reason(tmp_path: Path) -> None:
    data = words().to_iterable_dataset()
    trainer = Trainer(model=bert(), args=arguments(tmp_path), train_dataset=data)
    recipe = hf_recipe.attach(trainer)
    assert recipe.find_batch_size() is None
    assert "stream" in recipe.report.skipped["batch-size-small"]
    recipe.detach()
