"""Rows -> batch, exactly as the Trainer would collate them, with the row indices kept.

Never through the Trainer's dataloader: iterating one draws from torch's generator (another run
from then on), and a stream would be eaten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Batch:
    """A collated batch and the data set rows it came from (empty where they are not known)."""

    inputs: dict[str, Any]
    rows: tuple[int, ...] = ()

    @classmethod
    def of_inputs(cls, inputs: Mapping[str, Any], device: torch.device) -> Batch:
        """The real inputs of a training step, detached and on `device`; rows are not known."""
        return cls(dict(inputs)).to(device)

    def to(self, device: torch.device) -> Batch:
        """The same batch with every tensor on `device`."""
        return Batch({k: move(v, device) for k, v in self.inputs.items()}, self.rows)

    def __len__(self) -> int:
        if self.rows:
            return len(self.rows)
        for value in self.inputs.values():
            if isinstance(value, torch.Tensor) and value.ndim:
                return int(value.shape[0])
        return 0

    @property
    def labels(self) -> Any:
        """The labels under any of their usual names, or None."""
        for name in ("labels", "label", "label_ids", "start_positions"):
            if name in self.inputs:
                return self.inputs[name]
        return None

    def take(self, indices: Sequence[int] | torch.Tensor) -> Batch:
        """The batch's rows at `indices` (positions in the batch), where tensors lead with rows."""
        size, chosen = len(self), torch.as_tensor(indices)
        inputs = {
            k: v[chosen.to(v.device)]
            if isinstance(v, torch.Tensor) and v.ndim and v.shape[0] == size
            else v
            for k, v in self.inputs.items()
        }
        return Batch(inputs, tuple(self.rows[i] for i in chosen.tolist()) if self.rows else ())


def move(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in it on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: move(v, device) for k, v in value.items()}
    if isinstance(value, (list, tuple)) and not isinstance(value, str):
        return type(value)(move(v, device) for v in value)
    return value


def labels_in(inputs: Any, names: Sequence[str]) -> torch.Tensor | None:
    """The labels of a batch, detached, where it is a mapping and holds one kind of them."""
    if not isinstance(inputs, Mapping) or len(names) != 1:
        return None
    labels = inputs.get(names[0])
    if not isinstance(labels, torch.Tensor):
        return None
    return labels.detach() if labels.requires_grad else labels


@dataclass(frozen=True)
class Rows:
    """A data set seen as rows, and how they become a batch.

    Attributes:
        dataset: what was given to the Trainer, untouched.
        read: the data set that rows are read from (unused columns removed), or None for streams.
        collate: list of rows -> dict of tensors.
        name: "train", "validation" or the name in a dict of evaluation sets.
    """

    dataset: Any
    read: Any
    collate: Callable[[list[Any]], Mapping[str, Any]]
    name: str

    def __len__(self) -> int:
        return len(self.read) if self.read is not None else 0

    @property
    def is_stream(self) -> bool:
        """Whether rows can only be had in order, by consuming the stream."""
        return self.read is None

    def evenly_spaced(self, count: int) -> list[int]:
        """Up to `count` row indices spread over the whole data set, the same on every rank."""
        total = len(self)
        if count >= total:
            return list(range(total))
        return [(i * total) // count + total // (2 * count) for i in range(count)]

    def batch(self, indices: Sequence[int]) -> Batch:
        """Collate the rows at `indices`. Reading may draw random numbers: call it quietly.

        They are read together where the data set can, as a DataLoader reads them: a transform that
        is set on it then sees the whole batch.
        """
        places = [int(i) for i in indices]
        together = getattr(self.read, "__getitems__", None)
        features = together(places) if together else [self.read[i] for i in places]
        return Batch(dict(self.collate(features)), tuple(places))

    def batches(self, indices: Sequence[int], size: int) -> Iterator[Batch]:
        """Collate the rows at `indices`, `size` at a time."""
        for start in range(0, len(indices), size):
            yield self.batch(indices[start : start + size])


def stream_reason(rows: Rows) -> str | None:
    """Why rows cannot be read ahead, or None where they can."""
    if rows.is_stream:
        return f"the {rows.name} data is a stream: reading ahead would eat it"
    return None


def rows_of_trainer(trainer: Any, dataset: Any, name: str) -> Rows | None:
    """The rows of `dataset` as `trainer` would collate them."""
    if dataset is None:
        return None
    import datasets

    if isinstance(dataset, datasets.Dataset):
        read, collate = trainer._remove_unused_columns(dataset), trainer.data_collator
    else:
        read = dataset
        collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
    return Rows(dataset, read if has_rows(dataset) else None, collate, name)


def rows_of_dataloader(dataloader: Any, name: str) -> Rows | None:
    """The rows behind a prepared dataloader: what a callback alone can reach."""
    dataset = getattr(dataloader, "dataset", None)
    collate = getattr(dataloader, "collate_fn", None)
    if dataset is None or collate is None:
        return None
    return Rows(dataset, dataset if has_rows(dataset) else None, collate, name)


def has_rows(dataset: Any) -> bool:
    """Whether single rows can be read by their index."""
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return False
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
