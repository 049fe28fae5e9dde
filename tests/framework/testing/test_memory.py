"""The memory of tensors, counted by hand."""

from __future__ import annotations

import torch

from unmerge.testing.memory import peak_bytes


def test_what_is_alive_at_one_time_is_counted() -> None:
    def task() -> None:
        a = torch.zeros(1000, dtype=torch.float64)  # 8,000
        b = a + 1  # 16,000
        del a  # 8,000
        c = b * 2  # 16,000
        view = c[:10]
        del b, c  # 8,000: the view keeps all of c
        view += 1
        torch.cat([view, view])  # 8,160

    assert peak_bytes(task) == 16_000


def test_a_view_keeps_its_storage_and_takes_none() -> None:
    def task() -> torch.Tensor:
        return torch.zeros(100, dtype=torch.uint8).reshape(10, 10).t()[2:]

    assert peak_bytes(task) == 100


def test_what_was_there_before_is_not_counted() -> None:
    there = torch.zeros(1000)
    assert peak_bytes(lambda: there.view(10, 100)) == 0
    assert peak_bytes(lambda: there.add_(1)) == 0
    assert peak_bytes(lambda: there.sum()) == 4
