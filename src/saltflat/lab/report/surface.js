// Surfaces over planes in weight space, drawn from the page's islands of JSON; nothing is fetched.
//
// The box has alpha and beta in [-1, 1] and the value in [-HALF, HALF]. It is turned by `turn` about its upright axis
// and looked at in parallel rays from `rise` above its floor, so that equal heights look equal in all surfaces.
"use strict";

const HALF = 0.7;
const FIRST_VIEW = { turn: 0.6, rise: 0.5 };

// From a point in the box to the screen: right, up, and the distance away from the eye.
function project(view, [x, y, z]) {
  const [c, s] = [Math.cos(view.turn), Math.sin(view.turn)];
  const [right, back] = [c * x - s * y, s * x + c * y];
  const [level, steep] = [Math.cos(view.rise), Math.sin(view.rise)];
  return [right, z * level + back * steep, back * level - z * steep];
}

function scaled(value, low, high, half) {
  return high > low ? half * (2 * (value - low) / (high - low) - 1) : 0;
}

// Grid points in the box, null where the value is missing.
function placed(data, values, [low, high]) {
  const [alphas, betas] = [data.alphas, data.betas];
  return values.map((row, i) => row.map((value, j) => value === null ? null : [
    scaled(alphas[i], alphas[0], alphas[alphas.length - 1], 1),
    scaled(betas[j], betas[0], betas[betas.length - 1], 1),
    scaled(value, low, high, HALF),
  ]));
}

// Quadrilaterals between four points that are all there, the farthest first; a gap leaves a hole.
function facesOf(points, view) {
  const faces = [];
  for (let i = 0; i + 1 < points.length; i++) {
    for (let j = 0; j + 1 < points[i].length; j++) {
      const corners = [[i, j], [i + 1, j], [i + 1, j + 1], [i, j + 1]];
      const inBox = corners.map(([a, b]) => points[a][b]);
      if (inBox.includes(null)) continue;
      const seen = inBox.map((point) => project(view, point));
      const mean = (list, axis) => list.reduce((sum, point) => sum + point[axis], 0) / 4;
      faces.push({ corners, seen, away: mean(seen, 2), height: (mean(inBox, 2) / HALF + 1) / 2 });
    }
  }
  return faces.sort((one, other) => other.away - one.away);
}

function contains(polygon, x, y) {
  let inside = false;
  polygon.forEach(([ax, ay], index) => {
    const [bx, by] = polygon[(index + 1) % polygon.length];
    if (ay > y !== by > y && x < ax + (bx - ax) * (y - ay) / (by - ay)) inside = !inside;
  });
  return inside;
}

// The grid point under a place on the screen: of the nearest face there, the nearest corner.
function pick(faces, x, y) {
  for (const face of [...faces].reverse()) {
    if (!contains(face.seen, x, y)) continue;
    const distances = face.seen.map(([u, v]) => Math.hypot(u - x, v - y));
    return face.corners[distances.indexOf(Math.min(...distances))];
  }
  return null;
}

function ticks(low, high, most) {
  if (!(high > low)) return [low];
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(k * step);
  return found;
}

function written(number, places) {
  return number.toFixed(places).replace(/^-(0\.?0*)$/, "$1").replace("-", "−");
}

function short(number) {
  return String(Number(number.toPrecision(6))).replace("-", "−");
}

// What is said about a grid point: its place, its value, and how far that is from the value at w.
function reading(data, state, run) {
  const quantity = data.quantities[state.quantity];
  const values = run.values[state.quantity];
  const [i, j] = state.picked || data.origin;
  const [value, origin] = [values[i][j], values[data.origin[0]][data.origin[1]]];
  const place = state.picked ? `α = ${short(data.alphas[i])}, β = ${short(data.betas[j])}` : "at w";
  if (value === null) return `${place}: not measured`;
  const change = value - (origin === null ? NaN : origin);
  const words = `${place}: ${written(value, quantity.places)} ${quantity.unit}`;
  if (!state.picked || Number.isNaN(change)) return words;
  return `${words} (${change < 0 ? "" : "+"}${written(change, quantity.places)} from w)`;
}

function mixed(one, other, share) {
  const parts = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const [from, to] = [parts(one), parts(other)];
  return `rgb(${from.map((part, k) => Math.round(part + (to[k] - part) * share)).join(", ")})`;
}

function draw(surface) {
  const { canvas, run, data, state } = surface;
  const quantity = data.quantities[state.quantity];
  const style = getComputedStyle(canvas);
  const colour = (name) => style.getPropertyValue(name).trim();
  const [width, height, density] = [canvas.clientWidth, canvas.clientHeight, window.devicePixelRatio || 1];
  canvas.width = Math.round(width * density);
  canvas.height = Math.round(height * density);
  const pen = canvas.getContext("2d");
  pen.setTransform(density, 0, 0, density, 0, 0);
  const size = Math.min((width - 96) / 2.83, (height - 84) / 2.6);
  const onScreen = ([right, up]) => [width / 2 + 16 + size * right, height / 2 + 2 - size * up];
  const at = (x, y, z) => onScreen(project(state.view, [x, y, z]));
  const line = (points) => {
    pen.beginPath();
    points.forEach(([x, y], index) => (index ? pen.lineTo(x, y) : pen.moveTo(x, y)));
  };
  const dot = ([x, y], radius) => {
    pen.beginPath();
    pen.arc(x, y, radius, 0, 2 * Math.PI);
    pen.fill();
    pen.stroke();
  };
  const [ink, muted, card, series] =
    ["--figure-ink", "--figure-muted", "--card", `--series-${run.series}`].map(colour);

  // The floor with its axes, the upright axis at the leftmost corner.
  pen.font = `11px ${style.fontFamily}`;
  pen.strokeStyle = muted;
  pen.fillStyle = muted;
  pen.lineWidth = 0.8;
  pen.textBaseline = "middle";
  line([at(-1, -1, -HALF), at(1, -1, -HALF), at(1, 1, -HALF), at(-1, 1, -HALF)]);
  pen.closePath();
  pen.stroke();
  const corners = [[-1, -1], [1, -1], [1, 1], [-1, 1]];
  const leftmost = corners.reduce((a, b) => (at(...a, 0)[0] <= at(...b, 0)[0] ? a : b));
  if (Math.cos(state.view.rise) > 0.3) {
    line([at(...leftmost, -HALF), at(...leftmost, HALF)]);
    pen.stroke();
    pen.textAlign = "right";
    for (const tick of ticks(...quantity.range, 4)) {
      const height = scaled(tick, ...quantity.range, HALF);
      if (height < -0.92 * HALF) continue; // the floor's own labels stand there
      const [x, y] = at(...leftmost, height);
      line([[x - 4, y], [x, y]]);
      pen.stroke();
      pen.fillText(short(tick), x - 7, y);
    }
  }
  pen.textAlign = "left";
  pen.fillText(`${quantity.name}, ${quantity.unit}`, 2, 8);
  floorAxis("α", data.alphas, (step, side) => at(step, side, -HALF), (side) => project(state.view, [0, side, 0])[2]);
  floorAxis("β", data.betas, (step, side) => at(side, step, -HALF), (side) => project(state.view, [side, 0, 0])[2]);

  surface.faces = facesOf(placed(data, run.values[state.quantity], quantity.range), state.view);
  pen.lineJoin = "round";
  pen.lineWidth = 0.6;
  pen.strokeStyle = mixed(card, ink, 0.55);
  for (const face of surface.faces) {
    line(face.seen.map(onScreen));
    pen.closePath();
    pen.fillStyle = mixed(card, series, 0.2 + 0.75 * face.height);
    pen.fill();
    pen.stroke();
  }
  surface.toBox = (x, y) => [(x - width / 2 - 16) / size, (height / 2 + 2 - y) / size];

  const points = placed(data, run.values[state.quantity], quantity.range);
  pen.lineWidth = 1.5;
  pen.strokeStyle = card;
  pen.fillStyle = ink;
  const origin = points[data.origin[0]][data.origin[1]];
  if (origin) {
    const [x, y] = at(...origin);
    dot([x, y], 4);
    pen.lineWidth = 3;
    pen.font = `600 12px ${style.fontFamily}`;
    pen.strokeText("w", x + 11, y - 5);
    pen.fillText("w", x + 11, y - 5);
  }
  const picked = state.picked && points[state.picked[0]][state.picked[1]];
  if (picked) {
    pen.fillStyle = card;
    pen.strokeStyle = ink;
    pen.lineWidth = 2;
    dot(at(...picked), 5);
  }
  surface.readout.textContent = reading(data, state, run);

  // Ticks and a letter along that one of two parallel edges which is nearer to the eye.
  function floorAxis(letter, steps, place, away) {
    const side = away(-1) < away(1) ? -1 : 1;
    const [start, middle, end, centre] = [place(-1, side), place(0, side), place(1, side), at(0, 0, -HALF)];
    const out = Math.hypot(middle[0] - centre[0], middle[1] - centre[1]) || 1;
    const [dx, dy] = [(middle[0] - centre[0]) / out, (middle[1] - centre[1]) / out];
    if (Math.hypot(end[0] - start[0], end[1] - start[1]) > 70) {
      pen.textAlign = dx < -0.2 ? "right" : dx > 0.2 ? "left" : "center"; // at a corner, both edges have a label
      for (const tick of ticks(steps[0], steps[steps.length - 1], 4)) {
        const [x, y] = place(scaled(tick, steps[0], steps[steps.length - 1], 1), side);
        line([[x, y], [x + 4 * dx, y + 4 * dy]]);
        pen.stroke();
        pen.fillText(short(tick), x + 9 * dx, y + 13 * dy);
      }
    }
    pen.textAlign = "center";
    pen.fillText(letter, middle[0] + 32 * dx, middle[1] + 32 * dy);
  }
}

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function show(place) {
  const data = JSON.parse(document.getElementById(place.dataset.island).textContent);
  const state = { view: { ...FIRST_VIEW }, quantity: 0, picked: null };
  let waiting = false;
  const redraw = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      surfaces.forEach(draw);
    });
  };
  const turn = (right, up) => {
    state.view.turn += right;
    state.view.rise = Math.min(Math.PI / 2, Math.max(0.05, state.view.rise + up));
    redraw();
  };
  const step = (i, j) => {
    const within = (index, steps) => Math.min(steps.length - 1, Math.max(0, index));
    const [a, b] = state.picked || data.origin;
    state.picked = [within(a + i, data.alphas), within(b + j, data.betas)];
    redraw();
  };
  const surfaces = data.runs.map((run) => {
    const canvas = element("canvas", { tabIndex: 0 });
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Surface of ${run.name}; arrow keys turn it, Shift with arrow keys reads values`);
    const surface = { canvas, run, data, state, readout: element("p", { className: "readout" }), faces: [] };
    surface.readout.setAttribute("aria-live", "polite");
    let held = null;
    const point = (event) => {
      state.picked = pick(surface.faces, ...surface.toBox(event.offsetX, event.offsetY));
      redraw();
    };
    canvas.addEventListener("pointerdown", (event) => {
      held = [event.clientX, event.clientY];
      canvas.setPointerCapture(event.pointerId);
      point(event);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!held) return point(event);
      turn((event.clientX - held[0]) * 0.01, (event.clientY - held[1]) * 0.01);
      held = [event.clientX, event.clientY];
    });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (held = null));
    canvas.addEventListener("pointerleave", (event) => {
      if (event.pointerType !== "mouse" || held) return;
      state.picked = null;
      redraw();
    });
    canvas.addEventListener("keydown", (event) => {
      const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
      if (event.key === "Home") {
        Object.assign(state, { view: { ...FIRST_VIEW }, picked: null });
        redraw();
      } else if (arrow && event.shiftKey) step(...arrow);
      else if (arrow) turn(0.1 * arrow[0], 0.1 * arrow[1]);
      else return;
      event.preventDefault();
    });
    return surface;
  });

  const buttons = data.quantities.map(({ name, unit }, index) => {
    const button = element("button", { type: "button", textContent: `${name}, ${unit}` });
    button.addEventListener("click", () => choose(index));
    return button;
  });
  const choose = (index) => {
    state.quantity = index;
    buttons.forEach((button, k) => button.setAttribute("aria-pressed", String(k === index)));
    redraw();
  };
  const toggle = element("div", { className: "toggle" }, ...buttons);
  toggle.setAttribute("role", "group");
  toggle.setAttribute("aria-label", "What the surfaces show");
  const hint = "Drag, or use the arrow keys, to turn; point, or use Shift and the arrow keys, to read a value; Home "
    + "goes back. Heights share one scale. α and β are in lengths of the normalised directions.";
  const cards = surfaces.map(({ canvas, run, readout }) => element(
    "div", { className: "panel" },
    element("h4", { className: `ink-${run.series}`, textContent: run.name }),
    readout, canvas,
    element("p", { className: "facts", textContent: data.facts.join(" · ") }),
  ));
  const panels = element("div", { className: "panels" }, ...cards);
  place.append(toggle, panels, element("p", { className: "hint", textContent: hint }));
  place.hidden = false;
  choose(0);
  const watch = new ResizeObserver(redraw);
  surfaces.forEach(({ canvas }) => watch.observe(canvas));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}

document.querySelectorAll("[data-island]").forEach(show);
