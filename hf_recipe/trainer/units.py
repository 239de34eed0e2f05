"""The unit of the run's losses: what a Trainer's numbers are divided by to mean nats per item."""

from __future__ import annotations

from hf_recipe.instruments.subject import Subject


class Units:
    """Measured once per run by one forward pass; until then losses are taken as they come."""

    def measure(self, subject: Subject) -> None:
        """Measure the unit on one batch of `subject`, where that can be done."""

    def step(self, micro_batches: int) -> float:
        """Divisor for the sum over a step's micro-batches."""
        return 1.0

    def evaluation(self) -> float:
        """Divisor for one evaluation batch's loss."""
        return 1.0
