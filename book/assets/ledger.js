// The scoreboard: filter and sort its rows. Without this script the tables are complete.
"use strict";
(() => {
  const tables = [...document.querySelectorAll("table.scoreboard")];
  if (!tables.length) return;
  const rows = tables.flatMap(t => [...t.tBodies[0].rows]);
  const values = (row, key) => (row.dataset[key] || "").split("|").filter(Boolean);
  const KEYS = ["paper", "kind", "verdict", "large", "gpu", "nature", "weight", "device"];
  const LABELS = { verdict: "verdict here", large: "at paper scale", gpu: "on a GPU",
    nature: "finding's nature", weight: "finding's weight" };
  const WORST = ["open", "not reproduced", "false as printed", "not yet re-judged", "derived", "reproduced"];
  const make = (tag, text, parent) => {
    const el = document.createElement(tag);
    el.textContent = text;
    parent.append(el);
    return el;
  };

  const bar = document.createElement("form");
  bar.className = "ngd-filter";
  bar.setAttribute("aria-label", "Filter and sort the scoreboard");
  bar.onsubmit = event => event.preventDefault();
  const chosen = {};
  const choice = (key, label, options) => {
    const select = make("select", "", make("label", label + " ", bar));
    options.forEach(([value, text]) => make("option", text, select).value = value);
    select.name = key;
    select.addEventListener("change", show);
    chosen[key] = select;
  };
  for (const key of KEYS) {
    const found = [...new Set(rows.flatMap(row => values(row, key)))];
    if (key === "weight") found.sort().reverse();
    choice(key, LABELS[key] || key,
      [["", "all"], ...found.map(v => [v, v])]);
  }
  choice("order", "order", [["", "as in the paper"], ["verdict", "worst verdict first"],
    ["weight", "weightiest finding first"], ["findings", "most findings first"]]);
  const count = make("output", "", bar);
  count.setAttribute("aria-live", "polite");
  tables[0].closest(".ngd-table").previousElementSibling.before(bar);

  const rank = {
    "": () => 0,
    verdict: row => WORST.indexOf(row.dataset.verdict),
    weight: row => -Number(row.dataset.weight || 0),
    findings: row => -row.querySelectorAll(".ngd-about").length,
  };
  const homes = tables.map(t => [...t.tBodies[0].rows]);
  function show() {
    let shown = 0;
    const order = rank[chosen.order.value];
    tables.forEach((table, k) => {
      const here = [...homes[k]].sort((a, b) => order(a) - order(b));
      let any = false;
      for (const row of here) {
        row.hidden = !KEYS.every(key => !chosen[key].value || values(row, key).includes(chosen[key].value));
        any ||= !row.hidden;
        shown += !row.hidden;
        table.tBodies[0].append(row);
      }
      const box = table.closest(".ngd-table");
      box.hidden = box.previousElementSibling.hidden = !any;
    });
    count.textContent = `${shown} of ${rows.length}`;
  }
  show();

  // A link to a row that the filter hides shows everything again.
  addEventListener("hashchange", () => {
    const row = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (row && row.hidden) {
      KEYS.forEach(key => chosen[key].value = "");
      show();
      row.scrollIntoView();
    }
  });
})();
