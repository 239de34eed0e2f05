"""Search spaces and quasi-random points in them: "random search over grid search".

A space is written as in a W&B sweep's ``parameters``. Points are scrambled Sobol ones: unlike
Bayesian search they keep exploration even, so that the trials can also be analysed (Godbole et
al., Deep Learning Tuning Playbook, 2023). The first few of them are drawn a little towards the
middle (Cauwet et al., 2019): a point at an edge covers nothing beyond it, and few points in many
dimensions lie near an edge almost always.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from scipy.special import betaincinv
from scipy.stats import norm, qmc

from hf_recipe.instruments.numbers import whole_of

KEYS = {
    "constant": ({"value"}, set()),
    "categorical": ({"values"}, {"probabilities"}),
    "categorical_w_probabilities": ({"values", "probabilities"}, set()),
    "int_uniform": ({"min", "max"}, set()),
    "uniform": ({"min", "max"}, set()),
    "q_uniform": ({"min", "max"}, {"q"}),
    "log_uniform": ({"min", "max"}, set()),
    "log_uniform_values": ({"min", "max"}, set()),
    "q_log_uniform": ({"min", "max"}, {"q"}),
    "q_log_uniform_values": ({"min", "max"}, {"q"}),
    "inv_log_uniform": ({"min", "max"}, set()),
    "inv_log_uniform_values": ({"min", "max"}, set()),
    "normal": (set(), {"mu", "sigma"}),
    "q_normal": (set(), {"mu", "sigma", "q"}),
    "log_normal": (set(), {"mu", "sigma"}),
    "q_log_normal": (set(), {"mu", "sigma", "q"}),
    "beta": (set(), {"a", "b"}),
    "q_beta": (set(), {"a", "b", "q"}),
}
ALL_KEYS = {"distribution", "parameters"}.union(*(need | may for need, may in KEYS.values()))
# Point n is drawn in by this times the square of n ** (-1 / dimensions), the share of the range
# that one cell takes. On quadratic valleys, 8 to 64 points in 2 to 6 dimensions, 0.25 to 0.35
# leave the smallest regret for optima anywhere in the range. Without the square the regret is the
# same, and the points are two to three times as uneven.
DRAWN_IN = 0.3


@dataclass(frozen=True)
class Parameter:
    """One searched value: where it stands in the space, and its value at a quantile in [0, 1)."""

    path: tuple[str, ...]
    distribution: str
    at: Callable[[float], Any]

    @property
    def varies(self) -> bool:
        """Whether it takes a dimension of the search."""
        return self.distribution != "constant"

    @property
    def bounded(self) -> bool:
        """Whether it is a stretch of numbers with two edges."""
        return self.distribution.endswith(("uniform", "uniform_values")) and not (
            self.distribution.startswith(("int", "q_"))
        )


def parameters_of(space: Mapping[str, Any]) -> list[Parameter]:
    """The parameters of `space`, nested ones included, in its own order.

    Raises:
        ValueError: an unknown key or distribution (with the nearest one), a bound that is
            missing, not finite or out of order, or a logarithm of a value that is not positive.
    """
    if not isinstance(space, Mapping) or not space:
        raise ValueError("the search space must map parameter names to what they may be")
    return list(_walk(space, ()))


def _walk(space: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[Parameter]:
    for key, given in space.items():
        here = (*path, str(key))
        name = ".".join(here)
        if not isinstance(given, Mapping):
            raise ValueError(
                f"{name}: expected a mapping such as {{'value': {given!r}}} or "
                f"{{'values': [...]}}; got {given!r}"
            )
        if not given:
            raise ValueError(f"{name}: nothing is said of it; give value, values, or min and max")
        for option in given:
            if option not in ALL_KEYS:
                raise ValueError(f"{name}: unknown key {option!r}; {_nearest(option, ALL_KEYS)}")
        if "parameters" in given:
            if set(given) != {"parameters"}:
                raise ValueError(f"{name}: 'parameters' stands alone; got also {_others(given)}")
            yield from _walk(given["parameters"], here)
            continue
        distribution = str(given.get("distribution") or _inferred(name, given))
        if distribution not in KEYS:
            raise ValueError(
                f"{name}: unknown distribution {distribution!r}; {_nearest(distribution, KEYS)}"
            )
        _check_keys(name, distribution, given)
        if distribution == "categorical_w_probabilities":
            distribution = "categorical"
        yield Parameter(here, distribution, _quantile(name, distribution, given))


def _nearest(word: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"


def _others(given: Mapping[str, Any]) -> str:
    return ", ".join(sorted(str(key) for key in set(given) - {"parameters"}))


def _inferred(name: str, given: Mapping[str, Any]) -> str:
    """The distribution that W&B takes where none is named."""
    if "value" in given:
        return "constant"
    if "values" in given:
        return "categorical"
    if "min" in given and "max" in given:
        whole = all(
            isinstance(given[k], Integral) and not isinstance(given[k], bool)
            for k in ("min", "max")
        )
        return "int_uniform" if whole else "uniform"
    if "mu" in given or "sigma" in given:
        return "normal"
    raise ValueError(f"{name}: give value, values, or both min and max; got {sorted(given)}")


def _check_keys(name: str, distribution: str, given: Mapping[str, Any]) -> None:
    need, may = KEYS[distribution]
    missing = need - set(given)
    if missing:
        raise ValueError(f"{name}: {distribution} needs {' and '.join(sorted(missing))}")
    extra = set(given) - need - may - {"distribution"}
    if extra:
        raise ValueError(f"{name}: {distribution} takes no {', '.join(sorted(extra))}")


def _number(name: str, given: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = given.get(key, default)
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name}: {key} must be a finite number; got {value!r}")
    return float(value)


def _quantile(name: str, distribution: str, given: Mapping[str, Any]) -> Callable[[float], Any]:
    """The inverse distribution function: quantile in [0, 1) -> value."""
    if distribution == "constant":
        return lambda u: given["value"]
    if distribution == "categorical":
        return _categorical(name, given)
    step = _number(name, given, "q", 1.0) if "q" in KEYS[distribution][1] else None
    if step is not None and step <= 0:
        raise ValueError(f"{name}: q must be positive; got {step}")
    if "normal" in distribution:
        inverse = _bell(name, distribution, given)
    elif distribution.endswith("beta"):
        inverse = _beta(name, given)
    else:
        inverse = _between(name, distribution, given)
    if step is None:
        return inverse
    whole = step.is_integer()
    return lambda u: int(round(inverse(u) / step) * step) if whole else _grid(inverse(u), step)


def _grid(value: float, step: float) -> float:
    return float(f"{round(value / step) * step:.12g}")  # 0.30000000000000004 reads as 0.3


def _categorical(name: str, given: Mapping[str, Any]) -> Callable[[float], Any]:
    values = given["values"]
    if isinstance(values, str) or not hasattr(values, "__len__") or not len(values):
        raise ValueError(f"{name}: values must be a list with at least one entry; got {values!r}")
    values = values.tolist() if isinstance(values, np.ndarray) else list(values)
    shares = given.get("probabilities")
    if shares is None:
        return lambda u: values[min(int(u * len(values)), len(values) - 1)]
    if len(shares) != len(values) or min(shares) < 0 or not abs(sum(shares) - 1) <= 1e-6:
        raise ValueError(
            f"{name}: probabilities must be {len(values)} numbers >= 0 that sum to 1; "
            f"got {list(shares)!r}"
        )
    edges = np.cumsum(shares)
    last = max(i for i, share in enumerate(shares) if share > 0)
    return lambda u: values[min(int(np.searchsorted(edges, u, side="right")), last)]


def _bell(name: str, distribution: str, given: Mapping[str, Any]) -> Callable[[float], float]:
    mean, spread = _number(name, given, "mu", 0.0), _number(name, given, "sigma", 1.0)
    if spread <= 0:
        raise ValueError(f"{name}: sigma must be positive; got {spread}")
    logarithmic = "log" in distribution

    def inverse(u: float) -> float:
        value = mean + spread * float(norm.ppf(min(max(u, 1e-9), 1 - 1e-9)))
        return math.exp(value) if logarithmic else value

    return inverse


def _beta(name: str, given: Mapping[str, Any]) -> Callable[[float], float]:
    shape = _number(name, given, "a", 1.0), _number(name, given, "b", 1.0)
    if min(shape) <= 0:
        raise ValueError(f"{name}: a and b must be positive; got {shape[0]:g} and {shape[1]:g}")
    return lambda u: float(betaincinv(*shape, u))


def _between(name: str, distribution: str, given: Mapping[str, Any]) -> Callable[[float], Any]:
    low, high = _number(name, given, "min"), _number(name, given, "max")
    if not low < high and not (distribution == "int_uniform" and low == high):
        raise ValueError(f"{name}: min must be less than max; got {low:g} and {high:g}")
    if distribution == "int_uniform":
        if not (low.is_integer() and high.is_integer()):
            raise ValueError(f"{name}: int_uniform needs whole bounds; got {low:g} and {high:g}")
        count = int(high - low) + 1
        return lambda u: int(low) + min(int(u * count), count - 1)
    if "log" not in distribution:
        return lambda u: low + u * (high - low)
    bottom, top = low, high  # exponents of base e, unless the name ends in "values"
    inverse = distribution.startswith("inv")  # uniform in log(1 / x), as W&B has it
    if distribution.endswith("values"):
        if low <= 0:
            raise ValueError(f"{name}: {distribution} needs min > 0; got {low:g}")
        bottom, top = math.log(low), math.log(high)
    elif max(top, -bottom) > 700:
        raise ValueError(
            f"{name}: min and max of {distribution} are exponents of base e, and "
            f"exp({max(top, -bottom):g}) is no float; did you mean {distribution}_values?"
        )
    elif inverse:
        bottom, top = -high, -low
    if inverse:
        return lambda u: math.exp(top - u * (top - bottom))
    return lambda u: math.exp(bottom + u * (top - bottom))


def points(n: int, dimensions: int, seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(n, dimensions) scrambled Sobol points in [0, 1); the first ones are the same for any `n`."""
    if not n or not dimensions:
        return np.zeros((n, dimensions))
    engine = qmc.Sobol(dimensions, scramble=True, rng=np.random.default_rng([seed, dimensions]))
    return np.asarray(engine.random(1 << (n - 1).bit_length())[:n])


def inward(row: Any, number: int) -> Any:
    """Point `number` (from 1), drawn towards the middle."""
    return 0.5 + (row - 0.5) * (1 - DRAWN_IN * number ** (-2 / max(1, len(row))))


def quasi_random(space: Mapping[str, Any], n: int, seed: int) -> list[dict[str, Any]]:
    """`n` points of `space`, spread evenly; nested parameters give nested dicts.

    Args:
        space: as in a W&B sweep's ``parameters``. ``log_uniform`` takes exponents of base e, as
            W&B does; ``log_uniform_values`` the values themselves.
        n: number of points.
        seed: the same seed gives the same points.

    Raises:
        ValueError: a space that makes no sense, naming the parameter; `n` or `seed` that is no
            whole number, or below 0.
    """
    n, seed = whole_of(n, "n"), whole_of(seed, "seed")
    parameters = parameters_of(space)
    varying = [p for p in parameters if p.varies]
    column = {p.path: i for i, p in enumerate(varying)}
    drawn = points(n, len(varying), seed)
    trials = []
    for number, row in enumerate(drawn, 1):
        drawn_in = inward(row, number)
        trial: dict[str, Any] = {}
        for parameter in parameters:
            place = trial
            for key in parameter.path[:-1]:
                place = place.setdefault(key, {})
            u = 0.0
            if parameter.varies:
                source = drawn_in if parameter.bounded else row
                u = float(source[column[parameter.path]])
            place[parameter.path[-1]] = parameter.at(u)
        trials.append(trial)
    return trials
