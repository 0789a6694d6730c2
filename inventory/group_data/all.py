"""Every setting of llamafleet: its default, its unit, and the reason for the value.

This is the only place of defaults. An inventory overrides any of them for a group
(`inventory/group_data/GROUP.py`) or a host (its data dictionary). A key that is not
listed here is refused by name, with the nearest known one.
"""

# --- what to serve ---------------------------------------------------------------------------

# The instances of a host: one systemd unit `llama-server-NAME.service` each. When they share a
# host, they are placed by `priority`, equal ones in the list's order. Every entry gives `name`,
# `source` and `port`, and overrides any key of `model_defaults`.
#   source: "hf:OWNER/REPO/FILE.gguf[@REVISION]" or an http(s) URL.
#           For a split model name the first shard, -00001-of-0000N.gguf: the others follow.
models = []

model_defaults = {
    # Tokens that one request may use, prompt and reply together; llama-server gets this many for
    # every slot. Never cut below what you ask; None: what the model was trained for, 32768 at most.
    "context_tokens": None,
    # Where instances share a host, the highest is placed first and gets the room it can use; equal
    # ones in the order of `models`.
    "priority": 0,
    # --- the workload: its time is what the plan makes short ---
    # Tokens of a request that are read anew, typically; what is still in the prompt cache does not
    # count. A long prompt makes a larger ubatch worth its memory. 2048: a question with a page or
    # a file, or one step of a chat with tools.
    "prompt_tokens": 2048,
    # Tokens in a slot's cache while a reply is written, on average. It decides how much attention
    # costs, and so what of a dense model goes to RAM. None: a quarter of the context, since who
    # asks for a context means to use it, and at least the prompt and half the reply.
    "live_tokens": None,
    # Tokens of a reply. 512: about a page.
    "reply_tokens": 512,
    # Requests that come at the same time. One: a slot gets the whole speed of the box.
    "concurrency": 1,
    # --- what the plan may choose ---
    # Requests served at the same time, each with the whole context. None: as many as `concurrency`,
    # or fewer, which then wait for each other, where that is done sooner.
    "slots": None,
    # KV-cache types allowed, best first. A later one is taken where the workload is done at least a
    # tenth sooner with it, or where the first fits nowhere. Quantised types save memory and can
    # cost much speed and some quality, so they are used only where you list them.
    "kv_types": ["f16"],
    # Tokens computed together while a prompt is read (--ubatch-size; llama.cpp's default is 512).
    # More read a prompt faster, above all with experts in RAM, and take memory. None: the plan
    # chooses from 256 to 8192 by the workload.
    "ubatch_tokens": None,
    # Threads for the CPU part. None: one for each physical core, on a hybrid for each performance
    # core and kept there; more is slower.
    "threads": None,
    # RAM for llama-server's prompt cache, MiB. llama.cpp's own default is 8192, uncounted by it.
    "prompt_cache_mib": 1024,
    # RAM for context checkpoints, MiB, all slots together: what a model with attention windows or recurrent
    # layers needs to go back in a conversation without reading it anew. llama.cpp's own limit is 32 for each
    # slot, whatever they take: 0.4 GiB each for Gemma 3 27B. Other models make none.
    "context_checkpoints_mib": 1024,
    # Address to listen on. Loopback by default: a model server without a key is an open door. Another
    # address is refused without `api_key_file`, unless you set `allow_unauthenticated`.
    "listen": "127.0.0.1",
    # File on *your* machine with the API keys, one a line, readable by nobody but you (and your group):
    # chmod 600. Or "env:NAME": a variable of your environment. None: no key is asked.
    "api_key_file": None,
    # Serve other machines without asking for a key: everybody who reaches the port may use the server.
    "allow_unauthenticated": False,
    # PEM files on *your* machine, certificate (with its chain) and key: llama-server then speaks https.
    # The build gets OpenSSL for it. None: plain http, for loopback or behind a proxy.
    "tls_certificate_file": None,
    "tls_key_file": None,
    # More of llama-server's flags, "--flag" or "--flag value" each, of those known to change neither
    # memory nor who gets in (llamafleet/settings/extra_flags.py).
    "extra_flags": [],
    # The same for flags that open the host, such as "--props" or "--tools read_file": only together
    # with `api_key_file`; docs/hardening.md says what each opens.
    "dangerous_flags": [],
    # Expected sha256 of the file (of the first shard, for a split model). The Hugging Face Hub
    # tells it; set it for plain URLs.
    "sha256": None,
    # Further addresses of the same file, tried in order when the source fails.
    "mirrors": [],
}

# --- llama.cpp -------------------------------------------------------------------------------

llama_cpp_repository = "https://github.com/ggml-org/llama.cpp"
# Tag, branch or commit. It is resolved to one commit once per run, for all hosts.
llama_cpp_ref = "b11434"
# "auto" takes what the probe found (NVIDIA: cuda, AMD: hip, no GPU: cpu) and never falls back to
# the CPU where a GPU is present. Or name one: "cuda", "hip", "vulkan", "cpu".
backend = "auto"
# "auto": the newest toolkit on the host that fits driver and GPUs, else NVIDIA's repository.
# "nvidia": always NVIDIA's repository. "distro": the distribution's own package. Or an absolute
# path such as "/usr/local/cuda-12.8".
cuda_toolkit = "auto"
# Backend "vulkan": the devices to use, as the numbers that `vulkaninfo --summary` gives them. None: every
# discrete and integrated GPU, as llama.cpp does; a device named here is used whatever it is.
vulkan_devices = None
# llama-server's web page. Off: it is downloaded from a bucket at build time.
build_ui = False
# Parallel compiler jobs. None: one a core, at most one for each 4 GiB (CUDA) or 1 GiB of free RAM.
build_jobs = None
# Folder on the host, usually a network mount that hosts share, where finished builds are kept by
# build key: a host takes one that is there instead of compiling. None: every host compiles.
build_cache = None
# Old releases kept on a host beside the current one, to go back to.
keep_releases = 2

# --- the Hugging Face Hub --------------------------------------------------------------------

hub_endpoint = "https://huggingface.co"
# File on *your* machine with the token for gated models, chmod 600, or "env:NAME"; None: the
# environment's HF_TOKEN, where it is set.
hub_token_file = None

# --- memory ----------------------------------------------------------------------------------

# Kept free on every GPU, MiB, beside the 512 that the plan counts for the CUDA context and libraries:
# pools grow after the start, by up to 1000 MiB at long prompts as far as reported.
gpu_reserve_mib = 1024
# Kept free of host RAM for the system and the page cache, MiB.
ram_reserve_mib = 2048
# May the host's part of the model go to swap? A model that swaps answers at disk speed.
allow_swap = False

# --- is it well? -----------------------------------------------------------------------------

# Least decode speed of a started instance, in percent of the median of its last five on the same host with
# the same model and flags; a slower one is not kept, and the previous one comes back. 40: noise and other
# load seldom halve the best of six tries, regressions of llama.cpp were 25 % to 3x (ggml-org/llama.cpp
# #20835, #24514). Without an earlier figure a twentieth of the prediction is asked. 0: no floor.
speed_floor_percent = 40
# A running server that for so many seconds neither gives a token nor gets on with one of its requests is
# wedged, and is restarted. Longer where a batch of the prompt takes longer, by the measured speed. 0: no
# check. 120: far above any healthy pause, below what clients wait for.
liveness_seconds = 120
# Pause between two such checks, seconds. A server at work is not asked, an idle one for one token.
liveness_interval_seconds = 60

# --- leaving ---------------------------------------------------------------------------------

# Does `pyinfra INVENTORY tasks.uninstall.uninstall` remove the downloaded models too? Else they stay.
uninstall_models = False
