"""The catalogue as a whole: names, texts, thresholds, and the generated pages."""

import re

import pytest

from hf_recipe.catalogue import CHECKS, MONITORS, PROBES, measurement_kinds
from hf_recipe.core.finding import MOMENTS, STAGES
from hf_recipe.explanation import stored_checks
from scripts.catalogue import PAGES, as_json, as_markdown

NAMES = sorted(CHECKS)


@pytest.mark.parametrize("name", NAMES)
def test_a_check_is_complete(name):
    check = CHECKS[name]
    assert re.fullmatch(r"[a-z]+(-[a-z0-9]+)*", name)
    assert check.stage in STAGES
    assert set(check.moments) <= set(MOMENTS)
    assert check.why.endswith(".")
    assert len(check.why) <= 160
    assert check.fix
    assert re.search(r"\d{4}", check.source), "a source with its year"
    assert check.judges
    for threshold in check.thresholds.values():
        assert threshold.provenance, f"{threshold.name}: where does the default come from?"
    for other in check.explains:
        assert other != name


def test_every_measurement_has_a_probe_or_monitor_that_takes_it():
    taken = {k.kind() for p in PROBES.values() for k in p.measures}
    taken |= {k.kind() for m in MONITORS.values() for k in m.measures}
    by_call = {kind for check in CHECKS.values() if check.call for kind in check.by_kind}
    assert set(measurement_kinds()) <= taken | by_call


def test_every_probe_has_a_check_that_judges_or_uses_what_it_takes():
    """A probe without one is never run, and what waits for its evidence goes without."""
    for probe in PROBES.values():
        judged = {kind.kind() for kind in probe.measures} & set(measurement_kinds())
        assert judged or probe.serves, probe.name
        assert set(probe.serves) <= set(CHECKS), probe.name


def test_the_generated_pages_are_up_to_date():
    assert PAGES["json"].read_text() == as_json(), "run python scripts/catalogue.py"
    assert PAGES["md"].read_text() == as_markdown(), "run python scripts/catalogue.py"


def test_the_stored_catalogue_names_the_same_checks():
    assert set(stored_checks()) == set(CHECKS)
