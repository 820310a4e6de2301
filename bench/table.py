"""Turn the record of a run into the tables of a page, and judge each target by its number.

python -m bench.table bench.json bench-memory.json docs/performance.md
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BEGIN = "<!-- measured: begin -->"
END = "<!-- measured: end -->"
CACHED = "run_with_cache, everything"
PLAIN = "plain"
GROWTH = "Growth with "
ORDER = (
    "Saturated forward",
    "Blocks",
    "Softmax level",
    "Kernel level",
    "Paired run",
    "Role statistics",
    "Critical scales",
    "Corpus",
    "Scaling curve",
    "Sweep",
    "Norm growth",
    "Report",
    "Start",
    GROWTH,
)
HEADER = (
    "what",
    "input: a plain forward",
    "x plain",
    "by hand, x plain",
    "faster than by hand",
    "peak MB (plain, by hand)",
    "targets",
)

Entry = dict[str, Any]


def tables(record: Entry) -> str:
    """Write everything that stands between the markers of the page."""
    sections = _sections(record)
    parts = [machine(record)]
    for name, entries in sections.items():
        if name.startswith(GROWTH):
            body = _growth(name.removeprefix(GROWTH), entries)
        else:
            body = markdown(HEADER, [row for entry in entries for row in _rows(entry)])
        parts.append(f"### {name}\n\n{body}")
    return "\n\n".join(parts)


def machine(record: Entry) -> str:
    """Describe the machine, without saying whose it is."""
    info = record["machine_info"]
    versions = ", ".join(f"{name} {number}" for name, number in info["versions"].items())
    cpu = info.get("cpu", {}).get("brand_raw", info.get("processor", "unknown"))
    return (
        f"{cpu}, {info['cores']} cores, {info['threads']} thread used; {info['system']}, Python "
        f"{info['python_version']}; {versions}. {record['datetime'][:10]}; load average at the "
        f"end {info['load']:.1f}."
    )


def _sections(record: Entry) -> dict[str, list[Entry]]:
    """Group the entries by section, and join times with memory."""
    joined: dict[tuple[str, str], Entry] = {}
    for benchmark in record["benchmarks"]:
        info = benchmark["extra_info"]
        joined.setdefault((info["section"], info["setting"]), {}).update(info)
    sections: dict[str, list[Entry]] = {}
    for (section, _), entry in sorted(joined.items(), key=lambda item: _place(item[0][0])):
        sections.setdefault(section, []).append(entry)
    return sections


def _place(section: str) -> int:
    """Put forward passes first, what is made of them next, and files last."""
    return next(i for i, start in enumerate(ORDER) if section.startswith(start))


def _rows(entry: Entry) -> Iterator[list[str]]:
    peaks = entry.get("peaks_mb") or {}
    for row in entry["rows"]:
        name = row["name"]
        hand = peaks.get(row.get("by_hand"))
        beside = [f"{value:.0f}" for value in (peaks.get(PLAIN), hand) if value is not None]
        yield [
            name,
            f"{entry['setting']}: {entry['plain_seconds'][0]:.2g} s",
            _spread(row["forwards"]),
            _spread(row.get("hand_forwards")),
            _spread(row.get("speed-up")),
            f"{peaks[name]:.0f} ({', '.join(beside)})" if name in peaks else "",
            "; ".join(_verdict(target, row, entry) for target in row["targets"]),
        ]


def _verdict(target: Entry, row: Entry, entry: Entry) -> str:
    """Say what was asked and whether the number is there; the median counts."""
    bound, peaks = target["bound"], entry.get("peaks_mb") or {}
    peak = peaks.get(row["name"], math.nan)
    seconds, more = row["seconds"][0], row["seconds_more"][0]
    found, asked = {
        "forwards": (row["forwards"][0], f"at most {bound:.4g} forwards"),
        "speed-up": (-row.get("speed-up", [math.nan])[0], f"at least {bound:g} times faster"),
        "seconds": (seconds, f"at most {bound:g} s, found {seconds:.2f}"),
        "seconds more": (more, f"at most {bound:g} s more, found {more:.2f}"),
        "peak MB": (peak, f"at most {bound:.0f} MB"),
        "cached": (
            peak / (peaks.get(CACHED) or math.nan),
            f"at most {bound:g} times the peak of a cached forward",
        ),
    }[target["kind"]]
    if math.isnan(found):
        return f"{asked}: not measured"
    least = -bound if target["kind"] == "speed-up" else bound
    return f"{asked}: {'met' if found <= least else 'missed'}"


def _growth(axis: str, entries: list[Entry]) -> str:
    """Show forwards and MB at each size, and the exponent of time against size."""
    entries = sorted(entries, key=lambda entry: int(entry["setting"]))
    sizes = [int(entry["setting"]) for entry in entries]
    names = [row["name"] for row in entries[0]["rows"]]
    header = [axis, *(f"{size}: forwards, MB" for size in sizes), "time grows as"]
    rows = []
    for i, name in enumerate(names):
        cells, seconds = [], []
        for entry in entries:
            row = entry["rows"][i]
            peak = (entry.get("peaks_mb") or {}).get(name)
            seconds.append(row["seconds"][0])
            cells.append(f"{row['forwards'][0]:.2f}" + ("" if peak is None else f", {peak:.1f}"))
        rows.append([name, *cells, f"{axis}^{_exponent(sizes, seconds):.2f}"])
    return markdown(header, rows)


def _exponent(sizes: list[int], seconds: list[float]) -> float:
    """Fit a power law by least squares on logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return slope / sum((a - mean_x) ** 2 for a in x)


def _spread(numbers: list[float] | None) -> str:
    if numbers is None:
        return ""
    digits = 2 if numbers[0] < 20 else 0
    middle, low, high = (f"{number:.{digits}f}" for number in numbers)
    return f"{middle} [{low}, {high}]"


def markdown(header: Any, rows: list[list[str]]) -> str:
    """Write a table, without the columns that are empty throughout."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [
        [header[i] for i in kept],
        ["---"] * len(kept),
        *([row[i] for i in kept] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(times: Path, memory: Path, page: Path) -> None:
    """Put the tables of two records between the markers of a page."""
    record, other = (json.loads(path.read_text(encoding="utf-8")) for path in (times, memory))
    record["benchmarks"] += other["benchmarks"]
    put_between(page, BEGIN, END, tables(record))


def put_between(page: Path, begin: str, end: str, made: str) -> None:
    """Replace what stands between two markers of a page, and leave the rest alone."""
    text = page.read_text(encoding="utf-8")
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise SystemExit(f"{page} lacks {begin} or {end}, between which the tables go.")
    page.write_text(f"{before}{begin}\n{made}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    write(*map(Path, sys.argv[1:4]))
