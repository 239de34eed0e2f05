"""``hf-recipe sweep``: write a sweep, run it here or one of its points, analyse any study."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hf_recipe.core.report import write_atomically
from hf_recipe.tune.analysis import analyse
from hf_recipe.tune.command import expand
from hf_recipe.tune.engines import SEARCHES, OptunaEngine
from hf_recipe.tune.search_spaces import Known, plan_search
from hf_recipe.tune.space import parameters_of
from hf_recipe.tune.study import name_of
from hf_recipe.tune.wandb_sweep import (
    FLAVOURS,
    METHODS,
    POINT,
    Launch,
    read_points,
    sweep_config,
    write_sweep,
)
from hf_recipe.tune.worker import TrialsFail, Worker

OWN = "scripts/recipe.py"
MODULE = "hf_recipe.runner.main"


class SweepError(Exception):
    """What was asked for cannot work; one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SweepError(message)


def main(arguments: Sequence[str]) -> int:
    """Run ``hf-recipe sweep ...``; 0, 1 where no trial finished, 2 usage."""
    given, rest = list(arguments), []
    if "--" in given:
        at = given.index("--")
        given, rest = given[:at], given[at + 1 :]
    try:
        options = _parser().parse_args(given)
        return int(options.command(options, rest))
    except (SweepError, ValueError, ImportError, TrialsFail) as error:
        sys.stderr.write(f"hf-recipe sweep: {error}\n")
        return 1 if isinstance(error, TrialsFail) else 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="hf-recipe sweep", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    def add(name: str, command: Callable[..., int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    init = add("init", _init, "write sweep.yaml; the script's own arguments follow after --")
    init.add_argument("--output", default="sweep.yaml")
    init.add_argument("--flavour", choices=FLAVOURS, default="wandb")
    init.add_argument("--method", choices=METHODS, default="random")
    init.add_argument("--trials", type=int, default=16)
    init.add_argument("--processes", type=int, default=1, help="per trial")
    init.add_argument("--cpu", action="store_true", help="processes on processors, not on devices")
    init.add_argument("--program", help="a script of your own; default: the recipe's main job")
    init.add_argument("--metric", default="eval/loss", help="as W&B sees it")
    init.add_argument("--maximize", action="store_true")
    init.add_argument("--learning_rate", type=float, help="where the search is centred")
    init.add_argument("--scientific", default="", help="names that are asked about, with commas")
    init.add_argument("--seed", type=int, default=0, help="of the quasi-random points")
    run = add("run", _run, "run a sweep.yaml on this machine, without an account")
    run.add_argument("config")
    run.add_argument("--trials", type=int, help="of the whole study; default: its run_cap")
    run.add_argument("--output_dir", default="sweep_output", help="shared by all workers")
    run.add_argument("--storage", help="a file or a database's URL that all workers share")
    run.add_argument("--name", default="study")
    run.add_argument("--workers", type=int, default=1, help="on this machine")
    run.add_argument("--search", choices=SEARCHES, default="quasi_random")
    run.add_argument("--explore", type=int, default=16, help="trials before bayes begins")
    run.add_argument("--halving", action="store_true", help="stop what is behind two thirds")
    run.add_argument("--seed", type=int, default=0)
    report = add("report", _report, "analyse a study, wherever it was run, into one page")
    report.add_argument("config", help="the sweep.yaml: what was searched, and for which metric")
    report.add_argument("source", help="Optuna's storage, W&B's export (csv, json), or a folder")
    report.add_argument("--study", help="which one, of a storage that holds several")
    report.add_argument("--output", default="study.html")
    point = add("point", _point, "run one of the points that were drawn; the command follows --")
    point.add_argument("points", help="sweep.points.json")
    point.add_argument(f"--{POINT}", type=int, required=True)
    return parser


# ------------------------------------------------------------------ init


def _init(options: Any, rest: Sequence[str]) -> int:
    path = Path(options.output)
    if options.processes < 1:
        raise SweepError(f"--processes must be at least 1; got {options.processes}")
    launch, known = _launch(options, rest)
    scientific = [name.strip() for name in options.scientific.split(",") if name.strip()]
    plan = plan_search(options.trials, known, scientific=scientific)
    content = sweep_config(
        plan.space,
        launch,
        flavour=options.flavour,
        method=options.method,
        trials=options.trials,
        metric=options.metric,
        greater_is_better=options.maximize,
        name=str(path.with_suffix("")),
    )
    written = write_sweep(path, content, plan.space, trials=options.trials, seed=options.seed)
    for name, role, why in plan.table():
        _say(f"  {name:<28} {role:<10}  {why}")
    _say(f"wrote {', '.join(map(str, written))}")
    return 0


def _launch(options: Any, rest: Sequence[str]) -> tuple[Launch, Known]:
    """How trials are started, and the arguments at hand."""
    processes, cpu = options.processes, options.cpu
    if options.program:
        if not Path(options.program).is_file():
            raise SweepError(f"--program: no such file: {options.program}")
        launch = Launch(options.program, tuple(rest), processes, cpu)
        return launch, _known_of_script(options.learning_rate, rest)
    from hf_recipe.runner.options import UsageError, parse

    try:
        asked = parse([*rest, *(["--use_cpu"] if cpu else [])])
        known = _known_of_recipe(options.learning_rate, asked)
    except UsageError as error:
        raise SweepError(str(error)) from None
    fixed = ("--trial", *(() if "report_to" in asked.given else ("--report_to=wandb",)), *rest)
    module = not Path(OWN).is_file()
    return Launch(MODULE if module else OWN, fixed, processes, cpu, module), known


def _known_of_recipe(rate: float | None, asked: Any) -> Known:
    from hf_recipe.runner.data import load
    from hf_recipe.runner.setup import RATES

    pretrained = asked.model.model_name_or_path is not None
    if rate is None and "learning_rate" in asked.given:
        rate = float(asked.training.learning_rate)
    if rate is None:
        rate = RATES["pretrained" if pretrained else _ladder(load(asked))]
    return Known(
        rate,
        pretrained,
        str(asked.training.lr_scheduler_type.value),
        str(asked.training.optim.value),
        asked.given,
        ("dropout",),
    )


def _ladder(data: Any) -> str:
    name: str = data.task.ladder(data.kind)
    return name


def _known_of_script(rate: float | None, rest: Sequence[str]) -> Known:
    """What a foreign script's own arguments tell; its names are the Trainer's."""
    said: dict[str, str] = {}
    words = list(rest)
    for place, word in enumerate(words):
        if word.startswith("--"):
            name, sign, value = word[2:].partition("=")
            following = words[place + 1] if place + 1 < len(words) else ""
            said[name] = value if sign else following
    if rate is None:
        rate = float(said.get("learning_rate", 5e-5))
    return Known(
        rate,
        "model_name_or_path" in said,
        said.get("lr_scheduler_type", "linear"),
        said.get("optim", "adamw_torch"),
        said,
    )


# ------------------------------------------------------------------ run


def _run(options: Any, rest: Sequence[str]) -> int:
    if rest:
        raise SweepError(f"not understood: {rest[0]!r}")
    config = read_sweep(options.config)
    space, goal = config["parameters"], config.get("metric") or {}
    trials = options.trials or config.get("run_cap") or 16
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    engine = OptunaEngine(
        space,
        storage=options.storage or folder / "study.journal",
        name=options.name,
        metric=goal.get("name", "eval/loss"),
        greater_is_better=goal.get("goal") == "maximize",
        search=options.search,
        explore=options.explore,
        halving=options.halving,
        seed=options.seed,
    )
    others = [subprocess.Popen(_same(options)) for _ in range(options.workers - 1)]
    worker = Worker(
        engine,
        _here(config.get("command") or []),
        folder,
        trials,
        program=str(config.get("program", "")),
        interpreter=sys.executable,
        say=_say,
    )
    try:
        worker.run()
    finally:
        for other in others:
            other.wait()
    return _close(engine, folder)


def _same(options: Any) -> list[str]:
    """The command line of one more worker of this search."""
    words = [sys.executable, "-m", "hf_recipe.cli", "sweep", "run", options.config]
    for name in ("trials", "output_dir", "storage", "name", "search", "explore", "seed"):
        value = getattr(options, name)
        words += [f"--{name}", str(value)] if value is not None else []
    return words + (["--halving"] if options.halving else [])


def read_sweep(path: str | Path) -> dict[str, Any]:
    """A sweep.yaml that can be run here.

    Raises:
        SweepError: no such file, no YAML of a sweep, or one that only a server can run.
    """
    import yaml

    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SweepError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SweepError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(config, Mapping) or not isinstance(config.get("parameters"), Mapping):
        raise SweepError(f"{path} holds no `parameters:` to search")
    if list(config["parameters"]) == [POINT]:
        raise SweepError(f"{path} is an index grid for W&B; write one with --flavour wandb")
    if not config.get("command") and not config.get("program"):
        raise SweepError(f"{path} names neither a program nor a command")
    return dict(config)


def _here(command: Sequence[str]) -> list[str]:
    """The command without W&B, which has no agent here, and with a folder of each trial's own."""
    words = iter(map(str, command))
    out = []
    for word in words:
        name, sign, value = word.partition("=")
        if name not in ("--report_to", "--output_dir"):
            out.append(word)
            continue
        value = value if sign else next(words, "")
        told = "${folder}" if name == "--output_dir" else "none" if value == "wandb" else value
        out.append(f"{name}={told}")
    return out


def _close(engine: OptunaEngine, folder: Path) -> int:
    trials = engine.trials()
    finished = [t for t in trials if t["state"] == "complete"]
    if not finished:
        raise TrialsFail(f"none of {len(trials)} trials finished; their logs are in {folder}")
    report = analyse(trials, engine.space, engine.metric, engine.greater_is_better)
    report.to_html(folder / "study.html")
    report.to_json(folder / "study.json")
    best = (max if engine.greater_is_better else min)(finished, key=lambda t: t["value"])
    write_atomically(folder / "best.yaml", _yaml(best["params"]))
    _say(f"best: trial {best['number']}, {engine.metric} {best['value']:.4f}, {best['params']}")
    for finding in report.findings:
        _say(f"  {finding.severity}: {finding.check}: {finding.message}")
    _say(f"wrote {folder / 'study.html'}, {folder / 'best.yaml'} (the best trial's flags)")
    return 0


def _report(options: Any, rest: Sequence[str]) -> int:
    from hf_recipe.tune.sources import read_trials

    config = read_sweep(options.config)
    space, goal = config["parameters"], config.get("metric") or {}
    metric = goal.get("name", "eval/loss")
    names = [name_of(parameter) for parameter in parameters_of(space) if parameter.varies]
    trials = read_trials(options.source, names, metric, study=options.study)
    if not trials:
        raise SweepError(f"{options.source} holds no finished trial of {', '.join(names)}")
    report = analyse(trials, space, metric, goal.get("goal") == "maximize")
    report.to_html(options.output)
    for finding in report.findings:
        _say(f"  {finding.severity}: {finding.check}: {finding.message}")
    _say(f"{len(trials)} trials; wrote {options.output}")
    return 0


def _yaml(params: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(params), sort_keys=False))


# ------------------------------------------------------------------ point


def _point(options: Any, rest: Sequence[str]) -> int:
    points, number = read_points(options.points), getattr(options, POINT)
    if not rest:
        raise SweepError("the command to run follows after --")
    if not 0 <= number < len(points):
        raise SweepError(f"--{POINT} must lie between 0 and {len(points) - 1}; got {number}")
    words = expand([*rest, "${args}"], points[number])
    sys.stdout.flush()
    os.execvp(words[0], words)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
