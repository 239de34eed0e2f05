"""What a run chooses by: the metric's name in the logs, and which way round it is better.

One answer for all that choose: early stopping, the best checkpoints, and the checks that judge
both.
"""

from __future__ import annotations

from typing import Any

LOWER = frozenset(
    (
        "bpb", "bpc", "brier", "cer", "deviance", "distance", "divergence", "ece", "eer", "err",
        "error", "errors", "fid", "hamming", "kl", "loss", "mae", "mape", "mse", "msle", "nll",
        "overlap_error", "perplexity", "ppl", "rmse", "smape", "ter", "wer",
    )
)  # fmt: skip
HIGHER = frozenset(
    (
        "acc", "accuracy", "ap", "auc", "auprc", "auroc", "bertscore", "bleu", "chrf", "dice",
        "em", "exact", "f1", "fbeta", "hit", "hits", "iou", "jaccard", "kappa", "map", "matthews",
        "mcc", "meteor", "miou", "mrr", "ndcg", "pearson", "pearsonr", "precision", "psnr", "r2",
        "recall", "roc", "rouge", "rouge1", "rouge2", "rougel", "rougelsum", "sacrebleu",
        "sensitivity", "spearman", "spearmanr", "specificity", "ssim",
    )
)  # fmt: skip
TURNED = frozenset(
    {"neg", "negative", "inverse", "minus", "one", "improvement", "reduction", "gain"}
)


def in_logs(metric: str) -> str:
    """The name that evaluation reports a metric under."""
    return metric if metric.startswith("eval_") else f"eval_{metric}"


def chosen_metric(told: str | None, args: Any) -> str:
    """The metric's name in the logs: what was told, else the arguments', else the loss."""
    return in_logs(told or args.metric_for_best_model or "loss")


def chosen_direction(told: str | None, greater_is_better: bool | None, args: Any) -> bool:
    """Whether more is better: as was told, else as the arguments stand, else by the name."""
    if greater_is_better is not None:
        return greater_is_better
    if told is None and args.metric_for_best_model is not None:
        return bool(args.greater_is_better)
    name = chosen_metric(told, args)
    lower = lower_is_better(name)
    return not (name.endswith("loss") if lower is None else lower)


def lower_is_better(metric: str) -> bool | None:
    """Whether a metric of this name is better when lower; None where the name does not say."""
    words = set(metric.lower().replace("-", "_").replace("@", "_").split("_"))
    if words & TURNED:
        return None
    low, high = bool(words & LOWER), bool(words & HIGHER)
    return low if low != high else None
