"""A rehearsal of evaluation: what would have failed after the first epoch fails now.

Two small evaluation batches go through the Trainer's own `prediction_step`, are gathered as its
evaluation loop gathers them, and reach `preprocess_logits_for_metrics` and `compute_metrics`.

A metric may legitimately need more rows than two batches hold, so a failing one is tried again on
the same predictions repeated to the length of the whole set, before anything is said.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.trainer_pt_utils import EvalLoopContainer
from transformers.trainer_utils import EvalPrediction, denumpify_detensorize

from hf_recipe.baselines.loss_units import local_count
from hf_recipe.core.check import Check, Located, Measurement, Probe, Skip, private
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.batches import Rows, stream_reason
from hf_recipe.instruments.callables import place_of, undisturbed
from hf_recipe.instruments.overrides import own_method, replaces
from hf_recipe.instruments.subject import Subject

ROWS = 4  # rows of the first of the two batches; the second holds one less, as a last batch may
SEARCHED = 256  # rows among which different classes are looked for
REPEATED_BYTES = 256 * 2**20  # most memory that repeated predictions may take


@dataclass(frozen=True)
class EvaluationRehearsal(Measurement):
    """What became of two evaluation batches.

    Attributes:
        rows, total_rows: rows rehearsed, rows of the evaluation set.
        failed_in: "collate", "prediction_step", "preprocess_logits_for_metrics", "compute_metrics"
            or "" where nothing failed.
        error, place: type of the exception; file and line, in the user's own code where possible.
        text: its message, which may quote data.
        whole_set: a failing metric was also tried at the length of the whole set.
        loss, labels, predictions: whether `prediction_step` gave them.
        returned: type of what `compute_metrics` returned, "" where it was not called.
        metric_names: its keys, without the prefix.
        computes_metrics, scheduled: `compute_metrics` was given; a strategy evaluates.
        stock_step: `prediction_step` is the Trainer's own.
        not_serialisable: those whose values no checkpoint's ``trainer_state.json`` can hold.
    """

    rows: int
    total_rows: int
    failed_in: str = ""
    error: str = ""
    place: str = ""
    text: str = private(default="")
    whole_set: bool = False
    loss: bool = True
    labels: bool = True
    predictions: bool = True
    returned: str = ""
    metric_names: tuple[str, ...] = ()
    not_serialisable: tuple[str, ...] = ()
    computes_metrics: bool = False
    scheduled: bool = True
    stock_step: bool = True


class _Failed(Exception):
    """Where the rehearsal broke off; its cause is the user's exception."""


@contextlib.contextmanager
def _during(stage: str) -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise  # ours: the rehearsal asked for more than was free
    except Exception as error:  # whatever the user's code raises is what is measured
        raise _Failed(stage) from error


# ---------------------------------------------------------------- the probe


def rehearse_evaluation(subject: Subject) -> Iterator[Located]:
    """Yield what becomes of two batches of every evaluation set."""
    trainer = subject.trainer
    if trainer is None:
        raise Skip("without the Trainer its prediction_step cannot be rehearsed")
    for name in ("evaluate", "evaluation_loop"):
        if replaces(trainer, name):
            raise Skip(f"{name} is replaced: its steps are not known")
    if not subject.evaluation:
        raise Skip("there is no evaluation set")
    if reason := subject.overridden("evaluation"):
        raise Skip(reason)
    readable = [r for r in subject.evaluation.values() if not stream_reason(r) and len(r)]
    if not readable:
        raise Skip("the evaluation data is a stream: reading ahead would eat it")
    subject.model.eval()
    for rows in readable:
        with local_count(trainer.args), _kept_generation_config(subject.model):
            yield Located(_rehearse(subject, rows), rows.name)


def _rehearse(subject: Subject, rows: Rows) -> EvaluationRehearsal:
    stage = _Rehearsal(subject, rows)
    try:
        stage.predict()
        stage.compute()
    except _Failed as failure:
        error = failure.__cause__ or failure
        return stage.outcome(
            failed_in=str(failure),
            error=type(error).__name__,
            place=place_of(error),
            text=str(error),
        )
    return stage.outcome()


@dataclass
class _Rehearsal:
    """One evaluation set's two batches on their way to the metrics."""

    subject: Subject
    rows: Rows
    done: int = 0
    whole_set: bool = False
    result: Any = None
    called: bool = False
    batches: list[tuple[Any, Any, Any, Any]] = field(default_factory=list)

    def predict(self) -> None:
        """Collate, predict and preprocess two batches."""
        trainer, subject = self.subject.trainer, self.subject
        loss_only = trainer.args.prediction_loss_only or trainer.compute_metrics is None
        for chosen in _two_batches(subject, self.rows):
            with _during("collate"):
                inputs = self.rows.batch(chosen).to(subject.device).inputs
            with _during("prediction_step"):
                loss, logits, labels = own_method(trainer, "prediction_step")(
                    subject.model, inputs, loss_only, **_generation_arguments(trainer)
                )
            if logits is not None and trainer.preprocess_logits_for_metrics is not None:
                with _during("preprocess_logits_for_metrics"):
                    logits = trainer.preprocess_logits_for_metrics(logits, labels)
            self.done += len(chosen)
            self.batches.append((loss, logits, labels, inputs))

    def compute(self) -> None:
        """Call a copy of `compute_metrics` as the evaluation loop would."""
        trainer = self.subject.trainer
        given = all(b[1] is not None and b[2] is not None for b in self.batches)
        if trainer.compute_metrics is None or not given:
            return
        self.called = True
        with undisturbed(trainer.compute_metrics) as compute:
            if trainer.args.batch_eval_metrics:
                with _during("compute_metrics"):
                    self._batch_by_batch(compute)
                return
            with _during("prediction_step"):  # batches that do not fit together
                gathered = self._gathered()
            with _during("compute_metrics"):
                try:
                    self.result = compute(EvalPrediction(**gathered))
                except Exception:
                    whole = self._repeated(gathered)
                    if whole is None:
                        raise
                    self.whole_set = True
                    self.result = compute(EvalPrediction(**whole))

    def _batch_by_batch(self, compute: Callable[..., Any]) -> None:
        include = self.subject.args.include_for_metrics
        for number, (loss, logits, labels, inputs) in enumerate(self.batches, 1):
            self.result = compute(
                EvalPrediction(
                    predictions=logits,
                    label_ids=labels,
                    losses=self._per_row(loss) if "loss" in include else None,
                    inputs=inputs if "inputs" in include else None,
                ),
                compute_result=number == len(self.batches),
            )

    def _per_row(self, loss: torch.Tensor | None) -> torch.Tensor | None:
        return None if loss is None else loss.repeat(self.subject.args.eval_batch_size)

    def _gathered(self) -> dict[str, Any]:
        args = self.subject.args
        include, join = args.include_for_metrics, args.eval_do_concat_batches
        main_input = getattr(self.subject.model, "main_input_name", "input_ids")
        columns: dict[str, list[Any]] = {
            "predictions": [b[1] for b in self.batches],
            "label_ids": [b[2] for b in self.batches],
            "losses": [self._per_row(b[0]) for b in self.batches] if "loss" in include else [],
            "inputs": [b[3][main_input] for b in self.batches] if "inputs" in include else [],
        }
        gathered = {}
        for name, values in columns.items():
            container = EvalLoopContainer(join, padding_index=-100)
            for value in values:
                if value is not None:
                    container.add(value)
            gathered[name] = container.get_arrays()
        return gathered

    def _repeated(self, gathered: dict[str, Any]) -> dict[str, Any] | None:
        """The gathered arrays repeated to the whole set's length; None where that is too much."""
        total = len(self.rows)
        size = sum(_nbytes(value) for value in gathered.values())
        if self.done >= total or size * total / self.done > REPEATED_BYTES:
            return None
        if not self.subject.args.eval_do_concat_batches:
            copies = -(-total // self.done)
            return {k: None if v is None else list(v) * copies for k, v in gathered.items()}
        return {name: _tiled(value, total) for name, value in gathered.items()}

    def outcome(self, **failure: Any) -> EvaluationRehearsal:
        """The measurement, with what was reached so far."""
        trainer, result = self.subject.trainer, self.result
        names = tuple(str(k) for k in result) if isinstance(result, Mapping) else ()
        self.subject.cache.setdefault("metric names", {})[self.rows.name] = names
        return EvaluationRehearsal(
            rows=self.done,
            total_rows=len(self.rows),
            whole_set=self.whole_set,
            loss=all(b[0] is not None for b in self.batches),
            labels=all(b[2] is not None for b in self.batches),
            predictions=all(b[1] is not None for b in self.batches),
            returned=type(result).__name__ if self.called and not failure else "",
            metric_names=names,
            not_serialisable=_not_serialisable(result) if isinstance(result, Mapping) else (),
            computes_metrics=trainer.compute_metrics is not None,
            scheduled=str(getattr(trainer.args.eval_strategy, "value", "no")) != "no",
            stock_step=not replaces(trainer, "prediction_step"),
            **failure,
        )


def _two_batches(subject: Subject, rows: Rows) -> list[list[int]]:
    """Row numbers of two batches, the second one smaller; different classes come first."""
    size = min(ROWS, int(subject.args.per_device_eval_batch_size))
    wanted = size + max(size - 1, 1)
    first_of_class: dict[Any, int] = {}
    for index, label in _classes(rows):
        first_of_class.setdefault(label, index)
    spaced = rows.evenly_spaced(wanted)
    chosen = list(dict.fromkeys([*first_of_class.values(), *spaced]))[:wanted]
    return [part for part in (chosen[:size], chosen[size:]) if part]


def _classes(rows: Rows) -> Iterator[tuple[int, Any]]:
    """Row numbers and classes, where rows have one class each and it is cheap to read."""
    import datasets

    read = rows.read
    if not isinstance(read, datasets.Dataset) or read.format["type"] == "custom":
        return
    name = next((n for n in ("labels", "label") if n in read.column_names), None)
    if name is None:
        return
    for index in rows.evenly_spaced(SEARCHED):
        value = read.select_columns([name])[index][name]
        value = value.item() if hasattr(value, "item") and np.ndim(value) == 0 else value
        if not isinstance(value, (int, str)):
            return
        yield index, value


def _generation_arguments(trainer: Any) -> dict[str, Any]:
    """What `Seq2SeqTrainer.evaluate` would hand on to `generate`."""
    args = trainer.args
    if not getattr(args, "predict_with_generate", False):
        return {}
    given = {"max_length": args.generation_max_length, "num_beams": args.generation_num_beams}
    return {name: value for name, value in given.items() if value is not None}


@contextlib.contextmanager
def _kept_generation_config(model: Any) -> Iterator[None]:
    """Generating fills in generation configs, and a wrapper's replaces the inner one: put back."""
    name = "generation_config"
    kept = {id(m): (m, vars(m)[name]) for m in model.modules() if name in vars(m)}
    for module, config in kept.values():
        setattr(module, name, copy.deepcopy(config))
    try:
        yield
    finally:
        for module, config in kept.values():
            setattr(module, name, config)


def _nbytes(value: Any) -> int:
    if isinstance(value, (list, tuple, Mapping)):
        items = value.values() if isinstance(value, Mapping) else value
        return sum(_nbytes(item) for item in items)
    return int(getattr(value, "nbytes", 0))


def _tiled(value: Any, total: int) -> Any:
    """`value` with its rows repeated up to `total` of them."""
    if isinstance(value, (list, tuple)):
        return type(value)(_tiled(item, total) for item in value)
    if isinstance(value, Mapping):
        return {name: _tiled(item, total) for name, item in value.items()}
    return None if value is None else np.take(value, np.arange(total) % len(value), axis=0)


def _not_serialisable(metrics: Mapping[Any, Any]) -> tuple[str, ...]:
    refused = []
    for name, value in metrics.items():
        try:
            json.dumps({name: denumpify_detensorize(value)})
        except (TypeError, ValueError):
            refused.append(str(name))
    return tuple(refused)


# ---------------------------------------------------------------- the checks


def evaluation_fails(rehearsal: EvaluationRehearsal) -> Iterator[Fault]:
    """Evaluation raises, or returns what the Trainer cannot use."""
    if rehearsal.failed_in:
        yield _raised(rehearsal)
    elif rehearsal.returned and rehearsal.returned not in ("dict", "OrderedDict", "defaultdict"):
        yield Fault(
            f"compute_metrics returns {rehearsal.returned}; the Trainer needs a dict of numbers",
            subject="compute_metrics",
            evidence={"seen": rehearsal.returned, "expected": "dict"},
            fix='return {"accuracy": accuracy}',
        )
    elif rehearsal.not_serialisable:
        names = ", ".join(rehearsal.not_serialisable[:5])
        yield Fault(
            f"compute_metrics returns values that JSON cannot hold ({names}): writing "
            "trainer_state.json at the next checkpoint fails",
            subject="compute_metrics",
            evidence={"seen": f"not JSON: {names}", "expected": "numbers"},
            fix=f'metrics["{rehearsal.not_serialisable[0]}"] = float(value.mean())',
        )


def _raised(rehearsal: EvaluationRehearsal) -> Fault:
    spared = rehearsal.failed_in == "compute_metrics" and _may_be_the_sample(rehearsal)
    return Fault(
        f"{rehearsal.failed_in} raises {rehearsal.error} at {rehearsal.place} on {rehearsal.rows} "
        f"of {rehearsal.total_rows} evaluation rows"
        + (": more rows, or a model that has learnt something, might pass" if spared else ""),
        subject=rehearsal.failed_in,
        severity="warning" if spared else "error",
        evidence={
            "seen": f"{rehearsal.error} at {rehearsal.place}",
            "expected": "metrics",
            "rows": rehearsal.rows,
            "total_rows": rehearsal.total_rows,
        },
        quotes=(rehearsal.text,) if rehearsal.text else (),
    )


def _may_be_the_sample(rehearsal: EvaluationRehearsal) -> bool:
    """Whether a few rows, or an untrained model's predictions, may have brought it about."""
    if rehearsal.error in ("ZeroDivisionError", "FloatingPointError", "LinAlgError"):
        return True
    if rehearsal.error not in ("ValueError", "AssertionError", "IndexError"):
        return False
    whole = rehearsal.whole_set or rehearsal.rows >= rehearsal.total_rows
    return not whole or "classes" in rehearsal.text or "one class" in rehearsal.text


REHEARSE_EVALUATION = Probe(
    name="rehearse the evaluation",
    moment="probe",
    measures=(EvaluationRehearsal,),
    take=rehearse_evaluation,
    needs=("unsharded",),
)

EVAL_CRASHES = Check(
    name="eval-crashes",
    stage="baselines",
    severity="error",
    moments=("probe",),
    why="Evaluation first runs after the first epoch: a slip in it costs all the training before.",
    fix="trainer.evaluate(eval_dataset.select(range(8)))  # until it passes",
    source="Trainer.evaluation_loop, transformers 5.23 (2026); Karpathy (2019)",
    unsure="A metric that needs the model to have learnt something fails here and not later; "
    "where only that may be it, this is a warning.",
    judges=(evaluation_fails,),
)
