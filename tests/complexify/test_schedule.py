"""Schedules: literal ones, a hundred generated ones, and the real schedulers simulated."""

import pytest
import torch
from torch.optim import lr_scheduler as torch_schedules
from transformers import optimization as hf

from hf_recipe.complexify.schedule import (
    SchedulePace,
    decays_early,
    fold_pace,
    judge_schedule,
    never_stepped,
    stepped_too_often,
    summarise,
)
from hf_recipe.core.check import Skip
from hf_recipe.instruments.rates import decay_done, simulate
from hf_recipe.instruments.window import Step, Window
from tests.complexify.schedules import EARLY, NEVER, WARMUP, names, optimizer, plan, score


@pytest.mark.parametrize("seed", [0, 1])
def test_f1_on_a_hundred_generated_schedules(seed):
    f1, missed, wrong = score(seed)
    assert f1 >= 0.97, (missed, wrong)


def test_warm_up_of_500_steps_in_60():
    run, later = plan(lambda o: hf.get_linear_schedule_with_warmup(o, 500, 60), 60)
    found = judge_schedule(run, 20, continuation=later)
    assert [f.check for f in found] == [WARMUP]
    assert "11.8%" in found[0].message
    assert [f.check for f in judge_schedule(run, 20)] == [WARMUP]  # seen without what follows


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_linear_that_ends_early(share):
    build = lambda o: hf.get_linear_schedule_with_warmup(o, 10, int(1000 * share))  # noqa: E731
    run, _ = plan(build, 1000)
    (finding,) = judge_schedule(run, 100)
    assert finding.check == EARLY
    assert f"spent at {share:.0%} of the run" in finding.message
    assert f"epoch {share * 10:g}" in finding.message


def test_only_the_continuation_tells_a_late_milestone_from_a_constant_rate():
    rates = [1e-3] * 400
    assert judge_schedule(rates, 100) == []
    assert judge_schedule(rates, 100, continuation=rates * 3) == []
    found = judge_schedule(rates, 100, continuation=[1e-3] * 600 + [1e-4] * 100)
    assert [f.check for f in found] == [NEVER]
    assert "step 1,000 (epoch 10)" in found[0].message
    assert found[0].evidence["next_fall"] == 1000


def test_cosine_past_its_horizon_is_told_from_restarts_and_cycles():
    build = lambda o: torch_schedules.CosineAnnealingLR(o, 300)  # noqa: E731
    assert names(build, 1000) == {EARLY}
    jumps = lambda o: torch_schedules.CosineAnnealingWarmRestarts(o, 300)  # noqa: E731
    assert names(jumps, 1000) == set()
    cycle = lambda o: torch_schedules.CyclicLR(o, 0, 1e-3, 100, cycle_momentum=False)  # noqa: E731
    assert names(cycle, 1000) == set()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("share", [0.0, 0.1])
@pytest.mark.parametrize("family", ["linear", "cosine", "constant", "polynomial"])
def test_very_short_runs_are_silent(steps, share, family):
    warm = -(-steps * share // 1)
    build = lambda o: hf.get_scheduler(  # noqa: E731
        family, o, num_warmup_steps=int(warm), num_training_steps=steps
    )
    assert names(build, steps) == set()
    assert names(build, steps, see=False) == set()


@pytest.mark.parametrize("warmup", [0.1, 0.2, 0.3, 0.5])
def test_healthy_warm_up(warmup):
    for family in ("linear", "cosine", "constant_with_warmup", "inverse_sqrt"):
        build = lambda o, family=family: hf.get_scheduler(  # noqa: E731
            family, o, num_warmup_steps=int(warmup * 300), num_training_steps=300
        )
        assert names(build, 300) == set(), family


def test_a_rate_of_zero_is_no_matter_of_the_schedule():
    assert judge_schedule([0.0] * 50, 10, continuation=[0.0] * 50) == []
    assert judge_schedule([0.0], 10) == []


@pytest.mark.parametrize("steps", [50, 90, 313])
def test_a_cosine_of_several_waves_is_seen_whatever_its_rounding(steps):
    waves = lambda o: torch_schedules.CosineAnnealingLR(o, round(steps / 4))  # noqa: E731
    assert names(waves, steps) == names(waves, steps, see=False) == {EARLY}


@pytest.mark.parametrize("timescale", [50, 1000, 10_000])
@pytest.mark.parametrize("warm", [0, 20, 160])
def test_an_inverse_root_has_no_horizon_however_slow(timescale, warm):
    slow = lambda o: hf.get_inverse_sqrt_schedule(o, warm, timescale=timescale)  # noqa: E731
    for steps in (12, 30, 640):
        assert names(slow, steps, see=False) <= {WARMUP}
        assert names(slow, steps) <= {WARMUP}


def test_a_plateau_that_drops_at_the_last_step_is_no_unfinished_decay():
    for factor in (0.8, 0.95):
        assert judge_schedule([1.0] * 40 + [factor] * 19 + [factor**2], 10) == []


def test_a_decay_ninety_times_too_long_is_seen_soon_after_the_end():
    run, later = plan(lambda o: torch_schedules.CosineAnnealingLR(o, 90 * 100), 100, beyond=1)
    assert {f.check for f in judge_schedule(run, 10, continuation=later)} == {NEVER}


def test_an_unknown_number_of_steps_per_epoch_goes_unsaid():
    (finding,) = judge_schedule([1 - i / 920 for i in range(920)] + [0.0] * 80, 0)
    assert "epoch" not in finding.message
    assert "step 1,000" in finding.message


def test_bad_rates_are_refused():
    with pytest.raises(ValueError, match="empty"):
        judge_schedule([], 10)
    with pytest.raises(ValueError, match="finite"):
        judge_schedule([1e-3, float("nan")], 10)


def test_thresholds_are_arguments():
    rates = [1 - i / 920 for i in range(920)] + [0.0] * 80
    schedule = summarise(rates, 100)
    assert list(decays_early(schedule))
    assert not list(decays_early(schedule, idle=0.1))


# -------------------------------------------------------------------- simulation


def real(build, steps):
    """The rates as a training loop would see them."""
    opt = optimizer()
    scheduler, rates = build(opt), []
    for _ in range(steps):
        rates.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    return rates


SCHEDULERS = {
    "lambda": lambda o: hf.get_linear_schedule_with_warmup(o, 5, 40),
    "wsd": lambda o: hf.get_wsd_schedule(o, 4, 10, num_training_steps=40),
    "cosine": lambda o: torch_schedules.CosineAnnealingLR(o, 40),
    "milestones": lambda o: torch_schedules.MultiStepLR(o, [10, 20, 20]),
    "multiplicative": lambda o: torch_schedules.MultiplicativeLR(o, lambda e: 0.9),
    "one cycle": lambda o: torch_schedules.OneCycleLR(o, 1e-3, total_steps=60),
    "cyclic": lambda o: torch_schedules.CyclicLR(o, 1e-4, 1e-3, 7),
    "sequential": lambda o: torch_schedules.SequentialLR(
        o,
        [
            torch_schedules.LinearLR(o, 0.1, 1.0, 10),
            torch_schedules.CosineAnnealingLR(o, 30),
        ],
        [10],
    ),
    "chained": lambda o: torch_schedules.ChainedScheduler(
        [torch_schedules.ConstantLR(o, 0.1, 5), torch_schedules.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_simulation_gives_the_real_rates_and_touches_nothing(name):
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1e-3, momentum=0.9)
    scheduler = SCHEDULERS[name](opt)
    groups = [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
    before = repr((scheduler.state_dict(), groups))
    simulated = simulate(scheduler, 50)
    groups = [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
    assert repr((scheduler.state_dict(), groups)) == before
    rates = []
    for _ in range(50):
        rates.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    assert simulated == pytest.approx(rates, rel=1e-12, abs=1e-18)


def test_simulation_never_copies_the_model():
    opt = optimizer()
    scheduler = SCHEDULERS["sequential"](opt)
    pointer = opt.param_groups[0]["params"][0]
    pointer.__class__.__deepcopy__, kept = None, pointer.__class__.__deepcopy__
    try:
        simulate(scheduler, 20)
    finally:
        pointer.__class__.__deepcopy__ = kept


def test_one_cycle_ends_at_its_end():
    assert len(simulate(SCHEDULERS["one cycle"](optimizer()), 1000)) == 60


def test_a_step_replaced_on_the_scheduler_is_not_called():
    opt = optimizer()
    scheduler = SCHEDULERS["lambda"](opt)
    scheduler.step = lambda: pytest.fail("the real scheduler was stepped")
    assert len(simulate(scheduler, 10)) == 10


def test_accelerate_steps_once_per_process(monkeypatch):
    from accelerate import Accelerator
    from accelerate.state import PartialState

    accelerator = Accelerator(cpu=True)
    opt = optimizer()
    scheduler = accelerator.prepare_scheduler(SCHEDULERS["lambda"](opt))
    once = simulate(scheduler, 40)
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 4)
    assert simulate(scheduler, 10) == once[::4]
    scheduler.split_batches = True
    assert simulate(scheduler, 40) == once


@pytest.mark.parametrize(
    "build", [torch_schedules.ReduceLROnPlateau, hf.get_greedy_schedule], ids=["plateau", "greedy"]
)
def test_rates_set_by_evaluation_are_skipped(build):
    with pytest.raises(Skip, match="evaluation"):
        simulate(build(optimizer()), 10)


def test_decay_done():
    assert decay_done([0, 1, 1, 0.5, 0]) == [0, 0, 0, 0.5, 1]
    assert decay_done([0, 1, 1, 1]) is None


# -------------------------------------------------------------------- while training


def paces(rates, pace, steps):
    """Fold a run of `steps` updates whose scheduler steps `pace` times per update."""
    plan = summarise(rates, 100)
    state, last = {}, None
    for start in range(0, steps, 10):
        window = Window(
            steps=tuple(
                Step(n + 1, 1.0, rates[min(n * pace, len(rates) - 1)])
                for n in range(start, min(start + 10, steps))
            )
        )
        state, measured = fold_pace(state, window, {"ScheduleSummary": plan})
        last = measured or last
    return last


@pytest.mark.parametrize("length", [60, 1000])
@pytest.mark.parametrize("family", ["linear", "cosine", "warmup_stable_decay"])
@pytest.mark.parametrize("pace", [0, 1, 2, 4, 8])
def test_pace_is_seen_while_training(family, pace, length):
    extra = {"num_decay_steps": length // 5} if family == "warmup_stable_decay" else None
    build = lambda o: hf.get_scheduler(  # noqa: E731
        family,
        o,
        num_warmup_steps=length // 10,
        num_training_steps=length,
        scheduler_specific_kwargs=extra,
    )
    rates, _ = plan(build, length)
    measured = paces(rates, pace, length)
    assert measured.pace == pace
    assert bool(list(stepped_too_often(measured))) == (pace > 1)
    assert bool(list(never_stepped(measured))) == (pace == 0)


def test_rates_that_follow_another_rule_are_no_fault():
    plan = summarise([1 - i / 200 for i in range(200)], 50)
    window = Window(steps=tuple(Step(n + 1, 1.0, 0.3 + 0.1 * (n % 3)) for n in range(200)))
    _, measured = fold_pace({}, window, {"ScheduleSummary": plan})
    assert measured.pace is None
    assert not list(stepped_too_often(measured))
    assert not list(never_stepped(SchedulePace(10, 1, 9, 0.1)))
