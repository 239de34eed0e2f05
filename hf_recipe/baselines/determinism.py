"""The recipe's line "fix random seed": do two short runs from one seed come out the same?

"Always use a fixed random seed to guarantee that when you run the code twice you will get the same
outcome" (Karpathy 2019). So a few steps are taken twice from the same weights and the same random
state, with the run's own optimizer, and compared bit by bit: the batches, the losses, every
gradient, weight and buffer. Where they part, the first tensor that differs says where to look: in
the data, in the forward pass, in a kernel's backward pass, or in the update.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_recipe.core.check import Measurement, Skip
from hf_recipe.core.exhibit import Answer
from hf_recipe.instruments.batches import Batch
from hf_recipe.instruments.held import held_generators, held_objects, kept
from hf_recipe.instruments.quiet import quiet
from hf_recipe.instruments.spare_optimizer import put_back, spare_optimizer
from hf_recipe.instruments.subject import Subject

NAMED = 5  # tensors that are named
PHASES = ("batch", "loss", "gradient", "weight", "buffer")
Prints = dict[str, str]  # tensor's name -> hash of its bytes


@dataclass(frozen=True)
class Determinism(Measurement):
    """Two short runs from the same weights and random state, compared bit by bit.

    Attributes:
        steps, rows: steps of each run, rows of each step's batch.
        compared: tensors that were compared in all.
        first_step: the first step in which they differ, from 1; 0: they are equal.
        phase: what differs first in it: "batch", "loss", "gradient", "weight" or "buffer".
        names: of the first tensors that differ in that phase, at most five.
        differing: how many differ there.
        losses: of the two runs, step by step.
        seeded: whether a generator that the data set keeps for itself was put back too.
    """

    steps: int
    rows: int
    compared: int
    first_step: int
    phase: str
    names: tuple[str, ...]
    differing: int
    losses: tuple[tuple[float, ...], tuple[float, ...]]
    seeded: bool = False

    @property
    def equal(self) -> bool:
        """Whether every tensor of every step is the same, bit by bit."""
        return self.first_step == 0


def check_determinism(subject: Subject, *, steps: int = 3) -> Determinism:
    """Take `steps` steps twice and compare; everything is put back, bit for bit.

    In training mode, without clipping, on this process's own batches: nothing is exchanged.

    Raises:
        ValueError: no step at all.
        Skip: rows cannot be read ahead, or there is no optimizer.
    """
    if steps < 1:
        raise ValueError(f"two runs of at least one step are compared; got steps={steps}")
    rows = [part for part in (subject.train,) if part is not None]
    roots = [part for each in rows for part in (each.read, each.collate)]
    held = (held_generators(*roots), held_objects(*roots))
    runs: list[list[dict[str, Prints]]] = []
    losses: list[list[float]] = []
    with quiet(subject.model, trainer=subject.trainer):
        weights = [(p, p.detach().to("cpu", copy=True)) for p in subject.model.parameters()]
        for _ in range(2):
            # The guard puts back random state and buffers, the optimizer its own state.
            with quiet(subject.model, trainer=subject.trainer), kept(*held):
                put_back(weights)
                with spare_optimizer(subject, moves=True) as optimizer:
                    taken = list(_steps(subject, optimizer, steps))
            runs.append([prints for prints, _ in taken])
            losses.append([loss for _, loss in taken])
    size = int(getattr(subject.args, "per_device_train_batch_size", 8))
    found = compared(runs[0], runs[1])
    return replace(
        found,
        rows=size,
        losses=(tuple(losses[0]), tuple(losses[1])),
        seeded=bool(held),
    )


def _steps(
    subject: Subject, optimizer: torch.optim.Optimizer, steps: int
) -> Iterator[tuple[dict[str, Prints], float]]:
    model = subject.model
    model.train()
    for step in range(steps):
        batch = _batch(subject, step, steps)
        loss = subject.compute_loss(batch.inputs)
        if not loss.requires_grad:
            raise Skip("the loss has no gradient, so no step can be taken")
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        prints = {
            "batch": _prints(batch.inputs),
            "loss": _prints({"loss": loss}),
            "gradient": _prints(gradients),
        }
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        prints["weight"] = _prints(dict(model.named_parameters()))
        prints["buffer"] = _prints(dict(model.named_buffers()))
        yield prints, float(loss.detach())


def _batch(subject: Subject, step: int, steps: int) -> Batch:
    """Another batch for each step, read and collated anew."""
    size = int(getattr(subject.args, "per_device_train_batch_size", 8))
    if subject.first_inputs is not None:
        return subject.batch("train", size=size)
    source = subject.rows("train")
    if not source.is_stream and not len(source):
        raise Skip("there are no rows")
    few = subject.batch("train", size=1)  # says why rows cannot be read
    chosen = source.evenly_spaced(size * steps)[step::steps] or list(few.rows)
    return source.batch(chosen).to(subject.device)


def _prints(tensors: Mapping[str, Any]) -> Prints:
    found = {}
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor):
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            found[name] = hashlib.blake2b(data.numpy().tobytes(), digest_size=16).hexdigest()
    return found


def compared(
    first: Sequence[Mapping[str, Prints]], second: Sequence[Mapping[str, Prints]]
) -> Determinism:
    """The first tensor, in the order of a step, that differs between two runs' prints."""
    count = sum(len(prints) for step in first for prints in step.values())
    for number, (one, two) in enumerate(zip(first, second, strict=True), 1):
        for phase in PHASES:
            a, b = one.get(phase, {}), two.get(phase, {})
            names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
            if names:
                return Determinism(
                    len(first), 0, count, number, phase, tuple(names[:NAMED]), len(names), ((), ())
                )
    return Determinism(len(first), 0, count, 0, "", (), 0, ((), ()))


_CAUSES = {
    "batch": "rows or collator draw from something that no seed sets",
    "loss": "the forward pass draws from something that no seed sets, or keeps a state of its own",
    "gradient": "a kernel's backward pass adds in another order each time: "
    "seed_everything(seed, deterministic=True)",
    "weight": "the optimizer's update differs: foreach or fused kernels, or noise of its own",
    "buffer": "a buffer is updated with something that no seed sets",
}


QUESTION = "Do two runs from one seed come out the same?"


def answer(found: Determinism | str) -> Answer:
    """What the report says; a text is the reason why it could not be tried."""
    if isinstance(found, str):
        return Answer(QUESTION, "baselines", f"not tried: {found}")
    if found.equal:
        text = (
            f"yes: {found.steps} steps, taken twice, agree bit by bit in {found.compared} tensors"
        )
    else:
        names = ", ".join(found.names)
        more = f" and {found.differing - len(found.names)} more" * (
            found.differing > len(found.names)
        )
        text = (
            f"no: from step {found.first_step} of {found.steps} on the {found.phase} differs "
            f"({names}{more}): {_CAUSES[found.phase]}"
        )
    return Answer(
        QUESTION,
        "baselines",
        text,
        {"first_step": found.first_step, "phase": found.phase, "tensors": list(found.names)},
    )
