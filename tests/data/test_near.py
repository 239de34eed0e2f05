import io
import itertools

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits

import hf_recipe
from hf_recipe.data.minhash import band_keys, candidate_pairs, overlaps, shingles_of, words_of
from hf_recipe.data.near import NearCopies, Side, near_copies, near_duplicate_example, near_leak
from hf_recipe.data.resplit import assign, group_split
from hf_recipe.data.source import read_source
from hf_recipe.inspection import inspect_dataset
from hf_recipe.instruments.batches import Rows
from tests.data import planted

BASE = {"columns": ("text",), "how": "word pairs", "rows": 1000, "compared": 1000,
        "threshold": 0.55}  # fmt: skip


def texts(rows, seed, words=60, vocabulary=5000):
    rng = np.random.default_rng(seed)
    chance = 1 / np.arange(1, vocabulary + 1)
    chosen = rng.choice(vocabulary, (rows, words), p=chance / chance.sum())
    return [" ".join(f"word{i}" for i in row) for row in chosen]


def edited(text, share, rng):
    words = text.split()
    for place in rng.choice(len(words), max(1, round(share * len(words))), replace=False):
        words[place] = f"other{rng.integers(10_000)}"
    return " ".join(words)


def side(rows, label=None):
    data = rows if isinstance(rows, datasets.Dataset) else datasets.Dataset.from_dict(rows)
    columns = tuple(c for c in data.column_names if c != label)
    return Side.of(read_source(Rows(data, data, None, "train")), columns, label)


def test_judges_on_literal_numbers():
    assert not list(near_duplicate_example(NearCopies(**BASE)))
    assert not list(near_duplicate_example(NearCopies(**BASE, copies=9)))
    (fault,) = near_duplicate_example(NearCopies(**BASE, copies=40, groups=20, mean_group=3.0))
    assert "40 of 1,000 rows (4.0%)" in fault.message
    assert not list(near_leak(NearCopies(**BASE)))
    (fault,) = near_leak(NearCopies(**BASE, in_train=12, relabelled=3, leaked=(5, 2)))
    assert fault.severity == "warning"
    assert fault.examples == (5, 2)
    assert "3 of them under another label" in fault.message
    (fault,) = near_leak(NearCopies(**BASE, in_train=2))
    assert fault.severity == "note"
    assert not list(near_leak(NearCopies(**BASE, in_train=500, mean_group=200.0)))


def test_words_and_their_pairs():
    def words(text, kind=None):
        array = pa.array(["x y", text, "z"], type=kind or pa.string())
        hashes, bounds = words_of(array.slice(1, 1))
        assert bounds.tolist() == [0, len(hashes)]
        return hashes.tolist()

    assert words("The cat, the Dog!") == words("the cat the dog")
    assert len(words("the cat the dog")) == 4
    assert words("the cat")[0] == words("the dog")[0] == words("a the", pa.large_string())[1]
    assert words("abc")[0] != words("acb")[0]
    assert len(words("猫がいる")) == 4
    assert words("") == []
    (found,) = overlaps(
        np.array([[0, 1]]), shingles_of([pa.array(["a b c d", "a b c e"])])
    )  # ab bc cd, ab bc ce
    assert found == pytest.approx(2 / 4)
    (ids,) = overlaps(np.array([[0, 1]]), shingles_of([pa.array([[1, 2, 3], [1, 2, 3, 4]])]))
    assert ids == pytest.approx(2 / 3)


def test_overlap_agrees_with_sets():
    rng = np.random.default_rng(0)
    rows = [" ".join(rng.choice(list("abcdef"), rng.integers(1, 30))) for _ in range(60)]
    pairs = np.array([[i, j] for i in range(60) for j in range(i)])
    found = overlaps(pairs, shingles_of([pa.array(rows)]))

    def shingled(text):
        words = text.split()
        return set(itertools.pairwise(words)) or {tuple(words)}

    wanted = [len(shingled(rows[i]) & shingled(rows[j])) / len(shingled(rows[i])
              | shingled(rows[j])) for i, j in pairs]  # fmt: skip
    assert found == pytest.approx(np.array(wanted))


@pytest.mark.parametrize(("share", "recall"), [(0.02, 0.99), (0.05, 0.98), (0.1, 0.8)])
def test_planted_edits_are_found(share, recall):
    rng = np.random.default_rng(1)
    base = texts(3000, 0)
    planted = [edited(base[i], share, rng) for i in range(500)]
    found = near_copies(side({"text": base + planted}))
    assert 500 * recall <= found.copies <= 500
    assert min(found.examples) >= 3000  # precision: nothing but what was planted
    whole = side({"text": base + planted})
    pairs = candidate_pairs(whole.prints.keys, np.ones(3500, dtype=bool))
    told = pairs[whole.prints.likeness(pairs, whole.prints) >= found.threshold]
    assert np.mean([b - a == 3000 for a, b in told]) >= 0.99


@pytest.mark.parametrize("seed", range(5))
def test_clean_data_has_no_near_copies(seed):
    small = texts(400, seed, words=14, vocabulary=40)
    for rows in (texts(800, seed), small, texts(400, seed, words=30, vocabulary=5)):
        assert near_copies(side({"text": rows})).copies <= 1
    ids = np.random.default_rng(seed).integers(0, 50, (500, 20)).tolist()
    assert near_copies(side({"input_ids": ids})).copies == 0


def test_templates_are_no_leak():
    rng = np.random.default_rng(0)
    template = "the price of the house number {} in the old street by the river was {} pounds"
    rows = [template.format(rng.integers(10**6), rng.integers(10**6)) for _ in range(600)]
    report = inspect_dataset(
        {
            "train": datasets.Dataset.from_dict({"text": rows[:500]}),
            "validation": datasets.Dataset.from_dict({"text": rows[500:]}),
        }
    )
    assert not [f for f in report.flat if f.check == "split-leak"]


def test_the_same_context_with_another_question_is_another_row():
    context = texts(50, 0)
    data = {"context": context * 3, "question": texts(150, 1, words=12)}
    assert near_copies(side(data)).copies == 0


def test_a_near_leak_is_told_with_its_labels(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_RECIPE_CACHE", str(tmp_path))
    rng = np.random.default_rng(0)
    base, labels = texts(400, 0, words=30), rng.integers(0, 2, 400).tolist()
    held, held_labels = texts(100, 1, words=30), rng.integers(0, 2, 100).tolist()
    for i in range(10):
        held[10 + i] = edited(base[i], 0.05, rng)
        held_labels[10 + i] = labels[i] if i else 1 - labels[i]
    splits = {
        "train": datasets.Dataset.from_dict({"text": base, "label": labels}),
        "test": datasets.Dataset.from_dict({"text": held, "label": held_labels}),
    }
    report = inspect_dataset(splits)
    (leak,) = [f for f in report.flat if f.check == "split-leak"]
    assert (leak.severity, leak.split) == ("warning", "test")
    assert set(leak.examples) == set(range(10, 20))
    assert "1 of them under another label" in leak.message
    monkeypatch.setattr("hf_recipe.data.near.prints_of", None)  # the second launch searches nothing
    again = inspect_dataset(splits)
    assert not again.crashed
    assert [f.message for f in again.flat if f.check == "split-leak"] == [leak.message]
    monkeypatch.undo()
    mended = group_split(splits)
    clean = inspect_dataset(mended)
    assert not [f for f in clean.flat if f.check == "split-leak"]
    assert {k: len(v) for k, v in mended.items()} == pytest.approx(
        {"train": 400, "test": 100}, abs=6
    )


# ---------------------------------------------------------------- pictures


def photographs(count, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        grid = gaussian_filter(rng.normal(size=(48, 48)), 3)
        grid = (grid - grid.min()) / (grid.max() - grid.min()) * 255
        made.append(Image.fromarray(grid.astype(np.uint8)))
    return made


def pictures(images):
    feature = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_dict({"image": images}, features=feature)


def saved_again(image):
    file = io.BytesIO()
    image.resize((40, 40)).save(file, "JPEG", quality=40)
    return Image.open(io.BytesIO(file.getvalue()))


def test_images_saved_again_are_near_copies():
    one = photographs(150)
    two = [*photographs(80, 1), *(saved_again(image) for image in one[:20])]
    found = near_copies(side(pictures(two)), side(pictures(one)))
    assert found.in_train >= 19
    assert min(found.leaked) >= 80
    assert found.copies == 0


def test_digits_are_no_copies_of_each_other():
    x, _ = load_digits(return_X_y=True)
    images = [Image.fromarray((v.reshape(8, 8) * 15).astype(np.uint8)) for v in x[:800]]
    found = near_copies(side(pictures(images[600:])), side(pictures(images[:600])))
    assert not [f for f in near_leak(found) if f.severity != "note"]


def test_a_broken_image_is_left_out():
    images = photographs(30)
    data = pictures(images)
    table = data.data.table.to_pylist()
    table[3]["image"]["bytes"] = b"no image"
    broken = datasets.Dataset(pa.Table.from_pylist(table)).cast(data.features)
    found = near_copies(side(broken))
    assert (found.rows, found.compared, found.copies) == (30, 29, 0)


# ---------------------------------------------------------------- splitting anew


def test_groups_stay_together_and_labels_keep_their_share():
    rng = np.random.default_rng(0)
    groups = np.concatenate([np.repeat(np.arange(50), 6), np.arange(50, 750)])
    classes = rng.integers(0, 3, 1000)
    chosen = assign(groups, classes, [0.7, 0.2, 0.1], seed=1)
    for group in range(50):
        assert len(set(chosen[groups == group])) == 1
    shares = np.bincount(chosen) / 1000
    assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.01)
    for code in range(3):
        part = np.bincount(chosen[classes == code], minlength=3) / (classes == code).sum()
        assert part == pytest.approx([0.7, 0.2, 0.1], abs=0.03)
    assert (assign(groups, classes, [0.7, 0.2, 0.1], seed=1) == chosen).all()
    assert (assign(groups, classes, [0.7, 0.2, 0.1], seed=2) != chosen).any()


def test_a_group_column_and_bad_arguments():
    data = datasets.Dataset.from_dict(
        {"text": texts(90, 0), "patient": list(range(30)) * 3, "label": [0, 1, 1] * 30}
    )
    split = hf_recipe.group_split(data, {"train": 2, "test": 1}, group="patient")
    assert not set(split["train"]["patient"]) & set(split["test"]["patient"])
    assert len(split["train"]) == 60
    with pytest.raises(ValueError, match="no column 'pat'"):
        group_split(data, group="pat")
    with pytest.raises(ValueError, match="positive"):
        group_split(data, {"train": 1, "test": 0})
    with pytest.raises(TypeError, match="got list"):
        group_split([1, 2])
    assert len(band_keys([pa.array(["a b"])])[0]) == 1


def test_likeness_by_nature_is_told_from_copies():
    data = planted.halves(planted.digits(10))  # three pairs that happen to be alike
    found = near_copies(side(data["validation"]), side(data["train"]))
    assert found.in_train
    assert [f.severity for f in near_leak(found)] == ["note"]
    originals = [np.asarray(image) for image in data["train"].select(range(40))["image"]]
    dimmed = [Image.fromarray((pixels * 0.9).astype(np.uint8)) for pixels in originals]
    copied = pictures([*data["validation"]["image"], *dimmed])
    found = near_copies(side(copied), side(data["train"]))
    assert found.in_train > 35
    assert [f.severity for f in near_leak(found)] == ["warning"]
