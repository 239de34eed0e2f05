"""Two processes: the same weights on both, different rows on each."""

from pathlib import Path

import pytest
import torch

from hf_recipe.complexify.ranks import (
    RANKS_DIVERGED,
    RANKS_SHARE_DATA,
    RankBatches,
    RankWeights,
    batches_of,
    checksum,
    fingerprint,
    weights_of,
)
from tests.models import bert
from tests.processes import torchrun


def test_judging_weights():
    assert list(RANKS_DIVERGED.judge(RankWeights(8, 2, 0.0, ()))) == []
    (fault,) = RANKS_DIVERGED.judge(RankWeights(8, 2, 1e-6, (1,)))
    assert "1 of 2 processes differ" in fault.message


def test_judging_batches():
    def found(*numbers):
        return list(RANKS_SHARE_DATA.judge(RankBatches(*numbers)))

    assert len(found(2, 4, 4, 4)) == 1
    assert found(2, 4, 0, 4) == []
    assert found(2, 4, 1, 4) == []  # a chance meeting in tiny data
    assert found(2, 4, 4, 1) == []  # all rows are alike: nothing can be told
    assert found(2, 1, 1, 1) == []


def test_a_checksum_sees_one_weight():
    model = bert()
    before = checksum(model).tolist()
    assert weights_of(1, [before, checksum(model).tolist()]).apart == ()
    with torch.no_grad():
        model.classifier.weight[0, 0] += 1e-3
    assert weights_of(1, [before, checksum(model).tolist()]).apart == (1,)
    assert weights_of(1, [before, [float("nan")] * 3]).apart == (1,)


def test_fingerprints():
    a = fingerprint({"input_ids": torch.arange(4), "name": "x"})
    assert a == fingerprint({"input_ids": torch.arange(4)})
    assert a != fingerprint({"input_ids": torch.arange(4).flip(0)})
    assert fingerprint({}) == ""
    measured = batches_of([["a", "b"], ["a", "c"]])
    assert (measured.compared, measured.shared, measured.distinct) == (2, 1, 2)


@pytest.mark.slow
def test_two_processes_healthy_drifting_and_on_the_same_rows(tmp_path):
    script = Path(__file__).with_name("ranks.py")
    torchrun(script, tmp_path)
    told = ("[]", "['ranks-diverged']", "['ranks-share-data']")
    runs = [f"steps 10 ran 2 found {found} crashed {{}}" for found in told]
    for rank in (0, 1):
        lines = (tmp_path / f"rank{rank}.txt").read_text().splitlines()
        assert lines == ["world 2", *runs]


@pytest.mark.slow
def test_every_process_knows_the_margins_of_every_row(tmp_path):
    script = Path(__file__).with_name("margins_of_ranks.py")
    torchrun(script, tmp_path)
    one, other = ((tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1))
    assert one == other
    assert one.startswith("seen 101 same 101 ")
    assert one.endswith("reason '' crashed {}")
