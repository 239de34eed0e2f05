"""A hundred generated schedules: healthy ones of every family, and each of the three faults."""

import random

import torch
from torch.optim import lr_scheduler as torch_schedules
from transformers import optimization as hf

from hf_recipe.complexify.schedule import judge_schedule
from hf_recipe.instruments.rates import simulate

NEVER, EARLY, WARMUP = "schedule-never-decays", "schedule-decays-early", "warmup-too-long"


def optimizer(rate=1e-3, groups=1):
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(groups)]
    return torch.optim.AdamW([{"params": [p]} for p in parameters], lr=rate)


def plan(build, steps, beyond=8, stride=1):
    """Rates of the run and past it; `stride`: scheduler steps per optimizer step."""
    rates = simulate(build(optimizer()), (steps + beyond * steps + 100) * stride)[::stride]
    return rates[:steps], rates[steps:]


def names(build, steps, *, stride=1, see=True):
    run, later = plan(build, steps, stride=stride)
    return {f.check for f in judge_schedule(run, 50, continuation=later if see else None)}


def generated(rng):
    """A schedule of a random family: (name, build, steps, stride, the fault it has)."""
    steps = rng.choice([20, 37, 60, 200, 500, 1500])
    warm = round(steps * rng.choice([0, 0, 0.05, 0.1, 0.2, 0.3]))

    def wsd(total, decay_share, floor=0.0, kind="linear"):
        decay = max(2, round(total * decay_share))
        return lambda o: hf.get_wsd_schedule(
            o, warm, decay, num_training_steps=total, decay_type=kind, min_lr_ratio=floor
        )

    def milestones(*shares, gamma=0.1):
        at = [round(steps * share) for share in shares]
        return lambda o: torch_schedules.MultiStepLR(o, at, gamma)

    def cosine(total):
        return lambda o: hf.get_cosine_schedule_with_warmup(o, warm, total)

    def linear(total, warmup=warm):
        return lambda o: hf.get_linear_schedule_with_warmup(o, warmup, total)

    kind = rng.choice(["linear", "cosine", "1-sqrt"])
    cut = rng.choice([0.25, 0.5, 0.75, 0.9])
    long = rng.choice([3, 4, 8])
    late = rng.choice([2, 5, 8.3])
    per_process = rng.choice([2, 4])
    healthy = [
        ("linear", linear(steps), 1),
        ("cosine", cosine(steps), 1),
        (
            "restarts",
            lambda o: hf.get_cosine_with_hard_restarts_schedule_with_warmup(
                o, warm, steps, rng.choice([2, 3, 5])
            ),
            1,
        ),
        (
            "warm restarts",
            lambda o: torch_schedules.CosineAnnealingWarmRestarts(
                o, max(2, steps // rng.choice([1, 3, 7])), rng.choice([1, 2])
            ),
            1,
        ),
        ("wsd", wsd(steps, rng.choice([0.1, 0.2, 0.4]), kind=kind), 1),
        ("wsd floor", wsd(steps, 0.2, 0.1), 1),
        ("milestones", milestones(*rng.choice([(0.5,), (0.5, 0.75), (0.33, 0.67, 0.9)])), 1),
        ("milestones /5", milestones(0.3, 0.6, 0.8, gamma=0.2), 1),
        ("one milestone in, one beyond", milestones(0.5, 5, gamma=rng.choice([0.1, 0.5])), 1),
        (
            "polynomial",
            lambda o: hf.get_polynomial_decay_schedule_with_warmup(
                o, warm, steps, power=rng.choice([1, 2, 3])
            ),
            1,
        ),
        ("inverse root", lambda o: hf.get_inverse_sqrt_schedule(o, max(1, warm)), 1),
        ("inverse root, slow", lambda o: hf.get_inverse_sqrt_schedule(o, 0), 1),
        ("constant", hf.get_constant_schedule, 1),
        ("warm constant", lambda o: hf.get_constant_schedule_with_warmup(o, warm), 1),
        ("constant per process", hf.get_constant_schedule, per_process),
        (
            "cyclic",
            lambda o: torch_schedules.CyclicLR(
                o, 1e-4, 1e-3, max(2, steps // rng.choice([4, 7, 10])), cycle_momentum=False
            ),
            1,
        ),
        (
            "floor",
            lambda o: hf.get_cosine_with_min_lr_schedule_with_warmup(
                o, warm, steps, min_lr_rate=rng.choice([0.1, 0.6])
            ),
            1,
        ),
        ("exponential", lambda o: torch_schedules.ExponentialLR(o, 0.01 ** (1 / steps)), 1),
    ]
    early = [
        ("linear, cut", linear(max(warm + 2, round(steps * cut))), 1),
        ("cosine, cut", cosine(max(warm + 2, round(steps * min(cut, 0.75)))), 1),
        ("linear per process", linear(steps), per_process),
        ("cosine per process", cosine(steps), per_process),
        ("wsd per process", wsd(steps, 0.2), per_process),
        ("milestones per process", milestones(0.5, 0.75), 4),
    ]
    never = [
        ("linear, long", linear(steps * long), 1),
        ("cosine, long", cosine(steps * long), 1),
        ("wsd, long", wsd(steps * long, 0.2), 1),
        ("milestones, beyond", milestones(late, late + 0.7), 1),
        ("step, beyond", lambda o: torch_schedules.StepLR(o, round(steps * late)), 1),
    ]
    slow = [
        ("warm-up, 8 x", linear(steps, warmup=steps * 8), 1),
        ("warm-up, 80 %", linear(steps, warmup=round(steps * 0.8)), 1),
        (
            "constant, 3 x",
            lambda o: hf.get_constant_schedule_with_warmup(o, steps * 3),
            1,
        ),
    ]
    fault = rng.choice([None, None, EARLY, NEVER, WARMUP])
    family = {None: healthy, EARLY: early, NEVER: never, WARMUP: slow}[fault]
    return (*rng.choice(family), steps, fault)


def plateaus(rng):
    """Rates that an evaluation has set, as a run leaves them: no continuation can be known."""
    steps, evaluations = rng.choice([200, 1000]), rng.choice([10, 20])
    opt = optimizer()
    scheduler = torch_schedules.ReduceLROnPlateau(
        opt, factor=rng.choice([0.1, 0.5]), patience=rng.choice([0, 1, 2])
    )
    rates, loss = [], 2.0
    for step in range(steps):
        rates.append(opt.param_groups[0]["lr"])
        if (step + 1) % (steps // evaluations) == 0:
            loss = max(loss * rng.uniform(0.85, 1.02), 0.5 + 0.02 * rng.random())
            scheduler.step(loss)
    return rates


def score(seed, count=100):
    """(F1 over the three faults, what was missed, what was told wrongly); one in ten a plateau."""
    rng = random.Random(seed)
    right, missed, wrong = 0, [], []
    for number in range(count):
        if number % 10 == 9:
            rates = plateaus(rng)
            name, steps, fault = "plateau", len(rates), None
            found = {f.check for f in judge_schedule(rates, 50)}
        else:
            name, build, stride, steps, fault = generated(rng)
            found = names(build, steps, stride=stride)
        right += fault in found
        if fault is not None and fault not in found:
            missed.append((name, steps, fault))
        wrong += [(name, steps, other) for other in found - {fault}]
    return 2 * right / max(2 * right + len(missed) + len(wrong), 1), missed, wrong
