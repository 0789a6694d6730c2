"""The package managers of the hosts: which one this host has, what is missing of what it needs, how that is installed.

Contract: a module, and a program. What a host needs is a dictionary from a word to
{"shown_by": [...], "packages": [...], "optional": bool}: it is there where a program of one of the names in `shown_by`
is on the PATH of jobs, or a file matches one of the paths there ("/" and wildcards); else one of `packages` brings it,
the first that an enabled repository has. An entry of `packages` may name several, with blanks between. `optional`: the
host does without it. The words, programs and packages are the operator's side's (`llamafleet/build/packages.py`).

`packages.py offers MANAGER NEEDS [VARIABLES]` asks the manager with these variables in its environment, and prints one
JSON object, by word: {"package": text | null, "version": text, "off": [repositories that have it and are switched
off]}; a word is left out where nobody can tell, as before the package lists were read for the first time. A manager's
methods return command lines and read outputs; nothing here changes the host, but a manager may refresh its lists when
it is asked. One more package manager is one more class in `MANAGERS`. Python 3.8, standard library, common.py beside
it.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import subprocess
import sys
from typing import Any, ClassVar, Dict, List, Mapping, Optional, Sequence, Type  # Python 3.8's own are not generic

from common import output_of

PLACES = "/usr/sbin:/usr/bin:/sbin:/bin"
# Of a job, as systemd sets it: an owner's own program counts too.
JOB_PATH = "/usr/local/sbin:/usr/local/bin:" + PLACES
ASK_SECONDS = 120.0  # a manager that first reads its lists anew over a slow line
Needs = Mapping[str, Mapping[str, Any]]
# Repositories that hold libraries' headers and build tools and are off on RHEL's rebuilds; of others only a few are
# asked, because each is read as a whole.
OFTEN_OFF = re.compile(r"crb|codeready|powertools|epel|appstream|extras", re.IGNORECASE)
NEVER_NEEDED = re.compile(r"debug|source|src|testing|modular|baseurl", re.IGNORECASE)
MOST_ASKED = 8


class Manager:
    """What is asked of a package manager. `name` is the word in the machine file and in what a program is asked."""

    name: str
    program: str  # what a host with this manager has
    # What it prints where another process holds its lock, and its exit codes then.
    locked: re.Pattern[str]
    locked_codes: Sequence[int] = ()
    environment: ClassVar[Mapping[str, str]] = {}

    @staticmethod
    def broken(packages: Sequence[str]) -> List[str]:
        """Those of the packages whose installation was cut off, as by a power cut."""
        return []

    @staticmethod
    def refresh() -> Optional[List[str]]:
        """Reads the lists of packages anew; None where `install` does that by itself."""
        return None

    @staticmethod
    def install(packages: Sequence[str]) -> List[str]:
        """Installs the packages with what they need and nothing that is merely recommended; asks no questions."""
        raise NotImplementedError

    @staticmethod
    def mend(output: str) -> Optional[List[str]]:
        """The command that finishes what was cut off, where the output of a failed command says that it is needed."""
        return None

    @staticmethod
    def would_change(packages: Sequence[str]) -> List[str]:
        """The names of all packages that `install` would install, change or remove; empty where nobody tells."""
        raise NotImplementedError

    @staticmethod
    def offered(packages: Sequence[str]) -> Optional[Dict[str, str]]:
        """The version of each of the packages that an enabled repository has; None where nobody can tell."""
        raise NotImplementedError

    @staticmethod
    def off(packages: Sequence[str]) -> Dict[str, List[str]]:
        """By package the repositories that are switched off and have it, as far as that can be seen."""
        return {}


class Apt(Manager):
    name, program = "apt", "apt-get"
    # DPkg::Lock::Timeout does not hold for the lock of the lists, which `update` takes: there apt fails at once.
    locked = re.compile(r"Could not get lock|Unable to (lock|acquire)|is another process using it")
    COMMAND = ("apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=3")

    @staticmethod
    def broken(packages: Sequence[str]) -> List[str]:
        shown = output_of(["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\n", *packages])
        whole = ("installed", "not-installed", "config-files")
        return [line.split()[0] for line in shown.splitlines() if line.split()[-1] not in whole]

    @staticmethod
    def refresh() -> List[str]:
        return [*Apt.COMMAND, "update"]

    @staticmethod
    def install(packages: Sequence[str]) -> List[str]:
        return [*Apt.COMMAND, "--no-install-recommends", "install", *packages]

    @staticmethod
    def mend(output: str) -> Optional[List[str]]:
        return ["dpkg", "--configure", "-a"] if "dpkg was interrupted" in output else None

    @staticmethod
    def would_change(packages: Sequence[str]) -> List[str]:
        simulated = output_of([*Apt.COMMAND, "--simulate", "--no-install-recommends", "install", *packages], None)
        return [line.split()[1] for line in simulated.splitlines() if line.startswith(("Inst ", "Remv "))]

    @staticmethod
    def offered(packages: Sequence[str]) -> Optional[Dict[str, str]]:
        shown = output_of(["apt-cache", "policy", *packages], ASK_SECONDS)
        if not re.search(r"^ +-?\d+ (?!/var/lib/dpkg/status)", shown, re.M):  # in no list: are there any?
            lists = output_of(
                ["apt-get", "indextargets", "--format", "$(FILENAME)", "Created-By: Packages"], ASK_SECONDS
            )
            if not any(os.path.exists(path) for path in lists.splitlines()):
                return None
        found = re.findall(r"^(\S+):\n(?:  .*\n)*?  Candidate: (\S+)$", shown, re.M)
        return {name: version for name, version in found if version != "(none)"}

    @staticmethod
    def off(packages: Sequence[str]) -> Dict[str, List[str]]:
        """Of Ubuntu: most of what compiles is in universe, which an owner may have left out."""
        wanted = ["apt-get", "indextargets", "--format", "$(ORIGIN) $(COMPONENT)", "Created-By: Packages"]
        lists = set(output_of(wanted, ASK_SECONDS).splitlines())
        if "Ubuntu main" not in lists or "Ubuntu universe" in lists:
            return {}
        return {name: ["universe"] for name in packages}


class Dnf(Manager):
    name, program = "dnf", "dnf"
    # dnf itself waits for its own lock; rpm's is held by others too.
    locked = re.compile(r"can't create transaction lock|Failed to obtain (the )?(transaction )?lock")

    @staticmethod
    def command() -> List[str]:
        """dnf takes a proxy from the environment, but certificates by an option alone."""
        bundle = os.environ.get("CURL_CA_BUNDLE")
        return ["dnf", *([f"--setopt=sslcacert={bundle}"] if bundle else [])]

    @staticmethod
    def install(packages: Sequence[str]) -> List[str]:
        return [*Dnf.command(), "-y", "--setopt=install_weak_deps=False", "install", *packages]

    @staticmethod
    def would_change(packages: Sequence[str]) -> List[str]:
        """dnf answers no to its own question after it has shown what it would do."""
        shown = output_of(
            [*Dnf.command(), "--assumeno", "--setopt=install_weak_deps=False", "install", *packages], None
        )
        return re.findall(r"^ ([\w.+-]+) +\S+ +\S+ +\S+ +[\d.]+ \w+$", shown, re.M)

    @staticmethod
    def offered(packages: Sequence[str]) -> Optional[Dict[str, str]]:
        lines = Dnf.asked("%{name} %{version}", packages)
        return None if lines is None else {line.split()[0]: line.split()[1] for line in lines}

    @staticmethod
    def off(packages: Sequence[str]) -> Dict[str, List[str]]:
        listed = output_of(["dnf", "-q", "repolist", "--disabled"], ASK_SECONDS)
        ids = [line.split()[0] for line in listed.splitlines()[1:] if line.strip()]
        ids = [one for one in ids if not NEVER_NEEDED.search(one)]
        asked = [one for one in ids if OFTEN_OFF.search(one)] + [one for one in ids if not OFTEN_OFF.search(one)]
        found: Dict[str, List[str]] = {}
        if asked:
            only = ["--disablerepo=*", *(f"--enablerepo={one}" for one in asked[:MOST_ASKED])]
            for line in Dnf.asked("%{name} %{repoid}", packages, *only) or ():
                found.setdefault(line.split()[0], []).append(line.split()[1])
        return found

    @staticmethod
    def asked(form: str, packages: Sequence[str], *options: str) -> Optional[List[str]]:
        """The lines of two words that dnf 4 and 5 print; None where the repositories cannot be read."""
        query = [
            *Dnf.command(),
            "-q",
            *options,
            "repoquery",
            "--available",
            "--latest-limit=1",
            "--queryformat",
            form + "\\n",
        ]
        done = answer([*query, *packages])
        if done is None or done.returncode:
            return None
        return [line for line in done.stdout.splitlines() if len(line.split()) == 2]


class Zypper(Manager):
    name, program = "zypper", "zypper"
    locked = re.compile(r"System management is locked")
    locked_codes = (7,)
    environment: ClassVar[Mapping[str, str]] = {"ZYPP_LOCK_TIMEOUT": "300"}
    NOTHING_FOUND = 104
    COMMAND = ("zypper", "--non-interactive")

    @staticmethod
    def install(packages: Sequence[str]) -> List[str]:
        return [*Zypper.COMMAND, "install", "--no-recommends", "--auto-agree-with-licenses", *packages]

    @staticmethod
    def would_change(packages: Sequence[str]) -> List[str]:
        shown = output_of([*Zypper.COMMAND, "--xmlout", "install", "--dry-run", "--no-recommends",
                           "--auto-agree-with-licenses", *packages], None)  # fmt: skip
        return re.findall(r'<solvable type="package" name="([^"]+)"', shown)

    @staticmethod
    def offered(packages: Sequence[str]) -> Optional[Dict[str, str]]:
        query = [*Zypper.COMMAND, "--xmlout", "search", "--match-exact", "--details", "--type", "package"]
        done = answer([*query, *packages], Zypper.environment)
        if done is None or done.returncode not in (0, Zypper.NOTHING_FOUND):
            return None
        found: Dict[str, str] = {}
        for tag in re.findall(r"<solvable [^>]*>", done.stdout):
            values = dict(re.findall(r'([\w-]+)="([^"]*)"', tag))
            if values.get("name") in packages and values.get("repository") != "(System Packages)":
                found.setdefault(values["name"], values.get("edition", ""))
        return found

    @staticmethod
    def off(packages: Sequence[str]) -> Dict[str, List[str]]:
        """zypper does not search a repository that is off: all that are named."""
        listed = output_of([*Zypper.COMMAND, "--xmlout", "repos"], ASK_SECONDS)
        repos = [dict(re.findall(r'([\w-]+)="([^"]*)"', tag)) for tag in re.findall(r"<repo [^>]*>", listed)]
        aliases = [one["alias"] for one in repos if one.get("enabled") == "0" and not NEVER_NEEDED.search(one["alias"])]
        return {name: aliases for name in packages} if aliases else {}


class Pacman(Manager):
    name, program = "pacman", "pacman"
    locked = re.compile(r"unable to lock database")
    COMMAND = ("pacman", "--noconfirm", "--noprogressbar")

    @staticmethod
    def refresh() -> Optional[List[str]]:
        """Only where there are no lists yet: newer lists with older packages are a half upgrade, which Arch does not
        support, and an upgrade is the owner's."""
        return None if Pacman.offered(["pacman"]) is not None else [*Pacman.COMMAND, "-Sy"]

    @staticmethod
    def install(packages: Sequence[str]) -> List[str]:
        return [*Pacman.COMMAND, "-S", "--needed", *packages]

    @staticmethod
    def would_change(packages: Sequence[str]) -> List[str]:
        return output_of([*Pacman.COMMAND, "-S", "--needed", "--print", "--print-format", "%n", *packages]).split()

    @staticmethod
    def offered(packages: Sequence[str]) -> Optional[Dict[str, str]]:
        if not output_of(["pacman", "-Slq"]).strip():
            return None
        shown = output_of(["pacman", "-Si", *packages])
        return dict(re.findall(r"^Name +: (\S+)\nVersion +: (\S+)$", shown, re.M))


MANAGERS: Sequence[Type[Manager]] = (Apt, Dnf, Zypper, Pacman)  # in the order in which they are looked for


def answer(
    command: Sequence[str], environment: Optional[Mapping[str, str]] = None
) -> Optional[subprocess.CompletedProcess[str]]:
    """A question to a manager, ended; None where it cannot run or takes too long."""
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              timeout=ASK_SECONDS, text=True, errors="replace",
                              env={**os.environ, **(environment or {}), "LC_ALL": "C.UTF-8"})  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None


def detect() -> Optional[Type[Manager]]:
    """The package manager of this host."""
    return next((manager for manager in MANAGERS if shutil.which(manager.program, path=PLACES)), None)


def by_name(name: Optional[str]) -> Optional[Type[Manager]]:
    return next((manager for manager in MANAGERS if manager.name == name), None)


def is_there(shown_by: Sequence[str], root: str = "/") -> bool:
    """Whether this host has a program or a file of these; `root` stands before every path in tests."""
    for one in shown_by:
        if one.startswith("/"):
            if glob.glob(os.path.join(root, one.lstrip("/"))):
                return True
        elif shutil.which(one, path=":".join(os.path.join(root, part.lstrip("/")) for part in JOB_PATH.split(":"))):
            return True
    return False


def missing(manager: Optional[Type[Manager]], needs: Needs, root: str = "/") -> List[str]:
    """The words of what the host lacks, or has half installed."""
    there = {word: is_there(need["shown_by"], root) for word, need in needs.items()}
    words = {package: word for word in needs if there[word] for package in candidates(needs[word])}
    broken = {words[name] for name in (manager.broken(sorted(words)) if manager and words else ()) if name in words}
    return [word for word in needs if not there[word] or word in broken]


def candidates(need: Mapping[str, Any]) -> List[str]:
    return [package for entry in need["packages"] for package in entry.split()]


def choose(need: Mapping[str, Any], offered: Optional[Mapping[str, str]]) -> Optional[str]:
    """The first entry of the need's packages that is offered as a whole; the very first where nobody can tell."""
    entries: Sequence[str] = need["packages"]
    if offered is None:
        return entries[0] if entries else None
    return next((entry for entry in entries if all(name in offered for name in entry.split())), None)


def offers(manager: Type[Manager], needs: Needs) -> Dict[str, Dict[str, Any]]:
    """What brings each of the needs, by word, as the contract above says."""
    offered = manager.offered(sorted({package for need in needs.values() for package in candidates(need)}))
    if offered is None:
        return {}
    chosen = {word: choose(need, offered) for word, need in needs.items()}
    lacking = sorted({name for word, entry in chosen.items() if entry is None for name in candidates(needs[word])})
    off = manager.off(lacking) if lacking else {}
    return {
        word: {
            "package": entry,
            "version": offered[entry.split()[0]] if entry else "",
            "off": sorted({one for name in candidates(needs[word]) for one in off.get(name, ())}) if not entry else [],
        }
        for word, entry in chosen.items()
    }


def main(argv: List[str]) -> int:
    verb, name, needs, *variables = argv
    manager = by_name(name)
    if verb != "offers" or manager is None:
        print(f"error: the package manager {name!r} is unknown to packages.py", file=sys.stderr)
        return 1
    for text in variables:
        os.environ.update(json.loads(text))
    print(json.dumps(offers(manager, json.loads(needs))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
