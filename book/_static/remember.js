// "Remember this": a memory of N numbers hears a signal, and draws back what it holds.
//
// The page hands over {rate, first, memories: {name: {clock, span, A, B, R}}, spoken}. A (n, n) and
// B (n) are those of x' = Ax + Bu, built by s4mini for the largest n; a memory of fewer numbers
// takes the first rows and columns. R (n, points) reads the past from the state, newest point
// last. The clock "1/t" stretches the memory over everything heard, x' = (Ax + Bu)/t; the clock
// "1" keeps it to the last `span` timescales. `spoken`, {word, hz, slower, samples}, may be
// missing. Checked against Python by tests/test_site.py.
"use strict";

class Memory {
  // window: the timescale in samples.
  constructor({ clock, span, A, B, R }, N, window) {
    const n = B.length, points = R.length / n;
    this.N = N;
    this.clock = clock;
    this.reach = span * window; // samples; of no meaning to the clock 1/t
    this.x = new Float64Array(N);
    this.heard = 0;
    this.A = Array.from({ length: N }, (_, i) => Float64Array.from(A.slice(i * n, i * n + N)));
    this.B = Float64Array.from(B.slice(0, N));
    this.R = Array.from({ length: N }, (_, i) => R.slice(i * points, (i + 1) * points));
    if (clock === "1") [this.A_bar, this.B_bar] = this.sampled(1 / window);
  }
  // A_bar and B_bar of the bilinear rule: (I - dt/2 A) [A_bar, B_bar] = [I + dt/2 A, dt B],
  // by Gauss and Jordan with pivots.
  sampled(dt) {
    const { N, A, B } = this;
    const rows = A.map((a, i) => [
      ...a.map((v, j) => (i === j) - (dt / 2) * v),
      ...a.map((v, j) => (i === j) + (dt / 2) * v),
      dt * B[i],
    ]);
    for (let c = 0; c < N; c++) {
      let pivot = c;
      for (let i = c + 1; i < N; i++)
        if (Math.abs(rows[i][c]) > Math.abs(rows[pivot][c])) pivot = i;
      [rows[c], rows[pivot]] = [rows[pivot], rows[c]];
      const scale = rows[c][c];
      for (let j = c; j <= 2 * N; j++) rows[c][j] /= scale;
      for (let i = 0; i < N; i++) {
        const factor = i === c ? 0 : rows[i][c];
        if (factor) for (let j = c; j <= 2 * N; j++) rows[i][j] -= factor * rows[c][j];
      }
    }
    return [rows.map((row) => row.slice(N, 2 * N)), rows.map((row) => row[2 * N])];
  }
  hear(u) {
    const { N, x, A, B } = this, next = new Float64Array(N);
    if (this.clock === "1/t") {
      // One bilinear step of size h on the logarithmic clock; A is lower triangular.
      const h = 1 / (this.heard + 0.5);
      for (let i = 0; i < N; i++) {
        let right = x[i] + h * B[i] * u;
        for (let j = 0; j <= i; j++) right += (h / 2) * A[i][j] * x[j];
        for (let j = 0; j < i; j++) right += (h / 2) * A[i][j] * next[j];
        next[i] = right / (1 - (h / 2) * A[i][i]);
      }
    } else {
      for (let i = 0; i < N; i++) {
        next[i] = this.B_bar[i] * u;
        for (let j = 0; j < N; j++) next[i] += this.A_bar[i][j] * x[j];
      }
    }
    this.x = next;
    this.heard++;
  }
  // How many samples back the drawing reaches.
  stretch() {
    return this.clock === "1/t" ? this.heard : Math.round(this.reach);
  }
  recall() {
    const past = new Float64Array(this.R[0].length);
    this.x.forEach((v, n) => this.R[n].forEach((r, p) => (past[p] += v * r)));
    return past;
  }
}

// Signals for who does not want to draw: the value t seconds after the beginning, in [-1, 1].
const TUNES = {
  waves: (t) => 0.5 * Math.sin(4.3 * t) + 0.35 * Math.sin(14 * t + 1),
  steps: (t) => [0.6, -0.5, 0.15, -0.8, 0.8, -0.1][Math.floor(t / 0.7) % 6],
  "a rising tone": (t) => 0.8 * Math.sin(1.8 * (t % 7) ** 2),
};

// A recording, slowed down, with a pause of a second before it is heard again.
const recording = ({ hz, slower, samples }) => (t) => {
  const at = (t % ((samples.length * slower) / hz + 1)) * (hz / slower), k = Math.floor(at);
  return k + 1 < samples.length ? samples[k] + (at - k) * (samples[k + 1] - samples[k]) : 0;
};

const handedOver = (root) => {
  const data = JSON.parse(root.querySelector("script").textContent);
  for (const memory of Object.values(data.memories))
    for (const key of ["A", "B", "R"]) memory[key] = unpack(memory[key]);
  if (data.spoken) data.spoken.samples = unpack(data.spoken.samples);
  return data;
};

const remember = (root) => {
  const data = handedOver(root);
  const { spoken } = data, tunes = { ...TUNES };
  const word = spoken && `a spoken “${spoken.word}”, ${spoken.slower} times slower`;
  if (spoken) tunes[word] = recording(spoken);
  const sizes = [2, 4, 8, 16, 32].filter((N) => N <= data.memories[data.first].B.length);
  const SHOWN = 6 * data.rate, BARS = 76; // samples on the canvas; pixels for the state
  const LONGEST = 600 * data.rate; // ten minutes, then it stops

  // The controls.
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const choice = (options, chosen) => {
    const select = element("select", {}, ...options.map((o) => element("option", { textContent: o })));
    select.value = chosen;
    return select;
  };
  const field = (text, input, ...rest) => element("label", {}, element("span", { textContent: text }), input, ...rest);
  const kind = choice([], "");
  for (const [value, { label }] of Object.entries(data.memories))
    kind.append(element("option", { value, textContent: label }));
  kind.value = data.first;
  const size = choice(sizes, sizes.at(-1)), tune = choice([...Object.keys(tunes), "your hand"], "waves");
  const scale = element("input", { type: "range", min: 0.5, max: 5, step: 0.5, value: 2 });
  const scaleText = element("span", { className: "value" });
  const button = (textContent) => element("button", { type: "button", textContent });
  const play = button(), forget = button("Forget"), say = button("Say a word");
  say.disabled = !spoken;
  if (!spoken) say.textContent = "No word to say: its recording is missing";
  const canvas = element("canvas", { tabIndex: 0, role: "slider" });
  canvas.ariaLabel = "The signal: up and down arrow keys move it, space starts and stops";
  canvas.ariaOrientation = "vertical";
  [canvas.ariaValueMin, canvas.ariaValueMax] = [-100, 100];
  const said = element("p", { className: "said" });
  root.replaceChildren(
    root.querySelector("script"),
    canvas,
    said,
    element("form", { className: "controls" },
      field("It keeps", size), field("numbers of", kind),
      field("on a timescale of", scale, scaleText), field("It hears", tune), play, say, forget),
  );
  root.querySelector("form").onsubmit = (event) => event.preventDefault();

  // The game.
  let memory, past, begun = 0, hand = 0, held = false, running = !still, seen = true;
  const describe = () => {
    scale.disabled = data.memories[kind.value].clock === "1/t";
    scaleText.textContent = scale.disabled ? "needs none" : `${(+scale.value).toFixed(1)} s`;
    scale.ariaValueText = scaleText.textContent;
    play.textContent = running ? "Stop" : "Play";
  };
  // A new memory hears again what is still in view.
  const remake = () => {
    memory = new Memory(data.memories[kind.value], +size.value, scale.value * data.rate);
    for (const u of past) memory.hear(u);
    describe();
    draw();
  };
  const advance = () => {
    const known = tunes[tune.value];
    if (known && !held) hand = known((past.length - begun) / data.rate);
    past.push(hand);
    memory.hear(hand);
  };
  const context = canvas.getContext("2d");
  const draw = () => {
    const ratio = devicePixelRatio || 1, W = canvas.clientWidth, H = canvas.clientHeight;
    if (!W) return;
    if (canvas.width !== Math.round(W * ratio) || canvas.height !== Math.round(H * ratio))
      [canvas.width, canvas.height] = [Math.round(W * ratio), Math.round(H * ratio)];
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, W, H);
    const style = getComputedStyle(canvas), ink = (name) => style.getPropertyValue(name);
    const top = H - BARS, middle = top / 2, right = W - 10;
    // All that it remembers is in view: with the clock 1/t, time is squeezed.
    const view = memory.clock === "1/t" ? Math.max(SHOWN, past.length) : SHOWN;
    const across = (age) => right - (age * right) / view, up = (v) => middle - v * middle * 0.85;
    const line = (color, width, count, x, y) => {
      context.strokeStyle = color;
      context.lineWidth = width;
      context.lineJoin = "round";
      context.beginPath();
      for (let i = 0; i < count; i++) context.lineTo(x(i), y(i));
      context.stroke();
    };
    const stretch = memory.stretch(), from = Math.max(0, across(stretch));
    context.fillStyle = ink("--reach");
    context.fillRect(from, 0, right - from, top);
    const shown = Math.min(past.length, view), first = past.length - shown, every = Math.ceil(shown / 2000);
    const at = (i) => Math.min(shown - 1, i * every);
    line(ink("--heard"), 2, Math.ceil(shown / every), (i) => across(shown - 0.5 - at(i)), (i) => up(past[first + at(i)]));
    const wrong = { all: [0, 1e-9], late: [0, 1e-9] }; // squares of error and signal
    if (past.length) {
      const drawn = memory.recall(), last = drawn.length - 1;
      const age = (p) => (1 - p / last) * stretch; // a sample was heard in the middle of its step
      line(ink("--held"), 3, drawn.length, (p) => across(age(p)), (p) => up(Math.max(-1.2, Math.min(1.2, drawn[p]))));
      drawn.forEach((v, p) => {
        const before = past.length - 0.5 - age(p), k = Math.floor(before);
        const one = past[Math.max(0, k)] ?? 0, two = past[Math.min(past.length - 1, k + 1)] ?? 0;
        const u = before < -0.5 ? 0 : one + (before - k) * (two - one);
        for (const sums of age(p) <= data.rate ? [wrong.all, wrong.late] : [wrong.all]) {
          sums[0] += (v - u) ** 2;
          sums[1] += u ** 2;
        }
      });
    }
    const percent = ([error, power]) => Math.min(999, Math.round(100 * Math.sqrt(error / power)));
    const width = right / memory.N, base = top + BARS / 2;
    const tall = (BARS / 2 - 4) / Math.max(0.3, ...memory.x.map(Math.abs));
    context.fillStyle = ink("--kept");
    memory.x.forEach((v, n) => {
      const height = Math.max(1, Math.abs(v) * tall);
      context.fillRect(n * width + 1, v > 0 ? base - height : base, Math.max(1, width - 2), height);
    });
    context.fillStyle = ink("--heard");
    context.fillRect(right, up(hand) - 5, 10, 10);
    canvas.ariaValueNow = Math.round(100 * hand);
    canvas.ariaValueText = `${Math.round(100 * hand)} of 100`;
    said.textContent = `Heard ${past.length.toLocaleString("en")} samples; keeps ${memory.N} numbers. `
      + `Off by ${percent(wrong.late)} % over the last second, by ${percent(wrong.all)} % over all it draws.`;
  };
  let before = 0, owed = 0;
  const frame = (now) => {
    if (running && seen) {
      owed = Math.min(24, owed + ((now - before) * data.rate) / 1000);
      for (; owed >= 1; owed--) advance();
      if (past.length >= LONGEST) run(false);
      draw();
    }
    before = now;
    requestAnimationFrame(frame);
  };
  const run = (on) => {
    running = on;
    describe();
  };

  // The hand: mouse, finger, keys.
  const point = (event) => {
    const box = canvas.getBoundingClientRect(), middle = (box.height - BARS) / 2;
    hand = Math.max(-1, Math.min(1, (middle - (event.clientY - box.top)) / (middle * 0.85)));
    tune.value = "your hand";
  };
  canvas.onpointerdown = (event) => {
    held = true;
    canvas.setPointerCapture(event.pointerId);
    point(event);
    run(true);
  };
  canvas.onpointermove = (event) => held && point(event);
  canvas.onpointerup = canvas.onpointercancel = () => (held = false);
  canvas.onkeydown = (event) => {
    const change = { ArrowUp: 0.1, ArrowDown: -0.1, PageUp: 0.5, PageDown: -0.5 }[event.key];
    if (event.key === " ") run(!running);
    else if (event.key === "Home" || event.key === "End") hand = event.key === "Home" ? -1 : 1;
    else if (change) hand = Math.max(-1, Math.min(1, hand + change));
    else return;
    if (event.key !== " ") {
      tune.value = "your hand";
      run(true);
    }
    event.preventDefault();
  };
  kind.onchange = size.onchange = scale.oninput = remake;
  tune.onchange = () => {
    begun = past.length;
    run(true);
  };
  say.onclick = () => {
    tune.value = word;
    tune.onchange();
  };
  play.onclick = () => run(!running);
  forget.onclick = () => {
    past = [];
    begun = 0;
    remake();
  };
  new IntersectionObserver(([entry]) => (seen = entry.isIntersecting)).observe(canvas);
  addEventListener("resize", draw);
  new MutationObserver(draw).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  past = [];
  memory = new Memory(data.memories[kind.value], 2, data.rate);
  for (let k = 0; k < SHOWN; k++) advance();
  remake();
  requestAnimationFrame(frame);
};

for (const root of document.querySelectorAll("[data-playable=remember]")) remember(root);
