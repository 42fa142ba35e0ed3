// Elements made and changed. What comes from the server or from people becomes text, never HTML.

/** An element with properties, attributes (`aria-*`, `data-*`, `role`, …) and children. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

export const byId = (id) => document.getElementById(id);

/** Sets a text unless it is there already, so that selections and readers are left in peace. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** A button that is busy until what it does has ended. */
export function actionButton(text, act, properties = {}) {
  const button = element("button", { type: "button", textContent: text, ...properties });
  button.addEventListener("click", async () => {
    button.disabled = true;
    button.setAttribute("aria-busy", "true");
    try {
      await act();
    } finally {
      const hadFocus = document.activeElement === document.body;
      button.disabled = false;
      button.removeAttribute("aria-busy");
      if (hadFocus) button.focus(); // a button that is disabled loses it
    }
  });
  return button;
}
