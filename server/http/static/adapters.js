// The table of adapters. Rows stay the elements that they are, so that a refresh takes no focus away.

import { adapterPath, call } from "./api.js";
import { actionButton, byId, element, setText } from "./element.js";
import { size } from "./upload.js";

const COLUMNS = ["State", "Rank", "First token", "Per token", "Tokens/s", "Requests"];
const NUM_CELLS = COLUMNS.length + 2; // and the name before, the buttons behind

export class AdapterTable {
  /** `page`: refresh(), notify(text, kind), confirm(title, text, yes). */
  constructor(page) {
    this.page = page;
    this.body = byId("adapters");
    this.rows = new Map();
    this.base = null;
  }

  /** Everything as it is now. */
  show(model, listing) {
    setText(byId("window"), `latencies of the last ${listing.window_s / 60} minutes`);
    byId("no-adapters").hidden = listing.adapters.length > 0;
    this.showBase(model, listing);
    const names = new Set(listing.adapters.map((adapter) => adapter.name));
    for (const [name, row] of this.rows) {
      if (!names.has(name)) {
        row.remove();
        this.rows.delete(name);
      }
    }
    let place = this.base?.main ?? null;
    for (const adapter of listing.adapters) {
      const row = this.rows.get(adapter.name) ?? this.addRow(adapter.name);
      row.update(adapter, listing.merged);
      const next = place ? place.nextSibling : this.body.firstChild;
      if (next !== row.main) this.body.insertBefore(row.main, next);
      if (row.main.nextSibling !== row.more) row.main.after(row.more);
      place = row.more;
    }
  }

  showBase(model, listing) {
    if (!listing.base) {
      this.base?.main.remove();
      this.base = null;
      return;
    }
    if (!this.base) {
      this.base = new Cells(model.name, "base");
      setText(this.base.cells["State"], "the weights themselves");
      setText(this.base.cells["Rank"], "–");
      this.body.prepend(this.base.main);
    }
    this.base.showLatency(listing.base.latency);
  }

  addRow(name) {
    const row = new Row(name, this.page);
    this.rows.set(name, row);
    return row;
  }
}

/** The cells that the base and every adapter have. */
class Cells {
  constructor(name, note) {
    this.note = element("small", {}, note);
    const title = element("th", { role: "rowheader", scope: "row" }, element("b", {}, name), this.note);
    this.cells = {};
    this.buttons = element("td", { role: "cell", className: "buttons" });
    this.main = element("tr", { role: "row", "data-name": name }, title);
    for (const column of COLUMNS) {
      const className = column === "State" ? "" : "number";
      this.cells[column] = element("td", { role: "cell", className, "data-label": column });
      this.main.append(this.cells[column]);
    }
    this.main.append(this.buttons);
  }

  showLatency(latency) {
    const shown = {
      "First token": pair(latency?.ttft_p50_s, latency?.ttft_p95_s),
      "Per token": pair(latency?.inter_token_p50_s, latency?.inter_token_p95_s),
      "Tokens/s": latency?.requests ? latency.tokens_per_s.toFixed(1) : "–",
      Requests: latency?.requests ? String(latency.requests) : "–",
    };
    for (const [column, text] of Object.entries(shown)) setText(this.cells[column], text);
  }
}

/** An adapter: a row, and what is shown of it on demand. */
class Row extends Cells {
  constructor(name, page) {
    super(name, "");
    this.name = name;
    this.page = page;
    this.adapter = null;
    this.shownVersion = null;
    this.badge = element("span", { className: "badge" });
    this.pin = element("span", { className: "badge pin", textContent: "pinned", hidden: true });
    this.cells["State"].append(this.badge, " ", this.pin);
    this.makeButtons();
    this.makeDetails();
  }

  makeButtons() {
    const { name } = this;
    this.merge = actionButton("Merge", () => this.toggleMerged(), { className: "small" });
    this.manage = element("button", {
      type: "button",
      className: "small",
      textContent: "More",
      "aria-expanded": "false",
      "aria-controls": `more-${name}`,
      "aria-label": `More of ${name}`,
    });
    this.manage.addEventListener("click", () => this.open(this.manage.ariaExpanded !== "true"));
    this.buttons.append(this.merge, this.manage);
  }

  makeDetails() {
    const button = (text, act, properties) => actionButton(text, act, { className: "small", ...properties });
    this.reason = element("p", { className: "reason", hidden: true });
    this.facts = element("dl", { className: "details" });
    this.versions = element("ul", { className: "versions" });
    this.administer = [
      button("Load", () => this.act("POST", "/load", "is on its way into the engine")),
      button("Pin", () => this.act("POST", "/load?pin=true", "is pinned")),
      button("Unload", () => this.act("POST", "/unload", "is unloaded")),
    ];
    this.delete = button("Delete…", () => this.confirmDelete(), { className: "small danger" });
    this.actions = element("div", { className: "bar" }, ...this.administer, this.delete);
    this.more = element(
      "tr",
      { role: "row", className: "more", id: `more-${this.name}`, hidden: true },
      element(
        "td",
        { role: "cell", colSpan: NUM_CELLS },
        this.reason,
        (this.opened = element("div", { hidden: true }, this.facts, this.versions, this.actions)),
      ),
    );
  }

  update(adapter, merged) {
    this.adapter = adapter;
    this.isMerged = merged.split("@")[0] === adapter.name;
    setText(this.note, adapter.version ? adapter.version.slice(0, 12) : "");
    this.note.title = adapter.version;
    const isOldOne = this.isMerged && adapter.state !== "merged";
    setText(this.badge, stateOf(adapter) + (isOldOne ? ", an older version is merged" : ""));
    this.badge.dataset.state = adapter.state;
    this.pin.hidden = !adapter.pinned;
    setText(this.cells["Rank"], rankOf(adapter));
    this.showLatency(adapter.latency);
    this.showPermitted(adapter);
    setText(this.reason, adapter.reason);
    this.reason.hidden = !adapter.reason;
    this.more.hidden = this.opened.hidden && !adapter.reason;
    if (!this.opened.hidden) this.showDetails();
  }

  showPermitted(adapter) {
    const readable = adapter.state !== "quarantined";
    const mayAdminister = adapter.may.includes("administer") && readable;
    const verb = this.isMerged ? "Unmerge" : "Merge";
    setText(this.merge, verb);
    this.merge.setAttribute("aria-label", `${verb} ${this.name}`);
    this.merge.hidden = !mayAdminister;
    for (const button of this.administer) button.hidden = !mayAdminister;
    this.delete.hidden = !adapter.may.includes("upload");
  }

  open(wanted) {
    this.manage.ariaExpanded = String(wanted);
    setText(this.manage, wanted ? "Less" : "More");
    this.opened.hidden = !wanted;
    this.more.hidden = !wanted && !this.adapter.reason;
    this.shownVersion = null;
    if (wanted) this.showDetails();
  }

  showDetails() {
    const { adapter } = this;
    const facts = {
      Method: adapter.method === "kasa" ? "KaSA" : adapter.method === "lora" ? "LoRA" : "",
      Alpha: adapter.rank ? String(adapter.alpha) : "",
      Truncated: adapter.truncation_rank ? `${adapter.truncation_rank} (${adapter.truncation_rule})` : "",
      Layers: adapter.target_modules.join(", "),
      Size: adapter.size_bytes ? size(adapter.size_bytes) : "",
      "In flight": String(adapter.in_flight),
      Created: adapter.create_time ? when(adapter.create_time) : "",
      Version: adapter.version,
    };
    const shown = Object.entries(facts).filter(([, text]) => text);
    const same = shown.map(([name, text]) => name + text).join();
    if (this.facts.dataset.shown !== same) {
      this.facts.dataset.shown = same;
      this.facts.replaceChildren(
        ...shown.map(([name, text]) =>
          element("div", {}, element("dt", {}, name), element("dd", {}, text)),
        ),
      );
    }
    if (adapter.version && this.shownVersion !== adapter.version) this.showVersions(adapter.version);
  }

  /** The versions to go back to; read when the details open and when the current one changes. */
  async showVersions(current) {
    this.shownVersion = current;
    let versions = [];
    try {
      ({ versions } = await call("GET", adapterPath(this.name, "/versions")));
    } catch (error) {
      if (this.adapter.state !== "quarantined") this.page.notify(error.message, "bad");
    }
    this.versions.replaceChildren(...versions.map((version) => this.versionItem(version)));
  }

  versionItem(version) {
    const short = version.version.slice(0, 12);
    const facts = `${when(version.create_time)} · ${size(version.size_bytes)}`;
    const item = element("li", {}, element("code", {}, short), element("small", {}, facts));
    if (version.current) item.append(element("span", { className: "badge" }, "current"));
    else if (this.adapter.may.includes("upload")) {
      const goBack = () => this.act("POST", `/rollback?version=${version.version}`, `is ${short} again`);
      const label = `Roll ${this.name} back to ${short}`;
      item.append(actionButton("Roll back", goBack, { className: "small", "aria-label": label }));
    }
    return item;
  }

  toggleMerged() {
    if (this.isMerged) return this.change("POST", "/kasa/v1/unmerge", `${this.name} is unmerged`);
    return this.act("POST", "/merge", "is merged into the weights");
  }

  async confirmDelete() {
    const title = `Delete ${this.name}?`;
    const text = "All its versions go from the disk. Requests that hold it end as they would have.";
    if (await this.page.confirm(title, text, "Delete")) await this.act("DELETE", "", "is deleted");
  }

  act(method, action, done) {
    return this.change(method, adapterPath(this.name, action), `${this.name} ${done}`);
  }

  async change(method, path, done) {
    try {
      await call(method, path);
      this.page.notify(done);
    } catch (error) {
      this.page.notify(error.message, "bad");
    }
    await this.page.refresh();
  }

  remove() {
    if (this.main.contains(document.activeElement) || this.more.contains(document.activeElement)) {
      byId("prompt").focus();
    }
    this.main.remove();
    this.more.remove();
  }
}

const TIERS = { disk: "on disk", host: "in memory", slot: "in a slot" };

function stateOf(adapter) {
  if (adapter.state === "ready") return `ready, ${TIERS[adapter.tier]}`;
  return adapter.state === "resident" ? TIERS.slot : adapter.state;
}

function rankOf(adapter) {
  if (!adapter.rank) return "–";
  return adapter.truncation_rank ? `${adapter.rank} + ${adapter.truncation_rank}` : String(adapter.rank);
}

function pair(p50, p95) {
  if (p50 == null) return "–";
  const inSeconds = p95 >= 1;
  const show = (value) => {
    const shown = inSeconds ? value : value * 1000;
    return shown.toFixed(shown < 10 ? (inSeconds ? 2 : 1) : 0);
  };
  return `${show(p50)} / ${show(p95)} ${inSeconds ? "s" : "ms"}`;
}

const when = (seconds) =>
  new Date(seconds * 1000).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
