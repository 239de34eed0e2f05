import datasets
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_iris

from hf_recipe.data.hashing import array_hashes, table_hashes
from hf_recipe.data.splits import OVERLAP, SPLIT_LEAK, SplitOverlap, copied, split_leak
from tests.data import worlds


def faults(**values):
    base = {"columns": ("text",), "train_rows": 1000, "rows": 200, "train_distinct": 1000}
    return list(split_leak(SplitOverlap(**{**base, **values})))


def leak(train, evaluation, tmp_path, **args):
    model = torch.nn.Linear(2, 2)
    trainer = worlds.trainer(
        model, train, evaluation, tmp_path, remove_unused_columns=False, **args
    )
    report = worlds.examined(trainer, OVERLAP)
    return [f for f in report.flat if f.check == "split-leak"], report


def test_judge_on_literal_numbers():
    assert not faults(copies=0)
    (fault,) = faults(copies=30, rich=30, relabelled=2, examples=(4, 7))
    assert fault.severity == "error"
    assert "30 of 200 rows (15.0%)" in fault.message
    assert "2 of them under another label" in fault.message
    assert fault.examples == (4, 7)
    assert not faults(copies=30, rich=30, same_data=True)
    assert not faults(copies=30, rich=30, declared=True)


def test_judge_chance():
    assert not faults(copies=30, rich=0, poor_expected=28.0, poor_deviation=5.0)
    (fault,) = faults(copies=90, rich=0, poor_expected=28.0, poor_deviation=5.0)
    assert fault.severity == "error"
    # a random split of a repeated training set: not beyond what its repeats predict
    (fault,) = faults(copies=40, rich=40, rich_expected=42.0, rich_deviation=6.0)
    assert fault.severity == "note"
    assert "repeats itself" in fault.message
    # counting or grammars: few inputs, each many times
    assert not faults(
        copies=200, rich=200, rich_expected=200.0, rich_deviation=1.0, train_distinct=100
    )


def test_one_copy_in_a_thousand_is_no_error():
    (fault,) = faults(copies=1, rich=1, rows=1000)
    assert fault.severity == "warning"


def test_hashes_do_not_depend_on_widths_or_chunks():
    import pyarrow as pa

    narrow, wide = pa.array([[1, 2], [3]], pa.list_(pa.int32())), pa.array([[1, 2], [3]])
    assert (array_hashes(narrow) == array_hashes(wide)).all()
    assert (array_hashes(pa.array([1, 2, None])) != array_hashes(pa.array([1, 3, 0]))).sum() == 2
    table = pa.table({"a": ["x", "y", "z"] * 50, "b": [[1.0, 2.0], [], None] * 50})
    whole = table_hashes(table, ["a", "b"])
    parts = [table_hashes(table.slice(i, 7), ["a", "b"]) for i in range(0, 150, 7)]
    assert (np.concatenate(parts) == whole).all()
    assert len(np.unique(whole)) == 3


def test_thirty_of_a_thousand_copied_rows_are_thirty(tmp_path):
    train, evaluation = worlds.classified(2000, 0), worlds.classified(970, 1)
    rows = list(range(0, 300, 10))
    copied = train.select(rows).map(lambda row, i: {"label": 1 - row["label"]} if i < 4 else {},
                                    with_indices=True)  # fmt: skip
    found, _ = leak(train, datasets.concatenate_datasets([evaluation, copied]), tmp_path)
    (finding,) = found
    assert finding.severity == "error"
    assert finding.split == "validation"
    assert finding.evidence["copies"] == 30
    assert finding.evidence["relabelled"] == 4
    assert set(finding.examples) <= set(range(970, 1000))


def test_what_the_model_sees_is_compared_not_row_numbers(tmp_path):
    train = worlds.tokenized(worlds.classified(300, 0))
    train = train.add_column("id", list(range(300)))
    evaluation = train.select(range(100, 160)).remove_columns("id")
    evaluation = evaluation.add_column("id", list(range(900, 960)))
    trainer = worlds.trainer(worlds.bert(), train, evaluation, tmp_path, tok=worlds.tokenizer())
    (finding,) = worlds.examined(trainer, OVERLAP).flat
    assert finding.evidence["copies"] == 60


@pytest.mark.parametrize("seed", range(8))
def test_clean_splits_are_silent(seed, tmp_path):
    rng = np.random.default_rng(seed)
    for data in (
        # short texts, categories, dice: they repeat by chance
        {"text": [worlds.WORDS[i] for i in rng.integers(0, 40, 800)]},
        {"a": rng.integers(0, 3, 800), "b": rng.integers(0, 5, 800), "c": rng.integers(0, 4, 800)},
        {"text": [" ".join(rng.choice(worlds.WORDS, 2)) for _ in range(800)]},
        {"x": np.round(rng.normal(size=800), 1), "y": np.round(rng.normal(size=800), 1)},
        {"a": (z := rng.zipf(1.5, 800).clip(0, 10**6)), "b": z % 7},
        # counting in a small world of long sequences
        {"input_ids": [[(s + i * d) % 10 + 7 for i in range(24)]
                       for s, d in rng.integers(0, 10, (800, 2))]},
        {"text": worlds.sentences(800, rng)},
    ):  # fmt: skip
        whole = datasets.Dataset.from_dict({**data, "label": rng.integers(0, 2, 800)})
        found, _ = leak(whole.select(range(600)), whole.select(range(600, 800)), tmp_path)
        assert not found, found


def test_poor_inputs_that_are_copied_all_the_same(tmp_path):
    rng = np.random.default_rng(0)
    data = {name: rng.integers(0, 6, 800) for name in "abcde"}
    whole = datasets.Dataset.from_dict({**data, "label": rng.integers(0, 2, 800)})
    found, _ = leak(whole.select(range(600)), whole.select(range(200)), tmp_path)
    assert found[0].severity == "error"


def test_repeated_rows_split_at_random(tmp_path):
    once = worlds.classified(400, 0)
    split = datasets.concatenate_datasets([once, once]).train_test_split(0.2, seed=0)
    found, _ = leak(split["train"], split["test"], tmp_path)
    assert [f.severity for f in found] == ["error"]
    assert "copied before they were split" in found[0].message


def test_copies_are_told_from_a_small_world():
    """Each input twice leaves a hole where chance would have triplets."""
    rng = np.random.default_rng(0)
    inputs = np.arange(400, dtype=np.uint64)
    for times in (2, 4):
        every = rng.permutation(np.concatenate([inputs] + [inputs[:200]] * (times - 1)))
        assert copied(every[: len(every) // 2], every[len(every) // 2 :]) == 200 * times
    for draws in (
        rng.integers(0, 700, 600),  # a small world
        rng.integers(0, 100, 900),  # a smaller one
        rng.zipf(1.3, 900).clip(0, 500),  # an uneven one
        rng.permutation(np.r_[inputs, inputs[:20]]),  # too few copies to say
    ):
        draws = draws.astype(np.uint64)
        assert copied(draws[: len(draws) // 2], draws[len(draws) // 2 :]) == 0


def test_a_few_repeated_rows_split_at_random(tmp_path):
    once = worlds.classified(400, 0)
    some = datasets.concatenate_datasets([once, once.select(range(20))])
    split = some.train_test_split(0.2, seed=0)
    found, _ = leak(split["train"], split["test"], tmp_path)
    assert [f.severity for f in found] == ["note"]


def test_digits_and_iris(tmp_path):
    for load, clean in ((load_digits, True), (load_iris, True)):
        x, y = load(return_X_y=True)
        whole = datasets.Dataset.from_dict({"pixel_values": x, "labels": y}).shuffle(seed=0)
        cut = int(0.8 * len(y))
        train, evaluation = whole.select(range(cut)), whole.select(range(cut, len(y)))
        found, _ = leak(train, evaluation, tmp_path)
        assert (not found) == clean
        found, _ = leak(train, train.select(range(40)), tmp_path)
        assert found[0].severity == "error"


def test_a_training_subset_that_says_so(tmp_path):
    train, evaluation = worlds.classified(200, 0), worlds.classified(60, 1)
    found, report = leak(
        train, {"train_subset": train.select(range(50)), "validation": evaluation}, tmp_path
    )
    assert not found
    assert report.ran["split-leak"] == ["dataset"]
    assert not leak(train, train, tmp_path)[0]  # eval-in-training-set speaks of this


class Rows(torch.utils.data.Dataset):
    def __init__(self, x, y, noise=0.0):
        self.x, self.y, self.noise = x, y, noise

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        x = self.x[i] + self.noise * torch.randn(self.x[i].shape)
        return {"pixel_values": x, "labels": self.y[i]}


def test_torch_data_sets(tmp_path):
    images = torch.randn(120, 3, 32, 32)
    labels = torch.randint(0, 2, (120,))
    train = Rows(images[:100], labels[:100])
    assert not leak(train, Rows(images[100:], labels[100:]), tmp_path)[0]
    (finding,), _ = leak(train, Rows(images[90:], labels[90:]), tmp_path)
    assert finding.evidence["copies"] == 10
    _, report = leak(Rows(images, labels, noise=0.1), train, tmp_path)
    assert "differently each time" in report.skipped["split-leak"]


def test_check_is_complete():
    assert len(SPLIT_LEAK.why) <= 160
    assert SPLIT_LEAK.thresholds["deviations"].provenance
