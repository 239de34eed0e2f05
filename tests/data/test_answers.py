"""The costly questions about data, asked of data sets whose answers were planted."""

import datasets
import numpy as np
import pytest

from hf_recipe.catalogue import PROBES
from hf_recipe.core.check import Skip
from hf_recipe.data import cheap, context, downsample, drift, shortcuts, target_leak, variation
from hf_recipe.data.giveaway_tokens import Giveaway, named_after
from hf_recipe.data.remembered import recalling
from hf_recipe.data.words import tokenise
from tests.data import planted, worlds
from tests.data.asking import alarms, answer, ask, found, measured

SEEDS = (1, 2)


# ---------------------------------------------------------------- context


@pytest.mark.parametrize(
    ("truth", "says"),
    [
        ("bag", "local features are enough for a cheap probe: words tell"),
        ("neighbours", "local features are enough for a cheap probe: words and their neighbours"),
        ("order", "global context is needed: words in their order"),
        ("ends", "global context is needed: words in their order"),
        ("none", "undecided: no probe beats chance"),
    ],
)
def test_context_of_text(truth, says):
    report = ask(planted.context(truth, 1), "local-context-enough")
    assert answer(report, "Are local").startswith(says)
    assert bool(found(report, "local-context-enough", "note")) == says.startswith("local")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("build", "says"),
    [(planted.stripes, "local features"), (planted.blobs, "global"), (planted.digits, "global")],
)
def test_context_of_images(build, says, seed):
    report = ask(build(seed), "local-context-enough")
    assert answer(report, "Are local").startswith(says)


def rung(sees, accuracy, *, p_chance=0.0, p_next=1.0, most=0.01, local=True):
    return context.Rung(sees, accuracy, 0.01, p_chance, p_next, most, local)


def test_ladder_is_judged_by_its_numbers():
    def says(*rungs):
        ladder = context.ContextLadder(rungs, "text", 0.5, 1_000)
        return context.verdict(ladder)[0], len(list(context.local_context_enough(ladder)))

    assert says(rung("words", 0.9), rung("order", 0.9, local=False)) == ("local", 1)
    lead = rung("words", 0.6, p_next=1e-5), rung("order", 0.9, local=False)
    assert says(*lead) == ("global", 0)
    assert says(rung("words", 0.9, most=0.2), rung("order", 0.9, local=False)) == ("undecided", 0)
    assert says(rung("words", 0.5, p_chance=0.5)) == ("undecided", 0)
    assert says(rung("words", 0.5, p_chance=float("nan"))) == ("undecided", 0)


@pytest.mark.parametrize("tells", [True, False])
def test_place_on_a_noisy_ground(tells):
    """Noise all over an image does not keep what is drawn on it from the middle."""
    report = ask(planted.moved(0, tells=tells), "spurious-variation")
    free = [f.subject for f in found(report, "spurious-variation")]
    assert ("shift" in free) is not tells


def test_a_files_size_is_no_shortcut_and_texture_no_blank():
    """No network sees how well a file was packed; a blind probe makes no fact a shortcut."""
    report = ask(planted.textures(0), "label-shortcut")
    assert not alarms(report)
    assert measured(report, "LabelShortcuts")["content"]["auc"] > 0.9

    def notes(content, packed):
        told = shortcuts.Told("file's bytes", packed, 1e-9)
        seen = shortcuts.LabelShortcuts(
            "label", None, shortcuts.Told("pixels", content, 0.0), (),
            shortcuts.Told("row number", 0.5, 0.5), (told,), 500, 0.6,
        )  # fmt: skip
        return [(f.subject, f.severity) for f in shortcuts.label_shortcut(seen)]

    assert notes(1.0, 0.95) == [("file's bytes", "note")]
    assert not notes(1.0, 0.75)
    assert notes(0.6, 0.75) == [("file's bytes", "note")]


# ---------------------------------------------------------------- size


@pytest.mark.parametrize("where", ["head", "tail", "middle"])
def test_size_of_text(where):
    report = ask(planted.evidence(0, where), "input-oversized")
    (finding,) = found(report, "input-oversized", "note")
    assert (finding.evidence["way"], finding.evidence["size"]) == (where, 32)


def test_size_of_images():
    report = ask(planted.digits(0, side=32, noise=60.0), "input-oversized")
    (finding,) = found(report, "input-oversized", "note")
    assert 6 <= finding.evidence["size"] <= 12  # the information ends at 8


def test_a_label_at_chance_has_no_size():
    report = ask(planted.context("none", 0), "input-oversized")
    assert answer(report, "How far").startswith("undecided")
    assert not found(report, "input-oversized")


def sweep(*sizes, p_chance=0.0):
    return downsample.SizeSweep("text", 128, 128, 0.9, p_chance, 1_000, tuple(sizes))


def size(count, *, p_loss=0.5, most=0.01, way="head"):
    return downsample.Size(way, count, 0.9, 0.01, p_loss, most)


def test_sweep_is_judged_by_its_numbers():
    def cut(*sizes, **more):
        return [f.evidence["size"] for f in downsample.input_oversized(sweep(*sizes, **more))]

    assert cut(size(64), size(32), size(16, p_loss=1e-4)) == [32]
    assert cut(size(64), size(96, way="tail")) == [64]
    assert cut(size(96), size(64, p_loss=1e-4)) == []  # three quarters is not worth a note
    assert cut(size(64, most=0.2), size(32)) == []  # a loss could hide
    assert cut(size(64), p_chance=0.3) == []
    assert cut() == []


# ---------------------------------------------------------------- variation


@pytest.mark.parametrize("tells", [False, True])
@pytest.mark.parametrize("kind", ["case", "accents", "white space", "digits"])
def test_variation_of_text(kind, tells):
    report = ask(planted.varied(3, kind, tells=tells), "spurious-variation")
    free = [f.subject for f in found(report, "spurious-variation", "note")]
    assert (kind in free) is not tells
    assert (f"{kind}: must stay" in answer(report, "Which variation")) is tells


@pytest.mark.parametrize("tells", [False, True])
@pytest.mark.parametrize("kind", ["brightness", "contrast", "shift"])
def test_variation_of_images(kind, tells):
    report = ask(planted.lit(0, kind, tells=tells), "spurious-variation")
    free = [f.subject for f in found(report, "spurious-variation", "note")]
    assert (kind in free) is not tells


def test_variation_is_judged_by_its_numbers():
    def said(share=0.5, p_loss=0.5, most=0.01, p_chance=0.0):
        one = variation.Variation("case", share, 0.9, p_loss, 0.5, most)
        trials = variation.VariationTrials("text", 0.9, p_chance, 1_000, (one,))
        return variation.verdict(one), len(list(variation.spurious_variation(trials)))

    assert said() == ("spurious", 1)
    assert said(p_loss=1e-4) == ("tells", 0)
    assert said(most=0.1) == ("undecided", 0)
    assert said(share=0.0) == ("absent", 0)
    assert said(p_chance=0.4) == ("spurious", 0)


# ---------------------------------------------------------------- shortcuts


def longer(seed, deviations, *, content):
    """Texts whose length goes with the label; with or without words that tell it too."""
    rng = planted.rng_of(seed)
    y = rng.integers(0, 2, 2_000)
    lengths = np.maximum(3, np.rint(30 + 8 * rng.normal(size=2_000) + 8 * deviations * y)).astype(
        int
    )
    texts = []
    for label, length in zip(y, lengths, strict=True):
        words = rng.choice(planted.WORDS, length).astype(object)
        if content and rng.random() < 0.97:
            words[rng.integers(length)] = ("good", "poor")[label]
        texts.append(" ".join(words))
    return planted.dataset(texts, y)


@pytest.mark.parametrize("seed", SEEDS)
def test_length_shortcut(seed):
    (finding,) = found(ask(longer(seed, 1.0, content=False), "label-shortcut"), "label-shortcut")
    assert finding.severity == "warning"
    assert "words" in finding.subject
    (finding,) = found(ask(longer(seed, 0.8, content=True), "label-shortcut"), "label-shortcut")
    assert finding.severity == "note"
    assert not found(ask(longer(seed, 0.0, content=True), "label-shortcut"), "label-shortcut")


def test_brightness_shortcut_and_plain_digits():
    lit = planted.digits(0, shift=lambda pixels, y, rng: pixels / 2 + 12 * y[:, None, None])
    (finding,) = found(ask(lit, "label-shortcut"), "label-shortcut")
    assert finding.severity == "warning"
    assert not found(ask(planted.digits(0), "label-shortcut"), "label-shortcut", "warning")


def test_order_and_other_columns_are_notes():
    data = planted.keyed(0)
    source = ["a" if y else "b" for y in data["label"]]
    data = data.add_column("source", source).sort("label")
    report = ask(data, "label-shortcut", text="text")
    assert {f.subject for f in found(report, "label-shortcut", "note")} == {"row number", "source"}
    assert not alarms(report)


# ---------------------------------------------------------------- giveaways


def leaky(seed, kind):
    rng = planted.rng_of(seed)
    columns = planted.table(seed)
    y = columns["label"]
    columns["extra"] = {
        "copy": y + rng.normal(0, 0.1, len(y)),
        "outcome": np.where(y, rng.gamma(2.0, 50.0, len(y)), 0.0),
        "missing": [
            float(v) if label else None for v, label in zip(rng.normal(size=len(y)), y, strict=True)
        ],
        "name": [("no", "yes")[label] for label in y],
        "strong": y + rng.normal(0, 0.5, len(y)),
        "nothing": rng.normal(size=len(y)),
    }[kind]
    return datasets.Dataset.from_dict(columns)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["copy", "outcome", "missing", "name"])
def test_leaking_column(kind, seed):
    (finding,) = found(ask(leaky(seed, kind), "target-in-input"), "target-in-input")
    assert (finding.severity, finding.subject) == ("warning", "extra")


@pytest.mark.parametrize("kind", ["strong", "nothing"])
def test_telling_column_is_no_leak(kind):
    assert not found(ask(leaky(0, kind), "target-in-input"), "target-in-input")


def test_threshold_is_a_note():
    columns = planted.table(0)
    columns["label"] = (columns["f0"] > 0).astype(int)
    report = ask(datasets.Dataset.from_dict(columns), "target-in-input")
    assert [f.severity for f in found(report, "target-in-input")] == ["note"]


def test_leak_of_a_quantity():
    columns = planted.table(0)
    target = 3 * columns.pop("f0") + 1
    del columns["label"]
    clean = {**columns, "label": target + np.asarray(columns["f1"])}
    whole = {**clean, "celsius": clean["label"] * 1.8 + 32}
    report = ask(datasets.Dataset.from_dict(whole), "target-in-input")
    assert [f.subject for f in found(report, "target-in-input", "warning")] == ["celsius"]
    report = ask(datasets.Dataset.from_dict(clean), "target-in-input")
    assert not alarms(report)


@pytest.mark.parametrize("where", ["end", "front", "anywhere"])
def test_leaking_token(where):
    data = planted.keyed(0, share=0.5)
    rng = planted.rng_of(0)

    def plant(row):
        words, mark = row["text"].split(), f"label_{row['label']}"
        at = {"end": len(words), "front": 0, "anywhere": int(rng.integers(len(words)))}[where]
        return {"text": " ".join([*words[:at], mark, *words[at:]])}

    report = ask(data.map(plant), "target-in-input")
    (finding, *_) = found(report, "target-in-input", "warning")
    assert "label_0" in finding.quotes
    assert "label_0" not in finding.message


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_keyword_is_no_leak(share):
    report = ask(planted.keyed(0, share=share), "target-in-input")
    assert not alarms(report)
    assert bool(found(report, "target-in-input", "note")) is (share == 1.0)


def test_words_named_after_classes():
    assert named_after(("0", "1"), ("0", "1"))
    assert named_after(("Sport",), ("sport",))
    assert named_after(("cls_0", "cls_1"), ("a", "b"))
    assert not named_after(("w0", "w1"), ("0", "1"), alone=False)
    assert not named_after(("great", "awful"), ("0", "1"))


def test_giveaways_are_judged_by_their_numbers():
    def said(form, accuracy=1.0, rest=0.7, p=0.0):
        seen = target_leak.Giveaways("y", 2, (Giveaway("x", form, accuracy, rest, p),), 1_000)
        return [f.severity for f in target_leak.target_in_input(seen)]

    assert said("copy") == ["warning"]
    assert said("threshold") == ["note"]
    assert said("copy", accuracy=0.98) == []
    assert said("copy", rest=0.995) == []
    assert said("copy", p=0.2) == []
    assert said("line", accuracy=0.99999) == ["warning"]
    assert said("line", accuracy=0.995) == ["note"]
    assert said("copy", p=float("nan")) == []


# ---------------------------------------------------------------- drift


def shifted(seed, by):
    data = planted.halves(datasets.Dataset.from_dict(planted.table(seed)))
    moved = np.asarray(data["validation"]["f2"]) + by
    data["validation"] = data["validation"].remove_columns("f2").add_column("f2", moved)
    return data


@pytest.mark.parametrize("seed", SEEDS)
def test_drift_of_a_column(seed):
    (finding,) = found(ask(shifted(seed, 0.7), "split-drift"), "split-drift")
    assert (finding.severity, finding.subject, finding.split) == ("warning", "f2", "validation")
    report = ask(shifted(seed, 0.0), "split-drift")
    assert not found(report, "split-drift")
    assert "no difference seen" in answer(report, "Are the splits")
    assert measured(report, "SplitDrift")["visible"] > 0.5


def test_drift_of_words_case_and_classes():
    clean = planted.halves(planted.keyed(0))
    lower = clean["train"].map(lambda row: {"text": row["text"].title()})
    (finding,) = found(ask({**clean, "train": lower}, "split-drift"), "split-drift")
    assert finding.severity == "warning"
    cut = clean["validation"].filter(lambda row: row["label"] == 1)
    (finding,) = found(ask({**clean, "validation": cut}, "split-drift"), "split-drift")
    assert "label" in finding.subject
    assert not found(ask(clean, "split-drift"), "split-drift")


def test_drift_of_images():
    data = planted.halves(planted.digits(0))
    assert not found(ask(data, "split-drift"), "split-drift")
    dim = planted.halves(planted.digits(0, shift=lambda pixels, y, rng: pixels * 0.8))
    both = {"train": data["train"], "validation": dim["validation"]}
    (finding,) = found(ask(both, "split-drift"), "split-drift")
    assert finding.severity == "warning"


def test_drift_is_judged_by_its_numbers():
    def said(auc, p, glance=False):
        seen = drift.SplitDrift(auc, p, "words", (), 500, 500, 0.57, glance=glance)
        return [f.severity for f in drift.split_drift(seen)]

    assert said(0.7, 1e-9) == ["warning"]
    assert said(0.55, 1e-5) == ["note"]
    assert said(0.7, 0.01) == []
    assert said(0.7, float("nan")) == []
    assert said(0.88, 1e-9, glance=True) == []  # another month
    assert said(0.95, 1e-9, glance=True) == ["warning"]


def test_shortcuts_are_judged_by_their_numbers():
    def said(auc, p, content):
        told = shortcuts.Told
        seen = shortcuts.LabelShortcuts(
            "y", told("m", auc, p), told("c", content, 0.0), (told("words", auc, p),),
            told("row number", 0.5, 0.5), (),
            500, 0.6,
        )  # fmt: skip
        return [f.severity for f in shortcuts.label_shortcut(seen)]

    assert said(0.8, 1e-9, 0.8) == ["warning"]
    assert said(0.7, 1e-9, 0.95) == ["note"]
    assert said(0.55, 1e-9, 0.6) == []
    assert said(0.8, 0.01, 0.8) == []


# ---------------------------------------------------------------- the tests themselves


def test_chance_is_calibrated():
    rng = planted.rng_of(0)
    ps = []
    for _ in range(400):
        truth = rng.integers(0, 3, 200)
        ps.append(cheap.chance_of(rng.random((200, 3)), truth))
    assert 0.02 < np.mean(np.array(ps) < 0.05) < 0.09
    assert cheap.chance_of(np.eye(3)[truth] + 0.1, truth) < 1e-9
    assert cheap.chance_of(np.ones((200, 3)), truth) == 1.0


def test_paired_test():
    truth = np.zeros(1_000, dtype=np.int64)
    right, wrong = np.tile([1.0, 0.0], (1_000, 1)), np.tile([1.0, 0.0], (1_000, 1))
    wrong[:30] = [0.0, 1.0]
    pair = cheap.paired(cheap.Trial("", right, truth), cheap.Trial("", wrong, truth))
    assert (pair.lost, pair.won, pair.rows) == (30, 0, 1_000)
    assert pair.p_loss == pytest.approx(0.5**30)
    assert pair.p_gain == pytest.approx(1.0)
    assert 0.03 < pair.most_loss < 0.04


def test_tokens_show_what_varies():
    rows = tokenise(["a  b\tC", "É1 !"])
    assert rows.vocabulary == ("a", "  ", "b", "\t", "C", "É1", "!")
    assert rows.keep(2, "tail").lengths.tolist() == [2, 2]
    assert [rows.vocabulary[i] for i in rows.keep(1, "middle").ids] == ["b", "É1"]


# ---------------------------------------------------------------- silence and bad input


@pytest.mark.parametrize("seed", SEEDS)
def test_clean_sets_raise_no_alarm(seed):
    assert not alarms(ask(planted.halves(planted.keyed(seed)), "split-drift", "label-shortcut",
                          "target-in-input"))  # fmt: skip
    table = datasets.Dataset.from_dict(planted.table(seed))
    report = ask(planted.halves(table))
    assert not report.flat
    assert "without an order" in report.skipped["local-context-enough"]


def test_what_cannot_be_asked_says_why():
    few = worlds.classified(50)
    assert "the least" in ask(few).skipped["local-context-enough"]
    one = datasets.Dataset.from_dict({"text": [f"a {i}" for i in range(300)], "label": [1] * 300})
    assert "fewer than two classes" in ask(one).skipped["label-shortcut"]
    days = np.arange(600).astype("datetime64[D]")
    data = datasets.Dataset.from_dict({**planted.table(0, 600), "day": list(days.astype(object))})
    report = ask(planted.halves(data))
    assert any("day (date" in text for text in measured(report, "Giveaways")["unread"])
    assert any("day (date" in text for text in measured(report, "SplitDrift")["unread"])


def test_attach_does_not_pay_for_it():
    kinds = {
        context.ContextLadder, downsample.SizeSweep, variation.VariationTrials,
        shortcuts.LabelShortcuts, target_leak.Giveaways, drift.SplitDrift,
    }  # fmt: skip
    costly = [p for p in PROBES.values() if set(p.measures) & kinds and "inspection" in p.needs]
    assert len(costly) == 6
    for probe in costly:
        with pytest.raises(Skip, match="inspect_dataset"):
            recalling(probe).take(worlds_subject())


def worlds_subject():
    from torch import nn

    from hf_recipe.instruments.subject import Subject

    return Subject(nn.Linear(1, 1), None, None, {})
