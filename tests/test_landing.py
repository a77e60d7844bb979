"""The landing page: its code is right, its form computes, all above the fold."""

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
    expected = taught("batched_jacobians")["autograd_loop"](model, names["X"])
    torch.testing.assert_close(names["J"], expected)


@pytest.mark.parametrize(("width", "seen"), [(360, 2), (1280, 6)])
def test_first_screen_shows_what_jacobians_are_for(width, seen, chromium, site):
    tab = chromium.new_page(viewport={"width": width, "height": 800})
    tab.goto(site)
    uses = tab.locator(".uses figure").all()
    assert len(uses) == 6
    for use in uses[:seen]:
        box = use.bounding_box()
        assert 0 <= box["y"] and box["y"] + box["height"] <= 800
    tab.close()


@pytest.mark.parametrize("number", range(6))
def test_each_use_has_a_picture_a_sentence_and_its_page(number, html):
    use = html.select(".uses figure")[number]
    assert use.img["alt"] and use.figcaption.strong
    assert parse(use.a["href"]).title


def answer(form):
    return form.locator("output").inner_text()


@pytest.mark.parametrize(
    ("fields", "size", "verdict"),
    [
        ({}, "689 MB", "fits, with about 1.38 GB at the peak: take vmap(jacrev)"),
        ({"N": 7, "C": 3, "P": 5, "bytes": "float64"}, "840 bytes", "fits, with"),
        ({"N": 7, "C": 3, "P": 50}, "4.2 kB", "fits, with"),
        (
            {"N": 3, "C": 2, "P": 500},
            "12 kB",
            "fits, with about 24 kB at the peak: take is_grads_batched",
        ),
        ({"N": 1, "C": 3, "P": 333333}, "4 MB", "fits, with"),
        ({"N": 1, "C": 1, "P": 249999999}, "1 GB", "fits, with"),
        ({"N": 128, "P": "1e6", "memory": 8}, "5.12 GB", "fits once: allocate it"),
        ({"N": 128, "P": "1M", "memory": "5"}, "5.12 GB", "does not fit into 90 % of"),
        ({"N": 125, "P": "1M", "memory": "5.5"}, "5 GB", "does not fit into 90 % of"),
        (
            {"N": 125, "P": "1M", "memory": "5.6"},
            "5 GB",
            "fits once: allocate it first",
        ),
        ({"N": 125, "P": "1M", "memory": 11}, "5 GB", "fits once: allocate"),
        (
            {"N": 125, "P": "1M", "memory": 11.2},
            "5 GB",
            "fits, with about 10 GB at the",
        ),
        (
            {"N": 32, "C": 1000, "P": 11689512},
            "1.5 TB",
            "does not fit into 90 % of the memory: compute chunks",
        ),
        ({"N": "1M", "C": "1M", "P": "100k"}, "400 PB", "does not fit"),
        (
            {"kind": "CNN"},
            "689 MB",
            "fits, with about 1.45 GB at the peak, and the layers' outputs for ten "
            "samples: take vmap(jacrev) with chunk_size=10",
        ),
        ({"kind": "CNN", "memory": 1}, "689 MB", "fits once, but not what a method"),
        ({"kind": "CNN", "memory": 0.5}, "689 MB", "does not fit"),
    ],
)
def test_form_computes_by_keyboard(fields, size, verdict, form):
    form.locator("input").first.focus()
    for name in ("N", "C", "P", "bytes", "kind", "memory"):
        if name in fields:
            form.page.keyboard.press("Control+A")
            form.page.keyboard.type(str(fields[name]))
        form.page.keyboard.press("Tab")
    assert answer(form).startswith(f"J takes {size} and {verdict}")


def test_form_reads_sizes_as_people_write_them(form):
    for text, value in {
        "11.7M": 11_700_000,
        "11.7 m": 11_700_000,
        "1e6": 10**6,
        "1.5e3": 1500,
        "25k": 25_000,
        "25.3k": 25_300,
        "2B": 2 * 10**9,
        "11,689,512": 11_689_512,
        " 11_689_512 ": 11_689_512,
        "269 322": 269_322,
    }.items():
        form.locator("[name=P]").fill(text)
        short = answer(form)
        form.locator("[name=P]").fill(str(value))
        assert short == answer(form), text
        assert short.startswith("J takes "), text


@pytest.mark.parametrize("name", ["N", "C", "P", "memory"])
def test_form_refuses_what_is_no_size(name, form):
    field = form.locator(f"[name={name}]")
    said = "Memory is no number" if name == "memory" else f"{name} is no whole number"
    for text in ("", "0", "-3", "x", "1,5", "1.2.3", "k", "<b>", "7q", "1e400"):
        field.fill(text)
        assert answer(form).startswith(said), text
        assert field.get_attribute("aria-invalid") == "true"
        field.fill("25k")
        assert answer(form).startswith("J takes ")
        assert field.get_attribute("aria-invalid") == "false"


def test_form_refuses_parts_of_a_parameter(form):
    for text in ("1.5", "0.5", "1.2345k"):
        form.locator("[name=P]").fill(text)
        assert "P is no whole number from 1 on" in answer(form)
        form.locator("[name=memory]").fill(text)
        form.locator("[name=P]").fill("5")
        assert answer(form).startswith("J takes ")


def test_form_fits_what_it_shows_after_the_way_back(form):
    tab = form.page
    form.locator("[name=N]").fill("1000000")
    form.locator("[name=kind]").select_option("CNN, attention")
    before = answer(form)
    assert before.startswith("J takes 10.8 TB and does not fit")
    form.locator("output a").first.click()
    tab.wait_for_url("**/auto_examples/**")
    tab.go_back(wait_until="networkidle")
    assert form.locator("[name=N]").input_value() == "1000000"
    assert answer(form) == before


@pytest.mark.parametrize("kind, links", [("MLP", 5), ("CNN, attention", 4)])
def test_links_of_the_form_lead_somewhere(kind, links, form):
    form.locator("[name=kind]").select_option(kind)
    led = set()
    for gigabytes in (16, 3, 1, 0.5):
        form.locator("[name=memory]").fill(str(gigabytes))
        found = form.locator("output a").all()
        assert found
        led |= {link.get_attribute("href") for link in found}
    for href in led:
        page, _, anchor = href.partition("#")
        html = parse(page)
        assert html.find(id=anchor) if anchor else html.title
    assert len(led) == links


def test_guide_leads_to_what_to_take_and_to_whether_it_is_right(html):
    guide = html.select("#your-case-take-this a")
    links = {link["href"].partition("#")[0] for link in guide}
    assert {
        "auto_examples/scale/jacobians_without_memory.html",
        "auto_examples/scale/neural_tangent_kernel.html",
        "auto_examples/scale/universal_jacobian.html",
        "auto_examples/trust/check_a_jacobian.html",
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
        number, unit = shown.split()
        size = float(number) * {"MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
        assert size == pytest.approx(4 * N * C * P, rel=5e-3)
    assert rows
    context.close()
