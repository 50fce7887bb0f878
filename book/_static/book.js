// After typesetting: an inline formula wider than its column scrolls in a box of its own,
// and every box that scrolls sideways can be reached by keyboard.
addEventListener("load", async () => {
  await window.MathJax?.startup?.promise;
  for (const formula of document.querySelectorAll(".bd-article mjx-container:not([display])")) {
    if (formula.offsetWidth > formula.closest("p, li, td, th, div").clientWidth) {
      formula.classList.add("wide");
    }
  }
  for (const box of document.querySelectorAll(
    ".bd-article :is(pre, table, div.math, mjx-container.wide, div.output)",
  )) {
    if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
  }
});
