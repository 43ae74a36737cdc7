// Light or dark: what the reader chose last, else what the system asks for.
// Loaded in the head, before the first paint, so that no page flashes.
"use strict";

const root = document.documentElement;

function savedTheme() {
  try {
    return localStorage.getItem("theme");
  } catch {
    return null; // storage is switched off; the system's wish decides
  }
}

function show(theme) {
  root.dataset.theme = theme;
  const button = document.querySelector(".theme");
  if (button) {
    button.textContent = theme === "dark" ? "by day" : "by night";
  }
}

function flip() {
  const theme = root.dataset.theme === "dark" ? "light" : "dark";
  try {
    localStorage.setItem("theme", theme);
  } catch {
    // The choice holds for this page only.
  }
  show(theme);
}

const system = matchMedia("(prefers-color-scheme: dark)");
show(savedTheme() ?? (system.matches ? "dark" : "light"));

addEventListener("DOMContentLoaded", () => {
  const button = document.querySelector(".theme");
  button.hidden = false;
  button.addEventListener("click", flip);
  show(root.dataset.theme);
});
