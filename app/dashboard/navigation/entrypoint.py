"""The script that Streamlit runs at every visit and every click: navigation, choice of runs, then the page."""

# Streamlit lists a folder `pages` next to its script in a navigation of its own, before st.navigation is called;
# so this script has a folder to itself.

from __future__ import annotations

# And only there: a process that analyses runs imports the script of the server, under another name.
if __name__ == "__main__":
    from functools import partial
    from pathlib import Path

    import streamlit as st

    from depthscope.app.dashboard.components.page import choose_runs, show_page
    from depthscope.app.dashboard.pages import PAGES
    from depthscope.app.dashboard.state.chosen_runs import follow
    from depthscope.diagnostics.memory import give_memory_back

    st.set_page_config(page_title="depthscope", page_icon="🔭", layout="wide")
    pages = {
        page.url_path: st.Page(
            partial(show_page, page), title=page.title, url_path=page.url_path, default=not page.url_path
        )
        for page in PAGES
    }
    current = st.navigation(list(pages.values()))
    st.html(Path(__file__).with_name("page.css"))
    follow(pages)
    # Here and not in the page: a widget that the page itself draws loses its value when the visitor opens another page.
    choose_runs()
    current.run()
    give_memory_back()
