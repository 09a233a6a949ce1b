"use strict";
// What is shown stands in the address: #dropped, #bucket=13x64x64, #group=2, #warned&q=red+ball
const KINDS = ["train", "heldout", "dropped", "warned", "duplicate"];
const cards = [...document.querySelectorAll("article")].map((card) => ({
  card,
  kinds: card.className.split(" "),
  buckets: card.dataset.buckets.split(" "),
  group: card.dataset.group,
  words: card.textContent.toLowerCase(),
}));
const [bucket, search, shown] = ["select", "input", "output"].map((name) => document.querySelector("nav " + name));

function asked() {
  return new URLSearchParams(location.hash.slice(1));
}

function show() {
  const query = asked();
  const kind = KINDS.find((name) => query.has(name)) ?? "";
  const group = query.get("group");
  const words = (query.get("q") ?? "").toLowerCase();
  bucket.value = query.get("bucket") ?? "";
  if (document.activeElement !== search) search.value = query.get("q") ?? "";
  for (const link of document.querySelectorAll("nav a"))
    link.setAttribute("aria-current", link.dataset.kind === kind);
  let count = 0;
  for (const one of cards) {
    const wanted =
      (!kind || one.kinds.includes(kind)) &&
      (!bucket.value || one.buckets.includes(bucket.value)) &&
      (!group || one.group === group) &&
      one.words.includes(words);
    one.card.hidden = !wanted;
    count += wanted;
  }
  shown.textContent = `${count} of ${cards.length} shown`;
}

function ask(name, value) {
  const query = asked();
  for (const other of name === "kind" ? [...KINDS, "group"] : [name]) query.delete(other);
  if (name === "kind" && value) query.set(value, "");
  else if (value) query.set(name, value);
  location.replace("#" + query.toString().replace(/=(?=&|$)/g, ""));
}

for (const link of document.querySelectorAll("nav a"))
  link.addEventListener("click", (event) => {
    event.preventDefault();
    ask("kind", link.dataset.kind);
  });
bucket.addEventListener("change", () => ask("bucket", bucket.value));
search.addEventListener("input", () => ask("q", search.value));
addEventListener("hashchange", show);
show();
