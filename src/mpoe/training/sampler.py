"""Several tasks as one training set: each batch from one task, tasks drawn by the temperature-scaled number of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch.utils.data
from datasets import Dataset


class TaskMixture(torch.utils.data.Dataset):
    """A data set to be read in order, whose order is that of an epoch of several tasks.

    Its rows come in blocks of `batch_size`, each of one task. The task of a block is drawn with probability
    proportional to n ** (1 / temperature), n its number of rows; its rows are taken without replacement until all of
    the task have been seen, then anew. The order is a function of seed and epoch alone, so every rank agrees, and a run
    that resumes in the middle of an epoch finds the batches that it would have had. Accelerate's data loaders call
    `set_epoch`.

    Args:
        tasks: Rows by task, at least one row each.
        batch_size: Rows of a block, count: those of one step, of all devices and micro-batches together.
        temperature: 1 draws in proportion to the rows, large values draw all tasks alike, > 0.
        seed: >= 0.

    Raises:
        ValueError: A temperature that is not positive, or a task without rows.

    Source: Raffel et al., T5 (JMLR 2020), §3.5.2, temperature-scaled mixing.
    """

    def __init__(self, tasks: Mapping[str, Dataset], batch_size: int, temperature: float, seed: int) -> None:
        if not temperature > 0 or not math.isfinite(temperature):
            raise ValueError(f"temperature must be > 0 and finite; got {temperature}")
        if empty := [name for name, rows in tasks.items() if len(rows) == 0]:
            raise ValueError(f"every task must have training rows; {', '.join(empty)} has none")
        self.tasks = dict(tasks)
        self.batch_size = batch_size
        self.seed = seed
        sizes = np.array([len(rows) for rows in self.tasks.values()], dtype=np.float64)
        scaled = (sizes / sizes.max()) ** (1 / temperature)
        self.probabilities = dict(zip(self.tasks, (scaled / scaled.sum()).tolist(), strict=True))
        self.num_batches = math.ceil(sizes.sum() / batch_size)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Take the order of another epoch.

        Args:
            epoch: From 0.
        """
        rng = np.random.default_rng([self.seed, epoch])
        sizes = [len(rows) for rows in self.tasks.values()]
        task_of_batch = rng.choice(len(sizes), size=self.num_batches, p=list(self.probabilities.values()))
        task_of_row = np.repeat(task_of_batch, self.batch_size)
        row_of_task = np.empty_like(task_of_row)
        for task, size in enumerate(sizes):
            places = np.flatnonzero(task_of_row == task)
            passes = math.ceil(len(places) / size)
            drawn = [rng.permutation(size) for _ in range(passes)]
            row_of_task[places] = np.concatenate([*drawn, np.empty(0, dtype=np.int64)])[: len(places)]
        self.order = list(zip((list(self.tasks)[t] for t in task_of_row), row_of_task.tolist(), strict=True))

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def __getitem__(self, index: int) -> dict[str, Any]:
        task, row = self.order[index]
        return self.tasks[task][row]
