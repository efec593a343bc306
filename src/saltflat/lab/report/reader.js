// Values out of figures, and numbers out of tables, for those who point, tap or use the arrow keys; nothing is fetched.
//
// A probe lies over a figure and has stops, from left to right: at each, a line across it, a mark on each curve, and the
// values in words, all of which were written when the page was.
"use strict";

(() => {
  function element(tag, properties, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  function nearest(stops, left) {
    const distances = stops.map((stop) => Math.abs(stop.left - left));
    return distances.indexOf(Math.min(...distances));
  }

  function inWords(stop) {
    return `${stop.at}: ${stop.readings.map(({ name, words }) => `${name} ${words}`).join("; ")}`;
  }

  function probe(panel, { label, top, bottom, stops, start }) {
    const line = element("span", { className: "line", hidden: true });
    Object.assign(line.style, { top: `${top}%`, bottom: `${100 - bottom}%` });
    const handle = element("div", { className: "probe", tabIndex: 0 }, line);
    const readout = element("p", { className: "readout" });
    const figure = element("div", { className: "probed" });
    const svg = panel.querySelector("svg");
    svg.replaceWith(figure);
    figure.append(svg, handle);
    panel.append(readout);
    const attributes = { role: "slider", "aria-label": label, "aria-valuemin": 1, "aria-valuemax": stops.length };
    for (const [name, value] of Object.entries(attributes)) handle.setAttribute(name, value);

    let at = start;
    const show = (index, marked) => {
      at = Math.min(stops.length - 1, Math.max(0, index));
      const stop = stops[at];
      handle.setAttribute("aria-valuenow", at + 1);
      handle.setAttribute("aria-valuetext", inWords(stop));
      line.hidden = !marked;
      line.style.left = `${stop.left}%`;
      handle.replaceChildren(line, ...stop.readings.filter(({ top }) => marked && top !== null).map(({ series, top }) => {
        const dot = element("span", { className: `dot series-${series}` });
        Object.assign(dot.style, { left: `${stop.left}%`, top: `${top}%` });
        return dot;
      }));
      readout.replaceChildren(element("b", { textContent: stop.at }), ...stop.readings.map(({ name, series, words }) =>
        element("span", {}, element("i", { className: `swatch series-${series}` }), `${name} `, element("b", {
          textContent: words,
        }))));
    };
    const point = (event) => {
      const box = handle.getBoundingClientRect();
      show(nearest(stops, 100 * (event.clientX - box.left) / box.width), true);
    };
    handle.addEventListener("pointermove", point);
    handle.addEventListener("pointerdown", point);
    handle.addEventListener("pointerleave", () => document.activeElement === handle || show(start, false));
    handle.addEventListener("focus", () => show(at, true));
    handle.addEventListener("blur", () => show(start, false));
    handle.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -5, PageUp: 5 };
      const places = { Home: 0, End: stops.length - 1 };
      if (event.key in steps) show(at + steps[event.key], true);
      else if (event.key in places) show(places[event.key], true);
      else return;
      event.preventDefault();
    });
    show(start, false);
  }

  // Arrow keys go from number to number once a table, or one of its numbers, has the focus.
  function walk(region) {
    const rows = [...region.querySelectorAll("tbody tr")].map((row) => [...row.querySelectorAll("td")]);
    region.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      const inside = document.activeElement === region || document.activeElement.matches("td");
      if (!step || !inside) return;
      const row = rows.findIndex((cells) => cells.includes(document.activeElement));
      let [i, j] = row < 0 ? [0, -1] : [row, rows[row].indexOf(document.activeElement)];
      do {
        if (row < 0) [i, j] = [0, j + 1];
        else [i, j] = [i + step[0], j + step[1]];
      } while (rows[i] && rows[i][j] && !rows[i][j].matches(".number"));
      if (!rows[i] || !rows[i][j]) return;
      rows[i][j].focus();
      event.preventDefault();
    });
  }

  document.querySelectorAll("[data-probe]").forEach((place) => {
    const probes = JSON.parse(document.getElementById(place.dataset.probe).textContent);
    [...place.children].forEach((panel, index) => probes[index] && probe(panel, probes[index]));
  });
  document.querySelectorAll(".table > .scroll").forEach(walk);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && document.activeElement.matches(".term, td")) document.activeElement.blur();
  });
})();
