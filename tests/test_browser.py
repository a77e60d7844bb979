"""Every page in a real browser, on a phone and on a desk, light and dark."""

import gzip
import re
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import EXAMPLES, PAGES, SITE, TUTORIALS, parse

BUDGET = 150_000  # bytes of a tutorial page beyond its figures, compressed
FOLDED = [page for page in PAGES if parse(page).select("details.fold")]
# Collected from the moment a page loads: how far its parts jump.
WATCH_SHIFTS = """
window.shift = 0;
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) window.shift += entry.value;
}).observe({type: "layout-shift", buffered: true});
"""
SETTLE = """
async () => {
  await document.fonts.ready;
  for (let i = 0; i < 2; i++) await new Promise(requestAnimationFrame);
}
"""
# Words of code with the same look need one check: keep the first of each kind, and the
# line breaks, since a block of one line would begin to scroll while axe looks at it.
THIN_OUT = """
const seen = new Set();
for (const word of document.querySelectorAll("pre :is(a, span)")) {
  const block = word.closest("pre").parentElement.parentElement;
  const kind = [word, word.parentElement, block].map((e) => e.tagName + e.className);
  const repeats = seen.has(String(kind)) && !word.children.length;
  if (repeats && !word.textContent.includes("\\n")) word.remove();
  seen.add(String(kind));
}
for (const link of document.querySelectorAll("pre a:empty")) link.remove();
"""
# axe does not count a text in the color of its background: it may be hidden on purpose.
AXE = """
async ([part, rules]) => {
  const options = {resultTypes: ["violations", "incomplete"]};
  if (rules) options.runOnly = rules;
  const {violations, incomplete} = await axe.run(part, options);
  const same = ({any}) => any.some(({data}) => data?.messageKey === "equalRatio");
  const named = (id, nodes) => [id, nodes.map((node) => node.html)];
  return violations.map((v) => named(v.id, v.nodes)).concat(incomplete
    .map((v) => named("invisible", v.nodes.filter(same)))
    .filter(([, nodes]) => nodes.length));
}
"""
COLORS = [
    "color-contrast",
    "link-in-text-block",
]  # the rules that the scheme matters to
# Everything that is shown and reacts, or scrolls, minus what has the focus in turn.
WATCH_FOCUS = """
() => {
  const shown = (e) => e.checkVisibility({visibilityProperty: true});
  const scrolls = (e) => (e.scrollWidth > e.clientWidth + 1 &&
    ["auto", "scroll"].includes(getComputedStyle(e).overflowX)) ||
    (e.scrollHeight > e.clientHeight + 1 &&
    ["auto", "scroll"].includes(getComputedStyle(e).overflowY));
  // A link in code is one of many with the same target.
  const again = (e) => e.matches("pre a[tabindex='-1']") && [...document.links].find(
    (link) => link.href === e.href).tabIndex === 0;
  const react = "a[href], button, input:not([type=hidden]), select, summary";
  window.unseen = [];
  window.waiting = new Set([...document.querySelectorAll("*")].filter((e) =>
    shown(e) && !again(e) &&
    (e.matches(react) || (scrolls(e) && e.matches(".document *")))));
  if (!window.watched) document.addEventListener("focusin", ({target}) => {
    window.waiting.delete(target);
    const box = target.getBoundingClientRect();
    const outlined = getComputedStyle(target).outlineStyle !== "none";
    if (!outlined || box.right <= 0) window.unseen.push(target.outerHTML);
  });
  window.watched = true;
  return window.waiting.size;
}
"""


@pytest.fixture(scope="module")
def visit(chromium, site):
    """Return a function that opens a page in the tab that is kept for such options."""
    tabs = {}

    def visit(page, width=1280, **options):
        kind = str(options)
        if kind not in tabs:
            context = chromium.new_context(reduced_motion="reduce", **options)
            tabs[kind] = tab = context.new_page()
            tab.add_init_script(WATCH_SHIFTS)
            tab.on("request", lambda request: tab.requests.append(request))
            tab.on("console", lambda message: tab.complaints.append(message.text))
            tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab = tabs[kind]
        tab.requests, tab.complaints = [], []
        tab.set_viewport_size({"width": width, "height": 800})
        tab.emulate_media(color_scheme="light", media="screen")
        tab.goto("about:blank")
        tab.goto(site + page)
        if options.get("java_script_enabled", True):
            tab.evaluate(SETTLE)
        return tab

    yield visit
    for tab in tabs.values():
        tab.context.close()


@pytest.fixture(scope="module", params=PAGES)
def opened(request, visit):
    """Return each page on a phone, as it was when it had loaded, for several tests."""
    tab = visit(request.param, 360)
    tab.shift = tab.evaluate("window.shift")
    tab.page = request.param
    tab.evaluate("document.querySelectorAll('details').forEach((e) => e.open = true)")
    return tab


def look(tab, width=None, scheme=None):
    """Show an open page at another width or in another scheme."""
    if width:
        tab.set_viewport_size({"width": width, "height": 800})
    if scheme:
        tab.emulate_media(color_scheme=scheme)
    tab.evaluate(SETTLE)


def violations(tab, part="body", rules=None, thin_out=True):
    """Return what axe finds, as names of rules and the HTML of what breaks them."""
    if not tab.evaluate("window.axe !== undefined"):
        tab.evaluate(Axe().axe_script)
    if thin_out:
        tab.evaluate(THIN_OUT)
    return tab.evaluate(AXE, [part, rules])


def test_page_stays_put_and_asks_no_other_site(opened, site):
    assert opened.shift < 0.001
    assert opened.complaints == []
    urls = {request.url for request in opened.requests}
    assert all(url.startswith(site) for url in urls)
    if opened.page.startswith("auto_examples/"):
        paths = {urlsplit(url.removeprefix(site)).path for url in urls}
        files = [SITE / path for path in paths if not path.startswith("_images/")]
        sizes = [len(gzip.compress(file.read_bytes())) for file in files]
        assert sum(sizes) < BUDGET, dict(zip(files, sizes))


@pytest.mark.parametrize("width", [320, 360, 1280])
def test_page_fits(width, opened):
    look(opened, width)
    assert opened.evaluate("document.documentElement.scrollWidth") <= width


def test_paper_holds_all(opened):
    look(opened, 800)  # no phone
    opened.emulate_media(media="print")
    cut = """[...document.querySelectorAll(".document pre")].filter((e) =>
      e.scrollHeight > e.clientHeight + 1 || e.scrollWidth > e.clientWidth + 1 ||
      !e.checkVisibility() || !e.clientHeight).map((e) => e.textContent)"""
    opened.evaluate("document.querySelectorAll('details').forEach((e) => e.open = 0)")
    found = opened.evaluate(cut)
    opened.evaluate("document.querySelectorAll('details').forEach((e) => e.open = 1)")
    opened.emulate_media(media="screen")
    assert found == []


@pytest.mark.parametrize("width", [360, 1280])
def test_keyboard_reaches_everything(width, opened):
    look(opened, width)
    rules = ["scrollable-region-focusable"]
    assert violations(opened, rules=rules, thin_out=False) == []
    count = opened.evaluate(WATCH_FOCUS)
    for _ in range(2):  # a round that begins in the middle of the page ends there
        for _ in range(count + 10):
            opened.keyboard.press("Tab")
        if opened.evaluate("window.waiting.size") == 0:
            break
    assert opened.evaluate("[...window.waiting].map((e) => e.outerHTML)") == []
    assert opened.evaluate("window.unseen") == []


def test_menu_is_accessible_and_has_the_focus(opened):
    look(opened, 360, "light")
    opened.locator(".wy-nav-top button").press("Enter")
    assert opened.evaluate("document.activeElement.closest('.wy-nav-side') !== null")
    for scheme in "light", "dark":
        look(opened, scheme=scheme)
        assert violations(opened, ".wy-nav-side", COLORS) == []
    opened.keyboard.press("Escape")
    assert opened.evaluate("document.activeElement.ariaExpanded") == "false"


@pytest.mark.parametrize("width", [360, 1280])
def test_page_is_accessible(width, opened):
    look(opened, width, "light")
    assert violations(opened) == []
    look(opened, scheme="dark")
    assert violations(opened, rules=COLORS) == []


@pytest.mark.parametrize("page", PAGES)
def test_followed_anchor_is_readable_and_nothing_jumps(page, visit):
    anchors = [link["href"] for link in parse(page).select(".wy-menu a[href^='#']")]
    tab = visit(page + (anchors or ["#"])[-1])
    assert tab.evaluate("window.shift") < 0.001
    for scheme in "light", "dark":
        look(tab, scheme=scheme)
        assert violations(tab, ".wy-nav-side", COLORS) == []


@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_figure_can_be_enlarged_by_key(tutorial, visit):
    tab = visit(f"auto_examples/{tutorial}.html", 360, java_script_enabled=False)
    figures = tab.locator("img[srcset]").all()
    for figure in figures:
        link = figure.locator("xpath=ancestor::a")
        file = link.get_attribute("href")
        name = figure.get_attribute("alt") or link.inner_text()
        assert tab.get_by_role("link", name=name, exact=True).count()
        assert file in figure.get_attribute("srcset")
    if figures:
        width = link.evaluate("(link) => link.clientWidth")
        link.press("Enter")
        tab.wait_for_url(f"**/{file.rpartition('/')[2]}")
        assert tab.locator("img").evaluate("(image) => image.naturalWidth") > 2 * width


@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_page_needs_no_javascript(tutorial, visit):
    tab = visit(f"auto_examples/{tutorial}.html", 360, java_script_enabled=False)
    formulas = tab.locator("math").evaluate_all(
        "(all) => all.map((e) => [e.textContent, e.clientWidth, e.clientHeight])"
    )
    source = (EXAMPLES / f"{tutorial}.py").read_text()
    assert len(formulas) == source.count(":math:") + source.count(".. math::")
    for text, width, height in formulas:
        assert "\\" not in text and width > 5 and height > 5
    # The menu is there, and no button that does nothing.
    assert tab.locator(".wy-nav-top button").is_hidden()
    assert tab.locator(".wy-menu li.current > a").first.is_visible()
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("word", ["SqrtGGNExact", "grad_batch"])
def test_search_finds(word, visit):
    tab = visit("index.html")
    tab.get_by_role("textbox", name="Search docs").fill(word)
    tab.keyboard.press("Enter")
    results = tab.locator("#search-results li a")
    results.first.wait_for()
    links = [link.get_attribute("href") for link in results.all()]
    assert any("auto_examples/batched_jacobians.html" in link for link in links)
    found = {link.partition("#")[0].partition("?")[0] for link in links}
    assert found <= set(PAGES) - {"404.html", "search.html"}


def test_search_leads_to_the_section_that_holds_the_word(visit):
    html = parse("questions.html").select_one("[itemprop=articleBody]")
    words = re.findall(r"\b[a-z]{9,}\b", html.text)
    headings = html.select("h1, h2, h3")
    once = [word for word in words if html.text.lower().count(word) == 1]
    once = [word for word in once if not any(word in h.text for h in headings)]
    word = once[len(once) // 2]
    section = html.find(string=re.compile(word)).find_parent("section")
    tab = visit(f"search.html?q={word}")
    tab.locator("#search-results a[href^='questions.html']").first.click()
    tab.wait_for_url(f"**/questions.html*#{section['id']}")
    tab.wait_for_function("document.querySelector('.highlighted')")
    box = tab.locator(f"[id='{section['id']}']").bounding_box()
    assert -1 <= box["y"] < 400


def test_search_results_and_marked_words_are_accessible(visit):
    tab = visit("search.html?q=SqrtGGNExact")
    tab.locator("#search-results .context").first.wait_for()
    for scheme in "light", "dark":
        look(tab, scheme=scheme)
        assert violations(tab, rules=COLORS if scheme == "dark" else None) == []
    tab.locator("#search-results li a").first.click()
    tab.locator(".highlighted").first.wait_for()
    for scheme in "light", "dark":
        look(tab, scheme=scheme)
        assert violations(tab, rules=COLORS if scheme == "dark" else None) == []


def test_copy_button_copies_the_code_and_outputs_have_none(visit):
    tab = visit(
        "auto_examples/batched_jacobians.html",
        permissions=["clipboard-read", "clipboard-write"],
    )
    block = tab.locator(".highlight-Python").nth(1)
    block.locator("button.copybtn").press("Enter")
    tab.wait_for_function("document.querySelector('button.copybtn.success') !== null")
    copied = tab.evaluate("navigator.clipboard.readText()")
    assert copied.strip() == block.locator("pre").inner_text().strip()
    assert tab.locator(".sphx-glr-script-out button").count() == 0


@pytest.mark.parametrize("page", FOLDED[:1])
def test_fold_opens_by_key_and_its_code_can_be_copied(page, visit):
    tab = visit(page, permissions=["clipboard-read", "clipboard-write"])
    fold = tab.locator("details.fold").first
    code = fold.locator("pre")
    assert code.is_hidden()
    fold.locator("summary").press("Enter")
    assert code.is_visible()
    fold.locator("button.copybtn").press("Enter")
    tab.wait_for_function("document.querySelector('button.copybtn.success') !== null")
    copied = tab.evaluate("navigator.clipboard.readText()")
    assert copied.strip() == code.inner_text().strip()


@pytest.mark.parametrize("page", FOLDED[:1])
def test_find_in_page_opens_a_fold(page, visit):
    code = parse(page).select_one("details.fold pre").text.strip().splitlines()
    line = max(code[:10], key=len).strip()
    words = max(line.replace("-", " ").replace(",", " ").split("  "), key=len).strip()
    tab = visit(f"{page}#:~:text={words}")
    tab.wait_for_function("document.querySelector('details.fold').open")
