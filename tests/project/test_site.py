"""The documentation site: every page is reachable, the build is strict, and a browser finds nothing broken in it."""

import html.parser
import importlib.util
import shutil
import subprocess
import sys
import urllib.parse

import pytest
import yaml

from tests.helpers.browser import browser, is_available, serve
from tests.helpers.pages import REPOSITORY

DOCS = REPOSITORY / "docs"
DESKTOP, PHONE = (1280, 900), (390, 844)
# Zensical keeps its search box in a shadow root.
IN_SHADOW_ROOTS = """
const found = [];
const visit = root => {
    if (root !== document) found.push(...root.querySelectorAll(arguments[0]));
    for (const element of root.querySelectorAll('*')) if (element.shadowRoot) visit(element.shadowRoot);
};
visit(document);
"""
TYPE = "found[0].focus(); found[0].value = arguments[1]; found[0].dispatchEvent(new Event('input', {bubbles: true}));"


def targets(entries):
    """Every page that the navigation names, in order."""
    for entry in entries:
        for value in entry.values():
            yield from targets(value) if isinstance(value, list) else [value]


def navigation():
    return list(targets(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))


def test_the_navigation_names_every_page_once():
    pages = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
    assert sorted(navigation()) == pages


def test_the_site_asks_nothing_of_other_hosts():
    configuration = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    assert configuration["theme"]["font"] is False
    assert configuration["strict"] is True


class Page(html.parser.HTMLParser):
    """The links and the anchors of a built page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = [], {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.links += [attributes[name] for name in ("href", "src") if attributes.get(name)]
        self.anchors |= {attributes[name] for name in ("id", "name") if attributes.get(name)}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, made in a copy so that the checkout stays as it is."""
    if importlib.util.find_spec("zensical") is None:
        pytest.skip("needs zensical, from the docs extra")
    source = tmp_path_factory.mktemp("site")
    shutil.copy(REPOSITORY / "mkdocs.yml", source)
    for folder in ("docs", "samopt", "integrations"):
        shutil.copytree(REPOSITORY / folder, source / folder, symlinks=True)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return source / "site"


@pytest.mark.slow
def test_every_link_of_the_site_leads_to_a_page_and_its_anchor(site):
    pages = {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html")}
    broken = []
    for name, page in pages.items():
        for link in page.links:
            parts = urllib.parse.urlsplit(urllib.parse.urljoin(f"/{name}", link))
            if parts.netloc:
                continue
            target = urllib.parse.unquote(parts.path).lstrip("/") or "index.html"
            if not (site / target).is_file():
                broken.append(f"{name}: {link} is no file")
            elif target in pages and urllib.parse.unquote(parts.fragment) not in pages[target].anchors:
                broken.append(f"{name}: {link} has no such anchor")
    assert broken == []


@pytest.mark.slow
@pytest.mark.skipif(not is_available(), reason="needs Debian's chromium and chromium-driver")
def test_a_browser_shows_every_page_and_finds_asam(site):
    pages = [path.relative_to(site).as_posix() for path in sorted(site.rglob("*.html")) if path.name != "404.html"]
    assert len(pages) == len(navigation())
    with serve(site) as address, browser() as window:
        for size in (DESKTOP, PHONE):
            window.resize(*size)
            for page in pages:
                window.open(f"{address}/{page}")
                assert window.console_errors() == [], page
                width = window.run("return document.documentElement.scrollWidth")
                assert width <= size[0], f"{page} is {width} pixels wide on a screen of {size[0]}"
                loaded = window.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
                assert [name for name in loaded if not name.startswith(address)] == [], page

        window.resize(*DESKTOP)
        window.open(f"{address}/index.html")
        window.run("document.querySelector('.md-search__button').click()")
        window.wait_for(f"{IN_SHADOW_ROOTS} return found.length", "input[aria-label=Search]")
        window.run(f"{IN_SHADOW_ROOTS} {TYPE}", "input[aria-label=Search]", "ASAM")
        results = window.wait_for(f"{IN_SHADOW_ROOTS} return found.map(link => link.pathname)", "a[href]")
        assert "/algorithms/asam.html" in results
        assert window.console_errors() == []
