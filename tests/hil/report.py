"""The report of a run: `report.html`, `junit.xml`, and every dialogue with the card as a file that can be
replayed (`dialogues/`, readable by their owner alone: they hold full token numbers)."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from jinja2 import Environment

from pos_gateway.emv.apdu import status_name
from pos_gateway.gateway.readers.probe import Probe
from tests.hil.rig import Log

JUNIT = "junit.xml"

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Hardware in the loop: {{ reader }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100%; margin: 0 0 2rem }
td, th { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #ddd }
td, th { vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
.passed { color: #0a6b2c } .failed, .error { color: #b00020; font-weight: 600 } .skipped { color: #777 }
pre { overflow-x: auto; background: #f6f6f6; padding: .5rem }
</style>
<h1>{{ reader }}</h1>
<table>
{% for name, value in facts.items() %}<tr><th>{{ name }}</th><td>{{ value }}</td></tr>{% endfor %}
</table>
<h2>Tests</h2>
<table><tr><th>test</th><th>outcome</th><th>s</th><th></th></tr>
{% for r in results %}<tr><td>{{ r.name }}</td><td class="{{ r.outcome }}">{{ r.outcome }}</td>
<td class="n">{{ "%.2f"|format(r.duration_s) }}</td>
<td>{% for t in r.texts %}{{ t }}<br>{% endfor %}</td></tr>
{% endfor %}</table>
{% if timings %}<h2>Timing, µs</h2>
<table><tr><th></th><th>times</th><th>p50</th><th>p95</th><th>most</th></tr>
{% for name, t in timings.items() %}<tr><td>{{ name }}</td>
{% for n in t %}<td class="n">{{ n }}</td>{% endfor %}</tr>{% endfor %}</table>{% endif %}
<h2>Dialogues</h2>
<p>Commands and status words; the bytes are in <code>dialogues/</code>.</p>
{% for name, lines in dialogues %}<details><summary>{{ name }}</summary><pre>{% for l in lines %}{{ l }}
{% endfor %}</pre></details>
{% endfor %}
</html>
"""


@dataclass(frozen=True, slots=True)
class Result:
    name: str
    outcome: str
    duration_s: float
    text: str = ""


def write(
    folder: Path, *, reader: str, probed: Probe | None, results: Sequence[Result], log: Log, at: datetime
) -> None:
    """Write all but `junit.xml`, which pytest writes."""
    folder.mkdir(parents=True, exist_ok=True)
    facts: dict[str, object] = {"run with": f"--reader {reader!r}", "at": at.isoformat(timespec="seconds")}
    if probed is not None:
        facts |= {
            "reader": probed.name,
            "driver": probed.driver,
            "model": probed.model or "not one we know",
            "firmware": probed.firmware or "not told",
            "commands to the reader": probed.commands,
            "problem": probed.problem or "none",
        }
    counts = {o: sum(r.outcome == o for r in results) for o in ("passed", "failed", "error", "skipped")}
    facts["result"] = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
    notes: dict[str, list[str]] = {}
    for test, text in log.notes:
        notes.setdefault(test, []).append(text)
    page = (
        Environment(autoescape=True)
        .from_string(_PAGE)
        .render(
            reader=probed.name if probed else reader,
            facts=facts,
            results=[
                {
                    "name": r.name,
                    "outcome": r.outcome,
                    "duration_s": r.duration_s,
                    "texts": [*notes.get(r.name, ()), *([r.text] if r.text else ())],
                }
                for r in results
            ],
            timings=_timings(log.timings_us),
            dialogues=[(f"{n}. {test}", _lines(d.exchanges)) for n, (test, d) in enumerate(log.dialogues, 1)],
        )
    )
    (folder / "report.html").write_text(page)
    place = folder / "dialogues"
    place.mkdir(mode=0o700, exist_ok=True)
    for number, (test, dialogue) in enumerate(log.dialogues, 1):
        path = place / f"{number:03}-{_file_name(test)}.json"
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(dialogue.to_json())


def _timings(timings_us: Mapping[str, Sequence[float]]) -> dict[str, list[int]]:
    out = {}
    for name, times in timings_us.items():
        ordered = sorted(times)
        p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
        out[name] = [len(ordered), round(statistics.median(ordered)), round(p95), round(ordered[-1])]
    return out


def _lines(exchanges: Sequence[tuple[bytes, bytes]]) -> list[str]:
    lines = []
    for command, answer in exchanges:
        header = command[:4].hex(" ").upper()
        sw = int.from_bytes(answer[-2:], "big") if len(answer) >= 2 else 0
        lines.append(
            f"{header}  +{max(0, len(command) - 4):3} bytes   "
            f"{max(0, len(answer) - 2):3} bytes, {status_name(sw) if len(answer) >= 2 else 'no status word'}"
        )
    return lines


def _file_name(test: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in test).strip("-")[:80] or "dialogue"
