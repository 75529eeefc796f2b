"""The report: one HTML page that needs nothing else, for a screen of any size, by day and by night."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

from pos_gateway.lab.simulator.measures import Measures, percent
from pos_gateway.lab.simulator.peers import AVAILABLE_CREDIT, STORE_AND_FORWARD
from pos_gateway.lab.simulator.run import Outcome

_NAMES: Final = {
    "ours": "Reserve principle",
    STORE_AND_FORWARD: "Store-and-forward",
    AVAILABLE_CREDIT: "Available credit",
}
_WIDTH, _HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 14, 12, 34

_STYLE: Final = """
:root{color-scheme:light dark;--ink:#1c2024;--dim:#5c6670;--line:#d9dee3;--ground:#fff;--card:#f6f8fa;
--ours:#0b6e4f;--store_and_forward:#b4451f;--available_credit:#3b5bdb}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--dim:#9aa5b1;--line:#333a42;--ground:#14171a;
--card:#1c2126;--ours:#4cc38a;--store_and_forward:#ff9466;--available_credit:#8ea8ff}}
*{box-sizing:border-box}body{margin:0;background:var(--ground);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:60rem;margin:0 auto;padding:1.25rem 1rem 3rem}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0}h2{font-size:1.1rem;margin:2rem 0 .25rem}
p{margin:.25rem 0;max-width:46rem}.dim{color:var(--dim)}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:.4rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}
th:first-child,td:first-child{text-align:left}th{font-weight:600}
.key{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;margin:.4rem 0;padding:0;list-style:none}
.key li{display:flex;align-items:center;gap:.45rem}.key svg{width:28px;height:10px;flex:none}
figure{margin:.5rem 0 0;background:var(--card);border-radius:8px;padding:.6rem .4rem}
figure svg{display:block;width:100%;height:auto}
svg text{fill:var(--dim);font-size:13px}svg .grid{stroke:var(--line)}
svg .course{fill:none;stroke-width:2.5;stroke-linejoin:round}
.ours{stroke:var(--ours)}.store_and_forward{stroke:var(--store_and_forward);stroke-dasharray:7 4}
.available_credit{stroke:var(--available_credit);stroke-dasharray:2 4}
@media(max-width:40rem){svg text{font-size:22px}th,td{padding:.35rem .4rem}body{font-size:15px}}
"""


def render(outcome: Outcome) -> str:
    """The whole page."""
    size, systems = outcome.size, outcome.systems
    title = f"{size.shops} shops, {size.tokens} cards and phones, {size.days} days"
    charts = [
        _chart(
            "Over the limit",
            "What customers together owe beyond their limits at the end of each day, in thousands.",
            {name: [d.over_limit_minor / 100_000 for d in m.days] for name, m in systems.items()},
        ),
        _chart(
            "Reserve",
            "Credit held for what cut-off shops may still approve, in thousands. The others hold none.",
            {name: [d.reserve_minor / 100_000 for d in m.days] for name, m in systems.items()},
        ),
        _chart(
            "Queue",
            "Payments that wait in shops to be presented.",
            {name: [float(d.queue) for d in m.days] for name, m in systems.items()},
        ),
        _chart(
            "Declined, though there was room",
            "Of each day's taps, per cent that an issuer who knows everything at once would have approved.",
            {name: [percent(d.declined, d.tried) for d in m.days] for name, m in systems.items()},
        ),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Simulated: {escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{escape(title)}, shops without a line {round(100 * size.outage)} % of the time</h1>"
        f'<p class="dim">Seed {size.seed}, {size.clones} copied cards. The same history for all '
        "three; amounts in whole units of the currency.</p>"
        f"{_table(systems)}{''.join(charts)}{_causes(systems)}</main></body></html>\n"
    )


def _table(systems: dict[str, Measures]) -> str:
    told = {name: measures.to_json() for name, measures in systems.items()}
    rows: list[tuple[str, str, str]] = [
        ("Over the limit, worst of each account together", "over_limit_minor", "money"),
        ("Accounts over their limit", "over_limit_accounts", "count"),
        ("Guaranteed to merchants and not paid", "guaranteed_unpaid", "money"),
        ("Taps declined though there was room", "price_taps_percent", "percent"),
        ("Online purchases, on accounts with a phone", "price_online_with_phone_percent", "percent"),
        ("Online purchases, on others", "price_online_without_phone_percent", "percent"),
        ("Copied cards used", "clones_used", "count"),
        ("Copied cards proven", "clones_proven", "count"),
        ("Loss for each copied card", "loss_per_clone_minor", "money"),
    ]
    head = "".join(f'<th scope="col">{escape(_NAMES[name])}</th>' for name in told)
    body = ""
    for label, key, unit in rows:
        cells = "".join(f"<td>{_shown(each[key], unit)}</td>" for each in told.values())
        body += f"<tr><td>{escape(label)}</td>{cells}</tr>"
    return (
        f'<div class="scroll"><table><thead><tr><th scope="col">Measure</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _causes(systems: dict[str, Measures]) -> str:
    ours = systems["ours"]
    rows = []
    for label, tally in (
        ("taps", ours.taps),
        ("online, with a phone", ours.online_with_phone),
        ("online, others", ours.online_without_phone),
    ):
        for cause, share in tally.causes_percent().items():
            rows.append(
                f"<tr><td>{escape(cause.replace('_', ' '))}</td><td>{escape(label)}</td>"
                f"<td>{share:.3f} %</td></tr>"
            )
    return (
        "<h2>What the price is made of</h2><p>Of the reserve principle: declines with room, by cause.</p>"
        '<div class="scroll"><table><thead><tr><th scope="col">Cause</th><th scope="col">Of</th>'
        f'<th scope="col">Share</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _shown(value: object, unit: str) -> str:
    number = float(value) if isinstance(value, int | float) else 0.0
    if unit == "money":
        return f"{number / 100:,.2f}"
    return f"{number:.2f} %" if unit == "percent" else f"{number:,.0f}"


def _chart(title: str, says: str, courses: dict[str, list[float]]) -> str:
    days = max(len(course) for course in courses.values())
    top = _round_up(max((max(course, default=0.0) for course in courses.values()), default=0.0))
    inner_width, inner_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(day: float) -> float:
        return _LEFT + inner_width * day / max(days - 1, 1)

    def y(value: float) -> float:
        return _TOP + inner_height * (1 - value / top)

    parts = []
    for step in range(5):
        value = top * step / 4
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" '
            f'y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
            f'<text x="{_LEFT - 8}" y="{y(value) + 5:.1f}" text-anchor="end">{_number(value)}</text>'
        )
    for step in range(5):
        day = (days - 1) * step / 4
        anchor = "start" if step == 0 else "end" if step == 4 else "middle"
        parts.append(
            f'<text x="{x(day):.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}">day {round(day) + 1}</text>'
        )
    for name, course in courses.items():
        points = " ".join(f"{x(day):.1f},{y(value):.1f}" for day, value in enumerate(course))
        parts.append(f'<polyline class="course {name}" points="{points}"/>')
    key = "".join(
        f'<li><svg viewBox="0 0 28 10" aria-hidden="true">'
        f'<line class="course {name}" x1="0" x2="28" y1="5" y2="5"/></svg>'
        f"{escape(_NAMES[name])}: {_number(_last(course))} at the end</li>"
        for name, course in courses.items()
    )
    return (
        f'<section><h2>{escape(title)}</h2><p>{escape(says)}</p><ul class="key">{key}</ul>'
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}, day by day">'
        f"{''.join(parts)}</svg></figure></section>"
    )


def _last(course: Sequence[float]) -> float:
    return course[-1] if course else 0.0


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 8 or 10 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 1.0
    while power * 10 <= value:
        power *= 10
    while power > value:
        power /= 10
    return next(step * power for step in (1, 2, 4, 8, 10) if step * power >= value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.2g}"
