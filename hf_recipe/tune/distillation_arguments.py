"""The options of distillation, beside those of the Trainer."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from hf_recipe.tune.distillation_loss import KINDS


@dataclass
class DistillationTrainingArguments(TrainingArguments):  # type: ignore[misc]
    """TrainingArguments with the options of distillation.

    Args:
        alpha: weight of the teacher, in [0, 1]; the labels have 1 - alpha.
        distill_temperature: T of both distributions (sampling has another one).
        divergence: "forward_kl", "reverse_kl", "jsd" or "skewed_kl".
        divergence_beta: the teacher's share of the mixture in "jsd".
        divergence_skew: the teacher's share of the mixture in "skewed_kl".
        standardize_logits: compare each row's logits at mean 0 and standard deviation 1.
        distill_vocabulary: "error" where the number of classes differs, or "cut" both to the
            first shared ones (vocabularies padded to different sizes).
        distill_chunked: never build the student's (batch, length, vocabulary) logits; default:
            where the model's logits can be rebuilt from its head and there are many of them.
        relation_weight: weight of the hidden states' self-relations (no equal width needed).
        attention_weight: weight of the attention maps (needs ``attn_implementation="eager"``).
        distill_shard_teacher: split the teachers' weights over the processes (torch's
            ``fully_shard``) and gather each block when it is asked, instead of a whole copy on
            every process; the student is trained as ever.
        transfer_layers: pairs of (student layer, teacher layer), as indices of hidden_states
            (0 is the embedding) and, less one, of attentions; default: the last of each.
    """

    alpha: float = field(default=0.5)
    distill_temperature: float = field(default=2.0)
    divergence: str = field(default="forward_kl")
    divergence_beta: float = field(default=0.5)
    divergence_skew: float = field(default=0.1)
    standardize_logits: bool = field(default=False)
    distill_vocabulary: str = field(default="error")
    distill_chunked: bool | None = field(default=None)
    distill_shard_teacher: bool = field(default=False)
    relation_weight: float = field(default=0.0)
    attention_weight: float = field(default=0.0)
    transfer_layers: list[list[int]] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1]; got {self.alpha}")
        if self.divergence not in KINDS:
            raise ValueError(f"divergence must be one of {', '.join(KINDS)}; got {self.divergence}")
        if not self.distill_temperature > 0:
            raise ValueError(
                f"distill_temperature must be positive; got {self.distill_temperature}"
            )
        if self.distill_vocabulary not in ("error", "cut"):
            raise ValueError(
                f"distill_vocabulary must be 'error' or 'cut'; got {self.distill_vocabulary!r}"
            )
        if self.distill_chunked and (self.standardize_logits or self.transfers):
            raise ValueError(
                "distill_chunked=True builds no logits and keeps no layers: it goes without "
                "standardize_logits, relation_weight and attention_weight"
            )

    @property
    def transfers(self) -> bool:
        """Whether hidden states or attentions are matched too."""
        return self.relation_weight > 0 or self.attention_weight > 0

    @property
    def layer_outputs(self) -> dict[str, bool]:
        """What student and teacher must return beside their logits."""
        wanted = {
            "output_hidden_states": self.relation_weight > 0,
            "output_attentions": self.attention_weight > 0,
        }
        return {name: True for name, value in wanted.items() if value}

    @property
    def soft_options(self) -> dict[str, Any]:
        """The keyword arguments of `divergence`."""
        return {
            "kind": self.divergence,
            "temperature": self.distill_temperature,
            "beta": self.divergence_beta,
            "skew": self.divergence_skew,
            "vocabulary": self.distill_vocabulary,
        }

    @classmethod
    def of(cls, args: TrainingArguments | None) -> DistillationTrainingArguments:
        """Plain TrainingArguments with the defaults of distillation.

        Raises:
            TypeError: arguments of another kind, which these would not hold.
        """
        if args is None:
            return cls(output_dir="trainer_output")
        if isinstance(args, cls):
            return args
        known = {f.name for f in fields(cls)}
        given = {f.name: getattr(args, f.name) for f in fields(args) if f.init}
        if given.keys() - known:
            kind = type(args).__name__
            raise TypeError(
                f"{kind} has options of its own; write, in your script, @dataclass "
                f"class Arguments(DistillationTrainingArguments, {kind}): pass"
            )
        return cls(**given)
