// Staff, programs, the second screen.
"use strict";

const tried = (work) => async (event) => {
  event.preventDefault();
  try { await work(event); } catch (error) { toast(error.message); }
};
if (at("add-member")) {
  at("add-member").addEventListener("submit", tried(async () => {
    await post("/v1/staff", { name: at("member-name").value, role: at("member-role").value, pin: at("member-pin").value });
    location.reload();
  }));
  at("add-token").addEventListener("submit", tried(async () => {
    const made = await post("/v1/tokens", { name: at("token-name").value, role: at("token-role").value });
    at("new-token").querySelector("code").textContent = made.token;
    at("new-token").hidden = false;
  }));
  let whose = "";
  for (const button of document.querySelectorAll("[data-pin]")) button.addEventListener("click", () => {
    whose = button.dataset.pin;
    at("pin-name").textContent = `PIN · ${button.dataset.name}`;
    at("new-pin").value = "";
    at("pin-dialog").showModal();
  });
  at("pin-close").addEventListener("click", () => at("pin-dialog").close());
  at("pin-form").addEventListener("submit", tried(async () => {
    await post(`/v1/staff/${whose}`, { pin: at("new-pin").value });
    at("pin-dialog").close();
    toast(say("The new PIN counts from now on."));
  }));
  for (const button of document.querySelectorAll("[data-member]")) button.addEventListener("click", tried(async () => {
    await post(`/v1/staff/${button.dataset.member}`, { active: button.dataset.active === "true" });
    location.reload();
  }));
  for (const button of document.querySelectorAll("[data-token]")) button.addEventListener("click", tried(async () => {
    await post(`/v1/tokens/${button.dataset.token}/remove`);
    location.reload();
  }));
}
at("make-display").addEventListener("click", tried(async () => {
  await post("/v1/displays");
  await post("/v1/session/end");
  location.assign("/customer");
}));
