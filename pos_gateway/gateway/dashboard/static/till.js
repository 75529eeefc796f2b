// The till: an amount, a tap, a result, the next customer.
"use strict";

const WORDS = {
  idle: ["○", say("Ready"), say("Enter an amount to take a payment.")],
  present_card: ["◎", say("Present card"), say("Hold the card or phone at the reader.")],
  processing: ["…", say("Processing"), say("Keep the card at the reader.")],
  tap_again: ["↻", say("Tap again"), say("The card was taken away too early. Nothing was charged; tap the same card again.")],
  remove_card: ["↑", say("Remove card"), say("Take the last card away first.")],
  reader_missing: ["!", say("Reader missing"), say("Check the reader's cable.")],
  approved: ["✓", say("Approved"), say("Recorded on this till. You will be paid.")],
  declined: ["✕", say("Declined"), ""],
  cancelled: ["–", say("Cancelled"), say("Nothing was charged.")],
  failed: ["!", say("Not approved"), ""],
};
const lanes = new Map();
let lane = "", drawn = "";
const mine = () => lanes.get(lane) || null;

function drawLanes(status) {
  for (const name of [...lanes.keys()]) if (!status.lanes.some((l) => l.name === name)) lanes.delete(name);
  if (status.lanes.length && !status.lanes.some((l) => l.name === lane)) lane = status.lanes[0].name;
  at("lanes").hidden = status.lanes.length < 2;
  const shape = JSON.stringify([lane, status.lanes, [...lanes].map(([n, p]) => [n, p && p.state])]);
  if (shape === drawn) return;
  drawn = shape;
  at("lanes").replaceChildren(...status.lanes.map((one) => {
    const button = document.createElement("button"), payment = lanes.get(one.name);
    button.type = "button";
    button.textContent = `${payment ? WORDS[payment.state][0] : "○"} ${one.name} · ${one.reader}`;
    button.setAttribute("aria-pressed", String(one.name === lane));
    button.addEventListener("click", () => { lane = one.name; draw(); drawLanes(live.status); });
    return button;
  }));
}

function facts(payment) {
  const rows = [];
  if (payment.token_last4) rows.push([say("Card"), `•••• ${payment.token_last4}`]);
  if (payment.sequence) rows.push([say("Approval"), String(payment.sequence % 1000000).padStart(6, "0")]);
  if (payment.plan) rows.push([say("Instalments"), `${payment.plan.periods} × ${payment.plan.instalments[0].total}`]);
  return rows.flatMap(([name, value]) => {
    const term = document.createElement("dt"), text = document.createElement("dd");
    term.textContent = name; text.textContent = value;
    return [term, text];
  });
}

function draw() {
  const payment = mine(), state = payment ? payment.state : "idle";
  const [icon, word, sentence] = WORDS[state];
  const changed = at("till").dataset.state !== state;
  at("till").dataset.state = state;
  at("result-icon").textContent = icon;
  at("result-word").textContent = word;
  at("result-amount").textContent = payment ? payment.amount : "";
  const told = payment && payment.final && payment.english ? (DATA.language === "zh" ? payment.chinese : payment.english) : "";
  at("result-sentence").textContent = told || sentence || (payment ? payment.message : "");
  at("result-facts").replaceChildren(...(payment && payment.final ? facts(payment) : []));
  const final = Boolean(payment && payment.final), journalled = state === "approved" || state === "declined";
  at("next").hidden = !final;
  at("cancel").hidden = !payment || final;
  at("receipt").hidden = !journalled;
  if (journalled) at("receipt").href = `/transactions/${payment.id}/receipt?copy=customer`;
  if (at("print")) at("print").hidden = !journalled;
  at("start").disabled = Boolean(payment && !final);
  if (changed && final) at("next").focus();
  if (changed && state === "idle") at("amount").focus();
}

watch((payments, status) => {
  for (const payment of payments) {
    // A payment cleared here stays cleared; a new one on the lane is shown whoever began it.
    const shown = lanes.get(payment.lane);
    if (payment.lane && !(cleared.has(payment.id) && payment.final) && !(shown && shown.id === payment.id && shown.final && !payment.final))
      lanes.set(payment.lane, payment);
  }
  if (status) drawLanes(status);
  draw();
});
const cleared = new Set();

// Instalments
let quoted = 0;
async function quotes() {
  const amount = minorUnits(at("amount").value), asked = ++quoted;
  if (!amount) { at("plans").hidden = true; at("plan-list").replaceChildren(); return; }
  let offers = [];
  try {
    const response = await fetch(`/v1/offers?amount_minor=${amount}`);
    if (response.ok) offers = (await response.json()).offers;
  } catch { /* paid in full then */ }
  if (asked !== quoted) return;
  at("plans").hidden = offers.length === 0;
  const choices = [[null, say("In full"), money(amount)]].concat(offers.map((plan) => [
    plan,
    `${plan.periods} × ${plan.instalments[0].total}`,
    say("total {total}, fees {fees}, annual rate (APR) {rate} %", {
      total: money(plan.total_minor), fees: money(plan.fee_minor), rate: (plan.annual_percentage_rate_ppm / 10000).toFixed(2),
    }),
  ]));
  at("plan-list").replaceChildren(...choices.map(([plan, title, terms], index) => {
    const label = document.createElement("label"), input = document.createElement("input");
    const text = document.createElement("span"), strong = document.createElement("strong"), small = document.createElement("small");
    label.className = "plan"; input.type = "radio"; input.name = "plan"; input.checked = index === 0;
    if (plan) { input.dataset.offer = plan.offer; input.dataset.periods = plan.periods; }
    strong.textContent = title; small.textContent = terms;
    text.append(strong, small); label.append(input, text);
    return label;
  }));
}
let typing = 0;
at("amount").addEventListener("input", () => {
  at("amount-problem").textContent = "";
  clearTimeout(typing);
  typing = setTimeout(quotes, 250);
});

document.querySelector(".keys").addEventListener("click", (event) => {
  const key = event.target.dataset.key, field = at("amount");
  if (!key) return;
  if (key === "back") field.value = field.value.slice(0, -1);
  else if (key !== "." || !field.value.includes(".")) {
    const next = field.value + key;
    if (minorUnits(next === "." ? "0." : next) !== null) field.value = next === "." ? "0." : next;
  }
  field.dispatchEvent(new Event("input"));
});

at("order").addEventListener("submit", async (event) => {
  event.preventDefault();
  const payment = mine();
  if (payment && !payment.final) return;
  const amount_minor = minorUnits(at("amount").value);
  if (!amount_minor) { at("amount-problem").textContent = say("Write the amount like 19.30."); return; }
  const order = { id: uuid7(), amount_minor, currency: DATA.currency };
  if (lane) order.lane = lane;
  const chosen = document.querySelector("#plan-list input:checked");
  if (chosen && chosen.dataset.offer) order.plan = { offer: chosen.dataset.offer, periods: Number(chosen.dataset.periods) };
  at("start").disabled = true;
  try {
    const begun = await post("/v1/payments", order);
    lane = begun.lane || lane;
    const shown = lanes.get(lane);
    if (!(shown && shown.id === begun.id)) lanes.set(lane, begun);
    at("amount").value = ""; quotes();
  } catch (error) { at("amount-problem").textContent = error.message; }
  draw();
});

function next() {
  const payment = mine();
  if (!payment || !payment.final) return;
  cleared.add(payment.id);
  if (cleared.size > 50) cleared.delete(cleared.values().next().value);
  lanes.delete(lane);
  draw();
}
at("next").addEventListener("click", next);
at("cancel").addEventListener("click", () => { const p = mine(); if (p) post(`/v1/payments/${p.id}/cancel`).catch((e) => toast(e.message)); });
if (at("print")) at("print").addEventListener("click", () => post(`/v1/payments/${mine().id}/print`, { copy: "customer", language: DATA.language }).then(() => toast(say("Printed.")), (e) => toast(e.message)));

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const payment = mine();
  if (event.key === "Escape" && payment) { if (payment.final) next(); else at("cancel").click(); }
  else if (/^[0-9.]$/.test(event.key) && !["INPUT", "SELECT"].includes(event.target.tagName)) {
    if (payment && payment.final) next();
    if (!mine()) { at("amount").focus(); }
  }
});
draw();
