"""Templates: every value is text, whatever it looks like; only what is marked as code is code."""

from __future__ import annotations

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from depthscope.app.text import templates
from depthscope.app.text.latex import Latex, cite, tex, unicode_declarations

HOSTILE = (
    r"<script>x</script> {{ 7 * 6 }} {% raw %} << 7 * 6 >> <% raw %> \input{/etc/passwd} a&b 50% $x$ #1 _ ^ ~"
)


@pytest.fixture
def template(monkeypatch):
    def make(kind, source):
        monkeypatch.setattr(templates, "_source", lambda package, name: source)
        return kind("package", "name")

    return make


def test_html_is_escaped(template):
    page = template(templates.html_template, '<a title="{{ value }}">{{ value }}</a>').render(value=HOSTILE)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert page.count("{{ 7 * 6 }}") == 2  # a value is not a template
    marked = template(templates.html_template, "{{ value }}").render(value=Markup("<b>"))
    assert marked == "<b>"


def test_latex_is_escaped(template):
    source = r"\caption{<< value >>}<% macro twice(x) %><< x >><< x >><% endmacro %><< twice(value)|latex >>"
    page = template(templates.latex_template, source).render(value=HOSTILE)
    assert page == rf"\caption{{{tex(HOSTILE)}}}" + 2 * tex(HOSTILE)
    assert r"\input" not in page
    assert r"50\% \symbol{36}x\symbol{36} \#1" in page
    assert "42" not in page


def test_latex_that_is_marked_is_code(template):
    page = template(templates.latex_template, "<< code >> << keys|cite >> << 3.5 >>")
    assert (
        page.render(code=Latex(r"\alpha_1"), keys=["a2020", "b2021"]) == r"\alpha_1 \citep{a2020,b2021} 3.5"
    )
    assert tex(tex("50%")) == tex("50%") == r"50\%"
    assert cite(["a"]) == r"\citep{a}"


@pytest.mark.parametrize("kind", [templates.html_template, templates.latex_template])
def test_a_missing_value_is_refused(kind, template):
    page = template(kind, "{{ absent }}<< absent >>")
    with pytest.raises(UndefinedError, match="absent"):
        page.render()


def test_every_sign_that_latex_cannot_read_is_declared():
    assert r"\DeclareUnicodeCharacter{03C3}{\ensuremath{\sigma}}" in unicode_declarations().splitlines()
