"""Rows that are there without a network: real digits, and rows made by a rule that is known.

Where a rule makes the rows, the lowest loss that any model can reach is known too, and the report
says it. Each is reached by its name, ``--dataset_name agreement``, or by its task alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np


@dataclass(frozen=True)
class Example:
    """A bundled data set.

    Attributes:
        title: how it is called in the report.
        tasks: names of the tasks it is made for.
        rows: makes all of its rows; they are cut in three by the job.
        best: the lowest loss that can be reached, in words.
    """

    title: str
    tasks: tuple[str, ...]
    rows: Callable[[], datasets.Dataset]
    best: str = ""

    def parts(self) -> dict[str, datasets.Dataset]:
        return {"train": self.rows()}


def digits() -> datasets.Dataset:
    """1,797 handwritten digits, 8 x 8 pixels (Alpaydin and Kaynak 1998)."""
    from PIL import Image
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = (pixels.reshape(-1, 8, 8) / 16 * 255).round().astype(np.uint8)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=[str(k) for k in range(10)]),
        }
    )
    columns = {"image": [Image.fromarray(i) for i in images], "label": labels.tolist()}
    return datasets.Dataset.from_dict(columns, features=features)


# ------------------------------------------------------------------ a language with agreement

NOUNS = (
    *("cat", "dog", "bird", "girl", "farmer", "singer", "horse", "doctor"),
    *("sailor", "baker", "lion", "poet", "judge", "duck", "guard", "king"),
)
PLACES = ("garden", "river", "tower", "market")
VERBS = (("sees", "see"), ("hears", "hear"), ("likes", "like"), ("finds", "find"))
MANNER = ("often", "never", "gladly", "slowly")
SENTENCES = 2400


def _sentence(draw: random.Random) -> str:
    """A verb stands three or more words after the noun that decides its form."""
    noun, plural = draw.choice(NOUNS), draw.random() < 0.5
    words = ["the", noun + "s" * plural]
    if draw.random() < 0.75:
        words += ["near", "the", draw.choice(PLACES) + "s" * (draw.random() < 0.5)]
    words += [draw.choice(MANNER), draw.choice(VERBS)[plural]]
    return " ".join([*words, "the", draw.choice(NOUNS), "."])


def agreement() -> datasets.Dataset:
    """Sentences whose verb agrees with a noun that other words part from it."""
    draw = random.Random(0)
    return datasets.Dataset.from_dict({"text": [_sentence(draw) for _ in range(SENTENCES)]})


def agreement_entropy() -> tuple[float, float]:
    """(nats, tokens) of a sentence, in expectation, its end mark included."""
    nats = 2 * math.log(len(NOUNS)) + math.log(2) + math.log(len(VERBS)) + math.log(len(MANNER))
    share = 0.75
    nats += -share * math.log(share) - (1 - share) * math.log(1 - share)
    nats += share * (math.log(len(PLACES)) + math.log(2))
    return nats, 7 + 3 * share + 1


# ------------------------------------------------------------------ words with tags

FIRST = ("anna", "peter", "maria", "paul", "ruth", "otto")
LAST = ("washington", "lincoln", "berlin", "paris", "holland", "jordan")
CITIES = (*LAST, "rome", "oslo", "lima")
WENT = ("met", "called", "saw", "thanked")
REACHED = ("in", "near", "to", "from")
WRONG_TAGS = 0.02


def entities() -> datasets.Dataset:
    """Names of people and of places, of which the words alone cannot be told apart.

    One tag in fifty is drawn at random.
    """
    draw = random.Random(1)
    rows: dict[str, list[Any]] = {"tokens": [], "ner_tags": []}
    tags = ("O", "B-PER", "I-PER", "B-LOC")
    for _ in range(1200):
        person = [(draw.choice(FIRST), "B-PER"), (draw.choice(LAST), "I-PER")]
        short = [(draw.choice(LAST), "B-PER")]
        place = [(draw.choice(REACHED), "O"), (draw.choice(CITIES), "B-LOC")]
        words = [*draw.choice((person, short)), (draw.choice(WENT), "O")]
        words += [("then", "O")] if draw.random() < 0.5 else []
        words += draw.choice((person, short)) + (place if draw.random() < 0.8 else [])
        words.append((".", "O"))
        seen = [draw.choice(tags) if draw.random() < WRONG_TAGS else tag for _, tag in words]
        rows["tokens"].append([word for word, _ in words])
        rows["ner_tags"].append(seen)
    return datasets.Dataset.from_dict(rows)


def flipped(share: float, classes: int) -> float:
    """Nats of a label of which a `share` is drawn anew among `classes`."""
    other = share / classes
    right = 1 - share + other
    return -right * math.log(right) - (classes - 1) * other * math.log(other)


# ------------------------------------------------------------------ several topics at once

TOPICS = {
    "sport": ("ball", "team", "goal", "coach"),
    "music": ("song", "choir", "drum", "tune"),
    "food": ("bread", "soup", "salt", "spoon"),
    "travel": ("train", "ticket", "harbour", "bridge"),
}
FILLER = ("we", "had", "a", "long", "day", "with", "some", "and", "then", "more")
FLIPPED_TOPICS = 0.05


def topics() -> datasets.Dataset:
    """Short texts with none to four topics; each topic's label is wrong once in twenty."""
    draw = random.Random(2)
    rows: dict[str, list[Any]] = {"text": [], "labels": []}
    for _ in range(1600):
        present = [name for name in TOPICS if draw.random() < 0.35]
        words = [draw.choice(FILLER) for _ in range(8)]
        words += [draw.choice(TOPICS[name]) for name in present]
        draw.shuffle(words)
        labels = [n for n in TOPICS if (n in present) != (draw.random() < FLIPPED_TOPICS)]
        rows["text"].append(" ".join(words))
        rows["labels"].append(labels)
    return datasets.Dataset.from_dict(rows)


def _known() -> dict[str, Example]:
    nats, tokens = agreement_entropy()
    tagged, topic = flipped(WRONG_TAGS, 4), flipped(2 * FLIPPED_TOPICS, 2)
    return {
        "digits": Example("digits (bundled with scikit-learn)", ("image-classification",), digits),
        "agreement": Example(
            "agreement (made by a grammar)",
            ("causal-lm",),
            agreement,
            f"{nats / tokens:.4f} nats per token, the grammar's own entropy "
            f"(perplexity {math.exp(nats / tokens):.3f})",
        ),
        "entities": Example(
            "entities (made by a rule)",
            ("token-classification",),
            entities,
            f"about {tagged:.4f} nats per word: {WRONG_TAGS:.0%} of the tags are drawn at random",
        ),
        "topics": Example(
            "topics (made by a rule)",
            ("multi-label-classification",),
            topics,
            f"{topic:.4f} nats per label: {FLIPPED_TOPICS:.0%} of the labels are flipped",
        ),
    }


EXAMPLES = _known()
