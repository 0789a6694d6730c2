"""What connections, sudo, disks and shells print where they fail, as a sentence with the cause and the way out.

Everything that reaches a host passes its errors through here: deploys, `llamafleet status`, `llamafleet plan
--inventory`, an uninstallation and `tests/hosts`. Texts in, texts out; imports nothing of ours.
"""

from __future__ import annotations

import re
import traceback

# In front of what a program printed, which stays readable in the message.
SAID_CHARACTERS = 300
# Free bytes and files (inodes) of a file system that count as none, beside a hundredth of it.
LITTLE = {"bytes": 65536, "files": 1}

# Of a connection: what pyinfra and paramiko, or OpenSSH in tests/hosts, say; then the cause and the way out.
CONNECTION = (
    (r"no host key for .* found|No \S+ host key is known",
     "its SSH key is not in your known_hosts: connect once with ssh and compare the key, or set "
     "ssh_strict_host_key_checking = \"accept-new\""),
    (r"host key for .* does not match|REMOTE HOST IDENTIFICATION HAS CHANGED|Host key verification failed",
     "it shows another SSH key than your known_hosts has: if the host was installed anew, remove the old key by "
     "ssh-keygen -R ADDRESS, connect once with ssh and compare the new one; if not, another machine may answer for it"),
    (r"No such private key file|Identity file .* not accessible",
     "ssh_key names no file: give the path of a private key"),
    (r"Private key file is encrypted|passphrase|Invalid key",
     "your SSH key cannot be used: check ssh_key, and give ssh_key_password or add the key to an agent (ssh-add)"),
    (r"Authentication error|Authentication failed|No authentication methods|Permission denied \(|"
     r"Too many authentication failures|no existing session",
     "it refuses the login: check ssh_user and ssh_key, and that the key is in authorized_keys of that user there"),
    (r"Could not resolve hostname|Name or service not known|name resolution|No address associated|"
     r"nodename nor servname",
     "its name is not known to this machine: check the name in the inventory or ssh_hostname, or your DNS"),
    (r"No route to host|Network is unreachable|Host is down|Host is unreachable",
     "there is no way to it: check its address, your network or VPN, and whether it is up"),
    (r"Connection refused|Unable to connect to port",
     "nothing answers at its SSH port: check that it is up, that sshd runs there, and ssh_port; a host that starts "
     "takes a minute"),
    (r"Error reading SSH protocol banner|kex_exchange_identification|Invalid SSH|Incompatible",
     "what answers at the port does not go on as an SSH server does: check ssh_port, and whether sshd there is "
     "overloaded or refuses this machine (MaxStartups, fail2ban)"),
    (r"timed? ?out|time-?out",
     "it does not answer: check that it is up, its address, and whether a firewall drops the connection"),
    (r"reset by peer|EOF|closed by|Broken pipe|open_session|not open|not connected|Server connection dropped|"
     r"connection is closed|Socket is closed",
     "the connection ended: the host went down or starts again, or its network broke; run again when it is up"),
)  # fmt: skip

# Of a command on a host.
COMMAND = (
    (r"python3: not found|python3: command not found|failed to run command .python3|llamafleet: python3 not found",
     "python3 is missing on the host: install it (apt-get install python3, dnf install python3), or name "
     "another one in the setting python"),
    (r"can't open file '/opt/llamafleet/helpers/",
     "the host has no helpers of llamafleet: run the whole deploy.py first, or tasks.bootstrap.bootstrap"),
    (r"\bsudo: (command )?not found|failed to run command .sudo",
     "the host has no sudo: connect as root (ssh_user = \"root\") without `_sudo` and --sudo, or install sudo there"),
    (r"not in the sudoers|Sorry, user .* is not allowed to|may not run sudo",
     "sudo does not work for this user, who may not run commands as root: allow it in /etc/sudoers.d, or connect as "
     "root (ssh_user)"),
    (r"sudo: .*(setuid|effective uid)|no new privileges",
     "sudo does not work for this user, because the program may not become root there: connect as root (ssh_user)"),
    (r"sudo: .*(must have a tty|a terminal is required|no tty present|askpass)|sudo: .*password is required|"
     r"sudo: no password was provided",
     "sudo does not work for this user without a password: allow that (NOPASSWD in /etc/sudoers.d), connect as root "
     "(ssh_user), or run pyinfra at a terminal, where it asks for the password"),
    (r"sudo: .*incorrect password|Sorry, try again",
     "sudo does not work for this user with the password that was given: give the right one, or connect as root "
     "(ssh_user)"),
    (r"su: (Authentication failure|must be run from a terminal)",
     "su does not accept the password: check _su_password, or connect as root (ssh_user)"),
    (r"not been booted with systemd|Failed to connect to (system )?(scope )?bus",
     "systemd does not run this host, or does not answer (a container, a rescue system?): the services need it"),
)  # fmt: skip

# Programs that are started on the operator's own machine, and the package that has each, by package manager.
LOCAL = {
    "git": "apt-get install git, dnf install git, brew install git",
    "ssh": "apt-get install openssh-client, dnf install openssh-clients",
    "docker": "apt-get install docker.io",
    "podman": "apt-get install podman, dnf install podman",
}
# As a shell, Python and git say that there is no such program.
_MISSING = re.compile(
    r"(?:^|[ '\"/])(?P<a>[\w.+-]+): (?:command )?not found|No such file or directory: '?(?P<b>[\w.+/-]+)|"
    r"cannot run (?P<c>[\w.+/-]+): No such file",
    re.MULTILINE,
)

FULL = re.compile("No space left on device|Disk quota exceeded|has no space left|[Dd]isk (is )?full", re.IGNORECASE)
_READ_ONLY = re.compile("Read-only file system", re.IGNORECASE)
_NO_MEMORY = re.compile("Cannot allocate memory", re.IGNORECASE)


def of_connection(text: str) -> str:
    """Why a host cannot be reached, and what to do, with what was said in brackets; the text itself where the cause is
    not known."""
    local = of_local(text)
    return local if local != text else _explained(text, CONNECTION)


def of_local(text: str) -> str:
    """Why a program failed on the operator's own machine: which one is missing there, and how to install it; the text
    itself where it says something else."""
    for found in _MISSING.finditer(text):
        name = str(found["a"] or found["b"] or found["c"]).rpartition("/")[2]
        if name in LOCAL:
            return f"{name} is missing on this machine, where you run llamafleet: install it ({LOCAL[name]})"
    return text


def of_command(text: str) -> str:
    """Why a command failed on a host, and what to do; the text itself where the cause is not known."""
    explained = _explained(text, COMMAND)
    if explained != text:
        return explained
    if _READ_ONLY.search(text):
        return (
            f"{text}\nthe file system is mounted read-only, mostly after an error of its disk: see dmesg "
            "there, repair it and mount it for writing again"
        )
    if _NO_MEMORY.search(text):
        return f"{text}\nthe host has no memory left: see what takes it (systemd-cgtop -m), or restart the host"
    return text


def of_inventory(error: BaseException, path: str) -> str:
    """Why an inventory, which is Python, cannot be used: the line where it fails, and how."""
    inner = getattr(error, "exception", error)  # of pyinfra's errors, which wrap those of the file
    lines = [frame.lineno for frame in traceback.extract_tb(inner.__traceback__) if frame.filename.endswith(path)]
    line = inner.lineno if isinstance(inner, SyntaxError) else lines[-1] if lines else None
    text = inner.msg if isinstance(inner, SyntaxError) else str(inner)
    hint = ""
    if isinstance(inner, NameError) and (found := re.search(r"'(true|false|null)'", text)):
        hint = f": write {({'true': 'True', 'false': 'False', 'null': 'None'})[found[1]]}"
    return f"{f'line {line}: ' if line else ''}{type(inner).__name__}: {text}{hint}"


def is_full(text: str) -> bool:
    """Whether a failed command says that a disk is full."""
    return FULL.search(text) is not None


def paths_in(text: str) -> list[str]:
    """The absolute paths that a text names, each once, at most eight."""
    found = re.findall(r"(?<![\w./:])/[\w.+=@/-]*[\w+=@-]", text)
    return list(dict.fromkeys(found))[:8]


def space(lines: list[str]) -> str:
    """A sentence of what `df -P -B1` and `df -P -i` print of some paths, each line after the path and a blank: how much
    is free of file systems that are nearly full, of all where none is. Empty where nothing can be read from it."""
    systems: dict[str, tuple[str, int, int, str]] = {}
    for line in lines:
        found = re.fullmatch(r"(bytes|files) (\S+) .*\s(\d+)\s+\d+\s+(\d+)\s+\d+%\s+(/.*)", line.strip())
        if found and int(found[3]):
            unit, path, size, free, mount = found.groups()
            systems.setdefault(f"{unit} {mount}", (unit, int(size), int(free), path))
    full = {key: one for key, one in systems.items() if one[2] < max(one[1] // 100, LITTLE[one[0]])}
    told = full or {key: one for key, one in systems.items() if one[0] == "bytes"}
    return "; ".join(
        f"{free} of {size} {unit} are free where {path} is, on the file system at {key.partition(' ')[2]}"
        for key, (unit, size, free, path) in told.items()
    )


def _explained(text: str, causes: tuple[tuple[str, str], ...]) -> str:
    for pattern, way_out in causes:
        if re.search(pattern, text, re.IGNORECASE):
            said = " ".join(text.split())
            said = said if len(said) <= SAID_CHARACTERS else f"{said[:SAID_CHARACTERS]}..."
            return f"{way_out} ({said})"
    return text
