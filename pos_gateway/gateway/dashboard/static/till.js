// The till page: draws what /v1/events tells. Everything is set as text, never as markup.
"use strict";

const at = (id) => document.getElementById(id);
const WORDS = {
  present_card: ["◎", "Present card", "Waiting for a card or phone at the reader."],
  processing: ["…", "Processing", "Keep the card at the reader."],
  tap_again: ["↻", "Tap again", "The card was taken away too early. Nothing was charged; tap the same card again."],
  remove_card: ["↑", "Remove card", "Take the last card away first."],
  reader_missing: ["!", "Reader missing", "Check the reader's cable."],
  approved: ["✓", "Approved", "Recorded on this till. The merchant will be paid."],
  declined: ["✕", "Declined", ""],
  cancelled: ["–", "Cancelled", "Nothing was charged."],
  failed: ["!", "Not approved", ""],
};
const FRESHNESS = { fresh: "Fresh", stale: "Getting old", expired: "Expired", not_yet_valid: "Not yet valid" };
let status = null;
let current = null;

function uuid7() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  let now = Date.now();
  for (let i = 5; i >= 0; i--) { bytes[i] = now % 256; now = Math.floor(now / 256); }
  bytes[6] = 0x70 | (bytes[6] & 0x0f);
  bytes[8] = 0x80 | (bytes[8] & 0x3f);
  const hex = Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("");
  return `${hex.slice(0, 8)}-${hex.slice(8, 12)}-${hex.slice(12, 16)}-${hex.slice(16, 20)}-${hex.slice(20)}`;
}

function ago(unixMs) {
  const s = Math.max(0, Math.round((Date.now() - unixMs) / 1000));
  if (s < 90) return `${s} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  if (s < 129600) return `${Math.round(s / 3600)} h`;
  return `${Math.round(s / 86400)} days`;
}

function drawPayment(payment) {
  current = payment;
  const [icon, word, sentence] = WORDS[payment.state];
  at("payment").dataset.state = payment.state;
  at("amount").textContent = payment.amount;
  at("icon").textContent = icon;
  at("word").textContent = word;
  at("sentence").textContent = payment.final && payment.english ? payment.english : sentence || payment.message;
  at("cancel").hidden = payment.final;
  at("start").disabled = !payment.final;
}

function showIdle() {
  at("payment").dataset.state = "idle";
  at("amount").textContent = "–";
  at("icon").textContent = "○";
  at("word").textContent = "Ready";
}

function drawStatus(next) {
  status = next;
  at("merchant").textContent = `${next.merchant.name} · ${next.terminal_id}`;
  at("order-currency").textContent = next.currency;
  const line = at("line");
  line.className = `chip ${next.line.up ? "up" : next.line.up === false ? "down" : "unknown"}`;
  line.textContent = next.line.up ? "Line to the ledger is up"
    : next.line.up === false ? "Off the network – taps still work" : "Line not tried yet";
  drawAges();
  at("queue-amount").textContent = next.queue.amount;
  const bar = at("queue-bar");
  bar.style.width = `${Math.min(100, next.queue.share_of_cap_percent)}%`;
  bar.className = next.queue.share_of_cap_percent > 80 ? "near" : "";
  at("readers").replaceChildren(...(next.lanes.length ? next.lanes : [null]).map((lane) => {
    const item = document.createElement("li");
    item.textContent = lane ? `${lane.busy ? "●" : "○"} ${lane.reader}` : "No reader is connected.";
    return item;
  }));
  at("recent").replaceChildren(...next.recent.map((payment) => {
    const row = document.createElement("tr");
    const cells = [
      new Date(payment.at_unix_ms).toLocaleTimeString(), payment.amount,
      payment.token_last4 ? `•••• ${payment.token_last4}` : "–", payment.result, payment.ledger,
    ];
    for (const text of cells) row.insertCell().textContent = text;
    row.cells[3].className = payment.approved ? "approved" : "declined";
    return row;
  }));
  at("recent-empty").hidden = next.recent.length > 0;
}

const BOUNDS = {
  unsynchronised_count: "the number of payments that may wait",
  unsynchronised_amount: "the amount that may wait",
  unsynchronised_age: "how long the oldest payment may wait",
  limits_stale: "limits to be refreshed; then smaller taps only",
  limits_expire: "the end of the limits here",
  no_limits: "no valid limits are here",
  clock: "the clock is not trusted",
};

function forecastSentence(forecast) {
  const bound = BOUNDS[forecast.first] || forecast.first;
  if (forecast.stopped) return `Without a line nothing more can be approved: ${bound}.`;
  const at = forecast.first_at_unix_ms
    ? `, about ${new Date(forecast.first_at_unix_ms).toLocaleString()}` : "";
  return `Without a line: ${forecast.amount_left} more, one tap up to ${forecast.per_tap_cap}. `
    + `First comes ${bound}${at}.`;
}

function drawAges() {
  if (!status) return;
  const { queue, snapshot } = status;
  at("queue-text").textContent = queue.count === 0 ? "Everything has reached the ledger."
    : `${queue.count} payment${queue.count === 1 ? "" : "s"}, the oldest ${ago(queue.oldest_at_unix_ms)} old. `
      + `Up to ${queue.cap} can wait.`;
  at("forecast-text").textContent = forecastSentence(status.forecast);
  at("limits-word").textContent = snapshot ? FRESHNESS[snapshot.freshness] : "None";
  at("limits-text").textContent = snapshot
    ? `Version ${snapshot.version}, ${snapshot.count} cards, ${ago(snapshot.valid_from_unix_s * 1000)} old; `
      + `good until ${new Date(snapshot.valid_until_unix_s * 1000).toLocaleString()}.`
    : "Nothing can be approved until limits have been fetched.";
  at("limits-error").hidden = !status.snapshot_problem;
  at("limits-error").textContent = status.snapshot_problem;
}

async function post(path, body) {
  const response = await fetch(path, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  });
  const answer = await response.json();
  if (!response.ok) throw new Error(`${answer.error.reason}${answer.error.advice ? ` – ${answer.error.advice}` : ""}`);
  return answer;
}

function minorUnits(text, exponent) {
  const match = /^(\d{1,10})(?:\.(\d+))?$/.exec(text.trim());
  const decimals = match && (match[2] || "");
  if (!match || decimals.length > exponent) return null;
  return Number(match[1] + decimals.padEnd(exponent, "0"));
}

at("order").addEventListener("submit", async (event) => {
  event.preventDefault();
  const amount_minor = minorUnits(at("order-amount").value, status.currency_exponent);
  try {
    if (!amount_minor) throw new Error("Write the amount like 19.30.");
    drawPayment(await post("/v1/payments", { id: uuid7(), amount_minor, currency: status.currency }));
    at("order-amount").value = "";
  } catch (error) {
    if (!current || current.final) showIdle();
    at("sentence").textContent = error.message;
  }
});
at("cancel").addEventListener("click", () => current && post(`/v1/payments/${current.id}/cancel`, {}));
at("synchronise").addEventListener("click", () => post("/v1/synchronise", {}));

const events = new EventSource("/v1/events");
events.addEventListener("payment", (event) => drawPayment(JSON.parse(event.data)));
events.addEventListener("status", (event) => drawStatus(JSON.parse(event.data)));
events.addEventListener("error", () => {
  at("line").className = "chip lost";
  at("line").textContent = "This page lost its gateway – retrying";
});
setInterval(drawAges, 1000);
