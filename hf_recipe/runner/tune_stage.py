"""Tune: explore briefly, run the best few again on other seeds, train longer; then a student.

The playbook's two rounds: many short runs at quasi-random points, then few long ones at the good
points. What the first round likes is run at full length on seeds that did not choose it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from hf_recipe.core.exhibit import Answer, Table
from hf_recipe.core.report import Gate
from hf_recipe.instruments.compare import Gain, Outcome, Variant
from hf_recipe.runner.decaying import tune_decay
from hf_recipe.runner.distilling import distil
from hf_recipe.runner.gates import tune_gate
from hf_recipe.runner.journey import Journey, mean
from hf_recipe.runner.setup import Setup
from hf_recipe.tune.adoption import TOP, Contest, Rerun, rerun
from hf_recipe.tune.engines import Result, Suggestion, search
from hf_recipe.tune.points_engine import EngineOfRanks, PointsEngine
from hf_recipe.tune.space import quasi_random
from hf_recipe.tune.study_exhibits import TRIALS

BRIEF = 0.5  # of the epochs: enough to rank points; the best few are run at full length


def space(setup: Setup) -> dict[str, Any]:
    """The search space around `setup`, in the form of a sweep's parameters."""
    return {
        "learning_rate": {
            "distribution": "log_uniform_values",
            "min": setup.learning_rate / 3,
            "max": setup.learning_rate * 3,
        },
        "weight_decay": {"distribution": "log_uniform_values", "min": 1e-3, "max": 0.3},
        "dropout": {"values": [0.0, 0.1, 0.2]},
        "warmup": {"distribution": "uniform", "min": 0.0, "max": 0.2},
    }


def run(journey: Journey) -> Gate:
    """Decay, explore, confirm, train longer, distil."""
    lab, begin = journey.lab, journey.setup
    before = journey.outcomes("where the stage begins", begin)
    standing, start = tune_decay(journey, before), journey.setup
    trials = explore(journey)
    outcomes = [_brief(journey, trial) for trial in trials]
    lab.report.exhibit(_table(trials, outcomes, lab.metric_name))
    _study(journey, trials, space(start))
    feasible = [t for t in trials if t["state"] == "complete"]
    best = sorted(feasible, key=lambda trial: float(trial["value"]))[:TOP]
    again = {f"trial {t['number'] + 1} at full length": start.change(**t["params"]) for t in best}
    standing = contest(journey, "the search", again, standing)
    longer = {"twice as long": journey.setup.change(epochs=2 * start.epochs)}
    standing = contest(journey, "training twice as long", longer, standing)
    journey.note("tune", standing)
    distil(journey)

    def more(seeds: Sequence[int]) -> tuple[list[Outcome], list[Outcome]]:
        first = journey.outcomes("where the stage began", begin, seeds=seeds)
        return first, journey.outcomes("where it ended", journey.setup, seeds=seeds)

    return tune_gate(
        journey.look_twice(before, standing, more),
        mean([float(b.loss < a.loss) for a, b in zip(before, standing, strict=True)]),
        len(feasible),
        len(trials),
        lab.options.target,
        _target_value(journey, standing),
        adopted=journey.setup != begin,
    )


# ------------------------------------------------------------------ round one


def explore(journey: Journey) -> list[dict[str, Any]]:
    """Brief trials at quasi-random points around the setup; a search that was cut off goes on."""
    lab, start = journey.lab, journey.setup
    seed, asked = int(lab.options.training.seed), space(start)
    text = json.dumps([lab.context, start.variant("").key, asked, seed], sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    path = lab.folder / "search" / f"{name}.jsonl"
    engine = EngineOfRanks(lambda: PointsEngine(asked, storage=path, seed=seed))
    wanted = lab.options.recipe.trials
    points = quasi_random(asked, wanted, seed)
    lab.ahead([_trial(journey, n, params) for n, params in enumerate(points)])

    def train(point: Suggestion) -> Result:
        outcome = _brief(journey, {"number": point.number, "params": point.params})
        return Result(
            "complete",
            outcome.loss,
            seed=_elsewhere(journey),
            curve=tuple(loss for _, loss in outcome.facts["curve"]),
            seconds=outcome.cost,
        )

    return search(engine, train, wanted)[:wanted]


def _elsewhere(journey: Journey) -> int:
    """The seed of the search: contenders are judged by seeds that did not choose them."""
    return max(journey.more_seeds) + 1


def _brief(journey: Journey, trial: dict[str, Any]) -> Outcome:
    """A trial's outcome; remembered where it was run before."""
    return journey.lab.train(_trial(journey, trial["number"], trial["params"]))


def _trial(journey: Journey, number: int, params: Mapping[str, Any]) -> Variant:
    setup = journey.setup.change(**params, epochs=BRIEF * journey.setup.epochs)
    return setup.variant(f"trial {number + 1}", _elsewhere(journey))


def _study(journey: Journey, trials: list[dict[str, Any]], searched: dict[str, Any]) -> None:
    """What the search as a whole says: edges, sparseness, where it diverged."""
    from hf_recipe.tune.analysis import analyse

    lab = journey.lab
    seen = analyse(trials, searched, "validation loss", False)
    wanted = lab.chosen("tune")
    for finding in seen.flat:
        if finding.check in wanted:
            lab.report.add(finding)
            lab.show.finding(finding)
    lab.absorb(seen)
    for exhibit in seen.exhibits:
        if exhibit.title != TRIALS:  # all of them stand in a table already
            lab.report.exhibit(exhibit)


# ------------------------------------------------------------------ round two


def contest(
    journey: Journey, what: str, contenders: dict[str, Setup], standing: list[Outcome]
) -> list[Outcome]:
    """Take the contender that beats what stands beyond seed noise, if one does.

    Each is run on the seeds of what stands, in pairs with it, and given up as soon as it cannot
    be adopted any more.
    """
    lab = journey.lab
    rules = Contest(len(contenders), len(lab.seeds))
    adopted: list[tuple[float, Setup, list[Outcome]]] = []
    said = []
    lab.ahead([setup.variant(name, lab.seeds[0]) for name, setup in contenders.items()])
    for name, setup in contenders.items():
        found, outcomes = _again(journey, name, setup, rules, standing)
        tried = len(found.losses)
        lost = f"given up: better on {found.wins} of {tried} seed{'' if tried == 1 else 's'}"
        said.append(f"{name} {found.gain or lost}")
        if found.adopted and found.gain is not None:
            adopted.append((found.gain.mean, setup, outcomes))
    winner = max(adopted, key=lambda one: one[0], default=None)
    word = "yes" if winner else "not beyond noise"
    text = f"{word}: {'; '.join(said)}" if said else "no: nothing that was tried is feasible"
    lab.report.answer(Answer(f"Does {what} beat what stood before?", "tune", text))
    if winner is None:
        return standing
    _, journey.setup, outcomes = winner
    return outcomes


def _again(
    journey: Journey, name: str, setup: Setup, rules: Contest, standing: list[Outcome]
) -> tuple[Rerun, list[Outcome]]:
    """One contender on the seeds of what stands; its outcomes."""
    outcomes: list[Outcome] = []
    lab = journey.lab

    def train(number: int) -> float:
        if number:  # the first seed was not lost: the rest are likely to be asked for
            lab.ahead([setup.variant(name, seed) for seed in lab.seeds[number:]])
        outcomes.append(lab.run(name, setup, lab.seeds[number]))
        return outcomes[-1].loss

    def gain() -> Gain:
        return journey.gain(standing, outcomes, level=rules.level)

    return rerun(rules, [outcome.loss for outcome in standing], train, gain), outcomes


def _target_value(journey: Journey, outcomes: list[Outcome]) -> float | None:
    target = journey.lab.options.target
    if target is None:
        return None
    key = f"validation_{target[0]}"
    values = [o.facts["metrics"].get(key) for o in outcomes]
    return mean(values) if all(v is not None for v in values) else None


def _table(trials: list[dict[str, Any]], outcomes: list[Outcome], metric: str) -> Table:
    names = tuple(trials[0]["params"]) if trials else ()
    rows = tuple(
        (*(trial["params"][name] for name in names), outcome.loss, outcome.metric)
        for trial, outcome in zip(trials, outcomes, strict=True)
    )
    caption = f"each at {BRIEF:g} of the epochs, on a seed of its own"
    columns = (*names, "validation loss", metric)
    return Table("The search", "tune", columns, rows, caption=caption)
