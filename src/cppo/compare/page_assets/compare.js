// The comparison's page: pictures of a document that cppo.compare.analysis made, and its tables.

const SEARCHED = " (searched)";
const study = JSON.parse(byId("data").textContent);
// In the study's order: an object of its own would put names that are numbers first.
const settings = study.setting_names.map((name) => [name, study.settings[name]]);
const armNames = study.arm_names;
const baseNames = [...new Set(armNames.map((name) => name.replace(SEARCHED, "")))];
const SCORE_TITLES = { final: "last evaluation", best: "best evaluation", area: "area: mean of the evaluations" };
// Methods that keep their colour from study to study.
const OWN_COLOUR = { cppo: 0, trm: 1, dppo: 2, policy_gradient: 3, grpo: 4, cispo: 5, minpro: 6 };
const MOST_BANDS = 6;
const TICKS = [-6, -5, -4, -3, -2, -1, 0, 1, 2, 3].flatMap((power) => [1, 2, 5].map((digit) => Number(`${digit}e${power}`)));
const LOGARITHMIC = { type: "log", rangemode: "normal", tickmode: "array", tickvals: TICKS, ticktext: TICKS.map(String) };
const styles = armStyles();

const kind = () => byId("kind").value;

// A colour a method, and of its arms the first solid, the next ones dashed and dotted. Where one method has more arms
// than that: a colour an arm, the same one after a search.
function armStyles() {
  const found = {};
  const taken = new Map();
  for (const name of armNames) {
    const { method } = settings.map(([, setting]) => armOf(setting, name)).find(Boolean);
    const [whole] = method.split("?");
    const family = whole.startsWith("trm_") ? "trm" : whole;
    const index = OWN_COLOUR[family] ?? armNames.indexOf(name) % COLOURS;
    const before = taken.get(index) ?? 0;
    taken.set(index, before + 1);
    found[name] = { index, style: STYLES[before] };
  }
  if (Math.max(...taken.values()) <= STYLES.length) return found;
  for (const name of armNames) {
    const index = baseNames.indexOf(name.replace(SEARCHED, ""));
    const style = name.endsWith(SEARCHED) ? "dot" : STYLES[Math.floor(index / COLOURS) % 2];
    found[name] = { index, style };
  }
  return found;
}

// undefined where the arm has not run, also for a name that every object knows, as "constructor".
function armOf(setting, name) {
  return Object.hasOwn(setting.arms, name) ? setting.arms[name] : undefined;
}

function hue(name) {
  return colour(styles[name].index);
}

function dash(name) {
  return styles[name].style;
}

function shown(name) {
  return byId(`arm-${armNames.indexOf(name)}`).checked;
}

function drawn(setting) {
  return armNames.filter((name) => shown(name) && armOf(setting, name)).map((name) => [name, armOf(setting, name)]);
}

// More bands than a few hide each other and the lines.
function banded() {
  return armNames.filter(shown).length <= MOST_BANDS;
}

function bandNote() {
  return banded() ? "Shaded: 95 % interval." : `95 % intervals are drawn for up to ${MOST_BANDS} arms at a time.`;
}

function band(x, low, high, hueOf) {
  if (low.some((value) => value === null) || !banded()) return [];
  return [
    {
      type: "scatter",
      mode: "lines",
      x: [...x, ...[...x].reverse()],
      y: [...high, ...[...low].reverse()],
      fill: "toself",
      fillcolor: hueOf,
      opacity: 0.15,
      line: { width: 0 },
      hoverinfo: "skip",
    },
  ];
}

function accuracy(setting) {
  const arms = drawn(setting);
  return {
    lines: arms.map(([name, arm]) => ({
      name,
      colour: hue(name),
      style: dash(name),
      x: arm.curve.rollout,
      y: arm.curve.accuracy,
    })),
    traces: arms.flatMap(([name, arm]) => band(arm.curve.rollout, arm.curve.low, arm.curve.high, hue(name))),
    note: bandNote(),
    layout: { xaxis: titled("rollout"), yaxis: titled("accuracy"), hovermode: "closest" },
  };
}

function curve(setting, name, title, log) {
  return {
    lines: drawn(setting)
      .filter(([, arm]) => arm.curve.curves[name])
      .map(([arm, { curve: { curves } }]) => ({
        name: arm,
        colour: hue(arm),
        style: dash(arm),
        x: curves[name].map((_, index) => index + 1),
        y: curves[name],
      })),
    layout: {
      xaxis: titled("rollout"),
      yaxis: titled(title, log ? LOGARITHMIC : {}),
      hovermode: "closest",
    },
  };
}

// A row an arm, told by its place: two long names may be the same where they are cut.
function rowsOf(arms) {
  return {
    range: [arms.length - 0.5, -0.5],
    rangemode: "normal",
    tickmode: "array",
    tickvals: arms.map((_, row) => row),
    ticktext: arms.map(([name]) => plain(name)),
  };
}

function seedDots(setting) {
  const arms = drawn(setting);
  const traces = arms.flatMap(([name, arm], row) => {
    const score = arm.scores[kind()];
    const bounds = score.mean_interval;
    return [
      {
        type: "scatter",
        mode: "markers",
        x: score.values,
        y: score.values.map(() => row + 0.22), // below the mean, which would hide them
        text: arm.seeds.map((seed) => `seed ${seed}`),
        hovertemplate: "%{text}: %{x:.3f}<extra></extra>",
        marker: { color: hue(name), size: 6, opacity: 0.45 },
      },
      {
        type: "scatter",
        mode: "markers",
        x: [score.mean],
        y: [row],
        hovertemplate: "mean %{x:.3f}<extra></extra>",
        marker: { color: hue(name), size: 11, symbol: "diamond" },
        error_x: bounds
          ? {
              type: "data",
              symmetric: false,
              array: [bounds[1] - score.mean],
              arrayminus: [score.mean - bounds[0]],
              color: hue(name),
            }
          : undefined,
      },
    ];
  });
  return {
    traces,
    layout: {
      xaxis: titled(SCORE_TITLES[kind()]),
      yaxis: rowsOf(arms),
      hovermode: "closest",
      margin: { l: 150, r: 12, t: 8, b: 40 },
    },
  };
}

function compared(setting) {
  return drawn(setting)
    .map(([arm, entry]) => [arm, entry.scores[kind()].reference_less_arm])
    .filter(([, difference]) => difference && difference.interval);
}

// Reference less arm, a row an arm; searched arms have the searched reference. The axis is the same in every setting:
// side by side a small effect looks small.
function differences(setting, name) {
  const found = compared(setting);
  const ends = settings.flatMap(([, other]) => compared(other).flatMap(([, { interval }]) => interval));
  const margin = 0.05 * (Math.max(0, ...ends) - Math.min(0, ...ends));
  const references = [...new Set(found.map(([, difference]) => difference.reference))];
  return {
    traces: found.map(([arm, difference], row) => ({
      type: "scatter",
      mode: "markers",
      x: [difference.mean],
      y: [row],
      text: [plain(difference.reference)],
      hovertemplate: `%{text} less this: %{x:.3f}, ${difference.pairs} pairs<extra></extra>`,
      marker: { color: hue(arm), size: 10 },
      error_x: {
        type: "data",
        symmetric: false,
        array: [difference.interval[1] - difference.mean],
        arrayminus: [difference.mean - difference.interval[0]],
        color: hue(arm),
      },
    })),
    title: `${name}: ${references.join(" or ") || study.reference} less each arm`,
    note: `Right of 0: ${references.join(" or ") || study.reference} is better.`,
    layout: {
      xaxis: titled(`difference, ${SCORE_TITLES[kind()]}`, {
        zeroline: true,
        zerolinewidth: 2,
        range: [Math.min(0, ...ends) - margin, Math.max(0, ...ends) + margin],
      }),
      yaxis: rowsOf(found),
      hovermode: "closest",
      margin: { l: 150, r: 12, t: 8, b: 40 },
    },
  };
}

// Places that span a factor of four or more stand on a logarithmic axis, and where that cannot be and their labels would
// run into each other, as of 0, 0.05 and 1, evenly.
const places = [...new Set(Object.values(study.at))].sort((a, b) => a - b);
const wide = places[0] > 0 && places.at(-1) >= 4 * places[0];
const crowded = places.some((one, index) => index > 0 && one - places[index - 1] < (places.at(-1) - places[0]) / 12);
const evenly = crowded && !wide;

function placeOf(setting) {
  return evenly ? places.indexOf(study.at[setting]) : study.at[setting];
}

function axis() {
  const ticks = {
    tickmode: "array",
    tickvals: evenly ? places.map((_, index) => index) : places,
    ticktext: places.map(String),
  };
  return titled(study.axis, wide ? { type: "log", rangemode: "normal", ...ticks } : ticks);
}

function alongAxis(value, title, bounds, log) {
  const found = armNames.filter(shown).map((name) => [
    name,
    settings
      .map(([setting, found]) => [placeOf(setting), armOf(found, name)])
      .filter(([, arm]) => arm && value(arm) !== null)
      .sort((a, b) => a[0] - b[0]),
  ]);
  return {
    lines: found.map(([name, points]) => ({
      name,
      colour: hue(name),
      style: dash(name),
      x: points.map(([place]) => place),
      y: points.map(([, arm]) => value(arm)),
    })),
    traces: found.flatMap(([name, points]) => {
      const bounded = bounds ? points.filter(([, arm]) => bounds(arm)) : [];
      if (!bounded.length) return [];
      return band(
        bounded.map(([place]) => place),
        bounded.map(([, arm]) => bounds(arm)[0]),
        bounded.map(([, arm]) => bounds(arm)[1]),
        hue(name),
      );
    }),
    note: bounds ? bandNote() : "",
    layout: {
      xaxis: axis(),
      yaxis: titled(title, log ? LOGARITHMIC : { rangemode: bounds ? "normal" : "tozero" }),
      hovermode: "closest",
    },
  };
}

function meanCaption(found) {
  const seeds = Math.max(...found.flatMap((setting) => Object.values(setting.arms).map((arm) => arm.seeds.length)));
  return `Mean over ${seeds} seeds.`;
}

function height(setting) {
  return 90 + 30 * Object.keys(setting.arms).length;
}

function showPictures() {
  if (study.axis) {
    byId("axis").hidden = false;
    byId("axis-title").textContent = `Along ${study.axis}`;
    const parent = byId("axis-pictures");
    picture(parent, "Accuracy", meanCaption(settings.map(([, setting]) => setting)), () =>
      alongAxis((arm) => arm.scores[kind()].mean, SCORE_TITLES[kind()], (arm) => arm.scores[kind()].mean_interval));
    picture(parent, "Drift", "Mean |pi - mu| of the sampled tokens.", () =>
      alongAxis((arm) => arm.stability.gap, "drift", null, true));
    picture(parent, "Masked", "Share of the tokens.", () => alongAxis((arm) => arm.stability.masked, "masked"));
  }
  for (const [name, setting] of settings) {
    picture(
      byId("differences"), name,
      "Paired by seed; 95 % bootstrap interval.",
      () => differences(setting, name), height(setting),
    );
    const parent = make("div", { class: "pictures" });
    byId("curves").append(make("h3", {}, name), parent);
    picture(parent, "Held-out accuracy", meanCaption([setting]), () => accuracy(setting));
    picture(parent, "Every seed", "A dot a seed; diamond: the mean, 95 % interval.", () => seedDots(setting), height(setting));
    for (const [key, title, log] of [
      ["gap", "Drift: mean |pi - mu|", true],
      ["tail", "Drift of the tenth that drifted most", true],
      ["masked", "Masked share", false],
      ["entropy", "Entropy", false],
      ["gradient_norm", "Gradient norm", true],
      ["length", "Response length", false],
    ]) {
      picture(parent, title, "Mean over a rollout's updates and the seeds.", () => curve(setting, key, title, log));
    }
  }
}

function showTables() {
  byId("tables").replaceChildren(
    ...study.tables[kind()].flatMap((one) => {
      const columns = one.headings.map((title, place) => ({
        title,
        value: (row) => row[place],
        show: (value) => String(value),
        text: place === 0,
      }));
      return [
        make("h3", {}, one.title),
        make("div", { class: "scroll" }, table(columns, one.rows)),
        make("p", { class: "note" }, one.note),
      ];
    }),
  );
}

options(byId("kind"), Object.entries(SCORE_TITLES));
for (const [index, name] of armNames.entries()) {
  const box = make("input", { type: "checkbox", id: `arm-${index}`, checked: true });
  byId("arms").append(make("label", {}, box, " ", foreign(name)), " ");
}
if (armNames.some((name) => name.endsWith(SEARCHED))) {
  for (const [title, wanted] of [
    ["as given", (name) => !name.endsWith(SEARCHED)],
    ["after the search", (name) => name.endsWith(SEARCHED)],
    ["all", () => true],
  ]) {
    const button = make("button", { type: "button" }, title);
    button.addEventListener("click", () => {
      for (const [index, name] of armNames.entries()) byId(`arm-${index}`).checked = wanted(name);
      renderAll();
    });
    byId("arms").append(button, " ");
  }
}
byId("about").textContent =
  `${study.runs} runs, ${study.cpu_hours} CPU hours. Reference: ${study.reference}.` +
  (study.missing ? ` ${study.missing} runs are not there, ${study.failed} of them failed.` : "") +
  (study.versions.length > 1 ? ` The runs come from ${study.versions.length} sets of versions.` : "");
showPictures();
showTables();
renderAll();
watchTheScreen();
byId("arms").addEventListener("change", renderAll);
byId("kind").addEventListener("change", () => {
  renderAll();
  showTables();
});
