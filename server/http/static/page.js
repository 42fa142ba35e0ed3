// The page at `/`: asks the server how it is while somebody looks, and hands that to the parts.

import { AdapterTable } from "./adapters.js";
import { call, setToken, token } from "./api.js";
import { byId, element, setText } from "./element.js";
import { Ask } from "./ask.js";
import { Upload } from "./upload.js";

const REFRESH_MS = 1500;
const NOTICE_MS = 8000;

let model = null;
let timer = 0;
let refreshing = null;

const ask = new Ask();
const table = new AdapterTable({ refresh, notify, confirm });
new Upload({ refresh });

/** Asks once, now; later calls while one is under way wait for that. */
function refresh() {
  refreshing ??= look().finally(() => {
    refreshing = null;
    schedule();
  });
  return refreshing;
}

async function look() {
  try {
    model ??= await call("GET", "/kasa/v1/model");
    const listing = await call("GET", "/kasa/v1/adapters");
    showModel();
    table.show(model, listing);
    ask.offer(model, listing);
    showConnection("good", "connected");
  } catch (error) {
    model = null;
    if (error.status === 401) byId("token-form").hidden = false;
    showConnection("bad", error.status === 401 ? "wants a token" : error.message);
  }
}

function schedule() {
  clearTimeout(timer);
  if (document.visibilityState === "visible") timer = setTimeout(refresh, REFRESH_MS);
}

function showModel() {
  const size = Intl.NumberFormat("en", { notation: "compact" }).format(model.num_parameters);
  const facts = [model.name, `${size} parameters`, model.dtype, `${model.engine}/${model.executor}`];
  setText(byId("model"), facts.join(" · "));
}

function showConnection(kind, text) {
  byId("connection").dataset.kind = kind;
  setText(byId("connection"), text);
}

/** Says what happened, for a while. `kind`: good or bad. */
function notify(text, kind = "good") {
  const notice = element("p", { className: "notice", "data-kind": kind, textContent: text });
  byId("notices").append(notice);
  setTimeout(() => notice.remove(), NOTICE_MS);
}

/** Whether the person wants it. */
function confirm(title, text, yes) {
  const dialog = byId("confirm");
  setText(byId("confirm-title"), title);
  setText(byId("confirm-text"), text);
  setText(byId("confirm-yes"), yes);
  dialog.returnValue = "";
  dialog.showModal();
  byId("confirm-no").focus();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

byId("confirm-yes").addEventListener("click", () => byId("confirm").close("yes"));
byId("confirm-no").addEventListener("click", () => byId("confirm").close());

byId("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setToken(byId("token").value.trim());
  refresh();
});
byId("forget-token").addEventListener("click", () => {
  setToken("");
  location.reload(); // and with it all that the token let be seen
});
byId("token").value = token();
byId("token-form").hidden = !token();

document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible") refresh();
  else clearTimeout(timer);
});

refresh();
