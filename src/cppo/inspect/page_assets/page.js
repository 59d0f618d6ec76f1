// The sections of the page, from the document that `cppo inspect --json` prints.

const EVERY = "every method";
const LEVELS = { problem: "Problem", warning: "Warning", note: "Note" };
const SERIES = {
  reward: ["Reward", "Mean over the responses."],
  length: ["Response length", "Tokens that the policy wrote, mean over the responses."],
  relative_log_prob_error: ["Relative log-prob error", "Sum of |log pi - log mu| over the sum of |log mu|."],
};
const OTHER_SERIES = {
  kl_k3: ["KL divergence (k3)", "Mean of rho - 1 - log rho."],
  chi_squared: ["Chi-squared divergence", "Mean of rho squared, less 1."],
  effective_sample_size: ["Effective sample size", "As a share of the tokens: 1 where all ratios are equal."],
  mean_log_ratio: ["Mean log-ratio", "Mean of log pi - log mu. Below 0 from the start: the sampler was truncated."],
  log_perplexity_gap: ["Log-perplexity gap", "Mean over responses of the absolute mean log-ratio."],
  no_advantage: ["Responses without advantage", "Share of responses whose advantage is 0: they teach nothing."],
  equal_log_probs: ["Equal log-probs", "Share of tokens with one log-prob under both policies, and not near 0."],
  below_sampler: ["Likelier under the sampler", "Share of tokens whose log-prob fell."],
  largest_response: ["The largest response", "Its share of the update's gradient weight."],
};

const report = JSON.parse(byId("data").textContent);
const runs = report.runs;
const several = runs.length > 1;

function runLabel(index) {
  const swatch = make("span", { class: "swatch", "aria-hidden": "true" });
  swatch.style.background = `var(--colour-${index % COLOURS})`;
  return make("span", { class: "run" }, swatch, foreign(runs[index].name));
}

// A line's name: the run's where there are several.
function lineName(run, ...parts) {
  return [several ? clip(String(run.name), 60) : null, ...parts].filter(Boolean).join(": ") || String(run.name);
}

const runColumn = {
  title: "Run",
  text: true,
  value: (row) => String(runs[row.index].name),
  show: (_, row) => runLabel(row.index),
};

function showRuns() {
  const rows = runs.map((run, index) => ({ run, index }));
  const columns = [
    runColumn,
    { title: "Method of the run", text: true, value: (row) => row.run.method, show: (value) => foreign(value) },
    { title: "Updates", value: (row) => row.run.steps.length },
    { title: "Responses", value: (row) => row.run.responses },
    { title: "Tokens", value: (row) => row.run.tokens },
    { title: "Divergence", text: true, value: (row) => row.run.divergence, show: (value) => foreign(value) },
  ];
  byId("runs").append(table(columns, rows));
}

function showFindings() {
  const section = byId("findings");
  const parent = make("div", { class: "findings" });
  section.append(parent);
  runs.forEach((run, index) => {
    const part = make("div", {}, several ? make("h3", {}, runLabel(index)) : null);
    for (const finding of run.findings) {
      const numbers = Object.entries(finding.numbers).map(([name, value]) => [
        name.replaceAll("_", " "),
        number(value),
      ]);
      part.append(
        make(
          "article",
          { class: `finding is-${Object.hasOwn(LEVELS, finding.level) ? finding.level : "note"}` },
          make("p", { class: "level" }, LEVELS[finding.level] || String(finding.level)),
          make("h4", {}, foreign(finding.title, 300)),
          make("p", {}, foreign(finding.text, TEXT_LIMIT)),
          numbers.length ? terms(numbers) : null,
        ),
      );
    }
    if (!run.findings.length) part.append(make("p", {}, "Nothing stands out in this log."));
    parent.append(part);
  });
}

function showLearning() {
  const curves = report.training.filter((curve) => curve);
  if (!curves.length) return;
  byId("learning").hidden = false;
  byId("to-learning").hidden = false;
  const place = (curve) =>
    Math.max(
      0,
      runs.findIndex((run) => run.name === curve.label),
    );
  const rows = curves.map((curve) => {
    const at = curve.accuracy.map((value, index) => [value, index]).filter(([value]) => isNumber(value));
    const values = at.map(([value]) => value);
    const last = at.length ? at[at.length - 1][1] : null;
    return {
      index: place(curve),
      start: values[0],
      final: values[values.length - 1],
      error: last === null ? null : curve.standard_error[last],
      best: values.length ? values.reduce((a, b) => Math.max(a, b)) : undefined,
    };
  });
  const withError = (value, row) => (isNumber(row.error) ? `${number(value)} ± ${number(row.error)}` : number(value));
  byId("learning-table").append(
    table(
      [
        runColumn,
        { title: "Accuracy at the start", value: (row) => row.start },
        { title: "At the end", value: (row) => row.final, show: withError },
        { title: "Best", value: (row) => row.best },
      ],
      rows,
      { caption: "Held-out accuracy" },
    ),
  );
  const of = (curve, key) => {
    const kept = curve.steps.map((step, index) => index).filter((index) => isNumber(curve[key][index]));
    return (name) => kept.map((index) => curve[name][index]);
  };
  const lines = (key, error) => () => ({
    lines: curves
      .map((curve) => {
        const pick = of(curve, key);
        const x = pick("steps");
        return { name: curve.label, colour: colour(place(curve)), x, y: pick(key), error: error ? pick(error) : null };
      })
      .filter((line) => line.x.length),
    layout: { xaxis: titled("optimizer update") },
    note: curves.some((curve) => of(curve, key)("steps").length) ? "" : "No values.",
  });
  const parent = byId("learning-pictures");
  picture(
    parent,
    "Held-out accuracy",
    "On problems that were not trained on. Bars: one standard error over the problems.",
    lines("accuracy", "standard_error"),
  );
  picture(parent, "Training reward", "Mean over the rollouts of each update.", lines("reward"));
}

function showWhatIf() {
  const rows = runs.flatMap((run, index) =>
    run.methods.map((entry, place) => ({ run, index, entry, own: place === 0 })),
  );
  const part = (title, key) => ({ title, value: (row) => row.entry[key], show: share });
  const named = (value, row) =>
    [foreign(value), row.own ? make("span", { class: "own" }, "the run's own") : null].filter(Boolean);
  const columns = [
    { title: "Method", text: true, value: (row) => row.entry.spec, show: named },
    ...(several ? [runColumn] : []),
    part("Masked", "masked"),
    part("By token threshold", "by_token_threshold"),
    part("By prefix budget", "by_prefix_budget"),
    part("By another rule", "by_other_rule"),
    part("Of positive A", "masked_positive"),
    part("Of negative A", "masked_negative"),
    part("Weight left", "weight_left"),
    part("Differs from the run's own", "differs"),
  ];
  byId("what-if-table").append(table(columns, rows, { sortable: true, mark: (row) => (row.own ? "is-own" : null) }));
  runs.forEach((run, index) => {
    const reasons = Object.entries(run.left_out);
    if (!reasons.length) return;
    const list = make(
      "ul",
      {},
      ...reasons.map(([spec, why]) => make("li", {}, foreign(spec), ": ", foreign(why, 300))),
    );
    byId("left-out").append(make("h3", {}, "Left out", ...(several ? [": ", runLabel(index)] : [])), list);
  });
}

// Which tokens the run's own method rejected most.
function showRejectedTokens() {
  const rows = runs.flatMap((run, index) => (run.rejected_tokens || []).map((entry) => ({ index, entry })));
  if (!rows.length) return;
  const columns = [
    { title: "Token", text: true, value: ({ entry }) => entry.text ?? `id ${entry.id}`, show: (text) => foreign(text, 40) },
    { title: "Id", value: ({ entry }) => entry.id, show: String },
    ...(several ? [runColumn] : []),
    { title: "Rejected", value: ({ entry }) => entry.rejected },
    { title: "Of", value: ({ entry }) => entry.count },
    { title: "Share", value: ({ entry }) => entry.rejected / entry.count, show: share },
  ];
  byId("rejected-tokens").append(
    make("h3", {}, "Tokens that the run's own method rejected most"),
    make("div", { class: "scroll" }, table(columns, rows, { sortable: true })),
  );
}

// The methods that the select over the pictures stands for, as {run, entry, colour, style}.
function chosenMethods() {
  const wanted = byId("method").value;
  if (wanted === EVERY) {
    return runs[0].methods.map((entry, place) => ({
      run: runs[0],
      entry,
      colour: colour(place),
      style: STYLES[Math.floor(place / COLOURS) % STYLES.length],
      every: true,
    }));
  }
  return runs.flatMap((run, index) => {
    const entry = wanted === "" ? run.methods[0] : run.methods.find((one) => one.spec === wanted);
    return entry ? [{ run, entry, colour: colour(index), style: "solid" }] : [];
  });
}

function maskedLines(x, masked, budget) {
  return chosenMethods().flatMap(({ run, entry, colour: hue, style: dash, every }) => {
    if (every) return [{ name: entry.spec, colour: hue, style: dash, x: x(run), y: entry[masked] }];
    const line = (what, key, kind) => ({
      name: lineName(run, entry.spec, what),
      hover: lineName(run, what),
      colour: hue,
      style: kind,
      x: x(run),
      y: entry[key],
    });
    // Of a method without a prefix budget that line would lie on 0.
    return [
      line("masked", masked, "solid"),
      ...(entry.by_prefix_budget ? [line("by the prefix budget", budget, "dash")] : []),
    ];
  });
}

function tokensOf(key) {
  return runs
    .map((run) => `${several ? `${clip(String(run.name), 60)}: ` : ""}${run.probabilities[key].map(number).join(", ")} tokens.`)
    .join(" ");
}

function showPictures() {
  const centres = (run) => run.positions.mean.map((_, index, all) => (index + 0.5) / all.length);
  const specs = [...new Set(runs.flatMap((run) => run.methods.map((entry) => entry.spec)))];
  const own = several ? "each run's own" : `the run's own: ${runs[0].method}`;
  options(byId("method"), [["", own], ...(several ? [] : [[EVERY, EVERY]]), ...specs.map((spec) => [spec, spec])]);

  const byPosition = byId("by-position");
  const position = titled("position / length", { range: [0, 1] });
  picture(
    byPosition,
    "Drift by position",
    "|pi - mu| of the sampled token. Allowed: delta / w_t, the most that the own method's token threshold lets pass.",
    () => ({
      lines: runs.flatMap((run, index) => [
        { name: lineName(run, "mean"), colour: colour(index), x: centres(run), y: run.positions.mean },
        {
          name: lineName(run, "largest tenth"),
          colour: colour(index),
          style: "dash",
          x: centres(run),
          y: run.positions.tail,
        },
        ...(run.positions.allowance
          ? [
              {
                name: lineName(run, "allowed"),
                colour: colour(index),
                style: "dot",
                thin: true,
                x: centres(run),
                y: run.positions.allowance,
              },
            ]
          : []),
      ]),
      layout: { xaxis: position },
      note: runs
        .map((run) => [run, run.positions.allowance_note])
        .filter(([, text]) => text)
        .map(([run, text]) => (several ? `${clip(String(run.name), 60)}: ${text}` : text))
        .join(" "),
    }),
    340,
  );
  const methodPictures = [
    picture(
      byPosition,
      "Masked share by position",
      "Share of the response tokens there.",
      () => ({
        lines: maskedLines(centres, "masked_by_position", "budget_by_position"),
        layout: { xaxis: position, yaxis: { tickformat: ".1%" } },
      }),
      340,
    ),
  ];

  const ranges = runs[0].probabilities.edges.slice(1).map((to, index) => `${runs[0].probabilities.edges[index]} - ${to}`);
  for (const [sign, key, direction] of [
    ["positive", "masked_positive_by_probability", "that training makes likelier"],
    ["negative", "masked_negative_by_probability", "that training makes less likely"],
  ]) {
    methodPictures.push(
      picture(
        byId("by-probability"),
        `Masked share of ${sign} A`,
        `Share of the tokens ${direction}, by their probability under the sampler.`,
        () => ({
          lines: chosenMethods().map(({ run, entry, colour: hue, style: dash }) => ({
            name: lineName(run, entry.spec),
            colour: hue,
            style: dash,
            x: ranges,
            y: entry[key],
          })),
          layout: { xaxis: titled("mu", { type: "category" }), yaxis: { tickformat: ".1%" } },
          note: tokensOf(`tokens_${sign}`),
        }),
      ),
    );
  }

  const byUpdate = byId("by-update");
  const update = { xaxis: titled("optimizer update") };
  const steps = (run) => run.steps;
  methodPictures.push(
    picture(
      byUpdate,
      "Masked share",
      "Share of the update's response tokens; dashed: rejected by the prefix budget alone.",
      () => ({
        lines: maskedLines(steps, "masked_by_step", "budget_by_step"),
        layout: { ...update, yaxis: { tickformat: ".1%" } },
      }),
    ),
  );
  methodPictures.push(
    picture(byUpdate, "Effective delta_b", "What a token of weight 1 deposits, mean over the responses.", () => {
      const found = chosenMethods().filter(({ entry }) => entry.delta_b_by_step);
      const lines = found.map(({ run, entry, colour: hue, style: dash }) => ({
        name: lineName(run, entry.spec),
        colour: hue,
        style: dash,
        x: run.steps,
        y: entry.delta_b_by_step,
      }));
      return { lines, layout: update, note: lines.length ? "" : "The chosen method has no prefix budget." };
    }),
  );
  const series = (key) => () => ({
    lines: runs.map((run, index) => ({
      name: run.name,
      colour: colour(index),
      x: run.steps,
      y: run.series[key] || [],
    })),
    layout: { ...update, yaxis: { rangemode: "normal" } },
  });
  for (const [key, [title, caption]] of Object.entries(SERIES)) picture(byUpdate, title, caption, series(key));
  picture(byUpdate, "|pi - mu|", "Mean, and mean of the largest tenth, of the update's tokens.", () => ({
    lines: runs.flatMap((run, index) => [
      { name: lineName(run, "mean"), colour: colour(index), x: run.steps, y: run.series.probability_gap },
      {
        name: lineName(run, "largest tenth"),
        colour: colour(index),
        style: "dash",
        x: run.steps,
        y: run.series.probability_gap_tail,
      },
    ]),
    layout: update,
  }));
  byId("method").addEventListener("change", () => methodPictures.forEach(render));

  options(
    byId("series"),
    Object.entries(OTHER_SERIES).map(([key, [title]]) => [key, title]),
  );
  const other = picture(byId("other-series"), "Another measure", "", () => {
    const key = byId("series").value;
    return { ...series(key)(), title: OTHER_SERIES[key][0], note: OTHER_SERIES[key][1] };
  });
  byId("series").addEventListener("change", () => render(other));
}

function showThresholds() {
  const rows = runs.flatMap((run, index) => {
    const found = run.suggestion;
    return [
      {
        index,
        what: `For a masked share of ${share(found.wanted)}`,
        delta: found.delta,
        delta_b: found.delta_b,
        masked: found.masked,
      },
      {
        index,
        what: "The same by the token threshold alone",
        delta: found.token_delta,
        delta_b: null,
        masked: found.token_delta === null ? null : found.wanted,
      },
      {
        index,
        what: "The paper's",
        delta: found.paper.delta,
        delta_b: found.paper.delta_b,
        masked: found.paper.masked,
      },
    ];
  });
  byId("thresholds-table").append(
    table(
      [
        { title: "Thresholds", text: true, value: (row) => row.what, show: String },
        ...(several ? [runColumn] : []),
        { title: "delta", value: (row) => row.delta },
        { title: "delta_b", value: (row) => row.delta_b },
        { title: "Masked", value: (row) => row.masked, show: share },
      ],
      rows,
    ),
  );
  runs.forEach((run, index) => byId("grids").append(grid(run, index)));
}

function grid(run, index) {
  const { grid: values, settings, wanted, tokens } = run.suggestion;
  const part = make("div", {}, several ? make("h3", {}, runLabel(index)) : null);
  const flat = values.masked.flat().filter(isNumber);
  if (!flat.length) {
    part.append(make("p", {}, "No tokens to try thresholds on."));
    return part;
  }
  const nearest = flat.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
  const body = make(
    "tbody",
    {},
    ...values.delta.map((delta, row) =>
      make(
        "tr",
        {},
        make("th", { scope: "row" }, number(delta)),
        ...values.delta_b.map((_, column) => {
          const masked = values.masked[row][column];
          const cell = make("td", { class: masked === nearest ? "heat near" : "heat" }, share(masked));
          cell.style.setProperty("--d", Math.sqrt(isNumber(masked) ? masked : 0));
          return cell;
        }),
      ),
    ),
  );
  const head = make(
    "thead",
    {},
    make(
      "tr",
      {},
      make("th", { scope: "col" }, "delta \\ delta_b"),
      ...values.delta_b.map((value) => make("th", { scope: "col" }, number(value))),
    ),
  );
  const told = Object.entries(settings).map(
    ([name, value]) => `${name}=${typeof value === "number" ? number(value) : value}`,
  );
  part.append(
    make(
      "p",
      { class: "note" },
      `Masked share of ${number(tokens)} tokens, CPPO with `,
      foreign(told.join(", ")),
      `. Framed: nearest to ${share(wanted)}.`,
    ),
    make("div", { class: "scroll" }, make("table", { "aria-label": "Masked share by delta and delta_b" }, head, body)),
  );
  return part;
}

showRuns();
showFindings();
showLearning();
showWhatIf();
showRejectedTokens();
showPictures();
showThresholds();
renderAll();
showResponses();
watchTheScreen();
