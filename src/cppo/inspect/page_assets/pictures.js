// Pictures: drawn by plotly, with a legend in HTML below; drawn again when the theme, the width or the choice changes.

const COLOURS = 7;
const STYLES = ["solid", "dash", "dot"];
const PRINT_WIDTH = 640;
const pictures = [];

function style(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function colour(index) {
  return style(`--colour-${index % COLOURS}`);
}

// plotly reads some markup in its texts.
function plain(text, limit = 60) {
  return clip(String(text), limit)
    .replace(/&/g, "&amp;")
    .replace(/</g, "&lt;")
    .replace(/>/g, "&gt;")
    .replace(/\n/g, "⏎");
}

// draw() returns {lines: [{name, hover, colour, style, x, y, error}], traces, layout, note}, and of the traces' legend
// `blocks` [{name, colour}] and `marks` [text].
// Only placed: how wide a picture is shows when all stand. render() draws it.
function picture(parent, title, caption, draw, height = 300) {
  const plot = make("div", { class: "plot", role: "img", "aria-label": title });
  plot.style.height = `${height}px`;
  const legend = make("ul", { class: "legend" });
  const note = make("p", { class: "note" });
  const heading = make("h4", {}, title);
  parent.append(make("figure", {}, heading, plot, legend, note, make("figcaption", {}, caption)));
  const one = { plot, legend, note, heading, draw, height };
  pictures.push(one);
  return one;
}

function render(one) {
  const { lines = [], traces = [], blocks = [], marks = [], layout = {}, note = "", title } = one.draw();
  if (title) {
    one.heading.textContent = title;
    one.plot.setAttribute("aria-label", title);
  }
  one.note.textContent = note;
  one.note.hidden = !note;
  one.legend.replaceChildren(
    ...lines.map((line) => legendEntry(line, line.style || "solid")),
    ...blocks.map((block) => legendEntry(block, "block")),
    ...marks.map((text) => make("li", {}, text)),
  );
  one.plot.hidden = !lines.length && !traces.length;
  if (one.plot.hidden) return;
  const width = document.documentElement.classList.contains("printing") ? PRINT_WIDTH : one.plot.clientWidth;
  Plotly.react(one.plot, [...lines.map(trace), ...traces], fullLayout(layout, width, one.height), {
    displayModeBar: false,
    responsive: false,
  });
}

function legendEntry({ name, colour: hue }, kind) {
  const sample = make("span", { class: `sample ${kind}`, "aria-hidden": "true" });
  sample.style.borderColor = hue;
  return make("li", {}, sample, foreign(name));
}

function trace(line) {
  return {
    type: "scatter",
    mode: line.x.length > 60 ? "lines" : "lines+markers",
    name: plain(line.hover || line.name),
    x: line.x,
    y: line.y,
    line: { color: line.colour, dash: line.style || "solid", width: line.thin ? 1 : 2, shape: line.shape || "linear" },
    marker: { size: 4 },
    error_y: line.error ? { type: "data", array: line.error, color: line.colour, thickness: 1, width: 3 } : undefined,
    xaxis: "x",
    yaxis: line.axis || "y",
    connectgaps: Boolean(line.connect),
  };
}

function fullLayout(layout, width, height) {
  const { xaxis, yaxis, yaxis2, ...rest } = layout;
  const ink = style("--ink");
  const axis = {
    gridcolor: style("--line"),
    zerolinecolor: style("--line"),
    linecolor: style("--line"),
    automargin: true,
  };
  const finger = matchMedia("(pointer: coarse)").matches; // a drag scrolls there
  const label = { bgcolor: style("--paper"), bordercolor: style("--line"), font: { color: ink }, namelength: 40 };
  return {
    width,
    height,
    margin: { l: 48, r: 12, t: 8, b: 40 },
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    font: { family: "system-ui, sans-serif", size: 12, color: ink },
    showlegend: false,
    hovermode: "x unified",
    hoverlabel: label,
    dragmode: finger ? false : "zoom",
    xaxis: { ...axis, ...xaxis },
    yaxis: { ...axis, rangemode: "tozero", ...yaxis },
    ...(yaxis2 ? { yaxis2: { ...axis, ...yaxis2 } } : {}),
    ...rest,
  };
}

function titled(text, more = {}) {
  return { title: { text: plain(text), standoff: 8 }, ...more };
}

function renderAll() {
  pictures.forEach(render);
}

function watchTheScreen() {
  let waiting = 0;
  let width = window.innerWidth;
  addEventListener("resize", () => {
    if (window.innerWidth === width) return; // a phone's address bar came or went
    width = window.innerWidth;
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(renderAll);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", renderAll);
  const print = (begins) => {
    document.documentElement.classList.toggle("printing", begins);
    renderAll();
  };
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  matchMedia("print").addEventListener("change", (event) => print(event.matches));
}
