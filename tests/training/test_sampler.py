"""Several tasks: batches of one task, tasks by temperature, an order that ranks and resumed runs agree on."""

import datasets
import numpy as np
import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from mpoe.training.sampler import TaskMixture

SIZES = {"a": 900, "b": 90, "c": 10}


def make(temperature=1.0, seed=0, batch_size=8, sizes=SIZES):
    tasks = {name: datasets.Dataset.from_dict({"row": [f"{name}{i}" for i in range(n)]}) for name, n in sizes.items()}
    return TaskMixture(tasks, batch_size, temperature, seed)


def batches_of(mixture):
    rows = [mixture[i]["row"] for i in range(len(mixture))]
    return [rows[i : i + mixture.batch_size] for i in range(0, len(rows), mixture.batch_size)]


def test_every_batch_is_of_one_task():
    batches = batches_of(make())
    assert len(batches) == 125
    assert all(len({row[0] for row in batch}) == 1 for batch in batches)
    assert {batch[0][0] for batch in batches} == set(SIZES)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 10.0])
def test_tasks_are_drawn_by_the_temperature_scaled_number_of_rows(temperature):
    mixture = make(temperature)
    weights = {name: n ** (1 / temperature) for name, n in SIZES.items()}
    total = sum(weights.values())
    drawn = []
    for epoch in range(40):
        mixture.set_epoch(epoch)
        drawn += [task for task, _ in mixture.order[:: mixture.batch_size]]
    for name, weight in weights.items():
        p = weight / total
        assert mixture.probabilities[name] == pytest.approx(p)
        assert abs(drawn.count(name) / len(drawn) - p) <= 4 * (p * (1 - p) / len(drawn)) ** 0.5


def test_rows_are_taken_without_replacement():
    mixture = make(temperature=1000.0)
    rows = {name: [row for task, row in mixture.order if task == name] for name in SIZES}
    for name, size in SIZES.items():
        passes, rest = divmod(len(rows[name]), size)
        counts = np.bincount(rows[name], minlength=size)
        assert set(counts) <= {passes, passes + 1}
        assert (counts == passes + 1).sum() == rest


def test_the_order_is_a_function_of_seed_and_epoch():
    first, again, other = make(seed=1), make(seed=1), make(seed=2)
    assert first.order == again.order != other.order
    epoch_0 = first.order
    first.set_epoch(1)
    assert first.order != epoch_0
    first.set_epoch(0)
    assert first.order == epoch_0


def loader(mixture, num_processes=1, process_index=0):
    plain = DataLoader(mixture, batch_size=mixture.batch_size // num_processes)
    return prepare_data_loader(plain, num_processes=num_processes, process_index=process_index, put_on_device=False)


def test_accelerates_loader_follows_the_epochs_and_resumes_in_the_middle():
    unbroken = []
    whole = loader(make(seed=3))
    for epoch in range(2):
        whole.set_epoch(epoch)
        unbroken.append([batch["row"] for batch in whole])
    assert unbroken[0] != unbroken[1]
    resumed = skip_first_batches(loader(make(seed=3)), 50)
    resumed.set_epoch(1)
    assert [batch["row"] for batch in resumed] == unbroken[1][50:]


def test_ranks_share_out_each_batch():
    parts = [[batch["row"] for batch in loader(make(seed=3), 2, rank)] for rank in (0, 1)]
    together = [first + second for first, second in zip(*parts, strict=True)]
    assert together == batches_of(make(seed=3))


def test_bad_input():
    with pytest.raises(ValueError, match="temperature must be > 0"):
        make(temperature=0)
    with pytest.raises(ValueError, match="every task must have training rows; b has none"):
        make(sizes={"a": 3, "b": 0})
