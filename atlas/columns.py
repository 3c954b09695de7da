"""The columns that a Cypher query returns, read from its text.

The embedded engine names a query's columns only along with a first row, so a query that finds nothing
would come back without any. A query's last RETURN outside of brackets names them: its items stand
between commas outside of brackets, and each is named by its alias or else by its own text.
"""

import re

_TOKEN = re.compile(
    r"""(?P<skip>//[^\n]*|/\*.*?\*/)
      | (?P<quoted>'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|`(?:``|[^`])*`)
      | (?P<open>[(\[{]) | (?P<close>[)\]}])
      | (?P<word>\$?[^\W\d]\w*) | (?P<space>\s+) | (?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_ENDS = {"ORDER", "SKIP", "OFFSET", "LIMIT", "UNION"}


def returned_columns(cypher: str) -> list[str]:
    """The names of the returned columns, in order; none where the query has no RETURN, or `RETURN *`."""
    columns: list[str] = []
    item: str | None = None  # text of the item being read; None outside of a RETURN
    depth = 0
    for match in _TOKEN.finditer(cypher):
        kind, text = match.lastgroup, match.group()
        depth += (kind == "open") - (kind == "close")
        upper = text.upper() if kind == "word" and depth == 0 else ""
        if upper == "RETURN":
            columns, item = [], ""
        elif item is None or kind == "skip" or upper == "DISTINCT":
            continue
        elif upper in _ENDS:
            columns.append(_name(item))
            item = None
        elif upper == "AS":
            item = ""
        elif text == "," and depth == 0:
            columns.append(_name(item))
            item = ""
        else:
            item += text
    if item is not None:
        columns.append(_name(item))
    return [] if "*" in columns else columns


def _name(item: str) -> str:
    text = item.strip().removesuffix(";").rstrip()
    quoted = re.fullmatch(r"`((?:``|[^`])*)`", text)
    return quoted[1].replace("``", "`") if quoted else text
