"""Text that somebody else wrote into a run: markup, scripts, formulas, characters that hide or turn round their neighbours."""

from __future__ import annotations

import random

SCRIPT = "window.hostile=1"
"""What a script of a hostile text would do, and a browser can be asked about."""

TEXTS = {
    "script": f"<script>{SCRIPT}</script>",
    "image": f'<img src="http://evil.example/x.png" onerror="{SCRIPT}">',
    "svg": f"<svg/onload={SCRIPT}>",
    "frame": "<iframe src=//evil.example></iframe>",
    "anchor": f"<a href='javascript:{SCRIPT}'>click</a>",
    "style": "<style>*{display:none}</style>",
    "base": "<base href=//evil.example/><meta http-equiv=refresh content=0;url=//evil.example>",
    "attribute": f'" onmouseover="{SCRIPT}" x="',
    "comment": "<!-- --><![CDATA[ x ]]> -->",
    "entities": "&lt;b&gt; &amp;amp; &#x202e; &nbsp;",
    "markdown_link": f"[x](javascript:{SCRIPT})",
    "markdown_image": "![x](http://evil.example/y.png)",
    "markdown_code": "```x``` `y` ``",
    "emphasis": "**a** _b_ ~~c~~ ***",
    "url": "http://evil.example/path?a=b&c=d",
    "mail": "someone@evil.example",
    "directive": ":red[a] :material/home: :streamlit: :smile: :small[b]",
    "arrows": "a -> b <- c -- d >= e <= f ~= g <-> h",
    "math": "$x^2$ and $\\LaTeX$ and $$\\frac{1}{2}$$",
    "latex": "\\input{/etc/passwd} \\immediate\\write18{id} % & # _ ^ ~",
    "plotly": f"<b>bold</b><br><sub>x</sub><a href='javascript:{SCRIPT}'>y</a> %{{x}} <extra></extra>",
    "template": "{{ 7 * 7 }} {% raw %} <% 7 %> << 7 >> ${7*7}",
    "formula": '=HYPERLINK("http://evil.example";"x")',
    "rich": "[bold red]x[/bold red] [link=http://evil.example]y[/link]",
    "ansi": "\x1b[2J\x1b[31mred\x1b[0m\x1b]8;;http://evil.example\x07link\x1b]8;;\x07",
    "backspace": "safe\x08\x08\x08\x08evil\r\rhidden\x7f",
    "nul": "a\x00b",
    "newlines": "a\nb\r\nc\u2028d\u2029e\x85f",
    "bidi_override": "run\u202egnp.exe",
    "bidi_embedding": "\u202aa\u202b\u202c\u2066b\u2067c\u2068d\u2069\u200e\u200f\u061c",
    "arabic": "نموذج 12 שלום",
    "zero_width": "a\u200bb\u200cc\u200dd\u2060e\ufefff\u00adg\u180e",
    "tags": "a\U000e0041\U000e0042\ufe0f\u3164\u2800",
    "spaces": "   ",
    "marks": "z" + "\u0301\u0300" * 40,
    "emoji": "🔭👩‍🔬🏳️‍🌈🇩🇪",
    "script_of_others": "模型 модель मॉडल",
    "surrogate": "a\udc80b\ud83d",
    "underscore": "_hidden_ __init__",
    "long": "x" * 100_000,
    "json": '{"a": [1, {"b": null}], "c": "</script>"}',
    "nan": "nan",
    "empty": "",
}
"""Name of the case → text."""


def mutated(seed: int, count: int) -> dict[str, str]:
    """More texts: two or three of the above after one another, cut and repeated."""
    draw = random.Random(seed)
    parts = [text[:200] for text in TEXTS.values()]
    found = {}
    for number in range(count):
        chosen = "".join(draw.choice(parts) for _ in range(draw.randint(2, 3)))
        start = draw.randrange(max(len(chosen) // 2, 1))
        found[f"mutated_{seed}_{number}"] = chosen[start:] * draw.choice((1, 1, 2))
    return found


def file_names(texts: dict[str, str]) -> dict[str, str]:
    """Those texts that can be the name of a file, shortened to what a file system takes."""
    found: dict[str, str] = {}
    for case, text in texts.items():
        name = text.replace("/", "∕").replace("\x00", "").lstrip(".")
        while len(name.encode("utf-8", "surrogatepass")) > 200:
            name = name[:-1] if len(name) < 300 else name[:250]
        try:
            name.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            name = name.encode("ascii", "ignore").decode()
        if name and name not in found.values():
            found[case] = name
    return found
