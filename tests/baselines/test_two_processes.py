"""Baselines over two processes: sharded parameters, and one batch size for all."""

import json
from pathlib import Path

import pytest

from tests.processes import torchrun


@pytest.mark.slow
def test_a_sharded_batch_is_learned_and_put_back_and_ranks_agree_on_a_size(tmp_path):
    torchrun(Path(__file__).with_name("two_processes.py"), tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for each in (first, second):
        assert each["world"] == each["processes"] == 2
        assert each["sharded"] < each["whole"]
        assert each["same"]
        assert each["still"]
        assert each["reached"]
        assert each["largest"] == 21
    assert first["end"] == second["end"]
    assert first["gradient"] == pytest.approx(second["gradient"])
    assert first["advised"] == second["advised"]
