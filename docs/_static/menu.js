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
