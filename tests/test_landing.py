"""The landing page: its code is right, its form computes, all above the fold."""

import re

import pytest
import torch
from conftest import SITE, parse
from torch import nn


@pytest.fixture(scope="module")
def html():
    return parse("index.html")


@pytest.fixture
def form(chromium, site):
    tab = chromium.new_page()
    tab.goto(site)
    yield tab.locator("form.size")
    tab.close()


def test_code_is_right_as_it_stands(html, taught):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3, 2))
    names = {"model": model.double(), "X": torch.rand(5, 4, dtype=torch.float64)}
    exec(html.select_one("div.highlight-python pre").text, names)
    expected = taught("batched_jacobians")["autograd_jacobian"](model, names["X"])
    torch.testing.assert_close(names["J"], expected)


@pytest.mark.parametrize("width", [360, 1280])
def test_first_screen_holds_picture_code_and_guide(width, chromium, site):
    tab = chromium.new_page(viewport={"width": width, "height": 800})
    tab.goto(site)
    for selector in ("img", "div.highlight-python", "#which-method h2"):
        box = tab.locator(f".document {selector}").first.bounding_box()
        assert 0 <= box["y"] and box["y"] + box["height"] <= 800, selector
    tab.close()


@pytest.mark.parametrize(
    ("fields", "size", "verdict"),
    [
        ({"N": 64, "C": 10, "P": 269322}, 0.689, "fits: take vmap(jacrev)"),
        ({"N": 7, "C": 3, "P": 5, "bytes": "float64"}, 8.4e-7, "fits: take"),
        ({"N": 128, "C": 10, "P": 10**6, "memory": 8}, 5.12, "fits once: write"),
        ({"N": 32, "C": 1000, "P": 11689512}, 1500, "does not fit: compute"),
    ],
)
def test_form_computes_by_keyboard(fields, size, verdict, form):
    form.locator("input").first.focus()
    for name in ("N", "C", "P", "bytes", "memory"):
        if name in fields:
            form.page.keyboard.press("Control+A")
            form.page.keyboard.type(str(fields[name]))
        form.page.keyboard.press("Tab")
    answer = form.locator("output").inner_text()
    assert verdict in answer
    shown = float(re.search(r"takes ([\d.,]+) GB", answer)[1].replace(",", ""))
    assert shown == pytest.approx(size, rel=5e-3)


@pytest.mark.parametrize("value", ["", "0", "-3", "1.5"])
def test_form_refuses_what_is_no_size(value, form):
    form.locator("[name=C]").fill(value)
    assert "whole numbers from 1 on" in form.locator("output").inner_text()


def test_links_of_the_form_lead_somewhere(form, site):
    form.locator("[name=P]").fill("1" + "0" * 12)
    link = form.locator("output a").get_attribute("href")
    page, _, anchor = link.partition("#")
    text = (SITE / page).read_text()
    assert f'id="{anchor}"' in text


def test_without_javascript_there_is_a_table_that_is_right(chromium, site):
    context = chromium.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(site)
    assert not tab.locator("form.size").is_visible()
    rows = tab.locator("noscript tbody tr").all()
    for row in rows:
        *sizes, shown = row.locator("td").all_inner_texts()
        N, C, P = map(int, sizes)
        gigabytes = float(shown.removesuffix(" GB"))
        assert gigabytes == pytest.approx(4 * N * C * P / 1e9, rel=5e-3)
    assert rows
    context.close()
