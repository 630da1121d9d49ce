const EVERY = 4000;
function shown() {
  const words = (document.querySelector("input[name=q]")?.value ?? "").toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of document.querySelectorAll("tr[data-text]")) {
    row.hidden = !words.every((word) => row.dataset.text.includes(word));
  }
}
function chosen() {
  const button = document.querySelector("button[data-at-once]");
  if (!button) return;
  const count = document.querySelectorAll("input[name=run]:checked").length;
  button.textContent = count ? `Compare ${count} run${count > 1 ? "s" : ""}` : "Compare the chosen";
  button.disabled = !count || count > Number(button.dataset.atOnce);
}
document.addEventListener("input", (event) => {
  if (event.target.name === "q") shown();
});
document.addEventListener("change", (event) => {
  if (event.target.name === "run") chosen();
  if (event.target.tagName === "SELECT") event.target.form.requestSubmit();
});
async function refresh() {
  // What somebody is pointing at or writing in is left alone.
  if (document.hidden || document.querySelector("main :is(svg, form.filter):is(:hover, :focus-within)")) return true;
  let answer;
  try {
    answer = await fetch(location.href);
  } catch {
    return true;
  }
  if (!answer.ok) return true;
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  const checked = new Set([...document.querySelectorAll("input[name=run]:checked")].map((box) => box.value));
  const written = document.querySelector("input[name=q]")?.value;
  const focused = document.activeElement?.getAttribute("value");
  const main = document.querySelector("main");
  main.replaceChildren(...fresh.querySelector("main").childNodes);
  for (const box of main.querySelectorAll("input[name=run]")) {
    box.checked = checked.has(box.value);
    if (box.value === focused) box.focus();
  }
  const field = main.querySelector("input[name=q]");
  if (field) field.value = written ?? "";
  prepare(main);
  shown();
  chosen();
  return fresh.body.dataset.live === "yes";
}
async function keepFresh() {
  if (await refresh()) setTimeout(keepFresh, EVERY);
}
chosen();
if (document.body.dataset.live === "yes") setTimeout(keepFresh, EVERY);
