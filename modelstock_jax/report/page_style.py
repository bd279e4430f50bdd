"""The style of a page, and the script that shows what its points say."""

STYLE = """\
:root {
  --ink: #1a1a1a; --paper: #ffffff; --soft: #555555; --axis: #888888;
  --grid: #e6e6e6; --box: #f5f6f8; --bar: #cfe3f1; --blue: #0072b2;
  --warn: #fff4dc;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --ink: #e8e8e8; --paper: #15171a; --soft: #a8adb3; --axis: #767b82;
    --grid: #2c3035; --box: #1e2125; --bar: #1f4a66; --blue: #4aa8e0;
    --warn: #3a2f14;
  }
}
* { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 64rem; padding: 1.5rem 1rem 4rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif;
  overflow-wrap: break-word;
}
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 0 0 .6rem; }
header { border-bottom: 1px solid var(--grid); padding-bottom: .8rem; }
header p { color: var(--soft); margin: .3rem 0 .6rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .92rem; }
a { color: var(--blue); text-underline-offset: .15em; }
section { margin-top: 2.4rem; }
p, ul { margin: 0 0 .8rem; max-width: 46rem; }
ul { padding-left: 1.2rem; }
li { margin: .25rem 0; }
code {
  font: .88em ui-monospace, 'SF Mono', Menlo, Consolas, monospace;
  overflow-wrap: anywhere;
}
aside {
  background: var(--warn); border-left: 4px solid #e69f00;
  margin: 1.4rem 0; padding: .8rem 1rem;
}
aside h2 { font-size: 1.05rem; margin: 0 0 .3rem; }
aside ul { margin: 0; }
small { color: var(--soft); font-size: .82em; white-space: nowrap; }
.note { color: var(--soft); font-size: .88rem; max-width: none; }
.scroll { overflow-x: auto; margin: 0 0 1rem; position: relative; }
table {
  border-collapse: collapse; font-size: .9rem; line-height: 1.35;
  font-variant-numeric: tabular-nums;
}
caption {
  color: var(--soft); font-size: .88rem; padding: 0 0 .4rem; text-align: left;
}
caption span {
  display: inline-block; position: sticky; left: 0;
  max-width: calc(100vw - 4rem);
}
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--grid); }
thead th { border-bottom: 1.5px solid var(--axis); font-weight: 600; }
th:first-child { padding-left: 0; text-align: left; }
tbody th { font-weight: 400; white-space: nowrap; }
tbody td, tbody th { vertical-align: top; }
td { text-align: right; white-space: nowrap; }
thead th { text-align: right; vertical-align: bottom; }
table.words td, table.words thead th { text-align: left; white-space: normal; }
table.words td { overflow-wrap: anywhere; }
td small { display: block; }
td.bar {
  background: linear-gradient(var(--bar), var(--bar)) left center /
    calc(100% * var(--share)) 70% no-repeat;
  min-width: 6rem;
}
.numbers th:first-child {
  position: sticky; left: 0; background: var(--paper); z-index: 1;
}
details {
  border: 1px solid var(--grid); border-radius: 6px;
  margin: 0 0 .8rem; padding: .5rem .8rem;
}
summary { cursor: pointer; }
details[open] > summary { margin-bottom: .7rem; }
figure { margin: 0 0 1rem; }
figure svg {
  display: block; width: 100%; max-width: calc(1.5 * var(--width));
  height: auto; color: var(--ink); fill: var(--ink); touch-action: manipulation;
}
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure.scroll svg { min-width: calc(.95 * var(--width)); }
#says {
  position: fixed; z-index: 9; pointer-events: none; max-width: 20rem;
  background: var(--ink); color: var(--paper); border-radius: 4px;
  font-size: .82rem; line-height: 1.4; padding: .3rem .55rem;
  white-space: pre-line; overflow-wrap: anywhere;
}
#says[hidden] { display: none; }
@media (max-width: 40rem) {
  body { padding-top: 1rem; }
  h1 { font-size: 1.5rem; }
  .numbers th:first-child {
    max-width: 8.2rem; padding-right: .4rem; white-space: normal;
  }
  table.words, table.words :is(caption, tbody, tr, th, td) { display: block; }
  table.words caption span { display: inline; }
  table.long { table-layout: fixed; width: 100%; }
  table.long th:first-child { width: 54%; max-width: none; }
  table.long td { padding-left: .2rem; }
  table.long thead th { overflow-wrap: normal; }
  table.long :is(th, td):is(:nth-child(2), :nth-child(3)) { display: none; }
  td.bar { min-width: 0; }
  table.words thead { display: none; }
  table.words tbody th { border: 0; padding: .4rem 0 0; }
  table.words td { padding: 0 0 .4rem; }
  th, td { padding: .35rem .45rem; }
}
@media print {
  @page { size: A4; margin: 15mm; }
  html { font-size: 9.5pt; }
  body { max-width: none; padding: 0; }
  h1 { font-size: 17pt; }
  h2 { font-size: 12.5pt; break-after: avoid; }
  nav, #says { display: none; }
  .scroll { overflow: visible; }
  table { font-size: 7.8pt; }
  th, td { padding: 1.2pt 3.5pt; }
  tr, figure, aside { break-inside: avoid; }
  figure svg { max-width: min(100%, var(--width) * 1.2); }
  figure.scroll svg { min-width: 0; }
  details { border: 0; padding: 0; }
  td.bar, aside { print-color-adjust: exact; }
}
"""

# A pointer need not hit a point: the nearest is meant, with all that lie on
# it. Titles are taken off, or the browser would show them as well.
SCRIPT = """\
'use strict';
const says = document.createElement('div');
says.id = 'says';
says.hidden = true;
document.body.append(says);

function under(event, marks) {
  const reach = event.pointerType === 'mouse' ? 12 : 28;
  const hit = event.target.closest('[data-says]');
  const far = marks.map((mark) => {
    const box = mark.getBoundingClientRect();
    return Math.hypot(box.x + box.width / 2 - event.clientX,
                      box.y + box.height / 2 - event.clientY);
  });
  const least = Math.min(...far, Infinity);
  if (least > reach) return hit ? [hit] : [];
  return marks.filter((_, index) => far[index] < least + 2);
}

function show(event, found) {
  const texts = [...new Set(found.map((mark) => mark.dataset.says))];
  const more = texts.length - 6;
  says.textContent = texts.slice(0, 6).join('\\n') +
    (more > 0 ? `\\nand ${more} more` : '');
  says.hidden = !texts.length;
  const box = says.getBoundingClientRect();
  const left = Math.min(event.clientX + 12, innerWidth - box.width - 8);
  const above = event.clientY - box.height - 12;
  says.style.left = `${Math.max(left, 8)}px`;
  says.style.top = `${above > 4 ? above : event.clientY + 20}px`;
}

for (const svg of document.querySelectorAll('figure svg')) {
  for (const title of svg.querySelectorAll('title')) {
    title.parentNode.dataset.says = title.textContent;
    title.remove();
  }
  const marks = [...svg.querySelectorAll('use[data-says]')];
  for (const kind of ['pointermove', 'pointerdown']) {
    svg.addEventListener(kind, (event) => show(event, under(event, marks)));
  }
  svg.addEventListener('pointerleave', (event) => {
    if (event.pointerType === 'mouse') says.hidden = true;
  });
}
addEventListener('pointerdown', (event) => {
  if (!event.target.closest('figure svg')) says.hidden = true;
});
addEventListener('scroll', () => { says.hidden = true; }, {passive: true});

// Paper cannot be opened.
let shut = [];
addEventListener('beforeprint', () => {
  shut = [...document.querySelectorAll('details:not([open])')];
  for (const part of shut) part.open = true;
});
addEventListener('afterprint', () => {
  for (const part of shut) part.open = false;
});
"""
