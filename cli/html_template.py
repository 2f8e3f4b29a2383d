"""The page that `html_report` fills: one Jinja template with its style, no scripts, no links."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbf9f4; --card: #ffffff; --ink: #1f1d1a; --muted: #6a655c; --line: #e3ddd0;
  --before: #d8cdb8; --after: #12706b; --damage: #bf4328;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Book Antiqua", Georgia, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #161513; --card: #1e1c1a; --ink: #ece7dc; --muted: #a49d90; --line: #35322d;
    --before: #575044; --after: #4fb5ac; --damage: #f08062;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 var(--sans);
  font-variant-numeric: tabular-nums;
}
main { max-width: 1180px; margin: 0 auto; padding: 40px 32px 64px; }
header { border-bottom: 2px solid var(--ink); padding-bottom: 14px; margin-bottom: 28px; }
h1 {
  font: 600 34px/1.2 var(--serif); margin: 0 0 6px; letter-spacing: -0.01em;
  overflow-wrap: anywhere;
}
h2 { font: 600 22px/1.3 var(--serif); margin: 48px 0 4px; }
h3 { font: 600 15px/1.4 var(--sans); margin: 24px 0 4px; }
p { margin: 4px 0 12px; max-width: 75ch; }
td.name, td.code { font: 12px/1.6 var(--mono); }
td.name { overflow-wrap: anywhere; }
td.code { white-space: nowrap; }
.quiet { color: var(--muted); }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(155px, 1fr)); gap: 14px;
  margin: 0 0 24px;
}
.tile {
  background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 12px 14px;
}
.tile b { display: block; font: 600 25px/1.3 var(--serif); }
.tile span { color: var(--muted); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; margin: 8px 0 12px; }
th {
  text-align: left; font-weight: 600; color: var(--muted); white-space: nowrap;
  border-bottom: 1px solid var(--muted); padding: 5px 14px 5px 0; vertical-align: bottom;
}
td { border-bottom: 1px solid var(--line); padding: 5px 14px 5px 0; vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
td.name { min-width: 205px; }
td.text { min-width: 110px; }
.number { text-align: right; white-space: nowrap; }
th.number { white-space: normal; }
.bad td { color: var(--damage); font-weight: 600; }
ul { padding-left: 20px; margin: 8px 0; max-width: 90ch; }
li { overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; font-size: 13.5px; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
details { margin: 8px 0; }
summary { cursor: pointer; color: var(--after); font-size: 14px; }
figure { margin: 14px 0 20px; }
figcaption { font-size: 13px; color: var(--muted); margin: 0 0 6px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.key { display: inline-block; width: 18px; height: 10px; margin: 0 5px 0 12px; }
.legend { white-space: nowrap; }
.key.before { background: var(--before); }
.key.after, .key.damage { height: 6px; margin-bottom: 2px; background: var(--after); }
.key.damage { background: var(--damage); }
footer { margin-top: 56px; border-top: 1px solid var(--line); padding-top: 10px; }
@media (max-width: 640px) { main { padding: 20px 14px 40px; } h1 { font-size: 26px; } }
@media print {
  @page { margin: 14mm; }
  body { background: none; font-size: 11px; }
  main { max-width: none; padding: 0; }
  table, dl { font-size: 10px; }
  td.name, td.code { font-size: 9px; white-space: normal; overflow-wrap: anywhere; }
  th { white-space: normal; }
  td.name, td.text { min-width: 0; }
  tr, .tile { break-inside: avoid; }
  h2, h3, figcaption { break-after: avoid; }
  summary { display: none; }
  details::details-content { content-visibility: visible; height: auto; }
  * { print-color-adjust: exact; }
}
"""

PAGE = """
{%- macro table(block) -%}
<div class="scroll"><table>
<thead><tr>
{%- for title, style in block.columns %}<th class="{{ style }}">{{ title }}</th>{% endfor -%}
</tr></thead>
<tbody>
{% for row in block.rows %}
<tr{% if loop.index0 in block.marked %} class="bad"{% endif %}>
{%- for cell in row %}<td class="{{ block.columns[loop.index0][1] }}">{{ cell }}</td>{% endfor -%}
</tr>
{% endfor %}
</tbody></table></div>
{%- endmacro -%}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }} · octavo</title>
<style>{{ style | safe }}</style>
</head>
<body>
<main>
<header>
<h1>{{ title }}</h1>
<div class="quiet">{{ subtitle }}</div>
</header>
<div class="tiles">
{% for value, text in tiles %}
<div class="tile"><b>{{ value }}</b><span>{{ text }}</span></div>
{% endfor %}
</div>
{% for section in sections %}
<section>
{% if section.title %}<h2>{{ section.title }}</h2>{% endif %}
{% for block in section.blocks %}
{% if block.kind == "plot" %}
<figure>
<figcaption>{{ block.caption }}
{%- for color, text in block.keys %}
<span class="legend"><span class="key {{ color }}"></span>{{ text }}</span>
{%- endfor %}</figcaption>
{{ block.svg | safe }}
</figure>
{% elif block.kind == "table" and block.folded %}
<details><summary>{{ block.summary }}</summary>
{{ table(block) }}
</details>
{% elif block.kind == "table" %}
{{ table(block) }}
{% elif block.kind == "facts" %}
<dl>
{% for name, text in block.facts.items() %}<dt>{{ name }}</dt><dd>{{ text }}</dd>
{% endfor %}</dl>
{% else %}
<ul>
{% for text in block.texts %}<li>{{ text }}</li>
{% endfor %}</ul>
{% endif %}
{% endfor %}
</section>
{% endfor %}
<footer class="quiet">{{ footer }}</footer>
</main>
</body>
</html>
"""
