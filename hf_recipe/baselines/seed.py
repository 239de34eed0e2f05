"""The recipe's line "fix random seed": every generator that training may draw from.

The Trainer seeds itself when it is made and again in ``train()``: what was drawn before, as a
fresh head, is left to chance unless this is called first.
"""

from __future__ import annotations

from transformers import enable_full_determinism, set_seed

LARGEST = 2**32 - 1  # numpy takes no more


def seed_everything(seed: int, *, deterministic: bool = False) -> None:
    """Seed Python, numpy and torch on every device; call it before the model is made.

    Args:
        seed: 0 to 2**32 - 1.
        deterministic: also make CUDA's kernels repeatable, at some cost in speed.

    Raises:
        ValueError: the seed is out of range.
        TypeError: it is no whole number.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed is a whole number; got {seed!r}")
    if not 0 <= seed <= LARGEST:
        raise ValueError(f"seed lies between 0 and {LARGEST}; got {seed}")
    if deterministic:
        enable_full_determinism(seed, warn_only=True)
    else:
        set_seed(seed)
