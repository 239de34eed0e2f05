"""A healthy run is quiet: no warning, no error, nothing crashed."""

import json
from pathlib import Path

import pytest

from tests.gallery.harness import alarms, everything, run
from tests.gallery.healthy import HEALTHY
from tests.gallery.healthy_heads import HEADS
from tests.gallery.healthy_more import MORE
from tests.gallery.healthy_scripts import SCRIPTS
from tests.processes import torchrun


def quiet(case, folder, **how):
    report = run(case.build(folder, 5), **how)
    told = [(f.check, f.severity, f.message) for f in everything(report)]
    assert alarms(report) <= set(case.may), told


@pytest.mark.slow
@pytest.mark.parametrize("case", HEALTHY, ids=str)
def test_a_healthy_run_is_quiet(case, tmp_path):
    quiet(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE, ids=str)
def test_so_it_is_by_one_line_alone(case, tmp_path):
    """The probes then run at train begin, on the prepared model."""
    quiet(case, tmp_path, preflight=False)


SAMPLED = ("variational", "slow target", "sharpness-aware", "averaged evaluation",
           "rare class drawn often", "multiple choice", "CTC")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in (*SCRIPTS, *HEADS) if c.name in SAMPLED], ids=str)
def test_so_are_scripts_of_strangers(case, tmp_path):
    """A few of them; the benchmark runs them all, over seeds, and compares with bare runs."""
    quiet(case, tmp_path)


@pytest.mark.slow
def test_so_are_two_processes(tmp_path):
    names = ("BatchNorm", "accumulated", "stream")
    torchrun(Path(__file__).with_name("healthy_ranks.py"), tmp_path, *names)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for name in names:
        for found in ranks:
            assert found[name]["same"], name
            assert (found[name]["crashed"], found[name]["alarms"]) == ({}, []), name
            assert found[name]["ran"] > 20
