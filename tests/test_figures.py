"""The page of figures says what the commands have written, and no more."""

import json

import pytest

from scripts.figures import PAGE, Figures, page


def test_the_page_is_as_generated():
    assert PAGE.read_text() == page(), "run: python scripts/figures.py"


@pytest.mark.parametrize(
    ("value", "targets", "status"),
    [
        (1.02, {"most": 1.03}, 0),
        (1.04, {"most": 1.03}, 1),
        (0.9, {"least": 0.95}, 1),
        (0.75, {"least": 0.7, "most": 0.9}, 0),
        (float("nan"), {"most": 1.0}, 1),
        (5.0, {}, 0),
    ],
)
def test_a_missed_target_is_said(tmp_path, capsys, value, targets, status):
    figures = Figures("scripts/benchmark.py speed --seeds 3", "Speed")
    figures.record("a step", value, interval=(0.5, 1.5), **targets)
    assert figures.finish(tmp_path) == status
    assert ("MISSED" in capsys.readouterr().out) == bool(status)
    assert json.loads((tmp_path / "speed.json").read_text())["figures"][0]["met"] == (not status)
    text = page(tmp_path)
    assert "`python scripts/benchmark.py speed --seeds 3`" in text
    assert ("**missed**" in text) == bool(status)
