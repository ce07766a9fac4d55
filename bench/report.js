"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const body = byId("table").tBodies[0];
  const heads = [...byId("table").tHead.rows[0].cells];
  const rows = [...body.rows];
  const place = new Map(rows.map((row, at) => [row, at]));

  // Numbers by size, words by alphabet; what has no value comes last in both directions.
  const compare = (a, b, numeric) =>
    numeric ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true });

  function order(head, direction) {
    const at = heads.indexOf(head);
    const numeric = head.classList.contains("n");
    const value = (row) => row.cells[at].dataset.v;
    const sign = direction === "descending" ? -1 : 1;
    const sorted = [...rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "") || place.get(a) - place.get(b);
      return sign * compare(x, y, numeric) || place.get(a) - place.get(b);
    });
    body.append(...(direction ? sorted : rows));
    for (const other of heads) other.setAttribute("aria-sort", "none");
    if (direction) head.setAttribute("aria-sort", direction);
  }

  const after = { none: "ascending", ascending: "descending", descending: null };
  for (const head of heads) {
    head.querySelector("button").addEventListener("click", () => {
      order(head, after[head.getAttribute("aria-sort")]);
    });
  }

  function filter() {
    const op = byId("by-op").value, who = byId("by-who").value, mode = byId("by-mode").value;
    const words = byId("by-text").value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = Boolean(
        (op && row.dataset.op !== op) || (who && row.dataset.who !== who) ||
        (mode && row.dataset.mode !== mode) || (byId("by-flag").checked && !row.dataset.flags) ||
        words.some((word) => !text.includes(word)));
      shown += !row.hidden;
    }
    byId("count").textContent = shown + " of " + rows.length + " rows";
  }

  const form = byId("filters");
  form.addEventListener("input", filter);
  form.addEventListener("change", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => {
    order(heads[0], null);
    setTimeout(filter); // once the fields are empty
  });
  filter();

  const record = new Blob([byId("run").textContent], { type: "application/json" });
  byId("download").href = URL.createObjectURL(record);

  // On paper everything is open.
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
})();
