import base64
import io

import numpy as np
import torch
from PIL import Image

from hf_recipe.core.exhibit import Picture
from hf_recipe.data.preview import preview, preview_batch
from hf_recipe.instruments.batches import Batch
from tests.data import worlds


def by_title(exhibits):
    return {exhibit.title: exhibit for exhibit in exhibits}


def test_tokens_masks_and_labels(tmp_path):
    tok = worlds.tokenizer()
    data = worlds.tokenized(worlds.classified(20))
    trainer = worlds.trainer(worlds.bert(), data, None, tmp_path, tok=tok)
    shown = by_title(preview(worlds.subject(trainer), rows=4))
    examples = shown["Examples of train, decoded"]
    assert examples.private
    assert len(examples.rows) == 4
    row, length, padding, *_ = examples.rows[0]
    assert length == len(data[row]["input_ids"])
    width = max(r[1] for r in examples.rows)
    assert padding == width - length
    tokens = shown["One example of train, token by token"]
    assert tokens.rows[0][2] == "[CLS]"
    ranges = {r[0]: r for r in shown["A batch of train, as the network gets it"].rows}
    assert ranges["input_ids"][2] == f"4 x {width}"


def test_labels_of_a_language_model():
    ids = torch.tensor([[7, 8, 9, 0], [9, 8, 7, 7]])
    labels = torch.tensor([[-100, 8, 9, -100], [-100, -100, 7, 7]])
    batch = Batch({"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}, (5, 3))
    shown = by_title(preview_batch(batch, worlds.tokenizer()))
    first, second = shown["Examples of train, decoded"].rows
    assert first == (5, 3, 1, 2, "w0 w1 w2", "w1 w2")
    assert second == (3, 4, 0, 2, "w2 w1 w0 w0", "w0 w0")
    tokens = shown["One example of train, token by token"].rows
    assert [t[3] for t in tokens] == [True, True, True, False]
    assert [t[4] for t in tokens] == [None, 8, 9, None]


class Processor:
    image_mean = [0.5, 0.4, 0.3]
    image_std = [0.2, 0.2, 0.1]


def test_images_are_unnormalised():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 3, 8, 8)) / 255
    mean, std = (
        np.array(v)[None, :, None, None] for v in (Processor.image_mean, Processor.image_std)
    )
    batch = Batch(
        {"pixel_values": torch.tensor((pixels - mean) / std), "labels": torch.tensor([1, 0])}
    )
    (picture,) = [e for e in preview_batch(batch, Processor()) if isinstance(e, Picture)]
    assert picture.private
    assert picture.labels == ("1", "0")
    back = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.pngs[0]))))
    assert np.abs(back.transpose(2, 0, 1) / 255 - pixels[0]).max() < 1 / 255


def test_numbers():
    batch = Batch(
        {"x": torch.tensor([[1.0, 2.0], [3.0, float("nan")]]), "labels": torch.tensor([0.5, 1.5])}
    )
    shown = by_title(preview_batch(batch))
    assert shown["x of train"].rows == ((0, 1.0, 2.0, "0.5"), (1, 3.0, None, "1.5"))
