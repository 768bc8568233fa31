"""The look of the pages: colours for light, dark and print, type, spacing."""

from __future__ import annotations

from .drawing import HEAT_LEVELS

LIGHT = {
    "ink": "#16202b",
    "muted": "#55626f",
    "grid": "#dfe5ea",
    "surface": "#ffffff",
    "page": "#f4f6f8",
    "line": "#d9e0e6",
    "accent": "#1b5fc1",
    "good": "#176b3a",
    "bad": "#a8321c",
    "series-1": "#2b6fd0",
    "series-2": "#d9631e",
    "series-3": "#7d8a97",
    "series-4": "#1d8a72",
    "series-5": "#9a4fc0",
    "series-6": "#b98a00",
    "series-7": "#c23b6b",
    "series-8": "#4b5bd6",
}
DARK = {
    "ink": "#e8edf2",
    "muted": "#a3afba",
    "grid": "#2b353f",
    "surface": "#161c22",
    "page": "#0e1317",
    "line": "#2b353f",
    "accent": "#7fb2ff",
    "good": "#6fd39a",
    "bad": "#ff9a80",
    "series-1": "#6aa5ff",
    "series-2": "#ff9a5c",
    "series-3": "#8f9ca8",
    "series-4": "#4fcbae",
    "series-5": "#cf8ff2",
    "series-6": "#e5bd4a",
    "series-7": "#ff86ae",
    "series-8": "#98a4ff",
}
HEAT_LIGHT = (("#eef4fb", "#7ba5dc"), ("#3f72bd", "#0b2a57"))
HEAT_DARK = (("#1b2733", "#2d5f9f"), ("#5c9df0", "#dcebff"))
"""Ends of the lower and the upper half of the heat scale. The step between the halves lets dark type on one half and light
type on the other both have a contrast of at least 4.5."""


def stylesheet() -> str:
    """All CSS of a page."""
    light, dark = _variables(LIGHT, HEAT_LIGHT), _variables(DARK, HEAT_DARK)
    themes = f":root{{color-scheme:light dark;{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
    return f"{themes}@media print{{:root{{color-scheme:light;{light}}}}}\n{RULES}"


def heat_colors(halves: tuple[tuple[str, str], tuple[str, str]]) -> list[str]:
    """Colours of all levels of the heat scale."""
    steps = HEAT_LEVELS // 2
    return [_between(start, end, step / (steps - 1)) for start, end in halves for step in range(steps)]


def _variables(colors: dict[str, str], heat: tuple[tuple[str, str], tuple[str, str]]) -> str:
    parts = [f"--{name}:{value}" for name, value in colors.items()]
    parts += [f"--heat-{level}:{color}" for level, color in enumerate(heat_colors(heat))]
    return ";".join(parts)


def _between(start: str, end: str, share: float) -> str:
    a, b = (tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)) for color in (start, end))
    return "#" + "".join(f"{round(x + (y - x) * share):02x}" for x, y in zip(a, b, strict=True))


RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,
sans-serif;
font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main,header.top,footer{max-width:1180px;margin:0 auto;padding:0 24px}
header.top{padding-top:44px;padding-bottom:8px}
h1{font-size:clamp(1.6rem,1.1rem + 2vw,2.4rem);line-height:1.15;letter-spacing:-.02em;margin:0 0 10px;overflow-wrap:anywhere}
h2{font-size:1.35rem;letter-spacing:-.01em;margin:52px 0 14px}
h3{font-size:1rem;margin:0 0 8px}
p{margin:0 0 12px;max-width:76ch}
.lead{font-size:1.12rem;max-width:70ch}
.meta{color:var(--muted);margin:0 0 18px}
a{color:var(--accent)}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.875em}
code{overflow-wrap:anywhere}
pre{background:var(--page);border:1px solid var(--line);border-radius:8px;padding:12px 14px;overflow:auto;margin:0 0 12px;
white-space:pre-wrap;overflow-wrap:anywhere}
.status{display:inline-block;border:1px solid currentColor;border-radius:99px;padding:0 10px;font-size:.85rem;font-weight:600;
vertical-align:2px}
.status.finished{color:var(--good)}.status.failed{color:var(--bad)}.status.running{color:var(--accent)}
.tiles{display:grid;grid-template-columns:repeat(var(--columns,4),minmax(0,1fr));gap:14px;margin:22px 0;padding:0}
.tile,.card,figure{background:var(--surface);border:1px solid var(--line);border-radius:12px}
.tile{padding:16px 18px;margin:0}
.tile dt{color:var(--muted);font-size:.88rem}
.tile dd{margin:0}
.tile .value{font-size:1.6rem;font-weight:650;letter-spacing:-.02em;line-height:1.25;white-space:nowrap}
.tile .note{color:var(--muted);font-size:.86rem;line-height:1.4}
.card{padding:18px 20px;margin:0 0 16px}
.card > :last-child{margin-bottom:0}
.card ul{margin:0;padding-left:20px}.card li{margin:0 0 8px;max-width:86ch}
.warning{border-left:4px solid var(--bad)}
.next{border-left:4px solid var(--accent)}
.figures{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px}
figure{margin:0;padding:18px 20px;min-width:0}
figure.full{grid-column:1/-1}
figure svg{display:block;width:100%;height:auto;overflow:visible}
figure svg text,figure svg tspan{font-family:inherit!important}
figcaption{color:var(--muted);font-size:.88rem;margin-top:10px;max-width:80ch}
.narrow{display:none}.below{margin-top:16px}.card,.split > *,.figures > *{min-width:0}.figures > .card{margin:0}
details{margin-top:10px}
summary{cursor:pointer;color:var(--accent);font-size:.9rem}
.scroll{overflow-x:auto}
.scroll:focus-visible,summary:focus-visible,a:focus-visible{outline:2px solid var(--accent);outline-offset:2px;border-radius:4px}
table{border-collapse:collapse;width:100%;font-size:.93rem}
caption{text-align:left;color:var(--muted);font-size:.88rem;padding-bottom:6px}
th,td{text-align:left;padding:7px 14px 7px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600}
tbody th{overflow-wrap:anywhere;min-width:6em}
thead th{color:var(--muted);font-size:.85rem;white-space:nowrap}
td.n,th.n{text-align:right;white-space:nowrap;padding-left:8px}
tbody tr:last-child > *{border-bottom:0}
.split{display:grid;grid-template-columns:1fr 1fr;gap:16px}
.text{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;max-width:none}
.prompt{color:var(--muted)}@media (min-width:901px){.option{white-space:nowrap}}

.who{color:var(--muted);font-size:.85rem;font-weight:600;margin:0 0 4px}
.facts{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:4px 18px;margin:0}
.facts dt{color:var(--muted)}.facts dd{margin:0;overflow-wrap:anywhere}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
.skip{position:absolute;left:-9999px}.skip:focus{left:12px;top:12px;background:var(--surface);padding:8px 12px;z-index:1}
footer{color:var(--muted);font-size:.88rem;padding-top:36px;padding-bottom:48px}
@media (min-width:901px){.one{grid-template-columns:minmax(0,1fr)}.one figure{display:grid;grid-template-columns:540px minmax(0,1fr);
gap:0 32px;align-items:start}.one figure > h3,.one figure > details{grid-column:1/-1}}
@media (min-width:1000px){.three{grid-template-columns:repeat(3,minmax(0,1fr))}.three .wide{display:none}
.three .narrow{display:block}.three figure{padding:16px}}
@media (min-width:901px){main > section > .card > .stack tbody th{min-width:13.5em}}
@media (max-width:900px){.tiles{grid-template-columns:repeat(3,minmax(0,1fr))}.figures{grid-template-columns:minmax(0,1fr)}
thead th{white-space:normal}}
@media (max-width:640px){main,header.top,footer{padding-left:14px;padding-right:14px}
.split{grid-template-columns:1fr}.wide{display:none}.narrow{display:block}figure,.card{padding:14px 12px}.tiles{
grid-template-columns:1fr 1fr;gap:10px}
.tile{padding:12px}.tile .value{font-size:1.35rem}.facts{grid-template-columns:1fr}.facts dd{margin-bottom:6px}h2{margin-top:38px}}
@media (max-width:640px){.stack thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.stack table,.stack tbody{display:block}.stack tr{display:grid;grid-template-columns:1fr 1fr auto;gap:2px 12px;padding:10px 0;
border-bottom:1px solid var(--line)}.stack tr:last-child{border-bottom:0}.stack th,.stack td{display:block;padding:0;border:0}
.stack th[scope=row]{grid-column:1/-1}.stack td.n{text-align:left}.stack td.n::before{content:attr(data-label);display:block;
color:var(--muted);font-size:.8rem}.stack td:not(.n){grid-column:1/-1;color:var(--muted);font-size:.85rem}
.stack td:empty{display:none}}
@media print{body{background:#fff;font-size:11pt}main,header.top,footer{max-width:none;padding:0}.tile,.card,figure,.split,tr{
break-inside:avoid}
h2,h3{break-after:avoid}details:not([open]){display:none}.skip{display:none}.scroll{overflow:visible}*{print-color-adjust:exact;
-webkit-print-color-adjust:exact}}
"""
