"""Figures that are rounded for people still add up."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_doctor.formats.ledger_text import bar, rounded_to_sum, write_ledger
from vlm_doctor.formats.page import Page
from vlm_doctor.placement import Plan
from vlm_doctor.units import GIB


@given(sizes=st.lists(st.integers(-(2**40), 2**40), max_size=12), step=st.sampled_from([1.0, 3.7, GIB / 100, 2**20]))
def test_rounded_sizes_add_up_to_the_rounded_sum(sizes: list[int], step: float) -> None:
    steps = rounded_to_sum(sizes, step)

    assert sum(steps) == round(sum(sizes) / step)
    assert all(abs(number * step - size) <= step * 1.01 for number, size in zip(steps, sizes, strict=True))


@pytest.mark.parametrize("width", [40, 80, 110])
def test_columns_of_the_ledger_add_up_to_the_memory(plan: Plan, width: int) -> None:
    page = Page(width=width)

    write_ledger(page, plan.stages)

    for table in page.render().split("  GiB")[1:]:
        figures = [[float(word) for word in re.findall(r"-?\d+\.\d\d", line)] for line in table.splitlines()[1:]]
        *lines, totals = [row for row in figures if row]
        assert totals == [22.49] * len(totals)
        assert abs(sum(sum(row) for row in lines) - sum(totals)) < 0.001


def test_many_gpus_are_shown_in_several_tables(plan: Plan) -> None:
    page = Page(width=80)

    write_ledger(page, plan.stages * 8)

    assert page.render().count("driver and firmware") == 3
    assert max(map(len, page.render().splitlines())) <= 80


def test_a_bar_fills_its_columns_and_shows_all_there_is(plan: Plan) -> None:
    cells = [segment.letter for segment in bar(plan.stages[0], 40)]

    assert len(cells) == 40
    assert "".join(dict.fromkeys(cells)) == "ocVELKAr."


def test_a_stage_without_memory_has_no_bar(plan: Plan) -> None:
    assert bar(type(plan.stages[0])(gpu=0, uuid="", name="", keys=(), ledger=(), total_bytes=0), 40) == []
