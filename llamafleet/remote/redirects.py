"""Where a redirect leads, for both sides.

Contract: a module, no program. It imports the standard library alone, since the operator's side imports it too. Python
3.8.
"""

from __future__ import annotations

from urllib.parse import urljoin, urlsplit, urlunsplit

STATUSES = (301, 302, 303, 307, 308)
MOST_HOPS = 8  # the Hub needs one, two for a renamed repository; a mirror that leads there adds its own


def target(url: str, location: str) -> str:
    """The absolute address that a Location header names, without its fragment; it may be unusable still.

    An @ in a path or query, as of a signed address, is quoted: before the host's name it would be a user, which no
    address of ours has.
    """
    try:
        parts = urlsplit(urljoin(url, location))
        path, query = (text.replace("@", "%40") for text in (parts.path, parts.query))
        return urlunsplit((parts.scheme, parts.netloc, path, query, ""))
    except ValueError:  # such as a bracket that is not closed
        return location


def is_downgrade(url: str, found: str) -> bool:
    """Whether it leads from https to http, where others could change the file."""
    return url.startswith("https:") and not found.startswith("https:")
