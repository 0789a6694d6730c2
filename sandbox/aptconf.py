"""The machine's own apt settings, rewritten for the hosts' Debian release.

No mirror is named in this project: hosts use the one that the machine uses. Signatures are always checked.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
ONE_LINE = re.compile(r"^deb\s+(?:\[(?P<options>[^]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s+(?P<components>.+)$")
# What decides how the archive is reached; everything else of the machine's apt settings is its own business.
CARRIED = re.compile(
    r"^Acquire::(?:(?:http|https|ftp)::(?!Proxy-Auto-Detect)[\w:.-]*|Check-Valid-Until|Check-Date|Retries"
    r"|ForceIPv[46]|By-Hash) \"[^\"]"
)
NAMED_FILE = re.compile(r"^Acquire::https::\S*(?:CAInfo|CAPath|CrlFile) \"(?P<file>/[^\"]+)\"")


@dataclass(frozen=True)
class Source:
    """One suite of one archive; `signed_by` is empty when the machine names no keyring file."""

    uri: str
    suite: str
    components: tuple[str, ...]
    signed_by: str = ""


def machine_sources(etc: Path = Path("/etc/apt")) -> list[Source]:
    """All enabled binary sources, in both of apt's formats."""
    folder = etc / "sources.list.d"
    found: list[Source] = []
    for file in [etc / "sources.list", *sorted(folder.glob("*.list"))]:
        if file.exists():
            found += one_line_sources(file.read_text())
    for file in sorted(folder.glob("*.sources")):
        found += deb822_sources(file.read_text())
    return found


def one_line_sources(text: str) -> list[Source]:
    """`deb [options] URI SUITE COMPONENT...`, see sources.list(5)."""
    matches = (ONE_LINE.match(line.split("#")[0].strip()) for line in text.splitlines())
    return [
        Source(
            m["uri"],
            m["suite"],
            tuple(m["components"].split()),
            next((o[10:] for o in (m["options"] or "").split() if o.startswith("signed-by=")), ""),
        )
        for m in matches
        if m
    ]


def deb822_sources(text: str) -> list[Source]:
    """Stanzas of `Field: value`, see sources.list(5); a key written inline counts as no keyring file."""
    return [
        Source(uri, suite, tuple(fields.get("components", "").split()), _keyring(fields.get("signed-by", "")))
        for fields in _stanzas(text)
        if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes").lower() not in ("no", "false", "0")
        for uri in fields.get("uris", "").split()
        for suite in fields.get("suites", "").split()
    ]


def debian_sources(sources: list[Source], codename: str, wanted: str) -> list[Source]:
    """The Debian archive's own entries of a machine that runs `codename`, for the release `wanted`.

    Other vendors' archives drop out: they have other suite names, no `main`, or a keyring of their own.
    """
    renamed = {f"{codename}{end}": f"{wanted}{end}" for end in ("", "-updates", "-security")}
    found = [
        Source(s.uri, renamed[s.suite], ("main",), s.signed_by or KEYRING)
        for s in sources
        if s.suite in renamed
        and "main" in s.components
        and (not s.signed_by or Path(s.signed_by).name.startswith("debian-archive"))
    ]
    return list(dict.fromkeys(found))


def lines(sources: list[Source], keyring: str = "") -> list[str]:
    """For a sources.list; `keyring` replaces the machine's, for a root that has its own."""
    return [f"deb [signed-by={keyring or s.signed_by}] {s.uri} {s.suite} {' '.join(s.components)}" for s in sources]


def carried_settings(dump: str) -> list[str]:
    """From `apt-config dump`: proxies, certificates, checks of dates, retries; each a line of apt.conf."""
    return [line for line in dump.splitlines() if CARRIED.match(line)]


def carried_files(settings: list[str]) -> list[Path]:
    """The certificate files that those settings name."""
    named = [Path(m["file"]) for m in map(NAMED_FILE.match, settings) if m]
    return [file for file in named if file.is_file()]


def config_dump() -> str:
    return subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout


def codename(os_release: Path = Path("/etc/os-release")) -> str:
    """The machine's release name; empty when it has none (Debian unstable) or is not Debian."""
    fields = dict(line.split("=", 1) for line in os_release.read_text().splitlines() if "=" in line)
    return fields.get("VERSION_CODENAME", "").strip('"') if fields.get("ID", "").strip('"') == "debian" else ""


def _keyring(value: str) -> str:
    return value if value.startswith("/") else ""


def _stanzas(text: str) -> Iterator[dict[str, str]]:
    for block in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        field = ""
        for line in block.splitlines():
            if line.startswith("#"):
                continue
            if line[:1].isspace():
                fields[field] = f"{fields.get(field, '')} {line.strip()}".strip()
            elif ":" in line:
                field, value = line.split(":", 1)
                field = field.strip().lower()
                fields[field] = value.strip()
        yield fields
