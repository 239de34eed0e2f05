"""Does a reported metric agree with the predictions it was computed from?

`compute_metrics` is the user's own: it may count padding, forget a causal model's shift, take the
highest logit along the wrong axis, or keep the last batch alone, and every decision of the run
then rests on that number. So what `prediction_step` answered is counted again. The verdict is an
error only where the reported number is none that its name may stand for, and is the very number
that a known mistake gives; where it is no known mistake's, a warning, and only for metrics that
have one meaning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.data.masks import shifts_labels
from hf_recipe.instruments.answers import Answers
from hf_recipe.instruments.heads import bare
from hf_recipe.regularize.recount import NAMES, recount

ONE_MEANING = frozenset({("class", "accuracy"), ("class", "matthews")})

# What a known mistake is, and the line that mends it.
CAUSES: dict[str, tuple[str, str]] = {
    "masked": (
        "positions labelled -100 are counted",
        "kept = labels != -100; accuracy = (predictions[kept] == labels[kept]).mean()",
    ),
    "unshifted": (
        "answers are compared with the token they stand on, not with the next one",
        "predictions, labels = predictions[:, :-1], labels[:, 1:]",
    ),
    "shifted": (
        "answers are compared with the next position's label, and this model's stand in place",
        "accuracy = (predictions == labels)[labels != -100].mean()  # no shift",
    ),
    "axis": ("the highest logit is sought across positions", "predictions = logits.argmax(-1)"),
    "threshold": (
        "logits are cut at 0.5, which is a probability's threshold",
        "predictions = logits > 0  # or sigmoid(logits) > 0.5",
    ),
    "broadcast": (
        "every answer is compared with every label: the shapes broadcast",
        "predictions, labels = predictions.reshape(-1), labels.reshape(-1)",
    ),
    "swapped": (
        "answers and labels change places: it is computed as metric(predictions, labels)",
        "r2_score(labels, predictions)  # scikit-learn takes the truth first",
    ),
    "root": (
        "the root is missing, or drawn where none belongs",
        "rmse = mean_squared_error(labels, predictions) ** 0.5",
    ),
    "last": (
        "the last batch alone is counted",
        "TrainingArguments(..., batch_eval_metrics=False)  # or add up over batches",
    ),
    "batches": (
        "batches of different sizes count alike",
        "TrainingArguments(..., batch_eval_metrics=False)  # or weigh each batch by its rows",
    ),
    "repeated": (
        "rows that were dealt out twice to fill the last batch are counted twice",
        "predictions = accelerator.gather_for_metrics(predictions)",
    ),
    "rank": (
        "one process's rows alone are counted",
        "predictions = accelerator.gather_for_metrics(predictions)",
    ),
}


@dataclass(frozen=True)
class RecountedMetric(Measurement):
    """One metric of one evaluation, as reported and counted again.

    Attributes:
        metric: its name in the log, without the prefix.
        reported: its value there.
        form, meaning: the form of the answers ("class", "token", ...), and what is counted.
        rows: rows of the set.
        tied: rows whose two highest outputs are equal, so that either may be the answer.
        right: values that the name may stand for, by what they are.
        wrong: values that known mistakes give, as "cause|variant".
    """

    metric: str
    reported: float
    form: str
    meaning: str
    rows: int
    tied: int
    right: dict[str, float]
    wrong: dict[str, float]


def recounted(
    answers: Answers, metrics: Mapping[str, float], split: str, shifted: bool | None
) -> Iterator[RecountedMetric]:
    """Count again every metric of an evaluation whose name is known.

    Args:
        metrics: as the Trainer logs them, with their prefix.
        split: the evaluation set's name.
        shifted: whether answers stand one place before their labels; None: not known.
    """
    prefixes = (f"eval_{split}_", "eval_") if f"eval_{split}_loss" in metrics else ("eval_",)
    for key, value in metrics.items():
        prefix = next((p for p in prefixes if key.startswith(p)), "")
        name = key[len(prefix) :]
        if not prefix or name not in NAMES or not math.isfinite(value):
            continue
        values = recount(answers, NAMES[name], shifted)
        if values is None or not values[0]:
            continue
        finite = ({k: v for k, v in each.items() if math.isfinite(v)} for each in values)
        right, wrong = finite
        yield RecountedMetric(
            metric=name,
            reported=float(value),
            form=answers.kind,
            meaning=NAMES[name],
            rows=len(answers.rows),
            tied=int(answers.rows[:, 2].sum()) if answers.kind == "class" else 0,
            right=right,
            wrong=wrong,
        )


def shift_of(trainer: Any) -> bool | None:
    """Whether this model's answers stand one place before their labels; None: not known."""
    from transformers import Trainer

    own = type(trainer).compute_loss is not Trainer.compute_loss
    if own or trainer.compute_loss_func is not None:
        return None
    model = bare(trainer.accelerator.unwrap_model(trainer.model))
    kind = getattr(model, "loss_type", None)
    if kind == "ForCausalLM" or (kind is None and shifts_labels(model)):
        return True
    return False if kind in ("ForMaskedLM", "ForTokenClassification") else None


# ---------------------------------------------------------------- verdict


def _rounded_by(value: float) -> float:
    """Half a unit of the last decimal that `value` was rounded to; 0 where it has many."""
    text = repr(value)
    decimals = len(text.split(".")[1]) if "." in text and "e" not in text else 99
    return 0.5 * 10.0**-decimals if decimals <= 6 else 0.0


def _equal(reported: float, value: float, slack: float) -> bool:
    """Whether they are one number, as a share or in percent, up to single precision."""
    return any(
        abs(reported - scale * value) <= 1e-6 * scale + 2e-5 * abs(scale * value) + slack * scale
        for scale in (1.0, 100.0)
    )


def disagrees(
    metric: RecountedMetric,
    *,
    gap: Annotated[
        float, "a metric of one meaning that is off by less may leave a few rows out on purpose"
    ] = 0.02,
    fewest: Annotated[int, "rows: on fewer, different counts give the same share by chance"] = 8,
) -> Iterator[Fault]:
    """The reported number is none of those that its name may stand for."""
    reported, rounded = metric.reported, _rounded_by(metric.reported)
    right = metric.right
    if metric.form == "token" and not reported:  # nearly no row is right throughout: 0 says nothing
        right = {k: v for k, v in right.items() if not k.endswith("whole rows")} or right
    slack = min(rounded, 0.005) * 1.01 + metric.tied / max(metric.rows, 1)
    if metric.rows < fewest or any(_equal(reported, v, slack) for v in right.values()):
        return
    nearest, expected = min(right.items(), key=lambda item: abs(item[1] - reported))
    exact = rounded if rounded <= 0.0005 else 0.0
    causes = [c for c, v in metric.wrong.items() if _equal(reported, v, exact)]
    what = f"{metric.metric} is reported as {reported:.6g}, and the predictions give {expected:.6g}"
    evidence = {
        "seen": f"{reported:.6g}",
        "expected": f"{expected:.6g}" + (f" ({nearest})" if nearest else ""),
        "reported": reported,
        "recounted": expected,
        "rows": metric.rows,
    }
    if causes:
        name = causes[0].split("|")[0]
        cause, fix = CAUSES["rank" if name.startswith("rank") else name]
        yield Fault(f"{what}: {cause}", metric.metric, {**evidence, "cause": name}, fix=fix)
        return
    bounded = -1 <= reported <= 1
    least = max(gap, (2 + metric.tied) / metric.rows)
    if (
        (metric.form, metric.meaning) in ONE_MEANING
        and bounded
        and not abs(reported - expected) <= least
    ):
        yield Fault(
            f"{what}; no known mistake gives that number",
            metric.metric,
            evidence,
            severity="warning",
        )


def take(subject: Any) -> Iterator[RecountedMetric]:
    """Nothing before the first evaluation."""
    raise Skip("there has been no evaluation with a metric that can be counted again")


RECOUNT = Probe("count metrics again", "eval", (RecountedMetric,), take)

METRIC_DISAGREES = Check(
    name="metric-disagrees",
    stage="regularize",
    severity="error",
    moments=("eval",),
    why="Every choice of the run rests on this number: a metric that counts padding, or misses "
    "rows, chooses another model.",
    fix="kept = labels != -100; accuracy = (predictions[kept] == labels[kept]).mean()",
    source="llm-foundry issue 288 (2023); trl issue 7010 (2025); transformers issue 16865 (2022)",
    unsure="A metric of one's own (classes merged, a tuned threshold) under a common name; it is "
    "a warning at most, and only for accuracy and Matthews' correlation of single labels.",
    judges=(disagrees,),
)
