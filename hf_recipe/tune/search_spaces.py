"""What to search with so many trials: spaces from the arguments at hand.

The Tuning Playbook (Godbole et al. 2023) sorts parameters into scientific ones (what is asked),
nuisance ones (to be tuned so that the answer is fair) and fixed ones; and lets the budget decide
how many nuisance parameters a study can bear: under 10 trials the rate alone; from 10 the first
moment's decay too; from 25 Adam's epsilon, weight decay and warm-up; from 50 the second moment's
decay and the regularizers. Steps are set by time, batch size by speed; neither is tuned.

What was given by hand is fixed there, the learning rate apart: it is the middle of its range.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["scientific", "nuisance", "fixed"]
Spec = dict[str, Any]

NEVER = {
    "per_device_train_batch_size": "the largest that is fast; other parameters make up for it",
    "gradient_accumulation_steps": "it changes the batch size, which is not tuned for quality",
    "max_steps": "more is better until the budget ends; the schedule must know it",
    "num_train_epochs": "more is better until the budget ends; the schedule must know it",
    "seed": "the best seed is no better than the others",
}
ADAM = ("adam", "ademamix", "lamb")
WIDE, NARROW = 10.0, 5.0  # range of the rate around its start: fresh networks, pretrained ones


@dataclass(frozen=True)
class Choice:
    """One parameter: its role, its values where it is searched, and why.

    Attributes:
        least: trials from which on it is searched.
    """

    name: str
    role: Role
    spec: Spec | None
    why: str
    least: int = 0


@dataclass(frozen=True)
class Plan:
    """What is searched, and what is not.

    Attributes:
        trials: the budget.
        choices: every parameter that was thought of.
    """

    trials: int
    choices: tuple[Choice, ...]

    @property
    def space(self) -> dict[str, Spec]:
        """The search space, as in a W&B sweep's ``parameters``."""
        return {c.name: c.spec for c in self.choices if c.spec is not None and c.role != "fixed"}

    def table(self) -> list[tuple[str, str, str]]:
        """(name, role, why) of each parameter."""
        return [(c.name, c.role, c.why) for c in self.choices]


@dataclass(frozen=True)
class Known:
    """The arguments at hand, as far as a search depends on them.

    Attributes:
        learning_rate: where the search is centred.
        pretrained: fine-tuning bears a narrower range of rates.
        schedule, optimizer: names as in TrainingArguments.
        given: names that were set by hand: they stay fixed.
        has: the script's own parameters beyond TrainingArguments ("dropout").
    """

    learning_rate: float
    pretrained: bool = False
    schedule: str = "linear"
    optimizer: str = "adamw_torch"
    given: Collection[str] = ()
    has: Collection[str] = field(default=())


def _candidates(known: Known) -> list[Choice]:
    """Everything that could be searched, with the budget it takes. Ranges: see `why`."""

    def log(low: float, high: float) -> Spec:
        return {"distribution": "log_uniform_values", "min": low, "max": high}

    def nuisance(name: str, spec: Spec, why: str, least: int) -> Choice:
        return Choice(name, "nuisance", spec, why, least)

    reach = NARROW if known.pretrained else WIDE
    rate = known.learning_rate
    found = [
        nuisance(
            "learning_rate",
            log(float(f"{rate / reach:.3g}"), float(f"{rate * reach:.3g}")),
            f"matters most; {reach:g} x to both sides of where it stands",
            0,
        )
    ]
    if any(known.optimizer.startswith(name) for name in ADAM):
        # Evenly spaced in log(1 - beta), which is how far back the average reaches.
        first, second = [0.8, 0.9, 0.95, 0.98], [0.95, 0.98, 0.99, 0.995, 0.999]
        found += [
            nuisance("adam_beta1", {"values": first}, "from 10 trials on (playbook)", 10),
            nuisance("adam_epsilon", log(1e-9, 1e-4), "from 25 trials on (playbook)", 25),
            nuisance("adam_beta2", {"values": second}, "from 50 trials on (playbook)", 50),
        ]
    found.append(nuisance("weight_decay", log(1e-3, 0.3), "a regularizer: from 25 on", 25))
    if not known.schedule.startswith("constant") or "warmup" in known.schedule:
        share = {"distribution": "uniform", "min": 0.0, "max": 0.2}
        found.append(nuisance("warmup_steps", share, "a share of the steps: from 25 on", 25))
    smoothing = {"values": [0.0, 0.05, 0.1]}
    found.append(nuisance("label_smoothing_factor", smoothing, "a regularizer: from 50 on", 50))
    if "dropout" in known.has:
        found.append(nuisance("dropout", {"values": [0.0, 0.1, 0.2]}, "a regularizer", 25))
    return found


def plan_search(
    trials: int,
    known: Known,
    *,
    scientific: Collection[str] = (),
    space: Mapping[str, Spec] | None = None,
) -> Plan:
    """What to search with `trials` trials.

    Args:
        trials: the whole budget.
        known: the arguments at hand.
        scientific: what is asked about: searched whatever the budget.
        space: the user's own ranges; they win, and are searched whatever the budget.

    Raises:
        ValueError: a budget below 2, an unknown name, or one that is not tuned for quality.
    """
    if trials < 2:
        raise ValueError(f"a search takes at least 2 trials; got {trials}")
    own = dict(space or {})
    candidates = {c.name: c for c in _candidates(known)}
    for name in [*scientific, *own]:
        if name in NEVER:
            raise ValueError(f"{name} is not tuned for quality: {NEVER[name]}")
        if name not in candidates and name not in own:
            near = difflib.get_close_matches(name, candidates, 1)
            hint = f"did you mean {near[0]!r}?" if near else "give its range in the space"
            raise ValueError(f"no range is known for {name!r}; {hint}")
    choices = []
    for name in [*candidates, *(n for n in own if n not in candidates)]:
        choices.append(
            _chosen(name, candidates.get(name), own.get(name), trials, known, scientific)
        )
    choices += [Choice(name, "fixed", None, why) for name, why in NEVER.items()]
    return Plan(trials, tuple(choices))


def _chosen(
    name: str,
    candidate: Choice | None,
    own: Spec | None,
    trials: int,
    known: Known,
    scientific: Collection[str],
) -> Choice:
    """One parameter's role under this budget."""
    asked: Role = "scientific" if name in scientific else "nuisance"
    if own is not None or candidate is None:
        return Choice(name, asked, own, "the range was given by hand")
    if name in scientific:
        return Choice(name, asked, candidate.spec, "it is what is asked")
    if name in known.given and name != "learning_rate":
        return Choice(name, "fixed", None, "set by hand")
    if trials < candidate.least:
        return Choice(name, "fixed", None, f"from {candidate.least} trials on")
    return candidate
