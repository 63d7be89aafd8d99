"""The report's style sheet: system fonts, one set of colours for light and one for dark."""

CSS = """
:root{--bg:#fbfbfa;--card:#fff;--ink:#1d2329;--muted:#6b7480;--line:#e3e6ea;--accent:#2563c9;
--c1:#2563c9;--c2:#c2570c;--c3:#13805c;--c4:#8b3fc4;--c5:#b3247a;--c6:#7a6a00;--c7:#0e7490;--c8:#b91c1c}
@media (prefers-color-scheme:dark){:root{--bg:#14171b;--card:#1c2026;--ink:#e6e9ed;--muted:#97a1ad;
--line:#2d333b;--accent:#7fb0ff;--c1:#7fb0ff;--c2:#f2a25c;--c3:#58cfa0;--c4:#c79bf5;--c5:#f08cc4;
--c6:#d9c65c;--c7:#62cfe3;--c8:#f58f8f}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
main{max-width:1040px;margin:0 auto;padding:32px 20px 80px}
h1{font-size:26px;margin:0 0 20px;letter-spacing:-.01em}
h2{font-size:19px;margin:44px 0 10px;padding-top:18px;border-top:1px solid var(--line)}
h3{font-size:15px;margin:22px 0 8px}
p{margin:6px 0}
.note,.none{color:var(--muted);font-size:13px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.tile b{display:block;font-size:25px;font-weight:650;font-variant-numeric:tabular-nums;
letter-spacing:-.02em}
.tile span{display:block;font-size:13px}
.tile small{color:var(--muted)}
.scroll{overflow-x:auto;margin:8px 0 16px;background:var(--card);border:1px solid var(--line);
border-radius:10px}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:7px 12px;text-align:right;white-space:nowrap}
th{color:var(--muted);font-weight:500;border-bottom:1px solid var(--line)}
tbody tr+tr td{border-top:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}
table.text th,table.text td{text-align:left;white-space:normal;vertical-align:top;min-width:70px;
overflow-wrap:anywhere;unicode-bidi:isolate}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:14px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px}
figcaption{font-size:13.5px;font-weight:600;margin-bottom:6px}
svg{width:100%;height:auto;display:block}
.grid{stroke:var(--line);stroke-width:1}
.tick{fill:var(--muted);font-size:10.5px}
.axis{fill:var(--muted);font-size:11px}
.line,.base,.faint{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.base{stroke-dasharray:5 5;stroke-width:1.5}
.faint{stroke-width:1;opacity:.25}
circle{stroke:var(--card);stroke-width:1}
.legend{display:flex;flex-wrap:wrap;gap:4px 14px;margin-top:8px;font-size:12.5px;color:var(--muted)}
.legend i{display:inline-block;width:16px;height:0;border-top:3px solid var(--c);margin-right:6px;
vertical-align:middle;border-radius:2px}
.legend i.dash{border-top-style:dashed;border-top-width:2px}
.meter{display:grid;grid-template-columns:110px 1fr 90px;gap:12px;align-items:center;
font-size:13.5px;margin:4px 0}
.meter i{background:var(--line);border-radius:4px;height:10px;display:block}
.meter b{background:var(--accent);border-radius:4px;height:10px;display:block;min-width:2px}
.meter span:last-child{text-align:right;font-variant-numeric:tabular-nums;color:var(--muted)}
details{margin:10px 0}
summary{cursor:pointer;color:var(--accent);font-size:14px}
pre{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px;
overflow-x:auto;font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
"""
