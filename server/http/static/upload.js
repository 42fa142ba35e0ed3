// Files and folders that are dropped or picked, sent as an adapter.

import { upload } from "./api.js";
import { byId, element, setText } from "./element.js";

// What an adapter is made of. Of a folder nothing else is sent, and what is left out is named.
const FILES = ["adapter_config.json", "adapter_model.safetensors", "kasa_meta.json", "README.md"];

export class Upload {
  constructor({ refresh }) {
    this.refresh = refresh;
    this.files = [];
    this.aborting = null;
    this.form = byId("upload");
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    byId("files").addEventListener("change", (event) => this.pick(event.target));
    byId("folder").addEventListener("change", (event) => this.pick(event.target));
    byId("cancel-upload").addEventListener("click", () => this.cancel());
    // Anywhere: a file that misses the box would else be opened in place of the page.
    document.addEventListener("dragover", (event) => this.onDrag(event));
    document.addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) this.form.classList.remove("over");
    });
    document.addEventListener("drop", (event) => this.onDrop(event));
  }

  onDrag(event) {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    this.form.classList.add("over");
  }

  async onDrop(event) {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    this.form.classList.remove("over");
    // Entries are to be asked for at once: afterwards the browser forgets them.
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.());
    const loose = [...event.dataTransfer.files];
    const folder = entries.find((entry) => entry?.isDirectory);
    try {
      this.choose(folder ? await filesOf(folder) : loose, folder?.name ?? "");
    } catch (error) {
      this.say(`The folder cannot be read: ${error.message}`, "bad");
    }
  }

  pick(input) {
    const files = [...input.files];
    const folder = files[0]?.webkitRelativePath.split("/")[0] ?? "";
    const direct = files.filter((file) => file.webkitRelativePath.split("/").length <= 2);
    if (files.length) this.choose(direct, folder);
    input.value = ""; // so that picking the same again is a change
  }

  /** These are to be sent, out of a folder or (name "") by themselves. */
  choose(files, folder) {
    if (this.aborting) return;
    const isSent = (file) => !folder || FILES.includes(file.name);
    const left = files.filter((file) => !isSent(file)).map((file) => file.name);
    this.files = files.filter(isSent);
    byId("chosen").hidden = !this.files.length;
    byId("chosen-files").replaceChildren(
      ...this.files.map((file) =>
        element("li", {}, element("span", {}, file.name), element("small", {}, size(file.size))),
      ),
    );
    if (!this.files.length) {
      this.say(`There is no ${FILES.slice(0, 2).join(" and no ")} in it.`, "bad");
      return;
    }
    if (folder) byId("upload-name").value = nameOf(folder);
    this.say(left.length ? `Left out: ${left.slice(0, 5).join(", ")}${left.length > 5 ? "…" : ""}` : "");
    byId("upload-name").focus();
    byId("upload-name").select();
  }

  async send() {
    if (this.aborting || !this.files.length) return;
    const name = byId("upload-name").value;
    const bar = byId("upload-progress");
    const showProgress = (done) => {
      bar.value = done;
      if (done === 1) this.say("The server checks it…");
    };
    this.aborting = new AbortController();
    bar.value = 0;
    bar.hidden = false;
    this.say("Sending…");
    try {
      const made = await upload(name, this.files, showProgress, this.aborting.signal);
      this.forget();
      this.say(`${made.name} is there, version ${made.version.slice(0, 12)}.`, "good");
      await this.refresh();
    } catch (error) {
      if (error.name === "AbortError") this.say("Cancelled.");
      else this.say(error.message, "bad");
    } finally {
      this.aborting = null;
      bar.hidden = true;
    }
  }

  cancel() {
    if (this.aborting) {
      this.aborting.abort();
      return;
    }
    this.forget();
    this.say("");
  }

  forget() {
    this.files = [];
    byId("chosen").hidden = true;
    byId("upload-name").value = "";
  }

  say(text, kind = "") {
    byId("upload-note").dataset.kind = kind;
    setText(byId("upload-note"), text);
  }
}

/** The files right in a folder that was dropped. */
async function filesOf(folder) {
  const reader = folder.createReader();
  const files = [];
  for (;;) {
    const entries = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!entries.length) return files;
    for (const entry of entries.filter((entry) => entry.isFile)) {
      files.push(await new Promise((resolve, reject) => entry.file(resolve, reject)));
    }
  }
}

/** A name that an adapter may have, made of a folder's. */
const nameOf = (folder) =>
  folder
    .toLowerCase()
    .replace(/[^a-z0-9._-]+/g, "-")
    .replace(/^[^a-z0-9]+/, "")
    .slice(0, 63);

const UNITS = ["bytes", "KiB", "MiB", "GiB"];

export function size(bytes) {
  const power = bytes ? Math.min(Math.floor(Math.log2(bytes) / 10), UNITS.length - 1) : 0;
  return `${(bytes / 1024 ** power).toFixed(power ? 1 : 0)} ${UNITS[power]}`;
}
