// One response: picked from a list, token by token, and its account as a bank statement.

const RULES = ["kept", "token threshold", "prefix budget", "another rule"];
const RULE_CLASSES = ["kept", "by-threshold", "by-budget", "by-other"];
const RULE_SYMBOLS = [null, "x", "diamond", "circle-open"];
const MARKS = { x: "✕", diamond: "◆", "circle-open": "○" };
const WINDOW = 1000; // tokens shown at once: a page of ten thousand is slow on a phone
const TOKEN_LIMIT = 200;

const shown = { at: null, begin: 0, token: 0, picture: null };

function showResponses() {
  const entries = runs.flatMap((run, index) => run.examples.map((example) => ({ run, index, example })));
  if (!entries.length) {
    byId("response").append(make("p", {}, "This log has no responses to show."));
    return;
  }
  const list = byId("examples");
  const filter = () => {
    const text = byId("filter-text").value.toLowerCase();
    const step = byId("filter-step").value;
    const found = entries
      .map((entry, place) => [entry, place])
      .filter(
        ([{ example }]) =>
          (step === "" || example.step === Number(step)) && (text === "" || words(example).includes(text)),
      );
    byId("found").textContent = `${number(found.length)} of ${number(entries.length)}`;
    const before = list.value;
    options(
      list,
      found.map(([entry, place]) => [String(place), exampleLabel(entry)]),
    );
    list.value = found.some(([, place]) => String(place) === before) ? before : String(found.length ? found[0][1] : "");
    if (list.value !== before && found.length) pick();
  };
  const pick = () => {
    shown.at = entries[Number(list.value)];
    shown.begin = shown.token = 0;
    const specs = Object.keys(shown.at.example.methods);
    const before = byId("response-method").value;
    options(
      byId("response-method"),
      specs.map((spec) => [spec, spec]),
    );
    byId("response-method").value = specs.includes(before) ? before : shown.at.run.method;
    showResponse();
  };
  list.addEventListener("change", pick);
  byId("filter-text").addEventListener("input", filter);
  byId("filter-step").addEventListener("input", filter);
  byId("response-method").addEventListener("change", () => {
    filter();
    showResponse();
  });
  filter();
}

function words(example) {
  example.words ??= [example.prompt, example.response, example.why]
    .filter((text) => text)
    .join("\n")
    .toLowerCase();
  return example.words;
}

function exampleLabel({ run, example }) {
  const spec = byId("response-method").value;
  const { rejected_by: codes } = example.methods[spec] || example.methods[run.method];
  const own = codes.filter((_, place) => example.response_mask[place]);
  const parts = [
    `update ${number(example.step)}`,
    `reward ${number(example.reward)}`,
    `advantage ${number(example.advantage)}`,
    `${number(own.filter((code) => code > 0).length)} of ${number(own.length)} masked`,
    example.why,
  ];
  return (several ? [clip(String(run.name), 40), ...parts] : parts).join(" · ");
}

// One row a token: what the log says, and what the method made of it. null where there is nothing.
function tokenRows(example, method) {
  return example.token_ids.map((id, place) => {
    const own = example.response_mask[place];
    const pick = (list) => (own && list && isNumber(list[place]) ? list[place] : null);
    const [logp, rollout] = [example.logp[place], example.rollout_logp[place]];
    const [pi, mu] = [logp, rollout].map((value) => (isNumber(value) ? Math.exp(Math.min(value, 0)) : null));
    const row = {
      place,
      id,
      own,
      logp,
      rollout,
      pi,
      mu,
      text: example.tokens ? example.tokens[place] : null,
      gap: pi === null || mu === null ? null : Math.abs(pi - mu),
      weight: pick(method.position_weight),
      divergence: pick(method.divergence),
      spending: pick(method.weighted_divergence),
      before: pick(method.prior_account),
      threshold: pick(method.threshold),
      coefficient: pick(method.coefficient),
      rule: own ? method.rejected_by[place] : 0,
    };
    const deposits = isNumber(method.delta_b) && row.weight !== null && row.before !== null;
    row.deposit = deposits ? method.delta_b * row.weight : null;
    row.after = deposits && row.spending !== null ? row.before + row.deposit - row.spending : null;
    row.heat = row.divergence ?? row.gap;
    row.spent = row.spending ?? row.heat;
    // Only a token that moves away from the sampler is rejected.
    const inward = isNumber(logp) && isNumber(rollout) && example.advantage * (logp - rollout) <= 0;
    const spared = inward && row.threshold !== null && row.spent > row.threshold;
    row.decision = !own
      ? "not the policy's"
      : row.rule
        ? `rejected: ${RULES[row.rule] || RULES[3]}`
        : spared
          ? `kept: ${example.advantage ? "back toward the sampler" : "no advantage"}`
          : "kept";
    return row;
  });
}

function visible(text) {
  return text === "" ? "·" : text.replace(/\n/g, "⏎\n").replace(/\t/g, "⇥\t");
}

function tokenText(row, limit = TOKEN_LIMIT) {
  return row.text === null || row.text === undefined ? String(row.id) : clip(row.text, limit);
}

function showResponse() {
  const { run, index, example } = shown.at;
  const spec = byId("response-method").value;
  const method = example.methods[spec];
  const rows = tokenRows(example, method);
  const begin = shown.begin;
  const part = rows.slice(begin, begin + WINDOW);
  const own = rows.filter((row) => row.own);
  const count = (rule) => number(own.filter((row) => row.rule === rule).length);
  const parent = byId("shown");
  parent.replaceChildren(
    terms(
      [
        ...(several ? [["run", runLabel(index)]] : []),
        ["method", foreign(spec)],
        ["file", foreign(example.file)],
        ["row", number(example.row)],
        ["update", number(example.step)],
        ["reward", number(example.reward)],
        ["advantage", number(example.advantage)],
        ["shown because", foreign(example.why)],
        ["tokens of the policy", number(own.length)],
        ["rejected by token threshold", count(1)],
        ["by prefix budget", count(2)],
        ["by another rule", count(3)],
        ...(isNumber(method.delta_b) ? [["delta_b", number(method.delta_b)]] : []),
        ...(example.length > example.token_ids.length
          ? [["shown", `the first ${number(example.token_ids.length)} of ${number(example.length)} tokens`]]
          : []),
      ],
      "terms facts",
    ),
  );
  parent.append(make("h3", {}, "Prompt"), longText(example.prompt));
  parent.append(make("h3", {}, "Response, token by token"));
  if (rows.length > WINDOW) parent.append(turner(rows.length));
  if (!example.tokens) {
    parent.append(
      make("p", { class: "note" }, "No tokenizer lies by this log: the tokens are their ids."),
      longText(example.response),
    );
  }
  parent.append(legend(rows), tokenView(part), make("h3", {}, "The account"));
  const figures = make("div", { class: "pictures wide" });
  parent.append(figures, statementTable(part));
  if (shown.picture) pictures.splice(pictures.indexOf(shown.picture), 1);
  const limited = part.some((row) => row.threshold !== null);
  shown.picture = picture(
    figures,
    limited ? "What each token may spend, and spends" : "How far each token moved",
    limited
      ? "A token is rejected where it moves away from the sampler and spends more than the threshold."
      : "The method has no threshold on a token's divergence.",
    () => statementPicture(part),
    part.some((row) => row.before !== null) ? 460 : 300,
  );
  render(shown.picture);
}

function longText(text) {
  return make("pre", { class: "long", tabindex: "0" }, text === null ? DASH : foreign(text, TEXT_LIMIT));
}

function turner(length) {
  const turn = (text, by, stop) => {
    const button = make("button", { type: "button", disabled: stop }, text);
    button.addEventListener("click", () => {
      shown.begin += by;
      shown.token = shown.begin;
      showResponse();
    });
    return button;
  };
  const end = Math.min(length, shown.begin + WINDOW);
  return make(
    "p",
    { class: "turner" },
    turn("Earlier tokens", -WINDOW, shown.begin === 0),
    ` ${number(shown.begin + 1)} to ${number(end)} of ${number(length)} `,
    turn("Later tokens", WINDOW, end === length),
  );
}

function legend(rows) {
  const measured = rows.some((row) => row.divergence !== null)
    ? "divergence D"
    : "|pi - mu| (the method measures none)";
  const sample = (text, name, heat) => {
    const token = make("span", { class: `token ${name}` }, text);
    token.style.setProperty("--d", heat);
    return token;
  };
  const scale = [0, 0.05, 0.2, 0.5, 1].map((value) => sample(String(value), "kept", Math.sqrt(value)));
  return make(
    "p",
    { class: "key" },
    `Background: ${measured} `,
    ...scale,
    " Rejected by ",
    sample("token threshold", "by-threshold", 0),
    " ",
    sample("prefix budget", "by-budget", 0),
    " ",
    sample("another rule", "by-other", 0),
    " Not the policy's: ",
    sample("tool output", "outside", 0),
  );
}

function tokenView(part) {
  const card = make("div", { class: "card" });
  const view = make("div", {
    class: "tokens",
    role: "listbox",
    "aria-label": "Tokens of the response; arrow keys move",
    "aria-orientation": "horizontal",
  });
  const nodes = part.map((row) => {
    const state = row.own ? RULE_CLASSES[row.rule] || "by-other" : "outside";
    const node = make(
      "span",
      {
        class: `token ${state}`,
        role: "option",
        tabindex: "-1",
        "aria-selected": "false",
        "aria-label": `token ${row.place + 1}: ${tokenText(row, 40)}, divergence ${number(row.heat)}, ${row.decision}`,
      },
      visible(tokenText(row)),
    );
    node.style.setProperty("--d", Math.sqrt(Math.min(1, (row.own && row.heat) || 0)));
    return node;
  });
  const choose = (place, focus) => {
    const before = nodes[shown.token - shown.begin];
    if (before) {
      before.tabIndex = -1;
      before.setAttribute("aria-selected", "false");
    }
    shown.token = shown.begin + place;
    nodes[place].tabIndex = 0;
    nodes[place].setAttribute("aria-selected", "true");
    if (focus) nodes[place].focus();
    card.replaceChildren(tokenCard(part[place]));
  };
  const place = (event) => nodes.indexOf(event.target.closest(".token"));
  for (const kind of ["mouseover", "click", "focusin"]) {
    view.addEventListener(kind, (event) => {
      const at = place(event);
      if (at < 0) return;
      if (kind === "mouseover") card.replaceChildren(tokenCard(part[at]));
      else choose(at, false);
    });
  }
  view.addEventListener("mouseleave", () => card.replaceChildren(tokenCard(part[shown.token - shown.begin])));
  view.addEventListener("keydown", (event) => {
    const at = shown.token - shown.begin;
    const steps = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: nodes.length - 1 };
    const next =
      event.key in steps
        ? steps[event.key]
        : event.key === "ArrowDown"
          ? inLine(nodes, at, 1)
          : event.key === "ArrowUp"
            ? inLine(nodes, at, -1)
            : null;
    if (next === null || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    if (next >= 0 && next < nodes.length) choose(next, true);
  });
  // Ids have no spaces of their own.
  view.append(
    ...(part.some((row) => row.text !== null) ? nodes : nodes.flatMap((node, at) => (at ? [" ", node] : [node]))),
  );
  if (nodes.length) choose(0, false);
  else view.append("no tokens");
  return make("div", { class: "reader" }, card, view);
}

// The token of the next line, up or down, that begins nearest to where this one does.
function inLine(nodes, at, way) {
  const from = nodes[at].getClientRects()[0];
  let best = null;
  for (let next = at + way, line = null; next >= 0 && next < nodes.length; next += way) {
    const to = nodes[next].getClientRects()[0];
    if (!to || Math.abs(to.top - from.top) < 4) continue;
    line ??= to.top;
    if (Math.abs(to.top - line) >= 4) break;
    if (best === null || Math.abs(to.left - from.left) < Math.abs(nodes[best].getClientRects()[0].left - from.left))
      best = next;
  }
  return best;
}

function tokenCard(row) {
  const ratio = isNumber(row.logp) && isNumber(row.rollout) ? Math.exp(row.logp - row.rollout) : null;
  return terms([
    ["token", number(row.place + 1)],
    ["text", row.text === null ? DASH : foreign(visible(row.text), 40)],
    ["id", number(row.id)],
    ["pi", number(row.pi)],
    ["mu", number(row.mu)],
    ["ratio", number(ratio)],
    ["|pi - mu|", number(row.gap)],
    ["D", number(row.divergence)],
    ["w", number(row.weight)],
    ["spends Z", number(row.spending)],
    ["balance U", number(row.before)],
    ["threshold c", number(row.threshold)],
    ["weight k", number(row.coefficient)],
    ["decision", row.decision],
  ]);
}

function statementTable(part) {
  const columns = [
    { title: "#", value: (row) => row.place + 1 },
    {
      title: "Token",
      text: true,
      value: (row) => tokenText(row, 40),
      show: (value) => make("span", { class: "cell" }, foreign(visible(value).replaceAll("\n", ""), 80)),
    },
    { title: "Id", value: (row) => row.id, show: String },
    { title: "log pi", value: (row) => row.logp },
    { title: "log mu", value: (row) => row.rollout },
    { title: "|pi - mu|", value: (row) => row.gap },
    { title: "w", key: "weight" },
    { title: "D", key: "divergence" },
    { title: "Balance before, U", key: "before" },
    { title: "May spend, c", key: "threshold" },
    { title: "Spends, Z", key: "spending" },
    { title: "Deposit, delta_b w", key: "deposit" },
    { title: "Balance after", key: "after" },
    { title: "Weight k", key: "coefficient" },
    { title: "Decision", text: true, value: (row) => row.decision, show: String },
  ].map((column) => (column.key ? { ...column, value: (row) => row[column.key] } : column));
  const used = columns.filter((column) => !column.key || part.some((row) => row[column.key] !== null));
  const made = table(used, part, { mark: (row) => (row.own ? RULE_CLASSES[row.rule] || "by-other" : "outside") });
  return make(
    "div",
    { class: "scroll statement", tabindex: "0", role: "region", "aria-label": "The account, a row a token" },
    made,
  );
}

function statementPicture(part) {
  const own = part.filter((row) => row.own && row.spent !== null);
  const x = own.map((row) => row.place + 1);
  const told = own.map((row) => `${plain(tokenText(row, 30))} (${row.decision})`);
  const account = own.some((row) => row.before !== null);
  const word = own.some((row) => row.spending !== null)
    ? "spends"
    : own.some((row) => row.divergence !== null)
      ? "divergence"
      : "|pi - mu|";
  const lines = [];
  if (own.some((row) => row.threshold !== null)) {
    lines.push({
      name: "threshold c",
      colour: colour(1),
      style: "dash",
      shape: "hvh",
      x,
      y: own.map((row) => row.threshold),
    });
  }
  if (account) {
    lines.push({
      name: "balance U, before the token",
      colour: colour(2),
      shape: "hv",
      x,
      y: own.map((row) => row.before),
      axis: "y2",
    });
  }
  const traces = [
    {
      type: "bar",
      name: word,
      x,
      y: own.map((row) => row.spent),
      marker: { color: colour(0), opacity: 0.65 },
      customdata: told,
      hovertemplate: "%{y:.4g} %{customdata}",
    },
  ];
  if (account) {
    traces.push({
      type: "bar",
      name: "deposit",
      x,
      y: own.map((row) => row.deposit),
      yaxis: "y2",
      marker: { color: colour(3) },
    });
  }
  for (const rule of [1, 2, 3]) {
    const hit = own.filter((row) => row.rule === rule);
    if (!hit.length) continue;
    traces.push({
      type: "scatter",
      mode: "markers",
      name: `rejected: ${RULES[rule]}`,
      hoverinfo: "skip",
      x: hit.map((row) => row.place + 1),
      y: hit.map((row) => row.spent),
      marker: {
        symbol: RULE_SYMBOLS[rule],
        size: 9,
        color: style("--ink"),
        line: { width: 1.5, color: style("--ink") },
      },
    });
  }
  // A threshold far below 0 would press the spending flat; that it lies below the picture says enough.
  const limits = own.map((row) => row.threshold).filter((value) => value !== null);
  const top = [...limits, ...own.map((row) => row.spent)].reduce((a, b) => Math.max(a, b), 1e-9) * 1.1;
  const range = [Math.max(-0.4 * top, limits.reduce((a, b) => Math.min(a, b), 0) * 1.1), top];
  const axes = account
    ? {
        yaxis: titled(word, { domain: [0.55, 1], range }),
        yaxis2: titled("balance", { domain: [0, 0.45], anchor: "x" }),
      }
    : { yaxis: titled(word, { range }) };
  const blocks = [{ name: word, colour: colour(0) }, ...(account ? [{ name: "deposit", colour: colour(3) }] : [])];
  const marks = traces.filter((one) => one.mode === "markers").map((one) => `${MARKS[one.marker.symbol]} ${one.name}`);
  return {
    lines,
    blocks,
    marks,
    traces,
    layout: { xaxis: titled("token", account ? { anchor: "y2" } : {}), ...axes, barmode: "overlay", bargap: 0.15 },
  };
}
