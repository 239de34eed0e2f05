"""Rows that are there without a network: real digits, and rows made by a rule that is known.

Where a rule makes the rows, the lowest loss that any model can reach is known too, and the report
says it. Each is reached by its name, ``--dataset_name agreement``, or by its task alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np


@dataclass(frozen=True)
class Example:
    """A bundled data set.

    Attributes:
        title: how it is called in the report.
        rows: makes all of its rows; they are cut in three by the job.
        best: the tasks it is made for, with the lowest loss that can be reached, in words.
    """

    title: str
    rows: Callable[[], datasets.Dataset]
    best: Mapping[str, str]

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
    for _ in range(3200):
        present = [name for name in TOPICS if draw.random() < 0.35]
        words = [draw.choice(FILLER) for _ in range(8)]
        words += [draw.choice(TOPICS[name]) for name in present]
        draw.shuffle(words)
        labels = [n for n in TOPICS if (n in present) != (draw.random() < FLIPPED_TOPICS)]
        rows["text"].append(" ".join(words))
        rows["labels"].append(labels)
    return datasets.Dataset.from_dict(rows)


# ------------------------------------------------------------------ sentences and their translation

LEXICON = {
    **{"the": "le", "a": "un", "red": "ruj", "small": "pic", "old": "vek", "wise": "saj"},
    **{"cat": "gat", "dog": "kan", "bird": "avi", "king": "rej", "poet": "vat", "lion": "leo"},
}
TWO_WORDS = {"sees": ("vid", "mir"), "hears": ("aud", "skut"), "likes": ("am", "plas")}


def phrases() -> datasets.Dataset:
    """Sentences in a made-up language: adjectives follow their noun, verbs have two words each."""
    draw = random.Random(4)
    rows: dict[str, list[str]] = {"source": [], "target": []}
    articles, adjectives = ("the", "a"), ("red", "small", "old", "wise")
    nouns = ("cat", "dog", "bird", "king", "poet", "lion")
    for _ in range(2400):
        one, two = ([draw.choice(w) for w in (articles, adjectives, nouns)] for _ in range(2))
        verb = draw.choice(tuple(TWO_WORDS))
        rows["source"].append(" ".join([*one, verb, *two]))
        made = [[LEXICON[w] for w in (x[0], x[2], x[1])] for x in (one, two)]
        rows["target"].append(" ".join([*made[0], draw.choice(TWO_WORDS[verb]), *made[1]]))
    return datasets.Dataset.from_dict(rows)


# ------------------------------------------------------------------ questions about a text

KINDS = {
    "colour": ("red", "green", "blue", "white"),
    "animal": ("cat", "dog", "horse", "duck"),
    "place": ("river", "tower", "market", "garden"),
    "time": ("morning", "noon", "evening", "night"),
}
WRONG_ANSWERS = 0.04


def questions() -> datasets.Dataset:
    """Which word of a text is a colour, an animal, ...; one answer in 25 is a word at random."""
    draw = random.Random(5)
    rows: dict[str, list[Any]] = {n: [] for n in ("question", "context", "answer", "answer_start")}
    for _ in range(2400):
        words = [draw.choice(group) for group in KINDS.values()]
        words += [draw.choice(FILLER) for _ in range(6)]
        draw.shuffle(words)
        kind = draw.choice(tuple(KINDS))
        place = next(i for i, word in enumerate(words) if word in KINDS[kind])
        if draw.random() < WRONG_ANSWERS:
            place = draw.randrange(len(words))
        rows["question"].append(f"which {kind} ?")
        rows["context"].append(" ".join(words))
        rows["answer"].append(words[place])
        rows["answer_start"].append(sum(len(word) + 1 for word in words[:place]))
    return datasets.Dataset.from_dict(rows)


# ------------------------------------------------------------------ texts and what goes with them

WRONG_CHOICES = 0.05


def endings() -> datasets.Dataset:
    """A text of one topic, and four words, one of each topic; one answer in twenty is drawn."""
    draw = random.Random(6)
    rows: dict[str, list[Any]] = {"prompt": [], "choices": [], "answer": []}
    for _ in range(2400):
        topic = draw.choice(tuple(TOPICS))
        words = [draw.choice(FILLER) for _ in range(5)] + draw.sample(TOPICS[topic], 2)
        draw.shuffle(words)
        order = draw.sample(tuple(TOPICS), len(TOPICS))
        wrong = draw.random() < WRONG_CHOICES
        rows["prompt"].append(" ".join(words))
        rows["choices"].append([f"the {draw.choice(TOPICS[name])}" for name in order])
        rows["answer"].append(draw.randrange(len(order)) if wrong else order.index(topic))
    return datasets.Dataset.from_dict(rows)


# ------------------------------------------------------------------ pictures with their masks


def shapes(count: int = 600, side: int = 24) -> datasets.Dataset:
    """Squares and discs as bright as each other on a dark ground, with noise."""
    from PIL import Image

    draw = np.random.default_rng(7)
    down, right = np.mgrid[:side, :side]
    pictures, masks = [], []
    for _ in range(count):
        mask = np.zeros((side, side), dtype=np.uint8)
        for half in range(2):
            kind, reach = int(draw.integers(1, 3)), int(draw.integers(3, 6))
            y, x = int(draw.integers(reach, side - reach)), half * side // 2 + side // 4
            away = np.abs(np.stack([down - y, right - x]))
            inside = away.max(0) < reach if kind == 1 else (away**2).sum(0) < reach**2
            mask[inside] = kind
        light = 70 + 90 * (mask > 0) + draw.normal(0, 30, mask.shape)
        pictures.append(Image.fromarray(light.clip(0, 255).astype(np.uint8)))
        masks.append(Image.fromarray(mask))
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    return datasets.Dataset.from_dict({"image": pictures, "mask": masks}, features=features)


def _known() -> dict[str, Example]:
    nats, tokens = agreement_entropy()
    tagged, topic = flipped(WRONG_TAGS, 4), flipped(2 * FLIPPED_TOPICS, 2)
    span, choice = flipped(WRONG_ANSWERS, 10), flipped(WRONG_CHOICES, 4)
    verbs = math.log(2) / 8  # one word of two, among seven words and the end
    made = "made by a rule"
    return {
        "digits": Example(
            "digits (bundled with scikit-learn)", digits, {"image-classification": ""}
        ),
        "agreement": Example(
            "agreement (made by a grammar)",
            agreement,
            {
                "causal-lm": f"{nats / tokens:.4f} nats per token, the grammar's own entropy "
                f"(perplexity {math.exp(nats / tokens):.3f})",
                "masked-lm": "",
            },
        ),
        "entities": Example(
            f"entities ({made})",
            entities,
            {
                "token-classification": f"about {tagged:.4f} nats per word: "
                f"{WRONG_TAGS:.0%} of the tags are drawn at random"
            },
        ),
        "topics": Example(
            f"topics ({made})",
            topics,
            {
                "multi-label-classification": f"{topic:.4f} nats per label: "
                f"{FLIPPED_TOPICS:.0%} of the labels are flipped"
            },
        ),
        "phrases": Example(
            f"phrases ({made})",
            phrases,
            {"seq2seq": f"{verbs:.4f} nats per token: verbs have two words each"},
        ),
        "questions": Example(
            f"questions ({made})",
            questions,
            {
                "question-answering": f"{span:.4f} nats: {WRONG_ANSWERS:.0%} of the answers are "
                "words at random"
            },
        ),
        "endings": Example(
            f"endings ({made})",
            endings,
            {
                "multiple-choice": f"{choice:.4f} nats: {WRONG_CHOICES:.0%} of the answers are "
                "drawn at random"
            },
        ),
        "shapes": Example(
            f"shapes ({made})",
            shapes,
            {"semantic-segmentation": "close to 0: noise hides few edges"},
        ),
    }


EXAMPLES = _known()
