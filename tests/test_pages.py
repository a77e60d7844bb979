"""Every page as a file: what a crawler, a link checker or a suspicious reader sees."""

import importlib
import re
import runpy
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from conftest import EXAMPLES, PAGES, ROOT, SITE, TUTORIALS, UNSTABLE, parse

ROOMS = {name.partition("/")[0] for name in TUTORIALS if "/" in name}

pages = pytest.mark.parametrize("page", PAGES)


def test_there_is_a_page_for_each_tutorial_and_no_other():
    expected = {f"auto_examples/{tutorial}.html" for tutorial in TUTORIALS}
    written = {f"{source.stem}.html" for source in (ROOT / "docs").glob("*.rst")}
    assert set(PAGES) == expected | written | {"404.html", "search.html"}


@pages
def test_page_is_free_of_addresses_paths_and_warnings(page):
    text = (SITE / page).read_text()
    assert not UNSTABLE.search(text)
    assert str(ROOT) not in text
    assert "/tmp/" not in text


@pages
def test_page_introduces_itself(page):
    html = parse(page)
    assert html.title.text.strip()
    assert html.find("link", rel="shortcut icon")["href"].endswith("favicon.svg")
    assert re.search(r"PyTorch \d+\.\d+.*BackPACK \d+\.\d+", html.footer.text)
    assert len(html.find("meta", attrs={"name": "description"})["content"]) > 30


def test_titles_and_descriptions_are_unique():
    pages = [parse(page) for page in PAGES]
    assert len({page.title.text for page in pages}) == len(pages)
    assert len(
        {page.find("meta", attrs={"name": "description"})["content"] for page in pages}
    ) == len(pages)


@pages
def test_internal_links_and_anchors_resolve(page):
    html = parse(page)
    base = html.find("base")
    start = base["href"] if base else page
    links = [tag[key] for key in ("href", "src") for tag in html.select(f"[{key}]")]
    for link in links:
        if urlsplit(link).scheme or link == "#":
            continue
        parts = urlsplit(urljoin(start, link))
        path = unquote(parts.path).lstrip("/") or "index.html"
        assert (SITE / path).is_file(), link
        if parts.fragment and path.endswith(".html"):
            assert parse(path).find(id=unquote(parts.fragment)), link


@pages
def test_images_have_a_text(page):
    for image in parse(page).select("[itemprop=articleBody] img"):
        # A card says what its picture says; below a main figure stands its text.
        beside = image.find_parent(class_=["sphx-glr-thumbcontainer", "lead-figure"])
        assert bool(image["alt"]) != bool(beside)
        assert not beside or beside.text.strip()


@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_downloads_are_the_source(tutorial):
    page = f"auto_examples/{tutorial}.html"
    links = parse(page).select(".byline a[download]")
    files = {link.text: SITE / urljoin(page, link["href"]) for link in links}
    script = EXAMPLES / f"{tutorial}.py"
    assert files["Script"].read_bytes() == script.read_bytes()
    generated = ROOT / "docs" / "auto_examples" / f"{tutorial}.ipynb"
    assert files["Notebook"].read_bytes() == generated.read_bytes()


def test_menu_and_next_follow_the_order_of_the_configuration():
    order = runpy.run_path(str(ROOT / "conf.py"))["tutorial_order"]
    menu = parse("index.html").select_one(".wy-menu")
    captions = [caption.text for caption in menu.select("p.caption")]
    assert captions[0] == "Start" and len(captions) >= 1 + len({*ROOMS} & {*order})
    links = [link["href"] for link in menu.select(".toctree-l1 > a")]
    tutorials = [link for link in links if link.startswith("auto_examples/")]
    expected = [f"{room}/{name}" for room in order for name in order[room]]
    expected = [name for name in expected if name in TUTORIALS]
    others = sorted(name for name in TUTORIALS if "/" not in name)
    assert tutorials[: len(others)] == [f"auto_examples/{name}.html" for name in others]
    listed = [link for link in tutorials if link[14:-5] in expected]
    assert listed == [f"auto_examples/{name}.html" for name in expected]
    for page, following in zip(links, links[1:]):
        link = parse(page).find("a", rel="next")["href"]
        assert urljoin(page, link) == following


def test_cards_show_their_first_sentence():
    cards = parse("index.html").select(".sphx-glr-thumbcontainer")
    assert len(cards) == len(TUTORIALS)
    for card in cards:
        page = parse(card.a["href"])
        description = page.find("meta", attrs={"name": "description"})["content"]
        description = description.translate(str.maketrans("’“”", '\'""'))
        said = card.select_one(".card-text").text
        assert 20 < len(said) and description.startswith(said[:-1])
        assert not card.has_attr("tooltip")


@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_first_screen_says_what_the_tutorial_needs(tutorial):
    script = (EXAMPLES / f"{tutorial}.py").read_text()
    byline = parse(f"auto_examples/{tutorial}.html").select_one("h1 + .byline").text
    assert "Needs Python 3.11, PyTorch 2.9, or newer" in byline
    for module, name in {"torch": "PyTorch", "backpack": "BackPACK"}.items():
        used = re.search(rf"^ *(from|import) {module}\b", script, re.MULTILINE)
        assert bool(re.search(rf"{name} \d+\.\d+", byline)) == bool(used)


@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_main_figure_comes_first(tutorial):
    html = parse(f"auto_examples/{tutorial}.html")
    figures = html.select("img[srcset]")
    if not figures:
        return
    lead, *figures = figures
    link, how = lead.find_parent("p").select("a")
    assert html.find(id=how["href"].removeprefix("#")).find("img") is figures[0]
    assert [lead["src"], link.text] == [figures[0]["src"], figures[0]["alt"]]
    assert lead.find_previous("pre") is None
    assert lead["width"].isdigit() and lead["height"].isdigit()


@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_output_breaks_at_its_lines_and_not_within_numbers(tutorial):
    for output in parse(f"auto_examples/{tutorial}.html").select(
        ".sphx-glr-script-out pre"
    ):
        lines = [line.text for line in output.select("span.line")]
        assert lines == output.text.splitlines(keepends=True)
        numbers = [number.text for number in output.select("span.line span.number")]
        assert numbers == re.findall(r"[\d.]+e[+-]\d+", output.text)


@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_first_output_comes_soon(tutorial):
    html = parse(f"auto_examples/{tutorial}.html")
    before = html.select_one(".sphx-glr-script-out").find_all_previous("pre")
    shown = [block for block in before if not block.find_parent("details")]
    lines = "\n".join(block.text for block in shown).splitlines()
    assert len([line for line in lines if line.strip()]) <= 30


# On a phone, the letters of wider figures are too small, as they are in cards.
@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_figure_is_legible_on_a_phone(tutorial):
    for figure in parse(f"auto_examples/{tutorial}.html").select("img[srcset]"):
        assert int(figure["width"]) <= 500


INVENTORIES = sorted((ROOT / "docs" / "_ext").glob("*.inv"))


@pytest.mark.parametrize("inventory", INVENTORIES, ids=lambda path: path.stem)
def test_inventory_names_what_exists_and_is_used(inventory):
    pages = "".join((SITE / page).read_text() for page in PAGES)
    for line in inventory.read_text().splitlines()[3:]:
        name, _, location = line.split()
        module, *attributes = name.split(".")
        thing = importlib.import_module(module)
        for attribute in attributes:
            if not hasattr(thing, attribute):
                importlib.import_module(f"{thing.__name__}.{attribute}")
            thing = getattr(thing, attribute)
        assert f"{location}#{name}" in pages
