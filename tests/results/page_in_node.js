// The script of a trace page in a document that has what the page uses: for machines without a browser.
// node page_in_node.js PAGE < [["click", "#list", 1], ["key", "ArrowRight"], ...]; prints what is shown after each.
"use strict";
const fs = require("fs"), vm = require("vm");
const html = fs.readFileSync(process.argv[2], "utf8");
class Element {
  constructor(tag) { Object.assign(this, {tagName: tag.toUpperCase(), children: [], dataset: {}, attributes: {}, style: {}, listeners: {}, className: "", own: "", value: "", hidden: false, parentElement: null, title: ""}); }
  get classList() { const el = this; return {add: name => { el.className += " " + name; }, remove: name => { el.className = el.className.split(" ").filter(one => one !== name).join(" "); }}; }
  get textContent() { return this.own + this.children.map(one => one.textContent).join(""); }
  set textContent(text) { this.own = String(text); this.children = []; }
  append(...children) { for (const one of children) { one.parentElement = this; this.children.push(one); } }
  replaceChildren(...children) { this.own = ""; this.children = []; this.append(...children); }
  setAttribute(name, value) { this.attributes[name] = value; }
  addEventListener(kind, call) { (this.listeners[kind] ||= []).push(call); }
  closest(selector) { for (let el = this; el; el = el.parentElement) if (selector[0] === "." ? el.className.split(" ").includes(selector.slice(1)) : el.tagName === selector.toUpperCase()) return el; return null; }
  focus() {} blur() {}
  dispatch(kind, event) { for (let el = this; el; el = el.parentElement) for (const call of el.listeners[kind] || []) call(event); }
}
const root = new Element("body"), byId = {};
for (const [, tag, attributes] of html.matchAll(/<(\w+)([^>]*\sid="[^"]*"[^>]*)>/g)) {
  const el = new Element(tag); byId[attributes.match(/\sid="([^"]*)"/)[1]] = el; root.append(el);
}
byId.data.textContent = html.match(/<script type="application\/json" id="data">([\s\S]*?)<\/script>/)[1];
const all = el => [el, ...el.children.flatMap(all)];
const find = id => byId[id] || all(root).find(el => el.id === id) || null;
const document = Object.assign(root, {getElementById: find, createElement: tag => new Element(tag)});
const script = html.match(/<script>([\s\S]*)<\/script>/)[1];
vm.runInNewContext(script, {document, console, URLSearchParams, location: {hash: process.argv[3] || ""}, window: root});
const picture = () => ({
  count: byId.count.textContent, list: byId.list.children.map(one => one.textContent), what: byId.what.textContent, step: byId.stephead.textContent,
  scores: byId.scores.textContent, members: byId.members.children.map(one => one.textContent), strips: byId.strips.children.map(one => one.textContent),
  marked: all(byId.strips).filter(one => one.className.includes("parts")).map(one => one.id), here: all(byId.strips).filter(one => one.className.includes(" here")).map(one => one.id),
  chosen: {system: byId.system.value, beside: byId.beside.value}, options: byId.filter.children.map(one => one.textContent), tags: [...new Set(all(root).map(one => one.tagName))],
});
const shown = [picture()];
for (const [kind, where, value] of JSON.parse(fs.readFileSync(0, "utf8"))) {
  if (kind === "choose") { byId[where].value = String(value); byId[where].dispatch(byId[where].tagName === "INPUT" ? "input" : "change", {}); }
  if (kind === "click") { const target = find(where); target.dispatch("click", {target}); }
  if (kind === "key") root.dispatch("keydown", {key: where, shiftKey: value === "shift", target: root, preventDefault() {}});
  shown.push(picture());
}
process.stdout.write(JSON.stringify(shown));
