"""How large is a step against the weight it moves, and does it survive the weight's precision?

All sizes are measured, not derived from settings: a half-precision run whose updates survive
(a large rate, rounding at random, compensated sums) is left alone, and one whose optimizer
quietly does next to nothing is named whatever its arguments say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Annotated

from hf_recipe.core.check import Check, Probe, Skip
from hf_recipe.core.finding import Fault
from hf_recipe.instruments.layers import LayerNumbers, LayerSample, LayerSamples
from hf_recipe.instruments.subject import Subject

HALF = ("bfloat16", "float16")
LAYERS = "layer_samples"  # where a subject's cache keeps the run's latest samples
NAMED = 3


def take_layers(subject: Subject) -> Iterator[LayerSamples]:
    """Yield the run's latest samples; they exist only right after a sampled step."""
    samples = subject.cache.get(LAYERS)
    if not isinstance(samples, LayerSamples):
        raise Skip("nobody samples the layers")
    yield samples


def at_full_rate(samples: LayerSamples, share: float) -> list[LayerSample]:
    """The samples whose rate was at least `share` of its peak: neither warm-up nor the end."""
    return [
        s
        for s in samples.samples
        if any(x.rate > 0 for x in s.layers)
        and max(x.rate for x in s.layers) >= share * max(x.peak for x in s.layers)
    ]


def ratio(layers: Iterable[LayerNumbers], *, to_peak: bool = False) -> float:
    """Norm of the update over norm of the weights, over all `layers` together."""
    update = weight = 0.0
    for layer in layers:
        scale = layer.peak / layer.rate if to_peak and layer.rate > 0 else 1.0
        update += layer.reached * (layer.update * scale) ** 2
        weight += layer.reached * layer.weight**2
    return math.sqrt(update / weight) if weight > 0 else math.nan


def _names(layers: list[LayerNumbers]) -> str:
    more = f" and {len(layers) - NAMED} more" if len(layers) > NAMED else ""
    return ", ".join(x.name for x in layers[:NAMED]) + more


# ---------------------------------------------------------------- rounded away


def rounded_away(
    samples: LayerSamples,
    *,
    lost: Annotated[float, "share of the elements that a gradient reached"] = 0.5,
    nearly_all: Annotated[
        float, "share unchanged that is a fault although few are too coarse for any step; judged"
    ] = 0.8,
    some: Annotated[float, "share too coarse, enough to tell how the rest is rounded"] = 0.1,
    moved: Annotated[
        float, "of those too coarse for the rate: nearest rounding moves none, random ones some"
    ] = 0.01,
    near_peak: Annotated[
        float, "share of the peak rate; a decayed rate rounds away by design"
    ] = 0.3,
    needed: Annotated[int, "samples: chance does not repeat itself"] = 2,
    few: Annotated[int, "elements, below which a share says little"] = 256,
) -> Iterator[Fault]:
    """Half-precision weights whose own spacing is coarser than the steps."""
    chosen = at_full_rate(samples, near_peak)[-needed:]
    layers = [x for s in chosen for x in s.layers if x.dtype in HALF and x.rate > 0]
    reached = sum(x.reached for x in layers)
    if len(chosen) < needed or reached < few:
        return
    still, coarse = sum(x.still for x in layers), sum(x.coarse for x in layers)
    survived = sum(x.coarse_moved for x in layers)
    proven = still > lost * reached and coarse > lost * reached
    if not proven and not (still > nearly_all * reached and coarse > some * reached):
        return
    if survived >= moved * coarse:
        return
    worst = sorted((x for x in layers if x.reached), key=lambda x: -x.still / x.reached)
    kinds = sorted({x.dtype for x in layers})
    yield Fault(
        f"{still / reached:.0%} of the weights that a gradient reaches are left unchanged by a "
        f"step: the update is below the spacing of {' and '.join(kinds)} "
        f"(for example {worst[0].name})",
        evidence={
            "seen": f"{still / reached:.0%} unchanged",
            "expected": f"<= {lost:.0%}",
            "coarse": coarse / reached,
            "rate": layers[0].rate,
            "step": chosen[-1].step,
        },
    )


# ---------------------------------------------------------------- too small


def too_small(
    samples: LayerSamples,
    *,
    whole_run: Annotated[
        float, "relative change of the weights that all planned steps add up to, in one line"
    ] = 1e-3,
    one_step: Annotated[
        float, "||dw||/||w||; fine-tuning at 1e-5 makes 1e-4, Karpathy's advice is 1e-3"
    ] = 1e-6,
    of_rate: Annotated[
        float, "Adam's update over its rate; noise alone gives 0.2, an eps that rules less"
    ] = 0.01,
    kept: Annotated[
        float, "of one update, that steps after it leave; even steps there and back leave more"
    ] = 0.05,
    needed: Annotated[int, "samples in a row"] = 2,
) -> Iterator[Fault]:
    """Steps that cannot matter, for all weights or for a group of them."""
    if still := _no_step(samples, kept, needed):
        yield still
        return
    chosen = at_full_rate(samples, 0.1)[-needed:]
    if len(chosen) < needed:
        return
    yield from _rate_of_zero(chosen[-1])
    yield from _left_behind(chosen[-1], samples.planned, whole_run)
    fine = [[x for x in s.layers if x.dtype not in HALF and x.rate > 0] for s in chosen]
    if not all(any(x.reached for x in layers) for layers in fine):
        return
    ratios = [ratio(layers, to_peak=True) for layers in fine]
    evidence = {"seen": f"{ratios[-1]:.1e}", "step": chosen[-1].step}
    if all(x.update == 0 for layers in fine for x in layers):
        yield Fault(
            "gradients reach the weights, and the optimizer's step changes none of them",
            evidence={**evidence, "expected": "> 0"},
            fix="optimizer.step() before zero_grad(), on the model's own parameters",
        )
    elif max(ratios) < one_step and max(ratios) * max(samples.planned, 1) < whole_run:
        total = max(ratios) * max(samples.planned, 1)
        yield Fault(
            f"at the peak rate of {fine[-1][0].peak:.3g} a step changes the weights by "
            f"{ratios[-1]:.1e} of their size; all {samples.planned} steps add up to {total:.1e} "
            "at most",
            evidence={**evidence, "expected": f">= {one_step:.0e}"},
        )
    elif samples.adam:
        yield from _ruled_by_epsilon(fine, samples.epsilon, of_rate, chosen[-1].step)


def _no_step(samples: LayerSamples, kept: float, needed: int) -> Fault | None:
    """No gradient when the optimizer steps, a rate of zero, or steps that are taken back."""
    latest = samples.samples[-needed:]
    if len(latest) < needed:
        return None
    step = latest[-1].step
    if all(not s.layers and math.isfinite(s.norm) for s in latest):
        norm = latest[-1].norm
        said = f"backward leaves a gradient of norm {norm:.3g}, and none" if norm > 0 else "none"
        return Fault(
            f"{said} of the gradients is there when the optimizer steps: no weight changes",
            evidence={"seen": "no gradient", "expected": "a gradient", "step": step},
            fix="optimizer.step()  # and only then zero_grad()",
        )
    if all(_stands_still(s) for s in samples.samples):
        return Fault(
            f"the learning rate is 0 in every step looked at, the last of them step {step}: no "
            "weight changes",
            evidence={"seen": "rate 0", "expected": "> 0", "step": step},
            fix="TrainingArguments(..., learning_rate=1e-3)  # and the schedule's factor above 0",
        )
    if all(s.kept is not None and s.kept < kept for s in latest):
        return Fault(
            f"by step {step} the weights had kept {latest[-1].kept:.1e} of one single update, and "
            "more were made since: something writes them back after each optimizer step",
            subject="written back",
            evidence={
                "seen": f"{latest[-1].kept:.1e} kept",
                "expected": f">= {kept}",
                "step": step,
            },
            fix="keep averages in a copy of the model; nothing may copy_() into its parameters",
        )
    return None


def _left_behind(sample: LayerSample, planned: int, whole_run: float) -> Iterator[Fault]:
    """A later group whose rate is so small against the first layers' that it stays as drawn."""
    trained = [x for x in sample.layers if x.rate > 0 and x.reached and x.dtype not in HALF]
    matrices = [x for x in trained if x.dims >= 2]
    if not matrices:
        return
    top, last = max(x.peak for x in trained), matrices[-1]
    left = [x for x in trained if x.peak == last.peak]
    total = ratio(left, to_peak=True) * max(planned, 1)
    if not last.peak <= 1e-3 * top or not total < whole_run:
        return
    yield Fault(
        f"the learning rate of the last layers is {last.peak:.2g} while others have {top:.2g}: all "
        f"{planned} steps change {_names(left)} by {total:.1e} of their size at most",
        subject="groups",
        evidence={"seen": f"{total:.1e}", "expected": f">= {whole_run}", "step": sample.step},
        fix='rates that rise towards the head: {"params": layer, "lr": lr * 0.9 ** (depth - i)}',
    )


def _stands_still(sample: LayerSample) -> bool:
    """Whether every parameter's rate is zero, and none has moved."""
    return bool(sample.layers) and all(x.rate == 0 and x.update == 0 for x in sample.layers)


def _rate_of_zero(sample: LayerSample) -> Iterator[Fault]:
    """Parameters with a gradient and a group whose rate is zero for good."""
    left = [x for x in sample.layers if x.peak == 0 and x.reached and x.update == 0]
    if left and len(left) < len(sample.layers):
        yield Fault(
            f"the learning rate of {len(left)} of {len(sample.layers)} sampled parameters is 0 "
            f"while the others' is not: {_names(left)}",
            subject="groups",
            evidence={"seen": "rate 0", "expected": "> 0", "step": sample.step},
            fix="requires_grad_(False)  # if they are to stay; else give their group a rate",
        )


def _ruled_by_epsilon(
    fine: list[list[LayerNumbers]], epsilon: float, of_rate: float, step: int
) -> Iterator[Fault]:
    """Steps under an eps above the gradients.

    Gradients that have shrunk within Adam's memory give small steps too: that run is done.
    """
    shares, sizes = [], []
    for layers in fine:
        reached = [x for x in layers if x.reached]
        rms, gradients = [x.update / x.rate for x in reached], [x.gradient for x in reached]
        shares.append(sorted(rms)[len(rms) * 3 // 4])
        sizes.append(sorted(gradients)[len(gradients) * 3 // 4])
    if max(shares) < of_rate and max(sizes) < epsilon:
        yield Fault(
            f"Adam's step is {shares[-1]:.1e} of its learning rate in three of four tensors; "
            f"it should be about 0.2 to 1: its eps of {epsilon:.1g} is far above the gradients, "
            f"{sizes[-1]:.1g} a number",
            evidence={"seen": f"{shares[-1]:.1e}", "expected": f">= {of_rate}", "step": step},
            fix="TrainingArguments(..., adam_epsilon=1e-8)",
        )


# ---------------------------------------------------------------- too large


def too_large(
    samples: LayerSamples,
    *,
    share: Annotated[
        float, "||dw||/||w|| of all matrices; 1e-3 is usual, 0.15 is seen in steps that still learn"
    ] = 0.05,
    worse: Annotated[float, "rise of the loss over its first value, as a share of that"] = 0.2,
    warm: Annotated[int, "first step that is judged: the loss must have had time to answer"] = 5,
    needed: Annotated[int, "samples in a row"] = 2,
) -> Iterator[Fault]:
    """Steps of a twentieth of the weights or more, and a loss that is worse for it."""
    chosen = samples.samples[-needed:]
    ratios = [ratio(x for x in s.layers if x.dims >= 2) for s in chosen]
    if len(chosen) < needed or chosen[0].step < warm or not all(r >= share for r in ratios):
        return
    loss = chosen[-1].loss
    if not loss - samples.first_loss > worse * abs(samples.first_loss):
        return  # it learns
    yield Fault(
        f"a step changes the weight matrices by {ratios[-1]:.0%} of their size, and the loss has "
        f"risen ({samples.first_loss:.4g} at first, {loss:.4g} now)",
        evidence={
            "seen": f"{ratios[-1]:.2g}",
            "expected": f"< {share} (about 1e-3)",
            "step": chosen[-1].step,
            "loss": loss,
        },
    )


SAMPLE_LAYERS = Probe(
    name="sample layers",
    moment="run",
    measures=(LayerSamples,),
    take=take_layers,
    needs=("optimizer", "unsharded"),
)

UPDATE_ROUNDED_AWAY = Check(
    name="update-rounded-away",
    stage="complexify",
    severity="warning",
    moments=("run",),
    why="An update below half the spacing of bfloat16 (0.2 % of the weight) is lost altogether.",
    fix="model.float() and TrainingArguments(..., bf16=True)  # float32 weights, bf16 arithmetic",
    source="Zamirai et al., Revisiting BFloat16 Training (2020); pytorch issue 120376 (2024)",
    unsure="Compensation over hundreds of steps looks like loss at a tiny rate.",
    judges=(rounded_away,),
    explains=("loss-not-decreasing", "update-too-small", "input-ignored"),
)

UPDATE_TOO_SMALL = Check(
    name="update-too-small",
    stage="complexify",
    severity="warning",
    moments=("run",),
    why="Steps far below a thousandth of the weights do not get anywhere within the run.",
    fix="TrainingArguments(..., learning_rate=...)  # update / weight near 1e-3 at the peak",
    source="Karpathy, CS231n notes, 'Ratio of weights:updates' (2015)",
    unsure="A probe or a warm restart that is meant to change almost nothing.",
    judges=(too_small,),
    explains=("loss-not-decreasing", "input-ignored"),
)

UPDATE_TOO_LARGE = Check(
    name="update-too-large",
    stage="complexify",
    severity="warning",
    moments=("run",),
    why="Steps as large as the weights replace what was learned with each batch.",
    fix="TrainingArguments(..., learning_rate=args.learning_rate / 100, warmup_steps=0.05)",
    source="Karpathy, CS231n notes, 'Ratio of weights:updates' (2015)",
    unsure="Matrices that begin at zero on purpose grow by more than their size at first.",
    judges=(too_large,),
    explains=("loss-diverged", "loss-spike", "loss-not-decreasing", "dead-unit"),
)

__all__ = ["UPDATE_ROUNDED_AWAY", "UPDATE_TOO_LARGE", "UPDATE_TOO_SMALL"]
