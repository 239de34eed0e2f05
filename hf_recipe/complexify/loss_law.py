"""The loss law: what would the final loss be under another schedule, or after more steps?

The recipe leaves the learning rate's decay to the very end and fits it to the data set. A run
with a separated plateau and decay tells enough to predict the others: the loss falls as a power
of the sum of all rates, and falls further, with a delay, wherever the rate is annealed,

    loss = floor + A * (sum of rates)^-a - C * (annealing, answered with a delay)

(Tissue et al. 2024, arXiv:2408.11029). The delay belongs to the run: a thousand steps in runs of
24,000 and more, two hundred in a run of 2,400. So no single law
is chosen: exponents and delays are averaged by how well each explains the curves, and the
interval grows with what they disagree about. A lone cosine or linear decay does
not tell A from C, and the law says so: `LossLaw.undecided`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_recipe.complexify.annealing import Features, rates_of, warmup_end
from hf_recipe.instruments.mixture import quantiles
from hf_recipe.instruments.numbers import numbers_of

Array = np.ndarray[Any, np.dtype[np.float64]]
Run = tuple[Sequence[float], Sequence[float], Sequence[float]]

POINTS = 400  # observations of a run that enter the fit; more are averaged in groups
FEWEST = 8
EARLY = 0.06  # share of a run after its warm-up that no power law follows
EXPONENTS = np.geomspace(0.06, 1.8, 22)
# Delays as shares of the longest run's steps. A thousand steps were the best of runs of 24,000,
# two hundred of runs of 2,400: so a share that falls as steps to the power 0.4. The tails of this
# prior are heavy: where the curves contradict it, they win.
DELAYS = np.geomspace(0.003, 0.4, 15)
USUAL_DELAY, DELAY_SPREAD, USUAL_STEPS = 0.036, 0.3, 24_000
# What any annealing is taken to be worth before the curves speak, as a share of the loss.
USUAL_GAIN = 0.05
# Laws of this form miss by about this share of the change that they predict, in runs of 24,000
# steps; by more in shorter ones, which are further from any power law.
MISFIT = 0.055
MISFIT_POWER = -0.35  # it grows towards short runs as their steps to this power
DOUBT = 2.5  # by how much more where the curves did not decide
LEEWAY = 0.1  # of the curves' own spread: how far off a delay may be and still be believed
# The share of the annealing's course that powers of the way travelled do not imitate: 0.13 for a
# lone cosine or linear decay, 0.4 to 0.7 for a plateau with a decay or a step.
SEPARATED = 0.25


@dataclass(frozen=True)
class Member:
    """One law of the average: loss = floor + power * travelled^-exponent - gain * annealed.

    Attributes:
        delay, exponent: what is fixed in this member; the delay in steps.
        coefficients: floor, power, gain.
        covariance: (3, 3), of the coefficients.
        weight: its share of the average.
    """

    delay: float
    exponent: float
    coefficients: Array
    covariance: Array
    weight: float


@dataclass(frozen=True)
class LossLaw:
    """A law fitted by `fit`.

    Attributes:
        reference: the rate in whose units rates are counted: the highest one observed.
        scale: sum of rates, in those units, at which the power term is 1.
        noise: standard deviation of one observed loss around the law, as a share of the loss.
        members: the laws that are averaged.
        ends: sums of rates, in those units, at which the observed runs end.
        misfit: how far such laws miss, as a share of the change that they predict.
        undecided: the curves do not tell a falling rate's gain from the gain of going on, as in a
            lone cosine or linear decay: no plateau stands beside a decay.
    """

    reference: float
    scale: float
    noise: float
    members: tuple[Member, ...]
    ends: tuple[float, ...]
    misfit: float
    undecided: bool

    def predict(self, learning_rates: Sequence[float]) -> Array:
        """Losses of every step of a run with these rates, in the unit of the observed ones.

        Raises:
            ValueError: rates that are empty, negative, not finite or all zero.
        """
        features = Features.of(rates_of(learning_rates), self.reference, self._delays())
        losses = np.zeros(len(features.knots))
        for member in self.members:
            losses += member.weight * (self._design(features, member) @ member.coefficients)
        steps = np.arange(int(features.knots[-1]) + 1)
        return np.asarray(np.interp(steps, features.knots, losses))

    def interval(self, learning_rates: Sequence[float], level: float = 0.8) -> tuple[float, float]:
        """Where the final loss of a run with these rates lies, with probability `level`.

        Raises:
            ValueError: `level` not between 0 and 1; rates as in `predict`.
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1; got {level}")
        features = Features.of(rates_of(learning_rates), self.reference, self._delays())
        centres, widths, weights = [], [], []
        for member in self.members:
            row = self._design(features, member)[-1]
            centre = float(row @ member.coefficients)
            variance = float(row @ member.covariance @ row) + (self.noise * centre) ** 2
            variance += (self.misfit * self._change(features, member, row)) ** 2
            centres.append(centre)
            widths.append(max(float(np.sqrt(variance)), 1e-12 * abs(centre) + 1e-300))
            weights.append(member.weight)
        return quantiles(np.array(centres), np.array(widths), np.array(weights), level)

    def _delays(self) -> list[float]:
        return list(dict.fromkeys(member.delay for member in self.members))

    def _design(self, features: Features, member: Member) -> Array:
        return features.design(member.delay, member.exponent, self.scale)

    def _change(self, features: Features, member: Member, row: Array) -> float:
        """How far the prediction goes from the nearest end of an observed run."""
        _, power, gain = member.coefficients
        ahead = min(
            abs(power * (row[1] - (travelled / self.scale) ** -member.exponent))
            for travelled in self.ends
        )
        return float(np.hypot(ahead, gain * row[2]))


# -------------------------------------------------------------------- fitting


@dataclass(frozen=True)
class Observed:
    """One run's observations, cleaned: rates of every step, step numbers, losses."""

    rates: Array
    steps: Array
    losses: Array


def fit(runs: Sequence[Run]) -> LossLaw:
    """Fit the law to one or more runs of the same model on the same data.

    Args:
        runs: for each run the learning rate of every step (warm-up included), the steps at which
            a loss was observed (counted from 0), and those losses, none of them averaged over
            more than a few percent of the run. NaN losses are left out.

    Raises:
        ValueError: no run, lengths that differ, steps beyond the rates, too few observations.
    """
    observed = [_observed(number, run) for number, run in enumerate(runs)]
    if not observed:
        raise ValueError("runs is empty: the law needs at least one observed run")
    reference = max(float(run.rates.max()) for run in observed)
    falling = [run for run in observed if run.rates[-1] < 0.99 * run.rates.max()]
    longest = max(len(run.rates) for run in falling or observed)  # the delay shows where rates fall
    scale = max(float(run.rates.sum()) for run in observed) / reference
    delays = [max(1.0, float(share * longest)) for share in DELAYS]
    features = [Features.of(run.rates, reference, delays) for run in observed]
    losses = np.concatenate([run.losses for run in observed])
    seen = _joined([f.at(run.steps) for f, run in zip(features, observed, strict=True)])
    usual = USUAL_DELAY * (longest / USUAL_STEPS) ** -0.4
    prior = -1.5 * np.log1p((np.log(DELAYS / usual) / DELAY_SPREAD) ** 2 / 2)
    asked = [
        (delay, float(exponent), float(expected))
        for delay, expected in zip(delays, prior, strict=True)
        for exponent in EXPONENTS
    ]
    designs = np.stack([seen.design(delay, exponent, scale) for delay, exponent, _ in asked])
    solved = zip(*_solve(designs, losses), strict=True)
    fits = [(*each, *found) for each, found in zip(asked, solved, strict=True)]
    undecided = not _separated(seen.travelled, seen.annealed[delays[0]])  # before any is blurred
    misfit = MISFIT * (min(longest, USUAL_STEPS) / USUAL_STEPS) ** MISFIT_POWER
    misfit *= DOUBT if undecided else 1.0
    members, noise = _averaged(fits, losses)
    ends = tuple(float(f.travelled[-1]) for f in features)
    return LossLaw(reference, scale, noise, members, ends, misfit, undecided)


def _joined(parts: list[Features]) -> Features:
    """What several runs saw, one after the other."""
    return Features(
        np.concatenate([part.knots for part in parts]),
        np.concatenate([part.travelled for part in parts]),
        {d: np.concatenate([part.annealed[d] for part in parts]) for d in parts[0].annealed},
    )


def _observed(number: int, run: Run) -> Observed:
    if not isinstance(run, (list, tuple)) or len(run) != 3:
        raise ValueError(
            f"run {number} must be (learning rates of every step, observed steps, losses)"
        )
    rates = rates_of(run[0])
    steps = numbers_of(run[1], f"run {number}: observed steps", axes=1)
    losses = numbers_of(run[2], f"run {number}: losses", axes=1)
    if steps.shape != losses.shape:
        raise ValueError(
            f"run {number}: one loss per observed step is needed; got {len(steps)} steps and "
            f"{len(losses)} losses"
        )
    if len(steps) and not (steps.min() >= 0 and steps.max() <= len(rates)):
        raise ValueError(
            f"run {number}: observed steps must lie within the {len(rates)} rates; got "
            f"{steps.min():g} to {steps.max():g}"
        )
    warm = warmup_end(rates)
    start = warm + EARLY * (len(rates) - warm)
    kept = np.isfinite(losses) & (steps >= start)
    if kept.sum() < FEWEST:
        raise ValueError(
            f"run {number}: {kept.sum()} finite losses after its first {start:.0f} steps, and "
            f"{FEWEST} are needed"
        )
    order = np.argsort(steps[kept], kind="stable")
    steps, losses = steps[kept][order], losses[kept][order]
    groups = np.array_split(np.arange(len(steps)), min(POINTS, len(steps)))
    return Observed(
        rates,
        np.array([steps[g].mean() for g in groups]),
        np.array([losses[g].mean() for g in groups]),
    )


def _solve(designs: Array, losses: Array) -> tuple[Array, Array, Array]:
    """Coefficients, their unscaled covariance, and residuals, as shares of the loss, of each fit.

    Huber's weights; a weak prior keeps the gain where the curves say nothing. All fits at once.

    Args:
        designs: (fits, observations, 3); losses: (observations,).
    """
    typical = float(np.median(np.abs(losses))) or 1.0
    size = np.maximum(np.abs(losses), 1e-6 * typical)
    x, y = designs / size[:, None], losses / size
    weights, spread, tight = np.ones(x.shape[:2]), np.ones(len(x)), np.zeros((len(x), 3, 3))
    for _ in range(4):
        tight[:, 2, 2] = (spread / (USUAL_GAIN * typical)) ** 2
        tight[:, 0, 0] = tight[:, 1, 1] = (1e-3 * spread / typical) ** 2
        weighted = (x * weights[:, :, None]).transpose(0, 2, 1)
        normal = weighted @ x + tight
        right = weighted @ y + tight[:, :, 2] * (USUAL_GAIN * typical)
        coefficients = np.asarray(np.linalg.solve(normal, right[:, :, None]), float)[:, :, 0]
        residuals = y - (x @ coefficients[:, :, None])[:, :, 0]
        spread = 1.4826 * np.median(np.abs(residuals), axis=1) + 1e-12
        weights = np.minimum(1, 1.5 * spread[:, None] / np.maximum(np.abs(residuals), 1e-300))
    return coefficients, np.asarray(np.linalg.inv(normal)), np.asarray(residuals)


def _averaged(
    fits: list[tuple[float, float, float, Array, Array, Array]], losses: Array
) -> tuple[tuple[Member, ...], float]:
    """Weigh the fitted laws by how well they explain the curves, and by what is usual."""
    residuals = np.stack([fit[5] for fit in fits])
    cut = 3 * 1.4826 * float(np.median(np.abs(residuals), axis=1).min()) + 1e-12
    misfit = np.mean(np.minimum(residuals**2, cut * np.abs(residuals)), axis=1)
    possible = np.array([_possible(fit[3], losses) for fit in fits])
    misfit = np.where(possible | ~possible.any(), misfit, 1e6 * misfit.max() + 1.0)
    best = int(misfit.argmin())
    independent = _independent(residuals[best])
    noise = max(float(np.sqrt(misfit[best])), 1e-9)
    # Exponents are weighed by noise alone; delays with leeway, since no delay is quite true.
    systematic = LEEWAY * float(np.std(losses) / (np.mean(np.abs(losses)) or 1.0))
    table = misfit.reshape(-1, len(EXPONENTS))
    least = table.min(axis=1, keepdims=True)
    within = np.exp(-0.5 * independent * (table - least) / (misfit[best] + 1e-18))
    within /= within.sum(axis=1, keepdims=True)
    allowed = misfit[best] + systematic**2 + 1e-18
    score = -0.5 * independent * (least[:, 0] - misfit[best]) / allowed
    score += np.array([fit[2] for fit in fits]).reshape(table.shape)[:, 0]
    across = np.exp(score - score.max())
    weights = (within * across[:, None] / across.sum()).ravel()
    inflate = noise**2 * len(losses) / independent
    members = tuple(
        Member(delay, exponent, coefficients, covariance * inflate, float(weight))
        for (delay, exponent, _, coefficients, covariance, _), weight in zip(
            fits, weights, strict=True
        )
        if weight > 1e-4
    )
    return members, noise


def _separated(travelled: Array, annealed: Array) -> bool:
    """Whether the course of the annealing is told from that of any power of the way travelled."""
    way = np.maximum(travelled, 1e-9) / travelled.max()
    powers = np.stack([np.ones(len(way)), way**-0.1, way**-0.5, way**-1.5], axis=1)
    rest = annealed - powers @ np.linalg.lstsq(powers, annealed, rcond=None)[0]
    return bool(rest.std() > SEPARATED * annealed.std() and annealed.std() > 0.01)


def _possible(coefficients: Array, losses: Array) -> bool:
    floor, power, gain = coefficients
    return bool(power >= 0 and gain >= 0 and (floor >= 0 or losses.min() < 0))


def _independent(residuals: Array) -> float:
    """How many independent observations the residuals are worth (an AR(1) process)."""
    centred = residuals - np.median(residuals)
    limit = 3 * 1.4826 * float(np.median(np.abs(centred))) + 1e-300
    centred = np.clip(centred, -limit, limit)
    along = float(centred[1:] @ centred[:-1]) / max(float(centred @ centred), 1e-300)
    along = min(max(along, 0.0), 0.98)
    return max(FEWEST / 2, len(residuals) * (1 - along) / (1 + along))
