// The theme slides the menu in on narrow screens. Tell assistive technology, move the
// focus along, and let Escape close it.
document.addEventListener("DOMContentLoaded", () => {
  const button = document.querySelector(".wy-nav-top button");
  const menu = document.querySelector(".wy-nav-side");
  const open = () => menu.classList.contains("shift");
  new MutationObserver(() => {
    if (String(open()) === button.getAttribute("aria-expanded")) return;
    button.setAttribute("aria-expanded", open());
    (open() ? menu.querySelector("a") : button).focus();
  }).observe(menu, { attributeFilter: ["class"] });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && open()) button.click();
  });
});

// What scrolls takes the keyboard's focus, and nothing else that only shows code.
document.addEventListener("DOMContentLoaded", () => {
  const sizes = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const scrolls =
        target.scrollWidth > target.clientWidth || target.scrollHeight > target.clientHeight;
      if (scrolls) target.tabIndex = 0;
      else target.removeAttribute("tabindex");
    }
  });
  for (const box of document.querySelectorAll(".document :is(pre, div.math)")) sizes.observe(box);
  // One stop for each target of the links in code, which may be the same on each line.
  const seen = new Set();
  for (const link of document.querySelectorAll("pre a[href]")) {
    if (seen.has(link.href)) link.tabIndex = -1;
    seen.add(link.href);
  }
});

// The search marks words on the page that it leads to. Go where most of them are: a
// word in a heading counts twice.
const searched = (localStorage.getItem("sphinx_highlight_terms") || "").split(" ").filter(Boolean);
document.addEventListener("DOMContentLoaded", () => {
  const sections = [...document.querySelectorAll(".document section[id]")];
  if (!searched.length || !sections.length || location.hash) return;
  const count = (text) => searched.filter((word) => text.toLowerCase().includes(word)).length;
  const score = (section) => {
    const own = [...section.children].filter((part) => part.tagName !== "SECTION");
    return count(own.map((part) => part.textContent).join(" ")) + count(own[0].textContent);
  };
  const best = sections.reduce((best, section) => (score(section) > score(best) ? section : best));
  // After the words are marked, which opens folds.
  if (best !== sections[0]) setTimeout(() => location.replace(`#${best.id}`), 20);
});
