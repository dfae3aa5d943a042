"""The report's style sheet: one column of cards, light and dark, from phone to desk."""

STYLE = """
:root {
  color-scheme: light dark; --page: #f5f6f8; --card: #fff; --ink: #171a21; --soft: #566072;
  --rule: #e2e6ec; --track: #e9edf2; --good: #0f7b4f; --good-bg: #e5f5ed; --warn: #8a5a00;
  --warn-bg: #fdf3dc; --bad: #b3261e; --bad-bg: #fdeae8; --accent: #2a5bd7; --c0: #2a5bd7;
  --c1: #d9622b; --c2: #14855c; --c3: #b8377d; --c4: #7a52cc; --c5: #a87900; --c6: #0b86a3;
  --c7: #8a5a3c; --c8: #c43c3c; --c9: #5d6b80; --other: #b9c0cb;
}
@media (prefers-color-scheme:dark) {
  :root {
    --page: #0e1116; --card: #161a21; --ink: #e9ecf2; --soft: #9ba6b6; --rule: #2a313c;
    --track: #242a34; --good: #5fd39b; --good-bg: #12301f; --warn: #f0c25e; --warn-bg: #33270c;
    --bad: #ff8f86; --bad-bg: #3a1714; --accent: #7ea2ff; --c0: #7ea2ff; --c1: #f49463;
    --c2: #55cf9c; --c3: #ee82bb; --c4: #b095f5; --c5: #e3bb4c; --c6: #52c7e0; --c7: #cf9f7e;
    --c8: #f47f7f; --c9: #9fadc2; --other: #4b5563;
  }
}
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
}
main,header,footer { max-width: 1180px; margin: 0 auto; padding: 0 24px }
header { padding-top: 40px }
h1 {
  font-size: 30px; line-height: 1.2; margin: 2px 0 6px; letter-spacing: -.015em;
  overflow-wrap: anywhere;
}
h2 { font-size: 21px; margin: 0 0 4px; letter-spacing: -.01em }
section:not(.verdict) > h2 + :not(.lead) { margin-top: 12px }
h3 { font-size: 15px; margin: 0 }
p { margin: 0 }
a { color: var(--accent) }
.eyebrow {
  font-size: 13px; font-weight: 600; letter-spacing: .06em; text-transform: uppercase;
  color: var(--soft);
}
.facts { color: var(--soft) }
.state {
  display: inline-block; vertical-align: middle; margin-left: 10px; padding: 2px 10px;
  border-radius: 99px; font-size: 13px; font-weight: 600; letter-spacing: 0;
  background: var(--track); color: var(--soft);
}
section { margin: 44px 0 0 }
.lead { color: var(--soft); max-width: 70ch; margin-bottom: 16px }
.verdict {
  margin: 24px 0 0; padding: 22px 24px; border-radius: 14px; background: var(--card);
  border: 1px solid var(--rule); border-left: 6px solid var(--soft);
}
.verdict h2 { font-size: 23px; line-height: 1.3; margin-bottom: 6px }
.verdict p { max-width: 80ch }
.good { border-left-color: var(--good) }
.warn { border-left-color: var(--warn) }
.bad { border-left-color: var(--bad) }
.good h2 { color: var(--good) }
.warn h2 { color: var(--warn) }
.bad h2 { color: var(--bad) }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit,minmax(200px,1fr)); gap: 14px;
  margin: 14px 0 0; padding: 0;
}
.tile,.card { background: var(--card); border: 1px solid var(--rule); border-radius: 12px }
.tile { padding: 16px 18px }
.tile dt { font-size: 13px; color: var(--soft); font-weight: 600 }
.tile dd { margin: 0 }
.tile .value {
  font-size: 27px; line-height: 1.25; font-weight: 650; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums;
}
.tile .note { font-size: 13px; color: var(--soft) }
.charts {
  display: grid; grid-template-columns: repeat(auto-fill,minmax(min(100%,330px),1fr));
  gap: 14px;
}
.card { padding: 16px 18px; margin: 0; min-width: 0 }
figcaption .row {
  display: flex; justify-content: space-between; gap: 12px; align-items: baseline;
}
figcaption .now {
  font-size: 15px; font-weight: 650; font-variant-numeric: tabular-nums; white-space: nowrap;
}
figcaption p { font-size: 13px; line-height: 1.45; color: var(--soft); margin: 2px 0 8px }
.charts figure { display: flex; flex-direction: column }
.charts figcaption { flex: 1 }
svg { display: block; width: 100%; height: auto; overflow: visible }
svg text {
  font-family: inherit; font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums;
}
svg .name { font-weight: 500 }
svg .tick { letter-spacing: 0 }
.grid { stroke: var(--rule); stroke-width: 1 }
.axis { stroke: var(--soft); stroke-width: 1; opacity: .6 }
.line {
  fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round;
}
.dot { fill: var(--card); stroke: var(--c); stroke-width: 1.8 }
.level { stroke: var(--soft); stroke-width: 1.3; stroke-dasharray: 5 4 }
svg .level-name {
  fill: var(--ink); font-size: 11.5px; paint-order: stroke; stroke: var(--card);
  stroke-width: 4px;
}
.mark line { stroke: var(--bad); stroke-width: 1.6; stroke-dasharray: 2 3 }
.frame { fill: none; stroke: var(--rule) }
.dots { fill: none; stroke: var(--c); stroke-width: 5.4; stroke-linecap: round; opacity: .72 }
svg .group {
  fill: var(--ink); font-size: 14px; font-weight: 650; paint-order: stroke;
  stroke: var(--card); stroke-width: 5px; stroke-linejoin: round;
}
.c0 { --c: var(--c0) }
.c1 { --c: var(--c1) }
.c2 { --c: var(--c2) }
.c3 { --c: var(--c3) }
.c4 { --c: var(--c4) }
.c5 { --c: var(--c5) }
.c6 { --c: var(--c6) }
.c7 { --c: var(--c7) }
.c8 { --c: var(--c8) }
.c9 { --c: var(--c9) }
.other { --c: var(--other) }
.b0 { background: var(--c0) }
.b1 { background: var(--c1) }
.b2 { background: var(--c2) }
.b3 { background: var(--c3) }
.b4 { background: var(--c4) }
.b5 { background: var(--c5) }
.b6 { background: var(--c6) }
.b7 { background: var(--c7) }
.b8 { background: var(--c8) }
.b9 { background: var(--c9) }
.b-other { background: var(--other) }
.legend {
  display: flex; flex-wrap: wrap; gap: 4px 16px; list-style: none; margin: 10px 0 0;
  padding: 0; font-size: 13px;
}
.legend li { display: flex; align-items: center; gap: 7px; overflow-wrap: anywhere }
.swatch { flex: none; width: 11px; height: 11px; border-radius: 3px }
.two {
  display: grid; grid-template-columns: repeat(auto-fit,minmax(min(100%,420px),1fr));
  gap: 14px;
}
.pairs {
  display: grid; grid-template-columns: repeat(4,1fr); gap: 12px; list-style: none; margin: 0;
  padding: 0;
}
.pairs li { display: grid; grid-template-columns: 1fr 1fr; gap: 4px; padding: 6px }
.pairs img {
  display: block; width: 100%; height: auto; aspect-ratio: 1; border-radius: 7px;
  background: var(--track);
}
.small img { image-rendering: pixelated }
.bars { list-style: none; margin: 0; padding: 0; display: grid; gap: 18px }
.bars li { display: grid; grid-template-columns: 1fr auto; gap: 3px 12px }
.bar-name { font-weight: 600 }
.bar-value { font-weight: 650; font-variant-numeric: tabular-nums }
.bar-track {
  grid-column: 1/-1; height: 14px; border-radius: 7px; background: var(--track);
  overflow: hidden;
}
.bar-fill { display: block; height: 100%; border-radius: 7px; min-width: 3px }
.bar-note { grid-column: 1/-1; font-size: 13px; color: var(--soft) }
.stack {
  display: flex; gap: 2px; height: 46px; border-radius: 10px; overflow: hidden;
  margin: 0 0 14px;
}
.stack-part {
  display: grid; place-items: center; min-width: 3px; flex-basis: 0; overflow: hidden;
  color: var(--card); font-size: 14px; font-weight: 650;
}
.scroll { overflow-x: auto }
.legend + .scroll { margin-top: 18px }
table {
  border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums;
}
caption { text-align: left; font-weight: 650; padding: 0 0 6px }
th,td {
  text-align: left; vertical-align: top; padding: 6px 14px 6px 0;
  border-top: 1px solid var(--rule);
}
thead th {
  color: var(--soft); font-weight: 600; font-size: 13px; border-top: 0; white-space: nowrap;
}
tbody th { font-weight: 500 }
td { overflow-wrap: anywhere }
.number { text-align: right; white-space: nowrap }
.after { margin-top: 14px }
.map svg { max-width: 760px; margin: 0 auto }
.config { columns: 3 300px; column-gap: 14px }
.config .card { break-inside: avoid; margin: 0 0 14px }
.config thead {
  position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden;
}
.config th { width: 48%; color: var(--soft); font-weight: 400 }
.config td { padding-right: 0 }
.alarm {
  padding: 14px 18px; border-radius: 12px; margin: 0 0 10px; background: var(--bad-bg);
  color: var(--bad);
}
.alarm strong { display: block }
.calm {
  padding: 14px 18px; border-radius: 12px; background: var(--good-bg); color: var(--good);
  margin: 0 0 14px;
}
.hint {
  padding: 12px 16px; border-radius: 10px; background: var(--warn-bg); color: var(--warn);
  margin: 14px 0 0;
}
.missing {
  padding: 16px 18px; border: 1px dashed var(--rule); border-radius: 12px; color: var(--soft);
}
details { margin: 14px 0 0 }
summary { cursor: pointer; font-weight: 600; color: var(--accent); padding: 6px 0 }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 4px }
footer { color: var(--soft); font-size: 13px; padding-top: 44px; padding-bottom: 48px }
@media (max-width:860px) {
  .pairs { grid-template-columns: 1fr 1fr }
}
@media (max-width:600px) {
  main,header,footer { padding-left: 14px; padding-right: 14px }
  header { padding-top: 24px }
  h1 { font-size: 25px }
  .verdict { padding: 18px }
  .verdict h2 { font-size: 20px }
  .tiles { grid-template-columns: 1fr 1fr; gap: 10px }
  .tile { padding: 12px 14px }
  .tile .value { font-size: 22px }
  .pairs { gap: 8px }
  section { margin-top: 36px }
}
@media print {
  body { background: #fff }
  .card,.tile { break-inside: avoid }
}
"""
