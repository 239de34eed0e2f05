"""Run by torchrun: an inspection by all processes is the inspection by one."""

import math
import os
import sys

os.environ["HF_RECIPE_CACHE"] = "off"

import datasets
import numpy as np
import torch.distributed as dist

import hf_recipe
from hf_recipe.data.summaries import Summary
from hf_recipe.instruments.distributed import world_size
from tests.processes import a_rank

ROWS = 13_000


def rows(seed):
    rng = np.random.default_rng(seed)
    number = rng.normal(size=ROWS)
    number[7], number[9_000] = math.nan, 80.0
    texts = [f"{'  ' if i == 11_000 else ''}{' '.join(map(str, rng.integers(0, 99, 4)))}"
             for i in range(ROWS)]  # fmt: skip
    texts[12_500] = "   "
    return datasets.Dataset.from_dict(
        {"text": texts, "number": number, "label": rng.integers(0, 3, ROWS).tolist()}
    )


def close(one, two):
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(close(one[k], two[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(close, one, two))
    if isinstance(one, float) and isinstance(two, float):
        return math.isclose(one, two, rel_tol=1e-9) or (one != one and two != two)
    return one == two


def main():
    dist.init_process_group("gloo")
    assert world_size() == int(sys.argv[1])
    data = {"train": rows(0), "test": rows(1)}
    wanted = ["missing-value", "blank-example", "outlier-example", "duplicate-example",
              "constant-input", "class-imbalance"]  # fmt: skip
    from hf_recipe.catalogue import CHECKS

    settings = {"label": "label", "ignore": [name for name in CHECKS if name not in wanted]}
    alone = hf_recipe.inspect_dataset(data, **settings)
    seen = []
    plain = Summary.add
    Summary.add = lambda self, array, numbers: (
        seen.append(len(array)) or plain(self, array, numbers)
    )
    together = hf_recipe.inspect_dataset(data, **settings, together=True)
    read = sum(seen) / (3 * 2 * ROWS)
    assert 0 < read < 0.75, read  # its own part, in whole chunks
    assert not together.crashed, together.crashed
    assert [f.message for f in together.flat] == [f.message for f in alone.flat]
    assert {"missing-value", "blank-example"} <= {f.check for f in together.flat}
    assert together.answers == alone.answers
    assert together.exhibits == alone.exhibits
    assert close([m.values for m in together.measurements], [m.values for m in alone.measurements])


if __name__ == "__main__":
    with a_rank():
        main()
