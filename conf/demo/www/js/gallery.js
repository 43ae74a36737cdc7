// Opens the gallery's photographs in a dialog; arrow keys leaf through them.
// Without this file the links lead to the photographs themselves.
"use strict";

const links = [...document.querySelectorAll(".gallery a")];
const box = document.querySelector(".lightbox");
const image = box.querySelector("img");
const caption = box.querySelector("span");
let current = 0;

function turnTo(index) {
  current = (index + links.length) % links.length;
  const small = links[current].querySelector("img");
  image.src = links[current].href;
  image.alt = small.alt;
  caption.textContent = `${small.alt} (${current + 1} of ${links.length})`;
}

links.forEach((link, index) => {
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) {
      return; // the reader wants a tab of its own
    }
    event.preventDefault();
    turnTo(index);
    box.showModal();
  });
});

box.querySelector(".previous").addEventListener("click", () => {
  turnTo(current - 1);
});
box.querySelector(".next").addEventListener("click", () => {
  turnTo(current + 1);
});
box.querySelector(".close").addEventListener("click", () => box.close());

box.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") {
    turnTo(current - 1);
  } else if (event.key === "ArrowRight") {
    turnTo(current + 1);
  }
});

box.addEventListener("close", () => {
  image.removeAttribute("src");
  links[current].focus();
});
