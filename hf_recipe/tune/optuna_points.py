"""Search spaces and quasi-random points in Optuna's words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_recipe.tune.space import Parameter, parameters_of, quasi_random
from hf_recipe.tune.study import flat, levels, name_of, place

PLAIN = ("uniform", "log_uniform", "log_uniform_values", "int_uniform", "categorical")


def distributions_of(space: Mapping[str, Any]) -> dict[str, Any]:
    """Optuna's distribution of each searched parameter, by dotted name.

    What Optuna has no word for (normal, quantised and inverse ones) is searched by its quantile.
    """
    from optuna import distributions as known

    found: dict[str, Any] = {}
    for parameter in parameters_of(space):
        kind, name = parameter.distribution, name_of(parameter)
        if not parameter.varies:
            continue
        if kind == "categorical":
            found[name] = known.CategoricalDistribution(levels(parameter))
        elif kind == "int_uniform":
            found[name] = known.IntDistribution(parameter.at(0.0), parameter.at(1 - 1e-12))
        elif kind in PLAIN:
            ends = parameter.at(0.0), parameter.at(1.0)
            found[name] = known.FloatDistribution(*ends, log="log" in kind)
        else:
            found[name] = known.FloatDistribution(0.0, 1.0)
    return found


def value_of(parameter: Parameter, value: Any) -> Any:
    """A parameter's value from what Optuna calls it."""
    return value if parameter.distribution in PLAIN else parameter.at(min(value, 1 - 1e-12))


def quasi_random_sampler(
    space: Mapping[str, Any], seed: int, *, then: Any = None, explore: int = 0
) -> Any:
    """An Optuna sampler whose trial k is point k of `quasi_random(space, ..., seed)`.

    Args:
        then: the sampler that takes over, if any.
        explore: after how many trials it does.
    """
    optuna = import_optuna()
    base: Any = optuna.samplers.BaseSampler
    parameters = {name_of(p): p for p in parameters_of(space) if p.varies}

    class QuasiRandom(base):  # type: ignore[misc]
        """Points by number, so that workers that share a study never draw the same one."""

        def _free(self, trial: Any) -> bool:
            return then is not None and trial.number >= explore

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            if self._free(trial):
                return dict(then.infer_relative_search_space(study, trial))
            return distributions_of(space)

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            if self._free(trial):
                return dict(then.sample_relative(study, trial, search_space))
            point = dict(flat(quasi_random(space, trial.number + 1, seed)[-1]))
            return {
                name: point[name]
                if parameter.distribution in PLAIN
                else place(parameter, point[name])
                for name, parameter in parameters.items()
            }

        def sample_independent(
            self, study: Any, trial: Any, param_name: str, param_distribution: Any
        ) -> Any:
            other = then or optuna.samplers.RandomSampler(seed=seed + trial.number)
            return other.sample_independent(study, trial, param_name, param_distribution)

        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
            if then is not None:
                then.after_trial(study, trial, state, values)

    return QuasiRandom()


def import_optuna() -> Any:
    """Optuna, silent; an ImportError that says how to get it."""
    try:
        import optuna
    except ImportError:
        raise ImportError("the search engine needs optuna: pip install 'hf_recipe[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_storage(storage: str | Path) -> Any:
    """A database where `storage` is a URL, else a journal in that file."""
    optuna = import_optuna()
    if "://" in str(storage):
        return optuna.storages.RDBStorage(str(storage))
    path = Path(storage)
    path.parent.mkdir(parents=True, exist_ok=True)
    backend = optuna.storages.journal.JournalFileBackend(str(path))
    return optuna.storages.JournalStorage(backend)
