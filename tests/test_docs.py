"""The written pages: links that lead somewhere, a page of the interface that is the code's."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

import gentron_fast

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_interface_page_is_the_codes():
    spec = importlib.util.spec_from_file_location("api", ROOT / "docs/api.py")
    api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api)
    assert api.PAGE.read_text() == api.page(), "docs/api.md is stale: make api"


def test_what_the_package_names_is_on_the_interface_page():
    page = (ROOT / "docs/api.md").read_text()
    for name in gentron_fast.__all__:
        assert f"`{name}`" in page, name


def test_the_readme_invites():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_version_is_the_changelogs_newest():
    newest = re.search(r"^## (\S+),", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert gentron_fast.__version__ == newest
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    attribute = project["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert "version" in project["project"]["dynamic"]
    assert attribute == "gentron_fast.__version__"
