"""Dropout on any model: "add dropout; use it sparingly".

Configs name it in dozens of ways (``hidden_dropout_prob``, ``resid_pdrop``, ``attention_dropout``,
``classifier_dropout``), vision and language parts keep it in configs of their own, and attention
layers copy the number into attributes. `set_dropout` finds all of them, and says so when there are
none, since a change of dropout that changes nothing is easily taken for one that does not help.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)

NAMES = re.compile(r"dropout|(^|_)pdrop(_|$)|_drop$|drop_rate$|^drop_prob$")
# Whole layers or paths, not units; or switches and hyperparameters of something else.
NOT_UNITS = re.compile(r"layer_?drop|path|stochastic|connect|token|patch|layer_dropout|type|mask")
DEPTH = re.compile(
    r"layer_?drop$|drop_connect_rate$|drop_path(_rate)?$|stochastic_depth(_prob|_rate)?$"
)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


@dataclass(frozen=True)
class Changed:
    """What was set.

    Attributes:
        config: dotted name of each field -> the value it had.
        modules: dotted name of each module -> the value it had.
        rate: what all of them have now.
    """

    config: dict[str, float | None]
    modules: dict[str, float]
    rate: float

    def __bool__(self) -> bool:
        return bool(self.config or self.modules)

    def __str__(self) -> str:
        if not self:
            return "nothing was set: neither the config nor the modules have dropout"
        fields = ", ".join(f"{k} {'unset' if v is None else v}" for k, v in self.config.items())
        modules = f"{len(self.modules)} modules" if self.modules else ""
        return f"set to {self.rate:g}: {'; '.join(t for t in (fields, modules) if t)}"


def set_dropout(model_or_config: Any, p: float) -> Changed:
    """Set every dropout of a config (before the model is built) or of a built model to `p`.

    Dropout of whole layers or paths is left alone (`set_stochastic_depth`). A config's field that
    is None (``classifier_dropout``) follows another one and stays None, unless it is alone.

    Returns:
        What was set; false, and a warning is logged, where there was nothing to set.

    Raises:
        ValueError: `p` is not in [0, 1).
        TypeError: neither a config nor a module.
    """
    return _set(model_or_config, p, units=True)


def set_stochastic_depth(model_or_config: Any, p: float) -> Changed:
    """As `set_dropout`, for layers and residual paths that are dropped whole (Huang et al. 2016).

    In a built model that drops deeper paths more often, `p` is the deepest one's rate.
    """
    return _set(model_or_config, p, units=False)


def _set(target: Any, p: float, *, units: bool) -> Changed:
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p < 1:
        raise ValueError(f"a dropout rate is in [0, 1); got {p!r}")
    model = target if isinstance(target, nn.Module) else None
    config = getattr(target, "config", None) if model is not None else target
    if model is None and not (hasattr(config, "to_dict") and hasattr(config, "__dict__")):
        raise TypeError(f"set_dropout needs a config or a module; got {type(target).__name__}")
    fields = _set_fields(config, float(p), units) if config is not None else {}
    modules = _set_modules(model, float(p), units) if model is not None else {}
    changed = Changed(fields, modules, float(p))
    if not changed:
        logger.warning("%s: %s", type(target).__name__, changed)
    return changed


# ---------------------------------------------------------------- configs


def _set_fields(config: Any, p: float, units: bool) -> dict[str, float | None]:
    fields = [
        (holder, prefix, name, value)
        for holder, prefix in _configs(config)
        for name, value in list(vars(holder).items())
        if _is_rate(name, value, units)
    ]
    alone = all(value is None for *_, value in fields)
    found: dict[str, float | None] = {}
    for holder, prefix, name, value in fields:
        if value is not None or alone:
            setattr(holder, name, p)
            found[f"{prefix}{name}"] = None if value is None else float(value)
    return found


def _configs(config: Any, prefix: str = "") -> Iterator[tuple[Any, str]]:
    """A config and the configs in it, with the dotted prefix of their fields."""
    yield config, prefix
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _configs(value, f"{prefix}{name}.")


def _is_rate(name: str, value: Any, units: bool) -> bool:
    named = _names_units(name) if units else bool(DEPTH.search(name))
    if not named or isinstance(value, bool):
        return False
    return value is None or (isinstance(value, (int, float)) and 0 <= value <= 1)


def _names_units(name: str) -> bool:
    return bool(NAMES.search(name)) and not NOT_UNITS.search(name)


# ---------------------------------------------------------------- modules


def _set_modules(model: nn.Module, p: float, units: bool) -> dict[str, float]:
    return _set_units(model, p) if units else _set_depth(model, p)


def _set_units(model: nn.Module, p: float) -> dict[str, float]:
    found: dict[str, float] = {}
    for path, module in model.named_modules():
        if isinstance(module, DROPOUTS):
            found[path] = float(module.p)
            module.p = p
            continue
        if isinstance(module, nn.RNNBase) and module.num_layers == 1:
            continue  # it drops between its layers alone
        for name, value in list(vars(module).items()):
            if isinstance(value, float | int) and _is_rate(name, value, True):
                found[f"{path}.{name}" if path else name] = float(value)
                setattr(module, name, p)
    return found


def _set_depth(model: nn.Module, p: float) -> dict[str, float]:
    found: dict[str, float] = {}
    paths = [
        (path, module)
        for path, module in model.named_modules()
        if "DropPath" in type(module).__name__ or "StochasticDepth" in type(module).__name__
    ]
    for place, (path, module) in enumerate(paths, start=1):
        for name in ("drop_prob", "p"):
            value = getattr(module, name, None)
            if isinstance(value, float | int) and not isinstance(value, bool):
                found[f"{path}.{name}"] = float(value)
                setattr(module, name, p * place / len(paths))
    for path, module in model.named_modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float | int) and _is_rate(name, value, False):
                found[f"{path}.{name}" if path else name] = float(value)
                setattr(module, name, p)
    return found
