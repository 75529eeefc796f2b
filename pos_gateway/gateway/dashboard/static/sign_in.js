// Signing in, and the first owner.
"use strict";

const pin = at("pin");
for (const key of document.querySelectorAll("[data-key]")) {
  key.addEventListener("click", () => {
    const name = key.dataset.key;
    if (name === "clear") pin.value = "";
    else if (name === "back") pin.value = pin.value.slice(0, -1);
    else if (pin.value.length < 12) pin.value += name;
  });
}
async function enter(path, body, next) {
  at("problem").textContent = "";
  try { await post(path, body); location.assign(next); }
  catch (error) { at("problem").textContent = error.message; pin.value = ""; pin.focus(); }
}
if (at("sign-in")) {
  at("sign-in").addEventListener("submit", (event) => {
    event.preventDefault();
    const member = document.querySelector("input[name=member]:checked");
    enter("/v1/session", { member: member.value, pin: pin.value }, at("sign-in").dataset.next);
  });
} else {
  at("first-owner").addEventListener("submit", (event) => {
    event.preventDefault();
    if (pin.value !== at("again").value) { at("problem").textContent = say("The two PINs differ."); return; }
    enter("/v1/first-owner", { code: at("code").value, name: at("name").value, pin: pin.value }, "/");
  });
}
