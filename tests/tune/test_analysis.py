"""`analyse` on made studies of known truth, healthy twins, and bad input."""

import math

import numpy as np
import pytest

from hf_recipe.core.report import Report
from hf_recipe.tune.analysis import analyse
from hf_recipe.tune.space import quasi_random
from hf_recipe.tune.study import expected_best

RATE = {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-2}
SPACE = {"learning_rate": RATE, "dropout": {"min": 0.0, "max": 0.5}, "warmup": {"min": 1, "max": 9}}


def names(report):
    return {finding.check for finding in report.findings}


def place(rate):
    return (math.log10(rate) + 5) / 3


def valley(trial, best=(0.5, 0.5, 0.5), weights=(1.0, 0.5, 0.2)):
    at = (place(trial["learning_rate"]), trial["dropout"] / 0.5, (trial["warmup"] - 1) / 8)
    return sum(w * (a - b) ** 2 for w, a, b in zip(weights, at, best, strict=True))


def study(n=32, seed=0, best=(0.5, 0.5, 0.5), noise=0.002, **changes):
    draw = np.random.default_rng(seed)
    return [
        {
            "params": p,
            "value": valley(p, best) + noise * draw.standard_normal(),
            "state": "complete",
        }
        | changes
        for p in quasi_random(SPACE, n, seed)
    ]


def made(seed, at_edge):
    """A study of two to four parameters whose first one's optimum is inside or at an edge."""
    draw = np.random.default_rng(seed)
    count, n = int(draw.integers(2, 5)), int(draw.choice([24, 32, 64]))
    space = {"learning_rate": RATE} | {f"p{k}": {"min": 0.0, "max": 1.0} for k in range(1, count)}
    best = draw.uniform(0.25, 0.75, count)
    weights = draw.uniform(0.3, 1.2, count)
    weights[0] = draw.uniform(0.8, 1.2)
    if at_edge:
        best[0] = draw.choice([draw.uniform(-0.3, 0.02), 1 - draw.uniform(-0.3, 0.02)])
    trials = []
    for params in quasi_random(space, n, seed):
        at = np.array([place(params["learning_rate"]), *list(params.values())[1:]])
        value = float(weights @ (at - best) ** 2) + 0.005 * draw.standard_normal()
        trials.append({"params": params, "value": value, "state": "complete"})
    return trials, space


def edges(trials, space):
    report = analyse(trials, space, "loss", False)
    return {f.subject for f in report.findings if f.check == "optimum-at-edge"}


def test_edges_are_found_and_false_alarms_are_rare():
    hits = [("learning_rate" in edges(*made(seed, True))) for seed in range(100)]
    alarms = [bool(edges(*made(seed, False))) for seed in range(100)]
    assert np.mean(hits) >= 0.95
    assert np.mean(alarms) <= 0.05


def test_a_healthy_study_has_no_warning_in_either_direction():
    trials = study()
    turned = [t | {"value": -t["value"]} for t in trials]
    for given, greater in ((trials, False), (turned, True)):
        report = analyse(given, SPACE, "loss", greater)
        assert not report.at_least("warning")
        assert report.ran["optimum-at-edge"] == ["study"]
        assert "again on new seeds" in report.next_step
        assert "seeds" in report.skipped["within-seed-noise"]
    again = Report.from_dict(report.to_dict())
    assert again.to_dict() == report.to_dict()
    assert "<html" in report.to_html()
    answer = next(a for a in report.answers if a.question == "Which trial was best?")
    assert answer.answer.startswith("-0.0")


def test_importance_ranks_as_the_true_shares():
    report = analyse(study(48), SPACE, "loss", False)
    table = next(e for e in report.exhibits if e.title == "Which parameters matter")
    assert [row[0] for row in table.rows] == ["learning_rate", "dropout", "warmup"]


def test_a_dropout_of_zero_is_no_edge_that_can_be_widened():
    trials = study(best=(0.5, -0.2, 0.5))
    assert "optimum-at-edge" not in names(analyse(trials, SPACE, "loss", False))
    trials = study(best=(1.2, 0.5, 0.5))
    found = [f for f in analyse(trials, SPACE, "loss", False).findings if f.subject]
    assert [(f.check, f.subject) for f in found] == [("optimum-at-edge", "learning_rate")]
    assert found[0].evidence["edge"] == "upper"
    assert found[0].evidence["bound"] == pytest.approx(1e-2, rel=1e-3)


def test_an_edge_at_which_trials_diverge_is_no_edge_to_widen():
    """The usual study of a learning rate: better and better, then not a number."""
    trials = study(40, best=(1.0, 0.5, 0.5))
    assert "learning_rate" in edges(trials, SPACE)
    for trial in trials:
        if trial["params"]["learning_rate"] > 3e-3:
            trial.update(value=None, state="failed")
    assert names(analyse(trials, SPACE, "loss", False)) >= {"trials-infeasible"}
    assert "learning_rate" not in edges(trials, SPACE)


def test_diverged_trials_and_their_region():
    trials = study(40)
    for trial in trials:
        if trial["params"]["learning_rate"] > 2e-3:
            trial.update(value=float("nan"))
    report = analyse(trials, SPACE, "loss", False)
    found = next(f for f in report.findings if f.check == "trials-infeasible")
    assert found.subject == "learning_rate"
    assert found.evidence["bound"] == pytest.approx(2e-3, rel=0.3)
    trials = study(40)
    trials[3] = trials[3] | {"value": None, "state": "failed"}
    assert "trials-infeasible" not in names(analyse(trials, SPACE, "loss", False))


def replicated(gap, seeds=5, noise=0.01):
    draw = np.random.default_rng(1)
    common = noise * draw.standard_normal(seeds)
    trials = []
    for k, (rate, loss) in enumerate(((1e-3, 0.5), (2e-3, 0.5 + gap))):
        for seed in range(seeds):
            value = loss + common[seed] + 0.2 * noise * draw.standard_normal()
            params = {"learning_rate": rate, "dropout": 0.1, "warmup": 2 + k}
            trials.append({"params": params, "value": value, "state": "complete", "seed": seed})
    return trials


def test_a_lead_beyond_and_within_seed_noise():
    clear = analyse(replicated(0.01), SPACE, "loss", False)
    assert "within-seed-noise" in clear.ran
    assert "within-seed-noise" not in names(clear)
    assert "within-seed-noise" in names(analyse(replicated(0.0005), SPACE, "loss", False))
    unpaired = [{k: v for k, v in t.items() if k != "seed"} for t in replicated(0.05)]
    assert "within-seed-noise" not in names(analyse(unpaired, SPACE, "loss", False))


def test_no_lead_is_adopted_by_luck():
    adopted = 0
    for number in range(200):
        draw = np.random.default_rng(number)
        trials = [
            {"params": {"dropout": d}, "value": draw.normal(), "state": "complete", "seed": s}
            for d in (0.1, 0.2)
            for s in range(5)
        ]
        report = analyse(trials, {"dropout": {"values": [0.1, 0.2]}}, "loss", False)
        adopted += "within-seed-noise" not in names(report)
    assert adopted / 200 <= 0.10  # two-sided 95 %: the winner is chosen among the two


def curves(warm):
    trials, start = study(6), 2.0
    for i, trial in enumerate(trials):
        begin = start if warm else 2.0 + 0.01 * i
        end = begin - 0.5 if i == 0 else begin - (0.1 if warm else 0.5)
        trial["curve"] = list(np.linspace(begin, end, 9))
        start = end
    return trials


def test_a_model_that_is_reused_between_trials():
    assert "trial-warm-start" in names(analyse(curves(True), SPACE, "loss", False))
    report = analyse(curves(False), SPACE, "loss", False)
    assert "trial-warm-start" in report.ran
    assert "trial-warm-start" not in names(report)


def test_curves_that_end_too_early_or_too_late():
    late, early, plateau = study(6), study(6), study(6)
    for a, b, c in zip(late, early, plateau, strict=True):
        a["curve"] = list(np.linspace(2, 1, 20))
        b["curve"] = [1.5, 1.0, *np.linspace(1.1, 2, 28)]
        c["curve"] = [1 + 0.5**k for k in range(30)]
    for trials, subject in ((late, "last 25 %"), (early, "first 10 %")):
        found = [f for f in analyse(trials, SPACE, "loss", False).findings
                 if f.check == "steps-misjudged"]  # fmt: skip
        assert [f.subject for f in found] == [subject]
    assert "steps-misjudged" not in names(analyse(plateau, SPACE, "loss", False))


def test_a_grid_and_a_batch_size():
    values = {"a": [1.0, 2.0, 3.0], "b": [0.1, 0.2, 0.3], "batch_size": [8, 16, 32]}
    space = {k: {"values": v} for k, v in values.items()}
    trials = [
        {"params": {"a": a, "b": b, "batch_size": c}, "value": a + b + c, "state": "complete"}
        for a in values["a"] for b in values["b"] for c in values["batch_size"]
    ]  # fmt: skip
    report = analyse(trials, space, "loss", False)
    assert {"grid-search", "batch-size-tuned"} <= names(report)
    assert not names(analyse(study(27), SPACE, "loss", False)) & {"grid-search", "batch-size-tuned"}


def test_more_trials_are_worth_it_only_while_the_best_falls():
    draw = np.random.default_rng(0)
    params = quasi_random(SPACE, 64, 0)
    steep = [
        {"params": p, "value": float(v)} for p, v in zip(params, draw.normal(size=64), strict=True)
    ]
    flat = [t | {"value": max(t["value"], -0.5)} for t in steep]
    assert "search-too-sparse" in names(analyse(steep[:8], SPACE, "loss", False))
    assert "search-too-sparse" not in names(analyse(flat, SPACE, "loss", False))


def test_the_expected_best_is_unbiased():
    draw = np.random.default_rng(0)
    estimates = [expected_best(draw.normal(size=30), 10) for _ in range(2000)]
    truth = np.mean(draw.normal(size=(20_000, 10)).min(axis=1))
    assert np.mean(estimates) == pytest.approx(truth, abs=4 * np.std(estimates) / 2000**0.5 + 0.01)
    scores = np.array([3.0, 1.0, 2.0])
    assert expected_best(scores, 3) == 1.0
    assert expected_best(scores, 1) == pytest.approx(2.0)
    assert expected_best(scores, 2) == pytest.approx(4 / 3)


@pytest.mark.parametrize(
    "trials",
    [
        study(1),
        study(2),
        [t | {"value": None, "state": "failed"} for t in study(5)],
        [t | {"value": 0.5} for t in study(20)],
        [t | {"params": {"learning_rate": 1e-3}} for t in study(10)],
        [t | {"state": "running"} for t in study(3)],
        [t | {"curve": [None, float("nan"), 1.0]} for t in study(5)],
        [t | {"value": float("inf")} for t in study(9)],
    ],
)
def test_odd_studies_are_survived(trials):
    report = analyse(trials, SPACE, "loss", True)
    assert not report.crashed
    assert not [f for f in report.findings if f.check == "optimum-at-edge"]
    assert report.to_html()


def test_nested_and_constant_parameters():
    space = {"seed": {"value": 1}, "optim": {"parameters": {"lr": RATE}}}
    trials = [
        {"params": p, "value": (place(p["optim"]["lr"]) - 1.2) ** 2, "state": "complete"}
        for p in quasi_random(space, 16, 0)
    ]
    assert edges(trials, space) == {"optim.lr"}


@pytest.mark.parametrize(
    ("trials", "space", "message"),
    [
        ([], SPACE, "empty"),
        ([{"value": 1.0}], SPACE, "trial 0"),
        ([{"params": {}, "value": "high"}], SPACE, "number or None"),
        ([{"params": {}, "value": 1.0, "state": "lost"}], SPACE, "state"),
        (study(3), {}, "search space"),
        (study(3), {"learning_rate": {"min": 1.0}}, "learning_rate"),
    ],
)
def test_what_cannot_be_analysed_is_named(trials, space, message):
    with pytest.raises(ValueError, match=message):
        analyse(trials, space, "loss", False)
