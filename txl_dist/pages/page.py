"""Put a page together: its data, style and script in one HTML file, which asks for nothing else."""

import json
from html import escape
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent

# A browser refuses whatever would leave the page. 'self' is where a page is served from (dashboard serve=true).
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'"


def render(title: str, data: Any, styles: list[str], scripts: list[str]) -> str:
    """Return the HTML of a page.

    Args:
        data: what JSON can hold; scripts find it in the element `data`.
        styles, scripts: names of files in this folder, which are put in as they stand, in this order.
    """
    style = "\n".join(read(name) for name in ["style.css", *styles])
    script = "".join(f"{licence(name)}<script>\n{read(name)}\n</script>\n" for name in scripts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{style}
</style>
</head>
<body>
<main id="page"></main>
<script type="application/json" id="data">{embedded(data)}</script>
{script}</body>
</html>
"""


def licence(name: str) -> str:
    """Return the licence of a script that others have written, as a comment: it goes where the script goes."""
    if not name.startswith("vendor/"):
        return ""
    library = name.partition(".")[0]
    return f"<!--\n{read(f'{library}-LICENSE')}-->\n"


def embedded(data: Any) -> str:
    """Return JSON that may stand within an element `script`: no text in it can end that."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def read(name: str) -> str:
    """Return the text of a file in this folder."""
    return (FOLDER / name).read_text("utf-8")
