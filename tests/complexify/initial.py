"""The measurement before step 1, by hand."""

from hf_recipe.baselines.initial_loss import InitialLoss


def initial_loss(observed: float, prior: float = 1.3, task: str = "classification") -> InitialLoss:
    return InitialLoss(
        observed=observed,
        recomputed=observed,
        expected=observed,
        standard_error=0.01,
        uniform=prior,
        prior=prior,
        task=task,
        problem_type="single_label",
        outputs=4,
        rows=32,
        groups=32,
    )
