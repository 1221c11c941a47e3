// Keys: rows are anything with data-row, and are opened by their first link, or unfolded.
const base = document.documentElement.dataset.base;
let chosen = null; // by name, since a row may be drawn anew
let going = false;

const rows = () => [...document.querySelectorAll("[data-row]")].filter((row) => row.offsetParent !== null);

export function markChosen() {
  for (const row of rows()) row.classList.toggle("chosen", row.dataset.row === chosen);
}

function move(by) {
  const all = rows();
  if (!all.length) return;
  const at = all.findIndex((row) => row.dataset.row === chosen);
  const row = all[Math.min(all.length - 1, Math.max(0, at < 0 ? (by > 0 ? 0 : all.length - 1) : at + by))];
  chosen = row.dataset.row;
  markChosen();
  row.scrollIntoView({ block: "nearest" });
}

function open() {
  const row = rows().find((found) => found.dataset.row === chosen);
  if (!row) return false;
  if (row.matches("details")) row.open = !row.open;
  else (row.querySelector("a[href]") ?? row.querySelector("textarea, summary"))?.[row.querySelector("a[href]") ? "click" : "focus"]();
  return true;
}

export function listenToKeys(copy) {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    const within = event.target;
    if (within.matches("input, textarea, select")) {
      if (event.key === "Escape") within.blur();
      return;
    }
    if (document.querySelector("dialog[open]")) return;
    if (going) {
      going = false;
      const page = document.querySelector(`[data-go="${CSS.escape(event.key)}"]`);
      if (page) location.assign(page.href);
      return;
    }
    const acts = {
      j: () => move(1),
      k: () => move(-1),
      g: () => { going = true; setTimeout(() => { going = false; }, 1500); },
      n: () => document.querySelector("a[rel=next]")?.click(),
      c: () => {
        const text = chosen ?? document.querySelector("[data-id]")?.dataset.id;
        if (text) copy(text);
      },
      "?": () => document.getElementById("keys")?.showModal(),
      "/": () => {
        const field = document.querySelector("[data-find]");
        if (field) field.select();
        else location.assign(`${base}/?find`);
      },
      // A button or a link that has the focus is meant by itself.
      Enter: () => within.closest("a, button, summary") ? false : open(),
    };
    if (acts[event.key] && acts[event.key]() !== false) event.preventDefault();
  });
  if (new URLSearchParams(location.search).has("find")) document.querySelector("[data-find]")?.focus();
}
