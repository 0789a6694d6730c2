"""Where a redirect leads."""

import pytest

from llamafleet.remote import redirects


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("https://b/y", "https://b/y"),
        ("//b/y?q=1", "https://b/y?q=1"),
        ("/y", "https://a/y"),
        ("y?q=1&r=%2F", "https://a/o/y?q=1&r=%2F"),
        ("/api/resolve-cache/m?etag=%22x%22#part", "https://a/api/resolve-cache/m?etag=%22x%22"),
        ("https://b/y@v1/f?email=x@y", "https://b/y%40v1/f?email=x%40y"),
        ("https://user:word@b/y", "https://user:word@b/y"),  # refused as an address
        ("https://[::1", "https://[::1"),
    ],
)
def test_a_location_is_read_as_a_browser_does(location, target):
    assert redirects.target("https://a/o/x?token=1", location) == target


def test_https_does_not_lead_to_http():
    assert redirects.is_downgrade("https://a/x", "http://a/x")
    assert not redirects.is_downgrade("http://a/x", "http://b/x") and not redirects.is_downgrade(
        "http://a", "https://b"
    )
