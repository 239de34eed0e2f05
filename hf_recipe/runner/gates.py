"""The five gates: numbers in, a verdict with its reasons out. No training, no tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hf_recipe.core.finding import Stage
from hf_recipe.core.report import Gate, Verdict
from hf_recipe.instruments.compare import Gain

OVERFITS_AT = 2.0  # standard errors of the difference, as the recipe's gate is put here
ADOPT_AT = 0.75  # share of seeds that improve: Bouthillier et al. 2021

ORDER: tuple[Verdict, ...] = ("pass", "warn", "fail")
Point = tuple[Verdict, str]


def gate_of(stage: Stage, points: Sequence[Point]) -> Gate:
    """The worst verdict; its reasons, worst first."""
    ordered = sorted(points, key=lambda point: -ORDER.index(point[0]))
    worst = ordered[0][0] if ordered else "pass"
    marks = {"pass": "", "warn": "warn: ", "fail": "fail: "}
    return Gate(stage, worst, tuple(marks[verdict] + text for verdict, text in ordered))


def _number(names: Sequence[str], noun: str) -> str:
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'}"


def data_gate(
    errors: Sequence[str],
    warnings: Sequence[str],
    answered: Sequence[str],
    unanswered: Sequence[str],
) -> Gate:
    """No error; every question answered, or known to be undecided.

    Args:
        errors, warnings: names of the checks that found something.
        answered: questions with an answer ("undecided" is one).
        unanswered: questions without one, with the reason.
    """
    points: list[Point] = (
        [("pass", f"{_number(answered, 'question')} answered")] if answered else []
    )
    if errors:
        points.append(("fail", f"{_number(errors, 'error')}: {', '.join(errors)}"))
    if warnings:
        points.append(("warn", f"{_number(warnings, 'warning')}: {', '.join(warnings)}"))
    points += [("warn", f"unanswered: {text}") for text in unanswered]
    return gate_of("data", points or [("warn", "nothing was looked at")])


def baselines_gate(
    one_batch: bool | None,
    one_batch_text: str,
    versus_blind: Gain,
    versus_simplest: Gain,
    leaking: bool | None = False,
) -> Gate:
    """One batch at its floor; the model beats the blind and the simplest one on paired rows.

    Args:
        one_batch: whether the batch was learned to its floor; None: could not be tried.
        one_batch_text: its numbers.
        versus_blind, versus_simplest: the model's gain on them.
        leaking: whether one row's output depends on another row; None: could not be tried.
    """
    points: list[Point] = []
    if one_batch is None:
        points.append(("warn", f"one batch was not tried: {one_batch_text}"))
    else:
        points.append(("pass" if one_batch else "fail", one_batch_text))
    if leaking:
        points.append(("fail", "a row's output depends on other rows of its batch"))
    points.append(_versus("the input-blind baseline", versus_blind, worse="fail"))
    points.append(_versus("the simplest model", versus_simplest, worse="warn"))
    return gate_of("baselines", points)


def complexify_gate(
    train: float, train_error: float, validation: float, validation_error: float
) -> Gate:
    """Training loss under validation loss by more than two standard errors.

    Args:
        train, validation: mean losses of the rows, in evaluation mode.
        train_error, validation_error: their standard errors.
    """
    gap, error = validation - train, math.hypot(train_error, validation_error)
    text = f"training {train:.4f}, validation {validation:.4f}: gap {gap:+.4f} +- {error:.4f}"
    if not (math.isfinite(gap) and math.isfinite(error)):
        return gate_of("complexify", [("fail", f"{text}; the loss is not finite")])
    if gap > OVERFITS_AT * error:
        return gate_of("complexify", [("pass", f"{text}; it overfits")])
    advice = "it does not overfit: a larger model, or longer training"
    if gap >= -OVERFITS_AT * error:
        return gate_of("complexify", [("warn", f"{text}; within two standard errors: {advice}")])
    return gate_of("complexify", [("fail", f"{text}; {advice}")])


def regularize_gate(
    gain: Gain, gap_before: float, gap_after: float, closest: tuple[str, Gain] | None = None
) -> Gate:
    """Validation better, gap smaller, the paired interval excludes 0.

    Args:
        gain: paired gain on validation over the stage before.
        gap_before, gap_after: validation minus training loss.
        closest: where nothing was kept, what came closest to it.
    """
    gaps = f"gap {gap_before:.4f} -> {gap_after:.4f}"
    points: list[Point] = []
    if gain.verdict is True:
        points.append(("pass", f"validation loss better by {gain}"))
    elif gain.verdict is False:
        points.append(("fail", f"validation loss worse: {gain}"))
    elif closest is not None:
        name, best = closest
        points.append(("warn", f"nothing was kept; {name} came closest: {undecided(best)}"))
    else:
        points.append(("warn", f"validation loss: {undecided(gain)}"))
    smaller = gap_after < gap_before
    points.append(("pass" if smaller else "warn", gaps + ("" if smaller else ", not smaller")))
    return gate_of("regularize", points)


def tune_gate(
    gain: Gain,
    improved: float,
    feasible: int,
    trials: int,
    target: tuple[str, float] | None = None,
    reached: float | None = None,
    *,
    adopted: bool = True,
) -> Gate:
    """It beats the stage before beyond seed noise; "SOTA" only against a target.

    Args:
        gain: of the winner, re-run over seeds, on the stage before.
        improved: share of seeds that improved, in 0..1.
        feasible, trials: how many trials ended with a finite loss, and of how many.
        target: the metric's name and the value that counts as state of the art.
        reached: the metric on validation.
        adopted: whether the stage changed anything.
    """
    points: list[Point] = []
    if feasible < trials:
        verdict: Verdict = "fail" if not feasible else "warn"
        points.append((verdict, f"{trials - feasible} of {trials} trials diverged"))
    if not adopted:
        points.append(("warn", "nothing that was tried beats the stage before beyond noise"))
    elif gain.verdict is True and improved >= ADOPT_AT:
        points.append(("pass", f"better than the stage before by {gain}"))
    else:
        points.append(("warn", f"against the stage before: {undecided(gain)}"))
    if target is None:
        points.append(("pass", "SOTA is not claimed: no --target_metric was given"))
    else:
        name, value = target
        got = "unknown" if reached is None else f"{reached:.4f}"
        meets = reached is not None and reached >= value
        text = f"validation {name} {got}, target {value:g}"
        points.append(("pass" if meets else "fail", text))
    return gate_of("tune", points)


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    share, square = hits / count, z * z
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = z * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    half /= 1 + square / count
    return max(0.0, middle - half), min(1.0, middle + half)


def undecided(gain: Gain) -> str:
    """A gain that noise may have made, in plain words: what could have been told here."""
    if not gain.high > gain.low:
        return f"undecided, {gain}"
    return (
        f"undecided, {gain}; {gain.seeds} seeds on these rows tell gains from "
        f"{(gain.high - gain.low) / 2:.4f} on (--seeds {2 * gain.seeds}, or more validation rows)"
    )


def _versus(what: str, gain: Gain, worse: Verdict) -> Point:
    if gain.verdict is True:
        return "pass", f"beats {what} by {gain} per row"
    if gain.verdict is False:
        return worse, f"is worse than {what}: {gain} per row"
    return "warn", f"against {what}: {undecided(gain)}"
