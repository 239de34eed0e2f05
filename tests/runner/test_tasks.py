"""Every task: its bundled rows through the first stages, its measures on numbers known by hand."""

import math
import random

import datasets
import numpy as np
import pytest
from transformers import EvalPrediction

from hf_recipe.complexify.architectures import LADDERS
from hf_recipe.core.finding import STAGES
from hf_recipe.core.report import Report
from hf_recipe.runner import looks
from hf_recipe.runner.data import load
from hf_recipe.runner.examples import EXAMPLES, _sentence, agreement_entropy
from hf_recipe.runner.experiment import Lab
from hf_recipe.runner.main import main
from hf_recipe.runner.options import UsageError
from hf_recipe.runner.show import Show
from hf_recipe.runner.tasks import TASKS
from hf_recipe.trainer.metrics import MultiLabelF1
from hf_recipe.trainer.span_metrics import EntityF1, is_bio, spans
from tests.runner.test_data import options

QUICK = (
    "--use_cpu",
    "true",
    "--report_to",
    "none",
    "--keep_going",
    "--max_steps",
    "3",
    "--seeds",
    "2",
)
MADE = [(name, task) for name, e in EXAMPLES.items() for task in e.best if name != "digits"]


def rows_of(name, tmp_path, count=80):
    """The first rows of an example in a file."""
    path = tmp_path / f"{name}.parquet"
    EXAMPLES[name].rows().select(range(count)).to_parquet(str(path))
    return path


def lab_of(tmp_path, **flags):
    chosen = options(tmp_path, max_steps=2, report_to="none", num_train_epochs=1, **flags)
    folder = tmp_path / "out"
    return Lab(chosen, load(chosen), folder, Show(leads=False))


@pytest.mark.parametrize(("name", "task"), MADE)
def test_its_columns_tell_the_task(name, task, tmp_path):
    data = load(options(tmp_path, train_file=rows_of(name, tmp_path)))
    assert data.task.name == next(iter(EXAMPLES[name].best))  # masked-lm is to be asked for
    assert sum(map(len, data.splits.values())) == 80


@pytest.mark.parametrize(("name", "task"), MADE)
def test_losses_of_rows_are_the_loss_that_is_trained(name, task, tmp_path):
    """Untrained: the rows' losses, weighed by what they supervise, are the Trainer's own."""
    lab = lab_of(tmp_path, train_file=rows_of(name, tmp_path), task=task)
    setup = lab.start
    trainer = lab.trainer(setup, lab.arguments(setup, setup.variant("x")))
    seen = trainer.predict(lab.feed.rows("validation"))
    task = lab.data.task
    losses = task.row_losses(seen.predictions, seen.label_ids)
    assert len(losses) == lab.feed.count("validation")
    weights = np.ones(len(losses))
    if hasattr(task, "row_targets"):
        weights = np.array([len(row) for row in task.row_targets(lab.feed, "validation")])
    assert np.average(losses, weights=weights) == pytest.approx(seen.metrics["test_loss"], rel=1e-4)
    assert f"test_{task.metric}" in seen.metrics
    blind = task.blind_losses(lab.feed)
    assert len(blind) == len(losses)
    assert 0 < np.mean(blind) < 6


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), MADE)
def test_the_stages(name, task, tmp_path, monkeypatch):
    """A causal language model through all five, the other tasks through the first two."""
    monkeypatch.setattr(looks, "BATCH_SECONDS", 0.3)
    stages = STAGES if task == "causal-lm" else STAGES[:2]
    folder = ("--output_dir", str(tmp_path / "out"), "--stages", ",".join(stages))
    small = ("--architecture", LADDERS[TASKS[task].ladder("text")][0].name)
    batch = ("--per_device_train_batch_size", "8", "--trials", "2")
    rows = ("--task", task, "--train_file", str(rows_of(name, tmp_path)))
    main([*QUICK, *folder, *small, *batch, *rows])
    report = Report.from_json(tmp_path / "out" / "report.json")
    assert report.status == "finished"
    assert not report.crashed
    assert [gate.stage for gate in report.gates] == list(stages)
    assert not [f for f in report.flat if f.severity == "error"]
    assert (tmp_path / "out" / "student" / "model.safetensors").is_file() == (stages == STAGES)


# ------------------------------------------------------------------ what is measured


def test_entities_count_whole():
    tags = ["O", "B-PER", "I-PER", "O", "I-LOC", "B-LOC", "I-PER"]
    assert spans(tags) == {(1, 2, "PER"), (4, 4, "LOC"), (5, 5, "LOC"), (6, 6, "PER")}
    seen = ["O", "B-PER", "O", "O", "B-LOC", "B-LOC", "I-PER"]
    found = EntityF1().of([seen], [tags])
    assert found == {"precision": 0.75, "recall": 0.75, "f1": 0.75}
    assert EntityF1().compute(predictions=[seen], references=[tags]) == found
    assert EntityF1().of([["O"]], [["O"]])["f1"] == 0.0
    assert is_bio(("O", "B-X", "I-X"))
    assert not is_bio(("NOUN", "VERB"))


def test_several_labels_agree_with_scikit_learn():
    from sklearn.metrics import f1_score

    draw = np.random.default_rng(0)
    seen, true = draw.integers(0, 2, (50, 4)), draw.integers(0, 2, (50, 4))
    found = MultiLabelF1().of(seen, true)
    assert found["f1_micro"] == pytest.approx(f1_score(true, seen, average="micro"))
    assert found["f1_macro"] == pytest.approx(f1_score(true, seen, average="macro"))
    assert found["rows_right"] == pytest.approx((seen == true).all(1).mean())


def test_perplexity_weighs_tokens_alike():
    compute = TASKS["causal-lm"].metrics_of(None)
    labels = np.array([[9, 1, 2, 3], [9, 1, -100, -100]])
    answers = np.array([[1, 2, 0], [1, -100, -100]])
    found = compute(EvalPrediction((np.array([1.0, 3.0]), answers), labels))
    assert found["perplexity"] == pytest.approx(math.exp((3 * 1.0 + 1 * 3.0) / 4))
    assert found["accuracy"] == pytest.approx(3 / 4)


def test_the_grammar_has_the_entropy_that_is_told():
    """Nats of what was drawn, sentence by sentence, against the expectation."""
    draw, nats, tokens = random.Random(3), [], []
    for _ in range(4000):
        words = _sentence(draw).split()
        parted = "near" in words
        choices = [16, 2, 4, 4, 16, *([4, 2, 1 / 0.75] if parted else [1 / 0.25])]
        nats.append(sum(map(math.log, choices)))
        tokens.append(len(words) + 1)
    expected = agreement_entropy()
    assert np.mean(nats) == pytest.approx(expected[0], abs=0.1)
    assert np.mean(tokens) == pytest.approx(expected[1], abs=0.1)


# ------------------------------------------------------------------ rows


def test_long_documents_are_cut_and_every_token_is_predicted_once(tmp_path):
    path = tmp_path / "t.txt"
    lines = [" ".join(f"w{(i * k) % 30}" for k in range(1, 3 + i % 40)) for i in range(60)]
    path.write_text("\n".join(lines))
    lab = lab_of(tmp_path, train_file=path, max_length=16)
    whole = lab.feed.encode("train", None)["input_ids"]
    pieces = lab.feed.rows("train")["input_ids"]
    assert max(map(len, pieces)) == 16
    assert sum(len(ids) - 1 for ids in pieces) == sum(len(ids) - 1 for ids in whole)
    targets = lab.data.task.row_targets(lab.feed, "train")
    assert [t for row in targets for t in row] == [t for ids in whole for t in ids[1:]]


def test_a_text_file_of_paragraphs(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("one\ntwo\n\n" * 3 + "\n".join(f"p {i}\n" for i in range(50)))
    data = load(options(tmp_path, train_file=path))
    texts = [text for part in data.splits.values() for text in part["text"]]
    assert len(texts) == 53
    assert "one\ntwo" in texts


def test_tags_stand_at_a_words_first_piece(tmp_path):
    rows = datasets.Dataset.from_dict(
        {
            "words": [["unseenword", "in", f"x{i}"] for i in range(60)],
            "tags": [["B-A", "O", "I-A"]] * 60,
        }
    )
    rows.to_json(str(tmp_path / "rows.json"))
    lab = lab_of(tmp_path, train_file=tmp_path / "rows.json")
    assert lab.data.classes == ("O", "B-A", "I-A")
    row = lab.feed.rows("train")[0]
    assert [tag for tag in row["labels"] if tag != -100] == [1, 0, 2]
    assert len(row["labels"]) == len(row["input_ids"])


@pytest.mark.parametrize(
    ("line", "label"),
    [("text,labels", "{a}|{b}"), ("text,labels", "{a};{b}"), ("text,a,b", None)],
)
def test_several_labels_out_of_a_table(tmp_path, line, label):
    lines = [line]
    for i in range(60):
        a, b = "a" * (i % 2), "b" * (i % 3 == 0)
        told = f"{i % 2},{int(i % 3 == 0)}" if label is None else label.format(a=a, b=b)
        lines.append(f"row {i},{told}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    asked = {"label_column": "a,b"} if label is None else {"task": "multi-label-classification"}
    data = load(options(tmp_path, train_file=tmp_path / "t.csv", **asked))
    assert data.classes == ("a", "b")
    texts = data.splits["train"]["text"]
    numbers = [int(text.split()[1]) for text in texts]
    assert data.labels("train").tolist() == [[i % 2, int(i % 3 == 0)] for i in numbers]


@pytest.mark.parametrize(
    ("columns", "flags", "says"),
    [
        (
            {"words": ["a b"] * 30, "tags": ["O"] * 30},
            {"task": "token-classification"},
            "must hold a list in each row",
        ),
        ({"body": ["a b"] * 30}, {"task": "token-classification"}, "needs a column of words"),
        (
            {"tokens": [["a", "b"]] * 30, "tags": [["O", "O"]] * 29 + [["O"]]},
            {},
            "row 29: 2 words and 1 tags",
        ),
        ({"n": [1] * 30}, {"task": "causal-lm"}, "needs a column of text"),
        ({"text": ["a"] * 30, "a": [2] * 30, "b": [0] * 30}, {"label_column": "a,b"}, "0 and 1"),
        ({"text": ["a"] * 30, "topic": [1] * 30}, {"label_column": "topics,b"}, "topic?"),
    ],
)
def test_columns_that_cannot_be_the_tasks_are_named(tmp_path, columns, flags, says):
    path = tmp_path / "rows.json"
    datasets.Dataset.from_dict(columns).to_json(str(path))
    with pytest.raises(UsageError) as error:
        load(options(tmp_path, train_file=path, **flags))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_task_names_the_nearest(tmp_path):
    with pytest.raises(UsageError, match="did you mean token-classification"):
        options(tmp_path, task="tokn-classification")
