"use strict";
// Numbers as text, and elements from text. Whatever comes from a log goes through textContent, never through markup.

const DASH = "–";
const TEXT_LIMIT = 6000;

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

// 0.0393795 -> "3.94%"
function share(value) {
  if (!isNumber(value)) return DASH;
  const percent = 100 * value;
  if (percent === 0) return "0%";
  return `${Math.abs(percent) < 10 ? percent.toPrecision(3) : percent.toFixed(1)}%`;
}

// Four digits; whole numbers whole.
function number(value) {
  if (!isNumber(value)) return DASH;
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  return size < 1e-4 || size >= 1e6 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

function clip(text, limit) {
  if (text.length <= limit) return text;
  const high = text.charCodeAt(limit - 1);
  const kept = high >= 0xd800 && high < 0xdc00 ? limit - 1 : limit; // not through the middle of a character
  return `${text.slice(0, kept)}... ${number(text.length - kept)} more characters`;
}

// make("p", {class: "note"}, "text", node): attributes are the page's own words, texts may be anybody's.
function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function byId(id) {
  return document.getElementById(id);
}

// Text of a log by itself: what it does to direction ends with it.
function foreign(text, limit = 120) {
  return make("bdi", {}, clip(String(text), limit));
}

function terms(pairs, name = "terms") {
  const list = make("dl", { class: name });
  for (const [term, value] of pairs) list.append(make("div", {}, make("dt", {}, term), make("dd", {}, value)));
  return list;
}

// A table whose columns are {title, value(row), show(value, row), text}; with `sortable` its heads are buttons.
function table(columns, rows, { caption, sortable = false, head = 0, mark = null } = {}) {
  const body = make("tbody");
  const heads = columns.map((column) => make("th", { scope: "col", class: column.text ? "text" : null }));
  const fill = (order) => {
    body.replaceChildren();
    for (const row of order) {
      const cells = columns.map((column, place) => {
        const shown = (column.show || number)(column.value(row), row);
        const attributes = { class: column.text ? "text" : null, scope: place === head ? "row" : null };
        return make(place === head ? "th" : "td", attributes, ...(Array.isArray(shown) ? shown : [shown]));
      });
      body.append(make("tr", { class: mark && mark(row) }, ...cells));
    }
  };
  columns.forEach((column, place) => {
    if (!sortable) {
      heads[place].append(column.title);
      return;
    }
    const button = make("button", { type: "button" }, column.title);
    button.addEventListener("click", () => {
      // Numbers fall first, names rise first.
      const before = heads[place].getAttribute("aria-sort");
      const rising = before ? before === "descending" : Boolean(column.text);
      heads.forEach((one) => one.removeAttribute("aria-sort"));
      heads[place].setAttribute("aria-sort", rising ? "ascending" : "descending");
      fill(sorted(rows, column.value, rising));
    });
    heads[place].append(button);
  });
  fill(rows);
  return make(
    "table",
    {},
    caption ? make("caption", {}, caption) : null,
    make("thead", {}, make("tr", {}, ...heads)),
    body,
  );
}

// Sorted, rows without a value last.
function sorted(rows, value, rising) {
  const has = rows.filter((row) => value(row) !== null && value(row) !== undefined);
  const rest = rows.filter((row) => !has.includes(row));
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);
  has.sort((a, b) => (rising ? 1 : -1) * compare(value(a), value(b)));
  return [...has, ...rest];
}

function options(select, entries) {
  select.replaceChildren(
    ...entries.map(([value, text]) => {
      const option = make("option", {}, clip(String(text), 120));
      option.value = value;
      return option;
    }),
  );
}
