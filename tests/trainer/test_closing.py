"""What leaves the process: checkpoints and trackers get no row of the data."""

import json

import pytest

import hf_recipe
from hf_recipe.core.finding import Finding
from hf_recipe.report import tracking
from tests.models import classifier
from tests.report.test_tracking import Run

FOUND = Finding(
    check="label-shortcut", stage="data", severity="error", message="3 rows",
    quotes=("canary",), examples=(17,),
)  # fmt: skip


@pytest.mark.parametrize("consent", [False, True])
def test_a_checkpoint_holds_findings_and_rows_only_with_consent(tmp_path, consent):
    recipe = hf_recipe.attach(classifier(tmp_path), log_samples=consent)
    recipe.report.add(FOUND)
    text = json.dumps(recipe.closing.live_state())
    assert "label-shortcut" in text
    assert ("canary" in text) is consent
    recipe.detach()


def test_a_run_of_wandb_is_told(tmp_path, monkeypatch):
    sent = []

    class Quiet(Run):
        id = "r1"

        def log_artifact(self, artifact):
            sent.append({e.path for e in artifact.manifest.entries.values()})

    run = Quiet()
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tracking, "wandb_run", lambda: run)
    trainer = classifier(tmp_path)
    recipe = hf_recipe.attach(trainer)
    recipe.report.add(FOUND)
    recipe.closing.heard(FOUND)
    trainer.train()
    assert [alert["title"] for alert in run.alerts] == ["error: label-shortcut"]
    assert run.logged[-1]["train/global_step"] == 20
    assert run.summary["recipe/errors"] == 1
    assert sent == [{"report.html", "report.json"}]
