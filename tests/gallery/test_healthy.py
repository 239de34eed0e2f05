"""A healthy run is quiet: no warning, no error, nothing crashed."""

import pytest

from tests.gallery.harness import alarms, everything, run
from tests.gallery.healthy import HEALTHY


@pytest.mark.slow
@pytest.mark.parametrize("case", HEALTHY, ids=str)
def test_a_healthy_run_is_quiet(case, tmp_path):
    report = run(case.build(tmp_path, 5))
    told = [(f.check, f.severity, f.message) for f in everything(report)]
    assert alarms(report) <= set(case.may), told
