"""Work shared among ranks: every item is done once, and comes back in its place."""

from __future__ import annotations

import threading

import pytest

from poise.store.runs import open_run
from poise.train.context import Context


class Ranks:
    """Contexts of several ranks in threads of this process, with a `gather` that waits for all of them."""

    def __init__(self, world_size: int, tmp_path) -> None:
        self.values: list[object] = [None] * world_size
        self.barrier = threading.Barrier(world_size)
        self.contexts = [self._context(rank, world_size, tmp_path) for rank in range(world_size)]

    def _context(self, rank: int, world_size: int, tmp_path) -> Context:
        context = Context(open_run(tmp_path, "one"), rank, world_size)

        def gather(value: object) -> list[object]:
            self.values[rank] = value
            self.barrier.wait(10)
            values = list(self.values)
            self.barrier.wait(10)
            return values

        context.gather = gather
        return context


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 7])
def test_shards_are_a_partition_and_come_back_in_order(tmp_path, world_size, count):
    ranks = Ranks(world_size, tmp_path)
    shards = [context.shard(count) for context in ranks.contexts]
    assert sorted(place for shard in shards for place in shard) == list(range(count))
    answers: list[list[int] | None] = [None] * world_size

    def work(context: Context) -> None:
        answers[context.rank] = context.unshard([10 * place for place in context.shard(count)])

    threads = [threading.Thread(target=work, args=(context,)) for context in ranks.contexts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [[10 * place for place in range(count)]] * world_size
