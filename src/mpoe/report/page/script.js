"use strict";
// The theme follows the system until the button is pressed; the choice is kept where the browser allows it.
const root = document.documentElement, button = document.getElementById("theme");
const system = matchMedia("(prefers-color-scheme: dark)");
function stored(value) {
  try {
    return value === undefined ? localStorage.getItem("mpoe-theme") : localStorage.setItem("mpoe-theme", value);
  } catch { return null; }
}
function showTheme(theme) {
  const dark = theme ? theme === "dark" : system.matches;
  if (theme) root.dataset.theme = theme;
  button.setAttribute("aria-pressed", String(dark));
}
button.addEventListener("click", () => {
  const next = button.getAttribute("aria-pressed") === "true" ? "light" : "dark";
  stored(next);
  showTheme(next);
});
system.addEventListener("change", () => showTheme(root.dataset.theme));
const before = stored();
showTheme(before === "dark" || before === "light" ? before : undefined);

// A slider names its stop, and shows it.
function onSlide(id, show) {
  const slider = document.getElementById(id), output = document.querySelector(`output[for="${id}"]`);
  const names = JSON.parse(slider.dataset.names);
  const update = () => {
    const at = Number(slider.value);
    output.textContent = names[at];
    slider.setAttribute("aria-valuetext", names[at]);
    show(at);
  };
  slider.addEventListener("input", update);
  update();
}

for (const group of document.querySelectorAll("[data-switch]")) {
  onSlide(group.dataset.switch, (at) => {
    [...group.children].forEach((child, n) => { child.hidden = n !== at; });
  });
}

for (const table of document.querySelectorAll("[data-heat]")) {
  const values = JSON.parse(table.dataset.values), most = Math.min(100000, 3 * Number(table.dataset.even));
  const rows = [...table.tBodies[0].rows].map((row) => [...row.querySelectorAll("td")]);
  onSlide(table.dataset.heat, (at) => {
    rows.forEach((cells, layer) => cells.forEach((cell, expert) => {
      const value = values[at][layer][expert], heat = Math.min(1, (value || 0) / most);
      cell.textContent = value === null ? "–" : String(Math.round(value / 1000));
      cell.style.setProperty("--heat", `${Math.round(heat * 100)}%`);
      // where text has more contrast in the other colour: in the dark theme sooner than in the light one
      cell.classList.toggle("hot", heat > 0.54);
      cell.classList.toggle("hottest", heat > 0.68);
    }));
  });
}

for (const text of document.querySelectorAll("[data-tokens]")) {
  const choices = JSON.parse(text.dataset.choices), tokens = [...text.querySelectorAll(".token")];
  const counts = [...document.querySelectorAll(`[data-counts="${text.dataset.tokens}"] span`)];
  onSlide(text.dataset.tokens, (at) => {
    const of = counts.map(() => 0);
    tokens.forEach((token, n) => {
      const [experts, probability] = choices[at][n];
      token.className = experts.length ? `token e${experts[0] % 8}` : "token none";
      token.title = experts.length
        ? `expert ${experts.join(", then ")}, probability ${probability}%` : "dropped: its expert was full";
      token.lastElementChild.textContent = experts.length ? experts.join("·") : "–";
      if (experts.length) of[experts[0]] += 1;
    });
    counts.forEach((count, e) => { count.textContent = String(of[e]); });
  });
}
