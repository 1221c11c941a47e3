// What happens while one looks: parts of the page are fetched anew when the server says that something has changed.
import { markChosen } from "./keys.js";

const light = document.querySelector(".live");
const LONGEST_PAUSE = 500; // milliseconds between two fetches at least

function lit(on, text) {
  if (!light) return;
  light.hidden = false;
  light.classList.toggle("off", !on);
  light.lastElementChild.textContent = text;
}

// Somebody writes there, or has opened what is not there anew.
const busy = (part) => part.contains(document.activeElement) && document.activeElement.matches("input, textarea, select")
  || [...part.querySelectorAll("textarea, input:not([type=hidden], [type=checkbox])")].some((field) => field.value !== field.defaultValue)
  || part.matches("details[open]");

async function renew() {
  const response = await fetch(location.href, { credentials: "same-origin", headers: { Accept: "text/html" } });
  if (!response.ok || response.redirected) throw new Error(`${response.status}`);
  const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
  if (!fresh.body.dataset.live && document.body.dataset.live) { // it has ended: other buttons, other panels
    location.reload();
    return;
  }
  const names = (root) => [...root.querySelectorAll("[data-part]")].map((part) => part.dataset.part).join();
  const hasForm = [...document.querySelectorAll("[data-part]")].some(busy);
  if (names(fresh) !== names(document) && !hasForm) {
    swap(document.getElementById("main"), fresh.getElementById("main"));
  } else {
    for (const part of document.querySelectorAll("[data-part]")) {
      const other = fresh.querySelector(`[data-part="${CSS.escape(part.dataset.part)}"]`);
      if (other && !busy(part)) swap(part, other);
    }
  }
  markChosen();
}

function swap(part, fresh) {
  if (part.outerHTML === fresh.outerHTML) return;
  for (const open of part.querySelectorAll("details[open]")) {
    const same = open.id ? fresh.querySelector(`#${CSS.escape(open.id)}`) : elementAt(pathOf(open, part), fresh);
    if (same?.matches("details")) same.open = true;
  }
  const places = [...part.querySelectorAll("details[open] pre")].map((pre) => pre.scrollTop);
  const focused = part.contains(document.activeElement) ? pathOf(document.activeElement, part) : null;
  part.replaceWith(fresh);
  [...fresh.querySelectorAll("details[open] pre")].forEach((pre, n) => { pre.scrollTop = places[n] ?? 0; });
  if (focused) elementAt(focused, fresh)?.focus({ preventScroll: true });
}

function pathOf(element, root) {
  const path = [];
  for (let at = element; at !== root; at = at.parentElement) path.unshift([...at.parentElement.children].indexOf(at));
  return path;
}

const elementAt = (path, root) => path.reduce((at, n) => at?.children[n], root);

export function followChanges() {
  const { live, poll } = document.body.dataset;
  let busyWith = null, again = false, source = null, timer = null;

  async function changed() {
    if (busyWith) {
      again = true;
      return;
    }
    busyWith = renew().then(() => lit(true, "live"), () => lit(false, "not up to date"));
    await busyWith;
    await new Promise((done) => setTimeout(done, LONGEST_PAUSE));
    busyWith = null;
    if (again) {
      again = false;
      changed();
    }
  }

  // A page that nobody sees asks for nothing: a browser has few connections.
  function begin() {
    if (live && !source) {
      source = new EventSource(live);
      source.onopen = () => lit(true, "live");
      source.onmessage = changed;
      source.onerror = () => lit(false, "reconnecting");
    }
    if (poll && !timer) {
      lit(true, "live");
      timer = setInterval(changed, Number(poll));
    }
  }

  function end() {
    source?.close();
    clearInterval(timer);
    source = timer = null;
  }

  if (!live && !poll) return;
  begin();
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) end();
    else {
      begin();
      changed();
    }
  });
  addEventListener("pagehide", end);
}

export function followStream() {
  const list = document.querySelector("[data-follow]");
  if (!list) return;
  const note = document.querySelector("[data-stream-note]");
  const source = new EventSource(list.dataset.follow);
  const pretty = (text) => {
    if (text.length <= 160) return text;
    try {
      return JSON.stringify(JSON.parse(text), null, 2);
    } catch {
      return text;
    }
  };

  function add(index, text) {
    const atEnd = list.scrollTop + list.clientHeight >= list.scrollHeight - 40;
    const item = document.createElement("li"), number = document.createElement("span"), value = document.createElement("pre");
    number.className = "number";
    number.textContent = index;
    value.textContent = text;
    item.append(number, value);
    list.append(item);
    note.textContent = "";
    if (atEnd) list.scrollTop = list.scrollHeight;
  }

  function over(text) {
    source.close();
    note.textContent = text;
    lit(false, "ended");
    const state = document.querySelector("[data-stream-state]");
    state.className = "badge s-completed";
    state.lastChild.textContent = "ended";
  }

  source.onopen = () => lit(true, "live");
  source.onerror = () => lit(false, "reconnecting");
  source.onmessage = (event) => add(event.lastEventId, pretty(event.data));
  source.addEventListener("bytes", (event) => add(event.lastEventId, event.data));
  source.addEventListener("end", () => over("The stream has ended."));
  source.addEventListener("failed", (event) => over(`The stream has ended: ${JSON.parse(event.data).detail}`));
}
