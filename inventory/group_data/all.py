"""Every setting of llamafleet: its default, its unit, and the reason for the value.

This is the only place of defaults; they hold for inventories in other folders too. An
inventory overrides any of them for a group (`group_data/GROUP.py` beside it) or a host (its
data dictionary). A key that is not listed here is refused, and the message names the
nearest known key.
"""

# --- what to serve ---------------------------------------------------------------------------

# The instances of a host, each with a systemd unit `llama-server-NAME.service`. Several instances of a
# host are planned by `priority`, and with equal priority in the order of this list. Every entry gives
# `name`, `source` and `port`, and may override any key of `model_defaults`.
#   source: "hf:OWNER/REPO/FILE.gguf[@REVISION]", an http(s) URL, or a link of the Hub as a browser has it;
#           "hf:OWNER/REPO[:QUANTISATION]": the file that llama-server -hf would take; or a path of the host or, where
#           it has no such file, of your machine: that file is sent.
#           For a split model give the first shard, -00001-of-0000N.gguf; the other shards follow from it.
models = []

model_defaults = {
    # Tokens that one request may use, prompt and reply together; every slot gets this many. The plan
    # never takes fewer than you set. None: what the model was trained for, 32768 at most.
    "context_tokens": None,
    # Of several instances on a host, the one with the highest priority is planned first and takes the
    # memory that it can use; instances with equal priority in the order of `models`.
    "priority": 0,
    # --- the workload: the plan minimises its time ---
    # A named workload for the next four keys: "chat", "agent", "rag" or "batch" (docs/planning.md has their values). A
    # key in the model's entry comes first, and so does one in `model_defaults` with another value than here. None:
    # the values here.
    "profile": None,
    # Prompt tokens of a typical request, without those that are in the prompt cache already. A long
    # prompt makes a larger ubatch worth its memory. 2048: a question with a page or a file, or one
    # step of a chat with tools.
    "prompt_tokens": 2048,
    # Tokens in a slot's KV cache while a reply is written, on average. They decide how long attention
    # takes, and so which parts of a dense model go to RAM. None: a quarter of the context, because
    # a context is set to be used, and at least the prompt and half of the reply.
    "live_tokens": None,
    # Tokens of a reply. 512: about a page.
    "reply_tokens": 512,
    # Requests that come at the same time. 1: a single slot, with the whole speed of the host.
    "concurrency": 1,
    # --- what the plan may choose ---
    # Requests served at the same time, each with the whole context. None: as many as `concurrency`, or
    # fewer if the workload is then done sooner, although requests wait for each other.
    "slots": None,
    # Types of the KV cache that the plan may use, the best first. It uses a later type if that saves at
    # least a tenth of the workload's time, or if the first type does not fit. Quantised types save memory,
    # but can cost much speed and some quality, so they are used only if you list them. "f16/q8_0" is K/V: K
    # suffers more from it than V.
    "kv_types": ["f16"],
    # Tokens computed together while a prompt is read (--ubatch-size; llama.cpp's default is 512). A larger
    # ubatch reads a prompt faster, above all with experts in RAM, and takes more memory. None: the plan
    # chooses from 256 to 8192 by the workload.
    "ubatch_tokens": None,
    # Tokens that are put together to one batch, at least `ubatch_tokens` (--batch-size). None: 2048, llama.cpp's.
    "batch_tokens": None,
    # Threads for the CPU part. None: one for each physical core; on a hybrid processor one for each
    # performance core, and only on these cores. More threads are slower.
    "threads": None,
    # Threads while a prompt is read. None: as many as `threads`.
    "threads_batch": None,
    # The CPUs that the server may run on, such as "0-5,12". None: the plan chooses.
    "cpus": None,
    # Memory on a host with several NUMA nodes: "interleave" over all, "local" as the kernel gives it, or "auto": the
    # plan chooses.
    "numa": "auto",
    # How the model is loaded: "none" reads it into the server's own memory, "mlock" keeps it there too.
    "load_mode": "none",
    # True: a GPU computes large batches with weights that are in RAM, too. False: never (--no-op-offload).
    "op_offload": True,
    # The CPU has weights in an order of its own (True), of the types that it has one for, or as they are in the file
    # (False, --no-repack). Which reads prompts faster depends on type and processor. None: its own order, and a tune
    # measures both.
    "repack": None,
    # Layers whose experts (of a dense model: FFN) stay in RAM, the last ones. None: the plan chooses.
    "spilled_layers": None,
    # RAM for llama-server's prompt cache, MiB. llama.cpp's own default is 8192, and its fit does not count it.
    "prompt_cache_mib": 1024,
    # RAM for the context checkpoints of all slots, MiB. A model with attention windows or recurrent layers
    # needs them to go back in a conversation without reading it again. llama.cpp's own limit is 32 checkpoints
    # for each slot, of any size: 0.4 GiB each for Gemma 3 27B. Other models make none.
    "context_checkpoints_mib": 1024,
    # --- what it serves ---
    # "chat" (chat and completions), "embedding" or "reranking". An embedding or reranking server computes a whole
    # input at once, so its ubatch is its context.
    "serves": "chat",
    # How an embedding is made from the tokens': "none", "mean", "cls", "last" or "rank". None: as the file says.
    "pooling": None,
    # Of a reranking server: a question with a text that answers it and one that does not, which the gate asks it:
    # {"query": "...", "relevant": "...", "irrelevant": "..."}. None: any finite scores pass.
    "rerank_example": None,
    # The projector (mmproj) that makes a chat model see images or hear audio: a source as of a model, or a dictionary
    # with "source" and the keys "sha256" and "mirrors"; "auto": the one of the model's repository that
    # llama-server -hf would take. None: text alone.
    "projector": None,
    # Tokens that one image takes at least and at most, where the model has images of any size; memory for the largest
    # is planned. None: the projector's own limits.
    "image_min_tokens": None,
    "image_max_tokens": None,
    # Tokens are guessed ahead, and checked by the model together: "none", "ngram" (from what the conversation repeats),
    # "mtp" (by the model's own head), "draft" (a small model with the same vocabulary), "eagle3", "dflash" or "dspark"
    # (small models made for this one). The text stays the same. Only measuring tells whether it pays: with "auto" a
    # tune measures what the model and its `draft` can do, and until then nothing is guessed.
    "speculation": "none",
    # The small model of "draft", "eagle3", "dflash" and "dspark": a source, or a dictionary as of `projector`.
    "draft": None,
    # Most and fewest tokens that are guessed at once. None: llama.cpp's defaults.
    "draft_max_tokens": None,
    "draft_min_tokens": None,
    # File on *your* machine with a text such as the server's users send: a tune measures speculation with it. Without
    # it a tune has random words, which no speculation guesses.
    "tune_prompt_file": None,
    # A new build that serves slower than the one before it is turned away. This commit of llama.cpp (or tag, as in
    # `llama_cpp_ref`) is not. None: every one is.
    "accept_slower": None,
    # LoRA adapters, each a source or {"source": ..., "scale": 0.5} with the keys of `projector`. The scale is 1 unless
    # it is given; with 0 an adapter is loaded, and used by requests that ask for it.
    "adapters": [],
    # Files on *your* machine that go to the host: a chat template (Jinja) in place of the model's own; a grammar (GBNF)
    # or a JSON schema that constrains every reply.
    "chat_template_file": None,
    "grammar_file": None,
    "json_schema_file": None,
    # True: all slots share one KV cache of `pool_tokens`. One request may use `context_tokens` of it; all of it where
    # one of the two is None, and then the pool has `context_tokens` for each slot. A pool can run out where all slots
    # are long at once: llama-server then ends all running requests with an error.
    "kv_unified": False,
    "pool_tokens": None,
    # GPUs that this instance may use, named as in the host's `gpus`. None: those of the host. []: none.
    "gpus": None,
    # Copies of the instance, each a unit of its own, NAME-1, NAME-2 and so on, with ports counted up from `port`: a
    # number, planned one after another, or "per_gpu": one for each GPU that it may use, planned for that GPU alone. 1:
    # the instance itself, under its own name.
    "copies": 1,
    # How several GPUs share a model: "layer" (whole layers), "tensor" (each computes a part of every layer), or "auto":
    # "tensor" where llama.cpp has it for this model and it is predicted to be faster.
    "split_mode": "layer",
    # Seconds without a request after which llama-server frees the model's memory; the next request loads it again. Its
    # memory stays planned. From 10; None: never.
    "sleep_idle_seconds": None,
    # "boot": the server runs from the boot on. "demand": it starts at the first connection, and stops after
    # `idle_seconds` without one. The memory of models that are started on demand may be more than the host has: those
    # that are not in use make way.
    "start": "boot",
    "idle_seconds": 600,
    # Address to listen on. Loopback by default: a model server without a key is an open door. Another
    # address is refused without `api_key_file`, unless you set `allow_unauthenticated`.
    "listen": "127.0.0.1",
    # Addresses and networks that may reach a server which listens on another address than loopback, such as
    # ["10.1.0.0/16", "fd00:1::/64"]; the host itself always may. systemd drops all other packets (IPAddressDeny),
    # on a host with cgroup v2. []: everybody who can reach the address.
    "allowed_clients": [],
    # File on *your* machine with the API keys, one a line, readable by nobody but you (and your group):
    # chmod 600. Or "env:NAME": a variable of your environment. None: requests need no key.
    "api_key_file": None,
    # Serve other machines without API keys: everybody who reaches the port may use the server.
    "allow_unauthenticated": False,
    # PEM files on *your* machine, certificate (with its chain) and key: llama-server then speaks https.
    # The build gets OpenSSL for it. None: plain http, for loopback or behind a proxy.
    "tls_certificate_file": None,
    "tls_key_file": None,
    # Further flags for llama-server, "--flag" or "--flag value" each. Allowed are flags that are known to
    # change neither memory nor access (llamafleet/settings/extra_flags.py).
    "extra_flags": [],
    # Further flags that open the host, such as "--props" or "--tools read_file". They need `api_key_file`;
    # docs/hardening.md says what each of them opens.
    "dangerous_flags": [],
    # Expected sha256 of the file; of a split model a list with one for each shard, in order. The Hugging Face
    # Hub gives it. Set it for other URLs, and for the time when the Hub cannot be reached and a mirror is asked:
    # a file whose sha256 is not known is not downloaded.
    "sha256": None,
    # Download this model although no sha256 of it is known: whoever serves the address, or is between, can give
    # you another file. Give it in the entry of the model; as a default it is refused.
    "allow_unverified": False,
    # False: the gateway of the fleet leaves this instance out.
    "gateway": True,
    # Further http(s) or hf: addresses of the same file, tried in order when the source fails.
    "mirrors": [],
    # File names of drop-ins of yours that may change the unit, such as ["nice.conf"]. []: a deploy removes drop-ins of
    # the unit. Drop-ins for all services of a host (service.d) always may.
    "allowed_drop_ins": [],
}

# --- the host ---------------------------------------------------------------------------------

# The Python that llamafleet's programs run with on the host, 3.9 or later. "python3": the system's own. Or an absolute
# path such as "/usr/bin/python3.11", where the system's is older (RHEL 8, Ubuntu 20.04).
python = "python3"

# --- llama.cpp -------------------------------------------------------------------------------

# An address, or a path: of a repository of your machine, from which one commit is sent, or else of the host.
llama_cpp_repository = "https://github.com/ggml-org/llama.cpp"
# Tag, branch or commit. It is resolved to one commit once per run, for all hosts.
llama_cpp_ref = "b11434"
# "auto": by the GPUs of the host (NVIDIA: cuda, AMD: hip, no GPU: cpu); never the CPU if the host has a
# GPU. Or one of "cuda", "hip", "vulkan", "cpu".
backend = "auto"
# "auto": the newest toolkit on the host that fits driver and GPUs, else NVIDIA's repository.
# "nvidia": always NVIDIA's repository. "distro": the distribution's own package. Or an absolute
# path such as "/usr/local/cuda-12.8".
cuda_toolkit = "auto"
# The GPUs that plans may use, each by its index in a plan (0 is GPU0), its UUID (`nvidia-smi -L`) or its PCI id
# ("0000:01:00.0"): [0, "GPU-1a2b..."]. All others are left alone, whatever runs there. None: every GPU that the backend
# can use. []: none.
gpus = None
# Backend "vulkan": the devices to use, by their numbers in `vulkaninfo --summary`. None: every discrete and
# integrated GPU, as llama.cpp does. A device that is named here is used whatever its kind.
vulkan_devices = None
# Build llama-server's web page. False, because the build downloads the page from a bucket.
build_ui = False
# Parallel compiler jobs. None: one for each core, but at most one for each 4 GiB (CUDA) or 1 GiB of free RAM.
build_jobs = None
# Folder on the host, usually a network mount that hosts share, with finished builds by build key. A host
# whose build is there does not compile it. None: the hosts of a `site` give each other their builds, without a mount.
build_cache = None
# Old releases that are kept on a host beside the current release, so that you can go back to them.
keep_releases = 2

# Variables of every server of the host beside those that a plan sets, such as
# {"HSA_OVERRIDE_GFX_VERSION": "10.3.0"} for a card that ROCm does not know (llama.cpp is then compiled for gfx1030).
# Everybody on the host may read them. Refused are those that llamafleet, systemd or llama.cpp set themselves.
environment = {}

# --- the Hugging Face Hub --------------------------------------------------------------------

# The Hub, a mirror of it ("https://hf-mirror.com"), or ModelScope ("https://www.modelscope.cn").
hub_endpoint = "https://huggingface.co"
# File on *your* machine with the token for gated models, chmod 600, or "env:NAME"; None: the
# environment's HF_TOKEN, where it is set.
hub_token_file = None

# --- where models lie ------------------------------------------------------------------------

# Folder on the host for models that are downloaded from now on, mostly on another disk: "/mnt/models". Each has a
# folder there, to which a link in /var/lib/llamafleet/models leads; a server starts when the disk is mounted
# (RequiresMountsFor=). Models that are there already stay where they are. None: /var/lib/llamafleet/models.
models_dir = None

# --- one download for a site -----------------------------------------------------------------

# Hosts of a run that name the same site and reach each other download a model once, and compile a build once for all
# that need the very same one: who has it gives it to the others, by nginx from the distribution, to these hosts alone
# and while the run lasts. See docs/fleet.md. None: the host downloads and compiles for itself, and serves nobody.
site = "default"
# Port by which it gives files to the others; the same on all hosts of the site.
site_port = 9345

# --- the way out -----------------------------------------------------------------------------

# Address of an HTTP proxy, such as "http://proxy.example.net:3128", by which the host downloads, its git, apt and dnf
# read, and your machine looks up what this host needs. It must not ask for a password: inventories, command lines and
# environments are no places for one. What apt's and dnf's own settings on the host say comes first. None: direct.
proxy = None
# Names of hosts and domains, addresses and networks that are reached without the proxy, such as [".example.net",
# "10.0.0.0/8"]. The host itself always is.
no_proxy = []
# File on *your* machine with PEM certificates, such as that of a company's own authority, which the same programs
# trust beside the public ones. The host's own store of certificates stays as it is. None: the public ones alone.
ca_file = None

# --- memory ----------------------------------------------------------------------------------

# Memory that the plan leaves free on every GPU, MiB, beside the 512 MiB that it counts for the CUDA context and
# libraries: llama.cpp's pools grow after the start, by up to 1000 MiB at long prompts as reported. Or a dictionary by
# GPU, each named as in `gpus`: {"GPU-1a2b...": 6144, "default": 1024}; without "default" the others keep 1024.
gpu_reserve_mib = 1024
# RAM that the plan leaves free for the system and the page cache, MiB.
ram_reserve_mib = 2048
# May the host's part of the model go to swap? A model that swaps answers at disk speed, which no plan predicts.
allow_swap = False

# --- checks of a running instance ------------------------------------------------------------

# Lowest decode speed of a started instance, in percent of the median of the last five gates with the same model
# and flags on this host. If an instance is slower, the previous one is put back. 40: noise and other load seldom
# halve the best of six tries, and regressions of llama.cpp were 25 % to 3x (ggml-org/llama.cpp #20835, #24514).
# Without earlier gates the floor is a twentieth of the predicted speed. 0: no floor.
speed_floor_percent = 40
# Seconds after which a server that does not answer, or makes no progress with its requests, is restarted. A host on
# which a batch of the prompt takes long, by the measured speed, gets more. 0: no check. 120: far above any pause of
# a healthy server, and less than clients wait for.
liveness_seconds = 120
# Pause between two such checks, seconds. A check costs users nothing: see docs/operations.md, "The liveness check".
liveness_interval_seconds = 60

# The longest that a server which is to be replaced or removed may go on with its running replies, seconds. New
# connections wait meanwhile, and reach the next server; see docs/operations.md, "A switch under load". 0: replies are
# cut. 30: most replies end within it.
drain_seconds = 30
# What happens to a server whose replies still run after that: "cut": it is stopped; "wait": the switch waits on, up to
# twelve hours; "stop": the server stays, and the host fails.
drain_overdue = "cut"
# The most hosts of one run that switch a service at the same time. None: as many as leave each model with half of the
# hosts that serve it, rounded up, but one of a model at a time at least. See docs/rollout.md.
switch_at_once = None

# --- tuning ----------------------------------------------------------------------------------

# Measure on the host what serves the workload fastest, and install that: "never"; "missing": where there is no
# measurement of this very model, build, hardware and workload; "always". `pyinfra INVENTORY tasks.tune.tune` measures
# whatever is set here.
tune = "never"
# The longest that measuring one model may take, minutes.
tune_minutes = 20
# May a running service be stopped while its model is measured? It is put back afterwards, whatever happens. False: only
# models that do not run yet are measured.
tune_stops_service = False
# The time of day in which a service may be stopped for it, by the host's clock, such as "02:00-05:00". None: any.
tune_window = None

# --- the gateway -----------------------------------------------------------------------------

# One address for all models of the inventory, on the hosts of its group `gateway`: see docs/gateway.md.

# The address or name by which other machines reach this host, where one of its servers listens on all addresses. None:
# as pyinfra reaches it.
reached_at = None
# Where the gateway listens. Another address than loopback is refused without `gateway_api_key_file`, unless you set
# `gateway_allow_unauthenticated`.
gateway_listen = "127.0.0.1"
gateway_port = 8000
# File on *your* machine with the API keys of the gateway's clients, one a line, chmod 600, or "env:NAME". They are not
# the keys of the servers, which no client sees. None: requests need no key.
gateway_api_key_file = None
# Serve other machines without API keys: everybody who reaches the port may use every model.
gateway_allow_unauthenticated = False
# Addresses and networks that may reach the gateway, such as ["10.1.0.0/16"]; the host itself always may. []: everybody
# who can reach the address.
gateway_allowed_clients = []
# PEM files on *your* machine, certificate (with its chain) and key: the gateway then speaks https.
gateway_tls_certificate_file = None
gateway_tls_key_file = None
# Headers that name a session, the first that a request has: its requests go to one server, which has the beginning of
# the conversation in its cache. Without one, the key and the client's address name it.
gateway_session_headers = [
    "X-Session-Id",
    "X-Session-Affinity",
    "X-Claude-Code-Session-Id",
    "X-OpenWebUI-Chat-Id",
    "X-Hermes-Session-Id",
    "X-Opencode-Session",
    "Session-Id",
    "Session_id",
]
# The longest that a request waits for a free slot, seconds, and the most that wait for one model. The others are told
# to come back later: 503 with Retry-After.
gateway_queue_seconds = 60
gateway_queue_requests = 100
# The longest that a server may be silent, seconds: without streaming, while it reads the prompt and writes the reply.
gateway_reply_seconds = 3600
# Of a request that names its model in the body, the part that is searched for the name, KiB; twice that is taken for
# each connection at work. A request to /MODEL/v1/... is passed on without a look.
gateway_body_kib = 64
# Port on 127.0.0.1 of HAProxy's page of statistics (/) and of its metrics for Prometheus (/metrics).
gateway_stats_port = 8404

# --- monitoring ------------------------------------------------------------------------------

# Prometheus on the hosts of the inventory's group `monitoring`, and node-exporter on all: see docs/monitoring.md.
# Without that group nothing of it is installed.

# Where node-exporter listens, for Prometheus alone. None: at the address of `reached_at`, or by which pyinfra reaches
# the host; at 127.0.0.1 where Prometheus runs on this very host and on no other.
metrics_listen = None
metrics_port = 9100
# Addresses and networks that may read it beside the hosts of `monitoring` and the host itself.
metrics_allowed_clients = []
# Port on 127.0.0.1 of Prometheus, and how many days it remembers.
monitoring_port = 9090
monitoring_days = 30
# Alertmanagers that pass alerts on to people, each as "ADDRESS:PORT". []: alerts are shown, and told to nobody.
alertmanagers = []

# --- leaving ---------------------------------------------------------------------------------

# True: a run with `models = []` stops and removes every instance of the host. False: it is refused where the host has
# instances, because an inventory that has lost its models looks the same.
allow_empty_models = False
# True: `pyinfra INVENTORY tasks.uninstall.uninstall` removes the downloaded models too. False: they stay.
uninstall_models = False
