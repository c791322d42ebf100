"""The arithmetic of `benchmark.py plan`, by hand for one row."""

import itertools

from benchmarks import plan


def test_one_row_by_hand():
    row = next(row for row in plan.rows() if row[:2] == ("GPT-2 large", 16))
    _, _, step, seconds, trained, base, stored, token, fit = row
    width, layers, length = 1280, 36, 16
    weights = 774_030_080  # GPT-2 large, as published: 774 million
    assert base == 2 * weights / 1e9
    assert stored == 4 * 2 * layers * width * length / 1e6
    assert trained == 16 * (length * width + 512 * (width + 2 * layers * width)) / 1e9
    tokens, matrices = 16 * 512, 12 * layers * width**2
    assert 2 * 2 * matrices * tokens < step < 1.25 * 2 * 2 * matrices * tokens  # forward and back; attention, head
    assert seconds == step / 989e12 / 0.4
    read = 2 * (matrices + 50257 * width) + 2 * 2 * layers * width * (length + 256 + 64)
    assert token == read / 3.35e12 * 1e3
    assert fit == int((80e9 - 2 * weights) / (2 * 2 * layers * width * length))


def test_longer_prefixes_cost_more():
    rows = [row for row in plan.rows() if row[0] == "Llama 8B"]
    for earlier, later in itertools.pairwise(rows):
        assert all(less < more for less, more in zip(earlier[1:5], later[1:5], strict=True))
        assert earlier[-1] > later[-1]
