"""The head of a saved model's card, on literal results."""

from hf_recipe.core.exhibit import Answer
from hf_recipe.core.report import Report
from hf_recipe.runner.cards import ARRIVED, card_head


def result(loss, error, accuracy, parameters):
    numbers = {"loss": loss, "loss_error": error, "accuracy": accuracy}
    return numbers | {"parameters": parameters, "rows": 359}


RESULTS = {
    "model": result(0.08, 0.01, 0.975, 102_218),
    "ensemble": result(0.07, 0.01, 0.978, 306_654),
    "student": result(0.2, 0.02, 0.961, 26_538),
}


def test_a_students_card_says_whose_it_is_and_what_has_arrived():
    report = Report(title="job", status="running")
    report.answer(Answer(ARRIVED, "tune", "the top answers agree on 96.7% of 362 rows"))
    card = card_head("student", "digits", "accuracy", RESULTS, report)
    assert card.startswith("---\ntags:\n- hf_recipe\n---\n\n# digits: the student\n")
    assert "stands in for the ensemble" in card
    assert "26,538 parameters instead of 306,654" in card
    assert f"- {ARRIVED} the top answers agree on 96.7% of 362 rows." in card
    assert "| **student**, this one | 0.2000 +- 0.0200 | 0.9610 | 26,538 |" in card
    assert 'load_saved("student")' in card


def test_a_models_card_is_no_students():
    alone = {name: RESULTS[name] for name in ("model", "student")}
    report = Report(title="job", status="running")
    card = card_head("model", "digits", "accuracy", alone, report)
    assert "distilled" not in card
    assert "| student | 0.2000" in card
    assert "stands in for the model" in card_head("student", "digits", "accuracy", alone, report)
