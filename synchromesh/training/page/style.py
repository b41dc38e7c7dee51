"""The one style of all pages: light and dark, from the width of a telephone up, with the fonts of the system."""

from __future__ import annotations

COLORS = 8
"""How many colours `k0`, `k1` and so on there are for what is to be told apart."""

STYLE = """
:root {
  --page: #f4f6f9; --card: #ffffff; --ink: #17202b; --soft: #5d6977; --line: #e2e7ee; --edge: #dbe1e9;
  --good: #15803d; --bad: #b42318; --mix: 72%; --even: #17202b;
  --k0: #2563eb; --k1: #d97706; --k2: #0d9488; --k3: #9333ea; --k4: #be185d; --k5: #65a30d;
  --k6: #0284c7; --k7: #64748b;
  --h0: #a11a12; --h1: #ee8a5f; --h2: #f8cfae; --h3: #e9edf3; --h4: #b9d2fb; --h5: #6d9ff5; --h6: #1d4ed8;
  --shade: 0 1px 2px rgb(23 32 43 / .05), 0 4px 14px rgb(23 32 43 / .05);
  color-scheme: light dark;
}
@media (prefers-color-scheme: dark) { :root {
  --page: #0d1117; --card: #161c25; --ink: #e7ecf3; --soft: #97a4b4; --line: #29323f; --edge: #232c38;
  --good: #4ade80; --bad: #ff8a7a; --mix: 44%; --even: #f4f6f9;
  --k0: #6aa2ff; --k1: #f5a742; --k2: #2dd4bf; --k3: #c084fc; --k4: #f472b6; --k5: #a3d94f;
  --k6: #38bdf8; --k7: #94a3b8;
  --h0: #ff5c4d; --h1: #c4603d; --h2: #6b4431; --h3: #252e3a; --h4: #24406f; --h5: #2f62c0; --h6: #6aa2ff;
  --shade: none;
} }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 2.25rem 1.5rem 4rem; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.02em; overflow-wrap: anywhere; }
h2 { margin: 0; font-size: 1.2rem; letter-spacing: -.01em; }
section { margin-top: 2.5rem; } section > h2 + * { margin-top: .75rem; }
p { margin: 0; } .lead { margin-top: .4rem; color: var(--soft); font-size: 1.05rem; overflow-wrap: anywhere; }
.lead b { color: var(--ink); } .about { margin: .15rem 0 .75rem !important; color: var(--soft); max-width: 100ch; }
th, td, li, dd, dt, figcaption, p, text { unicode-bidi: isolate; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(375px, 100%), 1fr)); gap: 1rem; }
.card { margin: 0; padding: .95rem 1.1rem 1rem; background: var(--card); border: 1px solid var(--edge);
  border-radius: 12px; min-width: 0; box-shadow: var(--shade); }
.wide { grid-column: 1 / -1; } .grid.pair { grid-template-columns: repeat(auto-fill, minmax(min(470px, 100%), 1fr)); }
section > * + .grid, section > * + .card, section > * + .pictures { margin-top: 1rem; }
@media (min-width: 1215px) { .broad { grid-column: span 2; } .tall { grid-row: span 2; } }
figcaption { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 .6rem; margin-bottom: .5rem; }
figcaption b { font-size: .98rem; overflow-wrap: anywhere; } figcaption span { color: var(--soft); font-size: .82rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(150px, 45%), 1fr)); gap: .75rem;
  margin: 1.4rem 0 0; }
.tiles div { padding: .7rem .95rem .75rem; background: var(--card); border: 1px solid var(--edge); border-radius: 12px;
  box-shadow: var(--shade); min-width: 0; }
dt { color: var(--soft); font-size: .8rem; } dd { margin: .05rem 0 0; font-size: 1.3rem; font-weight: 620;
  letter-spacing: -.015em; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; line-height: 1.25; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .34rem .8rem; text-align: right; white-space: nowrap; font-weight: 400; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
figure > .scroll > table { width: 100%; }
thead th { color: var(--soft); font-size: .8rem; vertical-align: bottom; }
tbody tr { border-top: 1px solid var(--line); } tr.bad { color: var(--bad); }
td b { font-weight: 650; } th.left, td.left { text-align: left; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .95rem; margin: 0 0 .4rem; padding: 0; list-style: none;
  font-size: .82rem; color: var(--soft); }
.legend li { display: inline-flex; align-items: center; gap: .4rem; overflow-wrap: anywhere; }
.legend i { flex: none; width: .8rem; height: .8rem; border-radius: 3px; background: var(--k, var(--soft)); }
.legend i.rule { height: 0; width: 1.1rem; border-radius: 0; background: none; border-top: 2px dashed var(--even); }
.legend i.dashed, .legend i.faint { height: 0; width: 1.1rem; border-radius: 0; background: none;
  border-top: 2px solid var(--k); }
.legend i.dashed { border-top-style: dashed; } .legend i.faint { opacity: .5; border-top-width: 1.5px; }
.k0 { --k: var(--k0); } .k1 { --k: var(--k1); } .k2 { --k: var(--k2); } .k3 { --k: var(--k3); }
.k4 { --k: var(--k4); } .k5 { --k: var(--k5); } .k6 { --k: var(--k6); } .k7 { --k: var(--k7); }
.h0 { --k: var(--h0); } .h1 { --k: var(--h1); } .h2 { --k: var(--h2); } .h3 { --k: var(--h3); }
.h4 { --k: var(--h4); } .h5 { --k: var(--h5); } .h6 { --k: var(--h6); }
svg[role] { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
svg text.end { text-anchor: end; } svg text.mid { text-anchor: middle; } svg text.ink { fill: var(--ink); }
.rule { stroke: var(--line); stroke-width: 1; } .axis { stroke: var(--soft); stroke-width: 1; opacity: .6; }
.line { fill: none; stroke: var(--k); stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }
.line.dashed { stroke-dasharray: 5 5; } .line.faint { stroke-width: 1.4; opacity: .5; }
.dot { fill: var(--card); stroke: var(--k); stroke-width: 2; } .fill { fill: var(--k); } .bar.h3 { --k: var(--k7); }
.even { stroke: var(--even); stroke-width: 1.6; stroke-dasharray: 5 4; fill: none; }
.at rect { fill: transparent; } .at line { stroke: var(--soft); opacity: 0; } .at:hover line { opacity: .7; }
.rows { display: grid; grid-template-columns: max-content minmax(0, 1fr) max-content; gap: .5rem .8rem;
  align-items: center; font-size: .88rem; font-variant-numeric: tabular-nums; }
.rows > * { min-width: 0; } .rows .name { color: var(--soft); } .rows .said { text-align: right; }
.rows .said.bad { color: var(--bad); }
.track { position: relative; height: 1.35rem; border-radius: 5px; background: var(--page); }
.track .runs { display: flex; height: 100%; border-radius: 5px; overflow: hidden; }
.track .runs span { background: var(--k); flex: none; } .track .runs span + span { box-shadow: -1px 0 0 var(--card); }
.lanes .runs span + span { box-shadow: none; }
.track .mark { position: absolute; top: -4px; bottom: -4px; width: 0; border-left: 2px dashed var(--even); }
.track.over .runs { opacity: .42; } .row { display: contents; }
.track.cut .runs { mask-image: linear-gradient(to right, #000 80%, transparent); }
.moments { position: relative; height: 1.2rem; color: var(--soft); font-size: .78rem; }
.moment { position: absolute; transform: translateX(-50%); } .moment.last { transform: translateX(-100%); }
.chip { display: inline-flex; align-items: center; gap: .4rem; } .chip i { width: .75rem; height: .75rem; flex: none;
  border-radius: 3px; background: var(--k); }
.matrix { width: max-content; max-width: 100%; }
.matrix td { padding: .3rem .45rem; text-align: center; border-radius: 5px; min-width: 2.6em;
  background: color-mix(in srgb, var(--k) calc(var(--share) * var(--mix)), transparent); }
.matrix table { border-collapse: separate; border-spacing: 2px; font-size: .84rem; } .matrix tbody tr { border: 0; }
.matrix th { overflow: hidden; text-overflow: ellipsis; }
.matrix thead th { text-align: center; padding: .2rem .3rem; max-width: 7em; }
.matrix tbody th { padding-right: .6rem; max-width: 11em; }
.matrix td.none { color: transparent; background: color-mix(in srgb, var(--line) 35%, transparent); }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(170px, 46%), 1fr)); gap: 1rem; }
.pictures.wider { grid-template-columns: repeat(auto-fill, minmax(min(375px, 100%), 1fr)); }
.pictures .card { padding: 0 0 .7rem; overflow: hidden; } .pictures img { display: block; width: 100%;
  image-rendering: pixelated; background: var(--page); }
.pictures p { padding: .6rem .8rem 0; font-size: .86rem; overflow-wrap: anywhere; }
.pictures p + p { padding-top: 0; color: var(--soft); font-size: .78rem; }
.notes { margin: 1rem 0 0; padding-left: 1.1rem; color: var(--soft); } .notes li + li { margin-top: .25rem; }
.notes li.bad { color: var(--bad); }
details { margin-top: 2.5rem; } summary { cursor: pointer; color: var(--soft); }
pre { margin: .75rem 0 0; padding: 1rem; background: var(--card); border: 1px solid var(--edge); border-radius: 12px;
  overflow-x: auto; font-size: .82rem; }
@media (max-width: 560px) {
  main { padding: 1.25rem .8rem 3rem; } h1 { font-size: 1.5rem; } .card { padding: .8rem .85rem .85rem; }
  th, td { padding: .34rem .5rem; } .matrix td { padding: .2rem; min-width: 1.9em; }
  .matrix thead th { padding: .2rem 0; max-width: 4em; } .matrix tbody th { max-width: 6.5em; padding-right: .4rem; }
  .rows { display: block; } .row { display: grid; grid-template-columns: minmax(0, 1fr) max-content; gap: .1rem .6rem; }
  .row .track { order: 1; grid-column: 1 / -1; height: 1.1rem; } .row + .row { margin-top: .5rem; }
  .pictures .card { padding: 0 0 .6rem; } svg text { font-size: 13px; }
}
@media print { :root { --page: #fff; --shade: none; } .card { break-inside: avoid; } }
"""
