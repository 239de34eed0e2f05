"""Workers and processes that draw alike; BatchNorm's statistics over two processes."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Trainer

from hf_recipe.complexify.batchnorm_ranks import (
    BATCHNORM_RANKS_DIFFER,
    RankStatistics,
    compared,
    plain,
    statistics_of,
)
from hf_recipe.complexify.rank_noise import RANKS_SHARE_NOISE, SharedNoise
from hf_recipe.instruments.held import held_generators, kept
from tests.gallery.harness import Case, assert_found, assert_silent, run
from tests.models import arguments, batchnorm, points
from tests.processes import torchrun


def test_judging_noise():
    def told(**changes):
        values = {
            "ranks": 2,
            "workers": 0,
            "draws": 16,
            "distinct": 16,
            "workers_alike": False,
            "ranks_alike": True,
            "in_rows": True,
            "sources": ("numpy's generator",),
        }
        return [
            (f.subject, f.severity)
            for f in RANKS_SHARE_NOISE.judge(SharedNoise(**{**values, **changes}))
        ]

    assert told() == [("processes", None)]
    assert told(workers_alike=True) == [("workers", None)]
    assert told(in_rows=False) == [("processes", "note")]
    assert told(ranks_alike=False) == []
    assert told(distinct=1) == []
    assert told(draws=0, distinct=0) == []
    assert told(draws=6, distinct=2) == []  # a coin, six times
    assert told(draws=6, distinct=6) == [("processes", None)]


def test_judging_statistics():
    def told(at_forward, layers=1):
        return list(
            BATCHNORM_RANKS_DIFFER.judge(RankStatistics(4, 2, layers, at_forward, 0.1, "a"))
        )

    assert told(0.0) == []  # and one update apart after the step, as it should be
    assert len(told(0.2)) == 1
    assert len(told(float("nan"))) == 1
    assert told(0.0, layers=0) == []


def test_statistics():
    a, b = batchnorm(), batchnorm()
    same = compared(4, [plain(statistics_of(m)) for m in (a, b)], [plain(statistics_of(a))] * 2)
    assert (same.layers, same.at_forward) == (1, 0.0)
    b.body[1].running_mean[3] += 0.5
    apart = compared(4, [plain(statistics_of(m)) for m in (a, b)], [plain(statistics_of(a))] * 2)
    assert apart.at_forward == pytest.approx(0.5)
    assert apart.worst == "body.1"


def test_held_generators_are_found_and_put_back():
    drawing = np.random.default_rng(0)
    closed, module = random.Random(1), torch.Generator()

    class Rows:
        transform = None

        def __init__(self):
            self.parts = [{"rng": drawing}]
            self.transform = lambda x: x + closed.random()

        def __getitem__(self, index):
            return GENERATOR.random()

    rows = Rows()
    found = held_generators(rows, module)
    assert {id(g) for g in found} == {id(drawing), id(closed), id(module), id(GENERATOR)}
    with kept(found):
        first = (drawing.random(), closed.random(), rows[0], torch.rand(1, generator=module))
    assert first == (drawing.random(), closed.random(), rows[0], torch.rand(1, generator=module))


GENERATOR = np.random.default_rng(5)


class Augmented(torch.utils.data.Dataset):
    """Points with noise from a generator that was made once, or in each call anew."""

    def __init__(self, kept_one):
        self.rows = points(64)
        self.generator = np.random.default_rng(0) if kept_one else None

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        generator = self.generator if self.generator is not None else np.random
        noise = torch.tensor(generator.normal(scale=0.1, size=8), dtype=torch.float32)
        return {"features": torch.tensor(row["features"]) + noise, "labels": row["labels"]}


def workers(folder, faulty):
    return Trainer(
        model=batchnorm(),
        args=arguments(folder, max_steps=4, dataloader_num_workers=2),
        train_dataset=Augmented(faulty),
    )


CASE = Case("ranks-share-noise", workers, "warning")


def test_workers_that_share_a_generator(tmp_path):
    report = assert_found(CASE, tmp_path)
    (found,) = [f for f in report.findings if f.check == CASE.check]
    assert "kept in the data set" in found.message


def test_workers_of_their_own(tmp_path):
    assert_silent(CASE, tmp_path)


def test_one_process_reads_its_own_rows(tmp_path):
    report = run(
        Trainer(
            model=batchnorm(), args=arguments(tmp_path, max_steps=2), train_dataset=Augmented(True)
        )
    )
    assert "one process" in report.skipped["ranks-share-noise"]
    assert "one process" in report.skipped["batchnorm-ranks-differ"]


def test_a_generator_of_the_data_sets_own_leaves_no_trace(tmp_path):
    """What the rows draw is the same with and without us."""
    drawn = []
    for watch in (False, True):
        data = Augmented(True)
        trainer = Trainer(
            model=batchnorm(), args=arguments(tmp_path, max_steps=4), train_dataset=data
        )
        if watch:
            run(trainer)
        else:
            trainer.train()
        drawn.append(data.generator.random())
    assert drawn[0] == drawn[1]


@pytest.mark.slow
def test_two_processes(tmp_path):
    script = Path(__file__).with_name("noise_ranks.py")
    torchrun(script, tmp_path)
    told = ("[]", "['ranks-share-noise']", "[]", "['batchnorm-ranks-differ']")
    for rank in (0, 1):
        lines = (tmp_path / f"rank{rank}.txt").read_text().splitlines()
        assert lines == ["world 2", *(f"ran 2 found {found} crashed {{}}" for found in told)]
