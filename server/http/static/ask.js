// The prompt, and the answers of the base model and of adapters side by side.

import { ApiError, stream } from "./api.js";
import { byId, element, setText } from "./element.js";

// A browser keeps six connections to a server that speaks HTTP/1.1, and the table needs one.
const MAX_TARGETS = 5;

export class Ask {
  constructor() {
    this.chips = new Map(); // model's name in the API -> its checkbox and label
    this.answers = new Map(); // the same -> Answer
    this.form = byId("ask");
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.form.addEventListener("change", (event) => {
      if (event.target.name === "mode") this.clear();
      this.check();
    });
    byId("stop").addEventListener("click", () => this.stop());
    byId("clear").addEventListener("click", () => this.clear());
    document.addEventListener("keydown", (event) => this.onKey(event));
  }

  /** Who may be asked, from now on. */
  offer(model, listing) {
    const usable = listing.adapters.filter((a) => a.state !== "quarantined");
    const targets = [...(listing.base ? [{ ...listing.base, name: model.name }] : []), ...usable]
      .filter((target) => target.may.includes("generate"))
      .map((target) => target.name);
    const first = this.chips.size === 0;
    for (const [name, chip] of this.chips) {
      if (!targets.includes(name)) {
        chip.label.remove();
        this.chips.delete(name);
      }
    }
    targets.forEach((name, index) => {
      const chip = this.chips.get(name) ?? this.addChip(name, name === model.name, first && index < 2);
      const place = byId("targets").children[index];
      if (place !== chip.label) byId("targets").insertBefore(chip.label, place ?? null);
    });
    const chat = this.form.elements.mode[0];
    if (!model.has_chat_template && !chat.disabled) {
      chat.disabled = true;
      chat.parentElement.title = "this model has no chat template";
      this.form.elements.mode[1].checked = true;
    }
    this.check();
  }

  addChip(name, isBase, checked) {
    const box = element("input", { type: "checkbox", name: "target", value: name, checked });
    const label = element("label", { className: "chip" }, box, element("span", {}, name));
    if (isBase) label.append(element("small", {}, "base"));
    const chip = { box, label };
    this.chips.set(name, chip);
    return chip;
  }

  get chosen() {
    return [...this.chips].filter(([, chip]) => chip.box.checked).map(([name]) => name);
  }

  get mode() {
    return this.form.elements.mode.value;
  }

  get running() {
    return [...this.answers.values()].some((answer) => answer.running);
  }

  /** Says what keeps a prompt from being sent. */
  check() {
    const count = this.chosen.length;
    let note = "";
    if (this.chips.size && !count) note = "Choose who should answer.";
    if (count > MAX_TARGETS) note = `Choose at most ${MAX_TARGETS}, got ${count}.`;
    setText(byId("ask-note"), note);
    byId("send").disabled = !count || count > MAX_TARGETS || this.running;
    byId("stop").disabled = !this.running;
  }

  async send() {
    this.check();
    if (byId("send").disabled || !this.form.reportValidity()) return;
    const prompt = byId("prompt").value;
    const options = {
      max_tokens: byId("max-tokens").valueAsNumber,
      temperature: byId("temperature").valueAsNumber,
    };
    this.keepOnly(this.chosen);
    const asked = this.chosen.map((name) => this.answerOf(name).ask(this.mode, prompt, options));
    if (this.mode === "chat") byId("prompt").value = "";
    this.check();
    await Promise.all(asked);
    this.check();
  }

  answerOf(name) {
    let answer = this.answers.get(name);
    if (!answer) {
      answer = new Answer(name, () => this.check());
      this.answers.set(name, answer);
    }
    byId("answers").append(answer.card); // in the order of the chips
    return answer;
  }

  keepOnly(names) {
    for (const [name, answer] of this.answers) {
      if (!names.includes(name)) {
        answer.card.remove();
        this.answers.delete(name);
      }
    }
  }

  stop() {
    for (const answer of this.answers.values()) answer.stop();
  }

  clear() {
    this.stop();
    this.keepOnly([]);
    this.check();
  }

  onKey(event) {
    if (byId("confirm").open) return;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      this.send();
    } else if (event.key === "Escape" && this.running) {
      event.preventDefault();
      this.stop();
    }
  }
}

/** What one model answers, and how fast; in chat mode, the whole conversation with it. */
class Answer {
  constructor(name, changed) {
    this.name = name;
    this.changed = changed;
    this.messages = [];
    this.aborting = null;
    this.stopButton = element("button", {
      type: "button",
      className: "small",
      textContent: "Stop",
      hidden: true,
      "aria-label": `Stop ${name}`,
    });
    this.stopButton.addEventListener("click", () => this.stop());
    this.body = element("div", {
      className: "turns",
      role: "log",
      "aria-live": "polite",
      "aria-label": `Answer of ${name}`,
      tabIndex: 0,
    });
    this.figures = element("p", { className: "figures" });
    const title = element("h3", {}, name);
    this.card = element(
      "article",
      { className: "card answer", "aria-label": name, "data-target": name },
      element("header", {}, title, this.stopButton),
      this.body,
      this.figures,
    );
  }

  get running() {
    return this.aborting !== null;
  }

  stop() {
    this.aborting?.abort();
  }

  /** Streams one answer; never throws, what went wrong is shown. */
  async ask(mode, prompt, options) {
    const chat = mode === "chat";
    if (!chat) this.body.replaceChildren();
    if (chat) this.addTurn("user", prompt);
    const messages = [...this.messages, { role: "user", content: prompt }];
    const input = chat ? { messages } : { prompt };
    const path = chat ? "/v1/chat/completions" : "/v1/completions";
    const text = document.createTextNode("");
    this.addTurn("assistant", text);
    this.begin();
    try {
      const events = stream(path, { model: this.name, ...input, ...options }, this.aborting.signal);
      for await (const event of events) this.take(event, text);
      this.end();
    } catch (error) {
      if (error.name === "AbortError") this.end("stopped");
      else this.fail(error);
    }
    if (chat && text.data) this.messages = [...messages, { role: "assistant", content: text.data }];
  }

  addTurn(role, content) {
    this.body.append(element("div", { className: `turn ${role}` }, content));
    this.body.scrollTop = this.body.scrollHeight;
  }

  begin() {
    this.aborting = new AbortController();
    this.times = { sent: performance.now(), first: 0, last: 0 };
    this.numTokens = 0;
    this.ending = "";
    this.body.setAttribute("aria-busy", "true"); // read aloud when it is whole
    this.stopButton.hidden = false;
    this.card.dataset.state = "running";
    setText(this.figures, "waiting…");
  }

  take(event, text) {
    const choice = event.choices?.[0];
    const added = choice?.text ?? choice?.delta?.content ?? "";
    if (added) {
      const now = performance.now();
      this.times.first ||= now;
      this.times.last = now;
      this.numTokens += 1; // until the server says how many they were
      const atEnd = this.body.scrollHeight - this.body.scrollTop - this.body.clientHeight < 40;
      text.appendData(added);
      if (atEnd) this.body.scrollTop = this.body.scrollHeight;
    }
    if (choice?.finish_reason) this.ending = choice.finish_reason;
    if (event.usage) this.numTokens = event.usage.completion_tokens;
    this.showFigures();
  }

  end(ending = this.ending) {
    this.ending = ending;
    this.settle("done");
    this.showFigures();
  }

  fail(error) {
    this.settle("failed");
    const message = error instanceof ApiError ? error.message : String(error);
    this.body.append(element("p", { className: "reason" }, message));
    setText(this.figures, "");
  }

  settle(state) {
    this.aborting = null;
    this.body.removeAttribute("aria-busy");
    this.stopButton.hidden = true;
    this.card.dataset.state = state;
    this.changed();
  }

  showFigures() {
    const { sent, first, last } = this.times;
    const parts = [];
    if (first) parts.push(`first token ${milliseconds(first - sent)}`);
    if (last > first) {
      parts.push(`${(((this.numTokens - 1) / (last - first)) * 1000).toFixed(1)} tokens/s`);
    }
    if (this.numTokens) parts.push(`${this.numTokens} tokens`);
    if (this.ending) parts.push(this.ending);
    setText(this.figures, parts.join(" · "));
  }
}

const milliseconds = (ms) => (ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(2)} s`);
