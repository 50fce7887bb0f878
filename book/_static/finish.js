// "Finish this digit": a trained S4 language model continues a drawing, a step for a pixel.
//
// The page hands over {width, levels, channels, states, encoder, decoder, blocks, examples,
// witness}: the model of the chapter, its layers as prepared for steps (S4Model.stepper), the
// upper halves of drawings as digits, and the logits that Python found along one drawing.
// Each step costs the same wherever in the drawing it is taken. Checked by tests/test_site.py.
"use strict";

const erf = (x) => {
  if (Math.abs(x) > 6) return Math.sign(x);
  let term = x, sum = x;
  for (let n = 1; Math.abs(term) > 1e-17 * Math.abs(sum); n++) sum += term *= (2 * x * x) / (2 * n + 1);
  return (2 / Math.sqrt(Math.PI)) * Math.exp(-x * x) * sum;
};
const gelu = (x) => (x * (1 + erf(x / Math.SQRT2))) / 2;
// weight (rows, columns) times u, plus bias.
const affine = ({ weight, bias }, u) =>
  Float64Array.from(bias, (b, i) => u.reduce((sum, v, j) => sum + weight[i * u.length + j] * v, b));

class Writer {
  constructor(model) {
    this.model = model;
    this.states = model.blocks.map(() => new Float64Array(model.channels * model.states));
  }
  copy() {
    const other = new Writer(this.model);
    other.states = this.states.map((state) => state.slice());
    return other;
  }
  // The layer of one block: every channel's system takes a step; the state s (H, N) in real
  // coordinates becomes s + B u - F (G s) + same s + other (s, its halves exchanged).
  layer({ same, other, F, G, B_bar, C, D }, u, s) {
    const { channels: H, states: N } = this.model, y = new Float64Array(H), before = new Float64Array(N);
    const rank = F.length / (H * N);
    for (let h = 0; h < H; h++) {
      const at = h * N;
      for (let n = 0; n < N; n++) before[n] = s[at + n];
      for (let n = 0; n < N; n++)
        s[at + n] += B_bar[at + n] * u[h] + same[at + n] * before[n] + other[at + n] * before[(n + N / 2) % N];
      for (let r = 0; r < rank; r++) {
        const row = (h * rank + r) * N;
        let inner = 0;
        for (let n = 0; n < N; n++) inner += G[row + n] * before[n];
        for (let n = 0; n < N; n++) s[at + n] -= F[row + n] * inner;
      }
      y[h] = D[h] * u[h];
      for (let n = 0; n < N; n++) y[h] += C[at + n] * s[at + n];
    }
    return y;
  }
  // Read a token; return the logits of the next one.
  read(token) {
    const { channels: H, encoder, decoder, blocks } = this.model;
    let u = Float64Array.from(encoder.slice(token * H, (token + 1) * H));
    blocks.forEach((block, b) => {
      const mixed = affine(block.mix, this.layer(block.layer, u, this.states[b]).map(gelu));
      const v = u.map((x, h) => x + mixed[h] / (1 + Math.exp(-mixed[H + h])));
      const mean = v.reduce((sum, x) => sum + x, 0) / H;
      const spread = Math.sqrt(v.reduce((sum, x) => sum + (x - mean) ** 2, 0) / H + 1e-5);
      u = v.map((x, h) => ((x - mean) / spread) * block.norm.weight[h] + block.norm.bias[h]);
    });
    return affine(decoder, u);
  }
}

// Draw a token; at temperature 0 take the likeliest.
const drawn = (logits, temperature) => {
  const best = logits.indexOf(Math.max(...logits));
  if (!temperature) return best;
  const odds = logits.map((v) => Math.exp((v - logits[best]) / temperature));
  let left = Math.random() * odds.reduce((sum, v) => sum + v, 0);
  const chosen = odds.findIndex((v) => (left -= v) < 0);
  return chosen < 0 ? best : chosen;
};

const modelOf = (root) => {
  const opened = (part) =>
    typeof part === "string" ? unpack(part)
      : Object.fromEntries(Object.entries(part).map(([key, value]) => [key, opened(value)]));
  const data = JSON.parse(root.querySelector("script").textContent);
  for (const key of ["encoder", "decoder"]) data[key] = opened(data[key]);
  data.blocks = data.blocks.map(opened);
  data.witness.logits = unpack(data.witness.logits);
  return data;
};

const finish = (root) => {
  const model = modelOf(root), { width: W, levels, examples } = model;
  const half = Math.floor(W / 2) * W, L = W * W;
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;

  const paper = element("canvas", { tabIndex: 0, role: "application", className: "paper" });
  paper.ariaLabel = "The drawing. Arrow keys move the pen over the upper half, space makes a pixel darker or empty.";
  const memory = element("canvas", { role: "img", className: "memory" });
  memory.ariaLabel = `The ${(model.blocks.length * model.channels * model.states).toLocaleString("en")} numbers of the state, as colours`;
  const said = element("p", { className: "said" });
  const place = element("p", { className: "visually-hidden", ariaLive: "polite" });
  const go = element("button", { type: "button", textContent: "Finish it" });
  const clear = element("button", { type: "button", textContent: "Clear" });
  const pick = element("select", {}, element("option", { value: "", textContent: "your own" }),
    ...examples.map((e, i) => element("option", { value: i, textContent: `test drawing ${i + 1}` })));
  const heat = element("input", { type: "range", min: 0, max: 1.4, step: 0.1, value: 0.8 });
  const heatText = element("span", { className: "value" });
  const field = (text, ...inputs) => element("label", {}, element("span", { textContent: text }), ...inputs);
  root.replaceChildren(root.querySelector("script"),
    element("div", { className: "side-by-side" }, paper, memory), said, place,
    element("form", { className: "controls" }, go, clear, field("Upper half", pick), field("temperature", heat, heatText)));
  root.querySelector("form").onsubmit = (event) => event.preventDefault();

  let pixels, writer, logits, done, times, pen = 2 * W + Math.floor(W / 2), held = false, timer = 0;
  const ready = () => {
    clearTimeout(timer);
    [writer, done, times] = [new Writer(model), 0, []];
    pixels.fill(0, half);
  };
  // One pixel: the model reads the one before it (an empty one before the first).
  const step = () => {
    const start = performance.now();
    logits = writer.read(done ? pixels[done - 1] : 0);
    if (done >= half) pixels[done] = drawn(logits, +heat.value);
    times.push(performance.now() - start);
    done++;
  };
  const ink = (name) => getComputedStyle(paper).getPropertyValue(name);
  const show = () => {
    const size = paper.clientWidth * (devicePixelRatio || 1), context = paper.getContext("2d");
    if (!size) return;
    paper.width = paper.height = size;
    const cell = size / W;
    context.fillStyle = ink("--reach");
    context.fillRect(0, 0, size, (half / W) * cell);
    context.fillStyle = ink("--pst-color-text-base");
    pixels.forEach((level, k) => {
      context.globalAlpha = level / (levels - 1);
      context.fillRect((k % W) * cell, Math.floor(k / W) * cell, cell + 0.5, cell + 0.5);
    });
    context.globalAlpha = 1;
    context.strokeStyle = ink("--kept");
    context.lineWidth = 0.06 * cell;
    context.strokeRect(0, (half / W) * cell, size, 0);
    const mark = document.activeElement === paper ? pen : done > half && done < L ? done : -1;
    context.lineWidth = 0.12 * cell;
    if (mark >= 0) context.strokeRect((mark % W) * cell, Math.floor(mark / W) * cell, cell, cell);
    const { channels: H, states: N, blocks } = model;
    [memory.width, memory.height] = [H, N * blocks.length];
    const image = memory.getContext("2d").createImageData(memory.width, memory.height);
    const rgb = (name) => ink(name).trim().match(/[0-9a-f]{2}/gi).map((part) => parseInt(part, 16));
    const [plus, minus] = [rgb("--kept"), rgb("--held")];
    writer.states.forEach((state, b) => state.forEach((v, i) => {
      const at = 4 * ((b * N + (i % N)) * H + Math.floor(i / N));
      image.data.set([...(v > 0 ? plus : minus), Math.min(255, 255 * Math.sqrt(Math.abs(v)) / 1.5)], at);
    }));
    memory.getContext("2d").putImageData(image, 0, 0);
    heatText.textContent = (+heat.value).toFixed(1);
    const mean = (list) => (list.length ? list.reduce((a, b) => a + b, 0) / list.length : 0).toFixed(2);
    said.textContent = done < L && done <= half ? "Draw the upper half of a digit, then let it finish."
      : `Pixel ${done} of ${L}. A step takes ${mean(times.slice(half, done))} ms at the end, ${mean(times.slice(10, half))} ms at the beginning: `
        + `it reads one pixel and ${(blocks.length * H * N).toLocaleString("en")} numbers, never the drawing.`;
  };
  const tick = () => {
    for (let n = still ? L : 1; n > 0 && done < L; n--) step();
    show();
    if (done < L) timer = setTimeout(tick, 25);
  };
  const run = () => {
    ready();
    while (done < half) step();
    tick();
  };
  // Draw with a soft pen: the pixel itself, and a little around it.
  const paint = (k, level) => {
    if (k < 0 || k >= half) return;
    pixels[k] = Math.max(pixels[k], level);
  };
  const point = (event) => {
    const box = paper.getBoundingClientRect();
    const x = Math.floor(((event.clientX - box.left) / box.width) * W), y = Math.floor(((event.clientY - box.top) / box.height) * W);
    if (x < 0 || x >= W || y < 0 || y >= half / W) return;
    paint(y * W + x, levels - 1);
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]])
      if (x + dx >= 0 && x + dx < W) paint((y + dy) * W + x + dx, 1);
    show();
  };
  const changed = () => {
    if (done) ready();
    pick.value = "";
  };
  paper.onpointerdown = (event) => {
    held = true;
    paper.setPointerCapture(event.pointerId);
    changed();
    point(event);
  };
  paper.onpointermove = (event) => held && point(event);
  paper.onpointerup = paper.onpointercancel = () => (held = false);
  paper.onkeydown = (event) => {
    const [x, y] = [pen % W, Math.floor(pen / W)];
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (move) {
      const [a, b] = [x + move[0], y + move[1]];
      if (a >= 0 && a < W && b >= 0 && b < half / W) pen = b * W + a;
    } else if (event.key === " ") {
      changed();
      pixels[pen] = (pixels[pen] + 1) % levels;
    } else if (event.key === "Enter") run();
    else return;
    place.textContent = `row ${Math.floor(pen / W) + 1}, column ${(pen % W) + 1}, level ${pixels[pen]}`;
    event.preventDefault();
    show();
  };
  paper.onfocus = paper.onblur = () => show();
  go.onclick = run;
  clear.onclick = () => {
    pixels.fill(0);
    pick.value = "";
    ready();
    show();
  };
  heat.oninput = show;
  pick.onchange = () => {
    pixels.fill(0);
    [...(examples[pick.value] ?? "")].forEach((level, k) => (pixels[k] = +level));
    ready();
    show();
  };
  addEventListener("resize", show);
  new MutationObserver(show).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  pixels = new Uint8Array(L);
  pick.value = "0";
  pick.onchange();
};

for (const root of document.querySelectorAll("[data-playable=finish]")) finish(root);
