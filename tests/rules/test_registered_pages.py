"""Every page that a file declares is registered, and answers a question."""

from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("streamlit")  # an extra: without it there are no pages

from depthscope.app.dashboard import pages
from depthscope.app.dashboard.components.page import Page
from depthscope.app.dashboard.pages import PAGES

FILES = sorted(path.stem for path in Path(pages.__file__).parent.rglob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", FILES)
def test_every_file_declares_one_page_that_is_registered(name):
    module = import_module(f"{pages.__name__}.{name}")
    declared = [value for value in vars(module).values() if isinstance(value, Page)]
    assert len(declared) == 1, (
        f"app/dashboard/pages/{name}.py declares {len(declared)} pages; expected one, PAGE = Page(…); "
        "code that pages share belongs in app/dashboard/components"
    )
    assert declared[0] in PAGES, (
        f"app/dashboard/pages/{name}.py declares the page {declared[0].title!r}, which is not registered: "
        f'add the line "{name}", to PAGES in app/dashboard/pages/__init__.py'
    )


def test_every_page_has_an_address_of_its_own_and_the_first_one_is_the_root():
    paths = [page.url_path for page in PAGES]
    # Streamlit serves the page without a path at the root.
    assert paths[0] == ""
    assert all(path.isidentifier() for path in paths[1:]), f"addresses of one word, got {paths}"
    assert len(set(paths)) == len(paths), f"two pages at one address: {paths}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.title)
def test_a_page_answers_a_question_and_draws_itself(page):
    assert page.help.endswith("?"), f"{page.title}: its help is the question that it answers"
    assert page.show is not None or page.show_all is not None
