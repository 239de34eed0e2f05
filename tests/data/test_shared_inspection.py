from pathlib import Path

import datasets
import pytest

from hf_recipe.data import source
from hf_recipe.data.source import read_stream
from tests.data import worlds
from tests.processes import torchrun


def test_all_processes_together_find_what_one_finds():
    torchrun(Path(__file__).parent / "shared_inspection.py", 2, processes=2)


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_parts_are_all_rows_once(parts, monkeypatch):
    monkeypatch.setattr(source, "CHUNK", 7)
    from hf_recipe.inspection import read_split

    whole = read_split("train", worlds.classified(40))
    found = [whole.part(place, parts) for place in range(parts)]
    assert [row for part in found for row in part.rows.tolist()] == list(range(40))
    assert sum(len(part.data) for part in found) == 40


def test_a_stream_is_read_no_further_than_memory_is_meant_to_hold(monkeypatch):
    drawn = []

    def rows():
        for i in range(10**9):
            drawn.append(i)
            yield {"text": "x" * 1_000, "label": i % 2}

    stream = datasets.IterableDataset.from_generator(rows)
    assert len(read_stream("train", stream, limit=50)) == 50
    assert len(drawn) <= 51
    monkeypatch.setattr(source, "STREAM_BYTES", 20_000)
    drawn.clear()
    assert len(read_stream("train", stream)) == 20
    assert len(drawn) <= 21
