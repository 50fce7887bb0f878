// Boxes that scroll sideways can be reached by keyboard.
addEventListener("load", () => {
  for (const box of document.querySelectorAll("div.math, .bd-article table, .bd-article pre")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  }
});
