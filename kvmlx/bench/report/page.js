"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const one = (id) => document.getElementById(id);
  const say = (text) => { one("said").textContent = text; };

  // Sorting: numbers by the first one of a cell, descending, then ascending; a cell without a value stays last.
  const value = (row, header) => {
    const text = row.cells[header.cellIndex].textContent;
    if (text === "–" || text === "") return null;
    if (!header.classList.contains("num")) return text;
    const number = parseFloat(text.replace(/[,(]/g, ""));
    return Number.isNaN(number) ? null : number;
  };
  const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
  const sort = (header) => {
    const table = header.closest("table");
    const first = header.classList.contains("num") ? "descending" : "ascending";
    const other = first === "descending" ? "ascending" : "descending";
    const order = header.getAttribute("aria-sort") === first ? other : first;
    all("thead th", table).forEach((h) => h.setAttribute("aria-sort", h === header ? order : "none"));
    const sign = order === "ascending" ? 1 : -1;
    const rows = all("tbody tr", table).map((row) => [value(row, header), row]);
    rows.sort(([a], [b]) => (a === null ? 1 : 0) - (b === null ? 1 : 0) || (a === null ? 0 : sign * compare(a, b)));
    table.tBodies[0].append(...rows.map(([, row]) => row));
    say(`sorted by ${header.textContent}, ${order}`);
  };
  all("thead button").forEach((button) => button.addEventListener("click", () => sort(button.parentElement)));

  // Filters: one choice of each kind, and words that the method's name must contain. What has no such property stays.
  const chosen = { mode: "", target: "", length: "" };
  let family = "";
  const names = {};
  all(".legend button").forEach((b) => { names[b.dataset.choice] = b.textContent; });
  const fits = (data, kinds) => kinds.every((k) => !chosen[k] || !data[k] || data[k] === chosen[k]);
  const filter = () => {
    const terms = one("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const named = (text) => terms.every((term) => text.toLowerCase().includes(term));
    let shown = 0;
    const rows = all(".box tbody tr");
    rows.forEach((row) => {
      row.hidden = !(fits(row.dataset, ["mode", "target", "length"]) && named(row.textContent));
      shown += !row.hidden;
    });
    all("figure").forEach((figure) => { figure.hidden = !fits(figure.dataset, ["mode", "target", "length"]); });
    all(".overview").forEach((part) => { part.hidden = !fits(part.dataset, ["mode"]); });
    all("svg [data-family]").forEach((mark) => {
      // The lines of a family go through all targets.
      const line = !mark.dataset.tip && chosen.target !== "";
      const other = line || (family !== "" && mark.dataset.family !== family);
      mark.classList.toggle("faded", other || !fits(mark.dataset, ["target"]) || !named(names[mark.dataset.family]));
    });
    all(".legend button").forEach((b) => b.classList.toggle("faded", !named(b.textContent)));
    one("count").textContent = `${shown} of ${rows.length} rows`;
    all("figure").forEach(rove);
  };
  all(".controls button").forEach((button) => button.addEventListener("click", () => {
    const { kind, choice } = button.dataset;
    chosen[kind] = choice;
    all(`.controls button[data-kind="${kind}"]`).forEach((b) => b.setAttribute("aria-pressed", String(b === button)));
    filter();
    say(one("count").textContent);
  }));
  one("search").addEventListener("input", filter);
  all(".legend button").forEach((button) => button.addEventListener("click", () => {
    family = family === button.dataset.choice ? "" : button.dataset.choice;
    all(".legend button").forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.choice === family)));
    filter();
  }));

  // Tooltips of points and cells: by pointer, by touch, or with Tab into a plot and the arrow keys.
  const tip = one("tip");
  let told = null;
  const hide = () => { told = null; tip.hidden = true; };
  const show = (mark) => {
    told = mark;
    tip.textContent = mark.dataset.tip;
    tip.hidden = false;
    place();
  };
  const place = () => {
    const at = told.getBoundingClientRect();
    const { width, height } = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, at.left + at.width / 2 - width / 2), document.documentElement.clientWidth - width - 8);
    const above = at.top - height - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 8 ? above : at.bottom + 8}px`;
  };
  const mark = (event) => event.target.closest?.("[data-tip]");
  for (const [event, act] of [["pointerover", show], ["focusin", show], ["click", show]]) {
    document.addEventListener(event, (e) => { const m = mark(e); if (m) act(m); else if (event === "click") hide(); });
  }
  document.addEventListener("pointerout", (e) => { if (mark(e)) hide(); });
  document.addEventListener("focusout", hide);
  // Focus may scroll the page: the tooltip goes with its point.
  document.addEventListener("scroll", () => { if (told) place(); }, { capture: true, passive: true });
  const points = (figure) => all("[data-tip]:not(.faded)", figure);
  const rove = (figure) => {
    all("[data-tip]", figure).forEach((p) => p.setAttribute("tabindex", "-1"));
    points(figure)[0]?.setAttribute("tabindex", "0");
  };
  document.addEventListener("keydown", (e) => {
    if (e.key === "Escape") return hide();
    const figure = e.target.closest?.("figure");
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[e.key];
    if (!figure || !step || !mark(e)) return;
    e.preventDefault();
    const list = points(figure);
    list[(list.indexOf(mark(e)) + step + list.length) % list.length].focus();
  });
  all("svg [data-tip]").forEach((p) => {
    p.setAttribute("role", "img");
    p.setAttribute("aria-label", p.dataset.tip.replaceAll("\n", ", "));
  });
  filter();
})();
