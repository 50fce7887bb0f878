// Every box that scrolls sideways can be reached by keyboard, also one that is unfolded later.
const reachable = (box) => {
  if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
};
const resized = new ResizeObserver((entries) => entries.forEach(({ target }) => reachable(target)));

// A formula and the comma behind it, or the bracket before it, stay on one line.
const holdTogether = (formula) => {
  const box = formula.closest("span.math"), before = box?.previousSibling, after = box?.nextSibling;
  const opens = /[([“]+$/.exec(before?.nodeType === 3 ? before.data : "")?.[0];
  const ends = /^[,.;:!?)\]”’]+/.exec(after?.nodeType === 3 ? after.data : "")?.[0];
  if (!opens && !ends) return;
  const held = Object.assign(document.createElement("span"), { className: "held" });
  if (opens) before.data = before.data.slice(0, -opens.length);
  if (ends) after.data = after.data.slice(ends.length);
  box.replaceWith(held);
  held.append(opens ?? "", box, ends ?? "");
};

// After typesetting: an inline formula wider than its column scrolls in a box of its own.
addEventListener("load", async () => {
  await window.MathJax?.startup?.promise;
  const inline = [...document.querySelectorAll(".bd-article mjx-container:not([display])")];
  const room = (formula) =>
    formula.closest("p, li, td, th, div").clientWidth - formula.offsetWidth;
  const rooms = inline.map(room); // all are read before one is changed: one layout, not hundreds
  inline.forEach((formula, number) => {
    if (rooms[number] < 0) formula.classList.add("wide");
    else if (rooms[number] > 20) holdTogether(formula);
  });
  for (const box of document.querySelectorAll(
    ".bd-article :is(pre, table, figure, div.math, mjx-container, div.output, div.interactive)",
  )) {
    reachable(box);
    resized.observe(box);
  }
});

// Interactive figures: the controls that `s4mini.figures.show` wrote as data become inputs
// and buttons, which keyboard and screen reader know.
const element = (tag, properties, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};
const controlOf = (figure, { kind, prefix, suffix, active, steps }) => {
  const apply = (step) => Plotly[step.method](figure, ...step.args);
  if (kind === "buttons") {
    const buttons = steps.map((step, number) => {
      const button = element("button", { type: "button", textContent: step.label });
      button.ariaPressed = number === active;
      button.onclick = () => {
        for (const other of buttons) other.ariaPressed = other === button;
        apply(step);
      };
      return button;
    });
    return element("div", { role: "group", ariaLabel: "what is shown" }, ...buttons);
  }
  const words = (number) => prefix + steps[number].label + suffix;
  const value = element("output", { textContent: words(active) });
  const input = element("input", { type: "range", min: 0, max: steps.length - 1, step: 1 });
  input.value = active;
  input.ariaLabel = prefix.replace(/[\s=:]+$/, "") || "position";
  input.ariaValueText = words(active);
  input.oninput = () => {
    value.textContent = input.ariaValueText = words(input.value);
    apply(steps[input.value]);
  };
  return element("div", { className: "slider" }, value, input);
};
addEventListener("DOMContentLoaded", () => {
  for (const box of document.querySelectorAll(".interactive")) {
    const figure = box.querySelector(".plotly-graph-div");
    const data = JSON.parse(box.querySelector("script[type='application/json']").textContent);
    box.prepend(element("div", { className: "controls" }, ...data.map((d) => controlOf(figure, d))));
  }
});

// A long docstring shows its first line; a button shows the rest.
addEventListener("DOMContentLoaded", () => {
  for (const code of document.querySelectorAll(".cell.tag_export .cell_input pre")) {
    const lines = [...code.querySelectorAll(".sd")];
    for (const first of lines.filter((line) => /^[rf]?"""(?!.*""")/s.test(line.textContent))) {
      const rest = element("span", { className: "docstring", hidden: true });
      let last = lines.indexOf(first);
      while (lines[last] && !/"""$/.test(lines[last].textContent.replace(/^[rf]?"""/, ""))) last++;
      if (!lines[last]) continue;
      const range = document.createRange();
      range.setStartAfter(first);
      range.setEndAfter(lines[last]);
      rest.append(range.extractContents());
      const button = element("button", { type: "button", className: "more", textContent: "…" });
      button.ariaLabel = "… rest of the docstring";
      button.ariaExpanded = false;
      button.onclick = () => {
        rest.hidden = !rest.hidden;
        button.ariaExpanded = !rest.hidden;
      };
      first.after(button, rest);
    }
  }
});

// Pages opened as files may not read one another: their search results come without text.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

// Search results show text of the article, not the page's buttons.
addEventListener("DOMContentLoaded", () => {
  if (typeof Search === "undefined") return;
  Search.htmlToText = (html, anchor) => {
    const article = new DOMParser().parseFromString(html, "text/html").querySelector("article");
    for (const node of article?.querySelectorAll(".headerlink, script, style, .exported") ?? [])
      node.remove();
    const part = anchor && article?.querySelector(anchor);
    return (part || article)?.textContent ?? "";
  };
});

// The numbers that `s4mini.figures.packed` wrote, for the scripts of what can be played with.
const unpack = (text) =>
  new Float32Array(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
