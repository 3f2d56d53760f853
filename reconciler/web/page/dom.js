// Making elements without markup in strings: what comes from the log is only ever text.

export const $ = (id) => document.getElementById(id);

export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function svg(tag, attributes = {}) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// Tables keep their roles, because a narrow window shows each row as a block.
export const cell = (label, ...children) => el("td", { role: "cell", "data-label": label }, ...children);
export const head = (text, number) => el("th", { role: "columnheader", scope: "col", class: number ? "number" : null }, text);
export const row = (...cells) => el("tr", { role: "row" }, ...cells);

// Brings the children of a node to what they should be, keeping every element that is still right: an
// element that is replaced between press and release of a button loses the click, and the focus with it.
export function replace(parent, children) {
  children.forEach((child, at) => {
    const old = parent.childNodes[at];
    if (old) morph(old, child);
    else parent.append(child);
  });
  while (parent.childNodes.length > children.length) parent.lastChild.remove();
}

function morph(old, wanted) {
  if (old.nodeType !== wanted.nodeType || old.nodeName !== wanted.nodeName || keyOf(old) !== keyOf(wanted)) {
    old.replaceWith(wanted);
  } else if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== wanted.data) old.data = wanted.data;
  } else {
    for (const { name } of [...old.attributes]) if (!wanted.hasAttribute(name)) old.removeAttribute(name);
    for (const { name, value } of wanted.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    replace(old, [...wanted.childNodes]);
  }
}

// Elements with a key listen for something; only one with the same key listens for the same.
const keyOf = (node) => node.dataset?.key;

export function show(node, text) {
  node.hidden = !text;
  node.textContent = text || "";
}
