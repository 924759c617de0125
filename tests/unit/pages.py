"""Web pages whose main text is known, because they are put together here: ten kinds of page, each with its usual rubble."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MENU = "Home|Latest news|About us|Products and services|Contact|Careers|Log in|Newsletter".split("|")
COOKIES = "We value your privacy. By clicking Accept you agree to our use of cookies."
COPYRIGHT = "© 2023 Example Media Group. All rights reserved. Imprint. Terms of service."
SHARE = "Share this article on Facebook, Twitter or LinkedIn"
RELATED = [f"Related story number {i}: what happened next will interest you" for i in range(1, 7)]
SCRIPT = "<script>window.dataLayer=window.dataLayer||[];function gtag(){dataLayer.push(arguments);}</script>"
STYLE = "<style>.ad{display:none} body{margin:0;font-family:sans-serif}</style>"


@dataclass(frozen=True)
class Page:
    """kind; the page; the pieces of its main text in order; sentences of the page that are not part of it."""

    kind: str
    html: str
    main: list[str]
    rubble: list[str]


def _p(texts: list[str], tag: str = "p") -> str:
    return "\n".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)


def _list(texts: list[str], kind: str) -> str:
    links = "".join(f'<li><a href="/{i}">{html.escape(text)}</a></li>' for i, text in enumerate(texts))
    return f'<ul class="{kind}">{links}</ul>'


def _page(title: str, body: str) -> str:
    head = f'<head><meta charset="utf-8"><title>{html.escape(title)} | Example</title>{STYLE}{SCRIPT}</head>'
    return f'<!doctype html><html lang="en">{head}<body>{body}</body></html>'


def article(take: Callable[[int], list[str]]) -> Page:
    """HTML 5 as it should be."""
    title, *texts = take(6)
    body = (f'<header><nav>{_list(MENU, "menu")}</nav></header><main><article><h1>{title}</h1>{_p(texts)}</article></main>'
            f'<aside>{_list(RELATED, "related")}</aside><footer><p>{COPYRIGHT}</p></footer>')  # fmt: skip
    return Page("article", _page(title, body), [title, *texts], [*RELATED, COPYRIGHT, MENU[3]])


def blog(take: Callable[[int], list[str]]) -> Page:
    """WordPress: divs with telling names, share buttons, comments."""
    title, *texts = take(7)
    comments = "".join(f'<li class="comment"><div class="comment-body"><p>{one}</p></div></li>'
                       for one in ("First! Great post, thanks a lot for it.", "I disagree with everything here, sorry."))  # fmt: skip
    body = (f'<div id="cookie-banner" class="cookie-notice"><p>{COOKIES}</p><button>Accept</button></div>'
            f'<div id="header"><div class="navigation">{_list(MENU, "nav-menu")}</div></div><div id="content">'
            f'<div class="post"><h2 class="entry-title">{title}</h2><div class="entry-content">{_p(texts)}</div>'
            f'<div class="share-buttons">{SHARE}</div></div><div id="comments"><ol>{comments}</ol></div></div>'
            f'<div id="sidebar" class="widget-area">{_list(RELATED, "widget")}</div><div id="footer">{COPYRIGHT}</div>')  # fmt: skip
    return Page("blog", _page(title, body), texts, [COOKIES, SHARE, *RELATED, COPYRIGHT])


def news(take: Callable[[int], list[str]]) -> Page:
    """A news site: teasers before the text, advertisements in it, a newsletter box."""
    title, *texts = take(9)
    advertisement = '<div class="ad advertisement"><p>Advertisement: buy two, get one free today only!</p></div>'
    box = '<div class="newsletter-signup"><p>Sign up for our daily newsletter and never miss a story.</p><input></div>'
    parts = [_p([text]) for text in texts]
    parts[2:2] = [advertisement]
    parts[5:5] = [box]
    body = (f'<nav class="top-nav">{_list(MENU, "m")}</nav><section class="teasers">{_list(RELATED, "teaser")}</section>'
            f'<div class="article-body" itemprop="articleBody"><h1>{title}</h1>{"".join(parts)}</div>'
            f'<div class="footer"><p>{COPYRIGHT}</p>{_list(MENU, "f")}</div>')  # fmt: skip
    rubble = ["buy two, get one free", "never miss a story", *RELATED, COPYRIGHT]
    return Page("news", _page(title, body), texts, rubble)


def documentation(take: Callable[[int], list[str]]) -> Page:
    """Sphinx: a side bar of links, headings, lists and code."""
    title, *texts = take(5)
    code = "def area(width, height):\n    return width * height"
    items = ["The first point of the list", "The second point of the list", "The third and last point"]
    listed = "".join(f"<li><p>{item}</p></li>" for item in items)
    body = (f'<div class="related" role="navigation">{_list(MENU, "n")}</div><div class="document"><div class="body" role="main">'
            f'<section><h1>{title}</h1>{_p(texts[:2])}<ul class="simple">{listed}</ul>'
            f'<div class="highlight-python"><div class="highlight"><pre>{code}</pre></div></div>{_p(texts[2:])}</section></div></div>'
            f'<div class="sphinxsidebar" role="navigation">{_list(RELATED, "t")}</div><div class="footer" role="contentinfo">{COPYRIGHT}</div>')  # fmt: skip
    return Page("documentation", _page(title, body), [*texts[:2], *items, *code.split("\n"), *texts[2:]], [*RELATED, COPYRIGHT])


def encyclopedia(take: Callable[[int], list[str]]) -> Page:
    """MediaWiki: an info box, a table, references, a language menu."""
    title, *texts = take(8)
    cells = [("Population", "48,120 inhabitants"), ("Area of land", "117.5 square kilometres"), ("Founded in", "the year 1254")]
    table = "".join(f"<tr><th>{a}</th><td>{b}</td></tr>" for a, b in cells)
    body = (f'<div id="mw-navigation"><div id="p-navigation" role="navigation">{_list(MENU, "v")}</div></div>'
            f'<div id="content" class="mw-body" role="main"><h1 id="firstHeading">{title}</h1><div id="bodyContent"><div class="mw-parser-output">'
            f'{_p(texts[:3])}<table class="wikitable">{table}</table><h2>History</h2>{_p(texts[3:])}</div></div></div>'
            f'<div id="p-lang" role="navigation">{_list(RELATED, "lang")}</div><div id="footer" role="contentinfo">{COPYRIGHT}</div>')  # fmt: skip
    return Page("encyclopedia", _page(title, body), [*texts[:3], *(b for _, b in cells), *texts[3:]], [*RELATED, COPYRIGHT])


def forum(take: Callable[[int], list[str]]) -> Page:
    """Several posts, each the main text, with signatures and buttons around."""
    title, *texts = take(6)
    posts = "".join(f'<div class="post"><div class="author"><a href="/u{i}">user{i}</a></div><div class="content">{_p([text])}</div>'
                    f'<div class="buttons"><a href="#">Reply with quote</a></div></div>' for i, text in enumerate(texts))  # fmt: skip
    body = f'<div class="navbar">{_list(MENU, "b")}</div><h2 class="topic-title">{title}</h2>{posts}<div id="page-footer">{COPYRIGHT}</div>'
    return Page("forum", _page(title, body), texts, [COPYRIGHT, *MENU[3:4]])


def tables(take: Callable[[int], list[str]]) -> Page:
    """The layout of 1999: nested tables, fonts, line breaks, no paragraph."""
    title, *texts = take(6)
    menu = "".join(f'<tr><td><font size="1"><a href="/{i}.htm">{text}</a></font></td></tr>' for i, text in enumerate(MENU))
    text = "<br><br>".join(map(html.escape, texts))
    body = (f'<table width="100%"><tr><td colspan="2"><b>Welcome to my home page</b></td></tr><tr><td width="120"><table>{menu}</table></td>'
            f'<td><font face="Arial"><b>{title}</b><br><br>{text}</font></td></tr><tr><td colspan="2"><font size="1">{COPYRIGHT}</font></td></tr></table>')  # fmt: skip
    return Page("tables", _page(title, body), texts, [MENU[3], COPYRIGHT])


def product(take: Callable[[int], list[str]]) -> Page:
    """A shop: a short description between recommendations."""
    title, *texts = take(3)
    cards = "".join(f'<div class="product-card"><a href="/p{i}">Also bought: item {i}</a><span class="price">$ {i}9.99</span></div>' for i in range(8))
    body = (f'<nav>{_list(MENU, "shop-nav")}</nav><div class="product-page"><h1>{title}</h1><div class="product-description">{_p(texts)}</div>'
            f'<button>Add to cart</button></div><div class="recommendations">{cards}</div><footer>{COPYRIGHT}</footer>')  # fmt: skip
    return Page("product", _page(title, body), texts, ["Also bought: item 3", COPYRIGHT])


def divs(take: Callable[[int], list[str]]) -> Page:
    """A single-page application: nothing but divs with meaningless names."""
    title, *texts = take(6)
    links = "".join(f'<div class="x7f"><a href="/{i}">{text}</a></div>' for i, text in enumerate(MENU))
    body = (f'<div id="root"><div class="a1b">{links}</div><div class="c3d"><div class="q9">{title}</div>{_p(texts, "div")}</div>'
            f'<div class="z0">{COPYRIGHT}</div></div>')  # fmt: skip
    return Page("divs", _page(title, body), texts, [MENU[3], COPYRIGHT])


def short(take: Callable[[int], list[str]]) -> Page:
    """One paragraph among links."""
    title, text = take(2)
    body = f'<header><nav>{_list(MENU, "s")}</nav></header><main><h1>{title}</h1>{_p([text])}</main><footer>{COPYRIGHT}</footer>'
    return Page("short", _page(title, body), [text], [MENU[3], COPYRIGHT])


KINDS = (article, blog, news, documentation, encyclopedia, forum, tables, product, divs, short)


def pages(paragraphs: Iterator[str]) -> Iterator[Page]:
    """Pages of all kinds in turn, as long as there are paragraphs; the first of a page, cut to eight words, is its title."""

    def take(count: int) -> list[str]:
        title, *texts = (next(paragraphs) for _ in range(count))
        return [html.escape(" ".join(title.split()[:8])), *texts]

    while True:
        for kind in KINDS:
            try:
                yield kind(take)
            except (StopIteration, RuntimeError):
                return
