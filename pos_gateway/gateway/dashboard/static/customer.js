// The customers' screen.
"use strict";

const CUSTOMER_WORDS = {
  present_card: ["◎", say("Tap here"), say("Hold your card or phone at the reader.")],
  processing: ["…", say("One moment"), say("Keep the card at the reader.")],
  tap_again: ["↻", say("Tap again"), say("The card was taken away too early. Nothing was charged.")],
  remove_card: ["↑", say("Remove card"), ""],
  reader_missing: ["!", say("One moment"), ""],
  approved: ["✓", say("Approved"), say("Thank you.")],
  declined: ["✕", say("Declined"), ""],
  cancelled: ["", say("Welcome"), ""],
  failed: ["!", say("Not approved"), say("Nothing was charged.")],
};
let clearing = 0;
function idle() {
  at("view").dataset.state = "idle";
  for (const id of ["amount", "icon", "sentence"]) at(id).textContent = "";
  at("word").textContent = say("Welcome");
  at("terms").replaceChildren();
}
watch((payments) => {
  const payment = payments.at(-1);
  if (!payment) return;
  clearTimeout(clearing);
  const [icon, word, sentence] = CUSTOMER_WORDS[payment.state];
  at("view").dataset.state = payment.state;
  at("amount").textContent = payment.amount;
  at("icon").textContent = icon;
  at("word").textContent = word;
  at("sentence").textContent = (payment.final && (DATA.language === "zh" ? payment.chinese : payment.english)) || sentence;
  const plan = payment.plan;
  at("terms").replaceChildren(...(plan ? [
    `${plan.periods} × ${plan.instalments[0].total}`,
    say("total {total}, fees {fees}, annual rate (APR) {rate} %", { total: money(plan.total_minor), fees: money(plan.fee_minor), rate: (plan.annual_percentage_rate_ppm / 10000).toFixed(2) }),
  ] : []).map((text) => { const item = document.createElement("li"); item.textContent = text; return item; }));
  if (payment.final) clearing = setTimeout(idle, 8000);
});
