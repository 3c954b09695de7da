"""One self-contained HTML page from a picture.

The page holds its data, its style, the library D3 (7.9.2, see d3-LICENSE) and its own script, and asks
the network for nothing. Texts come from prompts and labels: they are data in a JSON block in which no
character can end the block, the script shows them as text only, and the page's own policy lets no
script run but its two, which it names by their hashes.
"""

import base64
import hashlib
import html
import json
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from typing import Any, cast

from atlas.text import visible
from atlas.views.picture import Picture

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src {hashes}; style-src {style_hash}; \
img-src blob: data:; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<script type="application/json" id="picture">{data}</script>
<!-- D3: {licence} -->
<script>{d3}</script>
<script>{script}</script>
</body>
</html>
"""


def page(picture: Picture) -> str:
    """The whole page as text, to be written as UTF-8."""
    d3, script, style = _part("d3-7.9.2.min.js"), _part("page.js"), _part("page.css")
    return _PAGE.format(
        hashes=f"{_hash(d3)} {_hash(script)}",
        style_hash=_hash(style),
        title=html.escape(visible(picture.title)),
        style=style,
        data=_block(picture),
        licence=_part("d3-LICENSE"),
        d3=d3,
        script=script,
    )


def _block(picture: Picture) -> str:
    """JSON in ASCII without <, > and &: nothing in it can end the block or begin a tag."""
    data = json.dumps(_visible(asdict(picture)), allow_nan=False, separators=(",", ":"))
    return data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _visible(value: Any) -> Any:
    """The same value, every text in it as a person may be shown it (and as XML may hold it)."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {key: _visible(item) for key, item in cast(dict[str, Any], value).items()}
    if isinstance(value, (list, tuple)):
        return [_visible(item) for item in cast(list[Any], value)]
    return value


@cache
def _part(name: str) -> str:
    return files("atlas.views").joinpath(name).read_text(encoding="utf-8")


def _hash(part: str) -> str:
    digest = hashlib.sha256(part.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
