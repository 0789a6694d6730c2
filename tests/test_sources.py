"""The forms of a model's source, above all links as people copy them."""

import pytest

from llamafleet.settings.schema import Settings, SettingsError
from llamafleet.sources import Source, SourceError, parse

HUB = "https://huggingface.co"


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("hf:o/r", Source("hub", "", "o/r")),
        ("hf:o/r:Q4_K_M", Source("hub", "", "o/r", quant="Q4_K_M")),
        ("hf:o/r:UD-Q4_K_XL@v1", Source("hub", "", "o/r", "v1", quant="UD-Q4_K_XL")),
        ("hf:o/r@refs/pr/1", Source("hub", "", "o/r", "refs/pr/1")),
        ("hf:o/r/Q4/f.gguf@v1", Source("hub", "Q4/f.gguf", "o/r", "v1")),
    ],
)
def test_a_repository_with_or_without_a_quantisation(source, parts):
    assert parse(source, HUB) == parts


@pytest.mark.parametrize(
    ("link", "parts"),
    [
        ("/o/r", Source("hub", "", "o/r")),
        ("/o/r/", Source("hub", "", "o/r")),
        ("/o/r?local-app=llama.cpp", Source("hub", "", "o/r")),
        ("/o/r?show_file_info=Q4_K_M%2Ff-00001-of-00002.gguf", Source("hub", "Q4_K_M/f-00001-of-00002.gguf", "o/r")),
        ("/o/r/tree/main", Source("hub", "", "o/r")),
        ("/o/r/tree/v1/UD-Q4_K_XL", Source("hub", "", "o/r", "v1", folder="UD-Q4_K_XL")),
        ("/o/r/blob/main/f.gguf", Source("hub", "f.gguf", "o/r")),
        ("/o/r/resolve/main/f.gguf?download=true", Source("hub", "f.gguf", "o/r")),
        ("/o/r/raw/main/f.gguf", Source("hub", "f.gguf", "o/r")),
        ("/o/r/resolve/main/Q4_K_M%2Ff.gguf", Source("hub", "Q4_K_M/f.gguf", "o/r")),
        ("/o/r/blob/refs%2Fpr%2F1/f%2B1.gguf#x", Source("hub", "f+1.gguf", "o/r", "refs/pr/1")),
    ],
)
@pytest.mark.parametrize("endpoint", [HUB, "http://127.0.0.1:8090", "https://mirror.example/hub"])
def test_links_as_browsers_copy_them(link, parts, endpoint):
    """huggingface/huggingface_hub#2879: a link has its slashes as %2F."""
    assert parse(endpoint + link, endpoint) == parts


def test_a_page_of_the_hub_is_read_from_the_mirror_in_use():
    for host in ("huggingface.co", "www.huggingface.co", "hf.co"):
        found = parse(f"https://{host}/o/r/blob/main/f.gguf", "https://hf-mirror.com")
        assert found == Source("hub", "f.gguf", "o/r")
    # A download's own address is what it says, as before.
    address = f"{HUB}/o/r/resolve/main/f.gguf"
    assert parse(address, "https://hf-mirror.com") == Source("url", address)


@pytest.mark.parametrize(
    ("link", "parts"),
    [
        ("/models/o/r", Source("hub", "", "o/r")),
        ("/models/o/r/summary", Source("hub", "", "o/r")),
        ("/models/o/r/files", Source("hub", "", "o/r")),
        ("/models/o/r/file/view/master/Q4%2Ff.gguf?status=2", Source("hub", "Q4/f.gguf", "o/r", "master")),
        ("/models/o/r/resolve/master/f.gguf", Source("hub", "f.gguf", "o/r", "master")),
    ],
)
def test_links_of_modelscope(link, parts):
    assert parse(f"https://www.modelscope.cn{link}", "https://www.modelscope.cn") == parts


@pytest.mark.parametrize(
    "link", ["https://modelscope.cn/models/o/r/file/view/master/f.gguf", "https://hf-mirror.com/o/r/blob/main/f.gguf"]
)
def test_a_page_of_another_hub_says_which_setting_reads_it(link):
    with pytest.raises(SourceError, match=rf'set hub_endpoint = "{link.split("/")[0]}//{link.split("/")[2]}"'):
        parse(link, HUB)


@pytest.mark.parametrize("link", ["/o/r/blob/main/../f.gguf", "/o/r/resolve/main/%2E%2E%2Ff.gguf"])
def test_a_link_leads_to_no_other_folder(link):
    with pytest.raises(SourceError, match="should be hf:OWNER"):
        parse(HUB + link, HUB)


@pytest.mark.parametrize(
    "address", ["https://h/x/f.gguf", "https://h/o/r/blob/main/f.gguf", "https://h/plain/o/r/f.gguf"]
)
def test_an_address_of_another_server_stays_one(address):
    assert parse(address, HUB) == Source("url", address)


def problems(source):
    try:
        Settings.from_data({"models": [{"name": "m", "port": 1, "source": source}]})
    except SettingsError as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    "source", ["hf:o/r", "hf:o/r:Q4_K_M", f"{HUB}/o/r", f"{HUB}/o/r/tree/main/Q4", f"{HUB}/o/r/blob/main/Q4%2Ff.gguf"]
)
def test_an_inventory_may_name_them(source):
    assert problems(source) == []


@pytest.mark.parametrize(
    "source", ["hf:o/r:", "hf:o/r:a b", "hf:o/f.gguf", "https://h/o/r", f"{HUB}/o/r/blob/main/x.md"]
)
def test_an_inventory_may_not_name_others(source):
    assert len(problems(source)) == 1
