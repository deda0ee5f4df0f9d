"""The page's style: light and dark, its own colours for charts, readable on a phone."""

# Series and reference have at least 3 to 1 to the ground in both themes, text 4.5 to 1; tests measure it.
LIGHT = {
    "ink": "#1a1d21", "dim": "#565d68", "ground": "#ffffff", "panel": "#f4f5f7", "line": "#d7dae0", "grid": "#e6e8ec",
    "good": "#0f6b45", "bad": "#b3261e", "mark": "#fff3d1", "limit": "#b3261e", "ref": "#6a717d",
    "s0": "#2f5fc4", "s1": "#b4540a", "s2": "#0f7a5a", "s3": "#8a3fa0", "s4": "#a3195b", "s5": "#4d6b00",
}  # fmt: skip
DARK = {
    "ink": "#e7e9ec", "dim": "#a2aab5", "ground": "#15171a", "panel": "#1f2227", "line": "#3a4049", "grid": "#2b3037",
    "good": "#5fd39b", "bad": "#ff8a80", "mark": "#3a3213", "limit": "#ff8a80", "ref": "#98a1ad",
    "s0": "#7ea6ff", "s1": "#f5a25d", "s2": "#4cc9a0", "s3": "#cf95e3", "s4": "#ff85b5", "s5": "#b3cf5c",
}  # fmt: skip


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


_SERIES = "\n".join(
    f".{name} {{ --own: var(--{name}); }}" for name in (*(name for name in LIGHT if name[0] == "s"), "ref")
)

STYLE = f"""
:root {{ color-scheme: light dark; {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
{_SERIES}
* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; }}
body {{ font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink);
  background: var(--ground); max-width: 56rem; margin: 0 auto; padding: 1.6rem 1.1rem 4rem; }}
h1 {{ font-size: 1.55rem; line-height: 1.25; margin: 0 0 .2rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.2rem; margin: 3rem 0 .8rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }}
section:first-of-type h2 {{ border: 0; margin-top: .8rem; }}
p {{ max-width: 46rem; margin: .5rem 0; overflow-wrap: anywhere; }}
.dim, figcaption, caption {{ color: var(--dim); }}
.lead {{ font-size: 1.08rem; font-weight: 600; }}
.good, .bad {{ border-left: 4px solid var(--good); padding: .1rem 0 .1rem .8rem; }} .bad {{ border-color: var(--bad); }}
.bad > :first-child {{ color: var(--bad); }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .7rem; padding: 0;
  margin: 1rem 0; list-style: none; }}
.figures li {{ background: var(--panel); border-radius: 10px; padding: .7rem .9rem; line-height: 1.3; font-size: .88rem;
  color: var(--dim); }}
.figures b {{ display: block; font-size: 1.5rem; color: var(--ink); font-variant-numeric: tabular-nums; }}
figure {{ margin: 1.4rem 0; background: var(--panel); border-radius: 12px; padding: 1rem; }}
figcaption {{ font-size: .88rem; margin-top: .5rem; }}
.chart {{ display: block; width: 100%; height: auto; }}
.keys {{ display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0; margin: 0 0 .6rem;
  font-size: .9rem; }}
.keys li {{ display: flex; align-items: center; gap: .45rem; }} .swatch {{ width: 28px; height: 14px; flex: none; }}
svg text {{ font: 12px system-ui, sans-serif; fill: var(--ink); font-variant-numeric: tabular-nums; }}
.halo {{ paint-order: stroke; stroke: var(--panel); stroke-width: 5px; stroke-linejoin: round; }}
svg .axis {{ fill: var(--dim); }} svg .strong {{ font-weight: 600; }}
.grid {{ stroke: var(--grid); }} .frame {{ stroke: var(--line); }} .track {{ fill: var(--grid); }}
.line {{ fill: none; stroke: var(--own); stroke-width: 2.2; stroke-linejoin: round; }}
.dashed {{ stroke-dasharray: 6 5; }} .dotted {{ stroke-dasharray: 1.5 5; stroke-linecap: round; }}
.marker {{ fill: var(--own); stroke: var(--panel); stroke-width: 1.2; }}
.hollow {{ fill: var(--panel); stroke: var(--own); stroke-width: 1.6; }}
.bar {{ fill: var(--own); }} .dot {{ fill: var(--ink); }}
.whisker, .cross {{ fill: none; stroke: var(--ink); stroke-width: 1.6; }}
.cross {{ stroke: var(--bad); stroke-width: 2.4; }}
.ring {{ fill: none; stroke: var(--ink); stroke-width: 2; }}
.limit {{ stroke: var(--limit); stroke-width: 1.6; stroke-dasharray: 7 4; }} svg .limit-text {{ fill: var(--limit); }}
.knee {{ stroke: var(--dim); stroke-width: 1.2; stroke-dasharray: 3 3; }} svg .knee-text {{ fill: var(--dim); }}
.scroll {{ overflow-x: auto; margin: 1.2rem 0; }}
.scroll:focus-visible, summary:focus-visible {{ outline: 3px solid var(--s0); outline-offset: 3px; }}
table {{ border-collapse: collapse; min-width: min(26rem, 100%);
  font-size: .88rem; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; padding-bottom: .45rem; white-space: normal; }}
caption span {{ display: inline-block; position: sticky; left: 0; max-width: min(54rem, 90vw); }}
th, td {{ border-bottom: 1px solid var(--line); padding: .36rem .6rem; text-align: right; vertical-align: top;
  white-space: nowrap; }}
thead th {{ color: var(--dim); font-weight: 600; vertical-align: bottom; }} .words :is(th, td) {{ text-align: left; }}
tbody th {{ text-align: left; font-weight: 600; }}
td.long {{ text-align: left; min-width: min(26rem, 75vw); white-space: normal; overflow-wrap: anywhere; }}
th:first-child {{ padding-left: .2rem; text-align: left; }}
.marked > * {{ background: var(--mark); }}
summary {{ cursor: pointer; padding: .3rem 0; color: var(--dim); font-size: .88rem; }}
details caption {{ display: none; }}
@media (max-width: 40rem) {{
  body {{ font-size: 15px; padding: 1.1rem .9rem 3rem; }} figure {{ padding: .7rem; margin-inline: -.3rem; }}
  th, td {{ padding: .34rem .45rem; }} tbody th, .words td {{ white-space: normal; }}
  .words tbody th {{ min-width: 6.5rem; max-width: 9rem; overflow-wrap: anywhere; }}
  .words td.long {{ min-width: 12rem; }}
  .chart text {{ font-size: 21px; }} .line {{ stroke-width: 3; }} .figures {{ grid-template-columns: 1fr 1fr; }}
}}
"""
