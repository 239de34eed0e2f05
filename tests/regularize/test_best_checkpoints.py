"""The N best checkpoints with a real Trainer: kept, limited, resumed, chosen from."""

import json

import pytest
import torch

import hf_recipe
from hf_recipe.instruments.window import Evaluation
from hf_recipe.regularize.best_checkpoints import STATE, BestCheckpoints
from hf_recipe.regularize.early_stopping import EarlyStopping
from hf_recipe.regularize.paired_error import PairedError
from tests.regularize.test_early_stopping import trainer_of

OPTIONS = {"save_strategy": "steps", "save_steps": 2, "eval_steps": 2}
VALUES = {2: 5.0, 4: 1.0, 6: 3.0, 8: 2.0, 10: float("nan"), 12: 4.0}


def run(folder, callback, steps=12, resume=None, **changes):
    trainer = trainer_of(
        folder, callback, lambda step: VALUES.get(step, 9.0), steps, **{**OPTIONS, **changes}
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def on_disk(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def test_the_best_and_the_latest_are_kept(tmp_path):
    best = BestCheckpoints(2)
    trainer = run(tmp_path, best)
    assert best.kept == [(1.0, 4), (2.0, 8)]
    assert on_disk(tmp_path) == [4, 8, 12]
    weights = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    assert best.choose(trainer) == (4, 1.0)
    assert any(not torch.equal(v, weights[k]) for k, v in trainer.model.state_dict().items())


def test_more_is_better_where_it_is_said(tmp_path):
    best = BestCheckpoints(1, metric="loss", greater_is_better=True)
    run(tmp_path, best)
    assert best.kept == [(5.0, 2)]


@pytest.mark.parametrize(("limit", "expected"), [(1, [12]), (2, [4, 12]), (3, [4, 8, 12])])
def test_the_trainers_limit_is_never_passed(tmp_path, limit, expected):
    best = BestCheckpoints(5)
    trainer = run(tmp_path, best, save_total_limit=limit)
    assert on_disk(tmp_path) == expected
    assert trainer.args.save_total_limit == limit


def test_load_best_model_at_end_finds_its_checkpoint(tmp_path):
    best = BestCheckpoints(1)
    trainer = run(
        tmp_path, best, load_best_model_at_end=True, metric_for_best_model="loss", steps=8
    )
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert on_disk(tmp_path) == [4, 8]


def test_a_resumed_run_goes_on_with_what_was_kept(tmp_path):
    run(tmp_path, BestCheckpoints(2), steps=6)
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"][STATE] == {"kept": [[1.0, 4], [3.0, 6]]}
    again = BestCheckpoints(2)
    run(tmp_path, again, resume=str(tmp_path / "checkpoint-6"))
    assert again.kept == [(1.0, 4), (2.0, 8)]
    assert on_disk(tmp_path) == [4, 8, 12]


def test_other_rows_may_choose_among_them(tmp_path):
    best = BestCheckpoints(3)
    trainer = run(tmp_path, best)
    assert best.kept == [(1.0, 4), (2.0, 8), (3.0, 6)]
    judged = iter([3.0, 0.5, 0.7])
    trainer.evaluate = lambda data: {"eval_loss": next(judged)}
    assert best.choose(trainer, trainer.eval_dataset) == (8, 0.5)
    trainer.evaluate = lambda data: {"eval_other": 1.0}
    with pytest.raises(ValueError, match="eval_loss"):
        best.choose(trainer, trainer.eval_dataset)


def test_what_cannot_be_ranked_is_said(tmp_path, caplog):
    best = BestCheckpoints()
    trainer = run(tmp_path, best, steps=6, save_steps=3)
    assert best.kept == [(3.0, 6)]
    best = BestCheckpoints(metric="accuracy")
    run(tmp_path / "b", best, steps=4)
    assert "eval_accuracy was never evaluated" in caplog.text
    with pytest.raises(ValueError, match="nothing to choose"):
        best.choose(trainer)
    with pytest.raises(ValueError, match="at least one"):
        BestCheckpoints(0)


# ---------------------------------------------------------------- the paired error


def test_the_paired_error_is_of_the_rows_changes():
    seen = [None]
    error = PairedError(lambda: seen[0])
    assert error({}) is None
    seen[0] = Evaluation(1, "validation", (1.0, 2.0, 3.0, 4.0))
    assert error({}) is None
    seen[0] = Evaluation(2, "validation", (0.0, 1.0, 2.0, 5.0))
    assert error({}) == pytest.approx(0.5)
    assert error({}) == pytest.approx(0.5)
    seen[0] = Evaluation(3, "other", (0.0, 1.0))
    assert error({}) == pytest.approx(0.5)


def test_attach_gives_early_stopping_the_rows_errors(tmp_path):
    callback = EarlyStopping()
    trainer = trainer_of(tmp_path, callback, lambda step: 1.0 / step, steps=6)
    hf_recipe.attach(trainer, report_dir=tmp_path / "report")
    trainer.train()
    errors = callback.rule.state()["errors"]
    assert sum(error is not None and error > 0 for error in errors) >= 3
    mine = EarlyStopping(standard_error_of=lambda metrics: 0.25)
    trainer = trainer_of(tmp_path / "b", mine, lambda step: 1.0 / step, steps=3)
    hf_recipe.attach(trainer, report_dir=tmp_path / "report")
    trainer.train()
    assert mine.rule.state()["errors"] == [0.25] * 3
