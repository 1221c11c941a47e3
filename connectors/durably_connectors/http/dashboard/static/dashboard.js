// The pages can be read without scripts. This adds keys, copying, and what happens while one looks.
import { followChanges, followStream } from "./live.js";
import { listenToKeys } from "./keys.js";

document.documentElement.classList.add("scripted");

const toast = document.querySelector(".toast");
let fading;

function say(text) {
  toast.textContent = text;
  toast.classList.add("shown");
  clearTimeout(fading);
  fading = setTimeout(() => toast.classList.remove("shown"), 1600);
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // there is no clipboard on pages without TLS
    const field = Object.assign(document.createElement("textarea"), { value: text });
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  say("Copied");
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-copy]");
  if (button) {
    event.preventDefault();
    copy(button.dataset.copy);
  }
  if (event.target.closest("[data-help]")) document.getElementById("keys").showModal();
  const open = document.querySelector(".popover[open]");
  if (open && !open.contains(event.target)) open.open = false;
});

// A tile is a choice that is made at once.
document.addEventListener("change", (event) => {
  if (event.target.matches(".tile input")) event.target.form.requestSubmit();
});

listenToKeys(copy);
followChanges();
followStream();
