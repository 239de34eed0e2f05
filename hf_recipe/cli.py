"""`hf-recipe`: the recipe at the command line.

``explain``, ``env`` and ``report`` start without torch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

CLEAN, FOUND, USAGE, CRASHED = 0, 1, 2, 3
SEVERITIES = ("error", "warning", "note", "never")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 clean, 1 findings, 2 usage, 3 a crash)."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] != ["check"] and not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # bars are for a terminal
    if given[:1] == ["run"]:  # its flags are the main job's own
        from hf_recipe.runner.main import main as run

        return run(given[1:])
    if given[:1] == ["sweep"]:
        from hf_recipe.runner.sweep import main as sweep

        return sweep(given[1:])
    options = _parser().parse_args(given)
    try:
        return int(options.command(options))
    except UsageError as error:
        sys.stderr.write(f"hf-recipe: {error}\n")
        return USAGE


class UsageError(Exception):
    """What was asked for cannot work; one line."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-recipe", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[Any], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    add("run", _never, "the whole recipe, as scripts/recipe.py (hf-recipe run --help)")
    add("sweep", _never, "a search: init, run, report, point (hf-recipe sweep --help)")
    demo = add("demo", _demo, "three planted bugs on a tiny model, offline, found in seconds")
    demo.add_argument("--output_dir", default="recipe_demo")
    look = add("inspect", _inspect, "the data report on a file or a folder of images")
    look.add_argument("path", help="csv, tsv, json, jsonl, parquet or a folder of images")
    for name in ("label", "text", "image"):
        look.add_argument(f"--{name}", help=f"the {name}'s column")
    look.add_argument("--output_dir", default="recipe_data")
    look.add_argument("--fail_on", choices=SEVERITIES, default="error")
    for name, command, text in (
        ("review", _review, "look at suspect labels one by one; writes a patch file"),
        ("human", _human, "label rows yourself, blind: the human baseline"),
    ):
        asked = add(name, command, text)
        asked.add_argument("path", help="csv, tsv, json, jsonl, parquet or a folder of images")
        for column in ("label", "text", "image"):
            asked.add_argument(f"--{column}", help=f"the {column}'s column")
        asked.add_argument("--split", help="default: the first")
        asked.add_argument("--count", type=_positive, default=100, help="rows at most")
        asked.add_argument("--web", action="store_true", help="a page on this machine")
        if name == "review":
            asked.add_argument("--out", default="labels.patch.jsonl")
        else:
            asked.add_argument("--output_dir", default="recipe_human")
            asked.add_argument("--annotator", type=_name, default="me", help="names the file")
            asked.add_argument("--seed", type=int, default=0)
    check = add("check", _check, "a training script as it is, up to its first step")
    check.add_argument("--fail_on", choices=SEVERITIES, default="error")
    check.add_argument("script", help="a Python file that calls Trainer.train()")
    check.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")
    explain = add("explain", _explain, "what a check says, why, and what mends it")
    explain.add_argument("name", nargs="?", help="a check; without one, all are listed")
    add("env", _env, "versions and devices, to paste into an issue")
    report = add("report", _report, "a stored report as html, sarif, markdown or on the console")
    report.add_argument("file", help="report.json")
    report.add_argument("--to", help="a path that ends in .html, .sarif or .md")
    autopsy = add("autopsy", _autopsy, "what a run's folder still tells: report and trainer state")
    autopsy.add_argument("folder")
    return parser


def _never(options: Any) -> int:
    raise UsageError("unreachable: run is taken before parsing")


# ------------------------------------------------------------------ explain, env


def _explain(options: Any) -> int:
    from hf_recipe.explanation import explain, stored_checks

    checks = stored_checks()
    if options.name is None:
        for name, entry in checks.items():
            print(f"{name:<32} {entry['stage']:<11} {entry['severity']:<8}")
        return CLEAN
    try:
        print(explain(options.name))
    except ValueError as error:
        raise UsageError(str(error)) from None
    return CLEAN


def _env(options: Any) -> int:
    import importlib.metadata
    import os
    import platform

    print(f"hf_recipe     {_version()}")
    print(f"python        {platform.python_version()}  {platform.platform()}")
    print(f"cpu           {os.cpu_count()} cores")
    packages = ["torch", "transformers", "accelerate", "datasets", "evaluate", "wandb"]
    for package in [*packages, "numpy", "scikit-learn", "scipy", "rich", "optuna", "peft"]:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{package:<13} {version}")
    return CLEAN


def _version() -> str:
    import hf_recipe

    return hf_recipe.__version__


# ------------------------------------------------------------------ reports


def _read_report(path: str) -> Any:
    from hf_recipe.core.report import Report

    try:
        return Report.from_json(path)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is not a report: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON, line {error.lineno} column {error.colno}: {error.msg}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _report(options: Any) -> int:
    report = _read_report(options.file)
    if options.to is None:
        _say(report, None)
        return CLEAN
    from hf_recipe.core.report import write_atomically

    suffix = Path(options.to).suffix.lower()
    if suffix in (".html", ".htm"):
        report.to_html(options.to)
    elif suffix in (".sarif", ".json"):
        report.to_sarif(options.to)
    elif suffix in (".md", ".markdown"):
        write_atomically(options.to, report.to_markdown())
    else:
        raise UsageError(f"--to must end in .html, .sarif or .md; got {options.to}")
    print(f"wrote {options.to}")
    return CLEAN


def _say(report: Any, path: str | None) -> None:
    from hf_recipe.report.console import ConsoleSink

    ConsoleSink(stream=sys.stdout).summary(report, path)


def _autopsy(options: Any) -> int:
    folder = Path(options.folder)
    if not folder.is_dir():
        raise UsageError(f"no such folder: {folder}")
    reports = sorted(folder.rglob("report.json"), key=lambda p: len(p.parts))
    states = sorted(folder.rglob("trainer_state.json"), key=lambda p: p.stat().st_mtime)
    if not reports and not states:
        raise UsageError(f"{folder} holds neither a report.json nor a trainer_state.json")
    if states:
        _tell_state(states[-1])
    if not reports:
        return CLEAN
    report = _read_report(str(reports[0]))
    print(f"report: {reports[0]}, {report.status}")
    _say(report, str(reports[0]))
    return FOUND if report.at_least("error") else CLEAN


def _tell_state(path: Path) -> None:
    state = json.loads(path.read_text(encoding="utf-8"))
    step, planned = state.get("global_step"), state.get("max_steps")
    print(f"state:  {path}, step {step} of {planned}")
    history = state.get("log_history", [])
    for key in ("loss", "eval_loss"):
        values = [(h["step"], h[key]) for h in history if key in h]
        if values:
            low = min(values, key=lambda pair: pair[1])
            print(
                f"        {key}: first {values[0][1]:.4f} (step {values[0][0]}), "
                f"lowest {low[1]:.4f} (step {low[0]}), last {values[-1][1]:.4f}"
            )


# ------------------------------------------------------------------ inspect, check, demo


def _inspect(options: Any) -> int:
    from hf_recipe.inspection import inspect_dataset

    with _launched() as leads:
        try:
            report = inspect_dataset(
                options.path, label=options.label, text=options.text, image=options.image,
                together=True, rows_path=Path(options.output_dir) / "rows.parquet",
            )  # fmt: skip
        except (ValueError, TypeError, OSError) as error:
            raise UsageError(str(error).splitlines()[0]) from None
    if not leads:
        return CLEAN
    _name_file(report, options.path)
    folder = Path(options.output_dir)
    report.to_json(folder / "report.json")
    report.to_html(folder / "report.html")
    print(f"columns   {report.answers[0].answer}")
    _say(report, str(folder / "report.html"))
    return exit_code(report, options.fail_on)


@contextlib.contextmanager
def _launched() -> Iterator[bool]:
    """The group of a launch by torchrun or accelerate; yields whether this process leads it."""
    import torch.distributed as dist

    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and dist.is_available()
    if not launched:
        yield True
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank() == 0
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _name_file(report: Any, path: str) -> None:
    """Fixes that go on with this file name it."""
    import dataclasses
    import shlex

    for place, finding in enumerate(report.flat):
        _, known, command = (finding.fix or "").rpartition("hf-recipe review rows.parquet")
        if known:
            fix = f"hf-recipe review {shlex.quote(path)}{command}"
            report.flat[place] = dataclasses.replace(finding, fix=fix)


def exit_code(report: Any, fail_on: str) -> int:
    """What the shell is told of a report."""
    if fail_on != "never" and report.at_least(fail_on):
        return FOUND
    return CRASHED if report.crashed else CLEAN


def _check(options: Any) -> int:
    from hf_recipe.runner.script import ScriptFailed, check_script

    if not Path(options.script).is_file():
        raise UsageError(f"no such script: {options.script}")
    try:
        report = check_script(options.script, options.arguments)
    except ScriptFailed as error:
        raise UsageError(str(error)) from None
    return exit_code(report, options.fail_on)


def _review(options: Any) -> int:
    from hf_recipe.runner.asking import review

    return _asked(review, options)


def _human(options: Any) -> int:
    from hf_recipe.runner.asking import human

    return _asked(human, options)


def _asked(command: Callable[[Any], int], options: Any) -> int:
    try:
        return command(options)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error).splitlines()[0]) from None


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"a number of 1 or more; got {text}")
    return int(text)


def _name(text: str) -> str:
    if not text.replace("-", "").replace("_", "").isalnum():
        raise argparse.ArgumentTypeError(f"letters, digits, - and _; got {text}")
    return text


def _demo(options: Any) -> int:
    from hf_recipe.runner.demo import run

    return run(Path(options.output_dir))


if __name__ == "__main__":
    sys.exit(main())
