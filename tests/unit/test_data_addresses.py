"""What a page's address decides: duplicates, blocked domains, lists."""

from __future__ import annotations

import pytest

from stages.data.blocks import domains
from stages.data.document import Document
from stages.data.engine import select
from stages.stage import ConfigError


def cleaned(config: domains.Config, url: str) -> str:
    return domains.clean(Document("d", "x", url=url), config)


def test_url_duplicates():
    urls = ["https://www.a.org/x/", "http://a.org/x#part", "http://a.org/x?utm_source=y", "http://a.org/y", "", "", "7", "7"]
    documents = [Document(str(i), f"text {i}", url=url) for i, url in enumerate(urls)]
    assert select("url", documents) == ["", "same url: 0", "same url: 0", *[""] * 5]
    named = [("a.jsonl#1", "7"), ("a.jsonl#2", "7"), ("b.jsonl#1", "7"), ("m.mbox#1", "<1@b>"), ("n.mbox#9", "<1@b>"), ("x", "HTTP://A.org/X"), ("y", "http://a.org/x")]
    documents = [Document(name, f"text {i}", url=url) for i, (name, url) in enumerate(named)]
    assert select("url", documents) == ["", "same id: a.jsonl#1", "", "", "same id: m.mbox#1", "", ""]


def test_domains():
    config = domains.Config(blocked=["bad.com", "evil.org", "www.blog.net"], words=["casino"])
    urls = {"http://bad.com/x": "blocked domain: bad.com", "https://www.deep.bad.com": "blocked domain: bad.com", "http://notbad.com": "",
            "http://a.org/online-casino/1": "blocked word in the address: casino", "http://a.org/casinos": "", "17": "", "": "", "http://[::1": "malformed address",
            "http://blog.net": "blocked domain: blog.net"}
    for url, reason in urls.items():
        assert cleaned(config, url) == reason
    assert cleaned(domains.Config(allowed=["a.org"]), "http://b.org") == "domain not allowed: b.org"


def test_lists_of_domains_and_addresses(tmp_path):
    (tmp_path / "a.txt").write_text("# of a project\n0.0.0.0 bad.com # why\n\nwww.Evil.org\n")
    (tmp_path / "b.txt").write_text("https://news.net/one/?utm_source=x\n")
    config = domains.Config(lists=[str(tmp_path)])
    urls = {"http://www.bad.com/x": "bad.com", "http://x.evil.org/": "evil.org", "http://notbad.com": "", "http://news.net/one": "news.net/one",
            "http://news.net/": "", "http://news.net/one/more": "", "7": ""}  # fmt: skip
    for url, found in urls.items():
        assert cleaned(config, url) == (found and f"on a list: {found}")
    before = domains.external(config)
    (tmp_path / "a.txt").write_text("other.com\n")
    assert domains.external(config) != before
    (tmp_path / "a.txt").write_text("# nothing yet\n")
    assert cleaned(domains.Config(lists=[str(tmp_path / "a.txt")]), "http://bad.com") == ""
    with pytest.raises(ConfigError, match="data.options.domains.lists: '/no/list' is not known"):
        domains.external(domains.Config(lists=["/no/list"]))
    (tmp_path / "b.txt.gz").write_bytes(b"packed")
    with pytest.raises(ConfigError, match="data.options.domains.lists: b.txt.gz is compressed"):
        domains.external(config)
