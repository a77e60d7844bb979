"""The landing page: its code is right, its form computes, all above the fold."""

import re

import pytest
import torch
from conftest import parse
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
        (
            {"N": 64, "C": 10, "P": 269322},
            0.689,
            "fits: take vmap(jacrev) or batched_jacobian",
        ),
        ({"N": 7, "C": 3, "P": 5, "bytes": "float64"}, 8.4e-7, "fits: take"),
        (
            {"N": 128, "C": 10, "P": 10**6, "memory": 8},
            5.12,
            "fits once: allocate it first",
        ),
        ({"N": 32, "C": 1000, "P": 11689512}, 1500, "does not fit: compute its"),
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


@pytest.mark.parametrize(
    ("gigabytes", "pages"),
    [
        (2, ["universal_jacobian"]),
        (1, ["universal_jacobian", "jacobians_without_memory"]),
        (0.5, ["jacobians_without_memory"]),
    ],
)
def test_links_of_the_form_lead_somewhere(gigabytes, pages, form):
    for name, value in {"N": 25, "C": 10, "P": 10**6, "memory": gigabytes}.items():
        form.locator(f"[name={name}]").fill(str(value))
    links = form.locator("output a").all()
    assert len(links) == len(pages)
    for link, expected in zip(links, pages):
        page, _, anchor = link.get_attribute("href").partition("#")
        assert page == f"auto_examples/scale/{expected}.html"
        html = parse(page)
        assert html.find(id=anchor) if anchor else html.title


def test_guide_leads_to_what_to_take_and_to_whether_it_is_right(html):
    links = {link["href"].partition("#")[0] for link in html.select("#which-method a")}
    assert {
        "auto_examples/scale/jacobians_without_memory.html",
        "auto_examples/scale/universal_jacobian.html",
        "auto_examples/trust/layer_support.html",
        "auto_examples/trust/silent_failures.html",
    } <= links


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
