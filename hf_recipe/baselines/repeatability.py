"""Do two evaluations of the same rows agree?

In evaluation mode nothing is drawn: dropout that stays on (a functional call whose ``training``
defaults to True, a module that was put back to training) makes every metric a lottery, and the
deployed model too. Models that sample by definition (masked autoencoders, diffusion losses) have
no labels, or predict the same and draw only in the loss: they are a note.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn
from torch.nn import functional

from hf_recipe.core.check import Check, Measurement, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.batches import stream_reason
from hf_recipe.instruments.overrides import overrides, own_method
from hf_recipe.instruments.subject import Subject
from hf_recipe.instruments.trace import few_rows, trace

ROWS = 4  # of an evaluation set
NOISY = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
DROPOUTS = {
    functional.dropout: "dropout",
    functional.dropout1d: "dropout1d",
    functional.dropout2d: "dropout2d",
    functional.dropout3d: "dropout3d",
    functional.alpha_dropout: "alpha_dropout",
    functional.feature_alpha_dropout: "feature_alpha_dropout",
    torch.dropout: "dropout",
    functional.rrelu: "rrelu",
    functional.gumbel_softmax: "gumbel_softmax",
}


@dataclass(frozen=True)
class Repeated(Measurement):
    """Two passes over the same rows in evaluation mode, under different seeds.

    Attributes:
        losses: of the two passes.
        difference: largest difference of the predictions, relative to their largest size; None
            where predictions cannot be told.
        active: names of noise functions that were on, with their rate.
        labelled: whether the batch has labels.
        half: whether predictions are in half precision.
        own_step: through the user's own `prediction_step`, which may do otherwise than the model.
    """

    losses: tuple[float, float]
    difference: float | None
    active: tuple[str, ...]
    labelled: bool
    half: bool = False
    own_step: bool = False


def measure_repeated(subject: Subject) -> Iterator[Repeated]:
    """Two forward passes."""
    batch = few_rows(subject)
    active: list[str] = []

    def watch(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        name = _noise(function, args, kwargs)
        if name is not None:
            active.append(name)

    made = []
    with torch.no_grad():
        for seed in (1, 2):
            torch.manual_seed(seed)
            made.append(trace(subject, batch, watchers=(watch,), grasp=False))
    first, second = (t.logits for t in made)
    losses = (float(made[0].loss), float(made[1].loss))
    if not all(abs(loss) < float("inf") for loss in losses):
        raise Skip("the loss is not finite")
    difference = None
    if first is not None and second is not None and first.shape == second.shape:
        size = max(float(first.float().abs().max()), 1e-12)
        difference = float((first.float() - second.float()).abs().max()) / size
    yield Repeated(
        losses=losses,
        difference=difference,
        active=tuple(dict.fromkeys(active)),
        labelled=batch.labels is not None,
        half=first is not None and first.dtype in (torch.bfloat16, torch.float16),
    )
    yield from _through_own_step(subject)


def _through_own_step(subject: Subject) -> Iterator[Repeated]:
    """Two calls of a `prediction_step` of the user's own, which may change the model's mode."""
    trainer, model = subject.trainer, subject.model
    if trainer is None or not overrides(trainer, "prediction_step"):
        return
    rows = next((r for r in subject.evaluation.values() if not stream_reason(r) and len(r)), None)
    if rows is None or subject.overridden("evaluation"):
        return
    batch = rows.batch(rows.evenly_spaced(ROWS)).to(subject.device)
    modes: list[int] = []

    def note(module: nn.Module, inputs: Any) -> None:
        modes.append(sum(_draws(m) for m in module.modules()))

    hook = model.register_forward_pre_hook(note)
    made = []
    try:
        for seed in (1, 2):
            torch.manual_seed(seed)
            model.eval()
            made.append(own_method(trainer, "prediction_step")(model, dict(batch.inputs), False))
    except Exception:  # what it raises is told by the rehearsal of the evaluation
        return
    finally:
        hook.remove()
    (a, first, _), (b, second, _) = made
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        return
    if a is None or b is None or first.shape != second.shape or not first.is_floating_point():
        return
    noisy = max(modes, default=0)
    size = max(float(first.float().abs().max()), 1e-12)
    yield Repeated(
        losses=(float(a.float().mean()), float(b.float().mean())),
        difference=float((first.float() - second.float()).abs().max()) / size,
        active=(f"{noisy} modules in training mode",) if noisy else (),
        labelled=batch.labels is not None,
        half=first.dtype in (torch.bfloat16, torch.float16),
        own_step=True,
    )


def _draws(module: nn.Module) -> bool:
    rate = vars(module).get("p", 1.0)
    return module.training and isinstance(module, NOISY) and bool(rate)


def _noise(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """The name and rate of a dropout that is on, or None."""
    try:
        name = DROPOUTS.get(function)
    except TypeError:  # not hashable
        return None
    if name is None:
        return None
    if name in ("rrelu", "gumbel_softmax"):
        return name if name == "gumbel_softmax" or kwargs.get("training", False) else None
    rate = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    default = function is not torch.dropout and name not in (
        "alpha_dropout",
        "feature_alpha_dropout",
    )
    on = args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", default))
    return f"{name}(p={float(rate):g})" if on and rate else None


def passes_differ(
    repeated: Repeated,
    *,
    tolerance: Annotated[
        float, "of the predictions' size: what kernels that add in another order leave"
    ] = 1e-4,
) -> Iterator[Fault]:
    """The same rows in evaluation mode give two results."""
    tolerance = max(tolerance, 2e-2) if repeated.half else tolerance
    a, b = repeated.losses
    of_loss = abs(a - b) / max(abs(a), abs(b), 1e-12)
    steady = repeated.difference is not None and repeated.difference <= tolerance
    if of_loss <= tolerance and (steady or repeated.difference is None):
        return
    cause = f"; active in evaluation: {', '.join(repeated.active)}" if repeated.active else ""
    predicts = repeated.labelled and not steady and repeated.difference is not None
    seen = f"losses {a:.6g} and {b:.6g}"
    if repeated.difference is not None:
        seen += f", predictions apart by {repeated.difference:.2g} of their size"
    through = " through prediction_step" if repeated.own_step else ""
    proven = repeated.active or (predicts and not repeated.own_step)  # which may sample on purpose
    yield Fault(
        f"two evaluation passes over the same rows{through} differ: {seen}{cause}",
        subject="prediction_step" if repeated.own_step else "",
        severity="error" if proven else "note",
        fix="model.eval()  # in prediction_step, before the forward" if repeated.own_step else None,
        evidence={
            "seen": seen,
            "expected": "equal",
            "active": repeated.active,
            # the predictions agree: the noise is in the loss, as a teacher's would be
            "follows_from": "teacher-trains" if steady else None,
        },
    )


REPEAT_EVALUATION = Probe("repeat an evaluation", "probe", (Repeated,), measure_repeated)

EVAL_NONDETERMINISTIC = Check(
    name="eval-nondeterministic",
    stage="baselines",
    severity="error",
    moments=("probe",),
    why="Metrics, the choice of the best model and the deployed model then depend on luck.",
    fix="F.dropout(x, p, training=self.training)",
    source="transformers issue 33844 (2024); torch issue 124464 (2024)",
    unsure="Models that sample by definition (masked autoencoders, diffusion) are a note.",
    judges=(passes_differ,),
)
