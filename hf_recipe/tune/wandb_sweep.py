"""A sweep for Weights & Biases that runs as it is, on several processes and machines.

    hf-recipe sweep init && wandb sweep sweep.yaml && wandb agent ...     # one agent per machine

Each trial is one ``accelerate launch`` of the script. The values arrive as flags, so that every
rank gets the same ones; the script's rank 0 alone opens the agent's run. Three flavours:

    wandb       W&B's own random or Bayesian search, with hyperband's early stopping
    scheduler   W&B's local scheduler with Optuna: quasi-random points, on servers that have it
    index       a grid over the numbers of points drawn beforehand: quasi-random on any server

The metric is ``eval/loss``, which is how the Trainer's ``eval_loss`` is seen at W&B.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_recipe.tune.space import parameters_of, quasi_random
from hf_recipe.tune.study import flat, name_of

FLAVOURS = ("wandb", "scheduler", "index")
METHODS = ("random", "bayes")
POINT = "point"  # the index flavour's only parameter
# What W&B's hyperband counts are evaluations: the first look at the second, then every third.
HYPERBAND = {"type": "hyperband", "min_iter": 2, "eta": 3}
SCHEDULED = ("constant", "categorical", "int_uniform", "uniform", "log_uniform_values", "q_uniform")

SOURCE = '''"""The study that W&B's scheduler asks: quasi-random points, {trials} of them."""

from hf_recipe.tune.wandb_sweep import scheduled_study


def make_study(sweep):
    """(study, when to stop), as `scheduler: {{engine: optuna}}` wants them."""
    return scheduled_study(sweep.config, trials={trials}, seed={seed})
'''


@dataclass(frozen=True)
class Launch:
    """How a trial is started.

    Attributes:
        program: the script; "" for this package's own, by its module.
        arguments: the script's fixed arguments.
        processes: per trial.
        cpu: on processors alone: Accelerate then starts several processes as for devices, and
            the script is told ``--use_cpu``.
        module: program is a module's name.
    """

    program: str = "scripts/recipe.py"
    arguments: tuple[str, ...] = ()
    processes: int = 1
    cpu: bool = False
    module: bool = False

    @property
    def words(self) -> list[str]:
        """``accelerate launch`` up to the script's fixed arguments.

        ``--cpu`` would start a single process whatever their number; a free port is taken, so
        that two agents can share a machine.
        """
        launch = ["accelerate", "launch", f"--num_processes={self.processes}"]
        launch += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
        if self.processes > 1:
            launch += ["--multi_gpu", "--main_process_port=0"]
        launch += ["--module"] if self.module else []
        fixed = list(self.arguments) + (["--use_cpu"] if self.cpu else [])
        return [*launch, "${program}", *fixed]


def sweep_config(
    space: Mapping[str, Any],
    launch: Launch,
    *,
    flavour: str = "wandb",
    method: str = "random",
    trials: int = 16,
    metric: str = "eval/loss",
    greater_is_better: bool = False,
    name: str = "sweep",
) -> dict[str, Any]:
    """The content of sweep.yaml.

    Args:
        space: as in a W&B sweep's ``parameters``; nested names are flattened.
        name: of the files beside it, with their folder as agents see it:
            ``<name>_study.py``, ``<name>.points.json``.

    Raises:
        ValueError: an unknown flavour or method; a distribution that the flavour has no word for.
    """
    if flavour not in FLAVOURS:
        raise ValueError(f"flavour must be one of {', '.join(FLAVOURS)}; got {flavour!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    parameters = flattened(space)
    goal = {"name": metric, "goal": "maximize" if greater_is_better else "minimize"}
    content: dict[str, Any] = {"program": launch.program, "metric": goal}
    if flavour == "wandb":
        return content | {
            "method": method,
            "run_cap": trials,
            "early_terminate": dict(HYPERBAND),
            "parameters": parameters,
            "command": ["${env}", *launch.words, "${args}"],
        }
    if flavour == "scheduler":
        for parameter in parameters_of(parameters):
            if parameter.distribution not in SCHEDULED:
                raise ValueError(
                    f"{name_of(parameter)}: W&B's scheduler has no {parameter.distribution}; "
                    f"known there: {', '.join(SCHEDULED)}"
                )
        scheduler = {"engine": "optuna", "source": f"{name}_study.py", "optimizer": "make_study"}
        return content | {
            "method": "custom",
            "scheduler": scheduler,
            "parameters": parameters,
            "command": ["${env}", *launch.words, "${args}"],
        }
    point = ["python", "-m", "hf_recipe.cli", "sweep", "point", f"{name}.points.json", "${args}"]
    return content | {
        "method": "grid",
        "parameters": {POINT: {"values": list(range(trials))}},
        "command": ["${env}", *point, "--", *launch.words],
    }


def flattened(space: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A space without nesting: flags have no levels, dotted names have."""
    found: dict[str, Any] = {}
    for name, given in space.items():
        if isinstance(given, Mapping) and "parameters" in given:
            found |= flattened(given["parameters"], f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = dict(given)
    return found


def write_sweep(
    path: str | Path,
    content: Mapping[str, Any],
    space: Mapping[str, Any],
    *,
    trials: int,
    seed: int,
) -> list[Path]:
    """Write sweep.yaml and what it needs beside it; the files' paths."""
    import yaml

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(dict(content), sort_keys=False, width=100)
    path.write_text(f"{_header(path, content, trials)}{text}", encoding="utf-8")
    written = [path]
    if "scheduler" in content:
        source = Path(content["scheduler"]["source"])
        source.write_text(SOURCE.format(trials=trials, seed=seed), encoding="utf-8")
        written.append(source)
    elif POINT in content["parameters"]:
        points = path.with_name(f"{path.stem}.points.json")  # as `sweep_config` names it
        drawn = [dict(flat(point)) for point in quasi_random(space, trials, seed)]
        kept = {"space": dict(space), "seed": seed, "points": drawn}
        points.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        written.append(points)
    return written


def _header(path: Path, content: Mapping[str, Any], trials: int) -> str:
    """How the file is used, as comments above it."""
    agents = "on each machine: wandb agent ENTITY/PROJECT/ID"
    lines = [f"wandb sweep {path.name}; then {agents}"]
    if "scheduler" in content:
        lines = [f"wandb sweep {path.name}; then, once and here: wandb sweep-scheduler SWEEP;"]
        lines += [agents]
    if any(str(word).startswith("--output_dir") for word in content["command"]):
        lines += [
            "Agents on one machine share --output_dir: in a script of your own, add",
            "os.environ['WANDB_RUN_ID'] to it.",
        ]
    if POINT not in content["parameters"]:
        number = "" if "run_cap" in content else f" --trials {trials}"
        lines.append(f"Without an account: hf-recipe sweep run {path.name}{number}")
    return "".join(f"# {line}\n" for line in lines)


def read_points(path: str | Path) -> list[dict[str, Any]]:
    """The points that the index flavour wrote.

    Raises:
        ValueError: the file holds none.
    """
    try:
        points = json.loads(Path(path).read_text(encoding="utf-8"))["points"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no points of a sweep: {error}") from None
    return [dict(point) for point in points]


def scheduled_study(config: Mapping[str, Any], *, trials: int, seed: int) -> tuple[Any, Any]:
    """(study, terminator) for W&B's scheduler: quasi-random points until `trials` are done.

    The study lives as long as the scheduler, which builds it again from the server's runs.

    Args:
        config: of the sweep, as the scheduler knows it.
    """
    from hf_recipe.tune.optuna_points import import_optuna, quasi_random_sampler

    optuna = import_optuna()
    goal = str((config.get("metric") or {}).get("goal", "minimize"))
    study = optuna.create_study(
        direction=goal,
        sampler=quasi_random_sampler(config["parameters"], seed),
        pruner=optuna.pruners.NopPruner(),
    )

    def done(study: Any) -> bool:
        return sum(bool(trial.state.is_finished()) for trial in study.trials) >= trials

    return study, done
