"""Read the state of a deployed host and print it as one JSON object.

Contract: one argument, {"instances": [names], "quick": bool}; prints one line of JSON and changes nothing (gate.py asks
each instance for some completions of a few tokens). Runs as root on the host, by `python3 -c`: Python 3.8, standard
library, imports nothing of ours. A missing file or value is null, never an error. API keys and tokens are read, never
printed. `quick` does not read model files: it takes the checksum in FILE.verified, if the file did not change since.
"""

import glob
import hashlib
import http.client
import json
import os
import pwd
import re
import socket
import ssl
import subprocess
import sys
import time
import urllib.request

OPT = "/opt/llamafleet"
ETC = "/etc/llamafleet"
VAR = "/var/lib/llamafleet"
RUN = "/run/llamafleet"
UNITS = "/etc/systemd/system"
# Seconds that a gate may take beyond the time to load the model: a busy server answers late.
GATE_SECONDS = 600
# Of an instance that starts and stops on demand: how often its facts are read anew, and the wait before.
LOOKS = 3
SETTLE_SECONDS = 60
BETWEEN = ("activating", "deactivating")
# Before a command that must not run as root.
AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs", "--bounding-set=-all")
LISTEN = "0A"  # TCP_LISTEN in /proc/net/tcp, include/net/tcp_states.h


def collect(request):
    return {
        "euid": os.geteuid(),
        "release": release(),
        "paths": {path: place(path) for path in sorted(set(tree()))},
        "helpers": helpers(),
        "staged": listing(VAR + "/staged"),
        "run": listing(RUN),
        "units": units(),
        "instances": {name: instance(name, request["quick"]) for name in request["instances"]},
    }


def tree():
    """Every path of ours, but for the sources and build trees of llama.cpp, the jobs' files and what is in a folder of
    helpers; and the units."""
    skipped = {VAR + "/src", VAR + "/build", VAR + "/jobs", VAR + "/staged"}
    yield from (OPT, ETC, VAR, RUN)
    yield from glob.glob(UNITS + "/llama-server-*.service")
    yield from glob.glob(UNITS + "/llama-server-*.timer")
    yield from glob.glob(UNITS + "/llamafleet-demand-*")
    for root in (OPT, ETC, VAR):
        for folder, folders, files in os.walk(root):
            yield from (os.path.join(folder, name) for name in folders + files)
            inside = skipped if not folder.startswith(OPT + "/helpers") else {os.path.join(folder, n) for n in folders}
            folders[:] = [name for name in folders if os.path.join(folder, name) not in inside]


def place(path):
    """What lies there, the link itself where it is one; of a folder that may be on another disk, the folder."""
    found = stat_of(path)
    kinds = (("link", os.path.islink), ("folder", os.path.isdir), ("file", os.path.isfile))
    kind = next((kind for kind, is_it in kinds if is_it(path)), "other")
    elsewhere = (OPT, OPT + "/releases", VAR, VAR + "/models", VAR + "/src", VAR + "/build")
    may_lead_elsewhere = path in elsewhere or os.path.dirname(path) == VAR + "/models"
    if kind == "link" and may_lead_elsewhere and os.path.isdir(path):
        kind, found = "folder", stat_of(os.path.realpath(path))
    return found and {"kind": kind, "mode": int(found["mode"], 8), "uid": found["uid"], "gid": found["gid"]}


def helpers():
    """The key of the current helpers, and the files that are not what was installed, or that others may change."""
    folder = OPT + "/helpers/current"
    try:
        key = os.path.basename(os.readlink(folder))
    except OSError:
        return {"key": None, "damaged": []}
    lines = (read_text(folder + "/helpers.sha256") or "").splitlines()
    wanted = dict(reversed(line.split("  ", 1)) for line in lines if "  " in line)
    files = {name: stat_of(f"{folder}/{name}") for name in wanted}
    bad = [name for name, found in files.items()
           if not found or found["uid"] or int(found["mode"], 8) & 0o022 or os.path.islink(f"{folder}/{name}")
           or sha256_of(f"{folder}/{name}") != wanted[name]]  # fmt: skip
    return {"key": key, "damaged": sorted(bad) if wanted else ["helpers.sha256"]}


def listing(path):
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def stat_of(path):
    """Owner, group, mode, size and time of change; a link is not followed. Null if there is no such file."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return {
        "owner": user_name(status.st_uid),
        "uid": status.st_uid,
        "gid": status.st_gid,
        "mode": oct(status.st_mode & 0o7777)[2:].zfill(4),
        "size_bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
    }


def user_name(uid):
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def read_text(path):
    try:
        with open(path, errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return None


def read_json(path):
    """The JSON object in a file; null if the file is missing or has no JSON object."""
    try:
        value = json.loads(read_text(path) or "")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def sha256_of(path):
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()


def output_of(command, seconds=60):
    """(exit status, standard output and standard error together); the status is None if the command did not end."""
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    return result.returncode, result.stdout.decode("utf-8", "replace")


def release():
    """The release that the link `current` leads to, with its files' checksums; null if there is no such link."""
    try:
        target = os.readlink(OPT + "/current")
    except OSError:
        return None
    folder = os.path.join(OPT, target)
    return {
        "target": target,
        "record": read_json(folder + "/release.json"),
        "files": {name: sha256_of(f"{folder}/bin/{name}") for name in listing(folder + "/bin")},
        "version": output_of([*AS_NOBODY, folder + "/bin/llama-server", "--version"])[1].strip()[:2000],
    }


def units():
    """Every llama-server-*.service that is installed or loaded."""
    names = {os.path.basename(path) for path in glob.glob(UNITS + "/llama-server-*.service")}
    for verb in ("list-units", "list-unit-files"):
        _, text = output_of(["systemctl", verb, "--all", "--plain", "--no-legend", "llama-server-*.service"])
        names |= set(re.findall(r"^(llama-server-\S+\.service)\s", text, re.MULTILINE))
    # The units of a liveness check are read with their instance.
    return sorted(name for name in names if not name.endswith("-liveness.service"))


def instance(name, quick):
    """Its facts. Those of a server that starts on demand are of one moment: they are read again where it started or
    stopped meanwhile."""
    unit = f"llama-server-{name}.service"
    for _ in range(LOOKS):
        found = look(name, unit, quick)
        was = moment(found["state"])
        if not gate_of(found["plan"]).get("socket") or (was == moment(show(unit)) and was[0] not in BETWEEN):
            break
        settle(unit)
    return found


def moment(state):
    return state.get("ActiveState"), state.get("MainPID")


def settle(unit):
    """Wait until it neither starts nor stops, for a while: a model loads, or running replies end."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while show(unit).get("ActiveState") in BETWEEN and time.monotonic() < deadline:
        time.sleep(0.2)


def look(name, unit, quick):
    folder = f"{ETC}/instances/{name}"
    plan = read_json(folder + "/plan.json")
    kept = read_json(f"{VAR}/good/{name}/plan.json")
    shown = show(unit)
    pid = int(shown.get("MainPID") or 0)
    return {
        "plan": plan,
        "kept_plan": kept,
        "plan_sha256": sha256_of(folder + "/plan.json"),
        "plan_file": stat_of(folder + "/plan.json"),
        "good": {
            "unit_sha256": sha256_of(f"{VAR}/good/{name}/{unit}"),
            "plan_sha256": sha256_of(f"{VAR}/good/{name}/plan.json"),
            "secrets_as_kept": all(
                read_text(f"{folder}/{one}") == read_text(f"{VAR}/good/{name}/{one}")
                for one in ("api-keys", "tls-certificate", "tls-key", "chat-template", "grammar", "json-schema")
            ),
        },
        "drop_ins": drop_ins(unit),
        "unit": unit_file(unit),
        "state": shown,
        "process": process(pid),
        "listening": listening(1, gate_of(plan)) if gate_of(plan).get("socket") else listening(pid),
        "keys": keys(folder + "/api-keys"),
        "models": {path: model(path, quick) for path in sorted({*paths(plan), *paths(kept)})},
        "liveness": liveness(name),
        "demand": demand(name),
        # A server that starts on demand, and does not run, is not started for a check.
        "gate": gate(folder + "/plan.json", gate_of(plan)) if pid or not gate_of(plan).get("socket") else None,
        "allowed_origin": allowed_origin(gate_of(plan).get("url"), gate_of(plan).get("socket")),
    }


def paths(plan):
    """The model's files of a plan.json; none where it is damaged."""
    files = (plan or {}).get("files")
    named = [file.get("path") for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    return [path for path in named if isinstance(path, str) and path.startswith("/") and "\0" not in path]


def gate_of(plan):
    gate = (plan or {}).get("gate")
    return gate if isinstance(gate, dict) else {}


def liveness(name):
    """State of the timer, and whether both units of the liveness check are those that last passed the gate."""
    units = [f"llama-server-{name}-liveness.{kind}" for kind in ("service", "timer")]
    return beside_server(name, units, units[1])


def demand(name):
    """State of the socket that starts the server, and whether its units are those that last passed the gate."""
    units = [f"llamafleet-demand-{name}.{kind}" for kind in ("socket", "service")]
    return beside_server(name, units, units[0])


def beside_server(name, units, enabled):
    """State of the units of an instance beside its server: of the one that systemd enables, and whether all are kept."""
    texts = {unit: read_text(f"{UNITS}/{unit}") for unit in units}
    shown = show(enabled)
    return {
        "active": shown.get("ActiveState"),
        "enabled": shown.get("UnitFileState"),
        "drop_ins": [path for unit in units for path in drop_ins(unit)],
        "units": [unit for unit in units if texts[unit] is not None],
        "as_kept": all(texts[unit] == read_text(f"{VAR}/good/{name}/{unit}") for unit in units),
    }


def drop_ins(unit):
    """Drop-ins of this unit alone, whether systemd has read them or not."""
    places = (
        "/etc/systemd/system",
        "/run/systemd/system",
        "/etc/systemd/system.control",
        "/run/systemd/system.control",
    )
    return sorted(path for place in places for path in glob.glob(f"{place}/{unit}.d/*.conf"))


def show(unit):
    names = (
        "LoadState",
        "ActiveState",
        "SubState",
        "UnitFileState",
        "MainPID",
        "NRestarts",
        "DropInPaths",
        "FragmentPath",
        "NeedDaemonReload",
    )
    _, text = output_of(["systemctl", "show", "--property=" + ",".join(names), unit])
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def unit_file(unit):
    path = f"{UNITS}/{unit}"
    text = read_text(path)
    if text is None:
        return None
    match = re.search(r"plan ([0-9a-f]{16})\b", text)
    return {**stat_of(path), "sha256": sha256_of(path), "identity": match.group(1) if match else None}


def process(pid):
    """The main process as /proc shows it; null if it does not run."""
    status = read_text(f"/proc/{pid}/status") if pid else None
    if status is None:
        return None
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    uids = [user_name(int(uid)) for uid in fields["Uid"].split()]
    try:
        exe = os.readlink(f"/proc/{pid}/exe")
    except OSError:
        exe = None
    wanted = ("NoNewPrivs", "Seccomp", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    return {
        "pid": pid,
        "exe": exe,
        "users": sorted(set(uids)),
        "age_seconds": age(pid),
        "deleted": deleted(pid),
        "inherited": inherited(pid),
        "CoreLimit": core_limit(pid),
        **{name: int(fields[name], 16 if name.startswith("Cap") else 10) for name in wanted if name in fields},
    }


def inherited(pid):
    """Variables of llama-server that the process was started with, and presets of the host that it sees."""
    words = (read_text(f"/proc/{pid}/environ") or "").split("\0")
    names = [word.split("=")[0] for word in words if word.startswith(("LLAMA_ARG_", "LLAMA_API_KEY=", "AIP_MODE="))]
    path = "/etc/llama.cpp/config.ini"
    return sorted(names) + ([path] if os.path.exists(f"/proc/{pid}/root{path}") else [])


def deleted(pid):
    """Files of our releases that the process runs from although they are gone."""
    text = read_text(f"/proc/{pid}/maps") or ""
    return sorted(set(re.findall(rf"({OPT}/releases/\S+) \(deleted\)$", text, re.MULTILINE)))


def core_limit(pid):
    """Soft and hard limit of core files; "0 0": the kernel writes no core file."""
    match = re.search(r"^Max core file size\s+(\S+)\s+(\S+)", read_text(f"/proc/{pid}/limits") or "", re.MULTILINE)
    return match and " ".join(match.groups())


def age(pid):
    """Seconds since the process started: field 22 of /proc/PID/stat is in ticks since boot, proc(5)."""
    text = read_text(f"/proc/{pid}/stat")
    if text is None:
        return None
    started = int(text.rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
    return round(time.clock_gettime(time.CLOCK_BOOTTIME) - started, 1)


def listening(pid, spec=None):
    """[address, port] of every TCP socket on which the process listens; with a plan's `gate`, of those at its port."""
    own = int(str(spec.get("url")).rpartition(":")[2] or 0) if spec else None
    inodes = set()
    for number in listing(f"/proc/{pid}/fd") if pid else []:
        try:
            inodes.add(os.readlink(f"/proc/{pid}/fd/{number}"))
        except OSError:
            continue
    sockets = []
    for table in ("tcp", "tcp6"):
        for line in (read_text(f"/proc/{pid}/net/{table}") or "").splitlines()[1:]:
            words = line.split()
            if words[3] == LISTEN and f"socket:[{words[9]}]" in inodes:
                address, port = words[1].split(":")
                if own in (None, int(port, 16)):
                    sockets.append([ip_text(address), int(port, 16)])
    return sorted(sockets)


def ip_text(digits):
    """The IP address of a field of /proc/net/tcp: groups of four bytes, each in the byte order of the machine."""
    packed = b"".join(int(digits[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(digits), 8))
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def keys(path):
    """Owner, mode and number of keys of the file; null if there is none. Never the keys."""
    file = stat_of(path)
    return file and {
        **file,
        "count": len([line for line in (read_text(path) or "").splitlines() if line.strip()]),
    }


_hashed = {}


def model(path, quick):
    """Mode, size and checksum of a model file; a file that instances share is read once."""
    file = stat_of(path)
    if file is None:
        return None
    note = read_json(path + ".verified") or {}
    if path not in _hashed and not quick:
        _hashed[path] = sha256_of(path)
    noted = stat_of(path + ".verified")
    unchanged = (note.get("size_bytes"), note.get("mtime_ns")) == (file["size_bytes"], file["mtime_ns"])
    unchanged = unchanged and file["ctime_ns"] <= noted["ctime_ns"]
    return {**file, "noted_sha256": note.get("sha256") if unchanged else None, "sha256": _hashed.get(path)}


def allowed_origin(url, path=None):
    """The server's Access-Control-Allow-Origin for a web page of another site; null if the server does not answer.
    `path`: of its own socket, where it has one. There a connection starts nothing."""
    if not isinstance(url, str) or not url:
        return None
    if path:
        return origin_at(url, path)
    request = urllib.request.Request(
        f"{url}/v1/completions", headers={"Origin": "http://other.example"}, method="OPTIONS"
    )
    unverified = ssl.create_default_context()  # the URL has the IP address, which no certificate names
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    handlers = urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=unverified)
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=30) as answer:
            return answer.headers.get("Access-Control-Allow-Origin", "")
    except (OSError, ValueError, http.client.HTTPException):
        return None


def origin_at(url, path):
    connection = http.client.HTTPConnection("localhost", timeout=30)
    try:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(30)
        sock.connect(path)
        unverified = ssl.create_default_context()
        unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
        connection.sock = unverified.wrap_socket(sock) if url.startswith("https:") else sock
        connection.request("OPTIONS", "/v1/completions", headers={"Origin": "http://other.example"})
        return connection.getresponse().getheader("Access-Control-Allow-Origin", "")
    except (OSError, ValueError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def gate(plan, spec):
    """The result of gate.py: {"checks": [...]}, or {"error": text} if it cannot be run."""
    program = OPT + "/helpers/current/gate.py"
    if not os.path.exists(program) or not spec:
        return {"error": f"{program if spec else plan} is missing"}
    loading = spec.get("health_seconds")
    code, text = output_of(
        [sys.executable, "-s", "-E", "-B", program, "check", plan],
        seconds=(loading if isinstance(loading, int) else 0) + GATE_SECONDS,
    )
    lines = text.strip().splitlines() or ["it printed nothing"]
    try:
        return json.loads(lines[-1])
    except (ValueError, RecursionError):  # of a traceback the last line has the cause
        return {"error": f"gate.py ended with exit code {code}: {lines[-1][-500:]}"}


if __name__ == "__main__":
    print(json.dumps(collect(json.loads(sys.argv[1]))))
